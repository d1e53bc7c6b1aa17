"""CIFAR-C-style corruptions of small images: eight kinds at five severities, repeatable by seed.

Constants and order of operations are those with which CIFAR-10-C was made (Hendrycks and Dietterich 2019,
https://arxiv.org/abs/1903.12261; `make_cifar_c.py` of their repository), which are milder than ImageNet-C's.
The images are not those of CIFAR-10-C: the draws differ, blur and elastic interpolate with torch instead of
OpenCV, and `occlusion` is not in it. So results are called CIFAR-C-style, never CIFAR-10-C.
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor

Images = NDArray[np.float64]
"""(N, H, W, 3) on the scale 0 to 1."""
Corruption = Callable[[Images, int, Generator], Images]

SEVERITIES = (1, 2, 3, 4, 5)
NOISE_DEVIATIONS = (0.04, 0.06, 0.08, 0.09, 0.10)
DEFOCUS_RADII = (0.3, 0.4, 0.5, 1.0, 1.5)
DEFOCUS_SOFTENINGS = (0.4, 0.5, 0.6, 0.2, 0.1)
BRIGHTNESS_SHIFTS = (0.05, 0.1, 0.15, 0.2, 0.3)
CONTRAST_FACTORS = (0.75, 0.5, 0.4, 0.3, 0.15)
JPEG_QUALITIES = (80, 65, 58, 50, 40)
PIXELATE_SIDES = (0.95, 0.9, 0.85, 0.75, 0.65)
ELASTIC_STRENGTHS = (0.0, 0.05, 0.08, 0.1, 0.1)  # these three in sides of the image
ELASTIC_SMOOTHINGS = (0.0, 0.2, 0.06, 0.04, 0.03)
AFFINE_SHIFTS = (0.08, 0.07, 0.06, 0.05, 0.03)
OCCLUSION_SIDES = (0.2, 0.275, 0.35, 0.425, 0.5)  # ours


def corrupt(images: Tensor, name: str, severity: int, seed: int = 0) -> Tensor:
    """Corrupt images in one way.

    Args:
        images: (N, 3, H, W) in uint8.
        name: a key of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: of the draws; each name and severity draws its own.

    Returns:
        (N, 3, H, W) in uint8; values are cut to whole levels as CIFAR-10-C's were.

    Raises:
        ValueError: if an argument is out of range.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"name must be one of {', '.join(CORRUPTIONS)}, got {name!r}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity must be 1 to 5, got {severity}")
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise ValueError(f"images must be (N, 3, H, W) in uint8, got {tuple(images.shape)} in {images.dtype}")
    generator = np.random.default_rng([seed, list(CORRUPTIONS).index(name), severity])
    pixels = images.permute(0, 2, 3, 1).numpy().astype(np.float64) / 255
    changed = CORRUPTIONS[name](pixels, severity - 1, generator).clip(0, 1) * 255
    # What comes out of an exact operation must not fall a level by rounding.
    return torch.from_numpy((changed + 1e-6).astype(np.uint8)).permute(0, 3, 1, 2).contiguous()


def gaussian_noise(x: Images, level: int, generator: Generator) -> Images:
    """Add independent normal noise to each value."""
    return x + generator.normal(scale=NOISE_DEVIATIONS[level], size=x.shape)


def defocus_blur(x: Images, level: int, generator: Generator) -> Images:
    """Average over a disk with a softened rim."""
    radius, softening = DEFOCUS_RADII[level], DEFOCUS_SOFTENINGS[level]
    reach = int(np.ceil(radius)) + 1
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = (rows**2 + columns**2 <= radius**2).astype(np.float64)
    edge = np.exp(-(np.array([-1.0, 0.0, 1.0]) ** 2) / (2 * softening**2))
    soft = np.outer(edge, edge) / edge.sum() ** 2
    kernel = F.conv2d(
        _channels_first(disk[None, :, :, None] / disk.sum()), torch.tensor(soft)[None, None], padding=1
    )
    padded = F.pad(_channels_first(x), (reach,) * 4, mode="reflect")
    return _channels_last(F.conv2d(padded, kernel.expand(3, 1, -1, -1), groups=3))


def brightness(x: Images, level: int, generator: Generator) -> Images:
    """Raise the value of the HSV colour."""
    hsv = rgb_to_hsv(x)
    hsv[..., 2] = (hsv[..., 2] + BRIGHTNESS_SHIFTS[level]).clip(0, 1)
    return hsv_to_rgb(hsv)


def contrast(x: Images, level: int, generator: Generator) -> Images:
    """Draw each channel of an image towards its mean."""
    means = x.mean(axis=(1, 2), keepdims=True)
    return (x - means) * CONTRAST_FACTORS[level] + means


