"""bfloat16 on processors that have no instructions for it, at the speed of float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_PRODUCTS = (F.conv1d, F.conv2d, F.conv3d, F.linear)


@contextmanager
def rounded_bfloat16(precision: str) -> Iterator[bool]:
    """Do the sums of products of "bf16-mixed" in float32 where a CPU would take thirty times as long.

    Instructions for bfloat16 multiply rounded numbers, add up in float32 and round what they return; so does
    this, forward and backward, and differs from them in the order of its sums alone.

    Args:
        precision: of the training, in Lightning's words; nothing changes but for "bf16-mixed".

    Yields:
        Whether sums are done so.
    """
    needed = precision == "bf16-mixed" and not (torch.accelerator.is_available() or _has_bfloat16())
    if not needed:
        yield False
        return
    with _Rounded():
        yield True


class _Rounded(TorchFunctionMode):
    """Where autocast is on, products of tensors are computed in float32, from and to bfloat16."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func not in _PRODUCTS or not torch.is_autocast_enabled("cpu"):
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            rounded = [_round(value) for value in args]
            named = {name: _round(value) for name, value in (kwargs or {}).items()}
            return func(*rounded, **named).bfloat16()


def _round(value: Any) -> Any:
    return value.bfloat16().float() if isinstance(value, Tensor) else value


def _has_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
