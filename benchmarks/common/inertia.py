"""How tight clusters are, on whatever profiles one gives."""

from __future__ import annotations

import torch
from torch import Tensor


def inertia(profiles: Tensor, labels: Tensor) -> Tensor:
    """Add up the squared distances of profiles (B, F, N) to the means of their clusters: (B,)."""
    labels = labels.long().to(profiles.device)
    sums = profiles.new_zeros(len(profiles), int(labels.max()) + 1, profiles.shape[2])
    sums.scatter_add_(1, labels[:, :, None].expand_as(profiles), profiles)
    sizes = profiles.new_zeros(sums.shape[:2]).scatter_add_(1, labels, torch.ones_like(profiles[..., 0]))
    return profiles.square().sum((1, 2)) - (sums.square().sum(2) / sizes.clamp(min=1)).sum(1)


def explained_variance(profiles: Tensor, labels: Tensor) -> Tensor:
    """Measure how much of the variance of the items lies between their clusters.

    Args:
        profiles: (B, F, D).
        labels: (B, F), integers >= 0.

    Returns:
        Shares in [0, 1], (B,); 1 where items do not vary.
    """
    exact = profiles.double()
    total = inertia(exact, torch.zeros_like(labels))
    return torch.where(total > 0, 1 - inertia(exact, labels) / total, 1.0)
