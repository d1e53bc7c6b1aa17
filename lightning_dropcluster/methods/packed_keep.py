"""A keep table packed into bits, so that a CPU looks up many samples at once."""

import torch
from torch import Tensor
from torch.nn.functional import pad

_SLICE = 2**20  # features whose mask stays in the cache
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of the floats that they mask
_SAMPLES = 32  # of a word at most, whose bits float64 still adds up exactly
_LARGE = 2**20  # values from which on fewer look-ups outweigh more small operations


def packing_pays(x: Tensor, index: Tensor, keep: Tensor) -> bool:
    """Whether `multiply_packed` takes these and is faster than a mask that is looked up whole.

    Args:
        x: (N, R, ...), floating point.
        index: integers in [0, K), (R or 1, ...).
        keep: bool (N or 1, R or 1, K).

    Returns:
        True on a CPU for a large activation, with a draw for each sample and a label for each feature.
    """
    drawn_apart = len(keep) > 1 and index.shape == x.shape[1:]
    return x.device.type == "cpu" and drawn_apart and x.numel() >= _LARGE


def multiply_packed(out: Tensor, x: Tensor, index: Tensor, keep: Tensor, scale: Tensor) -> None:
    """Write what is kept of an activation, times a scale.

    A mask that is looked up whole takes a read through the index for each feature of each sample. Here such a
    read fetches a word of which each bit is for one sample, and shifts, many features to an instruction, make
    masks of words.

    Args:
        out: where to write (N, R, ...), of the type of ``x``; it may be ``x``.
        x: (N, R, ...), floating point.
        index: integers in [0, K), of the shape of one sample.
        keep: bool (N, R or 1, K).
        scale: 0-d, of the type of ``x``.
    """
    word = _WORDS[x.element_size()]
    bits = torch.iinfo(word).bits
    packed = min(bits, _SAMPLES)
    words = look_up(_pack(keep, packed).to(word), index)
    # To the left until the sample's bit is the sign, which the way back spreads over the whole word.
    left = torch.arange(bits - 1, bits - 1 - packed, -1, dtype=word).view(-1, *[1] * index.ndim)
    samples = max(1, _SLICE // index.numel())
    for row, part, target in zip(words, x.split(packed), out.split(packed), strict=True):
        shifts = left[: len(part)]
        for shift, here, there in zip(*(each.split(samples) for each in (shifts, part, target)), strict=True):
            mask = torch.bitwise_left_shift(row, shift).bitwise_right_shift_(bits - 1)
            torch.bitwise_and(here.view(word), mask, out=there.view(word))
            there.mul_(scale)


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """Spread a table by an index.

    Args:
        table: (N, R or 1, K).
        index: integers in [0, K), (R, ...).

    Returns:
        A tensor (N, R, ...) of the table's type.
    """
    rows = index.reshape(len(index), -1).expand(len(table), -1, -1)
    return table.expand(-1, len(index), -1).gather(2, rows).reshape(len(table), *index.shape)


def _pack(keep: Tensor, packed: int) -> Tensor:
    """Pack samples (N, R, K) into words (N / packed, R, K), int64, whose lowest bit is the first sample's."""
    weights = 2.0 ** torch.arange(packed, dtype=torch.float64)
    filled = pad(keep, (0, 0, 0, 0, 0, -len(keep) % packed)).view(-1, packed, keep[0].numel())
    return (weights @ filled.double()).long().view(-1, *keep.shape[1:])
