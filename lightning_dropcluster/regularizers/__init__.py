"""Regularisers: modules x -> x that act in training and are the identity in eval mode."""

from lightning_dropcluster.regularizers.cluster_drop import ClusterDrop
from lightning_dropcluster.regularizers.gathering import Gathering

__all__ = ["ClusterDrop", "Gathering"]
