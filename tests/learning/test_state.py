"""The callback's state as input: what is taken, and what each fault is called."""

import re

import pytest
import torch

from lightning_dropcluster import DropCluster
from lightning_dropcluster.learning.clusters import clusters_from_labels
from lightning_dropcluster.learning.scopes import SCOPES
from lightning_dropcluster.learning.sketch import Sketch
from lightning_dropcluster.learning.state import read_state

LABELS = torch.arange(4).reshape(1, 2, 2).repeat(3, 1, 1)
ENTRIES = ("scope", "progress", "clusters", "shapes", "windows_opened", "window", "memory")
FAULTY_SHAPES = [None, 3, [], "322", [3, 0, 2], [3.0, 2, 2], [True, 2, 2]]
MISSING = object()


def good_state() -> dict:
    """What a callback writes in mid-training, with a window open."""
    sketch = Sketch((3, 2, 2), scope="map", num_samples=8)
    sketch.update(torch.randn(4, 3, 2, 2))
    return {
        "scope": "map",
        "progress": {
            "origin": 2,
            "passed": 3,
            "began": [2, 10, 0],
            "every": 5,
            "counts_steps": False,
        },
        "clusters": {"conv1": clusters_from_labels(LABELS, SCOPES["map"], "conv1").state_dict()},
        "shapes": {"conv1": [3, 2, 2]},
        "windows_opened": 4,
        "window": {"conv1": {"shape": list(sketch.shape), **sketch.state_dict()}},
        "memory": {"conv1": torch.zeros(3, 4, 8)},
    }


def altered(path: str, value: object) -> dict:
    """Return a good state in which one entry, named by dots, is another or missing."""
    state = good_state()
    *parents, last = path.split(".")
    holder = state
    for parent in parents:
        holder = holder[parent]
    if value is MISSING:
        del holder[last]
    else:
        holder[last] = value
    return state


# What is taken


def test_the_clusters_are_unpacked():
    found = read_state(good_state(), "map")
    assert list(found) == ["conv1"]
    assert torch.equal(found["conv1"].labels, LABELS)


def test_a_state_goes_through_a_file_that_holds_plain_values_only(tmp_path):
    torch.save(good_state(), tmp_path / "state")
    found = read_state(torch.load(tmp_path / "state", weights_only=True), "map")
    assert torch.equal(found["conv1"].labels, LABELS)


@pytest.mark.parametrize("scope", SCOPES)
def test_the_state_of_a_callback_that_has_not_trained_is_taken(scope):
    assert read_state(DropCluster("conv1", scope=scope).state_dict(), scope) == {}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("window", None),
        ("window", {}),
        ("clusters", {}),
        ("shapes", {}),
        ("windows_opened", 0),
        ("progress.origin", None),
        ("progress.passed", 0),
        ("progress.began", None),
        ("progress.began", [0, 0, 0]),
        ("entry of a later version", 1),
        ("reclustering", {"wait_steps": 5}),  # of an earlier version
    ],
)
def test_a_state_of_another_moment_is_taken(path, value):
    assert read_state(altered(path, value), "map").keys() <= {"conv1"}


# What is refused


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_missing_entry_is_named(entry):
    with pytest.raises(
        ValueError, match=f"^state_dict: {entry} missing; it was not written by this callback"
    ):
        read_state(altered(entry, MISSING), "map")


def test_all_missing_entries_are_named():
    with pytest.raises(ValueError, match=f"^state_dict: {', '.join(ENTRIES)} missing"):
        read_state({}, "map")


@pytest.mark.parametrize("entry", ["origin", "passed", "began", "every", "counts_steps"])
def test_a_missing_entry_of_the_progress_is_named(entry):
    with pytest.raises(ValueError, match=rf"^state_dict\['progress'\]: {entry} missing"):
        read_state(altered(f"progress.{entry}", MISSING), "map")


@pytest.mark.parametrize("entry", ["shape", "moments", "count"])
def test_a_missing_entry_of_a_sketch_is_named(entry):
    with pytest.raises(ValueError, match=rf"^state_dict\['window'\]\['conv1'\]: {entry} missing"):
        read_state(altered(f"window.conv1.{entry}", MISSING), "map")


