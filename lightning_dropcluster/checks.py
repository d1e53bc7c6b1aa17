"""Checks of what users pass in; each error names the argument, the value and the rule."""

import math
from collections.abc import Collection
from typing import Any


def check_number(
    name: str,
    value: Any,
    low: float,
    high: float = math.inf,
    *,
    integer: bool = False,
    high_open: bool = False,
    low_open: bool = False,
) -> None:
    """Check that a value is a number in a range.

    Args:
        name: of the argument.
        value: what was given.
        low: smallest value allowed.
        high: largest value allowed.
        integer: whether it must be an integer.
        high_open: whether ``high`` itself is not allowed.
        low_open: whether ``low`` itself is not allowed.

    Raises:
        TypeError: where the value is no number of the kind wanted.
        ValueError: where it is NaN or out of the range.

    Example:
        >>> check_number("drop_prob", 1.0, 0, 1, high_open=True)
        Traceback (most recent call last):
        ValueError: drop_prob=1.0: must be a number in [0, 1)
    """
    kind = "an integer" if integer else "a number"
    if math.isinf(high):
        rule = f"must be {kind} {'above' if low_open else 'of at least'} {low}"
    else:
        rule = f"must be {kind} in {'(' if low_open else '['}{low}, {high}{')' if high_open else ']'}"
    if isinstance(value, bool) or not isinstance(value, int if integer else int | float):
        raise TypeError(f"{name}={value!r}: {rule}, not {type(value).__name__}")
    above = value > low if low_open else value >= low
    below = value < high if high_open else value <= high
    if not (above and below and math.isfinite(value)):
        raise ValueError(f"{name}={value!r}: {rule}")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Check that a value is one of the names allowed.

    Args:
        name: of the argument.
        value: what was given.
        choices: what may be given.

    Raises:
        ValueError: where it is none of them.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(choices)}")


def check_bool(name: str, value: Any) -> None:
    """Check that a value is True or False.

    Args:
        name: of the argument.
        value: what was given.

    Raises:
        TypeError: where it is neither.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: must be True or False, not {type(value).__name__}")


def check_not_both(first: str, first_value: Any, second: str, second_value: Any) -> None:
    """Check that of two arguments at most one is given.

    Args:
        first: name of the one.
        first_value: its value, ``None`` where it is not given.
        second: name of the other.
        second_value: its value.

    Raises:
        ValueError: where both are given.
    """
    if first_value is not None and second_value is not None:
        raise ValueError(
            f"{first}={first_value!r} and {second}={second_value!r}: give one of the two, not both"
        )
