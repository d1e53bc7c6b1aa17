"""What all pictures of clusters share: the figure, one panel per map, lines between clusters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_dropcluster.checks import check_integers
from lightning_dropcluster.clustering.agreement import adjusted_rand_index
from lightning_dropcluster.learning.scopes import SCOPES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_BORDERS = 128  # above this side length a cell is only a few pixels wide and borders would hide it


def new_figure(function: str) -> Figure:
    """Make a figure that pyplot does not know.

    Args:
        function: who needs it, for the error.

    Returns:
        An empty figure.

    Raises:
        ImportError: if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{function} needs matplotlib: pip install '.[plot]' in the clone") from error
    figure = Figure(layout="compressed", dpi=150)
    figure._repr_png_ = partial(_to_png, figure)  # pyright: ignore[reportAttributeAccessIssue]
    return figure


def _to_png(figure: Figure) -> bytes:
    """Let notebooks show a figure that pyplot does not know."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def render(figure: Figure) -> Tensor:
    """Draw a figure into pixels.

    Args:
        figure: any.

    Returns:
        (H, W, 3) uint8.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    return pixels.reshape(height, width, 4)[:, :, :3].contiguous()


def check_labels(labels: Any) -> None:
    """Check that something is the labels of a layer.

    Args:
        labels: what should be an integer tensor (C, *spatial) with 1 to 3 spatial axes.

    Raises:
        TypeError: if it is no integer tensor.
        ValueError: if it has another shape, or is empty.
    """
    check_integers("labels", labels)
    if labels.ndim not in (2, 3, 4) or labels.numel() == 0:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)}: must be (C, *spatial) with 1 to 3 spatial axes"
        )
    if int(labels.min()) < 0:
        raise ValueError(f"labels: must be at least 0, but the smallest is {int(labels.min())}")


def check_colors(colors: Tensor, images: Tensor) -> Tensor:
    """Check that there is a colour for every label.

    Args:
        colors: what should be (K, 3).
        images: labels to be drawn, of any shape.

    Returns:
        The colours.

    Raises:
        ValueError: if they have another shape, or there are fewer than labels.
    """
    if colors.ndim != 2 or colors.shape[1] != 3 or len(colors) <= int(images.max()):
        raise ValueError(
            f"colors of shape {tuple(colors.shape)}: must be (K, 3), K at least {int(images.max()) + 1}"
        )
    return colors


def shown_maps(labels: Tensor, max_maps: int) -> Tensor:
    """Bring labels to images.

    Args:
        labels: (C, *spatial).
        max_maps: how many of the first maps to take.

    Returns:
        (maps, H, W) int64 on the CPU: of 1-d maps one row, of 3-d maps the middle slice.
    """
    labels = labels.detach().cpu()[:max_maps].long()
    if labels.ndim == 2:
        return labels[:, None]
    return labels if labels.ndim == 3 else labels[:, labels.shape[1] // 2]


def panel_inches(labels: Tensor) -> tuple[float, float]:
    """Choose the size of a panel without its title, following the maps within bounds.

    Args:
        labels: (C, *spatial).

    Returns:
        Width and height in inches.
    """
    if labels.ndim == 2:
        return 6.0, 0.35
    height, width = labels.shape[-2:]
    side = min(max(1.7, max(height, width) / 40), 3.0)
    return side, side * min(max(height / width, 0.25), 4.0)


def draw_map(axes: Axes, image: Tensor, colors: Tensor, *, alpha: float = 1.0) -> None:
    """Draw the clusters of one map, with lines between them.

    Args:
        axes: where to.
        image: (H, W) labels.
        colors: (K, 3) colour of each label.
        alpha: how far the colours hide what lies below, in [0, 1].
    """
    aspect = "auto" if image.shape[0] == 1 else "equal"
    axes.imshow(colors[image].numpy(), interpolation="nearest", aspect=aspect, alpha=alpha)
    if max(image.shape) <= _MOST_BORDERS:
        _draw_borders(axes, image)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def cluster_count(image: Tensor) -> str:
    """Say how many clusters a map has.

    Args:
        image: labels (H, W).

    Returns:
        Such as ``"4 clusters"``.
    """
    count = len(image.unique())
    return f"{count} cluster{'s' * (count != 1)}"


def agreement(labels: Tensor, previous: Tensor, scope: str = "map") -> float:
    """Return how far two clusterings of a layer agree.

    Args:
        labels: (C, *spatial).
        previous: the same layer's labels at another time, (C, *spatial).
        scope: what was grouped, a name of `SCOPES`.

    Returns:
        Adjusted Rand index: 1 where equal, 0 by chance.
    """
    return adjusted_rand_index(*map(SCOPES[scope].problem_labels, (labels, previous)))


def headline(parts: Sequence[str | None]) -> str:
    """Join what a title says.

    Args:
        parts: texts; those that are ``None`` or empty are left out.

    Returns:
        One line.
    """
    return " · ".join(part for part in parts if part)


def _draw_borders(axes: Axes, image: Tensor) -> None:
    """Draw thin lines between neighbouring features of different clusters."""
    from matplotlib.collections import LineCollection

    row, col = (image[:, 1:] != image[:, :-1]).nonzero().T
    right_of = torch.stack([col + 0.5, row - 0.5, col + 0.5, row + 0.5], 1)
    row, col = (image[1:] != image[:-1]).nonzero().T
    below = torch.stack([col - 0.5, row + 0.5, col + 0.5, row + 0.5], 1)
    segments = torch.cat([right_of, below]).reshape(-1, 2, 2)
    width = min(0.7, 20 / max(image.shape))
    axes.add_collection(
        LineCollection(list(segments.numpy()), colors="white", linewidths=width), autolim=False
    )
