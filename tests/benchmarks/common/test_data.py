import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from benchmarks.common import images
from benchmarks.common.data import (
    ImageDataModule,
    balanced_subset,
    channel_moments,
    disjoint_subsets,
    jitter,
    load,
)


def same(a, b):
    splits = ((a.train, b.train), (a.test, b.test))
    return all(torch.equal(x.images, y.images) and torch.equal(x.labels, y.labels) for x, y in splits)


def pack(tree, path, arcname):
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        archive.add(tree, arcname=arcname)
    return str(path)


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=60),
    st.integers(0, 99),
    st.floats(0, 1, exclude_min=True),
)
def test_subsets_are_balanced_repeatable_and_nested(classes, seed, share):
    labels = torch.tensor(classes)
    count = max(1, int(share * len(labels)))
    chosen = balanced_subset(labels, count, seed)
    assert len(chosen.unique()) == count
    assert torch.equal(chosen, chosen.sort().values)
    assert torch.equal(chosen, balanced_subset(labels, count, seed))
    assert set(balanced_subset(labels, (count + 1) // 2, seed).tolist()) <= set(chosen.tolist())
    taken, there = labels[chosen].bincount(minlength=4), labels.bincount(minlength=4)
    assert taken[taken < there].numel() == 0 or taken.max() - taken[taken < there].min() <= 1


@pytest.mark.parametrize("train", [20, None])
def test_images_to_calibrate_on_are_neither_trained_on_nor_tested(train):
    plain, data = load("fake", train_samples=train), load("fake", train_samples=train, calibration_samples=30)
    assert plain.calibration is None
    assert data.calibration.labels.bincount().tolist() == [3] * 10
    assert len(data.train) == (train or 50)
    assert torch.equal(data.test.images, plain.test.images)
    splits = (data.train, data.test, data.calibration)
    images = [tuple(image.flatten().tolist()) for split in splits for image in split.images]
    assert len(set(images)) == len(images)


def test_another_seed_chooses_other_samples():
    labels = torch.arange(100) % 10
    assert not torch.equal(balanced_subset(labels, 30, 0), balanced_subset(labels, 30, 1))


@given(st.integers(0, 9), st.integers(1, 40), st.integers(0, 20), st.integers(1, 40))
def test_subsets_are_balanced_and_disjoint(seed, train, calibration, validation):
    labels = torch.arange(100) % 4
    chosen = disjoint_subsets(labels, train, calibration, validation, seed)
    assert torch.equal(chosen[0], balanced_subset(labels, train, seed))
    assert [0 if part is None else len(part) for part in chosen] == [train, calibration, validation]
    together = torch.cat([part for part in chosen if part is not None])
    assert len(together.unique()) == len(together)
    taken = labels[together].bincount(minlength=4)
    assert taken.max() - taken.min() <= 1
    if calibration:
        assert torch.equal(chosen[1], disjoint_subsets(labels, train, calibration, None, seed)[1])


def test_all_but_the_images_apart_are_trained_on():
    chosen = disjoint_subsets(torch.arange(20) % 2, None, 4, 6, 0)
    assert torch.cat(chosen).sort().values.tolist() == list(range(20))


@pytest.mark.parametrize(
    ("name", "train", "count", "most"),
    [
        ("validation_samples", 70, 11, 10),
        ("validation_samples", 70, 0, 10),
        ("validation_samples", None, 80, 79),
        ("calibration_samples", 70, 11, 10),
        ("calibration_samples", 90, 1, 0),
    ],
)
def test_images_apart_must_be_left(name, train, count, most):
    with pytest.raises(ValueError, match=rf"{name} must be in 1 to {most} .*, got {count}"):
        load("fake", train_samples=train, **{name: count})


def test_digits_are_split_alike_for_all_seeds():
    data = load("digits", seed=0)
    assert data.train.images.shape == (1297, 3, 32, 32)
    assert data.test.images.shape == (500, 3, 32, 32)
    assert data.train.images.dtype == torch.uint8
    assert data.train.images.min() == 0
    assert data.train.images.max() == 255
    assert data.test.labels.bincount().tolist() == pytest.approx([50] * 10, abs=2)
    subset = load("digits", train_samples=100, seed=1)
    assert torch.equal(subset.test.images, data.test.images)
    assert subset.train.labels.bincount().tolist() == [10] * 10


def test_noise_on_digits_never_changes_and_leaves_labels_alone():
    plain, noisy = load("digits"), load("noisy_digits", seed=1)
    assert same(noisy, load("noisy_digits", seed=2))
    assert torch.equal(noisy.test.labels, plain.test.labels)
    assert (noisy.train.images.float() - plain.train.images).std() > 50


def test_fake_images_differ_but_never_change():
    assert same(load("fake", seed=0), load("fake", seed=5))
    assert len(load("fake", train_samples=20).train) == 20


@pytest.mark.parametrize("name", ["images.tar", "images.tar.gz"])
@pytest.mark.parametrize("arcname", ["", ".", "cifar10"])
def test_a_tar_file_gives_what_its_folder_gives(jpeg_tree, tmp_path, name, arcname):
    packed = pack(jpeg_tree, tmp_path / name, arcname)
    for train_samples in (None, 7):
        options = {"train_samples": train_samples, "seed": 3}
        folder = load("cifar10", data_dir=str(jpeg_tree), **options)
        assert same(folder, load("cifar10", data_dir=packed, **options))


def test_folders_are_read_with_and_without_a_leading_folder(jpeg_tree):
    data = load("cifar10", data_dir=str(jpeg_tree))
    assert same(data, load("cifar10", data_dir=str(jpeg_tree.parent)))
    assert data.classes == ["airplane", "cat", "ship"]
    assert data.train.images.shape == (18, 3, 8, 8)
    assert data.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    with Image.open(jpeg_tree / "test" / "cat" / "0001.jpg") as image:
        assert np.array_equal(data.test.images[3].permute(1, 2, 0).numpy(), np.asarray(image))


def test_a_folder_of_any_images_is_cropped_to_the_middle_and_scaled(jpeg_tree):
    own = load("folder", data_dir=str(jpeg_tree))
    assert same(own, load("folder", data_dir=str(jpeg_tree), image_size=8))
    wide = Image.new("RGB", (40, 20), "blue")
    wide.paste("red", (5, 0, 35, 20))
    wide.save(jpeg_tree / "test" / "cat" / "0000.png")
    with pytest.raises(ValueError, match=r"one size where image_size is None, got 40 x 20 for test/cat/0000"):
        load("folder", data_dir=str(jpeg_tree))
    data = load("folder", data_dir=str(jpeg_tree), image_size=4)
    assert data.train.images.shape == (18, 3, 4, 4)
    assert data.test.images[3].tolist() == [[[level] * 4] * 4 for level in (255, 0, 0)]


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("folder", {}, "data_dir must be given where data is 'folder', got None"),
        ("digits", {"data_dir": "x"}, "data_dir must be None unless data is one of cifar10, folder, got 'x'"),
        ("cifar10", {"image_size": 64}, "image_size must be at least 1 and needs data_dir, got 64 with None"),
        ("folder", {"data_dir": "x", "image_size": 0}, "image_size must be at least 1 and needs .*, got 0"),
    ],
)
def test_where_images_come_from_is_checked_first(data, options, message):
    with pytest.raises(ValueError, match=message):
        load(data, **options)


