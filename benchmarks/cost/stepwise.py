"""Follow the clusters of a network in training: few large windows against many small ones with a memory."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean
from typing import Any

import pytorch_lightning as pl
import torch
from jsonargparse import auto_cli
from torch import Tensor

from benchmarks.common.data import DataName, ImageDataModule, load
from benchmarks.common.inertia import inertia
from benchmarks.common.models import build_model
from benchmarks.common.record import provenance, quiet, write_line
from benchmarks.cost.activations import BATCH, exact_profiles, look
from benchmarks.gain.settings import Settings as TrainSettings
from benchmarks.gain.train import Classifier, build_trainer
from lightning_dropcluster import DropCluster, FaissKMeans
from lightning_dropcluster.clustering import adjusted_rand_index


@dataclass(frozen=True)
class Settings:
    """What to train and how to follow it.

    Args:
        model: a ResNet that timm knows, or small_resnet.
        data: what it is trained on.
        data_dir: CIFAR-10 as a folder with train/CLASS/*.jpg and test/CLASS/*.jpg, or a tar file of it.
        train_samples: training images.
        epochs: of training; clusters are weighed after each of the second half.
        layer: whose features are clustered.
        samples: of a large window, one an epoch, and of those that the clusters are weighed on.
        small_samples: of a small window.
        steps: between small windows.
        out: file to which the records are appended as well.
    """

    model: str = "small_resnet"
    data: DataName = "digits"
    data_dir: str | None = None
    train_samples: int = 1280
    epochs: int = 8
    layer: str = "conv1"
    samples: int = 1024
    small_samples: int = 64
    steps: int = 4
    out: str | None = None


class Weigh(pl.Callback):
    """Count a callback's reclusterings, and weigh its labels on exact profiles after each late epoch."""

    def __init__(self, watched: DropCluster, images: Tensor, layer: str) -> None:
        self.watched, self.images, self.layer = watched, images, layer
        self.ratios: list[float] = []
        self.agreements: list[float] = []
        self.updates, self._seconds = 0, 0.0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.watched.recluster_seconds > self._seconds:
            self.updates, self._seconds = self.updates + 1, self.watched.recluster_seconds

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if 2 * (trainer.current_epoch + 1) <= (trainer.max_epochs or 0):
            return
        model = pl_module.model
        assert isinstance(model, torch.nn.Module)
        profiles = exact_profiles(look(model.eval(), self.images)[self.layer])
        labels = self.watched.labels[f"model.{self.layer}"].flatten(1)
        count, grid = int(labels.max()) + 1, (int(labels.shape[1] ** 0.5),) * 2
        reference = FaissKMeans(max_iter=25, tolerance=0.0).fit(profiles, count, grid=grid)
        self.ratios.append(float(inertia(profiles, labels).sum() / inertia(profiles, reference).sum()))
        self.agreements.append(adjusted_rand_index(labels, reference))
        model.train()


def follow(settings: Settings, case: str, options: dict[str, Any]) -> dict[str, Any]:
    """Train with the clusters learned in one way; nothing is dropped, so the network is the same in all."""
    pl.seed_everything(0, verbose=False)
    images = load(settings.data, data_dir=settings.data_dir, train_samples=settings.train_samples)
    module = ImageDataModule(images, BATCH)
    shown = torch.cat([x for x, _ in module.train_dataloader()])[: settings.samples]
    callback = DropCluster(settings.layer, 0.0, start=0, **options)
    weigh = Weigh(callback, shown, settings.layer)
    training = TrainSettings(epochs=settings.epochs, progress_bar=False)
    trainer = build_trainer(training, callback, weigh, accelerator="cpu")
    network = build_model(settings.model, "cifar", len(images.classes))
    trainer.fit(Classifier(network, lr=0.05, weight_decay=0.0), datamodule=module)
    return {
        "case": case,
        "updates": weigh.updates,
        "samples_gathered": weigh.updates * options["num_samples"],
        "recluster_s": round(callback.recluster_seconds, 3),
        "inertia_ratio": round(mean(weigh.ratios), 4),
        "agreement": round(mean(weigh.agreements), 4),
    }


def main(settings: Settings) -> None:
    """Write a line for each way of learning.

    Inertia is that on exact profiles, divided by that of a cold k-means on those very profiles, the
    reference; agreement is the adjusted Rand index with the reference.
    """
    small = {"every_n_train_steps": settings.steps, "num_samples": settings.small_samples}
    cases = {"large": {"every_n_epochs": 1, "num_samples": settings.samples}}
    cases |= {f"small, momentum {m}": small | {"sketch_momentum": m} for m in (0.0, 0.5, 0.8, 0.9, 0.95)}
    for case, options in cases.items():
        with quiet():
            record = follow(settings, case, options)
        about = {"model": settings.model, "data": settings.data, "layer": settings.layer}
        write_line(
            {"benchmark": "stepwise", **about, **record, **provenance(torch.device("cpu"))}, settings.out
        )


if __name__ == "__main__":
    main(auto_cli(Settings, as_positional=False))
