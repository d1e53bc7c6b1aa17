"""The memory that a piece of work adds at its peak, measured or counted."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


class LiveMemory(TorchDispatchMode):
    """Counts the bytes that operations bring into being, now and at the peak: of pretended tensors too.

    What an operation holds for itself while it runs is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = self._storages(out).items() - self._storages((args, kwargs)).items()
        alive = [*self._alive.items(), *made]
        self._alive = {reference: size for reference, size in alive if not reference.expired()}
        self.peak = max(self.peak, sum(self._alive.values()))
        return out

    def _storages(self, tree: Any) -> dict[StorageWeakRef, int]:
        storages = [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor)]
        return {StorageWeakRef(storage): storage.nbytes() for storage in storages}


def _kilobytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{_STATUS} has no field {field}")
    return int(found[1])
