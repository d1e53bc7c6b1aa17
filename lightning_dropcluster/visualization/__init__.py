"""Cluster maps to look at; matplotlib is imported when one is drawn."""

from lightning_dropcluster.visualization.colors import cluster_colors, neighbor_colors
from lightning_dropcluster.visualization.history import plot_history, save_animation
from lightning_dropcluster.visualization.maps import plot_clusters
from lightning_dropcluster.visualization.overlay import plot_overlay
from lightning_dropcluster.visualization.sizes import plot_sizes

__all__ = [
    "cluster_colors",
    "neighbor_colors",
    "plot_clusters",
    "plot_history",
    "plot_overlay",
    "plot_sizes",
    "save_animation",
]
