"""How large the clusters of a layer are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_dropcluster.checks import check_choice
from lightning_dropcluster.learning.scopes import SCOPES
from lightning_dropcluster.methods.dropping.label_tables import cluster_sizes
from lightning_dropcluster.visualization.panels import check_labels, headline, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_BARS = 40


def cluster_sizes_of(labels: Tensor, scope: str = "map") -> Tensor:
    """Count the members of every cluster, of all problems of the scope one after the other; none is 0.

    Example:
        >>> cluster_sizes_of(torch.tensor([[[0, 0, 1]], [[0, 0, 0]]]))
        tensor([2, 1, 3])
    """
    rows = SCOPES[scope].problem_labels(labels.detach().cpu())
    sizes = cluster_sizes(rows, len(rows), int(rows.max()) + 1)
    return sizes[sizes > 0].long()


def plot_sizes(labels: Tensor, *, title: str | None = None, scope: str = "map") -> Figure:
    """Draw a histogram of how many members the clusters of a layer have.

    Large clusters make dropping uneven: the dropped share has the variance p (1 - p) times the sum of the
    squared cluster shares.

    Args:
        labels: (C, *spatial) integer tensor of one layer.
        title: what the layer is called.
        scope: what was grouped, as for `DropCluster`.

    Returns:
        The figure.

    Raises:
        ImportError: if matplotlib is missing.
        TypeError: if `labels` is no integer tensor.
        ValueError: if `labels` has another shape, or does not fit the scope.
    """
    check_labels(labels)
    check_choice("scope", scope, SCOPES)
    sizes = cluster_sizes_of(labels, scope)
    member = {"position": "position", "channel": "map"}.get(scope, "feature")
    figure = new_figure("plot_sizes")
    figure.set_size_inches(5.2, 3.4)
    axes = figure.subplots()
    step = max(1, -(-int(sizes.max()) // _MOST_BARS))
    edges = torch.arange(0.5, int(sizes.max()) + step + 0.5, step).tolist()
    axes.hist(sizes.tolist(), bins=edges, color="#4c78a8", edgecolor="white", linewidth=0.5)
    mean = sizes.double().mean().item()
    axes.axvline(mean, color="#e45756", linewidth=1.2, label=f"mean {mean:.1f}")
    axes.set_xlabel(f"{member}s in a cluster")
    axes.set_ylabel("clusters")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    count = f"{len(sizes):,} cluster{'s' * (len(sizes) != 1)}"
    spread = f"sizes {int(sizes.min())} to {int(sizes.max())}, median {int(sizes.median())}"
    axes.set_title("\n".join(filter(None, (title, headline([count, spread])))), fontsize=9)
    return figure
