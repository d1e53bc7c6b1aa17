"""How clusters change while the model trains: a filmstrip, or an animation."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_dropcluster.checks import check_choice, check_number
from lightning_dropcluster.learning.scopes import SCOPES
from lightning_dropcluster.visualization.colors import neighbor_colors
from lightning_dropcluster.visualization.maps import plot_clusters
from lightning_dropcluster.visualization.panels import (
    agreement,
    check_labels,
    draw_map,
    new_figure,
    panel_inches,
    shown_maps,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_history(
    history: Sequence[Tensor],
    *,
    epochs: Sequence[int] | None = None,
    title: str | None = None,
    scope: str = "map",
    max_maps: int = 4,
    max_moments: int = 8,
) -> Figure:
    """Draw the clusters of one layer at several moments as a filmstrip: a row per map, a column per moment.

    Clusters keep their labels when they are learned again, and so their colours here. The heads of the
    columns tell how far the clusters agree with those in the column before.

    Args:
        history: labels (C, *spatial) of one layer, all of the same shape, the oldest first.
        epochs: when each was made, for the heads of the columns.
        title: what the layer is called.
        scope: what was grouped, as for `DropCluster`.
        max_maps: at most this many of the first feature maps are drawn, at least 1.
        max_moments: if there are more moments, this many evenly spaced ones are drawn, the first and the last
            included; at least 2.

    Returns:
        The figure.

    Raises:
        ImportError: if matplotlib is missing.
        TypeError: if labels are no integer tensors.
        ValueError: if the shapes differ, or an argument is out of its range.
    """
    _check(history, epochs, scope, max_maps)
    check_number("max_moments", max_moments, 2, integer=True)
    kept = torch.linspace(0, len(history) - 1, min(len(history), max_moments)).round().int().tolist()
    strip = [shown_maps(history[moment], max_maps) for moment in kept]
    colors = neighbor_colors(*strip)
    width, height = panel_inches(history[0])
    figure = new_figure("plot_history")
    rows, columns = len(strip[0]), len(strip)
    figure.set_size_inches(max(columns * width, 3.2) + 0.3, rows * (height + 0.05) + 0.6)
    figure.suptitle(title or "", fontsize=10)
    grid = figure.subplots(rows, columns, squeeze=False)
    for column, moment in enumerate(kept):
        for row, image in enumerate(strip[column]):
            draw_map(grid[row, column], image, colors)
        head = f"epoch {epochs[moment]}" if epochs is not None else f"clustering {moment + 1}"
        if column:
            head += f"\nagreement {agreement(history[moment], history[kept[column - 1]], scope):.2f}"
        grid[0, column].set_title(head, fontsize=7, pad=3)
    for row in range(rows):
        grid[row, 0].set_ylabel(f"map {row}", fontsize=7)
    return figure


def save_animation(
    path: str | PathLike[str],
    history: Sequence[Tensor],
    *,
    epochs: Sequence[int] | None = None,
    title: str | None = None,
    scope: str = "map",
    max_maps: int = 16,
    seconds: float = 0.8,
) -> None:
    """Save the clusters of one layer at several moments as an animated GIF.

    Args:
        path: where to, ending in ``.gif``.
        history: labels (C, *spatial) of one layer, all of the same shape, the oldest first.
        epochs: when each was made, for the titles.
        title: what the layer is called.
        scope: what was grouped, as for `DropCluster`.
        max_maps: at most this many of the first feature maps are drawn, at least 1.
        seconds: how long each moment is shown, at least 0.02; the last one three times as long.

    Raises:
        ImportError: if matplotlib is missing.
        TypeError: if labels are no integer tensors.
        ValueError: if the shapes differ, or an argument is out of its range.
    """
    _check(history, epochs, scope, max_maps)
    check_number("seconds", seconds, 0.02)
    if Path(path).suffix.lower() != ".gif":
        raise ValueError(f"path={str(path)!r}: must end in .gif")
    colors = neighbor_colors(*(shown_maps(labels, max_maps) for labels in history))
    figures = []
    for moment, labels in enumerate(history):
        options: dict[str, Any] = {"scope": scope, "colors": colors, "max_maps": max_maps, "title": title}
        options["epoch"] = None if epochs is None else epochs[moment]
        options["previous"] = history[moment - 1] if moment else None
        figures.append(plot_clusters(labels, **options))
    from matplotlib.animation import PillowWriter

    for figure in figures:
        figure.set_size_inches(figures[-1].get_size_inches())  # the first has a line less above its maps
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # else panels move a little when they are drawn again
    frames_per_second: Any = 1 / seconds  # typed as an integer, but divided by alone
    writer = PillowWriter(fps=frames_per_second)
    with writer.saving(figures[0], Path(path), figures[0].dpi):
        for writer.fig in [*figures, *figures[-1:] * 2]:
            writer.grab_frame()


def _check(history: Sequence[Tensor], epochs: Sequence[int] | None, scope: str, max_maps: int) -> None:
    check_choice("scope", scope, SCOPES)
    check_number("max_maps", max_maps, 1, integer=True)
    if not isinstance(history, Sequence):
        kind = type(history).__name__
        raise TypeError(f"history: must be a list of one layer's labels, the oldest first, not one {kind}")
    if not history:
        raise ValueError("history: must hold the labels of at least one moment")
    for moment, labels in enumerate(history):
        check_labels(labels, f"history[{moment}]")
    shapes = {tuple(labels.shape) for labels in history}
    if len(shapes) > 1:
        raise ValueError(f"history: labels have different shapes {sorted(shapes)}")
    if epochs is not None and not hasattr(epochs, "__len__"):
        raise TypeError(f"epochs: must be a list with one for each moment, not {type(epochs).__name__}")
    if epochs is not None and len(epochs) != len(history):
        raise ValueError(f"epochs: {len(epochs)} of them for {len(history)} moments")
