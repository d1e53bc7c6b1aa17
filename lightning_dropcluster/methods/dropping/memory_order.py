"""The order in which the features of an activation lie in memory, and the clusters in that order."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def is_dense(x: Tensor) -> bool:
    """Whether the channels are first or last in memory, without gaps."""
    return x.is_contiguous() or x.movedim(1, -1).is_contiguous()


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of each sample (N, C, *spatial) lie side by side in memory."""
    return not x.is_contiguous() and x[:1].movedim(1, -1).is_contiguous()


def number_clusters(labels: Tensor, table: Sequence[int], last: bool) -> Tensor:
    """Number the clusters of all G groups through, and put them into the order of memory.

    From labels (C or 1, *spatial) and the size (G, K) of the keep table to int32 of the same shape, or of
    (*spatial, C or 1) where the channels are last.
    """
    (groups, clusters), numbers = table, labels.int()
    if groups > 1:
        first = torch.arange(0, groups * clusters, clusters, dtype=torch.int32, device=labels.device)
        numbers = numbers + first.view(-1, *[1] * (labels.ndim - 1))
    return numbers.movedim(0, -1) if last else numbers


class ClusterIndex:
    """What `number_clusters` makes of labels, made once while these stay as they are."""

    def __init__(self) -> None:
        self._made: dict[bool, tuple[Tensor, int, Tensor]] = {}

    def of(self, labels: Tensor, table: Sequence[int], last: bool) -> Tensor:
        """Return the number of each feature's cluster, (C * positions,), in the order of memory."""
        if labels.is_inference():  # whose changes torch does not count
            return number_clusters(labels, table, last).flatten()
        of, version, index = self._made.get(last, (None, -1, labels))
        if of is not labels or version != labels._version:
            with torch.inference_mode(False):  # what is made there cannot be kept for a backward pass
                index = number_clusters(labels, table, last).flatten()
            self._made[last] = labels, labels._version, index
        return index

    def __getstate__(self) -> dict[str, Any]:
        return {"_made": {}}
