"""Regularisers: modules x -> x that act in training and are the identity in eval mode."""

from torch import nn

from lightning_dropcluster.regularizers.cluster_drop import ClusterDrop
from lightning_dropcluster.regularizers.drop_block import DropBlock
from lightning_dropcluster.regularizers.dropout import Dropout, SpatialDropout
from lightning_dropcluster.regularizers.gathering import Gathering
from lightning_dropcluster.regularizers.regularizer import Regularizer

REGULARIZERS: dict[str, type[nn.Module]] = {
    "cluster_drop": ClusterDrop,
    "drop_block": DropBlock,
    "dropout": Dropout,
    "spatial_dropout": SpatialDropout,
}
"""Every regulariser by name."""

__all__ = [
    "REGULARIZERS",
    "ClusterDrop",
    "DropBlock",
    "Dropout",
    "Gathering",
    "Regularizer",
    "SpatialDropout",
]
