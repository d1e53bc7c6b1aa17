"""Functions run in processes of their own: ranks that train together, and victims to kill."""

import hashlib
import multiprocessing
import os
import socket
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import pytorch_lightning as pl
import torch
from fits import Classifier, make_trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_dropcluster import DropCluster
from lightning_dropcluster.layers.hooks import LayerHook

# Forked from a server that has imported the slow modules and started no thread.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["lightning_dropcluster.callbacks", "timm"])


def run_ranks(
    act: Callable[..., Any], world_size: int, folder: Path, *args: Any, timeout: float = 120.0
) -> list[Any]:
    """Call ``act(*args)`` in processes that Lightning takes for the ranks of one group, as torchrun's are.

    Args:
        act: a function of a module; it returns tensors and plain values.
        world_size: number of processes.
        folder: for the results.
        args: for the function.
        timeout: seconds until all are killed.

    Returns:
        What each rank returned.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    groups = [
        {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
        for rank in range(world_size)
    ]
    paths = [folder / f"rank{rank}.pt" for rank in range(world_size)]
    processes = [
        start(act, path, *args, environment=group) for path, group in zip(paths, groups, strict=True)
    ]
    finish(processes, timeout)
    return [read(path) for path in paths]


def start(act: Callable[..., Any], path: Path, *args: Any, environment: dict[str, str] | None = None) -> Any:
    """Start a process; `read` its result from the path once it has ended."""
    path.unlink(missing_ok=True)
    process = _FORKS.Process(target=_work, args=(act, path, environment or {}, args), daemon=True)
    process.start()
    return process


def finish(processes: list[Any], timeout: float = 120.0) -> list[int]:
    """Wait for processes, kill them when it takes too long, and return their exit codes."""
    deadline = monotonic() + timeout
    for process in processes:
        process.join(max(0.0, deadline - monotonic()))
    late = [index for index, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    assert not late, f"processes {late} of {len(processes)} did not end in {timeout} s"
    return [process.exitcode for process in processes]


def read(path: Path) -> Any:
    """Return what a process returned."""
    outcome = torch.load(path, weights_only=True)
    assert "result" in outcome, outcome["error"]
    return outcome["result"]


def _work(act: Callable[..., Any], path: Path, environment: dict[str, str], args: tuple) -> None:
    os.environ.update(environment, OMP_WAIT_POLICY="PASSIVE")
    torch.set_num_threads(1)
    try:
        outcome = {"result": act(*args)}
    except BaseException:
        outcome = {"error": traceback.format_exc()}
    torch.save(outcome, path)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Diary(pl.Callback):
    """Note after every batch what a DropCluster holds; stand behind it in the Trainer's list."""

    def __init__(self, callback: DropCluster) -> None:
        self.callback = callback
        self.days: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        layers = self.callback._layers
        self.days.append(
            {
                "step": trainer.global_step,
                "labels": digest(self.callback.labels),
                "drop_prob": self.callback.drop_prob_now,
                "opened": layers.windows_opened,
                "is_open": layers.window is not None,
            }
        )

    def column(self, name: str) -> list[Any]:
        return [day[name] for day in self.days]


def fit(
    callback: DropCluster,
    module: Classifier,
    loader: Any,
    *others: pl.Callback,
    ckpt_path: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Fit and tell all: the diary, the weights, the warnings, and the error if there was one."""
    diary = Diary(callback)
    trainer = make_trainer(callback, diary, *others, **options)
    error = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit(module, loader, ckpt_path=ckpt_path)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
    return {
        "days": diary.days,
        "labels": callback.labels,
        "weights": digest(dict(module.named_parameters())),
        "buffers": digest(dict(module.named_buffers())),
        "warnings": [str(w.message) for w in caught if "DropCluster" in str(w.message)],
        "error": error,
        "hooks": sum(
            isinstance(hook, LayerHook) for m in module.modules() for hook in m._forward_hooks.values()
        ),
    }


def digest(value: Any) -> str:
    """Hash nested tensors and plain values, to the last bit."""
    mill = hashlib.sha256()
    _grind(value, mill)
    return mill.hexdigest()[:16]


def _grind(value: Any, mill: Any) -> None:
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if isinstance(value, Tensor):
        mill.update(
            f"{value.dtype}{tuple(value.shape)}".encode()
            + value.detach().cpu().contiguous().numpy().tobytes()
        )
    elif isinstance(value, dict):
        for key in value:
            mill.update(str(key).encode())
            _grind(value[key], mill)
    else:
        mill.update(repr(value).encode())
