"""What stands in for dropped clusters: linear maps of the activation, for autograd and for torch.func."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_dropcluster.methods.cluster_means import fill_means, fill_means_whole
from lightning_dropcluster.methods.packed_keep import look_up, multiply_packed, packing_pays

FILLS = ("zero", "mean")


def fill_dropped(
    x: Tensor, labels: Tensor, keep: Tensor, scale: Tensor, fill: str, inplace: bool = False
) -> Tensor:
    """Scale what is kept and replace what is dropped; backward saves what is given here besides ``x``.

    Args:
        x: (N, C, *spatial), floating point.
        labels: integers in [0, K), (C or 1, *spatial or ones).
        keep: bool (N or 1, C or 1, K).
        scale: 0-d.
        fill: one of `FILLS`.
        inplace: whether to write into ``x``; not under the transforms of torch.func.

    Returns:
        ``x`` itself, or a tensor like it.
    """
    # Dynamo traces no function that defines jvp.
    compiling = torch.compiler.is_compiling()
    function = _Fill if compiling else _TransformableFill
    return function.apply(x, labels, keep, scale, fill, inplace and not compiling)  # pyright: ignore[reportReturnType]


class _Fill(torch.autograd.Function):
    """For fixed clusters the map is linear and its own adjoint, so backward applies it again."""

    @staticmethod
    def forward(x: Tensor, labels: Tensor, keep: Tensor, scale: Tensor, fill: str, inplace: bool) -> Tensor:
        if torch.compiler.is_compiling():  # which plans order and memory itself
            return _fill_whole(x, labels, keep, scale, fill)
        out = x if inplace else torch.empty_like(x)  # no view: the model may write into what it is given
        write = fill_means if fill == "mean" else _multiply
        write(out, x, labels, keep, scale)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *fixed, ctx.fill, inplace = inputs
        ctx.save_for_backward(*fixed)
        ctx.save_for_forward(*fixed)
        ctx.is_inplace = inplace and output is x  # never where vmap batches it
        if ctx.is_inplace:
            ctx.mark_dirty(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return fill_dropped(grads[0], *ctx.saved_tensors, fill=ctx.fill), None, None, None, None, None


class _TransformableFill(_Fill):
    """The same for forward mode and for torch.func, whose transforms may also batch labels and draws."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        made = fill_dropped(tangents[0], *ctx.saved_tensors, fill=ctx.fill)
        return tangents[0].copy_(made) if ctx.is_inplace else made

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *inputs: Any) -> tuple[Tensor, int]:
        *tensors, fill, _ = inputs
        return torch.vmap(partial(_fill_whole, fill=fill), tuple(in_dims[: len(tensors)]))(*tensors), 0


def _fill_whole(x: Tensor, labels: Tensor, keep: Tensor, scale: Tensor, fill: str) -> Tensor:
    if fill == "mean":
        return fill_means_whole(x, labels, keep, scale)
    return x * look_up((keep * scale).to(x.dtype), labels.long())


def _multiply(out: Tensor, x: Tensor, labels: Tensor, keep: Tensor, scale: Tensor) -> None:
    """Multiply by the looked-up table, in the order in which the activation lies in memory."""
    if x.is_contiguous() or not x.movedim(1, -1).is_contiguous():
        _multiply_into(out, x, labels.long(), keep, scale)
    else:
        first = 0 if keep.shape[1] == 1 else torch.arange(keep.shape[1], device=x.device) * keep.shape[2]
        index = labels.movedim(0, -1).long() + first
        _multiply_into(out.movedim(1, -1), x.movedim(1, -1), index, keep.flatten(1)[:, None], scale)


def _multiply_into(out: Tensor, x: Tensor, index: Tensor, keep: Tensor, scale: Tensor) -> None:
    """Multiply x (N, R, ...) by keep (N or 1, R or 1, K) at index (R or 1, ...) and by the scale."""
    if packing_pays(x, index, keep):
        multiply_packed(out, x, index, keep, scale.to(x.dtype))
    else:
        torch.mul(x, look_up((keep * scale).to(x.dtype), index), out=out)
