"""Clusterers that know nothing of correlation: controls for what the learned clusters add."""

from __future__ import annotations

from itertools import count
from math import ceil

import torch
from torch import Generator, Tensor

from lightning_dropcluster.clustering import Clusterer


class Shuffled:
    """Clusters of the sizes that another clusterer finds, with their features drawn at random.

    Each problem has one permutation of its features, which never changes: so these clusters are as stable
    over training as those they were made from, and a warm start begins where those ended.

    Args:
        clusterer: finds the clusters.
        seed: of the permutations.
    """

    def __init__(self, clusterer: Clusterer, seed: int = 0) -> None:
        self.clusterer, self.seed = clusterer, seed

    def fit(
        self,
        profiles: Tensor,
        num_clusters: int,
        init_labels: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Cluster, and move the labels about; see `Clusterer.fit`."""
        source = torch.rand(profiles.shape[:2], generator=Generator().manual_seed(self.seed)).argsort(1)
        source = source.to(profiles.device)
        old = None if init_labels is None else torch.empty_like(init_labels).scatter_(1, source, init_labels)
        return self.clusterer.fit(profiles, num_clusters, old, grid).gather(1, source)


class Blocks:
    """Square blocks of the grid, nearly equal in size and never changed."""

    def fit(
        self,
        profiles: Tensor,
        num_clusters: int,
        init_labels: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Cut the grid into at most `num_clusters` blocks; see `Clusterer.fit`.

        Raises:
            ValueError: if the items lie on no two-dimensional grid.
        """
        if grid is None or len(grid) != 2:
            raise ValueError(f"blocks need a grid of two dimensions, got {grid}")
        height, width = grid
        side = next(s for s in count(1) if ceil(height / s) * ceil(width / s) <= num_clusters)
        rows, columns = torch.arange(height) // side, torch.arange(width) // side
        labels = rows[:, None] * ceil(width / side) + columns
        return labels.flatten().expand(len(profiles), -1).to(profiles.device)
