"""Images in train/CLASS/* and test/CLASS/*, in a folder or a tar file; decoded once, and kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.lib.format import open_memmap
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import is_image_file as is_image

SPLITS = ("train", "test")
File = tuple[str, str, Path | bytes]
"""Class, file name, and where the bytes are."""
Files = dict[str, list[File]]
"""Split to its files, in order of class and name."""
_WANTED = "data_dir must hold train/CLASS/*.jpg and test/CLASS/*.jpg of the same classes, got {}: {}"
FORMAT = 1  # of what is kept; another number leaves aside what was kept before


@dataclass(frozen=True)
class Decoded:
    """The images of each split, (N, 3, H, W) in uint8, read from the disk where they are used; and labels."""

    images: dict[str, Tensor]
    labels: dict[str, Tensor]
    classes: list[str]


def cache_folder() -> Path:
    """Return the folder for what is downloaded or decoded once."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lightning_dropcluster"


def read_images(data_dir: str, image_size: int | None = None) -> Decoded:
    """Read all images, which are decoded the first time and kept in the user's cache folder.

    What is kept is found again by place, size and time of the files.

    Args:
        data_dir: a folder that holds train/CLASS/* and test/CLASS/*, directly or in a folder of its own, or a
            tar file of it, compressed or not.
        image_size: side in pixels that the largest square in the middle of each image is scaled to; None
            takes images as they are.

    Raises:
        FileNotFoundError: if `data_dir` or what should be in it does not exist, or the splits differ in
            their classes.
        ValueError: if it is a file, but no tar file, an image cannot be decoded, or it differs in size from
            the first and `image_size` is None.
    """
    path = Path(data_dir).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"data_dir must be an existing folder or tar file, got {data_dir!r}")
    kept = cache_folder() / "decoded" / _fingerprint(path, image_size)
    if not kept.exists():
        _decode_into(kept, path, image_size)
    return Decoded(
        # Copy on write: torch wants memory that it may write to.
        {split: torch.from_numpy(np.load(kept / f"{split}.npy", mmap_mode="c")) for split in SPLITS},
        {split: torch.from_numpy(np.load(kept / f"{split}_labels.npy")) for split in SPLITS},
        json.loads((kept / "classes.json").read_text()),
    )


def _fingerprint(path: Path, image_size: int | None) -> str:
    files = sorted(path.glob("**/*.*")) if path.is_dir() else [path]
    states = [(str(file.relative_to(path)), file.stat()) for file in files]
    listed = [(name, state.st_size, state.st_mtime_ns) for name, state in states]
    about = json.dumps([FORMAT, str(path.resolve()), image_size, listed])
    return hashlib.sha256(about.encode()).hexdigest()[:20]


def _decode_into(kept: Path, path: Path, image_size: int | None) -> None:
    """Decode in a folder aside, so that a process that runs at the same time sees all or nothing."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    files = _in_folder(path) if path.is_dir() else _in_tar(path)
    classes = [sorted({name for name, _, _ in files[split]}) for split in SPLITS]
    if not classes[0] or classes[0] != classes[1]:
        raise FileNotFoundError(_WANTED.format(path, f"train: {classes[0]} and test: {classes[1]}"))
    with TemporaryDirectory(dir=kept.parent) as aside:
        made = Path(aside) / "made"
        made.mkdir()
        for split in SPLITS:
            labels = [classes[0].index(name) for name, _, _ in files[split]]
            np.save(made / f"{split}_labels.npy", np.array(labels))
            _decode(files[split], split, made / f"{split}.npy", image_size)
        (made / "classes.json").write_text(json.dumps(classes[0]))
        try:
            made.rename(kept)
        except OSError:
            if not kept.exists():  # else another process was first
                raise


def _in_folder(path: Path) -> Files:
    home = next((folder for folder in (path, *sorted(path.glob("*/"))) if (folder / "train").is_dir()), path)
    try:
        folders = {split: ImageFolder(str(home / split)) for split in SPLITS}
    except FileNotFoundError as error:
        raise FileNotFoundError(_WANTED.format(path, error)) from error
    return {
        split: [(folder.classes[label], Path(file).name, Path(file)) for file, label in folder.samples]
        for split, folder in folders.items()
    }


def _in_tar(path: Path) -> Files:
    """Take the files into memory, in one pass: to go back in a compressed one is to read it anew."""
    found: Files = {split: [] for split in SPLITS}
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                parts = PurePosixPath(member.name).parts
                content = archive.extractfile(member) if is_image(member.name) else None
                if content is not None and len(parts) in (3, 4) and parts[-3] in SPLITS:
                    found[parts[-3]].append((parts[-2], parts[-1], content.read()))
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"data_dir must be a folder or a tar file, got {str(path)!r} ({error})") from error
    return {split: sorted(files, key=lambda file: file[:2]) for split, files in found.items()}


def _decode(files: Sequence[File], split: str, out: Path, image_size: int | None) -> None:
    names = ["/".join((split, *file[:2])) for file in files]
    array = None
    for index, (_, _, source) in enumerate(files):
        image = _load(names[index], source, image_size)
        height, width = image.shape[1:]
        if array is None:
            array = open_memmap(out, "w+", np.uint8, (len(files), 3, height, width))
        if array.shape[2:] != (height, width):
            raise ValueError(
                f"images must have one size where image_size is None, got {width} x {height} for "
                f"{names[index]}, {array.shape[3]} x {array.shape[2]} for {names[0]}"
            )
        array[index] = image


def _load(name: str, source: Path | bytes, image_size: int | None) -> np.ndarray:
    """Decode an image to (3, H, W)."""
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            colours = image.convert("RGB")
    except OSError as error:
        raise ValueError(f"{name} cannot be decoded: {error}") from error
    if image_size is not None:
        colours = ImageOps.fit(colours, (image_size, image_size), Image.Resampling.BICUBIC)
    return np.asarray(colours).transpose(2, 0, 1)
