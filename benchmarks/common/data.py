"""Image data in memory: scikit-learn's digits, CIFAR-10, any folder of images, and noise for tests."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.common.images import cache_folder, read_images

DataName = Literal["digits", "noisy_digits", "cifar10", "folder", "fake"]
IN_FILES = ("cifar10", "folder")
SCORED_AT_ONCE = 100
"""Images of a batch where nothing is trained; larger ones leave the processor's cache."""


@dataclass(frozen=True)
class Split(Dataset[tuple[Tensor, Tensor]]):
    """Images (N, 3, H, W) in uint8 and labels (N,) in int64; DataLoader takes a whole batch at once."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self[indices]


@dataclass(frozen=True)
class ImageData:
    """A training split, one to score on, and one to calibrate on, if any.

    `mirror` says whether a mirrored image keeps its class.
    """

    train: Split
    test: Split
    classes: list[str]
    mirror: bool
    calibration: Split | None = None


def load(
    data: DataName,
    *,
    data_dir: str | None = None,
    image_size: int | None = None,
    train_samples: int | None = None,
    validation_samples: int | None = None,
    calibration_samples: int = 0,
    seed: int = 0,
) -> ImageData:
    """Load a data set, its training split cut to a class-balanced subset on request.

    Args:
        data: "digits" (1,297 training and 500 test images of 32 x 32), "noisy_digits" (the same with noise,
            which a network learns by heart where they are few), "cifar10" (50,000 and 10,000), "folder" (what
            is in `data_dir`) or "fake" (80 and 40 images of noise).
        data_dir: for "cifar10" and "folder": a folder with train/CLASS/*.jpg and test/CLASS/*.jpg, or a tar
            file of it. With None, torchvision downloads CIFAR-10 into the user's cache folder.
        image_size: side in pixels that the images in `data_dir` are scaled and cropped to, see `read_images`;
            None takes them as they are.
        train_samples: how many training images to keep, 1 to all; None keeps all, or all but those for
            validation. The test split stays whole.
        validation_samples: take the split to score on from the other training images instead, and leave the
            test images alone.
        calibration_samples: take so many of the other training images to calibrate on; 0 takes none.
        seed: chooses the subsets.

    Returns:
        The splits and the class names.

    Raises:
        FileNotFoundError: if `data_dir`, or what should be in it, does not exist.
        ValueError: if an argument is out of range or an image cannot be read.
    """
    if data not in get_args(DataName):
        raise ValueError(f"data must be one of {', '.join(get_args(DataName))}, got {data!r}")
    _check_source(data, data_dir, image_size)
    whole = _SOURCES[data]() if data_dir is None else _from_files(data_dir, image_size)
    chosen = disjoint_subsets(
        whole.train.labels, train_samples, calibration_samples, validation_samples, seed
    )
    train, calibration, validation = (None if each is None else Split(*whole.train[each]) for each in chosen)
    assert train is not None
    return replace(whole, train=train, calibration=calibration, test=validation or whole.test)


def _check_source(data: DataName, data_dir: str | None, image_size: int | None) -> None:
    if data_dir is not None and data not in IN_FILES:
        raise ValueError(
            f"data_dir must be None unless data is one of {', '.join(IN_FILES)}, "
            f"got {data_dir!r} with {data!r}"
        )
    if data_dir is None and data == "folder":
        raise ValueError("data_dir must be given where data is 'folder', got None")
    if image_size is not None and (data_dir is None or image_size < 1):
        raise ValueError(
            f"image_size must be at least 1 and needs data_dir, got {image_size} with {data_dir!r}"
        )


def disjoint_subsets(
    labels: Tensor, train: int | None, calibration: int, validation: int | None, seed: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Choose images to train, calibrate and validate on; see `load`.

    Returns:
        Indices of each, in ascending order; None for those that are not wanted.

    Raises:
        ValueError: if a count is out of range.
    """
    wanted = {"calibration_samples": calibration or None, "validation_samples": validation}
    apart = {name: count for name, count in wanted.items() if count is not None}
    free = len(labels) - sum(apart.values())
    for name, count in apart.items():
        most = max(0, free + count - (1 if train is None else train))
        if not 1 <= count <= most:
            raise ValueError(
                f"{name} must be in 1 to {most} (training images less those for other use), got {count}"
            )
    count = free if train is None and apart else train
    trained = taken = balanced_subset(labels, count, seed)
    chosen = {}
    for name, more in apart.items():
        grown = balanced_subset(labels, len(taken) + more, seed)
        chosen[name], taken = grown[~torch.isin(grown, taken)], grown
    return trained, chosen.get("calibration_samples"), chosen.get("validation_samples")


def balanced_subset(labels: Tensor, count: int | None, seed: int) -> Tensor:
    """Choose samples so that the classes are as equal in number as they can be.

    Args:
        labels: (N,) class of each sample.
        count: how many to choose, 1 to N; None chooses all.
        seed: one seed always chooses alike, and a larger count keeps what a smaller one chose.

    Returns:
        (count,) indices in ascending order.

    Raises:
        ValueError: if `count` is out of range.
    """
    if count is None:
        return torch.arange(len(labels))
    if not 1 <= count <= len(labels):
        raise ValueError(f"train_samples must be in 1 to {len(labels)} (all training images), got {count}")
    order = torch.randperm(len(labels), generator=Generator().manual_seed(seed))
    shuffled = labels[order]
    rank_in_class = F.one_hot(shuffled).cumsum(0).gather(1, shuffled[:, None]).squeeze(1)
    return order[rank_in_class.argsort(stable=True)[:count]].sort().values


class ImageDataModule(pl.LightningDataModule):
    """Serve `ImageData` in shuffled, normalised and, on request, augmented batches.

    Shuffling and augmentation draw from a generator of their own, so that runs with one seed see the same
    batches whatever the model and its regularisers draw.

    Args:
        data: images in memory.
        batch_size: samples per batch, at least 1. Training leaves an incomplete last batch out, unless it is
            the only one.
        seed: of the order and the augmentation.
        augment: shift training images by up to an eighth of their side and mirror half of them, the latter
            only where a mirrored image keeps its class.
        moments: mean and standard deviation of each channel, on the scale 0 to 1, that images are normalised
            by; those of the training images by default.

    Raises:
        ValueError: if `batch_size` is below 1.
    """

    def __init__(
        self,
        data: ImageData,
        batch_size: int,
        *,
        seed: int = 0,
        augment: bool = False,
        moments: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.data, self.batch_size, self.seed, self.augment = data, batch_size, seed, augment
        self.mean, self.std = channel_moments(data.train.images) if moments is None else moments

    def train_dataloader(self) -> DataLoader:
        generator = Generator().manual_seed(self.seed)
        return DataLoader(
            self.data.train,
            self.batch_size,
            shuffle=True,
            generator=generator,
            drop_last=len(self.data.train) > self.batch_size,
            collate_fn=partial(self._prepare, generator=generator if self.augment else None),
        )

    def loader(self, split: Split) -> DataLoader:
        """Serve images to score on, in their order."""
        return DataLoader(split, SCORED_AT_ONCE, collate_fn=self._prepare)

    def _prepare(self, batch: Any, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        images, labels = batch
        images = (images.float() / 255 - self.mean) / self.std
        return (images if generator is None else jitter(images, generator, self.data.mirror)), labels


class ValidatedDataModule(ImageDataModule):
    """Let training look at the images to calibrate on after each epoch."""

    def val_dataloader(self) -> DataLoader:
        assert self.data.calibration is not None
        return self.loader(self.data.calibration)


def channel_moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, exactly, from counts of the 256 levels.

    Args:
        images: (N, C, H, W) in uint8.

    Returns:
        Two (C, 1, 1) tensors on the scale 0 to 1; the deviation is at least one level.
    """
    level = torch.linspace(0, 1, 256, dtype=torch.float64)
    counts = [images[:, channel].flatten().bincount(minlength=256) for channel in range(images.shape[1])]
    share = torch.stack(counts) * (images.shape[1] / images.numel())
    mean = share.double() @ level
    std = (share.double() @ level.square() - mean.square()).clamp_min(0).sqrt().clamp_min(1 / 255)
    return mean.float().reshape(-1, 1, 1), std.float().reshape(-1, 1, 1)


def jitter(images: Tensor, generator: Generator, mirror: bool) -> Tensor:
    """Shift each image by up to an eighth of its side, padded with zeros, and mirror half of them.

    Args:
        images: (N, C, H, W).
        generator: draws the shifts and mirrorings, on the device of the images.
        mirror: whether to mirror at all.

    Returns:
        (N, C, H, W) images.
    """
    n, _, height, width = images.shape
    pad = max(height, width) // 8
    top, left = torch.randint(2 * pad + 1, (2, n, 1), generator=generator, device=images.device)
    rows, columns = (torch.arange(side, device=images.device) for side in (height, width))
    rows, columns = top + rows, left + columns
    if mirror:
        is_turned = torch.rand(n, 1, generator=generator, device=images.device) < 0.5
        columns = torch.where(is_turned, columns.flip(1), columns)
    padded = F.pad(images, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
    image = torch.arange(n, device=images.device)[:, None, None]
    moved = padded[image, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()


def _from_files(data_dir: str, image_size: int | None) -> ImageData:
    read = read_images(data_dir, image_size)
    train, test = (Split(read.images[split], read.labels[split]) for split in ("train", "test"))
    return ImageData(train, test, read.classes, mirror=True)


def _digits(noise: float = 0.0) -> ImageData:
    """Scale the 8 x 8 digits, with noise on them, up to 32 x 32; the stratified split never changes."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, targets = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) * (255 / 16)
    if noise:
        images += noise * torch.randn(images.shape, generator=Generator().manual_seed(0))
        images = images.clamp(0, 255)
    images = F.interpolate(images, size=32, mode="bilinear").round().byte().expand(-1, 3, -1, -1)
    whole = Split(images, torch.from_numpy(targets).long())
    train, test = train_test_split(torch.arange(len(whole)), test_size=500, stratify=targets, random_state=0)
    return ImageData(Split(*whole[train]), Split(*whole[test]), list("0123456789"), mirror=False)


def _fake() -> ImageData:
    images = torch.randint(256, (120, 3, 32, 32), dtype=torch.uint8, generator=Generator().manual_seed(0))
    whole = Split(images, torch.arange(120) % 10)
    return ImageData(Split(*whole[:80]), Split(*whole[80:]), list("0123456789"), mirror=True)


def _downloaded_cifar10() -> ImageData:
    from torchvision.datasets import CIFAR10

    parts = [CIFAR10(cache_folder(), train=train, download=True) for train in (True, False)]
    train, test = (
        Split(torch.from_numpy(p.data).permute(0, 3, 1, 2), torch.tensor(p.targets)) for p in parts
    )
    return ImageData(train, test, parts[0].classes, mirror=True)


_SOURCES = {
    "digits": _digits,
    "noisy_digits": partial(_digits, noise=0.4 * 255),
    "cifar10": _downloaded_cifar10,
    "fake": _fake,
}
