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
