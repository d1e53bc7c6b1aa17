"""Train a timm model on small images, with or without DropCluster; the last line out is a JSON record."""

from __future__ import annotations

import math
import os
import time
import warnings
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else idle threads spin, very slow on busy cores

import pytorch_lightning as pl
import timm
import torch
import torch.nn.functional as F
from data import DataName, ImageDataModule, load
from record import parse, provenance, quiet, write_line
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from lightning_dropcluster import DropCluster
from lightning_dropcluster.visualization import plot_clusters

SCORES = ("accuracy", "nll", "ece")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that a run depends on.

    Args:
        model: any timm model name, trained from random weights.
        stem: "timm" keeps the stem; "cifar" gives a ResNet a 3x3 convolution of stride 1 without pooling.
        data: "digits" (scikit-learn's, in the package), "cifar10" or "fake" (noise, for tests).
        data_dir: CIFAR-10 as a folder with train/CLASS/*.jpg and test/CLASS/*.jpg, or a tar file of it; by
            default torchvision downloads it.
        train_samples: size of a class-balanced training subset chosen by the seed; all by default.
        augment: shift training images and mirror them where that keeps their class.
        regularizer: "none" or "dropcluster"; the options from `layers` to `num_samples` are for the latter.
        layers: pattern or list of patterns of layer names; the first convolution by default.
        drop_prob: probability that a cluster is dropped at the end of training, in [0, 1).
        cluster_size: mean number of features per cluster.
        scope: what is grouped: features within each "map", "position"s, whole "channel"s, or the "layer".
        start: fraction of training (0.25) or epoch (40) from which clusters are dropped.
        every_n_epochs: epochs between two clusterings.
        num_samples: training images seen by each clustering.
        epochs: passes over the training images, at least 1.
        batch_size: images per step, at least 1.
        lr: peak of the one-cycle learning rate, above 0.
        weight_decay: of SGD, at least 0.
        seed: of weights, batches, subset and clustering.
        out: file to which the record is appended as well.
        plot: PNG file for the clusters of the first selected layer.
        progress_bar: show Lightning's progress bar (on standard error).
    """

    model: str = "resnet18"
    stem: Literal["timm", "cifar"] = "timm"
    data: DataName = "digits"
    data_dir: str | None = None
    train_samples: int | None = None
    augment: bool = False
    regularizer: Literal["none", "dropcluster"] = "none"
    layers: str | list[str] | None = None
    drop_prob: float = 0.15
    cluster_size: int | float | None = None
    scope: Literal["map", "position", "layer", "channel"] = "map"
    start: int | float = 0.25
    every_n_epochs: int = 5
    num_samples: int = 1024
    epochs: int = 10
    batch_size: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    seed: int = 0
    out: str | None = None
    plot: str | None = None
    progress_bar: bool = True

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be above 0, got {self.lr}")
        if self.plot is not None and self.regularizer == "none":
            raise ValueError(f"plot must be None unless regularizer is 'dropcluster', got {self.plot!r}")


class Classifier(pl.LightningModule):
    """Cross entropy, SGD with Nesterov momentum, one learning-rate cycle; scores on the test split."""

    def __init__(self, model: nn.Module, num_classes: int, lr: float, weight_decay: float) -> None:
        super().__init__()
        self.model, self.lr, self.weight_decay = model, lr, weight_decay
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.ece = MulticlassCalibrationError(num_classes, n_bins=15, norm="l1")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self.model(images)
        for metric in (self.accuracy, self.ece):
            metric.update(logits.softmax(1), labels)
        self.log_dict({"accuracy": self.accuracy, "ece": self.ece}, on_epoch=True)
        self.log("nll", F.cross_entropy(logits, labels), on_epoch=True, batch_size=len(labels))

    def configure_optimizers(self) -> Any:
        sgd = torch.optim.SGD(
            self.parameters(), self.lr, momentum=0.9, nesterov=True, weight_decay=self.weight_decay
        )
        steps = int(self.trainer.estimated_stepping_batches)
        cycle = torch.optim.lr_scheduler.OneCycleLR(sgd, self.lr, total_steps=steps, cycle_momentum=False)
        return {"optimizer": sgd, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


def run(settings: Settings) -> dict[str, Any]:
    """Train once, look at the test split once, and describe the run.

    Args:
        settings: everything that the run depends on.

    Returns:
        The record: accuracy, nll, ece, seconds, recluster_seconds, versions, commit, device and arguments. Of
        paths only the last part is kept.

    Raises:
        FileNotFoundError: if there are no images in `data_dir`.
        ValueError: if a setting is out of range.
    """
    with quiet():
        pl.seed_everything(settings.seed, workers=True, verbose=False)
        batches = build_batches(settings)
        num_classes = len(batches.data.classes)
        model = build_model(settings.model, settings.stem, num_classes)
        callback = build_callback(settings, model)
        classifier = Classifier(model, num_classes, settings.lr, settings.weight_decay)
        trainer = build_trainer(settings, callback)
        started = time.perf_counter()
        trainer.fit(classifier, datamodule=batches)
        seconds = time.perf_counter() - started
        scores = trainer.test(classifier, datamodule=batches, verbose=False)[0]
    if settings.plot and callback:
        save_plot(callback, settings)
    return {
        **{name: round(scores[name], 6) if math.isfinite(scores[name]) else None for name in SCORES},
        "seconds": round(seconds, 3),
        "recluster_seconds": round(callback.recluster_seconds, 3) if callback else 0.0,
        **provenance(),
        "arguments": arguments(settings),
    }


def build_batches(settings: Settings) -> ImageDataModule:
    """Load the images that the settings describe."""
    data = load(
        settings.data,
        data_dir=settings.data_dir,
        train_samples=settings.train_samples,
        seed=settings.seed,
    )
    return ImageDataModule(data, settings.batch_size, seed=settings.seed, augment=settings.augment)


def build_model(name: str, stem: str, num_classes: int) -> nn.Module:
    """Create a timm model with random weights, on request with the small-image stem of ResNets.

    Raises:
        ValueError: if timm does not know the model, or it has no ResNet stem to replace.
    """
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(f"model must be a name that timm knows, got {name!r}; nearest: {', '.join(near)}")
    model = timm.create_model(name, pretrained=False, num_classes=num_classes)
    if stem == "cifar":
        stems = [m for m in getattr(model, "conv1", nn.Identity()).modules() if isinstance(m, nn.Conv2d)]
        if not stems or not hasattr(model, "maxpool"):
            raise ValueError(f"stem='cifar' needs a ResNet with conv1 and maxpool, got model={name!r}")
        model.conv1 = nn.Conv2d(3, stems[-1].out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    return model


def build_callback(settings: Settings, model: nn.Module) -> DropCluster | None:
    """Make the callback that the settings describe, by default on the model's first convolution."""
    if settings.regularizer == "none":
        return None
    first = next((name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)), "**")
    return DropCluster(
        f"model.{first}" if settings.layers is None else settings.layers,
        settings.drop_prob,
        cluster_size=settings.cluster_size,
        scope=settings.scope,
        start=settings.start,
        every_n_epochs=settings.every_n_epochs,
        num_samples=settings.num_samples,
        seed=settings.seed,
    )


def build_trainer(settings: Settings, callback: pl.Callback | None) -> pl.Trainer:
    """One device, and nothing written to disk."""
    return pl.Trainer(
        max_epochs=settings.epochs,
        devices=1,
        callbacks=[] if callback is None else [callback],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=settings.progress_bar,
    )


def save_plot(callback: DropCluster, settings: Settings) -> None:
    """Write the clusters of the first selected layer as a PNG, or warn that there are none yet."""
    if not callback.labels:
        warnings.warn(
            f"no plot, since training ended before num_samples={settings.num_samples} samples were seen and "
            "clustered: lower num_samples or start, or raise epochs",
            stacklevel=2,
        )
        return
    name, labels = next(iter(callback.labels.items()))
    path = Path(str(settings.plot))
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_clusters(labels, title=f"{name} of {settings.model} after {settings.epochs} epochs").savefig(path)


def arguments(settings: Settings) -> dict[str, Any]:
    """List the settings with paths cut to their last part, so that no record names a place on a machine."""
    listed = asdict(settings)
    for name in ("data_dir", "out", "plot"):
        listed[name] = None if listed[name] is None else Path(listed[name]).name
    return listed


if __name__ == "__main__":
    settings = parse(Settings, __doc__)
    write_line(run(settings), settings.out)
