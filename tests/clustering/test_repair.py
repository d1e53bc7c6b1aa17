import numpy as np
import pytest
import repair_in_numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_dropcluster.clustering import repair as module
from lightning_dropcluster.clustering.repair import repair as repair_all


def repair(points, labels, *settings):
    """Repair a single problem in which all lives."""
    points, labels = (torch.from_numpy(one)[None] for one in (points, labels))
    alive = torch.ones_like(labels, dtype=torch.bool)
    return repair_all(points, alive, labels, *settings)[0].numpy()


def numpy_repairs(points, alive, labels, num_clusters, *shares):
    """Repair one problem after the other by the reference."""
    repaired = torch.zeros_like(labels)
    for problem, lives in enumerate(alive):
        if lives.any():
            some, row = points[problem, lives].numpy(), labels[problem, lives].numpy()
            row = repair_in_numpy.repair(some, row, min(num_clusters, len(some)), *shares)
            repaired[problem, lives] = torch.from_numpy(row)
    return repaired


def by_appearance(labels):
    """Number clusters anew, each by its first member."""
    _, first, which = np.unique(labels, return_index=True, return_inverse=True)
    return first.argsort().argsort()[which]


def make_problems(problems=12, items=150, clusters=13, dead=0.2, seed=0):
    """Clusterings in all states: crowded, collapsed, with gaps, with few points, dead."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(problems, items, 6, generator=generator)
    labels = (clusters * torch.rand(problems, items, generator=generator) ** 4).long()
    labels[1], labels[2], labels[3, :100] = 0, 2 * (labels[2] // 2), 5
    alive = torch.rand(problems, items, generator=generator) >= dead
    points[4, 90:], points[5], alive[6], alive[7, clusters - 3 :] = points[4, :1], 1.0, False, False
    points[8, 20:90] = points[8, 0]
    return points * alive[:, :, None], alive, labels


@pytest.mark.parametrize("shares", [(0.25, 4.0), (0.5, 2.0), (0.0, 3.0), (0.3, float("inf"))], ids=str)
@pytest.mark.parametrize("block", [1, 500, 2**18])
def test_many_problems_at_once_are_repaired_as_one_by_one_in_numpy(monkeypatch, shares, block):
    monkeypatch.setattr(module, "_BLOCK", block)
    points, alive, labels = make_problems()
    repaired, expected = (f(points, alive, labels, 13, *shares) for f in (repair_all, numpy_repairs))
    for problem, lives in enumerate(alive):
        if len(points[problem, lives].unique(dim=0)) <= 13:  # each point a cluster, in any order
            repaired[problem, lives], expected[problem, lives] = (
                torch.from_numpy(by_appearance(one[problem, lives].numpy())) for one in (repaired, expected)
            )
    assert torch.equal(repaired, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_repairs_as_a_cpu_does():
    problems = make_problems()
    there = repair_all(*(one.cuda() for one in problems), 13, 0.25, 4.0).cpu()
    assert (there == repair_all(*problems, 13, 0.25, 4.0)).float().mean() > 0.999


class Looks(TorchDispatchMode):
    """Count the operations whose results a GPU's host has to wait for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.nonzero, torch.ops.aten._local_scalar_dense)
        return func(*args, **(kwargs or {}))


def test_more_problems_make_the_host_wait_no_more_often():
    problems, waits = make_problems(), []
    for times in (1, 10):
        with Looks() as looks:
            repair_all(*(one.repeat(times, *[1] * (one.ndim - 1)) for one in problems), 13, 0.25, 4.0)
        waits.append(looks.count)
    assert waits[0] == waits[1]


@st.composite
def clusterings(draw, distinct=True):
    """Points, any labels for them and a share; without ``distinct`` some points are copies."""
    num_points, num_clusters = draw(st.integers(1, 60)), draw(st.integers(1, 12))
    num_points = max(num_points, num_clusters)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    points = rng.standard_normal((num_points, 3)).astype(np.float32)
    if not distinct:
        points = points[rng.integers(draw(st.integers(1, num_points)), size=num_points)]
    labels = draw(hnp.arrays(np.int64, num_points, elements=st.integers(0, num_clusters - 1)))
    return points, labels, num_clusters, draw(st.floats(0, 0.5))


