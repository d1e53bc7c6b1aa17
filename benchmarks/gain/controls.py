"""Clusterers for comparisons: controls that know nothing of correlation, and ideas for better clusters."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from benchmarks.common.inertia import explained_variance
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


class MixedSizes:
    """Clusters of another mean size at each reclustering: a bank of scales, drawn from over time.

    Source of the idea: feature grouping (https://arxiv.org/abs/1807.11718) draws one of several clusterings
    per step.

    Args:
        clusterer: finds the clusters.
        seed: of the drawn sizes.
        factors: by which the mean size may grow beyond what was asked for.
    """

    def __init__(self, clusterer: Clusterer, seed: int = 0, factors: tuple[int, ...] = (1, 4, 16)) -> None:
        self.clusterer, self.factors = clusterer, factors
        self.generator = Generator().manual_seed(seed)

    def fit(
        self,
        profiles: Tensor,
        num_clusters: int,
        init_labels: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Cluster into fewer clusters by a drawn factor, always from a cold start; see `Clusterer.fit`."""
        drawn = self.factors[int(torch.randint(len(self.factors), (), generator=self.generator))]
        return self.clusterer.fit(profiles, max(1, num_clusters // drawn), None, grid)


class Explained:
    """The fewest clusters that explain a share of each problem's variance: large ones where items are alike.

    Args:
        clusterer: finds the clusters.
        share: of the variance, in (0, 1).
        factors: by which the number of clusters may fall below what was asked for, rising.
    """

    def __init__(
        self, clusterer: Clusterer, share: float = 0.5, factors: tuple[int, ...] = (2, 4, 8, 16)
    ) -> None:
        self.clusterer, self.share, self.factors = clusterer, share, factors

    def fit(
        self,
        profiles: Tensor,
        num_clusters: int,
        init_labels: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Cluster each problem into as few clusters as will do, from a cold start; see `Clusterer.fit`."""
        chosen = self.clusterer.fit(profiles, num_clusters, None, grid)
        for factor in self.factors:
            coarser = self.clusterer.fit(profiles, max(1, num_clusters // factor), None, grid)
            will_do = explained_variance(profiles, coarser) >= self.share
            chosen = torch.where(will_do[:, None], coarser, chosen)
        return chosen
