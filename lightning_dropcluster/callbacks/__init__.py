"""The callbacks: when things happen."""

from lightning_dropcluster.callbacks.drop_cluster import DropCluster

__all__ = ["DropCluster"]
