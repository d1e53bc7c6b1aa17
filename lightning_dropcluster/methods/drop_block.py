"""DropBlock, as a function and as a module: draw seeds, grow them into blocks, drop the blocks."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_dropcluster.checks import check_bool, check_number
from lightning_dropcluster.methods.base import DropRegularizer
from lightning_dropcluster.methods.masking import Draw, draw_uniform, drop, kept_ratio


def drop_block(
    x: Tensor,
    drop_prob: Tensor | float,
    block_size: int,
    *,
    per_map: bool = True,
    draw: Draw = draw_uniform,
) -> Tensor:
    """Drop blocks of features and scale what is kept by (number of features) / (number kept) over the batch.

    The seeds of blocks are drawn with the probability `seed_prob`, where a whole block fits on the map. As
    blocks may overlap, somewhat fewer features are dropped than ``drop_prob`` says: `expected_drop_rate`.

    Source: DropBlock, https://arxiv.org/abs/1810.12890, algorithm 1. Where we differ: blocks are cut to the
    size of a map that is smaller, and maps need be neither square nor two-dimensional.

    Args:
        x: activation (N, C, *spatial), floating point.
        drop_prob: in [0, 1), a number or a 0-d tensor.
        block_size: side of a block, at least 1.
        per_map: True draws for each feature map, which the paper found to be better, False once for all
            feature maps of a sample.
        draw: where the uniform numbers come from.

    Returns:
        A tensor like ``x``: same shape, dtype, device and memory format.

    Raises:
        ValueError: if ``x`` has no spatial dimensions.

    Example:
        >>> drop_block(torch.ones(1, 1, 4), 0.0, block_size=3)
        tensor([[[1., 1., 1., 1.]]])
    """
    block, places = block_and_places(x, block_size)
    shape = (len(x), x.shape[1] if per_map else 1, *places)
    seeds = draw(shape, device=x.device) < seed_prob(x.shape[2:], drop_prob, block_size)
    dropped = grow_blocks(seeds, block)
    return drop(x, dropped, kept_ratio(dropped))


def block_and_places(x: Tensor, block_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the sides of a block, cut to those of the maps of x (N, C, *spatial), and its places along each.

    Example:
        >>> block_and_places(torch.ones(2, 3, 5, 9), block_size=7)
        ((5, 7), (1, 3))
    """
    if x.ndim < 3:
        raise ValueError(f"x of shape {tuple(x.shape)}: must be (N, C, *spatial), blocks being spatial")
    block = tuple(min(block_size, size) for size in x.shape[2:])
    return block, tuple(size - side + 1 for size, side in zip(x.shape[2:], block, strict=True))


def seed_prob(spatial: Sequence[int], drop_prob: Tensor | float, block_size: int) -> Any:
    """Return the probability of a seed, DropBlock's gamma.

    It is drop_prob times F / (b (F - b + 1)) for each dimension, where F is the size of the map and b the
    side of a block, cut to that of the map. Where blocks did not overlap, each feature would be dropped with
    drop_prob on average. A number or a tensor, as drop_prob is.

    Example:
        >>> seed_prob((7, 7), 0.1, block_size=7)
        0.1
    """
    sides = [min(block_size, size) for size in spatial]
    ratios = [size / (side * (size - side + 1)) for size, side in zip(spatial, sides, strict=True)]
    return drop_prob * math.prod(ratios)


def expected_drop_rate(spatial: Sequence[int], drop_prob: float, block_size: int) -> float:
    """Return the share of features that `drop_block` drops on average.

    A feature is kept if none of the seeds whose blocks cover it is drawn.

    Args:
        spatial: size of the map.
        drop_prob: in [0, 1).
        block_size: side of a block.

    Returns:
        The rate, at most ``drop_prob``.

    Example:
        >>> round(expected_drop_rate((14, 14), 0.1, block_size=7), 4)
        0.0929
    """
    covering = torch.ones((), dtype=torch.float64)
    for size in spatial:
        side = min(block_size, size)
        position = torch.arange(size)
        first, last = (position - side + 1).clamp_min(0), position.clamp_max(size - side)
        covering = covering[..., None] * (last - first + 1)
    return float((1.0 - (1.0 - seed_prob(spatial, drop_prob, block_size)) ** covering).mean())


def grow_blocks(seeds: Tensor, block: Sequence[int]) -> Tensor:
    """Mark the blocks whose first corner is a seed: from bool (..., *places) to bool (..., *spatial).

    A block is the union of shifted seeds; shifts that double need log2(size) steps where pooling looks at
    each feature of the block.

    Example:
        >>> grow_blocks(torch.tensor([False, True, False]), (2,))
        tensor([False,  True,  True, False])
    """
    for axis, side in enumerate(block, start=seeds.ndim - len(block)):
        margins = (0, 0) * (seeds.ndim - 1 - axis) + (side - 1, side - 1)
        seeds, width = torch.nn.functional.pad(seeds, margins), 1
        while width < side:
            step = min(width, side - width)
            length = seeds.shape[axis] - step
            seeds = seeds.narrow(axis, 0, length) | seeds.narrow(axis, step, length)
            width += step
    return seeds


class DropBlock(DropRegularizer):
    """Drop square blocks of features; see `functional.drop_block`.

    Args:
        drop_prob: probability in [0, 1) that a feature is dropped, if blocks did not overlap.
        block_size: side of a block, at least 1; cut to the size of smaller maps.
        per_map: True draws for each feature map, False once for all feature maps of a sample.
        paired: see `Regularizer`; blocks of a pair never begin at the same feature, but may overlap.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if it is out of range.

    Example:
        >>> DropBlock(0.1, block_size=5)
        DropBlock(drop_prob=0.1, block_size=5, per_map=True)
    """

    def __init__(
        self, drop_prob: float = 0.1, *, block_size: int = 7, per_map: bool = True, paired: bool = False
    ) -> None:
        super().__init__(drop_prob, paired=paired)
        check_bool("per_map", per_map)
        self.block_size = check_number("block_size", block_size, 1, integer=True)
        self.per_map = per_map

    def regularize(self, x: Tensor) -> Tensor:
        """Drop blocks of an activation (N, C, *spatial)."""
        return drop_block(x, self.drop_prob, self.block_size, per_map=self.per_map, draw=self.draw)

    def _settings(self) -> dict[str, object]:
        return {**super()._settings(), "block_size": self.block_size, "per_map": self.per_map}
