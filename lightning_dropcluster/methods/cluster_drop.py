"""DropCluster, as a function and as a module: draw a keep table, look it up by labels, drop clusters."""

import torch
from torch import Tensor

from lightning_dropcluster.checks import (
    check_bool,
    check_channel_dim,
    check_choice,
    check_integers,
    check_number,
)
from lightning_dropcluster.layers.channels import Layout
from lightning_dropcluster.methods.base import DropRegularizer
from lightning_dropcluster.methods.dropping.fills import FILLS, fill_dropped
from lightning_dropcluster.methods.dropping.fused_drop import can_fuse, drop_fused
from lightning_dropcluster.methods.dropping.label_tables import (
    cluster_sizes,
    kept_ratio_of_clusters,
    resize_labels,
    smallest_integer_type,
)
from lightning_dropcluster.methods.dropping.memory_order import ClusterIndex, is_channels_last
from lightning_dropcluster.methods.dropping.packed_drop import drop_drawn, packing_pays
from lightning_dropcluster.methods.masking import draw_keep_table, expected_scale

RESCALES = ("batch", "expected")


def cluster_drop(
    x: Tensor,
    labels: Tensor,
    keep: Tensor,
    *,
    fill: str = "zero",
    scale: Tensor | float | None = None,
    sizes: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """Drop clusters of features and rescale what is kept.

    Every feature shares its cluster's fate. Where b is ``keep[n, c, labels[c, s]]`` and a is ``scale``, the
    feature x at ``[n, c, s]`` becomes

    - x b a with ``fill="zero"``;
    - m + (x - m) b a with ``fill="mean"``, where m is the mean of the feature's cluster in its sample and
      feature map: what the members of a cluster share stays, and what sets them apart is dropped. The mean is
      kept, and a = 1 / (1 - drop_prob) makes x the expectation over draws. Clusters of one feature, and (in
      float64 but for rounding) those whose features are equal, stay as they are to the last bit. A cluster of
      the whole layer (G = 1) has a mean in each map.

    Clusters are disjoint, so a feature is dropped with exactly the probability behind the keep table,
    whatever the size of its cluster. Backward saves the keep table and the labels, nothing of the size of the
    activation; second derivatives, forward mode and the transforms of ``torch.func`` work.

    Source: DropCluster, https://arxiv.org/abs/2002.02997. How the paper rescales is not known to us; the
    default is the ratio of DropBlock (https://arxiv.org/abs/1810.12890, algorithm 1) over the whole batch.
    Filling with the mean is ours; its ancestor is feature grouping (Aydore et al.,
    https://arxiv.org/abs/1807.11718), which averages features within the clusters of a partition that is
    drawn for each step.

    Args:
        x: activation (N, C, *spatial), floating point.
        labels: cluster of each feature, integers in [0, K), (C or 1, *spatial). A first dimension of 1 is one
            partition for all channels; spatial dimensions of 1 stand for whole maps; labels of any other size
            are resized by nearest neighbour.
        keep: which clusters stay, bool (N or 1, G, K). G is C where each map has clusters of its own, and 1
            where one set of clusters serves the whole layer.
        fill: what stands in for a dropped cluster, ``"zero"`` or its ``"mean"``. Means are summed in float32
            for types of 16 bits, and in float64 for others.
        scale: factor for what is kept, or for its deviation from the mean, a number or a 0-d tensor; ``None``
            for (number of features) / (number kept), counted over the batch.
        sizes: features per cluster (G, K), integers or float32, to save counting them with `cluster_sizes`.
        inplace: whether ``x`` itself may be overwritten; only where nobody else needs its values.

    Returns:
        ``x`` itself, or a tensor like it: same shape, dtype, device and memory format. Where everything is
        dropped it is zero or the means, never NaN, if ``x`` is finite.

    Raises:
        ValueError: where ``scale`` is a tensor with dimensions, or ``fill`` is unknown.

    Example:
        >>> x, labels = torch.tensor([[[1.0, 3.0, 5.0, 9.0]]]), torch.tensor([[0, 0, 1, 1]])
        >>> keep = torch.tensor([[[True, False]]])
        >>> cluster_drop(x, labels, keep)
        tensor([[[2., 6., 0., 0.]]])
        >>> cluster_drop(x, labels, keep, fill="mean")
        tensor([[[0., 4., 7., 7.]]])
    """
    check_choice("fill", fill, FILLS)
    resized = resize_labels(labels, x.shape[2:])
    if scale is None:
        if sizes is None or resized is not labels:
            sizes = cluster_sizes(resized, *keep.shape[1:])
        scale = kept_ratio_of_clusters(keep, sizes, resized.numel())
    elif not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=torch.float32, device=x.device)  # tensor() would wait for a copy
    elif scale.ndim:
        raise ValueError(f"scale of shape {tuple(scale.shape)}: must be a number or a 0-d tensor")
    return fill_dropped(x, resized, keep, scale, fill, inplace)


