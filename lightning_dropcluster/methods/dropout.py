"""Dropout of single features and of whole feature maps, as functions and as modules."""

from torch import Tensor

from lightning_dropcluster.methods.base import DropRegularizer
from lightning_dropcluster.methods.masking import Draw, draw_uniform, drop, expected_scale


def dropout(x: Tensor, drop_prob: Tensor | float, *, draw: Draw = draw_uniform) -> Tensor:
    """Drop each feature with a probability and scale the others by 1 / (1 - drop_prob).

    This is `torch.nn.functional.dropout`, except that a probability held in a tensor may change without
    recompilation and without a wait for the device.

    Source: Dropout, https://jmlr.org/papers/v15/srivastava14a.html.

    Args:
        x: activation of any shape, floating point.
        drop_prob: in [0, 1), a number or a 0-d tensor.
        draw: where the uniform numbers come from.

    Returns:
        A tensor like ``x``: same shape, dtype, device and memory format.

    Example:
        >>> import torch
        >>> sorted(set(dropout(torch.ones(100), 0.5).tolist()))
        [0.0, 2.0]
    """
    return drop(x, draw(x.shape, device=x.device) < drop_prob, expected_scale(drop_prob))


def spatial_dropout(x: Tensor, drop_prob: Tensor | float, *, draw: Draw = draw_uniform) -> Tensor:
    """Drop whole feature maps with a probability and scale the others by 1 / (1 - drop_prob).

    This is `torch.nn.functional.dropout1d`, ``dropout2d`` or ``dropout3d``, whichever fits the activation,
    with the same exception as `dropout`.

    Source: SpatialDropout, https://arxiv.org/abs/1411.4280.

    Args:
        x: activation (N, C, *spatial), floating point.
        drop_prob: in [0, 1), a number or a 0-d tensor.
        draw: where the uniform numbers come from.

    Returns:
        A tensor like ``x``: same shape, dtype, device and memory format.

    Example:
        >>> import torch
        >>> kept = spatial_dropout(torch.ones(1, 100, 3), 0.5) > 0
        >>> (kept.all(-1) == kept.any(-1)).all().item()
        True
    """
    shape = (*x.shape[:2], *(1 for _ in x.shape[2:]))
    return drop(x, draw(shape, device=x.device) < drop_prob, expected_scale(drop_prob))


class Dropout(DropRegularizer):
    """Drop single features; see `functional.dropout`.

    Args:
        drop_prob: probability in [0, 1) that a feature is dropped.
        paired: see `Regularizer`.

    Example:
        >>> Dropout(0.5)
        Dropout(drop_prob=0.5)
    """

    def regularize(self, x: Tensor) -> Tensor:
        """Drop features of an activation of any shape with the batch first."""
        return dropout(x, self.drop_prob, draw=self.draw)


class SpatialDropout(DropRegularizer):
    """Drop whole feature maps; see `functional.spatial_dropout`.

    Args:
        drop_prob: probability in [0, 1) that a feature map is dropped.
        paired: see `Regularizer`.

    Example:
        >>> SpatialDropout(0.5)
        SpatialDropout(drop_prob=0.5)
    """

    def regularize(self, x: Tensor) -> Tensor:
        """Drop feature maps of an activation (N, C, *spatial)."""
        return spatial_dropout(x, self.drop_prob, draw=self.draw)
