import math
import sys

import pytest
import torch
from scipy.ndimage import label as connected_parts
from sklearn.metrics import adjusted_rand_score
from torch.nn import functional as F

from lightning_dropcluster.clustering import ReNA, Ward
from lightning_dropcluster.clustering.protocol import canonicalize, count_clusters

GRIDS = ((40,), (8, 9), (4, 5, 4))


@pytest.fixture(params=[Ward, ReNA], ids=["Ward", "ReNA"])
def clusterer(request):
    return request.param()


def make_profiles(grid, problems=2, seed=0):
    """Smooth profiles: neighbours correlate."""
    noise = torch.randn(problems * 16, 1, *grid, generator=torch.Generator().manual_seed(seed))
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(grid) - 1]
    smooth = pool(noise, 3, 1, 1).reshape(problems, 16, -1)
    return F.normalize(smooth.mT, dim=2)


def count_parts(labels, grid):
    return [
        connected_parts((row == cluster).reshape(grid).numpy())[1]
        for row in labels
        for cluster in range(int(row.max()) + 1)
    ]


@pytest.mark.parametrize("grid", GRIDS, ids=["1d", "2d", "3d"])
@pytest.mark.parametrize("num_clusters", [2, 7, 20])
def test_clusters_are_connected_and_as_many_as_asked_for(clusterer, grid, num_clusters):
    profiles = make_profiles(grid)
    labels = canonicalize(clusterer.fit(profiles, num_clusters, grid=grid), profiles, num_clusters, grid)
    assert set(count_parts(labels, grid)) == {1}
    assert count_clusters(labels).tolist() == [num_clusters, num_clusters]


@pytest.mark.parametrize("num_clusters", [1, 72])
def test_one_cluster_and_one_per_item(clusterer, num_clusters):
    labels = clusterer.fit(make_profiles((8, 9)), num_clusters, grid=(8, 9))
    assert [len(row.unique()) for row in labels] == [num_clusters] * 2


def test_planted_blocks_are_found(clusterer):
    truth = torch.arange(4).reshape(2, 2).repeat_interleave(5, 0).repeat_interleave(5, 1).flatten()
    noise = torch.randn(100, 16, generator=torch.Generator().manual_seed(0))
    profiles = F.normalize(torch.eye(16)[truth] + 0.05 * noise, dim=1)[None]
    assert adjusted_rand_score(truth, clusterer.fit(profiles, 4, grid=(10, 10))[0]) == 1.0


def test_the_order_of_the_grid_matters(clusterer):
    profiles = make_profiles((6, 12))
    for grid in ((6, 12), (72,)):
        assert set(count_parts(clusterer.fit(profiles, 8, grid=grid), grid)) == {1}


def test_is_deterministic_and_does_not_depend_on_old_labels(clusterer):
    profiles = make_profiles((8, 9))
    labels = clusterer.fit(profiles, 6, grid=(8, 9))
    old = torch.randint(6, labels.shape)
    assert torch.equal(clusterer.fit(profiles, 6, init_labels=old, grid=(8, 9)), labels)


def test_problems_are_independent(clusterer):
    profiles = make_profiles((8, 9), problems=3)
    alone = [clusterer.fit(some, 6, grid=(8, 9)) for some in profiles.split(1)]
    assert torch.equal(clusterer.fit(profiles, 6, grid=(8, 9)), torch.cat(alone))


def test_few_dead_items_change_nothing_but_their_own_labels(clusterer):
    profiles = make_profiles((12, 12), problems=1)
    profiles[:, [0, 40, 77, 143]] = 0
    labels = canonicalize(clusterer.fit(profiles, 6, grid=(12, 12)), profiles, 6, (12, 12))
    assert count_clusters(labels).tolist() == [6]
    assert set(count_parts(labels, (12, 12))) == {1}


@pytest.mark.parametrize("share", [0.6, 0.95])
def test_many_dead_items_join_their_nearest_live_neighbours(clusterer, share):
    profiles = make_profiles((12, 12), problems=1)
    profiles *= torch.rand(1, 144, 1, generator=torch.Generator().manual_seed(1)) >= share
    labels = canonicalize(clusterer.fit(profiles, 4, grid=(12, 12)), profiles, 4, (12, 12))
    assert count_clusters(labels).tolist() == [4]
    assert set(count_parts(labels, (12, 12))) == {1}


def test_clusters_stay_connected_when_dead_items_find_theirs():
    generator = torch.Generator().manual_seed(19)
    profiles = F.normalize(torch.randn(1, 25, 4, generator=generator), dim=2)
    profiles *= torch.rand(1, 25, 1, generator=generator) >= 0.7
    labels = canonicalize(Ward().fit(profiles, 3, grid=(5, 5)), profiles, 3, (5, 5))
    assert set(count_parts(labels, (5, 5))) == {1}


def test_problems_without_a_live_item_are_one_cluster(clusterer):
    profiles = make_profiles((8, 9))
    profiles[0] = 0
    labels = clusterer.fit(profiles, 6, grid=(8, 9))
    assert not labels[0].any()
    assert len(labels[1].unique()) == 6


def test_equal_profiles_still_give_valid_labels(clusterer):
    profiles = make_profiles((8, 9))[:, :1].expand(-1, 72, -1)
    labels = canonicalize(clusterer.fit(profiles, 6, grid=(8, 9)), profiles, 6, (8, 9))
    assert set(count_parts(labels, (8, 9))) == {1}


@pytest.mark.parametrize("grid", [(1,), (1, 1)])
def test_maps_of_one_feature_are_one_cluster(clusterer, grid):
    assert clusterer.fit(torch.ones(2, 1, 4), 1, grid=grid).tolist() == [[0], [0]]


def test_without_a_grid_it_raises(clusterer):
    with pytest.raises(ValueError, match="scope='channel' has none"):
        clusterer.fit(torch.ones(1, 4, 2), 2)


def test_rena_takes_at_most_three_dimensions():
    grid = (2, 3, 2, 3)
    profiles = F.normalize(torch.randn(1, math.prod(grid), 4), dim=2)
    assert len(Ward().fit(profiles, 5, grid=grid).unique()) == 5
    with pytest.raises(ValueError, match="at most 3 dimensions"):
        ReNA().fit(profiles, 5, grid=grid)


@pytest.mark.parametrize(("kind", "module", "extra"), [(Ward, "sklearn", "ward"), (ReNA, "nilearn", "rena")])
def test_a_missing_package_is_named_at_construction(monkeypatch, kind, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"pip install '\.\[{extra}\]'"):
        kind()
