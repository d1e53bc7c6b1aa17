"""What stands in for dropped clusters: linear maps of the activation, for autograd and for torch.func."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_dropcluster.methods.dropping.cluster_means import (
    fill_means,
    fill_means_opaquely,
    fill_means_whole,
)
from lightning_dropcluster.methods.dropping.label_tables import look_up
from lightning_dropcluster.methods.dropping.memory_order import is_channels_last, number_clusters
from lightning_dropcluster.methods.dropping.packed_drop import drop_packed, pack, packing_pays, to_marks
from lightning_dropcluster.methods.masking import is_transformed

FILLS = ("zero", "mean")


def fill_dropped(
    x: Tensor, labels: Tensor, keep: Tensor, scale: Tensor, fill: str, inplace: bool = False
) -> Tensor:
    """Scale what is kept and replace what is dropped; backward saves what is given here besides ``x``.

    ``labels`` are (C or 1, *spatial or ones), ``keep`` is (N or 1, C or 1, K), ``scale`` 0-d. ``inplace``
    writes into ``x``, but not for a compiler, which plans memory itself.
    """
    if torch.compiler.is_compiling():  # Dynamo traces no function that defines jvp
        return _Fill.apply(x, labels, keep, scale, fill, False)  # pyright: ignore[reportReturnType]
    if is_transformed():
        return _TransformableFill.apply(x, labels, keep, scale, fill, inplace)  # pyright: ignore[reportReturnType]
    if fill == "zero" and packing_pays(x, labels, len(keep)):
        index = number_clusters(labels, keep.shape[1:], is_channels_last(x)).flatten()
        return drop_packed(x, index, pack(to_marks(~keep, x.dtype)), scale, inplace)
    if x.requires_grad and torch.is_grad_enabled():
        return _PlainFill.apply(x, labels, keep, scale, fill, inplace)  # pyright: ignore[reportReturnType]
    return _fill(x, labels, keep, scale, fill, inplace)


class _PlainFill(torch.autograd.Function):
    """For fixed clusters the map is linear and its own adjoint, so backward applies it again.

    Where torch need not be able to transform a function, it calls it in a third of the time.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, *fixed, ctx.fill, inplace = inputs
        ctx.save_for_backward(*fixed)
        if inplace:
            ctx.mark_dirty(x)
        return _fill(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return fill_dropped(grads[0], *ctx.saved_tensors, fill=ctx.fill), None, None, None, None, None


class _Fill(torch.autograd.Function):
    """The same for compilers."""

    @staticmethod
    def forward(x: Tensor, labels: Tensor, keep: Tensor, scale: Tensor, fill: str, inplace: bool) -> Tensor:
        if torch.compiler.is_compiling():
            return _fill_compiled(x, labels, keep, scale, fill)
        return _fill(x, labels, keep, scale, fill, inplace)

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


def _fill(x: Tensor, labels: Tensor, keep: Tensor, scale: Tensor, fill: str, inplace: bool) -> Tensor:
    out = x if inplace else torch.empty_like(x)  # no view: the model may write into what it is given
    write = fill_means if fill == "mean" else _multiply
    write(out, x, labels, keep, scale)
    return out


def _fill_whole(x: Tensor, labels: Tensor, keep: Tensor, scale: Tensor, fill: str) -> Tensor:
    if fill == "mean":
        return fill_means_whole(x, labels, keep, scale)
    return x * look_up((keep * scale).to(x.dtype), labels.long())


def _fill_compiled(x: Tensor, labels: Tensor, keep: Tensor, scale: Tensor, fill: str) -> Tensor:
    """The same by indexing, which Inductor repeats in backward; what `gather` returns it would keep."""
    if fill == "mean":
        return fill_means_opaquely(x, labels, keep, scale)
    groups = keep.shape[1]
    numbers = labels.long().movedim(0, -1) * groups + torch.arange(groups, device=x.device)
    table = (keep * scale).to(x.dtype).mT.flatten(1)
    return x * table[:, numbers].movedim(-1, 1)


def _multiply(out: Tensor, x: Tensor, labels: Tensor, keep: Tensor, scale: Tensor) -> None:
    """Multiply by the looked-up table, in the order in which the activation lies in memory."""
    table, last = (keep * scale).to(x.dtype), is_channels_last(x)
    if last:
        index = number_clusters(labels, keep.shape[1:], last).long()
        torch.mul(x.movedim(1, -1), look_up(table.flatten(1)[:, None], index), out=out.movedim(1, -1))
    else:
        torch.mul(x, look_up(table, labels.long()), out=out)
