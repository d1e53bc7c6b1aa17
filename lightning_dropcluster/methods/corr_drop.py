"""CorrDrop, as functions and as modules: drop regions, or maps, that correlate little with the others."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dropcluster.checks import check_number
from lightning_dropcluster.methods.base import DropRegularizer
from lightning_dropcluster.methods.drop_block import block_and_places
from lightning_dropcluster.methods.masking import Draw, draw_uniform, drop, kept_ratio

_POOLS = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


def corr_drop(x: Tensor, drop_prob: Tensor | float, block_size: int, *, draw: Draw = draw_uniform) -> Tensor:
    """Drop square tiles of all feature maps at once, preferably those that correlate little with the others.

    Each map is cut into tiles, a tile is described by its mean in each feature map, and dropped with the
    probability of `uncorrelated_drop_prob`. What is kept is scaled by (number of features) / (number kept)
    over the batch.

    Source: the spatial variant of CorrDrop (Zeng, Dai and Xia, ICASSP 2020; Pattern Recognition 120, 2021),
    after the authors' code, https://github.com/Sandy-Zeng/CorrDrop; of the papers we had the abstracts. Where
    we differ: they draw candidates and then drop some of them, which we do in one draw of the same
    probability; they centre the tiles, we lay them from the first corner; where tiles overhang a map they
    drop less than ``drop_prob`` (0.64 of it for maps of 8 x 8 and tiles of 5), we do not; maps may have one
    to three dimensions.

    Args:
        x: activation (N, C, *spatial), floating point, with one to three spatial dimensions.
        drop_prob: in [0, 1), a number or a 0-d tensor.
        block_size: side of a tile, at least 1. Memory grows with the square of the number of tiles.
        draw: where the uniform numbers come from.

    Returns:
        A tensor like ``x``: same shape, dtype, device and memory format.

    Raises:
        ValueError: if ``x`` has no spatial dimensions.

    Example:
        >>> corr_drop(torch.ones(1, 1, 4), 0.0, block_size=2)
        tensor([[[1., 1., 1., 1.]]])
    """
    block, _ = block_and_places(x, block_size)
    tiles = _POOLS[len(block) - 1](x.detach().float(), block, ceil_mode=True)
    prob = uncorrelated_drop_prob(tiles.flatten(2).mT, drop_prob)
    dropped = draw(prob.shape, device=x.device) < prob
    dropped = _enlarge(dropped.reshape(len(x), 1, *tiles.shape[2:]), block, x.shape[2:])
    return drop(x, dropped, kept_ratio(dropped))


def channel_corr_drop(x: Tensor, drop_prob: Tensor | float, *, draw: Draw = draw_uniform) -> Tensor:
    """Drop whole feature maps, preferably those that correlate little with the others.

    Source: the channel variant of CorrDrop, see `corr_drop`.

    Args:
        x: activation (N, C, *spatial), floating point.
        drop_prob: in [0, 1), a number or a 0-d tensor.
        draw: where the uniform numbers come from.

    Returns:
        A tensor like ``x``: same shape, dtype, device and memory format.

    Example:
        >>> channel_corr_drop(torch.ones(1, 1, 4), 0.0)
        tensor([[[1., 1., 1., 1.]]])
    """
    prob = uncorrelated_drop_prob(x.detach().reshape(*x.shape[:2], -1), drop_prob)
    dropped = draw(prob.shape, device=x.device) < prob
    dropped = dropped.reshape(*x.shape[:2], *(1 for _ in x.shape[2:]))
    return drop(x, dropped, kept_ratio(dropped))


def uncorrelated_drop_prob(vectors: Tensor, drop_prob: Tensor | float) -> Tensor:
    """Return drop probabilities (N, T) that are larger for vectors (N, T, D) unlike the others of a sample.

    With r_i the mean over all vectors j of |cos(v_i, v_j)|, counted as 0 for i itself, and s = softmax(r), it
    is drop_prob (1 - s_i) / mean(1 - s). The authors leave r without a factor, so that among many vectors the
    probabilities differ little: by a share of about 1 / T for T vectors. They are above 1, for certain, where
    drop_prob is close to 1.

    Example:
        >>> vectors = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
        >>> uncorrelated_drop_prob(vectors, 0.5)
        tensor([[0.4739, 0.4739, 0.5522]])
    """
    count = vectors.shape[1]
    if count == 1:
        return torch.ones(len(vectors), 1, device=vectors.device) * drop_prob
    unit = F.normalize(vectors.float(), dim=-1)
    cosines = (unit @ unit.mT).abs()
    correlation = (cosines.sum(-1) - cosines.diagonal(dim1=-2, dim2=-1)) / count
    return drop_prob * (1.0 - correlation.float().softmax(-1)) * (count / (count - 1))


class CorrDrop(DropRegularizer):
    """Drop square tiles that correlate little with the others; see `functional.corr_drop`.

    Args:
        drop_prob: mean probability in [0, 1) that a tile is dropped.
        block_size: side of a tile, at least 1.
        paired: see `Regularizer`.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if it is out of range.

    Example:
        >>> CorrDrop(0.1, block_size=5)
        CorrDrop(drop_prob=0.1, block_size=5)
    """

    def __init__(self, drop_prob: float = 0.1, *, block_size: int = 5, paired: bool = False) -> None:
        super().__init__(drop_prob, paired=paired)
        self.block_size = check_number("block_size", block_size, 1, integer=True)

    def regularize(self, x: Tensor) -> Tensor:
        """Drop tiles of an activation (N, C, *spatial)."""
        return corr_drop(x, self.drop_prob, self.block_size, draw=self.draw)

    def _settings(self) -> dict[str, object]:
        return {**super()._settings(), "block_size": self.block_size}


class ChannelCorrDrop(DropRegularizer):
    """Drop whole feature maps that correlate little with the others; see `functional.channel_corr_drop`.

    Args:
        drop_prob: mean probability in [0, 1) that a feature map is dropped.
        paired: see `Regularizer`.

    Example:
        >>> ChannelCorrDrop(0.1)
        ChannelCorrDrop(drop_prob=0.1)
    """

    def regularize(self, x: Tensor) -> Tensor:
        """Drop feature maps of an activation (N, C, *spatial)."""
        return channel_corr_drop(x, self.drop_prob, draw=self.draw)


def _enlarge(tiles: Tensor, block: Sequence[int], spatial: Sequence[int]) -> Tensor:
    """Repeat each tile over its features, cutting the last ones to the map."""
    for axis, (side, size) in enumerate(zip(block, spatial, strict=True), start=2):
        tiles = tiles.repeat_interleave(side, axis).narrow(axis, 0, size)
    return tiles
