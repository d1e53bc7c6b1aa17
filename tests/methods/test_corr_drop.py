import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax

from lightning_dropcluster.functional import channel_corr_drop, corr_drop
from lightning_dropcluster.methods.corr_drop import uncorrelated_drop_prob


def reference_prob(vectors, drop_prob):
    """Probabilities of the vectors (T, D) of one sample, pair by pair."""
    count = len(vectors)
    if count == 1:
        return np.full(1, drop_prob)
    correlation = np.zeros(count)
    for i, j in np.ndindex(count, count):
        norm = np.linalg.norm(vectors[i]) * np.linalg.norm(vectors[j])
        correlation[i] += abs(vectors[i] @ vectors[j]) / norm / count if i != j else 0
    weights = 1 - softmax(correlation)
    return drop_prob * weights / weights.mean()


def record(function, *args):
    drawn = []

    def draw(shape, *, device=None):
        drawn.append(torch.rand(shape, device=device))
        return drawn[0]

    return function(*args, draw=draw), drawn[0].numpy()


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
    st.integers(1, 5),
    st.floats(0, 0.9),
    st.integers(0, 99),
)
@settings(deadline=None, derandomize=True, max_examples=50)  # a draw may fall on the rounding of a bound
def test_equals_the_formula_tile_by_tile(spatial, block_size, drop_prob, seed):
    torch.manual_seed(seed)
    x = torch.randn(2, 3, *spatial)
    out, uniform = record(corr_drop, x, drop_prob, block_size)
    side = [min(block_size, size) for size in spatial]
    counts = [math.ceil(size / b) for size, b in zip(spatial, side, strict=True)]
    mask = np.ones((2, 1, *spatial))
    for n in range(2):
        tiles = [
            tuple(slice(i * b, (i + 1) * b) for i, b in zip(index, side, strict=True))
            for index in np.ndindex(*counts)
        ]
        vectors = np.stack([x.numpy()[(n, slice(None), *tile)].reshape(3, -1).mean(1) for tile in tiles])
        for tile, u, prob in zip(tiles, uniform[n], reference_prob(vectors, drop_prob), strict=True):
            mask[(n, 0, *tile)] = u >= prob
    scale = mask.size / mask.sum() if mask.any() else 1
    np.testing.assert_allclose(out, x.numpy() * mask * scale, rtol=1e-5)


@pytest.mark.parametrize("spatial", [(), (5,), (3, 4), (2, 3, 2)], ids=str)
def test_equals_the_formula_map_by_map(spatial):
    torch.manual_seed(0)
    x = torch.randn(3, 6, *spatial)
    out, uniform = record(channel_corr_drop, x, 0.4)
    probs = np.stack([reference_prob(sample.reshape(6, -1).numpy(), 0.4) for sample in x])
    mask = torch.from_numpy(uniform >= probs).reshape(3, 6, *(1 for _ in spatial))
    torch.testing.assert_close(out, x * mask * (mask.numel() / mask.sum()))


@given(st.integers(1, 9), st.floats(0, 0.99), st.integers(0, 99))
@settings(deadline=None)
def test_the_mean_probability_is_drop_prob(count, drop_prob, seed):
    vectors = torch.randn(4, count, 5, generator=torch.Generator().manual_seed(seed))
    mean = uncorrelated_drop_prob(vectors, drop_prob).mean(1)
    torch.testing.assert_close(mean, torch.full((4,), drop_prob))


def test_what_correlates_least_is_dropped_most():
    vectors = torch.tensor([[[1.0, 0.1, 0.0], [1.0, 0.0, 0.0], [-1.0, 0.0, 0.1], [0.0, 0.0, 1.0]]])
    prob = uncorrelated_drop_prob(vectors, 0.3)[0]
    assert prob.argmax() == 3
    assert prob[3] > 0.3 > prob[:3].max()


def test_all_maps_lose_the_same_tiles():
    torch.manual_seed(0)
    kept = corr_drop(torch.rand(20, 4, 9, 9) + 0.1, 0.4, 3) > 0
    assert torch.equal(kept, kept[:, :1].expand_as(kept))
    tiles = kept[:, 0].unfold(1, 3, 3).unfold(2, 3, 3).flatten(3)
    assert torch.equal(tiles.any(-1), tiles.all(-1))
    assert not torch.equal(kept, kept[:1].expand_as(kept))
