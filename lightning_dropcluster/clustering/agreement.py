"""Agreement between two clusterings of the same layer."""

import torch
from torch import Tensor


def adjusted_rand_index(
    labels: Tensor, previous: Tensor, *, max_problems: int = 16, max_items: int = 4096
) -> float:
    """Return the mean adjusted Rand index of labels (B, F) over B problems: 1 where equal, 0 by chance.

    All problems are compared at once on the device of the labels, large ones on a fixed, evenly spaced
    sample. Pairs of items are counted in whole numbers, which no layer makes overflow.

    Example:
        >>> adjusted_rand_index(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[1, 1, 0, 0]]))
        1.0
    """
    now, before = (_sample(one, max_problems, max_items).to(labels.device) for one in (labels, previous))
    pairs = torch.stack([_count_pairs(one) for one in (now, before, (now << 32) + before)])
    items = now.shape[1]
    total = items * (items - 1) // 2
    scores = [_score(first, second, both, total) for first, second, both in pairs.T.tolist()]
    return sum(scores) / len(scores)


def _count_pairs(labels: Tensor) -> Tensor:
    """Count the pairs of items (B,) that share a label (B, F): each item with those before it in its run."""
    ordered, place = labels.sort(dim=1).values, torch.arange(labels.shape[1], device=labels.device)
    begins = ordered.diff(dim=1, prepend=ordered[:, :1] - 1) != 0
    return (place - (place * begins).cummax(dim=1).values).sum(1)


def _score(now: int, before: int, both: int, total: int) -> float:
    """Compute the index from pairs: together now, together before, in both, and all there are."""
    if now == before == both:
        return 1.0
    expected = now * before / total
    return (both - expected) / ((now + before) / 2 - expected)


def _sample(labels: Tensor, max_problems: int, max_items: int) -> Tensor:
    rows = _evenly(labels.shape[0], max_problems, labels.device)
    items = _evenly(labels.shape[1], max_items, labels.device)
    return labels[rows[:, None], items].long()


def _evenly(length: int, most: int, device: torch.device) -> Tensor:
    """Indices of ``most`` evenly spaced entries, or all."""
    count = min(length, most)
    steps = max(1, count - 1)
    return (torch.arange(count, device=device) * (length - 1) + steps // 2) // steps
