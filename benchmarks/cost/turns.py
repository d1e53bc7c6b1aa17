"""What dropping costs in a training step, from one fit in which a schedule turns it on and off."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from random import Random
from statistics import median, quantiles
from typing import Any

import pytorch_lightning as pl
import timm
import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from benchmarks.common.record import provenance, quiet, write_line
from benchmarks.cost.timing import Took, clock, usual_device
from lightning_dropcluster import DropCluster
from lightning_dropcluster.layers.norm_statistics import is_clean_step

WARM_UP = 12
AT_THE_END = 20  # steps that all keep averages clean
CLASSES = 10


@dataclass(frozen=True)
class Settings:
    """What to train.

    Args:
        model: of timm.
        layers: what to drop in.
        fill: what stands in for what is dropped.
        scope: what is clustered, see `DropCluster`.
        pairs: of steps that are compared, one that drops and one that does not; about as many.
        batch_size: images per step.
        size: of the images in pixels; by default 224 on a GPU and 96 elsewhere.
        precision: see Lightning's `Trainer`.
        channels_last: whether the model and its images are.
        threads: of torch on a CPU; by default torch's own choice.
        out: file to which the record is appended as well.
    """

    model: str = "resnet50"
    layers: str = "layer*.*.conv2"
    fill: str = "zero"
    scope: str = "map"
    pairs: int = 30
    batch_size: int = 16
    size: int | None = None
    precision: str = "32-true"
    channels_last: bool = False
    threads: int | None = None
    out: str | None = None


def steps_of(settings: Settings) -> int:
    """Count the steps of the training: threes in which a step is to keep averages clean are left out."""
    return WARM_UP + 3 * round(settings.pairs * 1.6) + AT_THE_END


class Network(pl.LightningModule):
    """A classifier of images that stay where they are."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        layout = torch.channels_last if settings.channels_last else torch.contiguous_format
        network = timm.create_model(settings.model, num_classes=CLASSES)
        self.network: nn.Module = network.to(memory_format=layout)  # pyright: ignore[reportCallIssue]

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, targets = batch
        return cross_entropy(self.network(images), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


class Turns(pl.Callback):
    """Drops in one of three steps, the first or the second by lot, and notes when each begins.

    It is compared with the first or the third. The step right after it is not: before that averages catch up.
    """

    def __init__(self, steps: int, device: torch.device) -> None:
        self.steps, self.device = steps, device
        self.moments: list[Took] = []

    def schedule(self, fraction: float) -> float:
        """Say whether to drop at a fraction of the training."""
        return float(self.drops(round(fraction * self.steps)))

    def drops(self, step: int) -> bool:
        """Say whether to drop in a step."""
        three, place = divmod(step, 3)
        return place == Random(three).randrange(2)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the time before the other callbacks begin with the step."""
        self._note()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note when the last step is done."""
        self._note()

    def _note(self) -> None:
        clock(lambda: None, self.device)  # waits for the device
        self.moments.append(Took(time.perf_counter(), time.process_time()))

    def pairs(self) -> list[tuple[Took, Took]]:
        """What a step took that drops, and what another of its three took that does not."""
        took = [
            Took(later.seconds - now.seconds, later.cpu_seconds - now.cpu_seconds)
            for now, later in pairwise(self.moments)
        ]
        clean = {step for step in range(self.steps) if is_clean_step(step, self.steps - step)}
        threes = range(WARM_UP, self.steps - 2, 3)
        firsts = [step for step in threes if not clean & {step, step + 1, step + 2}]
        ordered = [(step, step + 2) if self.drops(step) else (step + 1, step) for step in firsts]
        return [(took[on], took[off]) for on, off in ordered]


def train(settings: Settings, device: torch.device) -> list[tuple[Took, Took]]:
    """Train, and time the steps by pairs."""
    torch.manual_seed(0)
    size = settings.size or (224 if device.type == "cuda" else 96)
    images = torch.randn(settings.batch_size, 3, size, size, device=device)
    if settings.channels_last:
        images = images.to(memory_format=torch.channels_last)
    batch = images, torch.arange(settings.batch_size, device=device) % CLASSES
    steps = steps_of(settings)
    turns = Turns(steps, device)
    callback = DropCluster(
        settings.layers,
        fill=settings.fill,
        scope=settings.scope,
        start=0,
        schedule=turns.schedule,
        num_samples=2 * settings.batch_size,
        every_n_epochs=steps,
    )
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator=device.type,
        devices=1,
        precision=settings.precision,  # pyright: ignore[reportArgumentType]
        callbacks=[turns, callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Network(settings), DataLoader([batch] * steps, batch_size=None))  # pyright: ignore[reportArgumentType]
    return turns.pairs()


def record(settings: Settings, pairs: list[tuple[Took, Took]], device: torch.device) -> dict[str, Any]:
    """Compare the steps of each pair: median of the ratios, and its quartiles."""
    found: dict[str, Any] = {}
    for kind in Took._fields:
        on, off = ([getattr(step, kind) for step in side] for side in zip(*pairs, strict=True))
        low, middle, high = quantiles([a / b for a, b in zip(on, off, strict=True)], n=4)
        found[kind] = {
            "dropping_ms": round(1e3 * median(on), 2),
            "plain_ms": round(1e3 * median(off), 2),
            "ratio": round(middle, 4),
            "quartiles": [round(low, 4), round(high, 4)],
        }
    about: dict[str, Any] = {"pairs": len(pairs), "threads": torch.get_num_threads()}
    about["wait_policy"] = os.environ.get("OMP_WAIT_POLICY", "default")
    return {"benchmark": "turns", **found, **about, **provenance(device), "arguments": asdict(settings)}


def main(settings: Settings) -> None:
    """Train once, and write a line."""
    device = usual_device()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with quiet():
        pairs = train(settings, device)
    write_line(record(settings, pairs, device), settings.out)


if __name__ == "__main__":
    main(auto_cli(Settings, as_positional=False))
