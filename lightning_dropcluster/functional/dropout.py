"""Dropout of single features and of whole feature maps."""

from torch import Tensor

from lightning_dropcluster.functional.masking import Draw, draw_uniform, drop, expected_scale


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
