"""K-means by FAISS: a pool over the problems on a CPU, assignments on the device on a GPU."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_dropcluster.clustering.centroids import add_up
from lightning_dropcluster.clustering.faiss_search import FaissLloyd
from lightning_dropcluster.clustering.protocol import is_alive
from lightning_dropcluster.clustering.repair import repair

_PARTS = 8  # of the work for each thread of the pool
Points = NDArray[np.float32]
Labels = NDArray[np.int64]


class FaissKMeans(FaissLloyd):
    """K-means by FAISS, on the device of the profiles; for settings see `TorchKMeans`.

    On a CPU each problem is one ``faiss.Kmeans`` with one FAISS thread, and a pool works on as many problems
    at a time as torch has threads. On a GPU FAISS assigns the points of many problems in one search on the
    device, and torch averages.

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
        """Group the items of B independent problems, every value finite; see `TorchKMeans.fit`."""
        if profiles.is_cuda and faiss.get_num_gpus() > 0:
            return super().fit(profiles, num_clusters, init_labels, grid)
        host = profiles.detach().cpu().float().contiguous()
        alive, found = is_alive(host), torch.zeros(host.shape[:2], dtype=torch.int64)
        points, lives, labels = host.numpy(), alive.numpy(), found.numpy()
        start, counted, max_iter = self._start(alive, num_clusters, init_labels, grid)
        means = None if start is None else self._means(host, alive, start, counted, num_clusters)

        def fit_some(problems: NDArray[np.int64]) -> None:
            for index in problems:
                live = lives[index]
                some = points[index] if live.all() else points[index, live]
                first = None if means is None else means[index]
                labels[index, live] = self._fit_one(some, num_clusters, max_iter, first)

        threads = torch.get_num_threads()
        workers = min(threads, len(points))
        # FAISS counts OpenMP threads per thread, so the pool's settings end with its threads.
        set_threads = partial(faiss.omp_set_num_threads, threads // workers)
        with ThreadPoolExecutor(workers, initializer=set_threads) as pool:
            # In a few parts: handing small problems over one by one takes as long as solving them.
            list(pool.map(fit_some, np.array_split(np.arange(len(points)), _PARTS * workers)))
        return repair(host, alive, found, num_clusters, self.min_share, self.max_share).to(profiles.device)

    def _means(
        self, points: Tensor, alive: Tensor, labels: Tensor, counted: Tensor, num_clusters: int
    ) -> Points:
        """Average what counts in the clusters to start from, (B, K, D); random points stand in for none."""
        sums, sizes = add_up(points, counted, labels, num_clusters)
        means = (sums / sizes[:, :, None]).numpy()
        for index in ((sizes == 0).any(1) & (alive.sum(1) > num_clusters)).nonzero().flatten().tolist():
            empty, live = (sizes[index] == 0).numpy(), points[index, alive[index]].numpy()
            rng = np.random.default_rng(self.seed)  # anew, so that problems do not depend on each other
            means[index, empty] = rng.choice(live, empty.sum(), replace=False)
        return means

    def _fit_one(self, points: Points, num_clusters: int, max_iter: int, means: Points | None) -> Labels:
        """Cluster the live items of one problem."""
        if len(points) <= num_clusters:
            return np.arange(len(points))
        kmeans = faiss.Kmeans(
            points.shape[1],
            num_clusters,
            niter=max_iter,
            seed=self.seed,
            early_stop_threshold=self.tolerance,
            min_points_per_centroid=1,
            max_points_per_centroid=max(256, -(-len(points) // num_clusters)),
        )
        kmeans.train(points, init_centroids=means)
        _, nearest = kmeans.index.search(points, 1)
        return nearest[:, 0]