def jpeg(x: Images, level: int, generator: Generator) -> Images:
    """Compress and decompress."""

    def recode(image: Image.Image) -> Image.Image:
        buffer = BytesIO()
        image.save(buffer, "JPEG", quality=JPEG_QUALITIES[level])
        return Image.open(buffer)

    return _through_pillow(x, recode)


def pixelate(x: Images, level: int, generator: Generator) -> Images:
    """Scale down and up again by averaging boxes."""

    def coarsen(image: Image.Image) -> Image.Image:
        small = [max(1, int(side * PIXELATE_SIDES[level])) for side in image.size]
        return image.resize((small[0], small[1]), Image.Resampling.BOX).resize(
            image.size, Image.Resampling.BOX
        )

    return _through_pillow(x, coarsen)


def elastic(x: Images, level: int, generator: Generator) -> Images:
    """Shift three points apart, which is an affine map, and then each pixel a little, neighbours alike.

    From severity 1 to 5 the affine part falls and the local part rises, as in CIFAR-10-C.
    """
    n, height, width, _ = x.shape
    side = min(height, width)
    bent = _resample(
        x, _affine_grid(n, (height, width), AFFINE_SHIFTS[level] * side, generator), edge_twice=False
    )
    noise = generator.uniform(-1, 1, (n, height, width, 2))
    smoothing = ELASTIC_SMOOTHINGS[level] * side
    smooth = gaussian_filter(noise, (0, smoothing, smoothing, 0), mode="reflect", truncate=3)
    return _resample(bent, _pixels(height, width) + smooth * ELASTIC_STRENGTHS[level] * side, edge_twice=True)


def occlusion(x: Images, level: int, generator: Generator) -> Images:
    """Cover a square at a random place with grey."""
    n, height, width, _ = x.shape
    side = round(OCCLUSION_SIDES[level] * min(height, width))
    top = generator.integers(0, height - side, (n, 1, 1), endpoint=True)
    left = generator.integers(0, width - side, (n, 1, 1), endpoint=True)
    rows, columns = np.arange(height)[:, None], np.arange(width)
    covered = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
    return np.where(covered[..., None], 0.5, x)


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": gaussian_noise,
    "defocus_blur": defocus_blur,
    "brightness": brightness,
    "contrast": contrast,
    "jpeg": jpeg,
    "pixelate": pixelate,
    "elastic": elastic,
    "occlusion": occlusion,
}
"""Name to what it does to (images, severity - 1, generator)."""


def _through_pillow(x: Images, change: Callable[[Image.Image], Image.Image]) -> Images:
    levels = (x * 255).round().astype(np.uint8)
    return np.stack([np.asarray(change(Image.fromarray(image))) for image in levels]) / 255.0


def _pixels(height: int, width: int) -> NDArray[np.float64]:
    """Column and row of each pixel, (H, W, 2)."""
    return np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float64)


def _affine_grid(n: int, shape: tuple[int, int], reach: float, generator: Generator) -> NDArray[np.float64]:
    """Where each pixel comes from when three points of an image move by up to `reach`, (N, H, W, 2)."""
    middle, arm = np.array(shape[::-1]) // 2, min(shape) // 3
    before = middle + arm * np.array([[1, 1], [1, -1], [-1, -1]])
    after = before + generator.uniform(-reach, reach, (n, 3, 2))
    # (x', y', 1) @ back = (x, y), from three points of which both are known
    back = np.linalg.solve(
        np.concatenate([after, np.ones((n, 3, 1))], axis=2), np.broadcast_to(before, after.shape)
    )
    pixels = _pixels(*shape).reshape(1, -1, 2)
    return (pixels @ back[:, :2] + back[:, 2:]).reshape(n, *shape, 2)


def _resample(x: Images, source: NDArray[np.float64], *, edge_twice: bool) -> Images:
    """Look pixels up at (column, row) bilinearly, mirrored at the edge, whose pixels count once or twice."""
    height, width = x.shape[1:3]
    sides = np.array([width, height])
    scaled = (2 * source + 1) / sides - 1 if edge_twice else 2 * source / (sides - 1) - 1
    grid = torch.from_numpy(np.broadcast_to(scaled, (len(x), height, width, 2)).copy())
    looked_up = F.grid_sample(
        _channels_first(x), grid, mode="bilinear", padding_mode="reflection", align_corners=not edge_twice
    )
    return _channels_last(looked_up)


def _channels_first(x: Images) -> Tensor:
    return torch.from_numpy(x).permute(0, 3, 1, 2)


def _channels_last(x: Tensor) -> Images:
    return x.permute(0, 2, 3, 1).numpy()
