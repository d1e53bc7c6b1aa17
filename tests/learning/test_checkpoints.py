"""Checkpoints: where they may lie, what they may hold, and what is said of those that cannot be read."""

import functools
import io
import pydoc
import re
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import fsspec
import pytest
import torch
from fits import Classifier, make_loader, make_trainer
from omegaconf import OmegaConf
from torch import Tensor

from lightning_dropcluster import DropCluster
from lightning_dropcluster.learning.checkpoints import find_checkpoints, read_checkpoint, read_initial_labels
from lightning_dropcluster.learning.clusters import clusters_from_labels
from lightning_dropcluster.learning.scopes import SCOPES, Scope

MAP = SCOPES["map"]


def random_labels(scope: Scope, shape: tuple[int, ...]) -> Tensor:
    """Labels (C, *spatial) that the scope's problems could have."""
    problems, items = scope.problems(shape)
    table = torch.randint(items, (problems, items), generator=torch.Generator().manual_seed(0))
    return table.reshape(scope.label_shape(shape)).expand(shape).clone()


def good_state() -> dict:
    return clusters_from_labels(random_labels(MAP, (3, 2, 2)), MAP, "x").state_dict()


def checkpoint(**more: object) -> dict:
    callbacks = {"DropCluster{}": {"scope": "map", "clusters": {"a": good_state()}}}
    return {"epoch": 3, "global_step": 12, "callbacks": callbacks, **more}


def in_bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("name", SCOPES)
def test_initial_labels_are_read_from_a_mapping(name):
    labels = {layer: random_labels(SCOPES[name], shape) for layer, shape in [("a", (3, 2, 2)), ("b", (2, 5))]}
    found = read_initial_labels(labels, SCOPES[name])
    assert list(found) == ["a", "b"]
    assert all(torch.equal(found[layer].labels, labels[layer]) for layer in labels)


def write_checkpoint(path, callbacks: dict) -> str:
    torch.save({"state_dict": {}, "callbacks": callbacks}, path)
    return str(path)


@pytest.mark.parametrize("as_path", [str, lambda path: path])
def test_initial_labels_are_read_from_a_checkpoint(tmp_path, as_path):
    first, second = good_state(), good_state()
    write_checkpoint(
        tmp_path / "last.ckpt",
        {
            "ModelCheckpoint{}": {"clusters": None},
            "DropClusterMonitor{}": {"clusters": None},
            "DropCluster{'layers': ['c']}": {"scope": "layer", "clusters": {"c": good_state()}},
            "DropCluster{'layers': ['a']}": {"scope": "map", "clusters": {"a": first}},
            "Subclass{'layers': ['b']}": {"scope": "map", "clusters": {"b": second}},
        },
    )
    found = read_initial_labels(as_path(tmp_path / "last.ckpt"), MAP)
    assert {name: clusters.labels.tolist() for name, clusters in found.items()} == {
        "a": first["table"].tolist(),
        "b": second["table"].tolist(),
    }


@pytest.mark.parametrize(
    "checkpoint",
    [
        {},
        [1, 2],
        {"callbacks": {}},
        {"callbacks": {"ModelCheckpoint{}": {"clusters": {}}}},
        {"callbacks": {"DropCluster{}": {"clusters": {}}}},
    ],
)
def test_a_checkpoint_without_labels_is_refused(tmp_path, checkpoint):
    torch.save(checkpoint, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"initial_labels='.*last.ckpt': the checkpoint holds no labels"):
        read_initial_labels(tmp_path / "last.ckpt", MAP)


def test_a_checkpoint_with_labels_of_another_scope_is_refused(tmp_path):
    state = {"scope": "map", "clusters": {"conv1": good_state()}}
    path = write_checkpoint(tmp_path / "last.ckpt", {"DropCluster{}": state})
    with pytest.raises(ValueError, match="no labels of a DropCluster with scope='channel'"):
        read_initial_labels(path, SCOPES["channel"])


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt"):
        read_initial_labels(tmp_path / "nowhere.ckpt", MAP)


@pytest.mark.parametrize("source", [3, None, torch.zeros(2), [("a", torch.zeros(1))]])
def test_initial_labels_that_are_neither_mapping_nor_path_are_a_type_error(source):
    message = rf"initial_labels=.*must be a mapping .* or the path .* not {type(source).__name__}$"
    with pytest.raises(TypeError, match=message):
        read_initial_labels(source, MAP)


def test_faulty_initial_labels_name_the_layer():
    with pytest.raises(TypeError, match=r"labels of layer 'model.conv1': must be an integer tensor"):
        read_initial_labels({"model.conv1": torch.zeros(3, 2, 2)}, MAP)


# Where it lies


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save(checkpoint(), path)
    return path


@pytest.fixture
def memory():
    files = fsspec.filesystem("memory")
    yield "memory://run"
    files.rm("/run", recursive=True)


def test_what_lightning_writes_to_a_url_is_read(memory):
    callback = DropCluster("conv1", start=0.0, num_samples=8)
    trainer = make_trainer(callback, max_epochs=1)
    trainer.fit(Classifier(), make_loader())
    trainer.save_checkpoint(f"{memory}/one.ckpt")
    found = read_initial_labels(f"{memory}/one.ckpt", MAP)
    assert torch.equal(found["model.conv1"].labels, callback.labels["model.conv1"])
    assert find_checkpoints(memory) == [f"{memory}/one.ckpt"]


