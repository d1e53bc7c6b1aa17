"""The clusters of a layer: packing, checkpoints, and what is refused."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_dropcluster.learning.clusters import (
    Clusters,
    check_channels,
    clusters_from_labels,
    clusters_from_state,
    smallest_table,
)
from lightning_dropcluster.learning.scopes import SCOPES, Scope

SHAPES = st.tuples(st.integers(1, 4)) | st.lists(st.integers(1, 4), min_size=2, max_size=4).map(tuple)
NAMES = st.sampled_from(sorted(SCOPES))
MAP = SCOPES["map"]
relaxed = settings(deadline=None)


def random_labels(scope: Scope, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Labels (C, *spatial) that the scope's problems could have."""
    problems, items = scope.problems(shape)
    table = torch.randint(items, (problems, items), generator=torch.Generator().manual_seed(seed))
    return table.reshape(scope.label_shape(shape)).expand(shape).clone()


def through_file(value: object, path) -> object:
    torch.save(value, path)
    return torch.load(path, weights_only=True)


def good_state() -> dict:
    return clusters_from_labels(random_labels(MAP, (3, 2, 2)), MAP, "x").state_dict()


# Packing


@relaxed
@given(NAMES, SHAPES, st.integers(0, 99))
def test_labels_come_back_as_they_were_given(name, shape, seed):
    labels = random_labels(SCOPES[name], shape, seed)
    assert torch.equal(clusters_from_labels(labels, SCOPES[name], "x").labels, labels)


@relaxed
@given(NAMES, SHAPES, st.integers(0, 99))
def test_only_the_table_is_kept_and_it_is_small(name, shape, seed):
    clusters = clusters_from_labels(random_labels(SCOPES[name], shape, seed), SCOPES[name], "x")
    assert tuple(clusters.table.shape) == SCOPES[name].label_shape(shape)
    assert clusters.shape == shape
    assert clusters.table.dtype == torch.uint8
    assert clusters.table.untyped_storage().nbytes() == math.prod(clusters.table.shape)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_integer_type_are_taken(dtype):
    labels = random_labels(MAP, (3, 2, 2))
    assert torch.equal(clusters_from_labels(labels.to(dtype), MAP, "x").labels, labels)


def test_the_labels_are_int64_and_not_the_table():
    clusters = clusters_from_labels(torch.zeros(2, 2, dtype=torch.uint8), SCOPES["channel"], "x")
    labels = clusters.labels
    labels[0, 0] = 7
    assert labels.dtype == torch.int64
    assert labels.tolist() == [[7, 0], [0, 0]]
    assert clusters.labels.tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("largest", "dtype"),
    [
        (0, torch.uint8),
        (255, torch.uint8),
        (256, torch.int16),
        (32767, torch.int16),
        (32768, torch.int32),
        (2**31 - 1, torch.int32),
    ],
)
def test_a_table_is_stored_in_the_smallest_type_that_fits(largest, dtype):
    table = smallest_table(torch.tensor([[0, largest], [1, 2]]).T)
    assert table.dtype == dtype
    assert table.is_contiguous()
    assert table.tolist() == [[0, 1], [largest, 2]]


# Labels that are refused


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (torch.zeros(3, 2, 2), "a torch.float32 tensor"),
        (torch.zeros(3, 2, 2, dtype=torch.float16), "a torch.float16 tensor"),
        (torch.zeros(3, 2, 2, dtype=torch.bool), "a torch.bool tensor"),
        (torch.zeros(3, 2, 2).numpy(), "array("),
        ([[0, 1]], "[[0, 1]]"),
        (None, "None"),
    ],
)
def test_labels_that_are_no_integer_tensor_name_the_layer(labels, found):
    message = re.escape(f"labels of layer 'model.x': must be an integer tensor, not {found}")
    with pytest.raises(TypeError, match=message):
        clusters_from_labels(labels, MAP, "model.x")
    with pytest.raises(TypeError, match=message):
        clusters_from_state({"table": labels, "shape": [3, 2, 2]}, MAP, "model.x")


@pytest.mark.parametrize("name", SCOPES)
@pytest.mark.parametrize("shape", [(), (0,), (0, 2), (2, 0), (2, 3, 0)])
def test_labels_without_features_name_the_layer_and_the_shape(name, shape):
    message = re.escape(f"labels of layer 'x' have shape {shape}: must be (C, *spatial)")
    with pytest.raises(ValueError, match=message):
        clusters_from_labels(torch.zeros(shape, dtype=torch.int64), SCOPES[name], "x")


