"""Time reclustering beside other clusterers, and weigh what each finds on exact profiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import mean, median
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from torch import Tensor

from benchmarks.common.data import DataName
from benchmarks.common.inertia import inertia
from benchmarks.common.record import provenance, write_line
from benchmarks.cost.activations import (
    MODEL,
    RESNET50,
    SIZES,
    Activations,
    exact_profiles,
    random_fields,
    resnet50_windows,
    sketch_of,
    strict_relu,
    trained,
)
from benchmarks.cost.contenders import SKLEARN, OnSketches, by_flash, by_ward, on_exact_profiles, recluster
from benchmarks.cost.peak import added_memory
from benchmarks.cost.searches import search_records
from benchmarks.cost.timing import Took, clock, usual_device
from lightning_dropcluster.clustering import FaissKMeans, TorchKMeans, adjusted_rand_index
from lightning_dropcluster.learning.sketch import Sketch

FLASH = "flash-kmeans"
MOST_WORK = 2**26  # maps x features of a map squared at most, so that no peer takes minutes
SKETCHES = [(dim, torch.float32) for dim in (16, 32, 64, 128, 256)]
MAPS_OF_A_LAYER = 8  # clustered as one layer: the work grows with their square
HALVED = [(64, torch.bfloat16), (64, torch.float16)]


@dataclass(frozen=True)
class Settings:
    """What to cluster.

    Args:
        quick: the digits and two sizes, few samples and maps: a check that takes a minute.
        part: layers of a "trained" network, "random" fields, or the whole "model" ResNet-50, with the
            searches that it takes on a GPU; all by default.
        model: a ResNet that timm knows, whose first layers are clustered.
        data: what it is trained on.
        data_dir: CIFAR-10 as a folder with train/CLASS/*.jpg and test/CLASS/*.jpg, or a tar file of it.
        train_samples: training images; all by default.
        epochs: of training, at least 2; the last is what the network moves between two windows.
        samples: gathered in a window.
        maps: of each layer that are clustered, at most; there are limits for large maps besides.
        sketch_dim: columns of the sketches.
        repeats: timed runs of each case, each with a seed of its own; at least 2.
        out: file to which the records are appended as well.
    """

    quick: bool = False
    part: Literal["all", "trained", "random", "model"] = "all"
    model: str = "small_resnet"
    data: DataName = "digits"
    data_dir: str | None = None
    train_samples: int | None = None
    epochs: int = 3
    samples: int = 1024
    maps: int = 512
    sketch_dim: int = 64
    repeats: int = 3
    out: str | None = None


@dataclass
class Runs:
    """What one case did: bytes added at the peak of its warm-up, then the time and labels of every run."""

    added_bytes: int | None
    took: list[Took] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        return [took.seconds for took in self.took]

    @property
    def cpu_seconds(self) -> list[float]:
        return [took.cpu_seconds for took in self.took]


def run_alternating(
    cases: Mapping[str, Callable[[int], Any]], repeats: int, device: torch.device
) -> dict[str, Runs]:
    """Run the cases in turn, so that what slows the machine slows all alike; each run has another seed.

    Args:
        cases: name to a function of the seed.
        repeats: timed runs of each, after one that warms up and whose memory is watched.
        device: whose work is waited for.

    Returns:
        Name to runs.
    """
    runs = {name: Runs(added_memory(partial(fit, 0), device)) for name, fit in cases.items()}
    for seed in range(1, repeats + 1):
        for name, fit in cases.items():
            labels, took = clock(partial(fit, seed), device)
            runs[name].took.append(took)
            runs[name].labels.append(labels)
    return runs


def layer_records(acts: Activations, settings: Settings, scope: str = "map") -> Iterator[dict[str, Any]]:
    """Compare all clusterers on one layer; Ward, which is slow, on a sixteenth of the maps."""
    device, profiles = acts.now.device, exact_profiles(acts.now, scope)
    sketched = OnSketches(acts, settings.sketch_dim, settings.repeats + 1, scope)
    cases = on_exact_profiles(profiles, acts.num_clusters(scope)) | sketched.cases()
    runs = run_alternating(cases, settings.repeats, device)
    if scope == "map":
        runs |= run_alternating(by_ward(profiles[: max(2, len(profiles) // 16)], acts), 2, device)
    base = [inertia(profiles, labels) for labels in runs[SKLEARN].labels]
    base_seconds = median(runs[SKLEARN].seconds) / len(profiles)
    base_cpu = median(runs[SKLEARN].cpu_seconds) / len(profiles)
    for name, run in runs.items():
        maps = len(run.labels[0])
        found = mean(inertia(profiles[:maps], labels).sum().item() for labels in run.labels)
        yield {
            "benchmark": "reclustering",
            **describe(acts, settings, scope),
            "maps": maps,
            "case": name,
            **timing(run),
            "ms_per_map": round(1e3 * median(run.seconds) / maps, 4),
            "times_faster": round(base_seconds * maps / median(run.seconds), 2),
            "times_less_cpu": round(base_cpu * maps / median(run.cpu_seconds), 2),
            "inertia": round(found, 3),
            "inertia_ratio": round(found / mean(values[:maps].sum().item() for values in base), 4),
            "agreement": round(adjusted_rand_index(run.labels[0], run.labels[1]), 4),
            "base": SKLEARN,
        }


def sketch_records(acts: Activations, settings: Settings) -> Iterator[dict[str, Any]]:
    """How the size and precision of the sketch tell on the exact inertia."""
    profiles = exact_profiles(acts.now)
    exact = FaissKMeans().fit(profiles, acts.num_clusters(), grid=acts.grid)
    base = inertia(profiles, exact).sum().item()
    for dim, dtype in SKETCHES + HALVED:
        found = []
        for seed in range(settings.repeats):
            sketch = sketch_of(acts.now, dim, seed, dtype=dtype)
            labels = recluster({"": sketch}, {}, FaissKMeans(seed=seed))[""]
            found.append(inertia(profiles, labels).sum().item())
        yield {
            "benchmark": "sketch",
            **describe(acts, settings),
            "sketch_dim": dim,
            "dtype": str(dtype).removeprefix("torch."),
            "bytes_per_feature": dim * dtype.itemsize + 8,
            "inertia_ratio": round(mean(found) / base, 4),
            "range": [round(pick(found) / base, 4) for pick in (min, max)],
            "base": "FaissKMeans, exact profiles",
            "repeats": len(found),
        }


def model_records(settings: Settings, device: torch.device) -> Iterator[dict[str, Any]]:
    """Recluster the whole model at once; flash-kmeans comes last, since it may not run everywhere."""
    before, now = windows_of_model(settings, device)
    _, sparse = windows_of_model(settings, device, strict_relu)
    for record in search_records(before, now, device):
        yield {"benchmark": "searches", **MODEL, "samples": settings.samples, **record}
    old = recluster(before, {}, FaissKMeans())
    cases = {
        "cold": lambda seed: recluster(now, {}, FaissKMeans(seed=seed)),
        "warm": lambda seed: recluster(now, old, FaissKMeans(seed=seed)),
        "cold, sparse maps": lambda seed: recluster(sparse, {}, FaissKMeans(seed=seed)),
        "torch, cold": lambda seed: recluster(now, {}, TorchKMeans(seed=seed)),
    }
    what = {
        "benchmark": "whole model",
        **MODEL,
        "features": sum(labels.numel() for labels in old.values()),
        "samples": settings.samples,
        "sketch_dim": settings.sketch_dim,
    }
    runs = run_alternating(cases, settings.repeats, device)
    tight = {
        name: total_inertia(sparse if "sparse" in name else now, run.labels[0]) for name, run in runs.items()
    }
    for name, run in runs.items():
        yield {**what, "case": name, **timing(run), "inertia": round(tight[name], 3)}
    if device.type == "cuda":
        flash = run_alternating({FLASH: lambda seed: by_flash(now)}, settings.repeats, device)[FLASH]
        times = median(runs["cold"].seconds) / median(flash.seconds)
        theirs = total_inertia(now, flash.labels[0])
        ratios = {"times_flash": round(times, 3), "inertia_to_flash": round(tight["cold"] / theirs, 5)}
        yield {**what, "case": FLASH, **timing(flash), "inertia": round(theirs, 3), **ratios}


def total_inertia(sketches: Mapping[str, Sketch], labels: Mapping[str, Tensor]) -> float:
    """Add up the inertia of all layers on their sketches."""
    return sum(inertia(sketch.profiles(), labels[name]).sum().item() for name, sketch in sketches.items())


def windows_of_model(
    settings: Settings, device: torch.device, through: Callable[[Tensor], Tensor] | None = None
) -> tuple[dict[str, Sketch], dict[str, Sketch]]:
    """Sketch the whole model in two windows."""
    some = {"sizes": RESNET50[-1:], "maps": settings.maps} if settings.quick else {}
    return resnet50_windows(
        device, samples=settings.samples, sketch_dim=settings.sketch_dim, through=through, **some
    )


def describe(acts: Activations, settings: Settings, scope: str = "map") -> dict[str, Any]:
    """Say what was clustered."""
    return {
        "data": acts.data,
        "layer": acts.layer,
        "channels": acts.channels,
        "grid": list(acts.grid),
        "scope": scope,
        "clusters": acts.num_clusters(scope),
        "samples": len(acts.now),
        "sketch_dim": settings.sketch_dim,
    }


def timing(run: Runs) -> dict[str, Any]:
    """Say how long it took, and what memory."""
    return {
        "median_s": round(median(run.seconds), 5),
        "range_s": [round(min(run.seconds), 5), round(max(run.seconds), 5)],
        "median_cpu_s": round(median(run.cpu_seconds), 5),
        "repeats": len(run.seconds),
        "added_bytes": run.added_bytes,
    }


def trained_records(settings: Settings, device: torch.device) -> Iterator[dict[str, Any]]:
    """Compare on a trained network, clusterers and sketches."""
    for acts in trained(
        settings.model,
        settings.data,
        settings.data_dir,
        train_samples=settings.train_samples,
        epochs=settings.epochs,
        samples=settings.samples,
    ):
        some = acts.first(fitting(acts.channels, acts.grid[0], settings)).to(device)
        yield from layer_records(some, settings)
        yield from sketch_records(some, settings)
        yield from layer_records(some, settings, "position")
        yield from layer_records(some.first(MAPS_OF_A_LAYER), settings, "layer")


def random_records(settings: Settings, device: torch.device) -> Iterator[dict[str, Any]]:
    """Compare on random fields."""
    for channels, side in SIZES[-2:] if settings.quick else SIZES:
        maps = fitting(channels, side, settings)
        acts = random_fields(channels, side, maps=maps, samples=settings.samples).to(device)
        yield from layer_records(acts, settings)


def fitting(channels: int, side: int, settings: Settings) -> int:
    """How many maps of a layer to cluster, at least 2."""
    return min(channels, settings.maps, max(2, MOST_WORK // side**4))


def main(settings: Settings) -> None:
    """Compare, and write a line for each case."""
    device = usual_device()
    if settings.quick:
        samples, images = min(settings.samples, 128), min(settings.train_samples or 256, 256)
        settings = replace(settings, data="digits", train_samples=images, epochs=2, samples=samples)
        settings = replace(settings, maps=min(settings.maps, 32), repeats=2)
    parts = {
        "trained": partial(trained_records, settings, device),
        "random": partial(random_records, settings, device),
        "model": partial(model_records, settings, device),
    }
    origin = provenance(device)
    for name, measure in parts.items():
        for record in measure() if settings.part in ("all", name) else ():
            write_line({**record, **origin}, settings.out)


if __name__ == "__main__":
    main(auto_cli(Settings, as_positional=False))
