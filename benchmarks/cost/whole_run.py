"""What a whole training costs with DropCluster: seconds with and without, split into what they go into."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import pytorch_lightning as pl
from jsonargparse import auto_cli

from benchmarks.common.data import DataName, ImageDataModule
from benchmarks.common.record import provenance, quiet, write_line
from benchmarks.gain.methods import build_callback
from benchmarks.gain.settings import Settings, arguments
from benchmarks.gain.train import build_batches, build_classifier, build_trainer, timed_fit

QUICK = {"data": "digits", "train_samples": 100, "epochs": 2, "batch_size": 25}
Fit = tuple[float, Any]
"""Seconds of a training, and its callback."""


@dataclass(frozen=True)
class Options:
    """What to train and how often.

    Args:
        model: see `train.py`.
        data: see `train.py`.
        data_dir: see `train.py`.
        train_samples: training images; all by default.
        epochs: of each training.
        batch_size: images per step.
        precision: see `train.py`; without instructions for bfloat16, times of bf16-mixed mean nothing.
        layers: what DropCluster drops in.
        every_n_epochs: epochs between two reclusterings.
        repeats: trainings of each case, the cases in turn.
        quick: a check in seconds, whose numbers mean nothing.
        out: file to which the record is appended.
    """

    model: str = "small_resnet"
    data: DataName = "cifar10"
    data_dir: str | None = None
    train_samples: int | None = None
    epochs: int = 10
    batch_size: int = 128
    precision: str = "32-true"
    layers: str = "conv1"
    every_n_epochs: int = 5
    repeats: int = 3
    quick: bool = False
    out: str | None = None

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")


def main(options: Options) -> None:
    """Train each case in turn, and print the record."""
    settings = settings_of(options)
    with quiet():
        batches = build_batches(settings)
        _, learned = fit(settings, batches)  # warms up, and makes clusters for the case that only drops
        given = {"every_n_epochs": 0, "initial_labels": learned.labels}
        runs: dict[str, list[Fit]] = {"none": [], "dropcluster": [], "dropping only": []}
        for _ in range(1 if options.quick else options.repeats):
            runs["none"].append(fit(replace(settings, regularizer="none"), batches))
            runs["dropcluster"].append(fit(settings, batches))
            runs["dropping only"].append(fit(settings, batches, **given))
    seconds = {name: [each for each, _ in fits] for name, fits in runs.items()}
    clustering = median(callback.recluster_seconds for _, callback in runs["dropcluster"])
    found = {"seconds": seconds, **split(seconds, clustering)}
    write_line(
        {"benchmark": "whole run", **found, **provenance(), "arguments": arguments(settings)}, options.out
    )


def settings_of(options: Options) -> Settings:
    """Translate the options into settings of `train.py`."""
    settings = Settings(
        model=options.model,
        stem="cifar",
        data=options.data,
        data_dir=options.data_dir,
        train_samples=options.train_samples,
        epochs=options.epochs,
        batch_size=options.batch_size,
        precision=options.precision,  # type: ignore[arg-type]
        channels_last=True,
        regularizer="dropcluster",
        layers=options.layers,
        start=0.1,
        every_n_epochs=options.every_n_epochs,
        progress_bar=False,
    )
    return replace(settings, **QUICK, data_dir=None, num_samples=50) if options.quick else settings


def fit(settings: Settings, batches: ImageDataModule, **changes: Any) -> Fit:
    """Train from the same weights on the same batches; see `build_callback` for the changes.

    Returns:
        The seconds, and the callback.
    """
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    classifier = build_classifier(settings, len(batches.data.classes))
    callback = build_callback(settings, classifier.model, **changes)
    seconds = timed_fit(build_trainer(settings, callback), classifier, batches)
    return round(seconds, 3), callback


def split(seconds: dict[str, list[float]], clustering: float) -> dict[str, float]:
    """Compare medians with those of the runs without the callback.

    Args:
        seconds: case to those of its runs.
        clustering: seconds of a run that training waited for clustering.

    Returns:
        The ratio of whole runs, and the shares of a run without the callback that go into dropping, into
        clustering and, what is left, into gathering; the latter is a small difference of large numbers.
    """
    none, whole, dropping = (median(seconds[name]) for name in ("none", "dropcluster", "dropping only"))
    return {
        "ratio": round(whole / none, 4),
        "dropping": round(dropping / none - 1, 4),
        "clustering": round(clustering / none, 4),
        "gathering": round((whole - dropping - clustering) / none, 4),
    }


if __name__ == "__main__":
    main(auto_cli(Options, as_positional=False))
