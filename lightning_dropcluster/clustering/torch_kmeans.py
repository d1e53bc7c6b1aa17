"""Lloyd's k-means on torch alone, many problems at once: the reference, and the loop FAISS uses on a GPU."""

import math

import torch
from torch import Tensor

from lightning_dropcluster.checks import MAX_INT, check_number
from lightning_dropcluster.clustering.centroids import add_up, assign_nearest
from lightning_dropcluster.clustering.protocol import is_alive
from lightning_dropcluster.clustering.repair import repair
from lightning_dropcluster.clustering.tiles import tile

_FAR = 1e4  # profiles have unit length, so nothing is ever assigned to a centroid out here
_FEW = 6  # items in a cluster below which each weighs so much in their mean that none would leave it


class TorchKMeans:
    """K-means by Lloyd's iterations in torch, all problems of a block together.

    A cold start is from the means of the grid's tiles (see `tile`), from a random item of each where tiles
    have fewer than 6 items, and from random items where there is no grid. A warm start needs few iterations:
    one from the labels of an earlier window already gives better clusters than a whole cold start
    (benchmarks/README.md).

    Args:
        max_iter: iterations at most from a cold start.
        warm_iter: iterations at most from a warm start.
        tolerance: stop when an iteration lowers the inertia by less than this share of it.
        min_share: clusters below this share of the mean size are merged away, see `repair`.
        max_share: clusters above this share of the mean size are split, see `repair`; at least 2,
            infinity for no bound.
        seed: for the items that a random start takes; the same seed and profiles give the same labels.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if it is out of range.

    Example:
        >>> TorchKMeans().fit(torch.eye(4)[None], num_clusters=4).unique().tolist()
        [0, 1, 2, 3]
    """

    def __init__(
        self,
        *,
        max_iter: int = 25,
        warm_iter: int = 1,
        tolerance: float = 5e-3,
        min_share: float = 0.25,
        max_share: float = 4.0,
        seed: int = 0,
    ) -> None:
        self.max_iter = check_number("max_iter", max_iter, 1, MAX_INT, integer=True)
        self.warm_iter = check_number("warm_iter", warm_iter, 1, MAX_INT, integer=True)
        self.tolerance = check_number("tolerance", tolerance, 0)
        self.min_share = check_number("min_share", min_share, 0, 0.5)
        self.max_share = max_share if max_share == math.inf else check_number("max_share", max_share, 2)
        self.seed = check_number("seed", seed, 0, MAX_INT, integer=True)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"

    def fit(
        self,
        profiles: Tensor,
        num_clusters: int,
        init_labels: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Group the items of B independent problems; see `Clusterer.fit`.

        Args:
            profiles: (B, F, D) float32.
            num_clusters: K.
            init_labels: (B, F) for a warm start: the first centroids are the means of these clusters.
            grid: whose tiles a cold start takes.

        Returns:
            int64 labels (B, F) on the profiles' device.
        """
        alive = is_alive(profiles)
        start, counted, max_iter = self._start(alive, num_clusters, init_labels, grid)
        means = _starting_centroids(profiles, alive, num_clusters, start, counted, self.seed)
        points, lives, going = profiles, alive, torch.arange(len(profiles), device=profiles.device)
        labels, distances = self._assign(points, means)
        inertia, found = (distances * lives).sum(1), torch.empty_like(labels)
        for _ in range(max_iter):
            means = _update(points, lives, labels, means)
            labels, distances = self._assign(points, means)
            found[going] = labels
            previous, inertia = inertia, (distances * lives).sum(1)
            # No problem depends on what it shares a block with: those that are done are left out. The only
            # values of an iteration that the host waits for are the numbers of the others.
            gains = (previous - inertia > self.tolerance * previous).nonzero().flatten()
            if not len(gains):
                break
            if len(gains) < len(going):
                kept = (points, lives, going, labels, means, inertia)
                points, lives, going, labels, means, inertia = (tensor[gains] for tensor in kept)
        return repair(profiles, alive, found, num_clusters, self.min_share, self.max_share)

    def _assign(self, points: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
        """Assign points to their nearest centroids, see `assign_nearest`."""
        return assign_nearest(points, means)

    def _start(
        self, alive: Tensor, num_clusters: int, init_labels: Tensor | None, grid: tuple[int, ...] | None
    ) -> tuple[Tensor | None, Tensor, int]:
        """Return the labels (B, F) to start from, if any, which items count, and the iterations at most."""
        if init_labels is not None:
            return init_labels.to(alive.device, torch.int64), alive, self.warm_iter
        if grid is None:
            return None, alive, self.max_iter
        items = alive.shape[1]
        tiles = tile(grid, min(num_clusters, items)).to(alive.device).expand(alive.shape)
        counted = _one_of_each(tiles, alive, self.seed) if items < _FEW * num_clusters else alive
        return tiles, counted, self.max_iter


def _one_of_each(labels: Tensor, alive: Tensor, seed: int) -> Tensor:
    """Mark one random live item of each cluster, (B, F)."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.randperm(labels.shape[1], generator=generator).to(labels.device)
    turns = torch.where(alive, turn, len(turn))
    first = turns.new_full(labels.shape, len(turn)).scatter_reduce(1, labels, turns, "amin")
    return alive & (turns == first.gather(1, labels))


def _starting_centroids(
    profiles: Tensor,
    alive: Tensor,
    num_clusters: int,
    init_labels: Tensor | None,
    counted: Tensor,
    seed: int,
) -> Tensor:
    """Take random live points, or the means of what counts in the old clusters where those have members."""
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(profiles.shape[1], generator=generator).to(profiles.device)
    order = (score + 2.0 * ~alive).argsort(dim=1)[:, :num_clusters]
    means = profiles.gather(1, order[:, :, None].expand(-1, -1, profiles.shape[2]))
    means = torch.where(alive.gather(1, order)[:, :, None], means, _FAR)
    if init_labels is None:
        return means
    return _update(profiles, counted, init_labels, means)


def _update(profiles: Tensor, alive: Tensor, labels: Tensor, means: Tensor) -> Tensor:
    """Average the live points of each cluster; clusters without any keep their centroid."""
    sums, sizes = add_up(profiles, alive, labels, means.shape[1])
    return torch.where(sizes[:, :, None] > 0, sums / sizes.clamp(min=1)[:, :, None], means)