@given(clusterings())
@settings(deadline=None, max_examples=60)
def test_no_cluster_is_empty_or_below_the_floor(clustering):
    points, _, num_clusters, min_share = clustering
    sizes = np.bincount(repair(*clustering), minlength=num_clusters)
    assert len(sizes) == num_clusters
    assert sizes.min() >= max(1, int(min_share * len(points) / num_clusters))


@given(clusterings(distinct=False))
@settings(deadline=None, max_examples=60)
def test_copies_leave_no_cluster_empty_that_could_have_a_member(clustering):
    points, _, num_clusters, _ = clustering
    labels = repair(*clustering)
    possible = min(num_clusters, len(np.unique(points, axis=0)))
    assert labels.shape == (len(points),)
    assert labels.dtype == np.int64
    assert labels.min() >= 0
    assert labels.max() < num_clusters
    assert len(np.unique(labels)) >= possible


@given(clusterings(distinct=False))
@settings(deadline=None, max_examples=40)
def test_the_arguments_stay_as_they_were(clustering):
    points, labels, num_clusters, min_share = clustering
    copies = points.copy(), labels.copy()
    repair(points, labels, num_clusters, min_share)
    np.testing.assert_array_equal(points, copies[0])
    np.testing.assert_array_equal(labels, copies[1])


@given(clusterings(), st.floats(2, 6))
@settings(deadline=None, max_examples=60)
def test_no_cluster_is_above_the_bound_and_the_floor_holds(clustering, max_share):
    points, _, num_clusters, min_share = clustering
    sizes = np.bincount(repair(*clustering, max_share), minlength=num_clusters)
    assert sizes.max() <= max_share * len(points) / num_clusters
    assert sizes.min() >= max(1, int(min_share * len(points) / num_clusters))


@given(clusterings(distinct=False))
@settings(deadline=None, max_examples=40)
def test_only_copies_of_one_point_may_be_above_the_bound(clustering):
    points, _, num_clusters, _ = clustering
    labels = repair(*clustering, 2.0)
    for cluster in np.flatnonzero(np.bincount(labels) > 2.0 * len(points) / num_clusters):
        assert len(np.unique(points[labels == cluster], axis=0)) == 1


def test_a_sound_clustering_is_handed_back():
    labels = np.array([0, 0, 1, 1, 2, 2])
    points = np.arange(6, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(repair(points, labels, 3, 0.5), labels)


def test_a_small_cluster_joins_its_nearest_and_the_largest_is_halved():
    points = np.array([0, 1, 2, 3, 4, 5, 6, 7, 100, 101, 102, 90], dtype=np.float32)[:, None]
    labels = np.array([0] * 8 + [1] * 3 + [2])
    expected = [0] * 4 + [2] * 4 + [1] * 4
    result = repair(points, labels, 3, 0.5)
    if result[0] == 2:  # which half keeps its number does not matter
        result = np.array([2, 1, 0])[result]
    np.testing.assert_array_equal(result, expected)


def test_fewer_distinct_points_than_clusters_become_one_cluster_each():
    points = np.array([[1, 0], [0, 1], [1, 0], [0, 1], [1, 1]], dtype=np.float32)
    labels = repair(points, np.zeros(5, dtype=np.int64), 4, 0.25)
    assert labels[0] == labels[2]
    assert labels[1] == labels[3]
    assert sorted(np.unique(labels)) == [0, 1, 2]


@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_copies_in_a_small_cluster_join_the_others(noise):
    rng = np.random.default_rng(0)
    points = np.ones((8, 3), np.float32) + noise * rng.standard_normal((8, 3)).astype(np.float32)
    labels = repair(points, np.array([0, 1, 1, 1, 1, 1, 1, 1]), 2, 0.5)
    assert len(np.unique(labels)) == 1


@pytest.mark.parametrize("num_clusters", [1, 5])
def test_one_cluster_and_one_per_point_pass_through(num_clusters):
    points, labels = np.eye(5, dtype=np.float32), np.arange(5) % num_clusters
    np.testing.assert_array_equal(repair(points, labels, num_clusters, 0.5), labels)
