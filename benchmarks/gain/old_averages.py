"""BatchNorm's running averages as training moves them where nothing keeps them clean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_dropcluster.layers.norm_statistics import is_clean_step

NAMES = ("running_mean", "running_var")


class OldAverages(pl.Callback):
    """Follows running averages through the steps that are not clean, whatever is done to the real ones.

    One training can then be scored with both. Clean steps do not count: without `clean_statistics` there
    would be none, and the last steps alone, all of them clean, would mend most of these averages too.
    """

    def __init__(self) -> None:
        self._old: dict[nn.Module, list[Tensor]] = {}
        self._counts = True

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        norms = [module for module in pl_module.modules() if isinstance(module, _BatchNorm)]
        self._old = {norm: [average.clone() for average in _averages(norm)] for norm in norms}
        self._handles = [handle for norm in norms for handle in self._hook(norm)]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        left = trainer.estimated_stepping_batches - trainer.global_step
        self._counts = not is_clean_step(trainer.global_step, left)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, norm: _BatchNorm) -> list[Any]:
        before: list[Tensor] = []

        def note(module: nn.Module, inputs: Any) -> None:
            before[:] = [average.clone() for average in _averages(norm)]

        def follow(module: nn.Module, inputs: Any, output: Tensor) -> None:
            """Move by what the batch adds: the average after it less what stays of the one before."""
            if norm.training and self._counts:
                kept = 1 - (norm.momentum or 0.0)
                for old, was, now in zip(self._old[norm], before, _averages(norm), strict=True):
                    old.mul_(kept).add_(now - kept * was)

        return [norm.register_forward_pre_hook(note), norm.register_forward_hook(follow)]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Score with the old averages; the real ones come back afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for norm, others in self._old.items():
            for real, other in zip(_averages(norm), others, strict=True):
                kept = real.clone()
                real.copy_(other)
                other.copy_(kept)


def _averages(norm: nn.Module) -> list[Tensor]:
    return [getattr(norm, name) for name in NAMES]
