"""Tables of labels: count, resize and store them."""

import torch
from torch import Tensor


def cluster_sizes(labels: Tensor, num_groups: int, num_clusters: int) -> Tensor:
    """Count the features of each cluster.

    Args:
        labels: integers in [0, num_clusters), (C or 1, *spatial).
        num_groups: G, the number of label sets: C where each map has clusters of its own, else 1.
        num_clusters: K.

    Returns:
        Counts (G, K), float32.

    Example:
        >>> cluster_sizes(torch.tensor([[0, 0, 2], [1, 1, 1]]), 2, 3)
        tensor([[2., 0., 1.],
                [0., 3., 0.]])
    """
    flat = labels.reshape(num_groups, -1).long()
    sizes = torch.zeros(num_groups, num_clusters, dtype=torch.float32, device=labels.device)
    return sizes.scatter_add_(1, flat, torch.ones_like(flat, dtype=sizes.dtype))


def resize_labels(labels: Tensor, spatial: tuple[int, ...]) -> Tensor:
    """Resize labels to another spatial shape by nearest neighbour.

    Args:
        labels: (C or 1, *spatial').
        spatial: the wanted spatial shape, with as many dimensions as the labels have.

    Returns:
        Labels (C or 1, *spatial); the given tensor itself where the shape is right already or every spatial
        dimension is 1.

    Example:
        >>> resize_labels(torch.tensor([[1, 2]]), (4,))
        tensor([[1, 1, 2, 2]])
    """
    old = labels.shape[1:]
    if tuple(old) == tuple(spatial) or all(size == 1 for size in old):
        return labels
    for axis, (have, want) in enumerate(zip(old, spatial, strict=True), start=1):
        nearest = torch.arange(want, device=labels.device) * have // want
        labels = labels.index_select(axis, nearest)
    return labels


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """Spread a table (N, R or 1, K) by an index (R, ...) of integers in [0, K): (N, R, ...)."""
    rows = index.reshape(len(index), -1).expand(len(table), -1, -1)
    return table.expand(-1, len(index), -1).gather(2, rows).reshape(len(table), *index.shape)


def smallest_integer_type(num_labels: int) -> torch.dtype:
    """Return the smallest integer type that holds labels in [0, num_labels).

    Example:
        >>> smallest_integer_type(257)
        torch.int16
    """
    return torch.uint8 if num_labels <= 256 else torch.int16 if num_labels <= 32768 else torch.int32


def kept_ratio_of_clusters(keep: Tensor, sizes: Tensor, num_features: int) -> Tensor:
    """(number of features) / (number kept) over the batch, 0-d float32; finite where nothing is kept."""
    total = float(num_features * keep.shape[0])
    dropped = ((~keep).sum(0, dtype=torch.float32) * sizes).sum()
    # As a sum it is exactly 1 where nothing is dropped; torch divides a number by a tensor less exactly.
    return 1.0 + dropped / (total - dropped).clamp(min=1.0)
