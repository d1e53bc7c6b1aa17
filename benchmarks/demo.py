"""Train a small ResNet on handwritten digits without and with DropCluster, and draw its clusters."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import sqrt
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
    data="digits",
    train_samples=300,
    epochs=40,
    batch_size=50,
    lr=0.1,
    layers="conv1",
    drop_prob=0.15,
    cluster_size=16,
    start=0.25,
    clean_statistics=True,
    every_n_epochs=5,
    num_samples=300,
)


@dataclass(frozen=True)
class Demo:
    """What the demonstration lets you choose.

    Args:
        out_dir: folder for the picture.
        epochs: passes over the training images, at least 1.
        seed: of both runs.
        progress_bar: show Lightning's progress bar.
    """

    out_dir: str = "demo"
    epochs: int = BASE.epochs
    seed: int = 0
    progress_bar: bool = True


def main(demo: Demo) -> None:
    """Say what will be compared, compare it, and show where the picture is."""
    console = Console()
    picture = Path(demo.out_dir) / "clusters.png"
    base = replace(BASE, epochs=demo.epochs, seed=demo.seed, progress_bar=demo.progress_bar)
    console.print(announcement(base), highlight=False)
    picture.unlink(missing_ok=True)
    started = time.perf_counter()
    records = {
        "without": run(base),
        "with DropCluster": run(replace(base, regularizer="dropcluster", plot=str(picture))),
    }
    console.print(score_table(records))
    for line in closing(records, time.perf_counter() - started):
        console.print(line, highlight=False)
    if picture.exists():
        print(f"Clusters of {base.layers}: {os.path.relpath(picture)}")


def announcement(base: Settings) -> str:
    """State, before any result is known, what the two runs share and where they differ."""
    options = ("cluster_size", "start", "every_n_epochs", "num_samples")
    given = ", ".join(f"{name}={getattr(base, name)}" for name in options)
    return (
        f"Two runs of timm's {base.model} on {base.train_samples} scikit-learn digits: {base.epochs} epochs, "
        f"seed {base.seed}, the same first weights, batches and optimiser. The second adds one callback:\n"
        f'  DropCluster("{base.layers}", {base.drop_prob}, {given})\n'
        f"Both are scored once, at the end, on the same {NUM_TEST} test images."
    )


def score_table(records: dict[str, dict[str, Any]]) -> Table:
    """Lay the scores of the runs side by side, a run per row."""
    table = Table("training", title="Test split")
    for heading in ("accuracy", "NLL", "ECE", "seconds", "of these clustering"):
        table.add_column(heading, justify="right")
    for name, record in records.items():
        scores = ["not finite" if record[key] is None else f"{record[key]:.3f}" for key in ("nll", "ece")]
        seconds = [f"{record[key]:.1f}" for key in ("seconds", "recluster_seconds")]
        table.add_row(name, f"{record['accuracy']:.1%}", *scores, *seconds)
    return table


def closing(records: dict[str, dict[str, Any]], seconds: float) -> Iterator[str]:
    """Say how little one seed tells."""
    accuracy = records["without"]["accuracy"]
    error = sqrt(accuracy * (1 - accuracy) / NUM_TEST)
    yield (
        f"A single seed proves nothing: the standard error of one accuracy on {NUM_TEST} images is already "
        f"{100 * error:.1f} points. For evidence over seeds and data sets see benchmarks/."
    )
    yield f"Both runs took {seconds:.0f} s. NLL and ECE: lower is better."


if __name__ == "__main__":
    main(auto_cli(Demo, as_positional=False))
