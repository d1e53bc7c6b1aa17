"""A reference for `repair`: the same, one problem after the other, in NumPy."""

import math

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float32]
Labels = NDArray[np.int64]


def repair(
    points: Points, labels: Labels, num_clusters: int, min_share: float, max_share: float = math.inf
) -> Labels:
    """Merge small clusters and split large ones as the package does, each problem for itself."""
    labels = _fill(points, labels, num_clusters, min_share)
    most = max_share * len(points) / num_clusters
    if np.bincount(labels).max() > most:
        labels = _bound(points, labels.copy(), num_clusters, most)
    return labels


def _fill(points: Points, labels: Labels, num_clusters: int, min_share: float) -> Labels:
    """Merge small clusters, and split the largest for each slot left empty."""
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
        half = _half_of_largest(points, labels)
        if half is None:
            break
        labels[half] = empty
    return labels


def centroids(points: Points, labels: Labels, num_clusters: int) -> tuple[Points, NDArray[np.int64]]:
    """Average the points (F, D) of each cluster: centroids (K, D), zero for empty ones, and sizes (K,)."""
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


def _bound(points: Points, labels: Labels, num_clusters: int, most: float) -> Labels:
    """Split clusters of more than ``most`` members; each time the smallest joins another and frees its slot.

    The sum of the squared sizes falls every time, since ``most`` is at least twice the mean: so this ends.
    """
    means, sizes = centroids(points, labels, num_clusters)
    while (half := _half_of_largest(points, labels, most)) is not None:
        largest, smallest = labels[half[0]], sizes.argmin()
        has_room = sizes + sizes[smallest] <= most  # the second smallest has, at the least
        has_room[smallest] = False
        distances = np.square(means - means[smallest]).sum(1)
        nearest = np.where(has_room, distances, np.inf).argmin()
        labels[labels == smallest] = nearest
        labels[half] = smallest
        for changed in (largest, smallest, nearest):
            members = points[labels == changed]
            means[changed], sizes[changed] = members.mean(0), len(members)
    return labels


def _half_of_largest(points: Points, labels: Labels, above: float = 1) -> NDArray[np.int64] | None:
    """Return half of the members of the largest cluster that is not one repeated point, if any is above."""
    sizes = np.bincount(labels)
    for largest in np.argsort(-sizes, kind="stable"):
        if sizes[largest] <= above:
            break
        members = np.flatnonzero(labels == largest)
        offsets = points[members] - points[members].mean(0)
        lengths = np.square(offsets).sum(1)
        if lengths.max() > 1e-10:
            along = offsets @ offsets[lengths.argmax()]
            return members[np.argsort(along, kind="stable")[len(members) // 2 :]]
    return None
