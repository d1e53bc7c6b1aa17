"""How high the loss rises on the straight line between two trained networks, with and without dropping."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytorch_lightning as pl
import torch
from jsonargparse import auto_cli
from torch import Tensor
from torch.optim.swa_utils import update_bn

from benchmarks.common.data import ImageDataModule
from benchmarks.common.record import provenance, quiet, write_line
from benchmarks.gain.methods import build_callback
from benchmarks.gain.protocol import Stage, aside, load_stage
from benchmarks.gain.scoring import score
from benchmarks.gain.settings import Settings, arguments
from benchmarks.gain.train import Classifier, build_batches, build_classifier, build_trainer

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Options:
    """What to join by straight lines.

    Args:
        stage: whose network, training and first method to use; networks are scored on its validation images.
        data_dir: see `train.py`.
        drop_prob: drop probability of DropCluster at the end of training, in [0, 1).
        cluster_size: mean number of features per cluster.
        seeds: how many pairs of networks per case, from the stage's tuning seed on.
        points: on each line, its ends included.
        out: file to which the records are appended.
    """

    stage: str = "quick"
    data_dir: str | None = None
    drop_prob: float = 0.3
    cluster_size: float = 64
    seeds: int = 1
    points: int = 9
    out: str | None = None

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")
        if self.points < 3:
            raise ValueError(f"points must be at least 3, got {self.points}")


def main(options: Options) -> None:
    """Print a record for each case and seed, the cases in turn."""
    stage = load_stage(options.stage)
    for seed in range(stage.tuning_seeds[0], stage.tuning_seeds[0] + options.seeds):
        for settings in cases(options, stage, seed):
            with quiet():
                found = line(settings, options.points)
            write_line({**found, **provenance(), "arguments": arguments(settings)}, options.out)


def cases(options: Options, stage: Stage, seed: int) -> Iterator[Settings]:
    """Yield the settings without and with dropping."""
    common = {"data_dir": options.data_dir, "seed": seed, "progress_bar": False}
    base = replace(stage.base, **aside(stage), **common)
    yield base
    sized = {"drop_prob": options.drop_prob, "cluster_size": options.cluster_size}
    yield replace(base, **stage.methods[0].fixed, **sized)


def line(settings: Settings, points: int) -> dict[str, Any]:
    """Train two networks from the same weights on the same images in another order, and walk between them.

    Batch norm's averages of a network in between are those of its own activations, as without that any
    mixture fails (REPAIR, https://arxiv.org/abs/2211.08403).

    Args:
        settings: of both; the second shuffles, draws and clusters by another seed.
        points: on the line, its ends included.

    Returns:
        NLL and accuracy at each point, and the barrier of each: the most that NLL lies above, and accuracy
        below, the straight line between the ends.
    """
    batches = build_batches(settings)
    classes = len(batches.data.classes)
    first = _train(settings, batches, classes, order=settings.seed)
    second = _train(settings, batches, classes, order=settings.seed + 1_000_000)
    pl.seed_everything(settings.seed, verbose=False)
    middle, trainer = build_classifier(settings, classes), build_trainer(settings)
    scores = []
    for share in torch.linspace(0, 1, points).tolist():
        middle.load_state_dict(mix(first, second, share))
        update_bn(batches.loader(batches.data.train), middle)
        scores.append(score(trainer, middle, batches))
    found = {name: [each[name] for each in scores] for name in ("nll", "accuracy")}
    losses, hits = (torch.tensor(found[name], dtype=torch.float64) for name in ("nll", "accuracy"))
    return {**found, "nll_barrier": barrier(losses), "accuracy_barrier": barrier(-hits)}


def _train(settings: Settings, batches: ImageDataModule, classes: int, order: int) -> Weights:
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    classifier: Classifier = build_classifier(settings, classes)
    pl.seed_everything(order, workers=True, verbose=False)
    callback = build_callback(replace(settings, seed=order), classifier.model)
    own = ImageDataModule(batches.data, settings.batch_size, seed=order, augment=settings.augment)
    build_trainer(settings, callback).fit(classifier, datamodule=own)
    return {name: value.clone() for name, value in classifier.state_dict().items()}


def mix(first: Weights, second: Weights, share: float) -> Weights:
    """Take the point on the line from the first to the second; what is no floating-point number stays.

    Args:
        first: name to tensor.
        second: with the same names and shapes.
        share: 0 for the first, 1 for the second.

    Returns:
        Name to tensor.
    """
    return {
        name: torch.lerp(value, second[name], share) if value.is_floating_point() else value
        for name, value in first.items()
    }


def barrier(losses: Tensor) -> float:
    """Measure how far losses on a line rise above the straight line between its ends.

    Args:
        losses: (points,), evenly spaced.

    Returns:
        The most, at least 0.
    """
    straight = torch.lerp(losses[0], losses[-1], torch.linspace(0, 1, len(losses), dtype=losses.dtype))
    return round((losses - straight).max().item(), 6)


if __name__ == "__main__":
    main(auto_cli(Options, as_positional=False))
