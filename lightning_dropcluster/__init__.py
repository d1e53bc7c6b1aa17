"""DropCluster for PyTorch Lightning: drop learned clusters of conv features with one callback."""

from importlib.metadata import version

from lightning_dropcluster.callbacks import DropCluster, StructuredDropout
from lightning_dropcluster.clustering import Clusterer, FaissKMeans, ReNA, TorchKMeans, Ward
from lightning_dropcluster.layers import select_layers
from lightning_dropcluster.preview import preview
from lightning_dropcluster.regularizers import (
    REGULARIZERS,
    ClusterDrop,
    DropBlock,
    Dropout,
    Regularizer,
    SpatialDropout,
)
from lightning_dropcluster.visualization import plot_clusters

__version__ = version("lightning_dropcluster")

__all__ = [
    "REGULARIZERS",
    "ClusterDrop",
    "Clusterer",
    "DropBlock",
    "DropCluster",
    "Dropout",
    "FaissKMeans",
    "ReNA",
    "Regularizer",
    "SpatialDropout",
    "StructuredDropout",
    "TorchKMeans",
    "Ward",
    "plot_clusters",
    "preview",
    "select_layers",
]
