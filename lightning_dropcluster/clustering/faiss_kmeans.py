"""K-means by FAISS: a pool over the problems on a CPU, assignments on the device on a GPU."""

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from threading import Lock

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_dropcluster.clustering.protocol import is_alive
from lightning_dropcluster.clustering.repair import Labels, Points, centroids, repair
from lightning_dropcluster.clustering.torch_kmeans import TorchKMeans

_PARTS = 8  # of the work for each thread of the pool
_GPU_LOCK = Lock()
_GPU_SCRATCH = 128 * 2**20  # bytes; FAISS would take 1.5 GiB outside torch's allocator


class FaissKMeans(TorchKMeans):
    """K-means by FAISS, on the device of the profiles; for settings see `TorchKMeans`.

    On a CPU each problem is one ``faiss.Kmeans`` with one FAISS thread, and a pool works on as many problems
    at a time as torch has threads. On a GPU FAISS assigns all points on the device and torch averages.

    Example:
        >>> FaissKMeans().fit(torch.eye(4)[None], num_clusters=4).unique().tolist()
        [0, 1, 2, 3]
    """

    def fit(
        self,
        profiles: Tensor,
        num_clusters: int,
        init_labels: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Group the items of B independent problems; see `Clusterer.fit`.

        Args:
            profiles: (B, F, D) float32, every value finite.
            num_clusters: K.
            init_labels: (B, F) for a warm start: the first centroids are the means of these clusters.
            grid: whose tiles a cold start takes.

        Returns:
            int64 labels (B, F) on the profiles' device.
        """
        if profiles.is_cuda and faiss.get_num_gpus() > 0:
            return super().fit(profiles, num_clusters, init_labels, grid)
        start, max_iter = self._start(profiles, num_clusters, init_labels, grid)
        host = profiles.detach().cpu().float().contiguous()
        points, alive = host.numpy(), is_alive(host).numpy()
        old = None if start is None else start.cpu().numpy()
        labels = np.zeros(points.shape[:2], dtype=np.int64)

        def fit_some(problems: NDArray[np.int64]) -> None:
            for index in problems:
                first = None if old is None else old[index]
                labels[index] = self._fit_one(num_clusters, max_iter, points[index], alive[index], first)

        threads = torch.get_num_threads()
        workers = min(threads, len(points))
        # FAISS counts OpenMP threads per thread, so the pool's settings end with its threads.
        set_threads = partial(faiss.omp_set_num_threads, max(1, threads // workers))
        with ThreadPoolExecutor(workers, initializer=set_threads) as pool:
            # In a few parts: handing small problems over one by one takes as long as solving them.
            list(pool.map(fit_some, np.array_split(np.arange(len(points)), _PARTS * workers)))
        return torch.from_numpy(labels).to(profiles.device)

    def _assign(self, points: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
        return assign_on_gpu(points, means)

    def _fit_one(
        self,
        num_clusters: int,
        max_iter: int,
        points: Points,
        alive: NDArray[np.bool_],
        old: NDArray[np.int64] | None,
    ) -> Labels:
        """Cluster the live items of one problem; dead ones get label 0."""
        labels = np.zeros(len(points), dtype=np.int64)
        if alive.any():
            live = points if alive.all() else np.ascontiguousarray(points[alive])
            count = min(num_clusters, len(live))
            start = None if old is None else self._centroids(live, old[alive], num_clusters, count)
            found = self._k_means(live, count, max_iter, start)
            labels[alive] = repair(live, found, count, self.min_share, self.max_share)
        return labels

    def _k_means(self, points: Points, num_clusters: int, max_iter: int, start: Points | None) -> Labels:
        kmeans = faiss.Kmeans(
            points.shape[1],
            num_clusters,
            niter=max_iter,
            seed=self.seed,
            early_stop_threshold=self.tolerance,
            min_points_per_centroid=1,
            max_points_per_centroid=max(256, -(-len(points) // num_clusters)),
        )
        kmeans.train(points, init_centroids=start)
        _, nearest = kmeans.index.search(points, 1)
        return nearest[:, 0]

    def _centroids(self, points: Points, old: Labels, num_clusters: int, count: int) -> Points:
        """Average the clusters to start from; random points stand in for empty ones."""
        means, sizes = centroids(points, old, num_clusters)
        used = np.flatnonzero(sizes)[:count]
        means = means[used]
        if len(used) < count:
            rng = np.random.default_rng(self.seed)
            means = np.concatenate([means, points[rng.permutation(len(points))[: count - len(used)]]])
        return np.ascontiguousarray(means)


def assign_on_gpu(points: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """Let FAISS do on the GPU what `assign_nearest` does."""
    resources, device = _gpu_resources(points.device.index), points.device.index
    with _GPU_LOCK, torch.cuda.device(points.device):
        found = [
            faiss.knn_gpu(resources, some, centres, 1, device=device)
            for some, centres in zip(points.contiguous(), means.contiguous(), strict=True)
        ]
    return torch.stack([n[:, 0] for _, n in found]), torch.stack([d[:, 0] for d, _ in found])


@lru_cache
def _gpu_resources(device: int) -> "faiss.StandardGpuResources":
    """One set of FAISS resources per process and device, for one thread at a time."""
    import faiss.contrib.torch_utils  # lets knn_gpu take tensors, on torch's current stream

    with torch.cuda.device(device):
        resources = faiss.StandardGpuResources()
        resources.setTempMemory(_GPU_SCRATCH)
    return resources
