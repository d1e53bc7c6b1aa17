"""How long training stands still for reclustering, with and without a thread in the background."""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from benchmarks.common.data import ImageDataModule, load
from benchmarks.common.models import build_model
from benchmarks.common.record import quiet
from benchmarks.gain.settings import Settings
from benchmarks.gain.train import Classifier, build_trainer
from lightning_dropcluster import DropCluster

LAYERS = ["conv1", "layer1.*.conv*"]
OVERLAPS = (0, 4)


class Watch(pl.Callback):
    """Note the seconds between the ends of training steps; stand behind the callback that is watched."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.ends, self.ends[1:], strict=False)]


def fit(
    name: str, overlap_steps: int, epochs: int, train_samples: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train a small ResNet with a reclustering in every epoch, on a GPU where there is one.

    Returns:
        Its labels and what was measured.
    """
    pl.seed_everything(0, verbose=False)
    callback = DropCluster(
        LAYERS,
        start=0,
        every_n_epochs=1,
        num_samples=train_samples // 2,
        overlap_steps=overlap_steps,
    )
    watch = Watch()
    trainer = build_trainer(Settings(epochs=epochs, progress_bar=False), callback, watch)
    model = Classifier(build_model(name, "cifar", 10), 10, lr=0.05, weight_decay=0.0)
    started = time.perf_counter()
    trainer.fit(model, datamodule=ImageDataModule(load("digits", train_samples=train_samples), 64))
    return callback.labels, {
        "reclusterings": epochs,
        "stall_s": round(callback.recluster_seconds / epochs, 4),
        "median_step_s": round(median(watch.seconds), 4),
        "longest_step_s": round(max(watch.seconds), 4),
        "fit_s": round(time.perf_counter() - started, 2),
    }


def stall_records(name: str, train_samples: int, *, epochs: int) -> Iterator[dict[str, Any]]:
    """Fit twice for each setting, to see that the labels come out the same."""
    for overlap_steps in OVERLAPS:
        with quiet():
            first, _ = fit(name, overlap_steps, epochs, train_samples)
            second, measured = fit(name, overlap_steps, epochs, train_samples)
        yield {
            "benchmark": "stall",
            "model": name,
            "layers": LAYERS,
            "case": f"overlap_steps={overlap_steps}",
            **measured,
            "repeats_alike": all(torch.equal(first[layer], second[layer]) for layer in first),
        }
