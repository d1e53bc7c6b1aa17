"""Ramps: what share of drop_prob a moment of training uses, and when something is due."""

import math
from collections.abc import Callable

Ramp = Callable[[float], float]
"""From the part of the ramp that has passed to the part of drop_prob in use, both in [0, 1]."""


def linear(fraction: float) -> float:
    """Rise from 0 to 1 in a straight line: the paper's ramp.

    Example:
        >>> linear(0.25)
        0.25
    """
    return fraction


def cosine(fraction: float) -> float:
    """Rise from 0 to 1 by half a cosine wave, flat at both ends.

    Example:
        >>> round(cosine(0.5), 6)
        0.5
    """
    return (1.0 - math.cos(math.pi * fraction)) / 2.0


def constant(fraction: float) -> float:
    """Be 1 from the first step on.

    Example:
        >>> constant(0.0)
        1.0
    """
    return 1.0


RAMPS: dict[str, Ramp] = {"linear": linear, "cosine": cosine, "constant": constant}


def make_ramp(schedule: str | Ramp | None, drop_prob: object = None) -> Ramp:
    """Return the function of a name, or check the function given; ``None`` is for the usual ramp."""
    if schedule is None:  # a drop probability that follows a loss needs none
        schedule = "constant" if drop_prob == "auto" else "linear"
    if isinstance(schedule, str):
        if schedule not in RAMPS:
            raise ValueError(f"schedule={schedule!r}: must be a callable or one of {', '.join(RAMPS)}")
        return RAMPS[schedule]
    if not callable(schedule):
        raise TypeError(f"schedule={schedule!r}: give a name or a callable, not {type(schedule).__name__}")
    for fraction in (step / 100 for step in range(101)):
        try:
            value = schedule(fraction)
        except Exception as error:
            raise ValueError(f"schedule={schedule!r}: calling it with {fraction} failed: {error}") from error
        if not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
            raise ValueError(
                f"schedule={schedule!r}: must map [0, 1] to [0, 1], but {fraction} gave {value!r}"
            )
    return schedule


def stretched(ramp: Ramp, start: float) -> Ramp:
    """Stretch a ramp over the rest of training.

    Example:
        >>> [stretched(linear, 0.5)(fraction) for fraction in (0.25, 0.5, 0.75, 1.0)]
        [0.0, 0.0, 0.5, 1.0]
    """
    length = 1.0 - start

    def value(fraction: float) -> float:
        if fraction < start:
            return 0.0
        passed = (fraction - start) / length if length > 0.0 else 1.0
        return ramp(min(1.0, max(0.0, passed)))

    return value


def intervals_passed(position: int, origin: int, every: int) -> int:
    """Count the due moments up to now: ``origin`` is the first, then one every ``every``.

    Example:
        >>> [intervals_passed(step, 2, 3) for step in range(9)]
        [0, 0, 1, 1, 1, 2, 2, 2, 3]
    """
    if position < origin:
        return 0
    return 1 if every == 0 else 1 + (position - origin) // every
