"""Clusterers to compare: each from a seed to labels (B, F)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import faiss
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor

from benchmarks.cost.activations import CLUSTER_SIZE, Activations, sketch_of
from lightning_dropcluster.clustering import FaissKMeans, TorchKMeans, Ward
from lightning_dropcluster.clustering.protocol import Clusterer
from lightning_dropcluster.clustering.tiles import tile
from lightning_dropcluster.learning.reclustering import cluster_share
from lightning_dropcluster.learning.scopes import Grouping
from lightning_dropcluster.learning.sketch import Sketch

SKLEARN = "scikit-learn KMeans, exact profiles"
MAX_ITER = FaissKMeans().max_iter
Fit = Callable[[int], Tensor]


def recluster(
    sketches: Mapping[str, Sketch], old: Mapping[str, Tensor], clusterer: Clusterer
) -> dict[str, Tensor]:
    """Do all that the callback does between merged sketches and labels."""
    (scope,) = {sketch.scope.name for sketch in sketches.values()}
    return cluster_share(sketches, old, clusterer, Grouping(scope, cluster_size=CLUSTER_SIZE))


@dataclass
class OnSketches:
    """Our clusterers on the sketches of one layer, which are made beforehand: gathering is training's cost.

    Args:
        acts: the layer's outputs.
        sketch_dim: columns.
        seeds: how many; each has a sketch of its own.
        scope: what is clustered, see `DropCluster`.
    """

    acts: Activations
    sketch_dim: int
    seeds: int
    scope: str = "map"

    def __post_init__(self) -> None:
        sketch, seeds = partial(sketch_of, sketch_dim=self.sketch_dim, scope=self.scope), range(self.seeds)
        self.sketches = [{"": sketch(self.acts.now, seed=seed, window=1)} for seed in seeds]
        earlier = [{"": sketch(self.acts.before, seed=seed)} for seed in seeds]
        self.old = [recluster(sketch, {}, FaissKMeans(seed=seed)) for seed, sketch in enumerate(earlier)]

    def cold(self, seed: int) -> Tensor:
        return recluster(self.sketches[seed], {}, FaissKMeans(seed=seed))[""]

    def warm(self, seed: int) -> Tensor:
        return recluster(self.sketches[seed], self.old[seed], FaissKMeans(seed=seed))[""]

    def by_torch(self, seed: int) -> Tensor:
        return recluster(self.sketches[seed], {}, TorchKMeans(seed=seed))[""]

    def by_sklearn(self, seed: int) -> Tensor:
        return by_sklearn(self.sketches[seed][""].profiles(), self.acts.num_clusters(self.scope), seed)

    def in_cpu_pool(self, seed: int) -> Tensor:
        sketch = self.sketches[seed][""]
        profiles, grid = sketch.profiles().cpu(), sketch.scope.grid(sketch.shape)
        labels = FaissKMeans(seed=seed).fit(profiles, self.acts.num_clusters(self.scope), grid=grid)
        return labels.to(self.acts.now.device)

    def by_triton(self, seed: int) -> Tensor:
        from flash_kmeans import batch_kmeans_Euclid  # pyright: ignore[reportMissingImports]

        torch.manual_seed(seed)
        profiles = self.sketches[seed][""].profiles()
        return batch_kmeans_Euclid(profiles, self.acts.num_clusters(self.scope), max_iters=MAX_ITER)[0].long()

    def cases(self) -> dict[str, Fit]:
        """Name what can run on the device of the activations."""
        cases: dict[str, Fit] = {
            "FaissKMeans, sketch": self.cold,
            "FaissKMeans, sketch, warm": self.warm,
            "TorchKMeans, sketch": self.by_torch,
            "scikit-learn KMeans, sketch": self.by_sklearn,
        }
        if self.acts.now.is_cuda:
            cases["FaissKMeans in the CPU pool, sketch"] = self.in_cpu_pool
            if importlib.util.find_spec("flash_kmeans") is not None:
                cases["flash-kmeans, sketch"] = self.by_triton
        return cases


def on_exact_profiles(profiles: Tensor, num_clusters: int) -> dict[str, Fit]:
    """Cluster exact profiles (B, F, N) on the host with all cores, one map after the other."""
    return {
        SKLEARN: lambda seed: by_sklearn(profiles, num_clusters, seed),
        "faiss.Kmeans, exact profiles": lambda seed: by_faiss(profiles, num_clusters, seed),
    }


def by_sklearn(profiles: Tensor, num_clusters: int, seed: int) -> Tensor:
    """scikit-learn's k-means, one start from random items."""
    options: dict[str, Any] = {"init": "random", "n_init": 1, "max_iter": MAX_ITER, "random_state": seed}
    kmeans = KMeans(num_clusters, **options)
    return torch.stack([torch.from_numpy(kmeans.fit_predict(x)).long() for x in profiles.cpu().numpy()])


def by_faiss(profiles: Tensor, num_clusters: int, seed: int) -> Tensor:
    """FAISS' k-means as its users call it."""
    labels = []
    for points in profiles.cpu().numpy():
        kmeans = faiss.Kmeans(
            points.shape[1],
            num_clusters,
            niter=MAX_ITER,
            seed=seed,
            min_points_per_centroid=1,
            max_points_per_centroid=len(points),
        )
        kmeans.train(points)
        labels.append(torch.from_numpy(kmeans.index.search(points, 1)[1][:, 0]))
    return torch.stack(labels)


def by_flash(sketches: Mapping[str, Sketch]) -> dict[str, Tensor]:
    """Let flash-kmeans iterate from the means of the tiles where our cold start begins."""
    # Not from the package: where its kernels cannot be imported it takes torch's own operations instead.
    from flash_kmeans.kmeans_triton_impl import (  # pyright: ignore[reportMissingImports]
        batch_kmeans_Euclid,
    )

    found = {}
    for name, sketch in sketches.items():
        profiles, count = sketch.profiles(), Grouping(cluster_size=CLUSTER_SIZE).clusters_for(sketch.shape)
        tiles = F.one_hot(tile(sketch.shape[1:], count).to(profiles.device)).float()
        means = (tiles / tiles.sum(0)).T @ profiles
        found[name] = batch_kmeans_Euclid(profiles, count, MAX_ITER, init_centroids=means)[0]
    return found


def by_ward(profiles: Tensor, acts: Activations) -> dict[str, Fit]:
    """Ward's agglomeration, which takes no seed."""
    return {"Ward, exact profiles": lambda seed: Ward().fit(profiles, acts.num_clusters(), grid=acts.grid)}
