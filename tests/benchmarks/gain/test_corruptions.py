import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform, gaussian_filter
from sklearn.datasets import load_sample_image

from benchmarks.gain.corruptions import CORRUPTIONS, SEVERITIES, corrupt

FLOWER = torch.from_numpy(load_sample_image("flower.jpg").copy())[60:380, 150:534].permute(2, 0, 1)
IMAGES = torch.stack(
    [patch for row in FLOWER.split(64, 1) for patch in row.split(64, 2)]  # 30 patches of 64 x 64
)[:, :, ::2, ::2].contiguous()
EACH = pytest.mark.parametrize("name", CORRUPTIONS)


def damage(name, severity):
    return float((corrupt(IMAGES, name, severity).float() - IMAGES.float()).square().mean())


@EACH
def test_images_stay_images(name):
    corrupted = corrupt(IMAGES, name, 5)
    assert corrupted.dtype == torch.uint8
    assert corrupted.shape == IMAGES.shape
    assert corrupted.is_contiguous()
    assert not torch.equal(corrupted, IMAGES)


@EACH
def test_corruptions_repeat_and_leave_their_input_alone(name):
    before = IMAGES.clone()
    assert torch.equal(corrupt(IMAGES, name, 3, seed=1), corrupt(IMAGES, name, 3, seed=1))
    assert torch.equal(IMAGES, before)


@pytest.mark.parametrize("name", ["gaussian_noise", "elastic", "occlusion"])
def test_another_seed_draws_anew(name):
    assert not torch.equal(corrupt(IMAGES, name, 3, seed=1), corrupt(IMAGES, name, 3, seed=2))


@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name != "elastic"])
def test_damage_grows_with_severity(name):
    damages = [damage(name, severity) for severity in SEVERITIES]
    assert damages[0] > 0
    assert damages == sorted(damages)


@pytest.mark.parametrize(("severity", "deviation"), [(1, 0.04), (5, 0.10)])
def test_noise_has_the_deviation_of_cifar_c(severity, deviation):
    grey = torch.full((20, 3, 32, 32), 128, dtype=torch.uint8)
    noise = corrupt(grey, "gaussian_noise", severity).float() / 255 - 128 / 255
    assert noise.std().item() == pytest.approx(deviation, rel=0.02)


def test_brightness_scales_each_colour_to_a_higher_maximum():
    bright = corrupt(IMAGES, "brightness", 2).float()
    largest = IMAGES.amax(1, keepdim=True).float()
    raised = (largest + 0.1 * 255).clamp_max(255)
    expected = torch.where(largest > 0, IMAGES * raised / largest.clamp_min(1), raised)
    assert (bright - expected).abs().max() <= 1


def test_contrast_keeps_means_and_shrinks_deviations():
    flat = corrupt(IMAGES, "contrast", 4).float()
    assert (flat.mean((2, 3)) - IMAGES.float().mean((2, 3))).abs().max() < 1
    torch.testing.assert_close(flat.std((2, 3)), 0.3 * IMAGES.float().std((2, 3)), atol=0.5, rtol=0.02)


def test_a_point_is_blurred_to_the_softened_disk():
    point = torch.zeros(1, 3, 9, 9, dtype=torch.uint8)
    point[:, :, 4, 4] = 255
    blurred = corrupt(point, "defocus_blur", 4)[0, 0].float() / 255  # radius 1: five pixels
    disk = np.zeros((9, 9))
    disk[[4, 3, 5, 4, 4], [4, 4, 4, 3, 5]] = 0.2
    expected = gaussian_filter(disk, 0.2, radius=1)
    assert np.abs(blurred.numpy() - expected).max() < 1 / 255
    weak = corrupt(point, "defocus_blur", 1)[0, 0].float() / 255  # radius 0.3: one pixel
    assert weak[4, 4] < 1
    assert weak.sum() == pytest.approx(1, abs=9 / 255)


def test_elastic_at_severity_1_is_affine():
    ramp = torch.arange(32, dtype=torch.float32).mul(4).round().byte().expand(1, 3, 32, 32).contiguous()
    moved = corrupt(ramp, "elastic", 1)[0, 0].float()
    second = [moved[8:24, 8:24].diff(n=2, dim=axis).abs().max() for axis in (0, 1)]
    assert max(second) <= 2  # levels are whole
    assert (moved - ramp[0, 0].float()).abs().max() > 2


def test_resampling_agrees_with_scipy():
    from benchmarks.gain.corruptions import _resample

    x = IMAGES[:1].permute(0, 2, 3, 1).double().numpy()
    columns, rows = np.meshgrid(np.arange(32), np.arange(32))
    source = np.stack([columns * 0.9 - 5.3, rows * 1.2 + 4.6], axis=-1)[None]
    for twice, mode in ((True, "reflect"), (False, "mirror")):
        expected = affine_transform(x[0, :, :, 0], [1.2, 0.9], [4.6, -5.3], order=1, mode=mode)
        np.testing.assert_allclose(_resample(x, source, edge_twice=twice)[0, :, :, 0], expected, atol=1e-9)


def test_occlusion_covers_one_square():
    white = torch.full((40, 3, 32, 32), 255, dtype=torch.uint8)
    covered = corrupt(white, "occlusion", 5)[:, 0] < 255
    assert covered.sum((1, 2)).tolist() == [16 * 16] * 40
    assert covered.any(2).sum(1).tolist() == [16] * 40
    assert covered.any(0).sum() > 16 * 16


@pytest.mark.parametrize(
    ("images", "name", "severity", "message"),
    [
        (IMAGES, "fog", 1, r"name must be one of gaussian_noise, .*, got 'fog'"),
        (IMAGES, "jpeg", 0, r"severity must be 1 to 5, got 0"),
        (IMAGES.float(), "jpeg", 1, r"images must be \(N, 3, H, W\) in uint8, got .* in torch\.float32"),
        (IMAGES[:, :1], "jpeg", 1, r"images must be \(N, 3, H, W\) in uint8, got \(30, 1, 32, 32\)"),
    ],
)
def test_bad_input(images, name, severity, message):
    with pytest.raises(ValueError, match=message):
        corrupt(images, name, severity)
