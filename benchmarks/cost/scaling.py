"""How the cost of gathering and reclustering grows: one quantity at a time, and the exponent of each law.

Costs are processor seconds, which other work on the machine does not stretch.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import torch
import torch.distributed as dist
from jsonargparse import auto_cli
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from benchmarks.common.record import provenance, write_line
from benchmarks.cost.activations import BATCH, random_fields
from lightning_dropcluster.clustering import FaissKMeans
from lightning_dropcluster.learning.reclustering import cluster_share
from lightning_dropcluster.learning.scopes import Grouping
from lightning_dropcluster.learning.sketch import Sketch


@dataclass(frozen=True)
class Settings:
    """How far to go.

    Args:
        quick: two values of each quantity instead of four.
        repeats: timed runs of each value.
        side: of the maps where their size does not vary, at least 8.
        out: file to which the records are appended as well.
    """

    quick: bool = False
    repeats: int = 3
    side: int = 28
    out: str | None = None


@dataclass(frozen=True)
class Load:
    """What one process gathers and clusters."""

    side: int
    maps: int = 32
    layers: int = 1
    samples: int = 256
    num_clusters: int = 0

    @property
    def grouping(self) -> Grouping:
        """As many clusters as asked for, or one of 16 features on average."""
        return Grouping(num_clusters=self.num_clusters or max(1, round(self.side**2 / 16)))

    def batch(self) -> Tensor:
        """Make a batch of activations; every batch is the same, which costs the same."""
        return random_fields(self.maps, self.side, maps=self.maps, samples=BATCH).now

    def gather(self, batch: Tensor) -> dict[str, Sketch]:
        """Gather the samples for every layer."""
        shape = tuple(batch.shape[1:])
        sketches = {str(layer): Sketch(shape, num_samples=self.samples) for layer in range(self.layers)}
        for _ in range(-(-self.samples // BATCH)):
            for sketch in sketches.values():
                sketch.update(batch)
        return sketches

    def cluster(self, sketches: dict[str, Sketch]) -> dict[str, Tensor]:
        """Cluster this rank's share, from a cold start."""
        return cluster_share(sketches, {}, FaissKMeans(), self.grouping)


def ladders(side: int, quick: bool) -> dict[str, list[tuple[int, Load]]]:
    """Name each quantity that grows, with its values and loads."""
    base, steps = Load(side), (1, 4) if quick else (1, 2, 4, 8)
    sides, counts = [side // 2 * n for n in steps[:3]], [side**2 // 32 * n for n in steps]
    return {
        "maps": [(8 * n, replace(base, maps=8 * n)) for n in steps],
        "features of a map": [(side**2, replace(base, side=side)) for side in sides],
        "samples": [(128 * n, replace(base, samples=128 * n)) for n in steps],
        "clusters": [(count, replace(base, num_clusters=count)) for count in counts],
        "layers": [(n, replace(base, layers=n, maps=8)) for n in steps],
    }


def growth(settings: Settings) -> Iterator[dict[str, Any]]:
    """Measure one process: processor seconds to gather and to cluster, and the bytes of the sketches."""
    for quantity, ladder in ladders(settings.side, settings.quick).items():
        rows = [{"value": value, **measure(load, settings.repeats)} for value, load in ladder]
        for row in rows:
            yield {"benchmark": "scaling", "over": quantity, **row, "repeats": settings.repeats}
        names = ("gather_cpu_s", "cluster_cpu_s", "bytes")
        yield {"benchmark": "law", "over": quantity, **{name: exponent(rows, name) for name in names}}


def measure(load: Load, repeats: int) -> dict[str, float]:
    """Time both halves of a reclustering."""
    batch = load.batch()
    sketches = load.gather(batch)
    return {
        "gather_cpu_s": timed(lambda: load.gather(batch), repeats),
        "cluster_cpu_s": timed(lambda: load.cluster(sketches), repeats),
        "bytes": held_bytes(sketches),
    }


def held_bytes(sketches: dict[str, Sketch]) -> int:
    """Add up what the sketches hold."""
    return sum(buffer.nbytes for sketch in sketches.values() for buffer in sketch.buffers())


def timed(work: Callable[[], Any], repeats: int) -> float:
    """Return the median processor seconds, of all threads, of a few runs after one that warms up."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return round(median(seconds[1:]), 5)


def exponent(rows: list[dict[str, float]], name: str) -> float:
    """Fit the power of the value with which a cost grows, on logarithms."""
    points = [(math.log(row["value"]), math.log(row[name])) for row in rows]
    return round(linear_regression(*zip(*points, strict=True)).slope, 2)


def ranks(settings: Settings) -> Iterator[dict[str, Any]]:
    """Measure 1, 2 and 4 processes that share layers out over gloo, by the processor time of each."""
    load = Load(settings.side, layers=4)
    rows = []
    for size in (1, 2) if settings.quick else (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            spawn(work_as_rank, (size, load, settings.repeats, folder), nprocs=size)
            found = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(size)]
        rows.append({"value": size, **{name: max(each[name] for each in found) for name in found[0]}})
    what = {"over": "ranks", "layers": load.layers, "repeats": settings.repeats}
    yield from ({"benchmark": "scaling", **what, **row} for row in rows)
    yield {"benchmark": "law", "over": "ranks", "cluster_cpu_s": exponent(rows, "cluster_cpu_s")}


def work_as_rank(rank: int, size: int, load: Load, repeats: int, folder: str) -> None:
    """Merge and cluster as one rank of a group, and leave what it cost in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size)
    sketches = load.gather(load.batch())

    def merge() -> None:
        for sketch in sketches.values():
            sketch.merge()

    cost = {
        "merge_cpu_s": timed(merge, repeats),
        "cluster_cpu_s": timed(lambda: load.cluster(sketches), repeats),
        "merged_bytes": held_bytes(sketches),
    }
    torch.save(cost, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def main(settings: Settings) -> None:
    """Measure, and write a line for each value and each law."""
    origin = provenance(torch.device("cpu"))
    for record in chain(growth(settings), ranks(settings)):
        write_line({**record, **origin}, settings.out)


if __name__ == "__main__":
    main(auto_cli(Settings, as_positional=False))
