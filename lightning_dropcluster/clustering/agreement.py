"""Agreement between two clusterings of the same layer."""

import torch
from torch import Tensor


def adjusted_rand_index(
    labels: Tensor, previous: Tensor, *, max_problems: int = 16, max_items: int = 4096
) -> float:
    """Return the mean adjusted Rand index of labels (B, F) over B problems: 1 where equal, 0 by chance.

    The index is torchmetrics'; its pair counts overflow on whole layers, so each problem is compared for
    itself, and large ones on a fixed, evenly spaced sample.

    Example:
        >>> adjusted_rand_index(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[1, 1, 0, 0]]))
        1.0
    """
    rows = _evenly(labels.shape[0], max_problems)
    items = _evenly(labels.shape[1], max_items)
    pairs = zip(labels.cpu()[rows][:, items], previous.cpu()[rows][:, items], strict=True)
    scores = [_rand(now.long(), before.long()) for now, before in pairs]
    return sum(scores) / len(scores)


def _rand(now: Tensor, before: Tensor) -> float:
    from torchmetrics.functional.clustering import adjusted_rand_score  # imports torchvision: seconds

    with torch.sparse.check_sparse_tensor_invariants(False):  # an open choice would make torch warn
        return float(adjusted_rand_score(now, before))


def _evenly(length: int, count: int) -> Tensor:
    """Indices of ``count`` evenly spaced entries, or all."""
    return torch.linspace(0, length - 1, min(length, count)).round().long()
