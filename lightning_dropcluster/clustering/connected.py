"""Clusterers that keep clusters connected on the grid, as the paper's family does."""

import importlib.util

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_dropcluster.clustering.protocol import is_alive, nearest_alive


class _OnGrid:
    """What Ward and ReNA share: problems one after the other, joining neighbours on the grid alone."""

    def fit(
        self,
        profiles: Tensor,
        num_clusters: int,
        init_labels: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Group the items of B independent problems; see `Clusterer.fit`.

        Args:
            profiles: (B, F, D) float32.
            num_clusters: K.
            init_labels: not used.
            grid: the lattice whose neighbours may be joined; for ReNA of at most three dimensions.

        Returns:
            int64 labels (B, F).

        Raises:
            ValueError: if there is no grid.
        """
        if grid is None:
            raise ValueError(
                "clusterer: Ward and ReNA join neighbours on a grid, and scope='channel' has none"
            )
        labels = np.zeros(profiles.shape[:2], dtype=np.int64)
        count = min(num_clusters, labels.shape[1])
        # Dead items take part as copies of their nearest live one.
        nearest = nearest_alive(is_alive(profiles), grid or (1,)).cpu()
        for row, points, source in zip(labels, profiles.cpu(), nearest, strict=True):
            if count > 1 and source[0] >= 0:
                row[:] = self._cluster(points[source].numpy(), count, grid)
        return torch.from_numpy(labels).to(profiles.device)

    def _cluster(
        self, points: NDArray[np.float32], num_clusters: int, grid: tuple[int, ...]
    ) -> NDArray[np.integer]:
        raise NotImplementedError


class Ward(_OnGrid):
    """Ward's agglomeration on the grid: every cluster is spatially connected (scikit-learn).

    Slower than k-means, and it cannot start from old labels. Needs
    ``pip install '.[ward]'`` in the clone.

    Raises:
        ImportError: at construction, if scikit-learn is missing.
    """

    def __init__(self) -> None:
        _require("sklearn", "scikit-learn", "ward")

    def _cluster(
        self, points: NDArray[np.float32], num_clusters: int, grid: tuple[int, ...]
    ) -> NDArray[np.integer]:
        from scipy.sparse import coo_array
        from sklearn.cluster import AgglomerativeClustering

        first, second = _neighbours(grid)
        edges = coo_array((np.ones(len(first)), (first, second)), shape=(len(points),) * 2)
        ward = AgglomerativeClustering(num_clusters, linkage="ward", connectivity=(edges + edges.T).tocsr())
        return ward.fit_predict(points)


class ReNA(_OnGrid):
    """Recursive neighbour agglomeration, which the paper uses: fast, and connected on the grid (nilearn).

    Source: Hoyos-Idrobo et al. 2019, https://arxiv.org/abs/1609.04608. It cannot start from old labels. Needs
    ``pip install '.[rena]'`` in the clone.

    Raises:
        ImportError: at construction, if nilearn is missing.
    """

    def __init__(self) -> None:
        _require("nilearn", "nilearn", "rena")

    def _cluster(
        self, points: NDArray[np.float32], num_clusters: int, grid: tuple[int, ...]
    ) -> NDArray[np.integer]:
        from nibabel import Nifti1Image
        from nilearn.regions.rena_clustering import recursive_neighbor_agglomeration

        if len(grid) > 3:
            raise ValueError(f"clusterer: ReNA takes grids of at most 3 dimensions, not {grid}")
        # Without this it would never join neighbours at a distance of zero.
        noise = np.random.default_rng(0).standard_normal(points.shape, dtype=np.float32)
        points = (points + 1e-4 * noise).astype(np.float32)
        volume = np.ones((*grid, 1, 1)[: max(3, len(grid))], dtype=np.uint8)
        mask = Nifti1Image(volume, np.eye(4))
        # One round at least halves the clusters, so this many always reach num_clusters.
        rounds = max(1, len(points).bit_length())
        return recursive_neighbor_agglomeration(points.T, mask, num_clusters, n_iter=rounds)[1]


def _require(module: str, package: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"{package} is missing: pip install '.[{extra}]' in the clone")


def _neighbours(grid: tuple[int, ...]) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Pairs of neighbouring points of a lattice, numbered in C order."""
    index = np.arange(np.prod(grid)).reshape(grid)
    pairs = [
        (np.delete(index, -1, axis).ravel(), np.delete(index, 0, axis).ravel()) for axis in range(len(grid))
    ]
    return np.concatenate([p[0] for p in pairs]), np.concatenate([p[1] for p in pairs])
