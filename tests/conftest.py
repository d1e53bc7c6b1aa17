"""What all tests share."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else idle threads of torch and FAISS spin
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tiny tensors threads wait for each other, most of the time

import pytest
import torch
from fits import make_loader
from hypothesis import settings
from PIL import Image
from torch.utils.data import DataLoader

settings.register_profile("unhurried", deadline=None)  # a busy machine is no fault of the code
settings.load_profile("unhurried")


@pytest.fixture
def loader() -> DataLoader:
    return make_loader()


@pytest.fixture
def jpeg_tree(tmp_path):
    """CIFAR-10's layout in small: 3 classes of 6 training and 2 test images, 8 x 8 pixels."""
    generator = torch.Generator().manual_seed(0)
    root = tmp_path / "images"
    for split, count in (("train", 6), ("test", 2)):
        for name in ("cat", "airplane", "ship"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(256, (8, 8, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(folder / f"{index:04d}.jpg")
    return root


@pytest.fixture(autouse=True)
def _own_cache(request, monkeypatch):
    """Leave the user's cache folder alone, where benchmarks keep images decoded."""
    if "benchmarks" in request.path.parts:
        folder = request.getfixturevalue("tmp_path") / "cache"
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
