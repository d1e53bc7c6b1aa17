import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_dropcluster.clustering import TorchKMeans, torch_kmeans
from lightning_dropcluster.clustering.centroids import assign_nearest

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
