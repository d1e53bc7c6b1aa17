"""Reclustering: from merged sketches to new labels, with the problems shared out over ranks."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from lightning_dropcluster import ranks
from lightning_dropcluster.clustering.protocol import Clusterer, append_positions, canonicalize
from lightning_dropcluster.learning.running_profiles import RunningProfiles
from lightning_dropcluster.learning.scopes import Grouping, Shape
from lightning_dropcluster.learning.sketch import Sketch

Work = Callable[[], dict[str, Tensor]]
OnProgress = Callable[[str, float], None]
"""Takes the layer whose turn it is, and the share of all features that is done, in [0, 1)."""


class Reclustering:
    """Labels in the making, until the switch to them.

    Args:
        shapes: name to (C, *spatial) of the layers.
        work: makes name to labels (B, F) int32, this rank's share of them, without any collective.
        wait_steps: training steps until the switch.
        in_background: whether a thread works while training goes on.
    """

    def __init__(
        self, shapes: Mapping[str, Shape], work: Work, *, wait_steps: int, in_background: bool
    ) -> None:
        self.shapes, self.wait_steps = dict(shapes), wait_steps
        self._labels = _in_background(work) if in_background else _at_once(work)

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> "Reclustering":
        """Restore what `state_dict` returned.

        Args:
            state: wait_steps, shapes and labels.
            device: where the labels go.

        Returns:
            A reclustering whose labels are ready.
        """
        shapes = {name: tuple(shape) for name, shape in state["shapes"].items()}
        labels = {name: labels.to(device, copy=True) for name, labels in state["labels"].items()}
        if ranks.rank():  # the ranks' shares are added up, and the state holds whole labels
            labels = {name: torch.zeros_like(whole) for name, whole in labels.items()}
        return cls(shapes, lambda: labels, wait_steps=state["wait_steps"], in_background=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return Reclustering.from_state, (self.state_dict(), torch.device("cpu"))  # threads are not copied

    def state_dict(self) -> dict[str, Any]:
        """Wait for the labels and return them for a checkpoint; for a single process only.

        Returns:
            Tensors and plain scalars; no labels where memory did not suffice, as `result` will warn.
        """
        error = self._labels.exception()
        labels = {} if error is not None and _is_out_of_memory(error) else self._labels.result()
        return {
            "wait_steps": self.wait_steps,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "labels": {name: table.cpu() for name, table in labels.items()},
        }

    def result(self, device: torch.device) -> dict[str, Tensor]:
        """Wait for the labels and exchange them between ranks; every rank must call this.

        Args:
            device: where the process group's tensors live.

        Returns:
            Name to labels (B, F) int32, equal on every rank; none, with a warning, where any rank ran out of
            memory: training can go on with the old labels.

        Raises:
            Exception: what the clusterer raised here.
            RuntimeError: where another rank failed.
        """
        error = self._labels.exception()
        lacks_memory = error is not None and _is_out_of_memory(error)
        ranks.raise_together(None if lacks_memory else error, device)
        if ranks.any_rank(lacks_memory, device):
            cause = error if lacks_memory else "on another rank"
            ranks.warn(f"out of memory in reclustering; the old labels stay ({cause})")
            return {}
        return {name: ranks.sum_over_ranks(labels) for name, labels in self._labels.result().items()}

    def abandon(self) -> None:
        """Wait for a working thread, if any, and forget its labels."""
        self._labels.exception()


def cluster_share(
    sketches: Mapping[str, Sketch],
    old_tables: Mapping[str, Tensor],
    clusterer: Clusterer,
    grouping: Grouping,
    memory: RunningProfiles | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Tensor]:
    """Cluster this rank's share of the problems, without any collective.

    Args:
        sketches: name to merged sketch.
        old_tables: name to the label table in use, for a warm start, where there is one of the same shape.
        clusterer: who clusters.
        grouping: how many clusters.
        memory: of the profiles of earlier windows, which this one is added to.
        on_progress: is told the name of each layer before its turn, and the share of all features done.

    Returns:
        Name to labels (B, F) int32; problems of other ranks are 0.
    """
    shares = {}
    whole = sum(len(sketch.sums) for sketch in sketches.values())
    for position, (name, sketch) in enumerate(sketches.items()):
        if on_progress is not None:
            on_progress(name, sum(labels.numel() for labels in shares.values()) / whole)
        problems, items = sketch.scope.problems(sketch.shape)
        shares[name] = torch.zeros(problems, items, dtype=torch.int32, device=sketch.moments.device)
        mine = _my_block(problems, position)
        if mine.stop > mine.start:
            old = old_tables[name].reshape(problems, items)[mine] if name in old_tables else None
            try:
                profiles = sketch.profiles(mine)
                if memory is not None:
                    seen = int(sketch.count) * sketch.observations
                    profiles = memory.blend(name, profiles, observations=seen, first=mine.start)
                shares[name][mine] = _cluster(sketch, profiles, old, clusterer, grouping)
            except Exception as error:
                error.add_note(f"while reclustering layer {name!r}")
                raise
    return shares


def try_clusterer(clusterer: Clusterer, grouping: Grouping) -> None:
    """Let a clusterer solve a tiny problem, cold and warm, so that a faulty one fails now, not later.

    Args:
        clusterer: whom to try.
        grouping: how it will be asked, but for the number of clusters.

    Raises:
        Exception: what the clusterer raises, or `canonicalize` finds wrong.
    """
    sketch = Sketch((4, 3, 4), scope=grouping.scope, num_samples=8)
    sketch.update(torch.randn(8, 4, 3, 4, generator=torch.Generator().manual_seed(0)))
    few = Grouping(grouping.scope, 3, position_weight=grouping.position_weight)
    labels = _cluster(sketch, sketch.profiles(), None, clusterer, few)
    _cluster(sketch, sketch.profiles(), labels, clusterer, few)


def _cluster(
    sketch: Sketch, profiles: Tensor, old: Tensor | None, clusterer: Clusterer, grouping: Grouping
) -> Tensor:
    """Cluster a block of one layer's problems: settled labels (B, F) int32."""
    grid = sketch.scope.grid(sketch.shape)
    points = profiles
    if grouping.position_weight > 0.0 and grid:
        points = append_positions(profiles, grid, grouping.position_weight)
    count = grouping.clusters_for(sketch.shape)
    if old is not None:
        old = old.long().clamp(max=count - 1)
    labels = clusterer.fit(points, count, init_labels=old, grid=grid)
    return canonicalize(labels, profiles, count, grid).int()


def _is_out_of_memory(error: BaseException) -> bool:
    """Torch and Python have types for it, FAISS only words."""
    words = str(error).lower()
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "out of memory" in words
        or "bad_alloc" in words
    )


def _my_block(problems: int, position: int) -> slice:
    """Deal the problems of the layer at ``position`` out in equal blocks, starting with another rank each."""
    size = ranks.world_size()
    turn = (ranks.rank() - position) % size
    return slice(problems * turn // size, problems * (turn + 1) // size)


def _at_once(work: Work) -> "Future[dict[str, Tensor]]":
    future: Future[dict[str, Tensor]] = Future()
    try:
        future.set_result(work())
    except Exception as error:  # kept until all ranks can raise together
        future.set_exception(error)
    return future


def _in_background(work: Work) -> "Future[dict[str, Tensor]]":
    pool = ThreadPoolExecutor(1, "dropcluster")
    future = pool.submit(work)
    pool.shutdown(wait=False)
    return future
