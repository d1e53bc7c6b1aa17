"""Train a small ResNet on few noisy digits without and with DropCluster, and draw its clusters."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import isnan, nan
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from benchmarks.gain.settings import Settings
from benchmarks.gain.train import run

NUM_TEST = 500
BASE = Settings(
    model="test_resnet.r160_in1k",
    stem="cifar",
    data="noisy_digits",
    train_samples=200,
    calibration_samples=100,
    epochs=40,
    batch_size=20,
    lr=0.1,
    layers="layer[1-3]",
    any_layer=True,
    drop_prob="auto",
    fill="mean",
    scope="position",
    cluster_size=8,
    start=0.1,
    clean_statistics=True,
    every_n_epochs=10,
    num_samples=200,
)


@dataclass(frozen=True)
class Demo:
    """What the demonstration lets you choose.

    Args:
        out_dir: folder for the picture.
        epochs: passes over the training images, at least 1.
        seeds: how many pairs of runs, at least 1; each pair has training images of its own.
        progress_bar: show Lightning's progress bar.
    """

    out_dir: str = "demo"
    epochs: int = BASE.epochs
    seeds: int = 3
    progress_bar: bool = True

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")


def main(demo: Demo) -> None:
    """Say what will be compared, compare it, and show where the picture is."""
    console = Console()
    picture = Path(demo.out_dir) / "clusters.png"
    base = replace(BASE, epochs=demo.epochs, progress_bar=demo.progress_bar)
    console.print(announcement(base, demo.seeds), highlight=False)
    picture.unlink(missing_ok=True)
    started = time.perf_counter()
    records: dict[str, list[dict[str, Any]]] = {"without": [], "with DropCluster": []}
    for seed in range(demo.seeds):
        seeded = replace(base, seed=seed)
        records["without"].append(run(seeded))
        dropping = replace(seeded, regularizer="dropcluster", plot=None if seed else str(picture))
        records["with DropCluster"].append(run(dropping))
    console.print(score_table(records))
    for line in closing(records, time.perf_counter() - started):
        console.print(line, highlight=False)
    if picture.exists():
        print(f"Clusters of the first of {base.layers}: {os.path.relpath(picture)}")


def announcement(base: Settings, seeds: int) -> str:
    """State, before any result is known, what the runs share and where they differ."""
    options = ("fill", "scope", "cluster_size", "start", "every_n_epochs", "num_samples")
    given = ", ".join(f"{name}={getattr(base, name)!r}" for name in options)
    return (
        f"{seeds} pairs of runs of timm's {base.model}, each on {base.train_samples} of scikit-learn's "
        f"digits with noise: {base.epochs} epochs, the same first weights, batches and optimiser. The second "
        f'run of a pair adds one callback:\n  DropCluster("{base.layers}", "{base.drop_prob}", {given})\n'
        f"It follows the loss on {base.calibration_samples} other images. Each run is scored once, at the "
        f"end, on the same {NUM_TEST} test images."
    )


def score_table(records: dict[str, list[dict[str, Any]]]) -> Table:
    """Lay the mean scores of the runs side by side, a kind per row."""
    table = Table("training", title="Test split, means over seeds")
    for heading in ("accuracy", "NLL", "ECE", "seconds a run", "of these clustering"):
        table.add_column(heading, justify="right")
    for name, runs in records.items():
        scores = [_mean(runs, key) for key in ("nll", "ece")]
        seconds = [f"{_mean(runs, key):.1f}" for key in ("seconds", "recluster_seconds")]
        shown = ["not finite" if isnan(score) else f"{score:.3f}" for score in scores]
        table.add_row(name, f"{_mean(runs, 'accuracy'):.1%}", *shown, *seconds)
    return table


def closing(records: dict[str, list[dict[str, Any]]], seconds: float) -> Iterator[str]:
    """Say what the differences of the pairs tell, and how little that is."""
    pairs = zip(records["without"], records["with DropCluster"], strict=True)
    gains = [100 * (second["accuracy"] - first["accuracy"]) for first, second in pairs]
    listed = ", ".join(f"{gain:+.1f}" for gain in gains)
    yield (
        f"DropCluster less none, in points of accuracy, pair by pair: {listed}. So few seeds are no "
        "evidence; benchmarks/ has comparisons over seeds and with other methods."
    )
    yield f"All runs took {seconds:.0f} s. NLL and ECE: lower is better."


def _mean(runs: list[dict[str, Any]], key: str) -> float:
    values = [nan if run[key] is None else run[key] for run in runs]
    return sum(values) / len(values)


if __name__ == "__main__":
    main(auto_cli(Demo, as_positional=False))
