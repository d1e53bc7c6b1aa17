"""Clusterers: from response profiles to labels."""

from lightning_dropcluster.clustering.agreement import adjusted_rand_index
from lightning_dropcluster.clustering.connected import ReNA, Ward
from lightning_dropcluster.clustering.faiss_kmeans import FaissKMeans
from lightning_dropcluster.clustering.protocol import Clusterer
from lightning_dropcluster.clustering.torch_kmeans import TorchKMeans

__all__ = ["Clusterer", "FaissKMeans", "ReNA", "TorchKMeans", "Ward", "adjusted_rand_index"]