@pytest.mark.parametrize("state", [None, [], "state", 3])
def test_a_state_that_is_no_mapping_is_a_type_error(state):
    with pytest.raises(TypeError, match=f"^state_dict: must be a mapping, not {type(state).__name__}"):
        read_state(state, "map")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("progress", "['progress']"),
        ("clusters", "['clusters']"),
        ("shapes", "['shapes']"),
        ("window", "['window']"),
        ("memory", "['memory']"),
        ("window.conv1", "['window']['conv1']"),
    ],
)
@pytest.mark.parametrize("value", [3, [], "x"])
def test_an_entry_that_is_no_mapping_is_a_type_error(path, name, value):
    message = re.escape(f"state_dict{name}: must be a mapping, not {type(value).__name__}")
    with pytest.raises(TypeError, match=message):
        read_state(altered(path, value), "map")


@pytest.mark.parametrize("value", ["layer", "maps", None, 3, ["map"]])
def test_another_scope_is_refused(value):
    message = re.escape(f"state_dict: it was written with scope={value!r}, not scope='map'")
    with pytest.raises(ValueError, match=message):
        read_state(altered("scope", value), "map")


@pytest.mark.parametrize("path", ["progress.origin", "progress.passed", "windows_opened"])
@pytest.mark.parametrize("value", [-1, 1.0, True, "1", [1]])
def test_a_faulty_count_is_named(path, value):
    message = re.escape(f"state_dict: {path.split('.')[-1]}={value!r} must be an integer of at least 0")
    with pytest.raises(ValueError, match=message):
        read_state(altered(path, value), "map")


@pytest.mark.parametrize("path", ["progress.passed", "windows_opened"])
def test_only_the_origin_may_be_none(path):
    with pytest.raises(ValueError, match="=None must be an integer"):
        read_state(altered(path, None), "map")


@pytest.mark.parametrize("value", [0.25, [1, 2], [1, 2, -1], [1, 2, 0.5], [True, 0, 0], "123"])
def test_a_faulty_beginning_is_named(value):
    message = re.escape(f"state_dict: began={value!r} must be None or epoch, step and batch, of at least 0")
    with pytest.raises(ValueError, match=message):
        read_state(altered("progress.began", value), "map")


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (None, ValueError, "state of layer 'conv1': must hold"),
        (
            {"table": LABELS.float(), "shape": [3, 2, 2]},
            TypeError,
            "labels of layer 'conv1': must be an integer",
        ),
        ({"table": LABELS, "shape": [4, 3]}, ValueError, "state of layer 'conv1': a table of shape"),
        ({"table": LABELS, "shape": [0, 2, 2]}, ValueError, "positive integers"),
        ({"table": LABELS + 1, "shape": [3, 2, 2]}, ValueError, "labels of layer 'conv1' are in"),
    ],
)
def test_faulty_clusters_name_the_layer(value, error, message):
    with pytest.raises(error, match=message):
        read_state(altered("clusters.conv1", value), "map")


@pytest.mark.parametrize("value", FAULTY_SHAPES)
@pytest.mark.parametrize(
    ("path", "name"),
    [("shapes.conv1", "['shapes']['conv1']"), ("window.conv1.shape", "['window']['conv1']['shape']")],
)
def test_a_faulty_shape_names_the_layer(path, name, value):
    message = re.escape(f"state_dict{name}={value!r}: must be a list (C, *spatial) of positive integers")
    with pytest.raises(ValueError, match=message):
        read_state(altered(path, value), "map")


@pytest.mark.parametrize("path", ["progress.every", "progress.passed"])
@pytest.mark.parametrize("value", [-1, 1.5, None, torch.tensor([])])
def test_faulty_progress_is_named(path, value):
    with pytest.raises(ValueError, match=rf"state_dict: {path.partition('.')[2]}=.* must be an integer"):
        read_state(altered(path, value), "map")


@pytest.mark.parametrize("value", [None, 1, torch.tensor([])])
def test_what_progress_counts_is_a_bool(value):
    with pytest.raises(TypeError, match=r"state_dict: counts_steps=.* must be a bool"):
        read_state(altered("progress.counts_steps", value), "map")


@pytest.mark.parametrize("value", [torch.zeros(3), torch.full((3, 4, 8), torch.nan), None])
def test_faulty_running_profiles_name_the_layer(value):
    with pytest.raises(ValueError, match="layer 'conv1' must be finite float32"):
        read_state(altered("memory.conv1", value), "map")
