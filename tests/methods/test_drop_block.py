import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import drop_block_2d

from lightning_dropcluster.functional import drop_block, expected_drop_rate
from lightning_dropcluster.methods.drop_block import grow_blocks, seed_prob

shapes = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)


def reference(x, drop_prob, block_size, uniform):
    """DropBlock of a NumPy array, feature by feature as the paper's algorithm 1 has it."""
    spatial = x.shape[2:]
    block = [min(block_size, size) for size in spatial]
    places = [size - side + 1 for size, side in zip(spatial, block, strict=True)]
    gamma = drop_prob / math.prod(block) * math.prod(spatial) / math.prod(places)
    mask = np.ones((*uniform.shape[:2], *spatial))
    for n, c, *corner in np.argwhere(uniform < gamma):
        mask[(n, c, *(slice(i, i + side) for i, side in zip(corner, block, strict=True)))] = 0
    mask = np.broadcast_to(mask, x.shape)
    return x * mask * (mask.size / max(mask.sum(), 1))


@given(shapes, st.integers(1, 8), st.floats(0, 0.9), st.booleans(), st.integers(0, 99))
@settings(deadline=None)
def test_equals_the_algorithm_of_the_paper(spatial, block_size, drop_prob, per_map, seed):
    drawn = []

    def draw(shape, *, device=None):
        drawn.append(torch.rand(shape, device=device))
        return drawn[0]

    torch.manual_seed(seed)
    x = torch.randn(2, 3, *spatial)
    out = drop_block(x, drop_prob, block_size, per_map=per_map, draw=draw)
    expected = reference(x.numpy(), drop_prob, block_size, drawn[0].numpy())
    np.testing.assert_allclose(out, expected, rtol=1e-5)


@given(shapes, st.integers(1, 8))
@settings(deadline=None)
def test_blocks_lie_whole_on_the_map_and_cover_it(spatial, block_size):
    block = tuple(min(block_size, size) for size in spatial)
    places = tuple(size - side + 1 for size, side in zip(spatial, block, strict=True))
    seeds = torch.eye(math.prod(places), dtype=torch.bool).reshape(-1, *places)
    blocks = grow_blocks(seeds, block)
    assert blocks.shape[1:] == spatial
    assert (blocks.flatten(1).sum(1) == math.prod(block)).all()
    assert blocks.any(0).all()


@given(shapes, st.integers(1, 8), st.floats(0, 0.99))
@settings(deadline=None)
def test_the_expected_rate_is_that_of_covering_seeds(spatial, block_size, drop_prob):
    block = [min(block_size, size) for size in spatial]
    gamma = seed_prob(spatial, drop_prob, block_size)
    kept = []
    for cell in itertools.product(*map(range, spatial)):
        covering = [
            sum(0 <= i - j < side for j in range(size - side + 1))
            for i, size, side in zip(cell, spatial, block, strict=True)
        ]
        kept.append((1 - gamma) ** math.prod(covering))
    assert expected_drop_rate(spatial, drop_prob, block_size) == pytest.approx(1 - np.mean(kept))
    assert expected_drop_rate(spatial, drop_prob, block_size) <= drop_prob + 1e-12


def test_blocks_of_one_are_dropout_and_blocks_of_the_map_are_spatial_dropout():
    assert expected_drop_rate((6, 7), 0.3, 1) == pytest.approx(0.3)
    assert expected_drop_rate((6, 7), 0.3, 9) == pytest.approx(0.3)
    torch.manual_seed(0)
    kept = drop_block(torch.ones(50, 4, 6, 7), 0.3, 9).flatten(2) > 0
    assert torch.equal(kept.any(-1), kept.all(-1))


def test_a_mask_shared_over_maps_is_one_for_each_sample():
    torch.manual_seed(0)
    kept = drop_block(torch.ones(50, 4, 9, 9), 0.3, 3, per_map=False) > 0
    assert torch.equal(kept, kept[:, :1].expand_as(kept))
    assert not torch.equal(kept, kept[:1].expand_as(kept))


def test_activations_without_maps_raise():
    with pytest.raises(ValueError, match=r"x of shape \(2, 3\)"):
        drop_block(torch.ones(2, 3), 0.1, 3)


def measured_rate(function, drop_prob, per_map, draws=40):
    torch.manual_seed(0)
    x = torch.ones(8, 16, 14, 14)
    masks = torch.stack([function(x, drop_prob, per_map) == 0 for _ in range(draws)])
    return masks.float().mean().item()


def ours(x, drop_prob, per_map):
    return drop_block(x, drop_prob, 5, per_map=per_map)


def timms(x, drop_prob, per_map):
    return drop_block_2d(x, drop_prob, 5, couple_channels=not per_map)


@pytest.mark.parametrize("per_map", [True, False])
def test_does_as_timm_does_at_equal_measured_rate(per_map):
    """timm seeds outside the valid region too, so it drops more at the same drop_prob."""
    rate = measured_rate(timms, 0.1, per_map)
    low, high = 0.1, 0.5
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if expected_drop_rate((14, 14), middle, 5) < rate else (low, middle)
    assert measured_rate(ours, low, per_map) == pytest.approx(rate, abs=0.01)

    centre = (slice(None), slice(None), slice(4, 10), slice(4, 10))
    torch.manual_seed(0)
    x = torch.ones(300, 16, 14, 14)
    for function, drop_prob in ((ours, low), (timms, 0.1)):
        out = function(x, drop_prob, per_map)
        assert out.mean() == pytest.approx(1, abs=1e-4)
        dropped = (out[centre] == 0).float()
        beside = (dropped[..., 1:] * dropped[..., :-1]).mean() / dropped.mean()
        # Of two neighbours one is dropped without the other where a block of 5 ends: once in 5, less overlap.
        assert 0.8 < beside < 0.88
