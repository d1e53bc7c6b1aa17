"""Recluster all conv2 layers of a ResNet-50 at 224 px, and let flash-kmeans do so from the same start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import faiss
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch import Tensor

from benchmarks.common.inertia import inertia
from benchmarks.common.record import provenance, write_line
from benchmarks.cost.activations import CLUSTER_SIZE, random_fields, sketch_of
from benchmarks.cost.contenders import MAX_ITER, recluster
from benchmarks.cost.reclustering import RESNET50, run_alternating, timing
from benchmarks.cost.timing import usual_device
from lightning_dropcluster.clustering import FaissKMeans, TorchKMeans
from lightning_dropcluster.clustering.faiss_search import FaissLloyd
from lightning_dropcluster.clustering.tiles import tile
from lightning_dropcluster.learning.sketch import Sketch

SPARSE = 1.5  # a strict ReLU leaves what is above so many standard deviations
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


def windows(settings: Settings, device: torch.device) -> tuple[Sketches, Sketches, Sketches]:
    """Sketch an earlier window, one now, and one after a strict ReLU; layers of one size share a sketch."""
    before, now, sparse = Sketches(), Sketches(), Sketches()
    for channels, side, layers in RESNET50:
        if side > settings.largest:
            continue
        maps = min(channels, settings.maps)
        acts = random_fields(channels, side, maps=maps, samples=settings.samples, device=device)
        rectified = F.relu(acts.now - SPARSE * acts.now.std())
        for window, outputs in ((before, acts.before), (now, acts.now), (sparse, rectified)):
            sketch = sketch_of(outputs, 64, window=int(window is not before))
            window |= {f"{side}.{layer}": sketch for layer in range(layers)}
    return before, now, sparse


def by_flash(sketches: Sketches) -> Labels:
    """Let flash-kmeans iterate from the means of the tiles where our cold start begins."""
    from flash_kmeans import batch_kmeans_Euclid  # pyright: ignore[reportMissingImports]

    found = {}
    for name, sketch in sketches.items():
        profiles = sketch.profiles().contiguous()
        tiles = F.one_hot(tile(sketch.shape[1:], clusters_of(sketch)).to(profiles.device)).float()
        means = (tiles / tiles.sum(0)).T @ profiles
        found[name] = batch_kmeans_Euclid(profiles, means.shape[1], MAX_ITER, init_centroids=means)[0]
    return found


@contextmanager
def counted(device: torch.device) -> Iterator[list[None]]:
    """Note each of FAISS's searches on the device."""
    name = "knn_gpu" if device.type == "cuda" else "knn"
    search, calls = getattr(faiss, name), list[None]()

    def noting(*args: Any, **options: Any) -> Any:
        calls.append(None)
        return search(*args, **options)

    setattr(faiss, name, noting)
    try:
        yield calls
    finally:
        setattr(faiss, name, search)


def clusters_of(sketch: Sketch) -> int:
    """As many as `recluster` asks for."""
    return max(1, round(sketch.shape[1] * sketch.shape[2] / CLUSTER_SIZE))


def total_inertia(sketches: Sketches, labels: Labels) -> float:
    """Add up the inertia of all layers on their sketches."""
    return sum(inertia(sketch.profiles(), labels[name]).sum().item() for name, sketch in sketches.items())


def records(settings: Settings, device: torch.device) -> Iterator[dict[str, Any]]:
    """Time each case, and weigh what it finds; flash-kmeans comes last, since it may not run everywhere."""
    before, now, sparse = windows(settings, device)
    by_faiss = FaissKMeans if device.type == "cuda" else FaissLloyd  # what a GPU does
    old = recluster(before, {}, by_faiss())
    cases = {
        "cold": lambda seed: recluster(now, {}, by_faiss(seed=seed)),
        "warm": lambda seed: recluster(now, old, by_faiss(seed=seed)),
        "sparse": lambda seed: recluster(sparse, {}, by_faiss(seed=seed)),
        "torch, cold": lambda seed: recluster(now, {}, TorchKMeans(seed=seed)),
    }
    runs = run_alternating(cases, settings.repeats, device)
    found = {
        case: total_inertia(sparse if case == "sparse" else now, run.labels[0]) for case, run in runs.items()
    }
    what = {"benchmark": "reclustering on a device", "features": sum(map(Tensor.numel, old.values()))}
    for case, run in runs.items():
        with counted(device) as searches:
            cases[case](0)
        record = {"case": case, "inertia": round(found[case], 3), "searches": len(searches)}
        yield {**what, **record, **timing(run)}
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
