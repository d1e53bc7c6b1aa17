"""Means over seeds with 95 % intervals, and differences between methods paired by seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A mean of `count` values and its interval; without a width for a single value."""

    mean: float
    low: float
    high: float
    count: int


def estimate(values: list[float], level: float = 0.95) -> Estimate:
    """Average values that are taken to be normal.

    Args:
        values: at least one.
        level: of confidence, in (0, 1).

    Returns:
        The mean with Student's interval.
    """
    mean, count = float(np.mean(values)), len(values)
    if count == 1:
        return Estimate(mean, mean, mean, count)
    reach = float(stats.t.ppf((1 + level) / 2, count - 1) * stats.sem(values))
    return Estimate(mean, mean - reach, mean + reach, count)


def difference(of: Mapping[int, float], less: Mapping[int, float], level: float = 0.95) -> Estimate | None:
    """Average the differences over the seeds that both have; None where there are none.

    Args:
        of: seed to value.
        less: seed to the value to subtract.
        level: of confidence, in (0, 1).

    Returns:
        The mean difference with Student's interval for pairs.
    """
    common = sorted(of.keys() & less.keys())
    return estimate([of[seed] - less[seed] for seed in common], level) if common else None