class ClusterDrop(DropRegularizer):
    """Drop clusters of features in training; the identity in eval mode and where drop_prob is 0.

    Source: DropCluster, https://arxiv.org/abs/2002.02997; `cluster_drop` has the formulas.

    Args:
        labels: cluster of each feature, integers >= 0, (C or 1, *spatial). See `cluster_drop` for what
            dimensions of 1 mean and for inputs of another spatial size.
        drop_prob: probability in [0, 1) that a cluster, and so each of its features, is dropped.
        num_clusters: K, the width of the keep table; ``None`` for the largest label plus one. A larger value
            leaves room for later labels.
        per_map: True where each map has clusters of its own; False where the labels number the clusters of
            the whole layer.
        per_sample: True draws for each sample, False once for the whole batch.
        fill: what stands in for a dropped cluster, ``"zero"`` or its own ``"mean"``, see `cluster_drop`. With
            ``"mean"`` the deviations of kept clusters from theirs are scaled by 1 / (1 - drop_prob).
        rescale: only used with ``fill="zero"``: ``"batch"`` scales what is kept by (number of features) /
            (number kept) over the batch, ``"expected"`` by 1 / (1 - drop_prob). The latter is done as well
            where one draw of the layer's clusters serves the whole batch: their ratio would depend on it.
        paired: whether the two halves of each batch are to drop different clusters, for the pairs of R-Block:
            see `draw_uniform`. Needs ``per_sample``.
        channel_dim: 1 for activations (N, C, *spatial), -1 for (N, *spatial, C). Then labels (C, H, W) also
            fit tokens (N, P + H W, C), of which the first P stay as they are.
        inplace: whether to overwrite the input; not under ``torch.compile``, which plans memory itself.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if it is out of range.

    Example:
        >>> drop = ClusterDrop(torch.tensor([[0, 0, 1, 1]]), drop_prob=0.5)
        >>> drop.eval()(torch.ones(1, 1, 4))
        tensor([[[1., 1., 1., 1.]]])
    """

    labels: Tensor
    sizes: Tensor

    def __init__(
        self,
        labels: Tensor,
        drop_prob: float = 0.15,
        *,
        num_clusters: int | None = None,
        per_map: bool = True,
        per_sample: bool = True,
        fill: str = "zero",
        rescale: str = "batch",
        paired: bool = False,
        channel_dim: int = 1,
        inplace: bool = False,
    ) -> None:
        super().__init__(drop_prob, paired=paired)
        check_integers("labels", labels)
        if not labels.ndim or not labels.numel():
            raise ValueError(f"labels of shape {tuple(labels.shape)}: must be (C or 1, *spatial), not empty")
        check_choice("fill", fill, FILLS)
        check_choice("rescale", rescale, RESCALES)
        for name, value in (("per_map", per_map), ("per_sample", per_sample), ("inplace", inplace)):
            check_bool(name, value)
        if paired and not per_sample:
            raise ValueError(f"paired=True: needs per_sample=True, got per_sample={per_sample!r}")
        if num_clusters is None:
            num_clusters = int(labels.max()) + 1
        self.num_clusters = check_number("num_clusters", num_clusters, 1, integer=True)
        self.per_map, self.per_sample = per_map, per_sample
        self.fill, self.rescale, self.inplace = fill, rescale, inplace
        self.channel_dim = check_channel_dim(channel_dim)
        self._index = ClusterIndex()
        self.register_buffer("labels", labels.to(smallest_integer_type(self.num_clusters), copy=True))
        # Integers, since .half() would round others.
        sizes = torch.zeros(self._num_groups, self.num_clusters, dtype=torch.int32)
        self.register_buffer("sizes", sizes)
        self.to(labels.device)
        self.set_labels(labels)

    @property
    def _num_groups(self) -> int:
        return len(self.labels) if self.per_map else 1

    def set_labels(self, labels: Tensor) -> None:
        """Write new labels in place, so that compiled code and CUDA graphs go on as they are.

        Args:
            labels: integers in [0, num_clusters) in the shape of the old ones.

        Raises:
            ValueError: where the shape or the range is another.
        """
        if labels.shape != self.labels.shape:
            raise ValueError(f"labels of shape {tuple(labels.shape)}: must be {tuple(self.labels.shape)}")
        low, high = int(labels.min()), int(labels.max())  # a small type would wrap num_clusters
        if low < 0 or high >= self.num_clusters:
            raise ValueError(f"labels in [{low}, {high}]: must be in [0, {self.num_clusters})")
        self.write_labels(labels)

    def write_labels(self, labels: Tensor) -> None:
        """Write new labels as `set_labels` does, without its checks: for labels that are known to fit.

        Args:
            labels: integers in [0, num_clusters) in the shape of the old ones.
        """
        self.labels.copy_(labels)
        self.sizes.copy_(cluster_sizes(self.labels, self._num_groups, self.num_clusters))

    def can_hold(self, labels: Tensor) -> bool:
        """Whether `set_labels` would take these labels.

        Args:
            labels: integers >= 0, (C or 1, *spatial).

        Returns:
            True where shape and range fit.
        """
        return labels.shape == self.labels.shape and int(labels.max()) < self.num_clusters

    def regularize(self, x: Tensor) -> Tensor:
        """Drop clusters of an activation.

        Args:
            x: (N, C, *spatial), floating point; with the channels where ``channel_dim`` says.

        Returns:
            A tensor like ``x``.

        Raises:
            ValueError: where the labels have other dimensions or channels than ``x``.
        """
        layout = self._layout_of(x)
        features, prefix = layout.split(x)
        return layout.join(self._drop(features), prefix, x)

    def _layout_of(self, x: Tensor) -> Layout:
        """Find out whether activations are tokens of the grid that the labels have."""
        grid = self.labels.shape[1:]
        before = x.shape[1] - grid.numel()
        if x.ndim != 3 or len(grid) != 2 or grid.numel() == 1 or before < 0:
            return Layout(self.channel_dim)
        return Layout(self.channel_dim, has_tokens=True, num_prefix_tokens=before, grid_size=tuple(grid))

    def _drop(self, x: Tensor) -> Tensor:
        if self.labels.ndim != x.ndim - 1 or len(self.labels) not in (1, x.shape[1]):
            raise ValueError(
                f"labels of shape {tuple(self.labels.shape)}: do not fit activations {tuple(x.shape)}"
            )
        shape = (len(x) if self.per_sample else 1, self._num_groups, self.num_clusters)
        mean, has_many_draws = self.fill == "mean", self.per_sample or self.per_map
        by_batch = not mean and self.rescale == "batch" and has_many_draws
        if can_fuse(x, self.labels, self.num_clusters, mean):
            uniform = self.draw(shape, device=x.device)
            fixed = (self.labels, self.sizes, uniform, self.drop_prob)
            return drop_fused(x, *fixed, by_batch=by_batch, mean=mean)
        if not mean and packing_pays(x, self.labels, shape[0]):
            index = self._index.of(self.labels, shape[1:], is_channels_last(x))
            fixed = (index, self.sizes, self.draw(shape), self.drop_prob)
            return drop_drawn(x, *fixed, by_batch=by_batch, inplace=self.inplace)
        keep = draw_keep_table(shape, self.drop_prob, device=x.device, draw=self.draw)
        scale = None if by_batch else expected_scale(self.drop_prob)
        return cluster_drop(
            x, self.labels, keep, fill=self.fill, scale=scale, sizes=self.sizes, inplace=self.inplace
        )

    def _settings(self) -> dict[str, object]:
        return {
            **super()._settings(),
            "labels": tuple(self.labels.shape),
            "num_clusters": self.num_clusters,
            "per_map": self.per_map,
            "per_sample": self.per_sample,
            "fill": self.fill,
            "rescale": self.rescale,
            **({"channel_dim": self.channel_dim} if self.channel_dim != 1 else {}),
        }
