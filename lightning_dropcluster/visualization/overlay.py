"""Clusters drawn over an input image: which parts of it are dropped together."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_dropcluster.checks import check_number, describe
from lightning_dropcluster.visualization.colors import neighbor_colors
from lightning_dropcluster.visualization.panels import (
    are_alike,
    check_colors,
    check_labels,
    cluster_count,
    draw_map,
    new_figure,
    panel_inches,
    shown_maps,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PALEST = 0.3  # how bright black is under the clusters


def plot_overlay(
    labels: Tensor,
    image: Tensor,
    *,
    title: str | None = None,
    colors: Tensor | None = None,
    max_maps: int = 7,
    alpha: float = 0.45,
) -> Figure:
    """Draw the clusters of a layer over an input image.

    Args:
        labels: (C, H, W) integer tensor of one layer.
        image: (3, h, w), (1, h, w) or (h, w): an input of the model, of any range; it is scaled to the
            brightness of the picture.
        title: what the figure is called.
        colors: (K, 3) colour of each label, `visualization.neighbor_colors` where it is ``None``.
        max_maps: at most this many of the first feature maps are drawn, at least 1.
        alpha: how far the colours hide the image, in [0, 1].

    Returns:
        The figure: the image first, then a panel per map, or one where all are alike.

    Raises:
        ImportError: if matplotlib is missing.
        TypeError: if `labels` is no integer tensor, or `image` no tensor.
        ValueError: if `labels` or `image` has another shape, an argument is out of its range, or there are
            fewer colours than labels.
    """
    check_labels(labels)
    check_number("max_maps", max_maps, 1, integer=True)
    check_number("alpha", alpha, 0, 1)
    if labels.ndim != 3:
        raise ValueError(f"labels of shape {tuple(labels.shape)}: only 2-d maps lie over an image")
    alike, picture = are_alike(labels), _picture(image)
    maps = shown_maps(labels, 1 if alike else max_maps)
    colors = neighbor_colors(maps) if colors is None else check_colors(colors, maps)
    columns = min(4, len(maps) + 1)
    rows = math.ceil((len(maps) + 1) / columns)
    width, height = panel_inches(labels)
    figure = new_figure("plot_overlay")
    figure.set_size_inches(columns * width + 0.2, rows * (height + 0.17) + 0.25)
    figure.suptitle(title or "", fontsize=10)
    extent = (-0.5, labels.shape[2] - 0.5, labels.shape[1] - 0.5, -0.5)
    for index, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        if index > len(maps):
            axes.set_axis_off()
            continue
        # Under the clusters a pale grey: colours stay what they are, and dark parts show them too.
        below = _PALEST + (1.0 - _PALEST) * picture.mean(2, keepdim=True).expand_as(picture)
        axes.imshow((below if index else picture).numpy(), extent=extent, aspect="equal")
        axes.set(xticks=[], yticks=[])
        if index:
            draw_map(axes, maps[index - 1], colors, alpha=alpha)
        which = "all maps" if alike else f"map {index - 1}"
        axes.set_title(
            f"{which} · {cluster_count(maps[index - 1])}" if index else "input", fontsize=7, pad=2.5
        )
    return figure


def _picture(image: Tensor) -> Tensor:
    """Bring an input to (h, w, 3) in [0, 1]."""
    if not isinstance(image, Tensor) or image.is_complex():
        raise TypeError(f"image: must be a tensor of real numbers, not {describe(image)}")
    image = image.detach().cpu().float()
    image = image[None] if image.ndim == 2 else image
    if image.ndim != 3 or image.shape[0] not in (1, 3) or not image.numel():
        raise ValueError(f"image of shape {tuple(image.shape)}: must be (3, h, w), (1, h, w) or (h, w)")
    if not image.isfinite().all():
        raise ValueError("image: must be finite")
    low, high = image.aminmax()
    scaled = (image - low) / (high - low).clamp(min=1e-12)
    return scaled.expand(3, *image.shape[1:]).permute(1, 2, 0)
