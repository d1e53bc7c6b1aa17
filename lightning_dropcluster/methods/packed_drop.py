"""Dropping in few operations on a CPU: draws packed into bits, so that many samples are looked up at once."""

from typing import Any

import torch
from torch import Tensor

from lightning_dropcluster.methods.masking import expected_scale, is_transformed
from lightning_dropcluster.methods.memory_order import is_dense

_SLICE = 2**20  # features whose mask stays in the cache
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of the floats that they mask
_SHIFTS = {word: torch.arange(torch.iinfo(word).bits, dtype=word)[:, None] for word in _WORDS.values()}
_BITS = {word: torch.ones((), dtype=word) << shifts.flip(0) for word, shifts in _SHIFTS.items()}
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
    """Do what `cluster_drop` does where ``uniform`` (N, G, K), which it overwrites, is at least ``prob``.

    ``by_batch`` scales by the ratio of features to those kept, otherwise by 1 / (1 - prob). ``index`` is from
    `ClusterIndex`, ``sizes`` (G, K) are integers.
    """
    dropped = mark_dropped(uniform, prob)
    scale = kept_ratio_of_marks(dropped, sizes, len(index)) if by_batch else expected_scale(prob)
    return drop_packed(x, index, pack(dropped, x.dtype), scale, inplace)


def mark_dropped(uniform: Tensor, drop_prob: Tensor) -> Tensor:
    """Overwrite numbers (N, G, K) by integers (N, G K), -1 where they are below ``drop_prob``, else 0.

    A shift spreads the sign of the difference; so nothing is converted.
    """
    return uniform.sub_(drop_prob).view(torch.int32).flatten(1).bitwise_right_shift_(31)


def kept_ratio_of_marks(dropped: Tensor, sizes: Tensor, num_features: int) -> float:
    """(number of features) / (number kept) over the batch, by marks (N, G K) and sizes (G, K)."""
    count = -int((dropped.sum(0, dtype=torch.int32) * sizes.flatten()).sum())
    return 1.0 + count / max(num_features * len(dropped) - count, 1)


def pack(dropped: Tensor, dtype: torch.dtype) -> Tensor:
    """Pack the samples of marks (N, M) into words (W, M), for floats of that type.

    The sign of a word is its first sample's.
    """
    word = _WORDS[dtype.itemsize]
    bits = _BITS[word]
    blocks = dropped.to(word).split(len(bits))
    return torch.stack([(block & bits[: len(block)]).sum(0, dtype=word) for block in blocks])


def drop_packed(x: Tensor, index: Tensor, words: Tensor, scale: float | Tensor, inplace: bool) -> Tensor:
    """Multiply x (N, C, *spatial) by the scale, and by 0 what is dropped.

    ``index`` (F,) has the cluster of each feature, int32, in the order in which a sample lies in memory, and
    ``words`` (W, M) are from `pack`. Backward saves the two, and double backward works. ``inplace`` writes
    into ``x``.
    """
    scale = torch.full((), float(scale), dtype=x.dtype)
    if x.requires_grad and torch.is_grad_enabled():
        return _PackedDrop.apply(x, index, words, scale, inplace)  # pyright: ignore[reportReturnType]
    return _multiply(x if inplace else torch.empty_like(x), x, index, words, scale)


class _PackedDrop(torch.autograd.Function):
    """The product with a fixed mask is its own adjoint."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, words: Tensor, scale: Tensor, inplace: bool) -> Tensor:
        ctx.save_for_backward(index, words, scale)
        ctx.strides = x.stride()
        if inplace:
            ctx.mark_dirty(x)
        return _multiply(x if inplace else torch.empty_like(x), x, index, words, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (index, words, scale) = grads, ctx.saved_tensors
        out = torch.empty_strided(grad.shape, ctx.strides, dtype=grad.dtype)
        if torch.is_grad_enabled() or is_transformed():
            mask = _multiply(out, out.fill_(1.0), index, words, scale)
            return grad * mask, None, None, None, None
        source = grad if grad.stride() == ctx.strides else out.copy_(grad)
        return _multiply(out, source, index, words, scale), None, None, None, None


def _multiply(out: Tensor, x: Tensor, index: Tensor, words: Tensor, scale: Tensor) -> Tensor:
    """Write the product into ``out``, which lies in memory as ``x`` does, or is ``x``.

    A mask that is looked up whole takes a read through the index for each feature of each sample. Here such a
    read fetches a word of which each bit is for one sample. A shift, many features to an instruction, makes
    that bit the sign, and torch has a kernel that passes integers on where others are not negative.
    """
    shape, shifts = (len(x), len(index)), _SHIFTS[words.dtype]
    source, target = (each.as_strided(shape, (len(index), 1)) for each in (x, out))
    samples = max(1, _SLICE // len(index))
    for block, word in enumerate(words):
        row, first = word.index_select(0, index), block * len(shifts)
        end = min(first + len(shifts), len(x))
        for start in range(first, end, samples):
            stop = min(start + samples, end)
            signs, there = row << shifts[start - first : stop - first], target[start:stop]
            _zero_where_negative(
                source[start:stop].view(words.dtype), signs, -1, grad_input=there.view(words.dtype)
            )
            there.mul_(scale)
    return out
