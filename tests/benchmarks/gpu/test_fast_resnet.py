"""The fast network and its batches, on the CPU."""

import torch
from torch import Generator
from torch.nn import functional as F

from benchmarks.common.data import Split
from benchmarks.gpu.fast_resnet import DeviceBatches, FastResNet, cutout, triangle, whitening


def smooth_images(count=64):
    noise = torch.randn(count, 3, 8, 8, generator=Generator().manual_seed(0))
    return F.avg_pool2d(F.pad(noise, (1, 1, 1, 1)), 3, 1) + 0.1 * noise


def test_whitened_patches_are_uncorrelated():
    images = smooth_images()
    patches = F.conv2d(images, whitening(images)).movedim(1, 0).flatten(1)
    assert torch.allclose(patches[:12] @ patches[:12].T / patches.shape[1], torch.eye(12), atol=0.05)
    assert torch.equal(patches[12:], -patches[:12])


def test_groups_begin_as_the_identity():
    group = FastResNet(smooth_images(), 10, (24, 32, 32)).groups[0]
    x = torch.rand(2, 24, 4, 4)
    assert torch.equal(group.conv1(x), x)


def test_an_epoch_shows_each_image_once():
    images = torch.arange(10, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    moments = (torch.zeros(3, 1, 1), torch.ones(3, 1, 1))
    batches = DeviceBatches(Split(images, torch.arange(10)), moments, 3, seed=0, mirror=True)
    epochs = [list(batches), list(batches)]
    for epoch in epochs:
        assert [len(labels) for _, labels in epoch] == [3] * len(batches) == [3, 3, 3]
        labels = torch.cat([labels for _, labels in epoch])
        assert len(labels.unique()) == 9
        brightest = torch.cat([images for images, _ in epoch]).amax((1, 2, 3)) * 255
        assert torch.allclose(brightest.round(), labels.float())
    assert not torch.equal(epochs[0][0][1], epochs[1][0][1])


def test_cutout_blanks_one_square():
    blank = cutout(torch.ones(100, 3, 32, 32), Generator().manual_seed(0), share=0.25)[:, 0] == 0
    assert set(blank.any(2).sum(1).tolist()) <= {*range(3, 9)}
    assert torch.equal(blank, blank.any(2)[:, :, None] & blank.any(1)[:, None, :])


def test_the_learning_rate_rises_and_falls():
    rates = [triangle(position / 100) for position in range(101)]
    assert rates.index(max(rates)) == 23
    assert [round(rate, 2) for rate in (rates[0], rates[23], rates[100])] == [0.2, 1.0, 0.07]
