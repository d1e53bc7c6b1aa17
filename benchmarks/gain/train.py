"""Train a model on images, with or without a regulariser; the last line out is a JSON record."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch import Tensor, nn

from benchmarks.common.data import ImageDataModule, ValidatedDataModule, load
from benchmarks.common.models import OWN_RATES, build_model, trained_moments
from benchmarks.common.record import provenance, quiet, write_line
from benchmarks.common.rounding import rounded_bfloat16
from benchmarks.gain.methods import build_callback, build_second
from benchmarks.gain.old_averages import OldAverages
from benchmarks.gain.scoring import score
from benchmarks.gain.settings import Settings, arguments
from lightning_dropcluster import DropCluster, RBlock
from lightning_dropcluster.methods import Regularizer
from lightning_dropcluster.visualization import plot_clusters


class Classifier(RBlock, pl.LightningModule):
    """Cross entropy or R-Block's loss, SGD with Nesterov momentum or AdamW, one learning-rate cycle."""

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        weight_decay: float,
        pair_weight: float = 0.0,
        regularizer_lr: float | None = None,
        optimizer: str = "sgd",
    ) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.model, self.lr, self.weight_decay, self.pair_weight = model, lr, weight_decay, pair_weight
        self.regularizer_lr = lr if regularizer_lr is None else regularizer_lr

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        if self.pair_weight > 0:
            loss = self.r_block_loss(images, labels, weight=self.pair_weight)
        else:
            loss = F.cross_entropy(self(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("val_loss", F.cross_entropy(self(images), labels), batch_size=len(labels))

    def predict_step(
        self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> tuple[Tensor, Tensor]:
        return self(batch[0]), batch[1]

    def configure_optimizers(self) -> Any:
        learned = [p for m in self.modules() if isinstance(m, Regularizer) for p in m.parameters()]
        others = [p for p in self.parameters() if all(p is not q for q in learned)]
        groups = [{"params": others}, {"params": learned}]
        if self.optimizer == "adamw":
            made: Any = torch.optim.AdamW(groups, self.lr, weight_decay=self.weight_decay)
        else:
            made = torch.optim.SGD(
                groups, self.lr, momentum=0.9, nesterov=True, weight_decay=self.weight_decay
            )
        steps, peaks = int(self.trainer.estimated_stepping_batches), [self.lr, self.regularizer_lr]
        cycle = torch.optim.lr_scheduler.OneCycleLR(made, peaks, total_steps=steps, cycle_momentum=False)
        return {"optimizer": made, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


def run(settings: Settings) -> dict[str, Any]:
    """Train once, score on images not trained on, and describe the run.

    Args:
        settings: everything that the run depends on.

    Returns:
        The record: what `score` returns, under old_averages on request once more; the split that it is of,
        seconds, recluster_seconds, versions, commit, device and arguments. Of paths only the last part is
        kept. "bfloat16" is "rounded" where `rounded_bfloat16` stood in for the processor.

    Raises:
        FileNotFoundError: if there are no images in `data_dir`.
        ValueError: if a setting is out of range.
    """
    with quiet(), rounded_bfloat16(settings.precision) as is_rounded:
        pl.seed_everything(settings.seed, workers=True, verbose=False)
        batches = build_batches(settings)
        classifier = build_classifier(settings, len(batches.data.classes))
        callback = build_callback(settings, classifier.model)
        second = build_second(settings, classifier.model)
        averages = OldAverages() if settings.old_averages and callback is not None else None
        trainer = build_trainer(settings, callback, second, averages)
        seconds = timed_fit(trainer, classifier, batches)
        scores = score(trainer, classifier, batches, settings.corrupted_samples)
        if averages is not None:
            with averages.in_use():
                scores["old_averages"] = score(trainer, classifier, batches)
    if settings.plot and isinstance(callback, DropCluster):
        save_plot(callback, settings)
    return {
        **scores,
        "split": "test" if settings.validation_samples is None else "validation",
        "seconds": round(seconds, 3),
        "recluster_seconds": round(getattr(callback, "recluster_seconds", 0.0), 3),
        **({"bfloat16": "rounded"} if is_rounded else {}),
        **provenance(),
        "arguments": arguments(settings),
    }


def timed_fit(trainer: pl.Trainer, classifier: Classifier, batches: ImageDataModule) -> float:
    """Train, and return the seconds that it took, all of `fit`."""
    started = time.perf_counter()
    trainer.fit(classifier, datamodule=batches)
    return time.perf_counter() - started


def build_batches(settings: Settings) -> ImageDataModule:
    """Load the images that the settings describe."""
    data = load(
        settings.data,
        data_dir=settings.data_dir,
        image_size=settings.image_size,
        train_samples=settings.train_samples,
        validation_samples=settings.validation_samples,
        calibration_samples=settings.calibration_samples,
        seed=settings.seed,
    )
    if settings.corrupted_samples > len(data.test):
        raise ValueError(
            f"corrupted_samples must be in 0 to {len(data.test)} (all images to score on), "
            f"got {settings.corrupted_samples}"
        )
    moments = None if settings.weights is None else trained_moments(settings.model)
    kind = ValidatedDataModule if settings.drop_prob == "auto" else ImageDataModule
    return kind(data, settings.batch_size, seed=settings.seed, augment=settings.augment, moments=moments)


def build_classifier(settings: Settings, num_classes: int) -> Classifier:
    """Create the model that the settings describe, ready to be trained."""
    own = (settings.regularizer, float(settings.drop_prob)) if settings.regularizer in OWN_RATES else None
    model = build_model(settings.model, settings.stem, num_classes, weights=settings.weights, own=own)
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return Classifier(
        model,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        pair_weight=settings.pair_weight,
        regularizer_lr=settings.regularizer_lr,
        optimizer=settings.optimizer,
    )


def build_trainer(
    settings: Settings, *callbacks: pl.Callback | None, accelerator: str = "auto"
) -> pl.Trainer:
    """One device, and nothing written to disk; callbacks that are ``None`` are left out."""
    return pl.Trainer(
        max_epochs=settings.epochs,
        precision=settings.precision,
        accelerator=accelerator,
        devices=1,
        callbacks=[callback for callback in callbacks if callback is not None],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=settings.progress_bar,
    )


def save_plot(callback: DropCluster, settings: Settings) -> None:
    """Write the clusters of the first selected layer as a PNG; where there are none, training warned."""
    if not callback.labels:
        return
    name, labels = next(iter(callback.labels.items()))
    path = Path(str(settings.plot))
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_clusters(labels, title=f"{name} of {settings.model} after {settings.epochs} epochs").savefig(path)


if __name__ == "__main__":
    settings = auto_cli(Settings, as_positional=False)
    write_line(run(settings), settings.out)
