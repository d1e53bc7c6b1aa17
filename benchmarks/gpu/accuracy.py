"""Train as often as time allows, with and without regularisers, paired by seed: accuracy and seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from math import isfinite
from statistics import mean
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch import Tensor, nn

from benchmarks.common.data import DataName, ImageData, Split, channel_moments, load
from benchmarks.common.record import provenance, quiet, write_line
from benchmarks.cost.timing import clock, usual_device
from benchmarks.gpu.fast_resnet import DeviceBatches, FastClassifier, FastResNet
from lightning_dropcluster import DropBlock, DropCluster, Dropout, StructuredDropout

SCORED_AT_ONCE, SEEN_TO_WHITEN = 2000, 5000


@dataclass(frozen=True)
class Settings:
    """What to train.

    Args:
        data: see `data.load`.
        data_dir: see `data.load`.
        train_samples: training images; all by default.
        epochs: of each training.
        batch_size: images per step.
        widths: channels of the network's groups.
        layers: where to drop.
        drop_prob: at the end of training.
        block_size: of DropBlock.
        seconds: in which as many seeds as fit are trained; at least one.
        out: file to which the records are appended.
    """

    data: DataName = "cifar10"
    data_dir: str | None = None
    train_samples: int | None = None
    epochs: int = 16
    batch_size: int = 1024
    widths: tuple[int, ...] = (64, 256, 256)
    layers: str = "groups.[01].conv*"
    drop_prob: float = 0.1
    block_size: int = 5
    seconds: float = 120.0
    out: str | None = None


def methods(settings: Settings) -> dict[str, Callable[[], pl.Callback | None]]:
    """Name what makes each method's callback."""
    layers, p = settings.layers, settings.drop_prob
    others = partial(StructuredDropout, layers)
    return {
        "none": lambda: None,
        "Dropout": lambda: others(Dropout(p)),
        "DropBlock": lambda: others(DropBlock(p, block_size=settings.block_size)),
        "DropCluster zero": lambda: DropCluster(layers, p, log_pictures=False),
        "DropCluster mean": lambda: DropCluster(layers, p, fill="mean", log_pictures=False),
        "DropCluster position": lambda: DropCluster(
            layers, p, fill="mean", scope="position", log_pictures=False
        ),
    }


@dataclass(frozen=True)
class Contest:
    """What all trainings share: settings, and images on the device."""

    settings: Settings
    data: ImageData
    moments: tuple[Tensor, Tensor]
    device: torch.device

    @classmethod
    def of(cls, settings: Settings, device: torch.device) -> Contest:
        """Load the images onto a device."""
        data = load(settings.data, data_dir=settings.data_dir, train_samples=settings.train_samples)
        moments = channel_moments(data.train.images)
        train, test = (Split(s.images.to(device), s.labels.to(device)) for s in (data.train, data.test))
        return cls(settings, replace(data, train=train, test=test), moments, device)

    def batches(self, split: Split, seed: int = 0) -> DeviceBatches:
        """Serve the images of a split."""
        return DeviceBatches(split, self.moments, self.settings.batch_size, seed, self.data.mirror)

    def train(self, seed: int, callback: pl.Callback | None, epochs: int | None = None) -> nn.Module:
        """Train from the seed's weights on the seed's batches."""
        pl.seed_everything(seed, verbose=False)
        batches = self.batches(self.data.train, seed)
        every = max(1, len(self.data.train) // SEEN_TO_WHITEN)  # files come class by class
        images = batches.normalised(self.data.train.images[::every])
        net = FastResNet(images.cpu(), len(self.data.classes), self.settings.widths)
        trainer = pl.Trainer(
            accelerator="gpu" if self.device.type == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed",
            max_epochs=epochs or self.settings.epochs,
            callbacks=[] if callback is None else [callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        net = net.to(self.device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        trainer.fit(FastClassifier(net, self.settings.batch_size), batches)
        return net.to(self.device)  # Lightning leaves it on the CPU

    @torch.no_grad()
    def score(self, net: nn.Module) -> dict[str, Any]:
        """Accuracy and loss on the test images; where these may be mirrored, of the mean over both."""
        net.eval()
        normalised, outputs = self.batches(self.data.test).normalised, []
        for some in self.data.test.images.split(SCORED_AT_ONCE):
            images = normalised(some).contiguous(memory_format=torch.channels_last)
            with torch.autocast(images.device.type, torch.bfloat16):
                views = [net(images), net(images.flip(3))] if self.data.mirror else [net(images)]
            outputs.append(torch.stack(views).float().mean(0))
        logits, labels = torch.cat(outputs), self.data.test.labels
        nll = F.cross_entropy(logits, labels).item()
        accuracy = (logits.argmax(1) == labels).double().mean().item()
        return {"accuracy": round(accuracy, 5), "nll": round(nll, 5) if isfinite(nll) else None}


def main(settings: Settings) -> None:
    """Train every method with one seed, then with the next, for as long as another seed fits."""
    started, device = time.monotonic(), usual_device()
    torch.backends.cudnn.benchmark = True
    contest, origin = Contest.of(settings, device), provenance(device)
    found: dict[str, list[float]] = {name: [] for name in methods(settings)}
    with quiet():
        contest.train(0, None, epochs=1)  # so that no other training waits for the device's libraries
    longest = 0.0
    for seed in count():
        began = time.monotonic()
        if seed and began - started + longest > settings.seconds:
            break
        for name, make in methods(settings).items():
            with quiet():
                net, took = clock(partial(contest.train, seed, make()), device)
            record = {"case": name, "seed": seed, **contest.score(net), "seconds": round(took.seconds, 3)}
            write_line({"benchmark": "fast training", **record, **origin}, settings.out)
            found[name].append(record["accuracy"])
        longest = max(longest, time.monotonic() - began)
    for record in compare(found):
        write_line({"benchmark": "fast training, paired", **record, **origin}, settings.out)


def compare(found: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Mean accuracy of each method, and its mean difference to none with the same seeds."""
    return [
        {
            "case": name,
            "seeds": len(values),
            "accuracy": round(mean(values), 5),
            "gain": round(mean(a - b for a, b in zip(values, found["none"], strict=True)), 5),
        }
        for name, values in found.items()
    ]


if __name__ == "__main__":
    main(auto_cli(Settings, as_positional=False))
