import pytest
import torch

from benchmarks.gain.controls import Blocks, RandomStart, Shuffled
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


def test_blocks_are_squares_of_equal_size_for_every_problem():
    labels = Blocks().fit(PROFILES[:, :16], 4, grid=(4, 4))
    assert torch.equal(labels[0].reshape(4, 4), torch.arange(4).reshape(2, 2).kron(torch.ones(2, 2).long()))
    assert torch.equal(labels, labels[:1].expand(3, -1))


def test_blocks_need_a_grid():
    with pytest.raises(ValueError, match="blocks need a grid, got None"):
        Blocks().fit(PROFILES, 4)


def test_a_random_start_knows_nothing_of_the_grid():
    profiles = PROFILES[:, :16]
    assert torch.equal(RandomStart().fit(profiles, 4, grid=(4, 4)), RandomStart().fit(profiles, 4))
    assert not torch.equal(RandomStart().fit(profiles, 4), FaissKMeans().fit(profiles, 4, grid=(4, 4)))
