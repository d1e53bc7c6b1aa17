import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from lightning_dropcluster.clustering import FaissKMeans, TorchKMeans, faiss_kmeans
from lightning_dropcluster.clustering.centroids import assign_nearest
from lightning_dropcluster.clustering.faiss_search import FaissLloyd

faiss = faiss_kmeans.faiss


class OnGPU(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True


def make_profiles(problems=4, items=200, dims=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(problems, items, dims, generator=generator), dim=2)


@pytest.mark.parametrize("problems", [1, 5])
def test_thread_counts_stay_as_they_were(problems):
    torch_threads, faiss_threads = torch.get_num_threads(), faiss.omp_get_max_threads()
    FaissKMeans().fit(make_profiles(problems), 10)
    assert (torch.get_num_threads(), faiss.omp_get_max_threads()) == (torch_threads, faiss_threads)


def test_thread_counts_stay_as_they_were_in_a_fresh_process():
    script = """
import torch
from lightning_dropcluster.clustering import FaissKMeans, faiss_kmeans
torch.set_num_threads(3)
before = torch.get_num_threads(), faiss_kmeans.faiss.omp_get_max_threads()
FaissKMeans().fit(torch.randn(4, 50, 8), 5)
assert (torch.get_num_threads(), faiss_kmeans.faiss.omp_get_max_threads()) == before
assert before == (3, 3)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_labels_do_not_depend_on_the_number_of_threads(monkeypatch):
    profiles, labels = make_profiles(), []
    for threads in (1, 2, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        labels.append(FaissKMeans().fit(profiles, 10))
    assert torch.equal(labels[0], labels[1])
    assert torch.equal(labels[0], labels[2])


def test_problems_are_independent():
    profiles = make_profiles()
    alone = [FaissKMeans().fit(some, 10) for some in profiles.split(1)]
    assert torch.equal(FaissKMeans().fit(profiles, 10), torch.cat(alone))


def test_dead_rows_change_nothing_for_live_ones_from_a_cold_start():
    profiles = make_profiles()
    padded = torch.zeros(4, 300, 16)
    padded[:, 1::3], padded[:, 2::3] = profiles[:, ::2], profiles[:, 1::2]
    live = padded[0].any(1)
    assert torch.equal(
        FaissKMeans().fit(padded, 10)[:, live], FaissKMeans().fit(padded[:, live].contiguous(), 10)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_takes_profiles_with_gradients_of_other_types_and_strides(dtype):
    profiles = make_profiles().to(dtype)
    expected = FaissKMeans().fit(profiles.float(), 10)
    assert torch.equal(FaissKMeans().fit(profiles.mT.contiguous().mT.requires_grad_(), 10), expected)


def test_more_points_than_faiss_samples_by_itself_are_all_used():
    profiles = make_profiles(1, 2000)
    labels = FaissKMeans(max_iter=50, tolerance=0).fit(profiles, 2)[0]
    means = torch.stack([profiles[0, labels == k].mean(0) for k in range(2)])
    nearest, _ = assign_nearest(profiles, means[None])
    assert (nearest[0] == labels).float().mean() > 0.999


def test_nothing_is_printed(capfd):
    FaissKMeans().fit(make_profiles(2, 20), 15)
    assert capfd.readouterr() == ("", "")


def test_what_faiss_refuses_raises():
    profiles = make_profiles()
    profiles[1, 2, 3] = torch.nan
    with pytest.raises(RuntimeError, match="NaN"):
        FaissKMeans().fit(profiles, 10)


def test_on_a_gpu_the_loop_with_faisss_search_does_it(monkeypatch):
    profiles, settings = make_profiles(), {"max_iter": 3, "tolerance": 1e-3, "seed": 5}
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
    monkeypatch.setattr(FaissLloyd, "_assign", lambda self, points, means: assign_nearest(points, means))
    labels = FaissKMeans(**settings).fit(profiles.as_subclass(OnGPU), 10)
    assert torch.equal(labels.as_subclass(torch.Tensor), TorchKMeans(**settings).fit(profiles, 10))


def test_clusters_keep_their_numbers_where_others_have_died_out():
    profiles, old = make_profiles(1, 60), torch.arange(60)[None] % 10
    profiles[0, 3::10] = 0
    labels = FaissKMeans(warm_iter=1, min_share=0.0).fit(profiles, 10, old)
    means = torch.stack([profiles[0, old[0] == k].mean(0) for k in range(10)])
    kept = torch.cdist(profiles[0], means[[0, 1, 2, 4, 5, 6, 7, 8, 9]]).argmin(1)
    kept = torch.tensor([0, 1, 2, 4, 5, 6, 7, 8, 9])[kept]
    alive = profiles[0].any(1)
    assert (labels[0, alive] == kept[alive]).float().mean() > 0.5
