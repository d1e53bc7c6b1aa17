"""What holds for every k-means clusterer, on the CPU and, where there is one, on a GPU."""

import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from torch.nn import functional as F

from lightning_dropcluster.clustering import FaissKMeans, TorchKMeans, adjusted_rand_index, faiss_kmeans
from lightning_dropcluster.clustering.protocol import append_positions, canonicalize, count_clusters
from lightning_dropcluster.learning.sketch import Sketch

HAS_GPU = torch.cuda.is_available() and faiss_kmeans.faiss.get_num_gpus() > 0
CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs CUDA and FAISS with GPU support")],
)


@pytest.fixture(params=[FaissKMeans, TorchKMeans])
def kmeans(request):
    return request.param


@pytest.fixture(params=["cpu", CUDA])
def device(request):
    return request.param


def make_planted(num_clusters, problems=6, items=240, noise=0.3, seed=0):
    """Clusters around orthogonal centres: unit profiles (B, F, 16) and the true labels (B, F)."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.stack([torch.randperm(items, generator=generator) % num_clusters for _ in range(problems)])
    centres = torch.linalg.qr(torch.randn(problems, 16, 16, generator=generator)).Q
    points = centres.gather(1, truth[:, :, None].expand(-1, -1, 16))
    spread = noise * torch.randn(points.shape, generator=generator) / 4.0
    return F.normalize(points + spread, dim=2), truth


def fit(clusterer, profiles, num_clusters, device="cpu", old=None):
    profiles = profiles.to(device)
    labels = clusterer.fit(profiles, num_clusters, init_labels=old)
    assert (labels.shape, labels.device) == (profiles.shape[:2], profiles.device)
    return canonicalize(labels, profiles, num_clusters).cpu()


def scramble(labels, share, num_clusters):
    generator = torch.Generator().manual_seed(9)
    other = torch.randint(num_clusters, labels.shape, generator=generator)
    return torch.where(torch.rand(labels.shape, generator=generator) < share, other, labels)


def inertia(profiles, labels):
    total = 0.0
    for points, row in zip(profiles.double(), labels, strict=True):
        for cluster in row.unique():
            members = points[row == cluster]
            total += float((members - members.mean(0)).square().sum())
    return total


@pytest.mark.parametrize("num_clusters", [1, 2, 15, 239, 240])
def test_labels_are_whole_numbers_and_no_cluster_is_empty(kmeans, device, num_clusters):
    profiles, _ = make_planted(5, problems=2, noise=2.0)
    labels = fit(kmeans(), profiles, num_clusters, device)
    assert labels.dtype == torch.int64
    assert labels.min() == 0
    assert count_clusters(labels).tolist() == [num_clusters] * 2


@pytest.mark.parametrize("max_share", [2.0, 4.0])
def test_sparse_activations_do_not_collapse_into_one_cluster(kmeans, device, max_share):
    """Not even from a start that has: nearly all in one cluster, and too few iterations to leave it."""
    activations = torch.relu(torch.randn(64, 2, 16, 16, generator=torch.Generator().manual_seed(0)) - 1.645)
    assert (activations == 0).float().mean() == pytest.approx(0.95, abs=0.01)
    sketch = Sketch((2, 16, 16), num_samples=64)
    sketch.update(activations)
    profiles, collapsed = sketch.profiles(), torch.arange(256).clamp(max=15).expand(2, -1)

    def largest(bound):
        clusterer, live = kmeans(warm_iter=1, max_share=bound), profiles.any(dim=2)
        labels = clusterer.fit(profiles.to(device), 16, init_labels=collapsed).cpu()
        sizes = [labels[row][live[row]].bincount(minlength=16) for row in range(2)]
        return max(float(size.max() / size.float().mean()) for size in sizes)

    assert largest(float("inf")) > 4.0
    assert largest(max_share) <= max_share


def test_the_same_seed_gives_the_same_labels(kmeans, device):
    profiles, _ = make_planted(5, noise=2.0)
    labels = fit(kmeans(seed=3), profiles, 12, device)
    assert torch.equal(fit(kmeans(seed=3), profiles, 12, device), labels)
    assert not torch.equal(fit(kmeans(seed=4), profiles, 12, device), labels)


def test_leaves_the_generators_and_the_profiles_alone(kmeans, device):
    profiles, _ = make_planted(5)
    before, state = profiles.clone(), torch.get_rng_state()
    fit(kmeans(), profiles, 5, device)
    assert torch.equal(profiles, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_two_planted_clusters_are_found(kmeans, device):
    profiles, truth = make_planted(2)
    assert [*map(adjusted_rand_score, truth, fit(kmeans(), profiles, 2, device))] == [1.0] * 6


def test_most_problems_of_more_planted_clusters_are_solved_from_one_start(kmeans, device):
    profiles, truth = make_planted(5, problems=9)
    scores = [*map(adjusted_rand_score, truth, fit(kmeans(), profiles, 5, device))]
    assert sorted(scores)[4] == 1.0


def test_planted_clusters_are_found_from_labels_half_wrong(kmeans, device):
    profiles, truth = make_planted(8)
    labels = fit(kmeans(), profiles, 8, device, old=scramble(truth, 0.5, 8))
    assert torch.equal(labels, truth)


def test_inertia_is_that_of_scikit_learn(kmeans, device):
    profiles, _ = make_planted(10, noise=1.5)
    theirs = sum(
        KMeans(12, init="random", n_init=1, random_state=0).fit(points.numpy()).inertia_
        for points in profiles
    )
    assert inertia(profiles, fit(kmeans(), profiles, 12, device)) < 1.05 * theirs


@pytest.mark.parametrize("noise", [0.3, 1.5, 6.0])
def test_faiss_and_torch_reach_the_same_inertia(device, noise):
    profiles, _ = make_planted(10, noise=noise)
    ours = [inertia(profiles, fit(kind(), profiles, 12, device)) for kind in (FaissKMeans, TorchKMeans)]
    assert ours[0] == pytest.approx(ours[1], rel=0.05)


def test_a_warm_start_keeps_the_identity_of_clusters(kmeans, device):
    profiles, _ = make_planted(6)
    old = fit(kmeans(), profiles, 6, device)
    moved = F.normalize(profiles + 0.5 * make_planted(6, seed=1)[0], dim=2)
    warm, cold = (fit(kmeans(seed=1), moved, 6, device, old=labels) for labels in (old, None))
    assert (warm == old).float().mean() > 0.9
    assert adjusted_rand_index(warm, old) > adjusted_rand_index(cold, old)


def test_a_warm_start_needs_fewer_iterations(kmeans, device):
    profiles, _ = make_planted(10, noise=1.5)
    old = fit(kmeans(), profiles, 12, device)
    warm, cold = (fit(kmeans(max_iter=1), profiles, 12, device, old=labels) for labels in (old, None))
    assert inertia(profiles, warm) < 0.99 * inertia(profiles, cold)
    assert inertia(profiles, warm) <= 1.001 * inertia(profiles, old)


def test_more_iterations_from_a_warm_start_lower_the_inertia(kmeans, device):
    profiles, truth = make_planted(8, noise=2.0)
    old = scramble(truth, 0.5, 8)
    short, long = (fit(kmeans(warm_iter=n, tolerance=0), profiles, 8, device, old=old) for n in (1, 10))
    assert inertia(profiles, long) < 0.999 * inertia(profiles, short)


def test_a_cold_start_from_tiles_ends_lower_where_neighbours_are_alike(kmeans, device):
    generator = torch.Generator().manual_seed(0)
    fields = F.interpolate(torch.randn(8, 64, 4, 4, generator=generator), (16, 16), mode="bilinear")
    noisy = fields + 0.3 * torch.randn(fields.shape, generator=generator)
    profiles = F.normalize(noisy.flatten(2).mT, dim=2).to(device)
    tiled, random = (kmeans().fit(profiles, 16, grid=grid).cpu() for grid in ((16, 16), None))
    assert inertia(profiles.cpu(), tiled) < 0.99 * inertia(profiles.cpu(), random)


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_small_clusters_do_not_stay_the_tiles_of_the_start(kmeans, device, size):
    profiles = F.normalize(torch.randn(6, 64, 64, generator=torch.Generator().manual_seed(0)), dim=2)
    tiled, random = (kmeans().fit(profiles.to(device), 64 // size, grid=g).cpu() for g in ((8, 8), None))
    assert inertia(profiles, tiled) < 1.05 * inertia(profiles, random)


@pytest.mark.parametrize("num_clusters", [4, 40])
def test_problems_are_clustered_as_if_alone(kmeans, device, num_clusters):
    profiles, _ = make_planted(8, items=120)
    profiles.unflatten(1, (10, 12))[:, :, 7:] = 0
    profiles = profiles.to(device)
    alone = [kmeans().fit(some, num_clusters, grid=(10, 12)) for some in profiles.split(1)]
    assert torch.equal(kmeans().fit(profiles, num_clusters, grid=(10, 12)), torch.cat(alone))


def test_a_warm_start_from_fewer_clusters_fills_up(kmeans, device):
    profiles, truth = make_planted(8)
    labels = fit(kmeans(), profiles, 8, device, old=truth.clamp(max=4))
    assert count_clusters(labels).tolist() == [8] * 6


def test_dead_rows_change_nothing_for_live_ones(kmeans, device):
    profiles, truth = make_planted(4, noise=2.0)
    rows = torch.randperm(400, generator=torch.Generator().manual_seed(2))[:240].sort().values
    padded, old = torch.zeros(6, 400, 16), torch.zeros(6, 400, dtype=torch.int64)
    padded[:, rows], old[:, rows] = profiles, truth
    labels = fit(kmeans(), padded, 4, device, old=old)[:, rows]
    assert torch.equal(labels, fit(kmeans(), profiles, 4, device, old=truth))


def test_dead_rows_get_label_zero(kmeans, device):
    profiles, truth = make_planted(5)
    profiles[:, ::3] = 0
    for old in (None, truth + 1):
        assert not kmeans().fit(profiles.to(device), 6, init_labels=old)[:, ::3].any()


def test_dead_rows_found_no_clusters_of_their_own(kmeans, device):
    profiles, _ = make_planted(5, noise=2.0)
    profiles[:, 40:] = 0
    assert count_clusters(fit(kmeans(), profiles, 6, device)).tolist() == [6] * 6


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_equal_rows_are_one_cluster(kmeans, device, value):
    profiles = torch.full((3, 40, 16), value)
    assert not fit(kmeans(), profiles, 8, device).any()


def test_a_dead_problem_leaves_the_others_alone(kmeans, device):
    profiles, truth = make_planted(2)
    profiles[2] = 0
    labels = fit(kmeans(), profiles, 2, device)
    assert not labels[2].any()
    assert adjusted_rand_score(truth[0], labels[0]) == adjusted_rand_score(truth[5], labels[5]) == 1.0


@pytest.mark.parametrize("distinct", [1, 3, 7])
def test_fewer_distinct_rows_lower_the_number_of_clusters(kmeans, device, distinct):
    profiles, _ = make_planted(5, problems=3, items=distinct)
    copies = profiles.repeat(1, 20, 1)
    labels = fit(kmeans(), copies, 12, device)
    assert count_clusters(labels).tolist() == [distinct] * 3
    assert torch.equal(labels, labels[:, :distinct].repeat(1, 20))


def test_rows_equal_but_for_rounding_raise_no_warning(kmeans):
    profiles, _ = make_planted(3, problems=1, items=60, noise=0.0)
    rounded = profiles + 1e-7 * torch.randn(profiles.shape, generator=torch.Generator().manual_seed(0))
    fit(kmeans(), rounded, 8, old=scramble(torch.zeros(1, 60, dtype=torch.int64), 1.0, 8))


def test_fewer_live_rows_than_clusters(kmeans, device):
    profiles, _ = make_planted(5, problems=2, noise=2.0)
    profiles[:, 3:] = 0
    for old in (None, torch.arange(240).repeat(2, 1) % 10):
        assert count_clusters(fit(kmeans(), profiles, 10, device, old=old)).tolist() == [3, 3]


@pytest.mark.parametrize("min_share", [0.0, 0.25, 0.5])
def test_clusters_are_no_smaller_than_the_share_asked_for(kmeans, device, min_share):
    profiles, _ = make_planted(4, noise=1.0)
    skewed = profiles.clone()
    skewed[:, 10:] = profiles[:, :1] + 0.1 * skewed[:, 10:]
    labels = fit(kmeans(min_share=min_share), skewed, 12, device)
    assert min(int(row.bincount(minlength=12).min()) for row in labels) >= max(1, int(min_share * 20))


def test_positions_make_clusters_tighter(kmeans, device):
    grid, (profiles, _) = (15, 16), make_planted(5, noise=2.0)
    rows, columns = torch.unravel_index(torch.arange(240), grid)
    where = torch.stack([rows, columns], dim=1).expand(6, -1, -1)
    spreads = []
    for weight in (0.0, 1.0, 4.0):
        points = append_positions(profiles, grid, weight) if weight else profiles
        spreads.append(inertia(where, fit(kmeans(), points, 10, device)))
    assert spreads[0] > 1.2 * spreads[1] > 1.2**2 * spreads[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_iter": 0}, r"max_iter=0: must be an integer in \[1, "),
        ({"warm_iter": 0}, r"warm_iter=0: must be an integer in \[1, "),
        ({"tolerance": -1e-3}, "tolerance=-0.001: must be a number of at least 0"),
        ({"tolerance": float("nan")}, "tolerance=nan: must be a number of at least 0"),
        ({"min_share": 0.6}, r"min_share=0.6: must be a number in \[0, 0.5\]"),
        ({"min_share": -0.1}, r"min_share=-0.1: must be a number in \[0, 0.5\]"),
    ],
)
def test_arguments_out_of_range_raise(kmeans, settings, message):
    with pytest.raises(ValueError, match=message):
        kmeans(**settings)
