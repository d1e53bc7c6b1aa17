"""Many problems in one search find what each finds alone, and memory that runs out leaves nothing broken."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dropcluster import memory
from lightning_dropcluster.clustering import faiss_search
from lightning_dropcluster.clustering.centroids import assign_nearest
from lightning_dropcluster.clustering.faiss_search import FaissLloyd, search_nearest
from lightning_dropcluster.clustering.protocol import append_positions

faiss = faiss_search.faiss
SHAPES = [(8, 784, 49), (16, 196, 12), (64, 49, 3), (4, 3136, 196)]  # problems, items, clusters
needs_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and faiss.get_num_gpus()), reason="needs CUDA and FAISS with GPU support"
)


def make_profiles(problems=4, items=200, dims=16, seed=0):
    """Half of the problems are nearly alike, the others far from each other."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(problems, items, dims, generator=generator)
    points = noise + 2 * torch.randn(problems, 1, dims, generator=generator)
    points[::2] = torch.randn(1, items, dims, generator=generator) + 0.05 * noise[::2]
    return F.normalize(points, dim=2)


def fit_alone(monkeypatch, profiles, *args):
    """Fit with a search for each problem."""
    with monkeypatch.context() as patch:
        patch.setattr(faiss_search, "_CENTROIDS", 1)
        return FaissLloyd().fit(profiles, *args)


@pytest.fixture
def searches(monkeypatch):
    """Count the searches on a CPU."""
    calls, search = [], faiss.knn
    monkeypatch.setattr(faiss, "knn", lambda *args: calls.append(args[0].shape) or search(*args))
    return calls


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_labels_are_those_of_one_problem_after_the_other(monkeypatch, shape, device):
    problems, items, clusters = shape
    profiles = make_profiles(problems, items, 64).to(device)
    profiles[1, ::5] = 0
    profiles[2] = 0
    least = 1.0 if device == "cpu" else 0.99  # a GPU adds up products of another width in another order
    cold = FaissLloyd().fit(profiles, clusters, None, (items,))
    alone = fit_alone(monkeypatch, profiles, clusters, None, (items,))
    assert (cold == alone).float().mean() >= least
    moved = F.normalize(profiles + 0.2 * make_profiles(problems, items, 64, seed=1).to(device), dim=2)
    warm, alone = FaissLloyd().fit(moved, clusters, cold), fit_alone(monkeypatch, moved, clusters, cold)
    assert (warm == alone).float().mean() >= least


@pytest.mark.parametrize("weight", [0.5, 100.0])
def test_positions_of_any_weight_do_not_let_points_cross_over(weight):
    profiles = append_positions(make_profiles(9, 64), (8, 8), weight)
    means = profiles[:, ::8]
    labels, distances = search_nearest(profiles, means)
    expected = assign_nearest(profiles, means)
    assert (labels == expected[0]).float().mean() > 0.99
    torch.testing.assert_close(distances, expected[1], rtol=0, atol=1e-5 * (1 + weight**2))


@pytest.mark.parametrize("problems", [1, 2, 3, 8, 9])
def test_a_search_says_what_torch_says(problems):
    points, means = make_profiles(problems), make_profiles(problems, 10, seed=1)
    labels, distances = search_nearest(points, means)
    expected = assign_nearest(points, means)
    assert torch.equal(labels, expected[0])
    torch.testing.assert_close(distances, expected[1], rtol=0, atol=1e-5)


def test_many_problems_share_a_search(searches):
    search_nearest(make_profiles(100, 20), make_profiles(100, 5))
    assert searches == [(2000, 24)]


@pytest.mark.parametrize(("limit", "value"), [("_CENTROIDS", 50), ("_POINTS", 200)])
def test_searches_are_bounded(monkeypatch, searches, limit, value):
    monkeypatch.setattr(faiss_search, limit, value)
    search_nearest(make_profiles(25, 20), make_profiles(25, 5))
    assert [points for points, _ in searches] == [200, 200, 100]


def test_a_problem_alone_is_searched_as_it_is(searches):
    search_nearest(make_profiles(1, 20), make_profiles(1, 5))
    assert searches == [(20, 16)]


def test_problems_that_are_done_are_searched_no_more(searches):
    profiles = make_profiles(40, 30)
    profiles[1:] = profiles[1:, :1]
    FaissLloyd(tolerance=0.0).fit(profiles, 5)
    points = [points for points, _ in searches]
    assert len(points) > 3
    assert points == [1200, 1200] + [30] * (len(points) - 2)


