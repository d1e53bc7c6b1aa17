"""DropCluster for PyTorch Lightning: drop learned clusters of conv features with one callback."""

from importlib.metadata import version

from lightning_dropcluster.callbacks import DropCluster, StructuredDropout
from lightning_dropcluster.clustering import Clusterer, FaissKMeans, ReNA, TorchKMeans, Ward
from lightning_dropcluster.inspection import preview
from lightning_dropcluster.layers import select_layers
from lightning_dropcluster.methods import (
    REGULARIZERS,
    AdvancedDropout,
    ChannelCorrDrop,
    ClusterDrop,
    CorrDrop,
    DropBlock,
    Dropout,
    DropRegularizer,
    ProbDropBlock,
    RBlock,
    Regularizer,
    SpatialDropout,
)
from lightning_dropcluster.visualization import (
    plot_clusters,
    plot_history,
    plot_overlay,
    plot_sizes,
    save_animation,
)

__version__ = version("lightning_dropcluster")

__all__ = [
    "REGULARIZERS",
    "AdvancedDropout",
    "ChannelCorrDrop",
    "ClusterDrop",
    "Clusterer",
    "CorrDrop",
    "DropBlock",
    "DropCluster",
    "DropRegularizer",
    "Dropout",
    "FaissKMeans",
    "ProbDropBlock",
    "RBlock",
    "ReNA",
    "Regularizer",
    "SpatialDropout",
    "StructuredDropout",
    "TorchKMeans",
    "Ward",
    "plot_clusters",
    "plot_history",
    "plot_overlay",
    "plot_sizes",
    "preview",
    "save_animation",
    "select_layers",
]
