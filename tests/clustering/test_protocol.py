import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_cdt
from scipy.ndimage import label as connected_parts

from lightning_dropcluster.clustering import Clusterer, FaissKMeans, ReNA, TorchKMeans, Ward
from lightning_dropcluster.clustering.protocol import (
    append_positions,
    canonicalize,
    count_clusters,
    grid_positions,
    nearest_alive,
)


def make_profiles(alive):
    return torch.tensor(alive, dtype=torch.float32)[:, :, None].expand(-1, -1, 3)


@pytest.mark.parametrize("kind", [FaissKMeans, TorchKMeans, Ward, ReNA])
def test_the_clusterers_are_clusterers(kind):
    assert isinstance(kind(), Clusterer)
    assert not isinstance(object(), Clusterer)


@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 6), st.integers(0, 99), st.floats(0, 1))
@settings(deadline=None, max_examples=100)
def test_settled_labels_leave_no_gap_and_keep_what_lives_apart(problems, items, clusters, seed, death):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(clusters, (problems, items), generator=generator)
    alive = torch.rand(problems, items, generator=generator) >= death
    settled = canonicalize(labels, make_profiles(alive.tolist()), clusters)
    for now, before, living in zip(settled, labels, alive, strict=True):
        assert now.unique().tolist() == list(range(len(before[living].unique()) or 1))
        together = before[living][:, None] == before[living]
        assert torch.equal(now[living][:, None] == now[living], together)


def test_closing_gaps_keeps_the_order():
    labels = torch.tensor([[5, 2, 5, 0], [1, 1, 3, 4]])
    settled = canonicalize(labels, torch.ones(2, 4, 3), 6)
    assert settled.tolist() == [[2, 1, 2, 0], [0, 0, 1, 2]]
    assert count_clusters(settled).tolist() == [3, 3]


def test_sound_labels_pass_through_as_int64():
    labels = torch.tensor([[2, 0, 1, 1]], dtype=torch.uint8)
    settled = canonicalize(labels, torch.ones(1, 4, 3), 3)
    assert settled.tolist() == labels.tolist()
    assert settled.dtype == torch.int64


def test_dead_items_join_the_nearest_live_one_on_the_grid():
    alive = [[1, 0, 0, 0, 0, 1]]
    labels = torch.tensor([[0, 2, 2, 2, 2, 1]])
    assert canonicalize(labels, make_profiles(alive), 3, (6,)).tolist() == [[0, 0, 0, 1, 1, 1]]
    assert canonicalize(labels, make_profiles(alive), 3, (2, 3)).tolist() == [[0, 0, 1, 0, 1, 1]]
    assert canonicalize(labels, make_profiles(alive), 3).tolist() == [[0, 0, 0, 1, 1, 1]]


def test_where_nothing_lives_all_share_one_cluster():
    labels = torch.tensor([[0, 1, 2], [0, 1, 2]])
    assert canonicalize(labels, make_profiles([[0, 0, 0], [1, 1, 1]]), 3).tolist() == [[0, 0, 0], [0, 1, 2]]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(2, 3), "fit returns: must be an integer tensor, not a torch.float32 tensor"),
        (torch.zeros(2, 3, dtype=torch.complex64), "integer tensor, not a torch.complex64 tensor"),
        ([[0, 1, 2]] * 2, r"integer tensor, not \[\[0, 1, 2\]"),
    ],
)
def test_labels_that_are_no_integers_raise(labels, message):
    with pytest.raises(TypeError, match=message):
        canonicalize(labels, torch.ones(2, 3, 4), 3)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(2, 4), r"shape \(2, 3\), but returned \(2, 4\)"),
        (torch.zeros(3), r"shape \(2, 3\), but returned \(3,\)"),
        (torch.full((2, 3), -1), r"in \[0, 3\), but returned \[-1, -1\]"),
        (torch.tensor([[0, 1, 2], [0, 1, 3]]), r"in \[0, 3\), but returned \[0, 3\]"),
    ],
)
def test_labels_of_another_shape_or_range_raise(labels, message):
    with pytest.raises(ValueError, match=message):
        canonicalize(labels.long(), torch.ones(2, 3, 4), 3)


@pytest.mark.parametrize("grid", [(5,), (3, 4), (2, 3, 2), (1, 1)])
def test_grid_positions_are_unravelled_indices(grid):
    points = math.prod(grid)
    expected = torch.stack(torch.unravel_index(torch.arange(points), grid), dim=1)
    assert torch.equal(grid_positions(grid), expected.float())


@given(st.lists(st.integers(1, 7), min_size=1, max_size=3), st.floats(0, 1), st.integers(0, 99))
@settings(deadline=None)
def test_the_nearest_live_item_is_nearest_in_steps_on_the_grid(grid, death, seed):
    alive = torch.rand(math.prod(grid), generator=torch.Generator().manual_seed(seed)) >= death
    alive[0] = True
    nearest, positions = nearest_alive(alive[None], tuple(grid))[0], grid_positions(tuple(grid))
    steps = (positions - positions[nearest]).abs().sum(1)
    assert alive[nearest].all()
    assert steps.tolist() == distance_transform_cdt(~alive.reshape(grid).numpy(), "taxicab").ravel().tolist()


@given(st.integers(1, 9), st.integers(1, 9), st.floats(0.3, 1), st.integers(0, 99))
@settings(deadline=None)
def test_items_with_the_same_nearest_live_item_are_connected(rows, columns, death, seed):
    alive = torch.rand(rows * columns, generator=torch.Generator().manual_seed(seed)) >= death
    alive[-1] = True
    nearest = nearest_alive(alive[None], (rows, columns)).reshape(rows, columns)
    assert all(connected_parts((nearest == item).numpy())[1] == 1 for item in nearest.unique())


def test_problems_find_their_live_items_each_for_itself():
    alive = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1]], dtype=torch.bool)
    assert nearest_alive(alive, (4,)).tolist() == [[0] * 4, [-1] * 4, [3] * 4, [0, 1, 2, 3]]


def test_positions_are_appended_in_units_of_profile_length():
    profiles = torch.ones(2, 15, 4)
    points = append_positions(profiles, (3, 5), 0.8)
    assert torch.equal(points[:, :, :4], profiles)
    torch.testing.assert_close(points[:, :, 4:], (grid_positions((3, 5)) * 0.2).expand(2, -1, -1))


def test_each_of_several_grids_has_the_same_positions():
    points = append_positions(torch.ones(1, 30, 4), (3, 5), 1.0)
    assert torch.equal(points[:, :15], points[:, 15:])


def test_dead_items_and_single_points_get_no_position():
    profiles = make_profiles([[1, 0, 1]])
    points = append_positions(profiles, (3,), 1.0)
    assert points[:, :, 3].tolist() == [[0.0, 0.0, 1.0]]
    assert not append_positions(profiles, (3,), 1.0)[0, 1].any()
    assert torch.equal(append_positions(profiles[:, :1], (1,), 1.0)[:, :, 3], torch.zeros(1, 1))
