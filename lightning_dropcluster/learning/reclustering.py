"""Reclustering: from merged sketches to new labels, with the problems shared out over ranks."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_dropcluster import ranks
from lightning_dropcluster.clustering.protocol import Clusterer, append_positions, canonicalize
from lightning_dropcluster.learning.running_profiles import RunningProfiles
from lightning_dropcluster.learning.scopes import Grouping
from lightning_dropcluster.learning.sketch import Sketch
from lightning_dropcluster.memory import is_out_of_memory

OnProgress = Callable[[str, float], None]
"""Takes the layer whose turn it is, and the share of all features that is done, in [0, 1)."""


def recluster(work: Callable[[], dict[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """Do this rank's share of the work, `cluster_share`, and exchange the labels; every rank must call this.

    Where any rank runs out of memory there are no labels but a warning, as training can go on with the old
    ones. Any other error is raised on all ranks.
    """
    error: Exception | None = None
    labels: dict[str, Tensor] = {}
    try:
        labels = work()
    except Exception as caught:  # kept until all ranks can raise together
        error = caught
    lacks_memory = error is not None and is_out_of_memory(error)
    ranks.raise_together(None if lacks_memory else error, device)
    if ranks.any_rank(lacks_memory, device):
        cause = error if lacks_memory else "on another rank"
        ranks.warn(f"out of memory in reclustering; the old labels stay ({cause})")
        return {}
    return {name: ranks.sum_over_ranks(share) for name, share in labels.items()}


def cluster_share(
    sketches: Mapping[str, Sketch],
    old_tables: Mapping[str, Tensor],
    clusterer: Clusterer,
    grouping: Grouping,
    running_profiles: RunningProfiles | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Tensor]:
    """Cluster this rank's share, without any collective: int64 labels (B, F), 0 in problems of other ranks.

    A layer starts from its old label table, in the shape of its sketch, where there is one.
    """
    shares = {}
    whole = sum(len(sketch.sums) for sketch in sketches.values())
    for position, (name, sketch) in enumerate(sketches.items()):
        if on_progress is not None:
            on_progress(name, sum(labels.numel() for labels in shares.values()) / whole)
        problems, items = sketch.scope.problems(sketch.shape)
        shares[name] = torch.zeros(problems, items, dtype=torch.int64, device=sketch.moments.device)
        mine = _my_block(problems, position)
        if mine.stop > mine.start:
            old = old_tables[name].reshape(problems, items)[mine] if name in old_tables else None
            try:
                profiles = sketch.profiles(mine)
                if running_profiles is not None:
                    seen = int(sketch.count) * sketch.observations
                    profiles = running_profiles.blend(name, profiles, observations=seen, first=mine.start)
                shares[name][mine] = _cluster(sketch, profiles, old, clusterer, grouping)
            except Exception as error:
                error.add_note(f"while reclustering layer {name!r}")
                raise
    return shares


def try_clusterer(clusterer: Clusterer, grouping: Grouping) -> None:
    """Let a clusterer solve a tiny problem, cold and warm, so that a faulty one fails now, not later."""
    sketch = Sketch((4, 3, 4), scope=grouping.scope, num_samples=8)
    sketch.update(torch.randn(8, 4, 3, 4, generator=torch.Generator().manual_seed(0)))
    few = Grouping(grouping.scope, 3, position_weight=grouping.position_weight)
    labels = _cluster(sketch, sketch.profiles(), None, clusterer, few)
    _cluster(sketch, sketch.profiles(), labels, clusterer, few)


def _cluster(
    sketch: Sketch, profiles: Tensor, old: Tensor | None, clusterer: Clusterer, grouping: Grouping
) -> Tensor:
    """Cluster a block of one layer's problems."""
    grid = sketch.scope.grid(sketch.shape)
    points = profiles
    if grouping.position_weight > 0.0 and grid:
        points = append_positions(profiles, grid, grouping.position_weight)
    count = grouping.clusters_for(sketch.shape)
    if old is not None:
        old = old.long().clamp(max=count - 1)
    labels = clusterer.fit(points, count, init_labels=old, grid=grid)
    return canonicalize(labels, profiles, count, grid)


def _my_block(problems: int, position: int) -> slice:
    """Deal the problems of the layer at ``position`` out in equal blocks, starting with another rank each."""
    size = ranks.world_size()
    turn = (ranks.rank() - position) % size
    return slice(problems * turn // size, problems * (turn + 1) // size)
