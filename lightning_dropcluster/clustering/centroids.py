"""The two halves of an iteration of k-means, for many problems at once: assign points, and add them up."""

import torch
from torch import Tensor

_BLOCK = 2**21  # distances held at a time, which the caches of a CPU hold too
_BLOCK_ON_GPU = 2**26


def assign_nearest(points: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """Return labels (B, F) of points (B, F, D) by the nearest of the means (B, K, D), and squared distances.

    A block of distances at a time, to bound memory.
    """
    block, (items, clusters) = _BLOCK_ON_GPU if points.is_cuda else _BLOCK, (points.shape[1], means.shape[1])
    problems, rows = max(1, block // (items * clusters)), min(items, max(1, block // clusters))
    labels = points.new_empty(points.shape[:2], dtype=torch.int64)
    distances = points.new_empty(points.shape[:2])
    for first, centres in zip(range(0, len(means), problems), means.split(problems), strict=True):
        lengths = centres.square().sum(2)[:, None]
        for start in range(0, items, rows):
            here = (slice(first, first + problems), slice(start, start + rows))
            best = torch.baddbmm(lengths, points[here], centres.mT, alpha=-2.0).min(dim=2)
            labels[here] = best.indices
            distances[here] = best.values + points[here].square().sum(2)
    return labels, distances.clamp_(min=0.0)


def add_up(points: Tensor, alive: Tensor, labels: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Add up the live points (B, F, D) of each cluster, (B, K, D), and count them, (B, K)."""
    slots = len(points) * num_clusters
    index = labels + num_clusters * torch.arange(len(points), device=points.device)[:, None]
    index = index.masked_fill(~alive, slots).flatten()  # what is dead comes last, and is left out
    sizes = labels.new_zeros(slots + 1).scatter_add_(0, index, torch.ones_like(index))
    add = _add_in_order if points.is_cuda else _add_by_index
    sums = add(points.flatten(0, 1), index, sizes)[:slots]
    return sums.view(len(points), num_clusters, -1), sizes[:slots].view(len(points), num_clusters)


def _add_in_order(points: Tensor, index: Tensor, sizes: Tensor) -> Tensor:
    """Add up by runs of sorted points: on a GPU, where additions by index come in any order.

    A run is the work of one thread for each column, so that of all dead points would be a long one.
    """
    ordered = points[index.argsort(stable=True)]
    return torch.segment_reduce(ordered, "sum", lengths=sizes[:-1], axis=0, unsafe=True)


def _add_by_index(points: Tensor, index: Tensor, sizes: Tensor) -> Tensor:
    """Add up point by point: on a CPU, with less work."""
    return points.new_zeros(len(sizes), points.shape[1]).index_add_(0, index, points)
