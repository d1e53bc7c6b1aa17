"""Cluster maps to look at: each feature map a panel, each cluster a colour."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_dropcluster.checks import check_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
_MOST_BORDERS = 64  # above this side length a cell is only a few pixels wide and borders would hide it


def cluster_colors(num_clusters: int) -> Tensor:
    """Choose colours that the eye tells apart: each new one lies farthest from all before it.

    The first colours stay the same when more are asked for (up to 4,096), so a cluster keeps its colour.

    Args:
        num_clusters: number of colours K, at least 1.

    Returns:
        (K, 3) float tensor of red, green and blue in [0, 1], no two alike, also when stored in 8 bits.

    Raises:
        TypeError: if `num_clusters` is no integer.
        ValueError: if it is below 1.

    References:
        Distances are taken in Oklab (Ottosson 2020); the greedy choice is that of Glasbey et al. 2007.

    Example:
        >>> cluster_colors(3).shape
        torch.Size([3, 3])
    """
    check_number("num_clusters", num_clusters, 1, integer=True)
    levels = max(24, math.ceil((2.5 * num_clusters) ** (1 / 3)))
    return _palette(levels)[:num_clusters].clone()


def plot_clusters(
    labels: Tensor, *, title: str | None = None, max_maps: int = 16, columns: int | None = None
) -> Figure:
    """Draw the clusters of one layer, a panel per feature map and a colour per cluster.

    A label has the same colour in every panel, so clusters that span several maps can be followed. Of 3-d
    maps the middle slice along the first spatial axis is shown; 1-d maps are drawn as strips.

    Args:
        labels: (C, *spatial) integer tensor of one layer, with 1 to 3 spatial axes, for example a value of
            `DropCluster.labels`.
        title: what the layer is called in the figure's title; a summary of the clusters follows it.
        max_maps: at most this many of the first feature maps are drawn, at least 1.
        columns: panels per row, at least 1; None makes the figure about square.

    Returns:
        The figure, free of pyplot's global state: `plot_clusters(labels).savefig("clusters.png")`.

    Raises:
        ImportError: if matplotlib is missing.
        TypeError: if `labels` is no integer tensor, or a count is no integer.
        ValueError: if `labels` has another shape, or a count is below 1.
    """
    _check_labels(labels)
    check_number("max_maps", max_maps, 1, integer=True)
    if columns is not None:
        check_number("columns", columns, 1, integer=True)
    figure = _new_figure()
    images = _shown(labels.detach().cpu()[:max_maps].long())
    columns = min(columns or _default_columns(labels), len(images))
    rows = math.ceil(len(images) / columns)
    width, height = _panel_inches(labels)
    figure.set_size_inches(max(columns * width, 4.6) + 0.2, rows * height + 0.6)
    figure.suptitle("\n".join(filter(None, (title, _summary(labels, images)))), fontsize=10)
    grid = figure.subplots(rows, columns, squeeze=False).flat
    ids, colored = images.unique(return_inverse=True)
    pixels = cluster_colors(len(ids))[colored]
    for index, axes in enumerate(grid):
        if index < len(images):
            _draw_map(axes, index, images[index], pixels[index], strip=labels.ndim == 2)
        else:
            axes.set_axis_off()
    return figure


@lru_cache(maxsize=4)
def _palette(levels: int) -> Tensor:
    """Order the colours of a `levels`-cubed RGB grid, save the darkest, lightest and most glaring."""
    grid = torch.cartesian_prod(*[torch.linspace(0, 1, levels)] * 3)
    linear = torch.where(grid <= 0.04045, grid / 12.92, ((grid + 0.055) / 1.055) ** 2.4)
    lab = (linear @ torch.tensor(_LMS).T).pow(1 / 3) @ torch.tensor(_LAB).T
    inside = (lab[:, 0] > 0.35) & (lab[:, 0] < 0.93) & (lab[:, 1:].norm(dim=1) < 0.2)
    grid, lab = grid[inside], lab[inside]
    lab[:, 0] *= 0.8  # between small patches hue says more than lightness
    return grid[_farthest_first(lab)]


def _farthest_first(points: Tensor, num_greedy: int = 512) -> Tensor:
    """Order (P, 3) points so that each lies farthest from all before it; later ones are shuffled."""
    rest = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
    chosen = [int(points[:, 2].argmin())]
    distance = torch.full((len(points),), torch.inf)
    while len(chosen) < min(num_greedy, len(points)):
        distance = distance.minimum((points - points[chosen[-1]]).square().sum(1))
        chosen.append(int(distance.argmax()))
    head = torch.tensor(chosen)
    return torch.cat([head, rest[~torch.isin(rest, head)]])


def _shown(labels: Tensor) -> Tensor:
    """Bring (C, *spatial) labels to (C, H, W) images: 1-d as one row, of 3-d the middle slice."""
    if labels.ndim == 2:
        return labels[:, None]
    return labels if labels.ndim == 3 else labels[:, labels.shape[1] // 2]


def _draw_map(axes: Axes, index: int, image: Tensor, pixels: Tensor, *, strip: bool) -> None:
    """Draw one (H, W) map given its (H, W, 3) colours."""
    axes.imshow(pixels.numpy(), interpolation="nearest", aspect="auto" if strip else "equal")
    if max(image.shape) <= _MOST_BORDERS:
        _draw_borders(axes, image)
    count = len(image.unique())
    axes.set_title(f"map {index} · {count} cluster{'s' * (count != 1)}", fontsize=7, pad=2.5)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _draw_borders(axes: Axes, image: Tensor) -> None:
    """Draw thin lines between neighbouring features of different clusters."""
    from matplotlib.collections import LineCollection

    row, col = (image[:, 1:] != image[:, :-1]).nonzero().T
    right_of = torch.stack([col + 0.5, row - 0.5, col + 0.5, row + 0.5], 1)
    row, col = (image[1:] != image[:-1]).nonzero().T
    below = torch.stack([col - 0.5, row + 0.5, col + 0.5, row + 0.5], 1)
    segments = torch.cat([right_of, below]).reshape(-1, 2, 2)
    axes.add_collection(LineCollection(list(segments.numpy()), colors="white", linewidths=0.4), autolim=False)


def _summary(labels: Tensor, images: Tensor) -> str:
    """Say what is shown: the number of maps, their size and the range of clusters per map."""
    counts = [len(one.unique()) for one in labels]
    low, high = min(counts), max(counts)
    clusters = f"{low}" if low == high else f"{low} to {high}"
    size = " × ".join(str(side) for side in labels.shape[1:])
    maps = f"{len(labels):,} feature maps of {size}" if len(labels) > 1 else f"1 feature map of {size}"
    shown = "" if len(images) == len(labels) else f" (first {len(images)} shown)"
    slice_shown = f", slice {labels.shape[1] // 2} shown" if labels.ndim == 4 else ""
    return f"{maps}{shown}, {clusters} cluster{'s' * (high != 1)} in each{slice_shown}"


def _default_columns(labels: Tensor) -> int:
    return 1 if labels.ndim == 2 else math.ceil(math.sqrt(min(len(labels), 16)))


def _panel_inches(labels: Tensor) -> tuple[float, float]:
    """Size of a panel with its title, following the shape of the maps within bounds."""
    if labels.ndim == 2:
        return 6.0, 0.55
    aspect = labels.shape[-2] / labels.shape[-1]
    return 1.7, 1.7 * min(max(aspect, 0.25), 4.0) + 0.2


def _check_labels(labels: Any) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: must be an integer tensor (C, *spatial), not {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels: must be an integer tensor, not {labels.dtype}")
    if labels.ndim not in (2, 3, 4) or labels.numel() == 0:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)}: must be (C, *spatial) with 1 to 3 spatial axes"
        )


def _new_figure() -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plot_clusters needs matplotlib: pip install lightning-dropcluster[plot]"
        ) from error
    return Figure(layout="constrained", dpi=150)
