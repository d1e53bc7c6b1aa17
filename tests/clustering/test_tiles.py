import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import label

from lightning_dropcluster.clustering.tiles import tile


@st.composite
def tilings(draw):
    grid = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    return grid, draw(st.integers(1, math.prod(grid)))


@given(tilings())
@settings(deadline=None, max_examples=200)
def test_every_tile_is_a_connected_block_and_none_is_missing(tiling):
    grid, num_tiles = tiling
    labels = tile(grid, num_tiles)
    assert labels.unique().tolist() == list(range(num_tiles))
    lattice = labels.reshape(grid).numpy()
    assert all(label(lattice == number)[1] == 1 for number in range(num_tiles))


@pytest.mark.parametrize(
    ("grid", "num_tiles"), [((56, 56), 196), ((14, 14), 12), ((100,), 7), ((8, 8, 8), 32)]
)
def test_tiles_are_of_nearly_equal_size(grid, num_tiles):
    sizes = tile(grid, num_tiles).bincount()
    assert sizes.max() <= 2.5 * sizes.min()
