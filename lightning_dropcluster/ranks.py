"""Ranks: the few collectives that reclustering needs, each the identity without a process group; warnings.

Every rank must call a collective, with a tensor of the same shape and type.
"""

import warnings

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Return this process's rank, 0 without a process group."""
    return dist.get_rank() if _is_distributed() else 0


def world_size() -> int:
    """Return the number of processes, 1 without a process group."""
    return dist.get_world_size() if _is_distributed() else 1


def draw_shift() -> float:
    """Return what this rank adds to its draws, see `draw_uniform`, as ranks may be seeded alike."""
    return 0.618 * rank() % 1.0


def warn(message: str, source: str = "DropCluster") -> None:
    """Warn on the first rank alone, since all ranks would say the same."""
    if rank() == 0:
        warnings.warn(f"{source}: {message}", stacklevel=3)


def sum_over_ranks(value: Tensor) -> Tensor:
    """Add up a tensor over all ranks, in place."""
    if _is_distributed():
        dist.all_reduce(value)
    return value


def average_over_ranks(value: Tensor) -> Tensor:
    """Average a floating-point tensor over all ranks, in place."""
    return sum_over_ranks(value).div_(world_size()) if _is_distributed() else value


def from_rank(value: Tensor, source: int) -> Tensor:
    """Overwrite a tensor with another rank's."""
    if _is_distributed():
        dist.broadcast(value, source)
    return value


def any_rank(value: bool, device: torch.device) -> bool:
    """Whether something holds on at least one rank; every rank must ask."""
    return bool(sum_over_ranks(torch.tensor(int(value), device=device)))


def raise_together(error: BaseException | None, device: torch.device) -> None:
    """Raise on every rank where any rank failed, so that none waits for the others for ever."""
    failed = torch.zeros(world_size(), device=device)
    failed[rank()] = float(error is not None)
    culprits = sum_over_ranks(failed).nonzero().flatten().tolist()
    if error is not None:
        raise error
    if culprits:
        raise RuntimeError(f"failed on rank {', '.join(map(str, culprits))}: see the error there")


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
