"""Repair of k-means labels: no cluster empty, none tiny, none huge; many problems at once on their device."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dropcluster.clustering.centroids import add_up, assign_nearest

_BLOCK = 2**18  # items that are repaired at a time, to bound memory
_BLOCK_ON_GPU = 2**20  # where a round takes as long for few
_COPIES = 1e-10  # squared distance from their mean up to which points are copies of one
_FAR = 1e15


def repair(
    points: Tensor,
    alive: Tensor,
    labels: Tensor,
    num_clusters: int,
    min_share: float,
    max_share: float = math.inf,
) -> Tensor:
    """Merge small clusters of live items into their nearest neighbours and split large ones in two.

    The scheme is that of Online Deep Clustering (https://arxiv.org/abs/2006.10645): for each slot that
    merging leaves empty the largest cluster is split. It splits by 2-means; we cut in equal halves along the
    longest direction, which cannot fail. The upper bound is against a cluster that swallows the others, as is
    Hard Regularization (https://arxiv.org/abs/2303.16521), which adds a cost for size to each assignment; we
    go on splitting, and the smallest cluster makes room each time.

    Shares are of the mean size: ``min_share`` at most 0.5, ``max_share`` at least 2. Every cluster has a
    member in the end, unless there are fewer distinct points than clusters; copies of one point then stay
    together. Takes points (B, F, D), whether they live, and labels, both (B, F); dead items get label 0.
    """
    labels, live = labels.masked_fill(~alive, 0), alive.sum(1)
    mean_size = live.float() / num_clusters  # Apple's GPUs know no double
    least, most = (min_share * mean_size).floor().clamp(min=1.0), max_share * mean_size
    sizes = labels.new_zeros(len(labels), num_clusters).scatter_add_(1, labels, alive.to(labels.dtype))
    needy = ((live > 0) & ((sizes.amin(1) < least) | (sizes.amax(1) > most))).nonzero().flatten()
    block = _BLOCK_ON_GPU if points.is_cuda else _BLOCK
    for some in needy.split(max(1, block // points.shape[1])) if len(needy) else ():
        problems = _Problems(points[some], alive[some], labels[some], num_clusters)
        problems.fill(least[some])
        problems.bound(most[some])
        labels[some] = problems.labels.masked_fill(~alive[some], 0)
    return labels


class _Problems:
    """Some problems under repair; sums and sizes of clusters follow the labels, dead items have label K.

    Items are listed in a row for each problem, filled up with F, the index of an item that is not there.
    """

    def __init__(self, points: Tensor, alive: Tensor, labels: Tensor, num_clusters: int) -> None:
        self.points, self.alive, self.num_clusters = points, alive, num_clusters
        self.items = points.shape[1]
        self._take(labels)

    @property
    def labels(self) -> Tensor:
        """Labels (B, F)."""
        return self._padded[:, :-1]

    def fill(self, least: Tensor) -> None:
        """Merge clusters below a size (B,), and split the largest for each slot left empty.

        Where no more points are distinct than there are clusters, each becomes a cluster.
        """
        few = self._tell_copies_apart((self.sizes == 0).any(1).nonzero().flatten())
        self._merge_small((self.sizes < least[:, None]) & ~few[:, None])
        self._split_while(
            lambda size: (self.sizes == 0).any(1) & (size > 1) & ~few,
            lambda rows: (self.sizes[rows] == 0).int().argmax(1),
        )

    def bound(self, most: Tensor) -> None:
        """Split clusters above a size (B,); each time the smallest joins another and frees its slot.

        The sum of the squared sizes falls every time, since the bound is at least twice the mean: so this
        ends.
        """
        self._split_while(lambda size: size > most, lambda rows: self._free_smallest(rows, most[rows]))

    def _take(self, labels: Tensor) -> None:
        self._padded = F.pad(labels.masked_fill(~self.alive, self.num_clusters), (0, 1))
        self.sums, self.sizes = add_up(self.points, self.alive, labels, self.num_clusters)

    def _tell_copies_apart(self, rows: Tensor) -> Tensor:
        """Make each distinct point a cluster in those of the problems that have few; say which they are."""
        few = self.alive.new_zeros(len(self.alive))
        if len(rows):
            numbers = _number_distinct(self.points[rows], self.alive[rows])
            few[rows] = numbers.amax(1) < self.num_clusters
            labels = self.labels.clone()
            labels[rows] = torch.where(few[rows, None], numbers, labels[rows])
            self._take(labels)
        return few

    def _merge_small(self, small: Tensor) -> None:
        """Move the members of small clusters (B, K) to the nearest cluster that is not small."""
        moving = small.gather(1, self.labels.clamp(max=self.num_clusters - 1)) & self.alive
        rows = moving.any(1).nonzero().flatten()
        if len(rows):
            members = _list_members(moving[rows])
            means = self._means(rows).masked_fill(small[rows, :, None], _FAR)
            self._write(rows, members, assign_nearest(self._points_of(rows, members), means)[0])
            self._take(self.labels)

    def _split_while(self, wanted: Callable[[Tensor], Tensor], make_room: Callable[[Tensor], Tensor]) -> None:
        """Halve the largest cluster of the problems that are ``wanted`` for its size, again and again.

        ``make_room`` finds the slots for the other halves. A cluster of copies stays as it is.
        """
        stuck = torch.zeros_like(self.sizes, dtype=torch.bool)
        while True:
            sizes = self.sizes.masked_fill(stuck, 0)
            rows = wanted(sizes.amax(1)).nonzero().flatten()
            if not len(rows):
                return
            largest = sizes[rows].argmax(1)
            halves, splits = self._halve(rows, largest)
            stuck[rows, largest] = ~splits
            going = splits.nonzero().flatten()
            if len(going):
                self._move(rows[going], halves[going], largest[going], make_room(rows[going]))

    def _halve(self, rows: Tensor, clusters: Tensor) -> tuple[Tensor, Tensor]:
        """List half of the members of a cluster of each problem, and say whether they are no copies."""
        members = _list_members(self.labels[rows] == clusters[:, None])
        there, sizes = members < self.items, self.sizes[rows, clusters]
        points = self._points_of(rows, members) * there[:, :, None]
        offsets = (points - points.sum(1, keepdim=True) / sizes[:, None, None]) * there[:, :, None]
        lengths = offsets.square().sum(2)
        longest = offsets.gather(1, lengths.argmax(1)[:, None, None].expand(-1, 1, offsets.shape[2]))
        along = (offsets * longest).sum(2).masked_fill(~there, math.inf)
        lower = torch.arange(members.shape[1], device=members.device) < (sizes // 2)[:, None]
        halves = members.gather(1, along.argsort(dim=1, stable=True)).masked_fill(lower, self.items)
        return halves, lengths.amax(1) > _COPIES

    def _free_smallest(self, rows: Tensor, most: Tensor) -> Tensor:
        """Let the smallest cluster of each problem join the nearest that has room, and return its slot."""
        sizes, means = self.sizes[rows], self._means(rows)
        smallest = sizes.argmin(1, keepdim=True)
        has_room = sizes + sizes.gather(1, smallest) <= most[:, None]  # the second smallest has, at the least
        has_room.scatter_(1, smallest, False)
        mine = means.gather(1, smallest[:, :, None].expand(-1, 1, means.shape[2]))
        nearest = (means - mine).square().sum(2).masked_fill(~has_room, math.inf).argmin(1)
        members = _list_members(self.labels[rows] == smallest)
        self._move(rows, members, smallest[:, 0], nearest)
        return smallest[:, 0]

    def _move(self, rows: Tensor, members: Tensor, source: Tensor, target: Tensor) -> None:
        """Move members from one cluster of each problem to another."""
        self._write(rows, members, target[:, None].expand_as(members))
        there = members < self.items
        sums, sizes = (self._points_of(rows, members) * there[:, :, None]).sum(1), there.sum(1)
        for clusters, sign in ((source, -1), (target, 1)):
            self.sums[rows, clusters] += sign * sums
            self.sizes[rows, clusters] += sign * sizes

    def _means(self, rows: Tensor) -> Tensor:
        return self.sums[rows] / self.sizes[rows].clamp(min=1)[:, :, None]

    def _points_of(self, rows: Tensor, members: Tensor) -> Tensor:
        return self.points[rows[:, None], members.clamp(max=self.items - 1)]

    def _write(self, rows: Tensor, members: Tensor, labels: Tensor) -> None:
        self._padded[rows[:, None], members] = labels


def _list_members(mask: Tensor) -> Tensor:
    """List in each row where a mask (P, F) is true."""
    sizes = mask.sum(1)
    rows, items = mask.nonzero(as_tuple=True)
    place = torch.arange(len(rows), device=mask.device) - (sizes.cumsum(0) - sizes)[rows]
    members = items.new_full((len(mask), int(sizes.amax())), mask.shape[1])
    members[rows, place] = items
    return members


def _number_distinct(points: Tensor, alive: Tensor) -> Tensor:
    """Number the distinct live points (P, F, D) from 0 on, by hashes of their bits."""
    bits = (points + 0.0).view(torch.int32).long()  # -0.0 is 0.0
    mixed = (bits + 1) * 0x9E3779B97F4A7C1
    mixed = (mixed ^ (mixed >> 29)) * torch.arange(1, 2 * points.shape[2], 2, device=points.device)
    hashes = ((mixed ^ (mixed >> 32)) * 0x2545F4914F6CDD1D).sum(2)
    ordered, order = (hashes >> 1).masked_fill(~alive, torch.iinfo(torch.int64).max).sort(dim=1)
    numbers = (ordered.diff(dim=1, prepend=ordered[:, :1]) != 0).cumsum(1)
    return torch.zeros_like(numbers).scatter_(1, order, numbers).masked_fill(~alive, 0)
