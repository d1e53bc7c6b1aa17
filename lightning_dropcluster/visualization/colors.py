"""Colours that the eye tells apart, for clusters that lie side by side."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from lightning_dropcluster.checks import check_number

_LMS = (
    (0.4122215, 0.5363326, 0.0514460),
    (0.2119035, 0.6806996, 0.1073970),
    (0.0883025, 0.2817188, 0.6299788),
)
_LAB = (
    (0.2104543, 0.7936178, -0.0040720),
    (1.9779985, -2.4285922, 0.4505937),
    (0.0259040, 0.7827718, -0.8086758),
)
_GREEDY = 512  # points chosen farthest from all before; later ones are shuffled
_MOST_MATCHED = 1024  # above this many clusters colours are taken in order: too many to tell apart anyhow


def cluster_colors(num_clusters: int) -> Tensor:
    """Choose colours that the eye tells apart: each new one lies farthest from all before it.

    The first colours stay the same when more are asked for (up to 4,096), so a cluster keeps its colour.

    References:
        Distances are taken in Oklab (Ottosson 2020); the greedy choice is that of Glasbey et al. 2007.

    Example:
        >>> cluster_colors(3).shape
        torch.Size([3, 3])
    """
    check_number("num_clusters", num_clusters, 1, integer=True)
    levels = max(24, math.ceil((2.5 * num_clusters) ** (1 / 3)))
    return _palette(levels)[:num_clusters].clone()


def neighbor_colors(*labels: Tensor, num_clusters: int | None = None) -> Tensor:
    """Choose a colour for each cluster so that clusters side by side differ as much as can be.

    A label has one colour in all the labelings, such as one layer's clusters at several moments.

    Example:
        >>> neighbor_colors(torch.tensor([[[0, 1], [2, 3]]])).shape
        torch.Size([4, 3])
    """
    num_clusters = max(num_clusters or 0, *(int(one.max()) + 1 for one in labels))
    colors = cluster_colors(num_clusters)
    if num_clusters > _MOST_MATCHED:
        return colors
    lab = _oklab(colors)
    distance, beside = torch.cdist(lab, lab), _adjacency(labels, num_clusters)
    free, chosen = torch.ones(num_clusters, dtype=torch.bool), torch.full((num_clusters,), -1)
    for cluster in beside.sum(1).argsort(descending=True, stable=True).tolist():
        around = chosen[beside[cluster] & (chosen >= 0)]
        nearest = distance[around].amin(0) if len(around) else torch.zeros(num_clusters)
        chosen[cluster] = nearest.masked_fill(~free, -1.0).argmax()
        free[chosen[cluster]] = False
    return colors[chosen]


def _adjacency(labels: tuple[Tensor, ...], num_clusters: int) -> Tensor:
    """Tell which clusters touch on any map: symmetric (K, K) bool, False on the diagonal."""
    beside = torch.zeros(num_clusters, num_clusters, dtype=torch.bool)
    for one in labels:
        for axis in range(1, one.ndim):
            left, right = one.narrow(axis, 0, one.shape[axis] - 1), one.narrow(axis, 1, one.shape[axis] - 1)
            beside[left.flatten().long(), right.flatten().long()] = True
    return (beside | beside.T).fill_diagonal_(False)


@lru_cache(maxsize=4)
def _palette(levels: int) -> Tensor:
    """Order the colours of a `levels`-cubed RGB grid, save the darkest, lightest and most glaring."""
    grid = torch.cartesian_prod(*[torch.linspace(0, 1, levels)] * 3)
    lab = _oklab(grid)
    inside = (lab[:, 0] > 0.35) & (lab[:, 0] < 0.93) & (lab[:, 1:].norm(dim=1) < 0.2)
    grid, lab = grid[inside], lab[inside]
    lab[:, 0] *= 0.8  # between small patches hue says more than lightness
    return grid[_farthest_first(lab)]


def _oklab(colors: Tensor) -> Tensor:
    """Turn (K, 3) sRGB into Oklab, where distances are those that the eye sees."""
    linear = torch.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    return (linear @ torch.tensor(_LMS).T).pow(1 / 3) @ torch.tensor(_LAB).T


def _farthest_first(points: Tensor) -> Tensor:
    """Order (P, 3) points so that each lies farthest from all before it, as far as `_GREEDY`."""
    rest = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
    chosen = [int(points[:, 2].argmin())]
    distance = torch.full((len(points),), torch.inf)
    while len(chosen) < min(_GREEDY, len(points)):
        distance = distance.minimum((points - points[chosen[-1]]).square().sum(1))
        chosen.append(int(distance.argmax()))
    head = torch.tensor(chosen)
    return torch.cat([head, rest[~torch.isin(rest, head)]])
