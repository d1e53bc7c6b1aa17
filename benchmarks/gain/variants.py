"""Variants of DropCluster's parts, to see whether they do better; the package offers none of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal
from unittest.mock import patch

import torch
from torch import Tensor

from lightning_dropcluster.functional import cluster_drop
from lightning_dropcluster.learning import learner, window
from lightning_dropcluster.learning.sketch import Sketch
from lightning_dropcluster.methods import ClusterDrop
from lightning_dropcluster.methods.masking import draw_uniform

VariantName = Literal["none", "values", "noise", "other-image", "salience"]

MOST = 0.95
"""Highest probability that salience gives a cluster."""


class ValueSketch(Sketch):
    """Profiles of values as they are, neither centred nor of unit length: strong ones go with strong ones."""

    def profiles(self, problems: slice = slice(None)) -> Tensor:
        """Return the values' projections, (B, F, D) float32; see `Sketch.profiles`."""
        values = self.moments.addr(self.column_sums, self.origin)  # which are held relative to the origin
        num_problems, items = self.scope.problems(self.shape)
        return values.T.reshape(num_problems, items, self.sketch_dim)[problems].contiguous()


class Refilling(ClusterDrop):
    """Put something else where clusters are dropped, in place of zeros; what is kept is not rescaled."""

    def regularize(self, x: Tensor) -> Tensor:
        """Fill dropped clusters of an activation (N, C, *spatial); see `ClusterDrop.regularize`."""
        kept = super().regularize(torch.ones_like(x)) > 0
        return torch.where(kept, x, self.filling(x.detach()))

    def filling(self, x: Tensor) -> Tensor:
        """Make what is put there, like x."""
        raise NotImplementedError


class Noise(Refilling):
    """Gaussian noise with each channel's mean and deviation in the batch."""

    def filling(self, x: Tensor) -> Tensor:
        """Draw noise like x."""
        over = [0, *range(2, x.ndim)]
        deviation, mean = torch.std_mean(x.float(), over, keepdim=True)
        return (mean + deviation * torch.randn(x.shape, device=x.device)).to(x.dtype)


class OtherImage(Refilling):
    """The same features of another image of the batch: noise with the very distribution of the values."""

    def filling(self, x: Tensor) -> Tensor:
        """Take each image's neighbour in the batch, which is in random order."""
        return x.roll(1, dims=0)


class BySalience(ClusterDrop):
    """Drop a cluster with a probability that grows with its mean absolute value in the sample.

    It is that of `ClusterDrop` times the ratio of the cluster's mean to the map's (to the layer's where
    labels number the whole layer), at most `MOST`: the rule of `ProbDropBlock`, on clusters.
    """

    def regularize(self, x: Tensor) -> Tensor:
        """Drop clusters of an activation (N, C, *spatial); see `ClusterDrop.regularize`."""
        rows = x.detach().abs().float().reshape(len(x), self._num_groups, -1)
        index = self.labels.long().reshape(1, self._num_groups, -1).expand(len(x), -1, -1)
        sums = rows.new_zeros(len(x), self._num_groups, self.num_clusters).scatter_add_(2, index, rows)
        ratio = sums / self.sizes.clamp(min=1) / rows.mean(2, keepdim=True).clamp(min=1e-12)
        keep = draw_uniform(sums.shape, device=x.device) >= (self.drop_prob * ratio).clamp(max=MOST)
        return cluster_drop(x, self.labels, keep, sizes=self.sizes)


_PARTS = {
    "values": (window, "Sketch", ValueSketch),
    "noise": (learner, "ClusterDrop", Noise),
    "other-image": (learner, "ClusterDrop", OtherImage),
    "salience": (learner, "ClusterDrop", BySalience),
}


@contextmanager
def variant(name: VariantName) -> Iterator[None]:
    """Let DropCluster work with another part while the block runs.

    Args:
        name: of the variant, or "none".
    """
    with patch.object(*_PARTS[name]) if name in _PARTS else nullcontext():
        yield
