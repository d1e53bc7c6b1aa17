import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dropcluster.functional import drop_block, expected_drop_rate, prob_drop_block
from lightning_dropcluster.methods.prob_drop_block import relative_salience


def reference(x, drop_prob, block_size, per_map, uniform):
    """The formula of the docstring for a NumPy array, seed by seed."""
    spatial = x.shape[2:]
    block = [min(block_size, size) for size in spatial]
    places = [size - side + 1 for size, side in zip(spatial, block, strict=True)]
    gamma = drop_prob / math.prod(block) * math.prod(spatial) / math.prod(places)
    middles = tuple(slice((b - 1) // 2, (b - 1) // 2 + n) for b, n in zip(block, places, strict=True))
    salience = np.abs(x) if per_map else np.abs(x).mean(1, keepdims=True)
    mask = np.ones((*salience.shape[:2], *spatial))
    for n, c in np.ndindex(*salience.shape[:2]):
        inside = salience[(n, c, *middles)]
        seeds = uniform[n, c] < gamma * inside / inside.mean()
        for corner in np.argwhere(seeds):
            mask[(n, c, *(slice(i, i + b) for i, b in zip(corner, block, strict=True)))] = 0
    mask = np.broadcast_to(mask, x.shape)
    return x * mask * (mask.size / max(mask.sum(), 1))


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
    st.integers(1, 8),
    st.floats(0, 0.9),
    st.booleans(),
    st.integers(0, 99),
)
@settings(deadline=None, derandomize=True)  # a draw may fall on the rounding of a bound
def test_equals_the_formula(spatial, block_size, drop_prob, per_map, seed):
    drawn = []

    def draw(shape, *, device=None):
        drawn.append(torch.rand(shape, device=device))
        return drawn[0]

    torch.manual_seed(seed)
    x = torch.randn(2, 3, *spatial)
    out = prob_drop_block(x, drop_prob, block_size, per_map=per_map, draw=draw)
    expected = reference(x.numpy(), drop_prob, block_size, per_map, drawn[0].numpy())
    np.testing.assert_allclose(out, expected, rtol=1e-5)


def test_is_drop_block_where_all_magnitudes_are_alike():
    x = torch.randn(5, 4, 9, 9).sign()
    outs = []
    for function in (drop_block, prob_drop_block):
        torch.manual_seed(0)
        outs.append(function(x, 0.2, 3))
    assert torch.equal(*outs)


def test_each_feature_drops_in_proportion_to_its_magnitude():
    torch.manual_seed(0)
    x = torch.tensor([1.0, -2.0, 3.0, 6.0]).expand(1, 20_000, 4)
    rates = (prob_drop_block(x, 0.2, 1) == 0).float().mean((0, 1))
    torch.testing.assert_close(rates, 0.2 * x[0, 0].abs() / 3, atol=0.01, rtol=0)


def test_maps_of_zeros_have_the_salience_of_any_other():
    x = torch.stack([torch.zeros(5, 5), torch.ones(5, 5)])[None]
    assert torch.equal(relative_salience(x, (3, 3), (3, 3)), torch.ones(1, 2, 3, 3))


def test_lowers_the_mean_magnitude_as_documented():
    torch.manual_seed(0)
    x = torch.rand(200, 4, 9, 9)
    assert prob_drop_block(x, 0.3, 1).mean() < 0.95 * x.mean()


def test_drops_less_than_drop_prob_says():
    torch.manual_seed(0)
    rate = (prob_drop_block(torch.randn(500, 4, 9, 9), 0.3, 3) == 0).float().mean()
    assert 0.15 < rate < expected_drop_rate((9, 9), 0.3, 3) + 0.01


def test_a_mask_shared_over_maps_is_one_for_each_sample():
    torch.manual_seed(0)
    kept = prob_drop_block(torch.rand(50, 4, 9, 9) + 0.1, 0.3, 3, per_map=False) > 0
    assert torch.equal(kept, kept[:, :1].expand_as(kept))


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_stays_on_its_own_map(value):
    x = torch.ones(1, 2, 5, 5)
    x[0, 0, 2, 2] = value
    assert prob_drop_block(x, 0.1, 3)[0, 1].isfinite().all()
