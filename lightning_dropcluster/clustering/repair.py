"""Repair of k-means labels: no cluster empty, none tiny, none made of copies of one point."""

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float32]
Labels = NDArray[np.int64]


def repair(points: Points, labels: Labels, num_clusters: int, min_share: float) -> Labels:
    """Merge small clusters into their nearest neighbours and split the largest for each slot left empty.

    The scheme is that of Online Deep Clustering (https://arxiv.org/abs/2006.10645), which splits by 2-means;
    we cut the largest cluster in equal halves along its longest direction, which cannot fail.

    Args:
        points: (F, D), F >= num_clusters.
        labels: (F,) in [0, num_clusters).
        num_clusters: K.
        min_share: clusters below this share of the mean size F / K are merged; in [0, 0.5].

    Returns:
        Labels (F,) in [0, num_clusters). Every cluster has a member, unless there are fewer than K distinct
        points.
    """
    sizes = np.bincount(labels, minlength=num_clusters)
    smallest = max(1, int(min_share * len(points) / num_clusters))
    if sizes.min() >= smallest:
        return labels
    if sizes.min() == 0:
        distinct, which = np.unique(points, axis=0, return_inverse=True)
        if len(distinct) <= num_clusters:
            return which.reshape(-1).astype(np.int64)
    labels = _merge_small(points, labels, sizes, smallest)
    for empty in np.flatnonzero(np.bincount(labels, minlength=num_clusters) == 0):
        _split_largest(points, labels, int(empty), num_clusters)
    return labels


def centroids(points: Points, labels: Labels, num_clusters: int) -> tuple[Points, NDArray[np.int64]]:
    """Average the points of each cluster.

    Args:
        points: (F, D).
        labels: (F,) in [0, num_clusters).
        num_clusters: K.

    Returns:
        Centroids (K, D), zero for empty clusters, and sizes (K,).
    """
    sizes = np.bincount(labels, minlength=num_clusters)
    order = np.argsort(labels, kind="stable")
    starts = np.cumsum(sizes) - sizes
    used = np.flatnonzero(sizes)
    means = np.zeros((num_clusters, points.shape[1]), dtype=np.float32)
    means[used] = np.add.reduceat(points[order], starts[used], axis=0) / sizes[used, None]
    return means, sizes


def _merge_small(points: Points, labels: Labels, sizes: NDArray[np.int64], smallest: int) -> Labels:
    """Move the members of small clusters to the nearest cluster that is not small."""
    large = np.flatnonzero(sizes >= smallest)
    moving = np.flatnonzero(sizes[labels] < smallest)
    means, _ = centroids(points, labels, len(sizes))
    near = np.square(means[large]).sum(1) - 2.0 * points[moving] @ means[large].T
    labels = labels.copy()
    labels[moving] = large[near.argmin(1)]
    return labels


def _split_largest(points: Points, labels: Labels, empty: int, num_clusters: int) -> None:
    """Move half of the largest cluster that is not one repeated point to the empty one, in place."""
    sizes = np.bincount(labels, minlength=num_clusters)
    for largest in np.argsort(-sizes, kind="stable"):
        if sizes[largest] < 2:
            return
        members = np.flatnonzero(labels == largest)
        offsets = points[members] - points[members].mean(0)
        lengths = np.square(offsets).sum(1)
        if lengths.max() > 1e-10:
            along = offsets @ offsets[lengths.argmax()]
            labels[members[np.argsort(along, kind="stable")[len(members) // 2 :]]] = empty
            return
