import pytest
import torch
from clusterers import Blocks, Shuffled

from lightning_dropcluster import FaissKMeans

PROFILES = torch.nn.functional.normalize(
    torch.randn(3, 36, 8, generator=torch.Generator().manual_seed(0)), dim=2
)


def sizes(labels):
    return [row.bincount().sort().values.tolist() for row in labels]


def test_shuffling_keeps_sizes_and_destroys_members():
    learned = FaissKMeans().fit(PROFILES, 6)
    shuffled = Shuffled(FaissKMeans()).fit(PROFILES, 6)
    assert sizes(shuffled) == sizes(learned)
    assert (shuffled == learned).float().mean() < 0.5
    assert not torch.equal(*Shuffled(FaissKMeans()).fit(PROFILES[:1].repeat(2, 1, 1), 6))


def test_a_warm_start_begins_where_the_shuffled_clusters_were_learned():
    start = FaissKMeans(max_iter=1).fit(PROFILES, 6)
    clusterer = Shuffled(FaissKMeans(), seed=3)
    hidden = torch.rand(3, 36, generator=torch.Generator().manual_seed(3)).argsort(1)
    warm = clusterer.fit(PROFILES, 6, start.gather(1, hidden))
    assert torch.equal(warm, FaissKMeans().fit(PROFILES, 6, start).gather(1, hidden))


@pytest.mark.parametrize(
    ("grid", "num_clusters", "expected"), [((6, 6), 9, 9), ((6, 6), 8, 4), ((4, 9), 3, 3)]
)
def test_blocks_are_squares_of_nearly_equal_size(grid, num_clusters, expected):
    labels = Blocks().fit(PROFILES, num_clusters, grid=grid)
    assert labels.shape == (3, 36)
    assert labels[0].unique().tolist() == list(range(expected))
    if expected == 9:
        assert labels[0].reshape(6, 6)[:2, 2:4].unique().tolist() == [1]
        assert sizes(labels)[0] == [4] * 9


def test_blocks_need_a_plane():
    with pytest.raises(ValueError, match="blocks need a grid of two dimensions, got None"):
        Blocks().fit(PROFILES, 4)
