"""The memory that a piece of work adds at its peak."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def added_memory(work: Callable[[], Any], device: torch.device) -> int | None:
    """Run something and return the bytes by which memory in use grew at the peak.

    On a GPU torch's allocator is asked, on Linux the kernel. Freed memory that the process still holds hides
    allocations, so the number is a lower bound there. On a GPU nothing is seen of the host's memory, nor of
    what FAISS takes for itself (128 MiB for `FaissKMeans`).

    Args:
        work: what to run.
        device: whose memory is meant.

    Returns:
        Bytes; ``None`` where nobody counts.
    """
    if device.type == "cuda":
        return added_gpu_memory(work)
    if not _RESET.exists():
        work()
        return None
    _RESET.write_text("5")  # the peak starts again from what is resident now
    before = _kilobytes("VmRSS")
    work()
    return 1024 * (_kilobytes("VmHWM") - before)


def added_gpu_memory(work: Callable[[], Any]) -> int:
    """Run something and return the bytes by which what torch holds on the GPU grew at the peak."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


def _kilobytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{_STATUS} has no field {field}")
    return int(found[1])
