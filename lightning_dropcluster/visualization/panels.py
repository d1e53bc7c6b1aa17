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

_MOST_LABELS = 2**20  # there must be a colour for each
_MOST_BORDERS = 128  # above this side length a cell is only a few pixels wide and borders would hide it


def new_figure(function: str) -> Figure:
    """Make an empty figure that pyplot does not know; the error names the function that needs it."""
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
    """Draw a figure into pixels, (H, W, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    return pixels.reshape(height, width, 4)[:, :, :3].contiguous()


def check_labels(labels: Any, what: str = "labels") -> None:
    """Check that something is the labels of a layer, (C, *spatial) with 1 to 3 spatial axes."""
    check_integers(what, labels)
    if labels.ndim not in (2, 3, 4) or labels.numel() == 0:
        raise ValueError(
            f"{what} of shape {tuple(labels.shape)}: must be (C, *spatial) with 1 to 3 spatial axes"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= _MOST_LABELS:
        raise ValueError(f"{what} from {low} to {high}: must be in [0, {_MOST_LABELS})")


def check_colors(colors: Any, images: Tensor) -> Tensor:
    """Check that there is a colour for every label in the images."""
    if not isinstance(colors, Tensor):
        raise TypeError(f"colors: must be a tensor, not {type(colors).__name__}")
    least = int(images.max()) + 1
    if colors.ndim != 2 or colors.shape[1] != 3 or len(colors) < least:
        raise ValueError(f"colors of shape {tuple(colors.shape)}: must be (K, 3), K at least {least}")
    if not ((colors >= 0) & (colors <= 1)).all():
        raise ValueError("colors: must be in [0, 1]")
    return colors.detach().cpu().float()


def shown_maps(labels: Tensor, max_maps: int) -> Tensor:
    """Bring the first maps to images (maps, H, W): 1-d maps to one row, 3-d maps to their middle slice."""
    labels = labels.detach().cpu()[:max_maps].long()
    if labels.ndim == 2:
        return labels[:, None]
    return labels if labels.ndim == 3 else labels[:, labels.shape[1] // 2]


def are_alike(labels: Tensor) -> bool:
    """Whether several maps have the same clusters, as with one partition for all maps; one is shown then."""
    return len(labels) > 1 and bool((labels == labels[:1]).all())


def panel_inches(labels: Tensor) -> tuple[float, float]:
    """Choose width and height of a panel without its title, following the maps within bounds."""
    if labels.ndim == 2:
        return 6.0, 0.35
    height, width = labels.shape[-2:]
    side = min(max(1.7, max(height, width) / 40), 3.0)
    return side, side * min(max(height / width, 0.25), 4.0)


def draw_map(axes: Axes, image: Tensor, colors: Tensor, *, alpha: float = 1.0) -> None:
    """Draw the clusters of one map (H, W), with lines between them."""
    aspect = "auto" if image.shape[0] == 1 else "equal"
    axes.imshow(colors[image].numpy(), interpolation="nearest", aspect=aspect, alpha=alpha)
    if max(image.shape) <= _MOST_BORDERS:
        _draw_borders(axes, image)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def cluster_count(image: Tensor) -> str:
    """Say how many clusters a map has, such as ``"4 clusters"``."""
    count = len(image.unique())
    return f"{count} cluster{'s' * (count != 1)}"


def agreement(labels: Tensor, previous: Tensor, scope: str) -> float:
    """Return the adjusted Rand index of two clusterings of a layer: 1 where equal, 0 by chance."""
    return adjusted_rand_index(*map(SCOPES[scope].problem_labels, (labels, previous)))


def headline(parts: Sequence[str | None]) -> str:
    """Join what a title says; parts that are ``None`` or empty are left out."""
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
