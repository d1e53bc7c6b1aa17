"""Scopes against naive loops over samples, maps and positions."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_dropcluster.learning.scopes import SCOPES

SHAPES = st.tuples(st.integers(1, 4)) | st.lists(st.integers(1, 4), min_size=2, max_size=4).map(tuple)
NAMES = st.sampled_from(sorted(SCOPES))
relaxed = settings(deadline=None)


def numbered(samples: int, shape: tuple[int, ...]) -> Tensor:
    """Return an activation (N, C, S) in which no value occurs twice."""
    channels, positions = shape[0], math.prod(shape[1:])
    return torch.arange(samples * channels * positions).reshape(samples, channels, positions)


def naive_rows(name: str, x: Tensor) -> list[list[int]]:
    """One row per observation, one column per item, by loops."""
    samples, maps, positions = (range(size) for size in x.shape)
    at = x.tolist()
    match name:
        case "map" | "layer":
            return [[at[n][c][s] for c in maps for s in positions] for n in samples]
        case "position":
            return [[at[n][c][s] for s in positions] for n in samples for c in maps]
        case "channel":
            return [[at[n][c][s] for c in maps] for n in samples for s in positions]


def full_labels(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Random labels (C, *spatial) that the scope's problems could have."""
    problems, items = SCOPES[name].problems(shape)
    labels = torch.randint(items, (problems, items), generator=torch.Generator().manual_seed(seed))
    return labels.reshape(SCOPES[name].label_shape(shape)).expand(shape)


@relaxed
@given(NAMES, SHAPES, st.integers(0, 3))
def test_rows_are_those_of_a_naive_loop(name, shape, samples):
    x = numbered(samples, shape)
    assert SCOPES[name].rows(x).tolist() == naive_rows(name, x)


@relaxed
@given(NAMES, SHAPES, st.integers(1, 3))
def test_rows_have_one_row_per_observation_and_one_column_per_item(name, shape, samples):
    scope = SCOPES[name]
    expected = (samples * scope.observations(shape), math.prod(scope.problems(shape)))
    assert tuple(scope.rows(numbered(samples, shape)).shape) == expected


@relaxed
@given(NAMES, SHAPES, st.integers(1, 2))
def test_a_column_holds_the_values_of_the_features_that_its_label_goes_to(name, shape, samples):
    scope, x = SCOPES[name], numbered(samples, shape)
    items = math.prod(scope.problems(shape))
    item_of_feature = torch.arange(items).reshape(scope.label_shape(shape)).expand(shape).flatten()
    for item in range(items):
        values = x.flatten(1)[:, item_of_feature == item]
        assert scope.rows(x)[:, item].sort().values.tolist() == values.flatten().sort().values.tolist()


@relaxed
@given(NAMES, SHAPES)
def test_a_label_for_each_item_makes_the_label_table(name, shape):
    scope = SCOPES[name]
    assert math.prod(scope.label_shape(shape)) == math.prod(scope.problems(shape))


@relaxed
@given(NAMES, SHAPES)
def test_each_map_is_a_problem_where_maps_have_clusters_of_their_own(name, shape):
    scope = SCOPES[name]
    assert scope.problems(shape)[0] == (shape[0] if scope.per_map else 1)


@relaxed
@given(NAMES, SHAPES)
def test_a_grid_has_a_point_for_each_item(name, shape):
    grid = SCOPES[name].grid(shape)
    assert grid is None or math.prod(grid) == SCOPES[name].problems(shape)[1]


@relaxed
@given(NAMES, SHAPES, st.integers(0, 99))
def test_full_labels_are_the_table_broadcast_back(name, shape, seed):
    labels = full_labels(name, shape, seed)
    table = SCOPES[name].compress(labels)
    assert tuple(table.shape) == SCOPES[name].label_shape(shape)
    assert torch.equal(table.expand(shape), labels)


@relaxed
@given(st.sampled_from(["position", "channel"]), SHAPES, st.integers(0, 99), st.data())
def test_labels_that_differ_where_the_scope_shares_are_refused(name, shape, seed, data):
    labels = full_labels(name, shape, seed).clone()
    assume(SCOPES[name].label_shape(shape) != shape)
    labels.view(-1)[data.draw(st.integers(0, labels.numel() - 1))] += 1
    with pytest.raises(ValueError, match=rf"labels of shape \(.*\) are not shared as scope='{name}' asks"):
        SCOPES[name].compress(labels)


def test_the_table_is_a_view_of_the_labels():
    labels = torch.zeros(3, 2, 2, dtype=torch.int64)
    for scope in SCOPES.values():
        assert scope.compress(labels).data_ptr() == labels.data_ptr()


def test_scopes_are_filed_under_their_names():
    assert {name: scope.name for name, scope in SCOPES.items()} == {name: name for name in SCOPES}
    assert list(SCOPES) == ["map", "position", "layer", "channel"]