class OnGPU(Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True


class Resources:
    """Like FAISS's they do not recover: without scratch the next search would end the process."""

    def __init__(self):
        self.settings, self.broken = {}, False

    def setTempMemory(self, size):
        self.settings["scratch"] = size

    def setPinnedMemory(self, size):
        self.settings["pinned"] = size


@pytest.fixture
def gpu(monkeypatch):
    """Pretend to have one with memory that ``free`` counts; ``fails`` says whether FAISS's allocator does."""
    state = {"free": 2**30, "cached": 0, "fails": False, "used": []}

    def search(resources, points, centres, k, *, device):
        assert not resources.broken, "the process has crashed"
        state["used"].append(resources)
        if state["fails"]:
            resources.broken = True
            raise RuntimeError("StandardGpuResources: alloc fail type TemporaryMemoryBuffer (out of memory)")
        return [torch.from_numpy(one) for one in faiss.knn(points.numpy(), centres.numpy(), k)]

    def empty_cache():
        state["free"], state["cached"] = state["free"] + state["cached"], 0

    import faiss.contrib.torch_utils  # else the first search would put another in its place

    monkeypatch.setattr(faiss, "knn_gpu", search, raising=False)
    monkeypatch.setattr(faiss, "StandardGpuResources", Resources, raising=False)
    monkeypatch.setattr(faiss_search, "_resources", {})
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (state["free"], 2**40))
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    return state


def search():
    points, means = make_profiles(), make_profiles(4, 10, seed=1)
    labels, _ = search_nearest(points.as_subclass(OnGPU), means.as_subclass(OnGPU))
    assert torch.equal(labels.as_subclass(Tensor), assign_nearest(points, means)[0])


def test_resources_are_made_once_and_pin_no_memory(gpu):
    search()
    search()
    assert gpu["used"][0] is gpu["used"][1]
    assert gpu["used"][0].settings == {"scratch": faiss_search._SCRATCH, "pinned": 0}


def test_resources_that_failed_are_never_used_again(gpu):
    search()
    for gpu["fails"] in (True, True, False):
        with pytest.raises(RuntimeError, match="out of memory") if gpu["fails"] else nullcontext():
            search()
    search()
    first, second, third, fourth, fifth = gpu["used"]
    assert first is second
    assert len({*map(id, (second, third, fourth))}) == 3
    assert fourth is fifth


def test_faiss_is_not_called_where_its_scratch_would_not_fit(gpu):
    gpu["free"] = 2**20
    with pytest.raises(MemoryError, match="beside torch's") as caught:
        search()
    assert memory.is_out_of_memory(caught.value)
    assert not gpu["used"]


def test_torchs_cache_makes_room(gpu):
    gpu["free"], gpu["cached"] = 2**20, 2**30
    search()
    assert gpu["cached"] == 0


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_assigns_as_torch_does():
    points, means = make_profiles(100).cuda(), make_profiles(100, items=10, seed=1).cuda()
    labels, distances = search_nearest(points, means)
    expected = assign_nearest(points, means)
    assert (labels == expected[0]).float().mean() > 0.999
    torch.testing.assert_close(distances, expected[1], rtol=0, atol=1e-4)


@pytest.mark.gpu
@needs_gpu
def test_searches_go_on_after_faisss_allocator_has_failed(monkeypatch):
    monkeypatch.setattr(faiss_search, "_resources", {})
    monkeypatch.setattr(faiss_search, "_SCRATCH", 0)  # so that each search allocates for itself
    points, means = torch.randn(1, 2048, 64).cuda(), torch.randn(1, 2**16, 64).cuda()
    before = search_nearest(points[:, :100], means[:, :100])
    for _ in range(2):
        hog, size = [], 2**32
        while size > 2**26:  # what is left is enough for torch, and too little for FAISS
            try:
                hog.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            except torch.OutOfMemoryError:
                size //= 2
        hog.pop()  # into torch's own cache, where FAISS finds nothing
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            search_nearest(points, means)
        assert memory.is_out_of_memory(caught.value)
        assert not faiss_search._resources
        del hog
        torch.cuda.empty_cache()
        after = search_nearest(points[:, :100], means[:, :100])
        assert all(map(torch.equal, before, after))
