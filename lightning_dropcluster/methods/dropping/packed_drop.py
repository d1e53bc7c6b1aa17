"""Dropping in few operations on a CPU: draws packed into bits, so that many samples are looked up at once."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_dropcluster.methods.dropping.memory_order import is_dense
from lightning_dropcluster.methods.masking import expected_scale, is_transformed

_SLICE = 2**20  # features whose mask stays in the cache
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of the floats that they mask
_LARGE = 2**16  # values from which on fewer look-ups outweigh more small operations
_zero_where_negative = torch.ops.aten.threshold_backward.grad_input


def packing_pays(x: Tensor, labels: Tensor, draws: int) -> bool:
    """Whether `drop_packed` takes an activation and is faster than a mask that is looked up whole."""
    if x.device.type != "cpu" or draws == 1 or x.numel() < _LARGE or labels.shape != x.shape[1:]:
        return False
    # Others, as fake and distributed tensors, need not have values in memory.
    return type(x) is Tensor and is_dense(x) and not torch.compiler.is_compiling() and not is_transformed()


def drop_drawn(
    x: Tensor,
    index: Tensor,
    sizes: Tensor,
    uniform: Tensor,
    prob: Tensor,
    *,
    by_batch: bool,
    inplace: bool,
) -> Tensor:
    """Do what `cluster_drop` does where ``uniform`` (N, G, K) is at least ``prob``.

    ``by_batch`` scales by the ratio of features to those kept, otherwise by 1 / (1 - prob). ``index`` is from
    `ClusterIndex`, ``sizes`` (G, K) are integers.
    """
    marks = to_marks(uniform < prob, x.dtype)
    scale = kept_ratio_of_marks(marks, sizes, len(index)) if by_batch else expected_scale(prob)
    return drop_packed(x, index, pack(marks), scale, inplace)


def to_marks(dropped: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn what is dropped (N, G, K) into integers, 1 or 0, as wide as the floats that they mask."""
    return dropped.to(_WORDS[dtype.itemsize])


def kept_ratio_of_marks(marks: Tensor, sizes: Tensor, num_features: int) -> float:
    """(number of features) / (number kept) over the batch, by marks (N, G, K) and sizes (G, K)."""
    count = int((marks.sum(0, dtype=torch.int32) * sizes).sum())
    return 1.0 + count / max(num_features * len(marks) - count, 1)


def pack(marks: Tensor) -> list[Tensor]:
    """Pack marks (N, G, K) into words (G K,) with a bit for each of their samples, the sign for the first."""
    word, last = marks.dtype, torch.iinfo(marks.dtype).bits - 1
    blocks = (_part(marks, start, start + last + 1) for start in range(0, len(marks), last + 1))
    return [(block << _shifts(word, 3, last, -len(block))).sum(0, dtype=word).view(-1) for block in blocks]


def drop_packed(
    x: Tensor, index: Tensor, words: Sequence[Tensor], scale: float | Tensor, inplace: bool
) -> Tensor:
    """Multiply x (N, C, *spatial) by the scale, and by 0 what is dropped.

    ``index`` (F,) has the cluster of each feature, int32, in the order in which a sample lies in memory, and
    ``words`` are from `pack`. Backward saves the two, and double backward works. ``inplace`` writes into
    ``x``.
    """
    scale = torch.full((), float(scale), dtype=x.dtype)
    if x.requires_grad and torch.is_grad_enabled():
        return _PackedDrop.apply(x, inplace, scale, index, *words)  # pyright: ignore[reportReturnType]
    return _multiply(x if inplace else torch.empty_like(x), x, scale, index, *words)


class _PackedDrop(torch.autograd.Function):
    """The product with a fixed mask is its own adjoint."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool, *fixed: Tensor) -> Tensor:
        ctx.save_for_backward(*fixed)
        ctx.strides = x.stride()
        if inplace:
            ctx.mark_dirty(x)
        return _multiply(x if inplace else torch.empty_like(x), x, *fixed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), fixed = grads, ctx.saved_tensors
        others = [None] * (1 + len(fixed))
        out = torch.empty_strided(grad.shape, ctx.strides, dtype=grad.dtype)
        if torch.is_grad_enabled() or is_transformed():
            return grad * _multiply(out, out.fill_(1.0), *fixed), *others
        source = grad if grad.stride() == ctx.strides else out.copy_(grad)
        return _multiply(out, source, *fixed), *others


def _multiply(out: Tensor, x: Tensor, scale: Tensor, index: Tensor, *words: Tensor) -> Tensor:
    """Write the product into ``out``, which lies in memory as ``x`` does, or is ``x``.

    A mask that is looked up whole takes a read through the index for each feature of each sample. Here such a
    read fetches a word of which each bit is for one sample. A shift, many features to an instruction, makes
    that bit the sign, and torch has a kernel that passes integers on where others are not negative. In a
    training step caches are cold, so each operation costs, even a view: whole batches are not sliced.
    """
    word, shape, strides = words[0].dtype, x.shape[1:], x.stride()[1:]
    bits, samples = torch.iinfo(word).bits, max(1, _SLICE // len(index))
    for block, packed in enumerate(words):
        row, first = packed.index_select(0, index).as_strided(shape, strides), block * bits
        end = min(first + bits, len(x))
        for start in range(first, end, samples):
            stop = min(start + samples, end)
            signs = row << _shifts(word, x.ndim, start - first, stop - start)
            source, target = (_part(each, start, stop) for each in (x, out))
            _zero_where_negative(source.view(word), signs, -1, grad_input=target.view(word))
            target.mul_(scale)
    return out


def _part(x: Tensor, start: int, stop: int) -> Tensor:
    return x if start == 0 and stop >= len(x) else x[start:stop]


@lru_cache(1024)
def _shifts(word: torch.dtype, dims: int, first: int, count: int) -> Tensor:
    """Numbers up from the first, or down where the count is negative, (count, 1, ...)."""
    with torch.inference_mode(False):
        last, step = first + count, 1 if count > 0 else -1
        return torch.arange(first, last, step, dtype=word, device="cpu").view(-1, *[1] * (dims - 1))