def test_images_are_decoded_once_until_their_files_change(jpeg_tree, tmp_path, monkeypatch):
    paths, decoded = [str(jpeg_tree), pack(jpeg_tree, tmp_path / "images.tar", "")], []
    first = [load("cifar10", data_dir=path) for path in paths]
    monkeypatch.setattr(images.Image, "open", decoded.append)
    assert all(same(load("cifar10", data_dir=path), one) for path, one in zip(paths, first, strict=True))
    assert not decoded
    monkeypatch.undo()
    Image.new("RGB", (8, 8)).save(jpeg_tree / "test" / "cat" / "0000.jpg")
    assert not load("cifar10", data_dir=str(jpeg_tree)).test.images[2].any()


def test_nothing_is_kept_of_images_that_cannot_be_decoded(jpeg_tree):
    file = jpeg_tree / "train" / "cat" / "0003.jpg"
    good, _ = file.read_bytes(), file.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"train/cat/0003\.jpg cannot be decoded"):
        load("cifar10", data_dir=str(jpeg_tree))
    file.write_bytes(good)
    assert len(load("cifar10", data_dir=str(jpeg_tree)).train) == 18
    kept = list((images.cache_folder() / "decoded").iterdir())
    assert len(kept) == 1


def test_without_a_folder_torchvision_downloads(monkeypatch, tmp_path):
    def cifar10(root, train, download):
        assert download
        assert root.is_relative_to(tmp_path)
        pixels = np.full((20, 32, 32, 3), 7 if train else 9, dtype=np.uint8)
        return SimpleNamespace(data=pixels, targets=[i % 10 for i in range(20)], classes=list("abcdefghij"))

    monkeypatch.setattr("torchvision.datasets.CIFAR10", cifar10)
    data = load("cifar10", train_samples=10)
    assert data.train.images.shape == (10, 3, 32, 32)
    assert data.train.labels.unique().numel() == 10
    assert (data.test.images == 9).all()


@pytest.mark.parametrize("count", [0, -1, 81])
def test_train_samples_out_of_range(count):
    with pytest.raises(ValueError, match=rf"train_samples must be in 1 to 80 .*got {count}"):
        load("fake", train_samples=count)


