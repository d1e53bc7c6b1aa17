"""Recluster all conv2 layers of a ResNet-50 at 224 px, and let flash-kmeans do so from the same start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch import Tensor

from benchmarks.common.inertia import inertia
from benchmarks.common.record import provenance, write_line
from benchmarks.cost.activations import CLUSTER_SIZE, RESNET50, resnet50_windows, strict_relu
from benchmarks.cost.contenders import MAX_ITER, recluster
from benchmarks.cost.reclustering import run_alternating, timing
from benchmarks.cost.searches import search_records
from benchmarks.cost.timing import usual_device
from lightning_dropcluster.clustering import FaissKMeans, TorchKMeans
from lightning_dropcluster.clustering.tiles import tile
from lightning_dropcluster.learning.sketch import Sketch

FLASH = "flash-kmeans"
Labels = Mapping[str, Tensor]
Sketches = dict[str, Sketch]


@dataclass(frozen=True)
class Settings:
    """What to cluster.

    Args:
        samples: gathered in a window.
        maps: of each layer, at most.
        largest: side of the largest maps.
        repeats: timed runs of each case.
        out: file to which the records are appended as well.
    """

    samples: int = 1024
    maps: int = 512
    largest: int = 56
    repeats: int = 5
    out: str | None = None


def by_flash(sketches: Sketches) -> Labels:
    """Let flash-kmeans iterate from the means of the tiles where our cold start begins."""
    # Not from the package: where its kernels cannot be imported it takes torch's own operations instead.
    from flash_kmeans.kmeans_triton_impl import (  # pyright: ignore[reportMissingImports]
        batch_kmeans_Euclid,
    )

    found = {}
    for name, sketch in sketches.items():
        profiles = sketch.profiles().contiguous()
        tiles = F.one_hot(tile(sketch.shape[1:], clusters_of(sketch)).to(profiles.device)).float()
        means = (tiles / tiles.sum(0)).T @ profiles
        found[name] = batch_kmeans_Euclid(profiles, means.shape[1], MAX_ITER, init_centroids=means)[0]
    return found


def clusters_of(sketch: Sketch) -> int:
    """As many as `recluster` asks for."""
    return max(1, round(sketch.shape[1] * sketch.shape[2] / CLUSTER_SIZE))


def total_inertia(sketches: Sketches, labels: Labels) -> float:
    """Add up the inertia of all layers on their sketches."""
    return sum(inertia(sketch.profiles(), labels[name]).sum().item() for name, sketch in sketches.items())


def records(settings: Settings, device: torch.device) -> Iterator[dict[str, Any]]:
    """Time each case, and weigh what it finds; flash-kmeans comes last, since it may not run everywhere."""
    sizes = tuple(size for size in RESNET50 if size[1] <= settings.largest)
    sketch = partial(
        resnet50_windows, device, samples=settings.samples, sketch_dim=64, sizes=sizes, maps=settings.maps
    )
    (before, now), (_, sparse) = sketch(), sketch(through=strict_relu)
    old = recluster(before, {}, FaissKMeans())
    what = {"benchmark": "reclustering on a device", "features": sum(map(Tensor.numel, old.values()))}
    for record in search_records(before, now, device):
        yield {**what, **record, "case": f"searches, {record['case']}"}
    cases = {
        "cold": lambda seed: recluster(now, {}, FaissKMeans(seed=seed)),
        "warm": lambda seed: recluster(now, old, FaissKMeans(seed=seed)),
        "sparse": lambda seed: recluster(sparse, {}, FaissKMeans(seed=seed)),
        "torch, cold": lambda seed: recluster(now, {}, TorchKMeans(seed=seed)),
    }
    runs = run_alternating(cases, settings.repeats, device)
    found = {
        case: total_inertia(sparse if case == "sparse" else now, run.labels[0]) for case, run in runs.items()
    }
    for case, run in runs.items():
        yield {**what, "case": case, **timing(run), "inertia": round(found[case], 3)}
    if device.type == "cuda":
        flash = run_alternating({FLASH: lambda seed: by_flash(now)}, settings.repeats, device)[FLASH]
        times = median(runs["cold"].seconds) / median(flash.seconds)
        theirs = total_inertia(now, flash.labels[0])
        ratios = {"times_flash": round(times, 3), "inertia_to_flash": round(found["cold"] / theirs, 5)}
        yield {**what, "case": FLASH, **timing(flash), "inertia": round(theirs, 3), **ratios}


def main(settings: Settings) -> None:
    """Write a line for each case."""
    device = usual_device()
    for record in records(settings, device):
        write_line({**record, **provenance(device)}, settings.out)


if __name__ == "__main__":
    main(auto_cli(Settings, as_positional=False))
