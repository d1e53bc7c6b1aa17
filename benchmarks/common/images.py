"""Images in train/CLASS/* and test/CLASS/*, read from a folder or straight from a tar file."""

from __future__ import annotations

import io
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

Source = Path | bytes
Files = dict[tuple[str, str], dict[str, Source]]
"""(split, class) to file name to where its bytes are."""

SUFFIXES = (".jpg", ".jpeg", ".png")
SPLITS = ("train", "test")


def find_files(data_dir: str) -> Files:
    """List the images of a folder, or take those of a tar file into memory as they are stored.

    A tar file is read once from start to end: going back in a compressed one means reading it anew.

    Args:
        data_dir: a folder that holds train/CLASS/* and test/CLASS/*, directly or in a folder of its own, or a
            tar file of it, compressed or not.

    Returns:
        The images of each split and class.

    Raises:
        FileNotFoundError: if `data_dir` or what should be in it does not exist, or the splits differ in
            their classes.
        ValueError: if it is a file, but no tar file.
    """
    path = Path(data_dir).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"data_dir must be an existing folder or tar file, got {data_dir!r}")
    files: Files = defaultdict(dict)
    for parts, source in _folder(path) if path.is_dir() else _tar(path):
        if len(parts) in (3, 4) and parts[-3] in SPLITS and parts[-1].lower().endswith(SUFFIXES):
            files[parts[-3], parts[-2]][parts[-1]] = source
    train, test = (class_names(files, split) for split in SPLITS)
    if not train or train != test:
        raise FileNotFoundError(
            "data_dir must hold train/CLASS/*.jpg and test/CLASS/*.jpg of the same classes, "
            f"got {data_dir!r} with train: {train} and test: {test}"
        )
    return files


def class_names(files: Files, split: str = "train") -> list[str]:
    """Name the classes of a split in alphabetical order, which numbers them."""
    return sorted(name for part, name in files if part == split)


def read_split(
    files: Files,
    split: str,
    choose: Callable[[Tensor], Tensor] | None = None,
    image_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Decode the images of one split, or a choice of them.

    Args:
        files: what `find_files` returned.
        split: "train" or "test".
        choose: takes the labels (N,) of all images, in order of class and file name, and returns the indices
            of those wanted; None takes all.
        image_size: side in pixels that the largest square in the middle of each image is scaled to; None
            takes images as they are.

    Returns:
        Images (n, 3, H, W) in uint8 and labels (n,) in int64.

    Raises:
        ValueError: if an image cannot be decoded, or differs in size from the first and `image_size` is None.
    """
    listed = [
        (label, f"{split}/{name}/{file}", source)
        for label, name in enumerate(class_names(files))
        for file, source in sorted(files[split, name].items(), key=lambda item: item[0])
    ]
    labels = torch.tensor([label for label, _, _ in listed])
    chosen = torch.arange(len(labels)) if choose is None else choose(labels)
    names, sources = zip(*[listed[index][1:] for index in chosen.tolist()], strict=True)
    images = [_decode(name, source, image_size) for name, source in zip(names, sources, strict=True)]
    _check_sizes(images, names)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), labels[chosen]


def _check_sizes(images: list[np.ndarray], names: Sequence[str]) -> None:
    for image, name in zip(images, names, strict=True):
        if image.shape != images[0].shape:
            sizes = [f"{shape[1]} x {shape[0]}" for shape in (image.shape, images[0].shape)]
            raise ValueError(
                f"images must have one size where image_size is None, got {sizes[0]} for {name}, "
                f"{sizes[1]} for {names[0]}"
            )


def _decode(name: str, source: Source, image_size: int | None) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            colours = image.convert("RGB")
            if image_size is not None:
                colours = ImageOps.fit(colours, (image_size, image_size), Image.Resampling.BICUBIC)
            return np.array(colours)
    except OSError as error:
        raise ValueError(f"{name} cannot be decoded: {error}") from error


def _folder(path: Path) -> Iterator[tuple[tuple[str, ...], Source]]:
    direct = any((path / split).is_dir() for split in SPLITS)
    for split in SPLITS:
        for file in path.glob(f"{split}/*/*" if direct else f"*/{split}/*/*"):
            yield file.relative_to(path).parts, file


def _tar(path: Path) -> Iterator[tuple[tuple[str, ...], Source]]:
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isfile() else None
                if content is not None:
                    yield PurePosixPath(member.name).parts, content.read()
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"data_dir must be a folder or a tar file, got {str(path)!r} ({error})") from error
