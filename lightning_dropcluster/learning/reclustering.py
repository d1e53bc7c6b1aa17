"""Reclustering: from merged sketches to new labels, with the problems shared out over ranks."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dropcluster import ranks
from lightning_dropcluster.clustering.protocol import Clusterer, append_positions, canonicalize
from lightning_dropcluster.learning.running_profiles import RunningProfiles
from lightning_dropcluster.learning.scopes import Grouping, Shape
from lightning_dropcluster.learning.sketch import Sketch
from lightning_dropcluster.memory import is_out_of_memory

_TOGETHER = 2**22  # numbers in the profiles of layers clustered together; on a CPU more does not pay
_TOGETHER_ON_GPU = 2**26

OnProgress = Callable[[str, float], None]
"""Takes the first of the layers whose turn it is, and the share of all features that is done, in [0, 1)."""


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
    layers: Iterable[str] = (),
) -> dict[str, Tensor]:
    """Cluster this rank's share, without any collective: int64 labels (B, F), 0 in problems of other ranks.

    A layer starts from its old label table, in the shape of its sketch, where there is one. Layers whose
    problems are alike are clustered together, as far as memory allows. ``layers`` are all layers, also those
    without a sketch, so that problems stay with their rank from window to window.
    """
    places = {name: place for place, name in enumerate(layers or sketches)}
    blocks = [_Block(name, sketch, old_tables.get(name), places[name]) for name, sketch in sketches.items()]
    shares = {block.name: block.no_labels() for block in blocks}
    running_profiles = running_profiles or RunningProfiles(0.0)
    whole, done = sum(labels.numel() for labels in shares.values()), 0
    for batch in _join(block for block in blocks if block.count):
        if on_progress is not None:
            on_progress(batch[0].name, done / whole)
        try:
            profiles = _join_up([block.profiles(running_profiles) for block in batch])
            old = [block.old_labels() for block in batch if block.old is not None]
            labels = _cluster(batch[0].sketch, profiles, _join_up(old) if old else None, clusterer, grouping)
        except Exception as error:
            error.add_note(f"while reclustering layer {', '.join(repr(block.name) for block in batch)}")
            raise
        for block, some in zip(batch, labels.split([block.count for block in batch]), strict=True):
            shares[block.name][block.mine] = some
        done += sum(shares[block.name].numel() for block in batch)
    return shares


def try_clusterer(
    clusterer: Clusterer, grouping: Grouping, device: torch.device, spatial_dims: int = 2
) -> None:
    """Let a clusterer solve a tiny problem, cold and warm, so that a faulty one fails now, not later.

    The problem is that of a conv with 1 to 3 spatial dimensions. A clusterer that takes memory for itself on
    the device takes it now, before training fills it. Where that is full already, it has another try when
    there is something to cluster.
    """
    shape = 4, *((12,), (3, 4), (3, 2, 2))[spatial_dims - 1]
    sketch = Sketch(shape, scope=grouping.scope, num_samples=8, device=device)
    sketch.update(torch.randn(8, *shape, generator=torch.Generator().manual_seed(0)))
    few = Grouping(grouping.scope, 3, position_weight=grouping.position_weight)
    try:
        labels = _cluster(sketch, sketch.profiles(), None, clusterer, few)
        _cluster(sketch, sketch.profiles(), labels, clusterer, few)
    except Exception as error:
        if not is_out_of_memory(error):
            raise


def _cluster(
    sketch: Sketch, profiles: Tensor, old: Tensor | None, clusterer: Clusterer, grouping: Grouping
) -> Tensor:
    """Cluster a block of one layer's problems."""
    grid = sketch.scope.grid(sketch.shape)
    points = profiles
    if grouping.position_weight > 0.0 and grid:
        points = append_positions(profiles, sketch.shape[1:], grouping.position_weight)
    count = grouping.clusters_for(sketch.shape)
    if old is not None:
        old = old.long().clamp(max=count - 1)
    labels = clusterer.fit(points, count, init_labels=old, grid=grid)
    return canonicalize(labels, profiles, count, grid)


@dataclass(frozen=True)
class _Block:
    """This rank's problems of the layer at a position."""

    name: str
    sketch: Sketch
    old: Tensor | None
    position: int

    @property
    def problems(self) -> tuple[int, int]:
        """How many there are on all ranks, and how many items each has."""
        return self.sketch.scope.problems(self.sketch.shape)

    @property
    def mine(self) -> slice:
        """Those of this rank: equal blocks are dealt out, of each layer starting with another rank."""
        (problems, _), size = self.problems, ranks.world_size()
        turn = (ranks.rank() - self.position) % size
        return slice(problems * turn // size, problems * (turn + 1) // size)

    @property
    def count(self) -> int:
        return self.mine.stop - self.mine.start

    @property
    def kind(self) -> tuple[int, Shape | None, bool]:
        """What layers have in common that can be clustered together."""
        return self.problems[1], self.sketch.scope.grid(self.sketch.shape), self.old is None

    def no_labels(self) -> Tensor:
        return torch.zeros(self.problems, dtype=torch.int64, device=self.sketch.sums.device)

    def old_labels(self) -> Tensor:
        assert self.old is not None
        return self.old.reshape(self.problems)[self.mine]

    def profiles(self, running_profiles: RunningProfiles) -> Tensor:
        """Return the profiles (B, F, D), blended with those of earlier windows on the same grid."""
        profiles, grid = self.sketch.profiles(self.mine), self.sketch.scope.grid(self.sketch.shape)
        seen = int(self.sketch.count) * self.sketch.observations
        laid_out = profiles.unflatten(1, grid) if grid else profiles
        blended = running_profiles.blend(self.name, laid_out, observations=seen, first=self.mine.start)
        return blended.view_as(profiles)


def _join(blocks: Iterable[_Block]) -> list[list[_Block]]:
    """Put blocks of one kind together, in the order in which the first of each come."""
    batches: list[list[_Block]] = []
    latest: dict[Hashable, list[_Block]] = {}
    for block in blocks:
        most = _TOGETHER_ON_GPU if block.sketch.sums.is_cuda else _TOGETHER
        fitting = most // (block.problems[1] * block.sketch.sketch_dim)
        batch = latest.get(block.kind)
        if batch is None or sum(other.count for other in (*batch, block)) > fitting:
            batch = latest[block.kind] = []
            batches.append(batch)
        batch.append(block)
    return batches


def _join_up(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
