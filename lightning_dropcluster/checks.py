"""Checks of what users pass in; each error names the argument, the value and the rule."""

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any, Literal, overload

import torch
from torch import Tensor

MAX_INT = 2**31 - 1
"""The largest seed and count that FAISS takes: C's int."""

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@overload
def check_number(name: str, value: Any, low: float, high: float = ..., *, integer: Literal[True]) -> int: ...
@overload
def check_number(name: str, value: Any, low: float, high: float = ..., *, high_open: bool = ...) -> float: ...
def check_number(
    name: str,
    value: Any,
    low: float,
    high: float = math.inf,
    *,
    integer: bool = False,
    high_open: bool = False,
) -> float:
    """Check that a value is a number in a range, and return it as Python's own.

    Example:
        >>> check_number("drop_prob", 1.0, 0, 1, high_open=True)
        Traceback (most recent call last):
        ValueError: drop_prob=1.0: must be a number in [0, 1)
    """
    kind = "an integer" if integer else "a number"
    if math.isinf(high):
        rule = f"must be {kind} of at least {low}"
    else:
        rule = f"must be {kind} in [{low}, {high}{')' if high_open else ']'}"
    if isinstance(value, bool) or not isinstance(value, Integral if integer else Real):
        raise TypeError(f"{name}={value!r}: {rule}, not {type(value).__name__}")
    is_integer = isinstance(value, Integral)
    number = int(value) if is_integer else float(value)
    below = number < high if high_open else number <= high
    if not (number >= low and below and (is_integer or math.isfinite(number))):
        raise ValueError(f"{name}={value!r}: {rule}")
    return number


def check_integers(name: str, value: Any) -> None:
    """Check that a value is a tensor of integers, of a type that torch can compare and index by."""
    if not isinstance(value, Tensor) or value.dtype not in _INTEGERS:
        raise TypeError(f"{name}: must be an integer tensor, not {describe(value)}")


def describe(value: Any) -> str:
    """Tell in an error what was given.

    Example:
        >>> describe(torch.zeros(3))
        'a torch.float32 tensor'
    """
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else f"{value!r}"[:80]


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Check that a value is one of the names allowed."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(choices)}")


def check_text(name: str, value: Any) -> None:
    """Check that a value is a string with something in it."""
    if not isinstance(value, str):
        raise TypeError(f"{name}={describe(value)}: must be a string, not {type(value).__name__}")
    if not value:
        raise ValueError(f"{name}={value!r}: must not be empty")


def check_bool(name: str, value: Any) -> None:
    """Check that a value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: must be True or False, not {type(value).__name__}")


def check_channel_dim(channel_dim: Any) -> int:
    """Return 1 or -1; anything else is an error."""
    if type(channel_dim) is not int or channel_dim not in (1, -1):
        raise ValueError(f"channel_dim={channel_dim!r}: must be 1 or -1")
    return channel_dim


def check_not_both(first: str, first_value: Any, second: str, second_value: Any) -> None:
    """Check that of two arguments at most one is given."""
    if first_value is not None and second_value is not None:
        raise ValueError(
            f"{first}={first_value!r} and {second}={second_value!r}: give one of the two, not both"
        )
