"""Memory: what it means to be out of it, and how much there is."""

import math
from pathlib import Path

import torch

_PHRASES = ("out of memory", "bad_alloc", "can't allocate memory", "not enough memory", "status_alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Torch and Python have types for it; FAISS and torch's allocator of the CPU have words alone."""
    words = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(said in words for said in _PHRASES)


def check_available(num_bytes: int, device: torch.device) -> None:
    """Raise where so much cannot be allocated there, as far as anyone tells."""
    available = available_bytes(device)
    if num_bytes > available:
        raise MemoryError(f"{available:,.0f} bytes are free")


def make_room_beside_torch(num_bytes: int, device: torch.device) -> None:
    """Raise where no one but torch can allocate so much on a GPU, not even once torch's cache is empty."""
    if torch.cuda.mem_get_info(device)[0] < num_bytes:
        torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    if free < num_bytes:
        raise MemoryError(f"{num_bytes:,} bytes are needed beside torch's, but {free:,} are free")


def available_bytes(device: torch.device) -> float:
    """Return what can still be allocated there, infinity where nobody tells."""
    if device.type == "cpu":
        return min(_free_on_host(), _limit_of_container())
    if device.type != "cuda":
        return math.inf
    try:
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    except RuntimeError:  # an allocator of the user's own does not count
        return math.inf


def _free_on_host() -> float:
    """Linux hands out memory that is not there, and kills the process that then uses it."""
    lines = _read("/proc/meminfo").splitlines()
    free = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024.0 * int(free[0]) if free else math.inf


def _limit_of_container() -> float:
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return float(limit) if limit.isdigit() else math.inf


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
