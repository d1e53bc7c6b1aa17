"""Scopes: what is grouped together, and so what profiles, problems and label tables look like; how many."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dropcluster.checks import MAX_INT, check_choice, check_not_both, check_number

Shape = tuple[int, ...]
"""A layer's output shape without the batch: (C, *spatial)."""


@dataclass(frozen=True)
class Scope:
    """How one scope lays out a layer of shape (C, *spatial) with S positions."""

    name: str
    per_map: bool  # each map has clusters of its own
    problems: Callable[[Shape], tuple[int, int]]  # (B, F): independent clusterings, and items in each
    observations: Callable[[Shape], int]  # how many values of each item one sample brings
    label_shape: Callable[[Shape], Shape]  # of the label table, which broadcasts to (C, *spatial)
    grid: Callable[[Shape], Shape | None]  # the lattice on which a problem's items lie, if any
    rows: Callable[[Tensor], Tensor]  # activation (N, C, S) -> (N * observations, B * F)

    def compress(self, labels: Tensor) -> Tensor:
        """Take the label table, a view, out of full labels (C, *spatial)."""
        table = labels
        for axis, size in enumerate(self.label_shape(tuple(labels.shape))):
            table = table.narrow(axis, 0, size)
        if not torch.equal(table.expand_as(labels), labels):
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} are not shared as scope={self.name!r} asks"
            )
        return table

    def problem_labels(self, labels: Tensor) -> Tensor:
        """Bring full labels (C, *spatial) to a row for each problem, (B, F)."""
        return self.compress(labels).reshape(self.problems(tuple(labels.shape)))


def _positions(shape: Shape) -> int:
    return math.prod(shape[1:])


SCOPES: dict[str, Scope] = {
    scope.name: scope
    for scope in (
        Scope(
            "map",
            per_map=True,
            problems=lambda shape: (shape[0], _positions(shape)),
            observations=lambda shape: 1,
            label_shape=lambda shape: shape,
            grid=lambda shape: shape[1:],
            rows=lambda x: x.flatten(1),
        ),
        Scope(
            "position",
            per_map=False,
            problems=lambda shape: (1, _positions(shape)),
            observations=lambda shape: shape[0],
            label_shape=lambda shape: (1, *shape[1:]),
            grid=lambda shape: shape[1:],
            rows=lambda x: x.flatten(0, 1),
        ),
        Scope(
            "layer",
            per_map=False,
            problems=lambda shape: (1, math.prod(shape)),
            observations=lambda shape: 1,
            label_shape=lambda shape: shape,
            grid=lambda shape: shape,
            rows=lambda x: x.flatten(1),
        ),
        Scope(
            "channel",
            per_map=False,
            problems=lambda shape: (1, shape[0]),
            observations=_positions,
            label_shape=lambda shape: (shape[0], *(1 for _ in shape[1:])),
            grid=lambda shape: None,
            rows=lambda x: x.transpose(1, 2).flatten(0, 1),
        ),
    )
}
"""The scopes by name: ``map`` (features within each map, as in the paper), ``position`` (one partition of the
positions for all maps), ``layer`` (all features together), ``channel`` (whole maps)."""

_CLUSTER_SIZE = 16.0
_MAX_LAYER_CLUSTERS = 4096
_MAX_POSITION_WEIGHT = 1e6  # where squares overflow, FAISS ends the process


@dataclass
class Grouping:
    """How many clusters of what: the settings that turn a layer's shape into clustering problems."""

    scope: str = "map"
    num_clusters: int | None = None  # per problem; or
    cluster_size: float | None = None  # mean number of items per cluster, 16 when neither is given
    position_weight: float = 0.0  # see `append_positions`

    def __post_init__(self) -> None:
        check_choice("scope", self.scope, SCOPES)
        check_not_both("num_clusters", self.num_clusters, "cluster_size", self.cluster_size)
        if self.num_clusters is not None:
            most = _MAX_LAYER_CLUSTERS if self.scope == "layer" else MAX_INT
            self.num_clusters = check_number("num_clusters", self.num_clusters, 1, most, integer=True)
        if self.cluster_size is not None:
            self.cluster_size = check_number("cluster_size", self.cluster_size, 1)
        self.position_weight = check_number("position_weight", self.position_weight, 0, _MAX_POSITION_WEIGHT)
        if self.position_weight and self.scope == "channel":
            raise ValueError(
                f"position_weight={self.position_weight!r}: must be 0 with scope='channel', where whole maps "
                "are clustered, which have no position"
            )

    def clusters_for(self, shape: Shape) -> int:
        """Return K: 1 to the number of items, at most 4,096 where the scope is the whole layer."""
        items = SCOPES[self.scope].problems(shape)[1]
        return min(self._wanted(items), items, _MAX_LAYER_CLUSTERS if self.scope == "layer" else items)

    def is_capped(self, shape: Shape) -> bool:
        """Whether a layer gets fewer, and so larger, clusters than ``cluster_size`` asks for."""
        return self._wanted(SCOPES[self.scope].problems(shape)[1]) > self.clusters_for(shape)

    def _wanted(self, items: int) -> int:
        return self.num_clusters or max(1, round(items / (self.cluster_size or _CLUSTER_SIZE)))
