"""Count FAISS's searches in a reclustering as a GPU does it: there each costs more to begin than to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.cost.contenders import recluster
from benchmarks.cost.timing import clock
from lightning_dropcluster.clustering.faiss_search import FaissLloyd
from lightning_dropcluster.learning import reclustering
from lightning_dropcluster.learning.sketch import Sketch

GOALS = {"cold": 800, "warm": 400}  # for all conv2 layers of a ResNet-50, at most


def search_records(
    before: Mapping[str, Sketch], now: Mapping[str, Sketch], device: torch.device
) -> Iterator[dict[str, Any]]:
    """Recluster two windows of a ResNet-50's conv2 layers, as a GPU does wherever this runs.

    Args:
        before: name to sketch in the earlier window, which starts cold.
        now: in the later one, which starts warm.
        device: of the sketches. Without a GPU it is FAISS's search on a CPU that is counted.

    Yields:
        A record for each window.
    """
    old: dict[str, Tensor] = {}
    for case, sketches in (("cold", before), ("warm", now)):
        with _counted_searches() as points, _joined_as_on_a_gpu():
            labels, took = clock(partial(recluster, sketches, old, FaissLloyd()), device)
        yield {
            "case": case,
            "maps": sum(len(table) for table in labels.values()),
            "searches": len(points),
            "points": sum(points),
            "goal": GOALS[case],
            "seconds": round(took.seconds, 3),
        }
        old = labels


@contextmanager
def _counted_searches() -> Iterator[list[int]]:
    """Note the points of every search."""
    import faiss.contrib.torch_utils  # else the first search would put another function in its place

    points: list[int] = []
    name = "knn_gpu" if torch.cuda.is_available() else "knn"
    search = getattr(faiss, name)

    def counted(*args: Any, **options: Any) -> Any:
        points.append(max(len(x) for x in args if hasattr(x, "shape")))
        return search(*args, **options)

    with patch.object(faiss, name, counted):
        yield points


def _joined_as_on_a_gpu() -> Any:
    return patch.object(reclustering, "_TOGETHER", reclustering._TOGETHER_ON_GPU)
