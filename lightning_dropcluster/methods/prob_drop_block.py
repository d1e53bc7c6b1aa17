"""ProbDropBlock, as a function and as a module: DropBlock whose seeds prefer salient features."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_dropcluster.methods.drop_block import DropBlock, block_and_places, grow_blocks, seed_prob
from lightning_dropcluster.methods.masking import Draw, draw_uniform, drop, kept_ratio


def prob_drop_block(
    x: Tensor,
    drop_prob: Tensor | float,
    block_size: int,
    *,
    per_map: bool = True,
    draw: Draw = draw_uniform,
) -> Tensor:
    """Drop blocks of features, more often where the activation is large.

    A block's seed is drawn with the probability gamma |x_i| / mean |x|, where gamma is that of `drop_block`,
    x_i the feature in the middle of the block, and the mean is over the middles of all blocks of the map, so
    that gamma is the mean probability. What is kept is scaled by
    (number of features) / (number kept) over the batch; as large activations are dropped more often, the mean
    of the activation's magnitude falls nevertheless. Where all are alike this is `drop_block`.

    Source: ProbDropBlock, https://arxiv.org/abs/2210.02570, which drops contiguous blocks "with a probability
    given by the normalized feature salience values". We had only its abstract: magnitude as salience, its
    normalisation, and DropBlock's gamma and rescaling are our reading.

    Args:
        x: activation (N, C, *spatial), floating point.
        drop_prob: in [0, 1), a number or a 0-d tensor.
        block_size: side of a block, at least 1; cut to the size of smaller maps.
        per_map: True draws for each feature map by its own salience, False once for all feature maps of a
            sample by their mean salience.
        draw: where the uniform numbers come from.

    Returns:
        A tensor like ``x``: same shape, dtype, device and memory format.

    Raises:
        ValueError: if ``x`` has no spatial dimensions.

    Example:
        >>> prob_drop_block(torch.ones(1, 1, 4), 0.0, block_size=3)
        tensor([[[1., 1., 1., 1.]]])
    """
    block, places = block_and_places(x, block_size)
    salience = relative_salience(x if per_map else x.abs().mean(1, keepdim=True), block, places)
    gamma = seed_prob(x.shape[2:], drop_prob, block_size)
    dropped = grow_blocks(draw(salience.shape, device=x.device) < gamma * salience, block)
    return drop(x, dropped, kept_ratio(dropped))


def relative_salience(x: Tensor, block: Sequence[int], places: Sequence[int]) -> Tensor:
    """Return the magnitude of the features in the middle of blocks, in units of its mean over all of them.

    Of x (N, C, *spatial) these are ratios (N, C, *places), float32; 1 on maps of zeros.

    Example:
        >>> relative_salience(torch.tensor([[[9.0, 1.0, -3.0, 9.0]]]), (3,), (2,))
        tensor([[[0.5000, 1.5000]]])
    """
    magnitude = x.detach().abs().float()
    for axis, (side, count) in enumerate(zip(block, places, strict=True), start=2):
        magnitude = magnitude.narrow(axis, (side - 1) // 2, count)
    mean = magnitude.flatten(2).mean(2).reshape(*x.shape[:2], *(1 for _ in places))
    return torch.where(mean > 0, magnitude / mean, 1.0)


class ProbDropBlock(DropBlock):
    """Drop square blocks, more often where the activation is large; see `functional.prob_drop_block`.

    Args:
        drop_prob: probability in [0, 1) that a feature of average magnitude is dropped, if blocks did not
            overlap.
        block_size: side of a block, at least 1; cut to the size of smaller maps.
        per_map: True draws for each feature map by its own salience, False once for all feature maps of a
            sample.
        paired: see `Regularizer`; blocks of a pair may overlap.

    Example:
        >>> ProbDropBlock(0.1, block_size=5)
        ProbDropBlock(drop_prob=0.1, block_size=5, per_map=True)
    """

    def regularize(self, x: Tensor) -> Tensor:
        """Drop blocks of an activation (N, C, *spatial)."""
        return prob_drop_block(x, self.drop_prob, self.block_size, per_map=self.per_map, draw=self.draw)