@pytest.mark.parametrize(
    "name", ["file://{}", "{}", "~/last.ckpt", "local://{}"], ids=["file URL", "plain", "home", "local URL"]
)
def test_paths_are_opened_as_lightning_opens_them(written, monkeypatch, name):
    monkeypatch.setenv("HOME", str(written.parent))
    path = name.format(written)
    for one in [path] if "://" in path else [path, Path(path)]:
        assert list(read_checkpoint(one).clusters) == ["a"]


def test_a_server_that_gives_no_parts_is_read():
    body = in_bytes(checkpoint())

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/last.ckpt" else 404)
            self.end_headers()
            self.wfile.write(body if self.path == "/last.ckpt" else b"")

        do_HEAD = do_GET

        def log_message(self, *_args): ...

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            assert list(read_checkpoint(f"{url}/last.ckpt").clusters) == ["a"]
            with pytest.raises(FileNotFoundError, match=rf"{url}/none.ckpt': No such file"):
                read_initial_labels(f"{url}/none.ckpt", MAP)
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("root", ["tmp_path", "memory"])
def test_of_a_sharded_checkpoint_the_metadata_is_read(request, root):
    run = f"{request.getfixturevalue(root)}/run [1]"
    folder = f"{run}/epoch=3.ckpt"
    files, inside = fsspec.url_to_fs(folder)
    files.makedirs(inside)
    files.pipe_file(f"{inside}/__0_0.distcp", b"a shard")
    files.pipe_file(f"{inside}/meta.pt", in_bytes(checkpoint()))
    for path in (folder, f"{folder}/"):
        assert list(read_initial_labels(path, MAP)) == ["a"]
    assert find_checkpoints(run) == [folder]


def test_a_folder_without_metadata_is_named(tmp_path):
    (tmp_path / "shards").mkdir()
    for name in (".metadata", "__0_0.distcp"):  # as torch.distributed.checkpoint writes them
        (tmp_path / "shards" / name).touch()
    with pytest.raises(IsADirectoryError, match=r"^initial_labels='.*shards': a folder without meta\.pt"):
        read_initial_labels(tmp_path / "shards", MAP)


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("memory://nowhere.ckpt", FileNotFoundError, "No such file"),
        ("nowhere://x.ckpt", ValueError, "Protocol not known: nowhere"),
        ("http://127.0.0.1:1/x.ckpt", OSError, "Cannot connect to host"),
    ],
)
def test_what_cannot_be_opened_is_named(path, error, message):
    with pytest.raises(error, match=f"^initial_labels='{re.escape(path)}': .*{message}"):
        read_initial_labels(path, MAP)


# What it holds


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (OmegaConf.create({"lr": 0.1, "sizes": [1, 2]}), "omegaconf.dictconfig.DictConfig"),
        (Path("data"), "pathlib.PosixPath"),
        (functools.partial(dict, a=1), "functools.partial"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_refused_classes_are_named_and_can_be_allowed(tmp_path, value, name, zipped):
    path = tmp_path / "last.ckpt"
    torch.save(checkpoint(hyper_parameters={"x": value}), path, _use_new_zipfile_serialization=zipped)
    allowed, named = [], set()
    for _ in range(20):
        try:
            with torch.serialization.safe_globals(allowed):
                found = read_initial_labels(path, MAP)
        except ValueError as error:
            (names,) = re.findall(
                r"last\.ckpt': .* torch\.serialization\.add_safe_globals\(\[(.+)\]\)$", str(error)
            )
            assert not named.intersection(names.split(", ")), "what is allowed is refused again"
            named.update(names.split(", "))
            allowed = [pydoc.locate(one) for one in named]
    assert name in named
    assert list(found) == ["a"]
    assert not zipped or len(named) == len(names.split(", ")), "a zip file tells all at once"


class Blocked:
    def __reduce__(self):
        import os

        return os.getcwd, ()


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no checkpoint")


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda path: path.write_text("no checkpoint"), "Unsupported operand 110"),
        (lambda path: path.write_bytes(b""), "EOFError"),
        (
            lambda path: path.write_bytes(in_bytes(checkpoint())[:500]),
            "RuntimeError: PytorchStreamReader failed",
        ),
        (write_zip, "RuntimeError: .*"),
        (lambda path: path.write_bytes(in_bytes(Blocked())), "GLOBAL .*getcwd whose module .* is blocked"),
    ],
    ids=["text", "empty", "cut", "zip", "blocked"],
)
def test_what_is_no_checkpoint_is_told_in_one_line(tmp_path, write, reason):
    write(tmp_path / "last.ckpt")
    with pytest.raises(
        ValueError,
        match=rf"last.ckpt': no checkpoint that torch loads with weights_only=True \(.*{reason}.*\)$",
    ) as raised:
        read_initial_labels(tmp_path / "last.ckpt", MAP)
    assert "\n" not in str(raised.value)
