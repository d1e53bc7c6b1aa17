"""Clusterers for comparisons: controls that know nothing of correlation, or nothing of the grid."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from lightning_dropcluster.clustering import Clusterer, FaissKMeans
from lightning_dropcluster.clustering.tiles import tile


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
    """The tiles of the grid where k-means starts, nearly square and equal in size, and never changed."""

    def fit(
        self,
        profiles: Tensor,
        num_clusters: int,
        init_labels: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Cut the grid into blocks; see `Clusterer.fit`.

        Raises:
            ValueError: if the items lie on no grid.
        """
        if grid is None:
            raise ValueError("blocks need a grid, got None")
        return tile(grid, num_clusters).expand(len(profiles), -1).to(profiles.device)


class RandomStart:
    """K-means that starts from random items, never from tiles of the grid, and iterates to the end.

    The package's own starts from tiles and stops early, which leaves clusters near tiles where neighbours are
    alike; this one shows what k-means finds when it knows nothing of the grid.

    Args:
        seed: of the items taken for a start.
    """

    def __init__(self, seed: int = 0) -> None:
        self.kmeans = FaissKMeans(seed=seed, tolerance=0.0, warm_iter=25)

    def fit(
        self,
        profiles: Tensor,
        num_clusters: int,
        init_labels: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Cluster without the grid; see `Clusterer.fit`."""
        return self.kmeans.fit(profiles, num_clusters, init_labels, None)