@relaxed
@given(NAMES, SHAPES, st.sampled_from([-1, None]))
def test_labels_out_of_range_name_the_layer_and_the_range(name, shape, label):
    items = SCOPES[name].problems(shape)[1]
    labels = torch.full(shape, items if label is None else label)
    message = re.escape(f"labels of layer 'x' are in [{labels[(0,) * len(shape)]}, ")
    with pytest.raises(ValueError, match=message + rf".*must be in \[0, {items}\)"):
        clusters_from_labels(labels, SCOPES[name], "x")


@relaxed
@given(NAMES, SHAPES)
def test_the_largest_label_allowed_is_one_less_than_there_are_items(name, shape):
    items = SCOPES[name].problems(shape)[1]
    assert int(clusters_from_labels(torch.full(shape, items - 1), SCOPES[name], "x").table.max()) == items - 1


@pytest.mark.parametrize("name", ["position", "channel"])
def test_labels_that_the_scope_does_not_share_are_refused(name):
    with pytest.raises(ValueError, match=rf"are not shared as scope='{name}' asks"):
        clusters_from_labels(torch.arange(4).reshape(2, 2) % 3 % 2, SCOPES[name], "x")


# State


@relaxed
@given(NAMES, SHAPES, st.integers(0, 99))
def test_a_state_is_unpacked_to_equal_clusters(name, shape, seed):
    clusters = clusters_from_labels(random_labels(SCOPES[name], shape, seed), SCOPES[name], "x")
    loaded = clusters_from_state(clusters.state_dict(), SCOPES[name], "x")
    assert torch.equal(loaded.table, clusters.table)
    assert loaded.table.dtype == clusters.table.dtype
    assert loaded.shape == clusters.shape


@pytest.mark.parametrize("name", SCOPES)
@pytest.mark.parametrize("shape", [(4,), (2, 300), (2, 3, 4), (1, 2, 3, 4)])
def test_a_state_goes_through_a_file_that_holds_plain_values_only(tmp_path, name, shape):
    clusters = clusters_from_labels(random_labels(SCOPES[name], shape), SCOPES[name], "x")
    loaded = clusters_from_state(through_file(clusters.state_dict(), tmp_path / "state"), SCOPES[name], "x")
    assert torch.equal(loaded.labels, clusters.labels)
    assert (loaded.table.dtype, loaded.shape) == (clusters.table.dtype, shape)


@pytest.mark.parametrize("state", [None, 3, [], {}, {"table": 1}, {"table": 1, "shape": 1, "more": 1}])
def test_a_state_with_other_entries_names_the_layer(state):
    message = re.escape(f"state of layer 'x': must hold 'table' and 'shape', but is {state!r}")
    with pytest.raises(ValueError, match=message):
        clusters_from_state(state, MAP, "x")


@pytest.mark.parametrize("shape", [None, 3, [], "322", [3, 2, -2], [3, 0, 2], [3.0, 2, 2], [True, 2, 2]])
def test_a_state_with_a_faulty_shape_names_the_layer_and_the_shape(shape):
    message = re.escape(
        f"state of layer 'x': shape={shape!r}: must be a list (C, *spatial) of positive integers"
    )
    with pytest.raises(ValueError, match=message):
        clusters_from_state(good_state() | {"shape": shape}, MAP, "x")


@pytest.mark.parametrize(("name", "shape"), [("map", [3, 4]), ("map", [2, 2, 3]), ("channel", [3, 2, 2])])
def test_a_table_that_does_not_fit_shape_and_scope_is_refused(name, shape):
    message = re.escape(f"table of shape (3, 2, 2) does not fit shape={tuple(shape)} and scope={name!r}")
    with pytest.raises(ValueError, match=f"state of layer 'x': a {message}"):
        clusters_from_state(good_state() | {"shape": shape}, SCOPES[name], "x")


@pytest.mark.parametrize("label", [-1, 4, 1000])
def test_a_table_out_of_range_is_refused(label):
    table = torch.full((3, 2, 2), label)
    with pytest.raises(
        ValueError, match=rf"labels of layer 'x' are in \[{label}, {label}\]: must be in \[0, 4"
    ):
        clusters_from_state(good_state() | {"table": table}, MAP, "x")


# The layer


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(1, 3, 1), nn.ConvTranspose1d(1, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Identity()]
)
def test_labels_fit_a_layer_of_as_many_channels_or_one_that_does_not_tell(layer):
    check_channels(Clusters(torch.zeros(3, 2, 2), (3, 2, 2)), layer, "x")


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 1), nn.ConvTranspose3d(3, 4, 1), nn.BatchNorm2d(4)])
def test_labels_for_a_layer_of_other_channels_name_both_counts(layer):
    with pytest.raises(ValueError, match="labels of layer 'x' have 3 channels, but the layer has 4"):
        check_channels(Clusters(torch.zeros(3, 2, 2), (3, 2, 2)), layer, "x")
