import math
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_dropcluster.clustering import TorchKMeans, torch_kmeans
from lightning_dropcluster.clustering.torch_kmeans import assign_nearest

BLOCKS = st.sampled_from([1, 50, 2**21])
SETTINGS = {"tolerance": 0.0, "min_share": 0.0, "max_share": math.inf}


def make_profiles(problems=3, items=60, dims=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(problems, items, dims, generator=generator), dim=2)


class Watched(TorchKMeans):
    """Keeps the centroids and the inertia of each assignment."""

    def __init__(self, **settings):
        super().__init__(**SETTINGS | settings)
        self.means, self.inertias = [], []

    def _assign(self, points, means):
        labels, distances = assign_nearest(points, means)
        self.means.append(means)
        self.inertias.append(float((distances * points.any(dim=2)).sum()))
        return labels, distances


@contextmanager
def blocks_of(numbers):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_kmeans, "_BLOCK", numbers)
        yield


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that an operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numbers = max(self.numbers, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)), 0)
        return out


@given(st.integers(1, 3), st.integers(1, 30), st.integers(1, 8), st.integers(0, 99), BLOCKS)
@settings(deadline=None, max_examples=40)
def test_assigns_to_the_nearest(problems, items, clusters, seed, block):
    points, means = (
        make_profiles(problems, items, seed=seed),
        make_profiles(problems, clusters, seed=seed + 1),
    )
    with blocks_of(block):
        labels, distances = assign_nearest(points, means)
    nearest = torch.cdist(points.double(), means.double()).square().min(dim=2)
    assert torch.equal(labels, nearest.indices)
    torch.testing.assert_close(distances.double(), nearest.values, rtol=0, atol=1e-5)


def test_blocks_of_problems_assign_as_all_at_once():
    points, means = make_profiles(5, 3000), make_profiles(5, 2000, seed=1)
    labels, distances = assign_nearest(points, means)
    for index in range(5):
        alone = assign_nearest(points[[index]], means[[index]])
        assert (alone[0] == labels[[index]]).float().mean() > 0.999
        torch.testing.assert_close(alone[1], distances[[index]], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("problems", "items", "clusters"), [(1, 500, 40), (1, 40, 500), (20, 50, 4)])
def test_no_more_than_a_block_is_held_at_a_time(problems, items, clusters):
    points, means = make_profiles(problems, items), make_profiles(problems, clusters)
    with blocks_of(1000), Largest() as seen:
        labels, _ = assign_nearest(points, means)
        torch_kmeans._sums_by_product(points, labels, clusters)
    assert seen.numbers <= max(1000, points.numel(), means.numel())


@given(st.integers(1, 4), st.integers(1, 30), st.integers(1, 8), BLOCKS)
@settings(deadline=None, max_examples=40)
def test_a_gpu_adds_up_the_points_of_clusters_as_a_cpu_does(problems, items, clusters, block):
    profiles = make_profiles(problems, items)
    labels = torch.randint(clusters, (problems, items), generator=torch.Generator().manual_seed(1))
    with blocks_of(block):
        by_product = torch_kmeans._sums_by_product(profiles, labels, clusters)
    torch.testing.assert_close(by_product, torch_kmeans._sums_by_index(profiles, labels, clusters))


def test_every_iteration_lowers_the_inertia():
    kmeans = Watched(max_iter=20)
    kmeans.fit(make_profiles(), 7)
    assert len(kmeans.inertias) > 3
    assert all(later <= earlier + 1e-4 for earlier, later in pairwise(kmeans.inertias))


@pytest.mark.parametrize(("max_iter", "tolerance", "calls"), [(4, 0.0, 5), (1, 0.0, 2), (20, 1.0, 2)])
def test_stops_after_the_iterations_or_the_tolerance(max_iter, tolerance, calls):
    kmeans = Watched(max_iter=max_iter, tolerance=tolerance)
    kmeans.fit(make_profiles(items=300), 7)
    assert len(kmeans.inertias) == calls


def test_one_update_is_the_mean_of_the_live_members():
    profiles = make_profiles()
    profiles[:, ::4] = 0
    labels, kmeans = torch.arange(60).repeat(3, 1) % 5, Watched()
    kmeans.fit(profiles, 6, labels)
    live = profiles[0].any(1)
    for cluster in range(5):
        members = profiles[:, live & (labels[0] == cluster)]
        torch.testing.assert_close(kmeans.means[0][:, cluster], members.mean(1))


def test_starting_points_are_live_and_distinct():
    profiles, kmeans = make_profiles(), Watched()
    profiles[:, ::2] = 0
    kmeans.fit(profiles, 30)
    for points, means in zip(profiles, kmeans.means[0], strict=True):
        which = (points[:, None] == means).all(2).nonzero()
        assert which[:, 0].tolist() == [*range(1, 60, 2)]


@pytest.mark.parametrize("tolerance", [0.0, 5e-3, 5e-2])
def test_problems_that_share_a_block_start_alike_and_end_as_alone(tolerance):
    profiles, clusterer = make_profiles(8), TorchKMeans(tolerance=tolerance)
    alone = torch.cat([clusterer.fit(some, 7) for some in profiles.split(1)])
    assert torch.equal(clusterer.fit(profiles, 7), alone)


def test_labels_of_any_integer_type_start_it():
    profiles, old = make_profiles(), torch.arange(60).repeat(3, 1) % 7
    expected = TorchKMeans().fit(profiles, 7, old)
    assert torch.equal(TorchKMeans().fit(profiles, 7, old.byte()), expected)


class NoDoubles(TorchDispatchMode):
    """Fails where a number of double precision is made, which GPUs of Apple do not know."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert all(x.dtype != torch.float64 for x in tree_leaves(out) if isinstance(x, Tensor)), func
        return out


def test_makes_no_doubles():
    profiles = make_profiles()
    profiles[:, ::4] = 0
    with NoDoubles():
        labels = TorchKMeans(max_share=2.0).fit(profiles, 7, grid=(6, 10))
        TorchKMeans().fit(profiles, 7, labels)


def test_uses_no_faiss():
    assert "faiss" not in vars(torch_kmeans)
