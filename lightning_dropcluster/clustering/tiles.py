"""Tiles: blocks of a grid, where k-means starts, since neighbours on a grid mostly respond alike."""

import math

import torch
from torch import Tensor


def tile(grid: tuple[int, ...], num_tiles: int) -> Tensor:
    """Cut a grid into connected blocks of nearly equal size, by halving the longest side again and again.

    Labels are in C order; every tile has a point where there are at least as many points as tiles.

    Example:
        >>> tile((2, 4), 2).tolist()
        [0, 0, 1, 1, 0, 0, 1, 1]
    """
    labels = torch.zeros(grid, dtype=torch.int64)
    _cut(labels, 0, num_tiles)
    return labels.flatten()


def _cut(block: Tensor, first: int, num_tiles: int) -> None:
    """Number the tiles of a block from ``first`` on, in place."""
    if num_tiles == 1:
        block.fill_(first)
        return
    axis = max(range(block.ndim), key=lambda axis: block.shape[axis])
    side = block.shape[axis]
    parts = block.tensor_split((side // 2,), dim=axis)
    sizes = [math.prod(part.shape) for part in parts]
    share = round(num_tiles * sizes[0] / sum(sizes))
    share = min(max(share, 1, num_tiles - sizes[1]), num_tiles - 1, sizes[0])
    _cut(parts[0], first, share)
    _cut(parts[1], first + share, num_tiles - share)
