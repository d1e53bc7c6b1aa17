"""A keep table packed into bits, so that a CPU looks up many samples at once."""

import torch
from torch import Tensor

_SLICE = 2**20  # features whose mask stays in the cache
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of the floats that they mask
_LARGE = 2**16  # values from which on fewer look-ups outweigh more small operations
_zero_where_negative = torch.ops.aten.threshold_backward.grad_input


def packing_pays(x: Tensor, index: Tensor, keep: Tensor) -> bool:
    """Whether `multiply_packed` takes these and is faster than a mask that is looked up whole."""
    drawn_apart = len(keep) > 1 and index.shape == x.shape[1:]
    return x.device.type == "cpu" and drawn_apart and x.numel() >= _LARGE


def multiply_packed(out: Tensor, x: Tensor, index: Tensor, keep: Tensor, scale: Tensor) -> None:
    """Write x (N, R, ...) times keep (N, R or 1, K) at index (R, ...) times the scale; ``out`` may be ``x``.

    A mask that is looked up whole takes a read through the index for each feature of each sample. Here such a
    read fetches a word of which each bit is for one sample. A shift, many features to an instruction, makes
    that bit the sign, and torch has a kernel that passes integers on where others are not negative.
    """
    word = _WORDS[x.element_size()]
    bits = torch.iinfo(word).bits
    shifts = torch.arange(bits, dtype=word)
    samples = max(1, _SLICE // index.numel())
    for part, target, kept in zip(x.split(bits), out.split(bits), keep.split(bits), strict=True):
        row, left = look_up(_pack(kept, word), index), shifts[: len(part)].view(-1, *[1] * index.ndim)
        for shift, here, there in zip(*(each.split(samples) for each in (left, part, target)), strict=True):
            signs = torch.bitwise_left_shift(row, shift)
            _zero_where_negative(here.view(word), signs, -1, grad_input=there.view(word))
            there.mul_(scale)


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of each sample (N, C, *spatial) lie side by side in memory."""
    return not x.is_contiguous() and x[:1].movedim(1, -1).is_contiguous()


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """Spread a table (N, R or 1, K) by an index (R, ...) of integers in [0, K): (N, R, ...)."""
    rows = index.reshape(len(index), -1).expand(len(table), -1, -1)
    return table.expand(-1, len(index), -1).gather(2, rows).reshape(len(table), *index.shape)


def _pack(keep: Tensor, word: torch.dtype) -> Tensor:
    """Pack samples (N, R, K) into words (1, R, K), the first into the sign; dropped clusters are ones."""
    places = torch.arange(torch.iinfo(word).bits - 1, -1, -1, dtype=word)[: len(keep), None]
    bits = keep.logical_not().flatten(1).to(word).bitwise_left_shift_(places)
    return bits.sum(0, dtype=word).view(1, *keep.shape[1:])
