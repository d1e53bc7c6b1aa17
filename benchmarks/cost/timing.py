"""The clock of benchmarks: it waits for the device that works."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

R = TypeVar("R")


class Took(NamedTuple):
    """How long a piece of work took: seconds that passed, and processor seconds of all threads together.

    Other work on the machine stretches the former alone.
    """

    seconds: float
    cpu_seconds: float


def usual_device() -> torch.device:
    """Return the GPU where there is one, and the CPU elsewhere."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def clock(work: Callable[[], R], device: torch.device) -> tuple[R, Took]:
    """Run something and time it, from when the device has nothing else to do until it is done.

    Args:
        work: what to run.
        device: whose work is waited for.

    Returns:
        What it returned, and how long it took.
    """
    _wait_for(device)
    started, processor = time.perf_counter(), time.process_time()
    result = work()
    _wait_for(device)
    return result, Took(time.perf_counter() - started, time.process_time() - processor)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
