from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_dropcluster.clustering import centroids
from lightning_dropcluster.clustering.centroids import add_up, assign_nearest

BLOCKS = st.sampled_from([1, 50, 2**21])


def make_profiles(problems=3, items=60, dims=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(problems, items, dims, generator=generator), dim=2)


@contextmanager
def blocks_of(numbers):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(centroids, "_BLOCK", numbers)
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
        assign_nearest(points, means)
    assert seen.numbers <= max(1000, points.numel(), means.numel())


class OnGPU(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("kind", [Tensor, OnGPU], ids=["CPU", "as a GPU does"])
@given(st.integers(1, 4), st.integers(1, 30), st.integers(1, 8), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_adds_up_the_live_points_of_each_cluster(kind, problems, items, clusters, seed):
    generator = torch.Generator().manual_seed(seed)
    points = make_profiles(problems, items)
    labels = torch.randint(clusters, (problems, items), generator=generator)
    alive = torch.rand(problems, items, generator=generator) < 0.7
    sums, sizes = add_up(points.as_subclass(kind), alive, labels, clusters)
    belongs = (F.one_hot(labels, clusters) * alive[:, :, None]).float()
    torch.testing.assert_close(sums.as_subclass(Tensor), belongs.mT @ points)
    assert torch.equal(sizes, belongs.sum(1).long())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_adds_up_the_same_each_time_and_as_a_cpu_does():
    points, labels = make_profiles(8, 5000), torch.randint(20, (8, 5000))
    alive = torch.rand(8, 5000) < 0.7
    here = add_up(points, alive, labels, 20)
    first, second = (add_up(points.cuda(), alive.cuda(), labels.cuda(), 20) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1].cpu(), here[1])
    torch.testing.assert_close(first[0].cpu(), here[0])