def test_bad_names_and_paths(tmp_path, jpeg_tree):
    with pytest.raises(
        ValueError, match=r"data must be one of digits, .*, cifar10, folder, fake, got 'mnist'"
    ):
        load("mnist")
    with pytest.raises(
        FileNotFoundError, match=r"data_dir must be an existing folder or tar file, got '.*none'"
    ):
        load("cifar10", data_dir=str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=r"data_dir must hold train/CLASS.*got .*"):
        load("cifar10", data_dir=str(jpeg_tree / "train"))
    (jpeg_tree / "test" / "ship").rename(jpeg_tree / "test" / "boat")
    with pytest.raises(FileNotFoundError, match=r"same classes.*'ship'.*'boat'"):
        load("cifar10", data_dir=str(jpeg_tree))


def test_files_that_are_no_or_half_a_tar(tmp_path, jpeg_tree):
    text = tmp_path / "notes.txt"
    text.write_text("no archive" * 100)
    with pytest.raises(ValueError, match=r"data_dir must be a folder or a tar file, got '.*notes\.txt'"):
        load("cifar10", data_dir=str(text))
    whole = tmp_path / "whole.tar.gz"
    pack(jpeg_tree, whole, "")
    half = tmp_path / "half.tar.gz"
    half.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"data_dir must be a folder or a tar file, got '.*half\.tar\.gz'"):
        load("cifar10", data_dir=str(half))


def test_images_of_several_sizes(jpeg_tree):
    Image.new("RGB", (9, 8)).save(jpeg_tree / "test" / "cat" / "0001.jpg")
    with pytest.raises(ValueError, match=r"images must have one size.*test/cat/0001\.jpg"):
        load("cifar10", data_dir=str(jpeg_tree))


def test_batches_are_normalised_by_the_training_images():
    data = load("digits")
    module = ImageDataModule(data, 1297)
    ((images, labels),) = module.train_dataloader()
    assert images.mean((0, 2, 3)).abs().max() < 1e-4
    assert (images.std((0, 2, 3)) - 1).abs().max() < 1e-3
    assert labels.bincount().tolist() == data.train.labels.bincount().tolist()
    images, labels = (torch.cat(parts) for parts in zip(*module.loader(data.test), strict=True))
    assert torch.equal(labels, data.test.labels)
    assert torch.allclose(images * module.std + module.mean, data.test.images / 255, atol=1e-5)


def test_channel_moments_of_constant_channels_are_finite():
    mean, std = channel_moments(torch.full((2, 3, 4, 4), 255, dtype=torch.uint8))
    assert mean.flatten().tolist() == [1, 1, 1]
    assert (std == 1 / 255).all()


@pytest.mark.parametrize("augment", [False, True])
def test_batches_depend_on_the_seed_alone(augment):
    def epochs(seed):
        loader = ImageDataModule(load("fake"), 16, seed=seed, augment=augment).train_dataloader()
        torch.rand(3)
        return torch.stack([torch.cat([images for images, _ in loader]) for _ in range(2)])

    assert torch.equal(epochs(0), epochs(0))
    assert not torch.equal(epochs(0), epochs(1))
    assert not torch.equal(*epochs(0))


@pytest.mark.parametrize(("batch_size", "batches"), [(32, [32, 32]), (80, [80]), (100, [80])])
def test_an_incomplete_batch_is_left_out_unless_it_is_the_only_one(batch_size, batches):
    module = ImageDataModule(load("fake"), batch_size)
    assert [len(labels) for _, labels in module.train_dataloader()] == batches
    assert sum(len(labels) for _, labels in module.loader(load("fake").test)) == 40


def test_batch_size_below_1():
    with pytest.raises(ValueError, match=r"batch_size must be at least 1, got 0"):
        ImageDataModule(load("fake"), 0)


@pytest.mark.parametrize("mirror", [False, True])
def test_jitter_shifts_and_mirrors(mirror):
    images = torch.rand(200, 1, 16, 16) + 1
    moved = jitter(images, torch.Generator().manual_seed(0), mirror)
    assert moved.shape == images.shape
    shifts = [(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3)]
    inner = moved[:, 0, 2:-2, 2:-2]

    def matches(source):
        windows = [source[:, 0, 2 + dy : 14 + dy, 2 + dx : 14 + dx] for dy, dx in shifts]
        return torch.stack([(window == inner).all(-1).all(-1) for window in windows])

    plain, mirrored = matches(images), matches(images.flip(3))
    assert (plain.any(0) | mirrored.any(0)).all()
    assert plain.any(1).all()
    assert mirrored.any(0).float().mean().item() == pytest.approx(0.5 if mirror else 0, abs=0.15)
