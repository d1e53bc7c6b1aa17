"""The callbacks: when things happen."""

from lightning_dropcluster.callbacks.drop_cluster import DropCluster
from lightning_dropcluster.callbacks.structured_dropout import StructuredDropout

__all__ = ["DropCluster", "StructuredDropout"]
