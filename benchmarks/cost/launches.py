"""How many kernels dropping starts in a layer and step, on tensors that only pretend to be on a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from jsonargparse import auto_cli
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common.record import provenance, write_line
from lightning_dropcluster import ClusterDrop
from lightning_dropcluster.methods.dropping import triton_ops

LAYOUTS = (torch.contiguous_format, torch.channels_last)
WITHOUT_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "device")
CASES: tuple[dict[str, Any], ...] = (
    {},
    {"fill": "mean"},
    {"fill": "mean", "per_map": False},
    {"rescale": "expected"},
    {"per_sample": False},
)


class Launches(TorchDispatchMode):
    """Counts operations that start a kernel: all but views and fresh memory. Our own are looked into."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace == "lightning_dropcluster":
            with self, self._kernels_counted():
                getattr(triton_ops, name)._init_fn(*args)
        elif name not in WITHOUT_KERNEL and not func.is_view and not _is_input(out, args):
            self.names[name] += 1
        return out

    @contextmanager
    def _kernels_counted(self) -> Iterator[None]:
        with patch.object(triton_ops, "wrap_triton", lambda kernel: _Grid(self.names, kernel.__name__)):
            yield


class _Grid:
    """Stands in for a kernel: ``kernel[grid](...)`` counts one."""

    def __init__(self, names: Counter[str], name: str) -> None:
        self.names, self.name = names, name

    def __getitem__(self, grid: Any) -> Any:
        return self

    def __call__(self, *args: Any, **options: Any) -> None:
        self.names[self.name] += 1


def _is_input(out: Any, args: Any) -> bool:
    """Whether nothing was made, as where a type is what it must be already."""
    return isinstance(out, Tensor) and any(out is arg for arg in tree_leaves(args))


def count(layout: torch.memory_format, **options: Any) -> dict[str, int]:
    """Count the kernels of `ClusterDrop`, forward and backward."""
    drop = ClusterDrop(torch.arange(8 * 64).reshape(8, 8, 8) % 4, **options)
    with FakeTensorMode(), Launches() as launches:
        drop._buffers = {
            name: torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
            for name, buffer in drop.named_buffers()
        }
        launches.names.clear()
        x = torch.empty(64, 8, 8, 8, dtype=torch.bfloat16, device="cuda", memory_format=layout)
        out = drop(x.requires_grad_())
        assert out.grad_fn is not None
        # The engine of autograd looks for a GPU, its node does not.
        out.grad_fn.apply(torch.empty_like(out.detach()))  # pyright: ignore[reportAttributeAccessIssue]
    return dict(launches.names)


def main(out: str | None = None) -> None:
    """Write a line for each memory format and way of dropping.

    Args:
        out: file to which the records are appended as well.
    """
    for layout in LAYOUTS:
        for options in CASES:
            found = count(layout, **options)
            what = {"memory_format": str(layout).removeprefix("torch."), **options}
            record = {"benchmark": "launches", **what, "launches": sum(found.values()), "kernels": found}
            write_line({**record, **provenance(torch.device("cpu"))}, out)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
