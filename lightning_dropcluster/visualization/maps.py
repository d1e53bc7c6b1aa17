"""Cluster maps to look at: each feature map a panel, each cluster a colour."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_dropcluster.checks import check_choice, check_number
from lightning_dropcluster.learning.scopes import SCOPES
from lightning_dropcluster.visualization.colors import neighbor_colors
from lightning_dropcluster.visualization.panels import (
    agreement,
    are_alike,
    check_colors,
    check_labels,
    cluster_count,
    draw_map,
    headline,
    new_figure,
    panel_inches,
    shown_maps,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_clusters(
    labels: Tensor,
    *,
    title: str | None = None,
    epoch: int | None = None,
    previous: Tensor | None = None,
    scope: str = "map",
    colors: Tensor | None = None,
    max_maps: int = 16,
    columns: int | None = None,
) -> Figure:
    """Draw the clusters of one layer, a panel per feature map, or one for all, and a colour per cluster.

    A label has the same colour in every panel, so clusters that span several maps can be followed, and
    clusters side by side have colours that differ. Of 3-d maps the middle slice along the first spatial axis
    is shown; 1-d maps are drawn as strips.

    Args:
        labels: (C, *spatial) integer tensor of one layer, with 1 to 3 spatial axes, for example a value of
            `DropCluster.labels`.
        title: what the layer is called in the figure's title; a summary of the clusters follows it.
        epoch: when the clusters were made, for the title.
        previous: the layer's labels before, of the same shape; the title tells how far the two agree.
        scope: what was grouped, as for `DropCluster`; agreement is measured accordingly.
        colors: (K, 3) colour of each label; give the same ones to pictures that follow each other in time.
            `visualization.neighbor_colors` of these labels where it is ``None``.
        max_maps: at most this many of the first feature maps are drawn, at least 1.
        columns: panels per row, at least 1; None makes the figure about square.

    Returns:
        The figure, free of pyplot's global state: `plot_clusters(labels).savefig("clusters.png")`.

    Raises:
        ImportError: if matplotlib is missing.
        TypeError: if `labels` is no integer tensor, or a count is no integer.
        ValueError: if `labels` has another shape, a count is below 1, or there are fewer colours than labels.
    """
    check_labels(labels)
    if previous is not None:
        check_labels(previous, "previous")
        if previous.shape != labels.shape:
            raise ValueError(f"previous of shape {tuple(previous.shape)}: must be {tuple(labels.shape)}")
    check_choice("scope", scope, SCOPES)
    check_number("max_maps", max_maps, 1, integer=True)
    if columns is not None:
        check_number("columns", columns, 1, integer=True)
    alike = are_alike(labels)
    images = shown_maps(labels, 1 if alike else max_maps)
    colors = neighbor_colors(images) if colors is None else check_colors(colors, images)
    columns = min(columns or _default_columns(images), len(images))
    rows = math.ceil(len(images) / columns)
    width, height = panel_inches(labels)
    figure = new_figure("plot_clusters")
    when = None if epoch is None else f"epoch {epoch}"
    lines = [headline([title, when]), *_summary(labels, images, previous, scope)]
    figure.suptitle("\n".join(line for line in lines if line), fontsize=10)
    figure.set_size_inches(max(columns * width, 4.6) + 0.2, rows * (height + 0.17) + 0.17 * len(lines) + 0.1)
    for index, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        if index < len(images):
            draw_map(axes, images[index], colors)
            name = "all maps" if alike else f"map {index}"
            axes.set_title(f"{name} · {cluster_count(images[index])}", fontsize=7, pad=2.5)
        else:
            axes.set_axis_off()
    return figure


def _summary(labels: Tensor, images: Tensor, previous: Tensor | None, scope: str) -> list[str]:
    """Say what is shown: the number of maps, their size, the range of clusters per map, and agreement."""
    counts = [len(one.unique()) for one in labels]
    low, high = min(counts), max(counts)
    clusters = f"{low}" if low == high else f"{low} to {high}"
    size = " × ".join(str(side) for side in labels.shape[1:])
    maps = f"{len(labels):,} feature maps of {size}" if len(labels) > 1 else f"1 feature map of {size}"
    shown = f" (first {len(images)} shown)" if len(images) < len(labels) else ""
    if are_alike(labels):
        shown = ", all alike"
    slice_shown = f", slice {labels.shape[1] // 2} shown" if labels.ndim == 4 else ""
    lines = [f"{maps}{shown}, {clusters} cluster{'s' * (high != 1)} in each{slice_shown}"]
    if previous is not None:
        lines.append(f"agreement with the clusters before: {agreement(labels, previous, scope):.2f}")
    return lines


def _default_columns(images: Tensor) -> int:
    return 1 if images.shape[1] == 1 else math.ceil(math.sqrt(min(len(images), 16)))
