"""DropCluster, as a function and as a module: draw a keep table, look it up by labels, multiply."""

from typing import Any

import torch
from torch import Tensor

from lightning_dropcluster.checks import check_bool, check_choice, check_integers, check_number
from lightning_dropcluster.methods.base import DropRegularizer
from lightning_dropcluster.methods.masking import Draw, draw_uniform, expected_scale
from lightning_dropcluster.methods.packed_keep import look_up, multiply_packed, packing_pays


def cluster_drop(
    x: Tensor,
    labels: Tensor,
    keep: Tensor,
    *,
    scale: Tensor | float | None = None,
    sizes: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """Drop clusters of features and rescale what is kept.

    Every feature shares its cluster's fate: ``y[n, c, s] = x[n, c, s] * keep[n, c, labels[c, s]] * scale``.
    Clusters are disjoint, so a feature is dropped with exactly the probability behind the keep table,
    whatever the size of its cluster. Backward saves the keep table and the labels, never a mask of the
    activation's size; second derivatives work.

    Source: DropCluster, https://arxiv.org/abs/2002.02997. How the paper rescales is not known to us; the
    default is the ratio of DropBlock (https://arxiv.org/abs/1810.12890, algorithm 1) over the whole batch.

    Args:
        x: activation (N, C, *spatial), floating point.
        labels: cluster of each feature, integers in [0, K), (C or 1, *spatial). A first dimension of 1 is one
            partition for all channels; spatial dimensions of 1 stand for whole maps; labels of any other size
            are resized by nearest neighbour.
        keep: which clusters stay, bool (N or 1, G, K). G is C where each map has clusters of its own, and 1
            where one set of clusters serves the whole layer.
        scale: factor for what is kept, a number or a 0-d tensor; ``None`` for (number of features) / (number
            kept), counted over the batch.
        sizes: features per cluster (G, K), integers or float32, to save counting them with `cluster_sizes`.
        inplace: whether ``x`` itself may be overwritten; only where nobody else needs its values.

    Returns:
        ``x`` itself, or a tensor like it: same shape, dtype, device and memory format. Where everything is
        dropped it is zero, never NaN, if ``x`` is finite.

    Raises:
        ValueError: where ``scale`` is a tensor with dimensions.

    Example:
        >>> x, labels = torch.ones(1, 1, 4), torch.tensor([[0, 0, 1, 1]])
        >>> cluster_drop(x, labels, torch.tensor([[[True, False]]]))
        tensor([[[2., 2., 0., 0.]]])
    """
    resized = resize_labels(labels, x.shape[2:])
    if scale is None:
        if sizes is None or resized is not labels:
            sizes = cluster_sizes(resized, *keep.shape[1:])
        scale = _kept_ratio(keep, sizes, resized.numel())
    elif not isinstance(scale, Tensor):
        scale = torch.tensor(scale, dtype=torch.float32, device=x.device)
    elif scale.ndim:
        raise ValueError(f"scale of shape {tuple(scale.shape)}: must be a number or a 0-d tensor")
    return _MaskedMultiply.apply(x, resized, keep, scale, inplace)  # pyright: ignore[reportReturnType]


def draw_keep_table(
    shape: tuple[int, int, int],
    drop_prob: Tensor | float,
    *,
    device: torch.device | None = None,
    draw: Draw = draw_uniform,
) -> Tensor:
    """Draw which clusters stay.

    Args:
        shape: (samples, maps, clusters).
        drop_prob: probability in [0, 1) that a cluster is dropped; a 0-d tensor avoids recompilation.
        device: where to draw.
        draw: where the uniform numbers come from; `draw_uniform` can also draw apart on ranks that are seeded
            alike, and pairs that drop different clusters.

    Returns:
        A bool table of that shape, True where the cluster stays.

    Example:
        >>> draw_keep_table((2, 3, 4), 0.0).all().item()
        True
    """
    return draw(shape, device=device) >= drop_prob


def cluster_sizes(labels: Tensor, num_groups: int, num_clusters: int) -> Tensor:
    """Count the features of each cluster.

    Args:
        labels: integers in [0, num_clusters), (C or 1, *spatial).
        num_groups: G, the number of label sets: C where each map has clusters of its own, else 1.
        num_clusters: K.

    Returns:
        Counts (G, K), float32.

    Example:
        >>> cluster_sizes(torch.tensor([[0, 0, 2], [1, 1, 1]]), 2, 3)
        tensor([[2., 0., 1.],
                [0., 3., 0.]])
    """
    flat = labels.reshape(num_groups, -1).long()
    sizes = torch.zeros(num_groups, num_clusters, dtype=torch.float32, device=labels.device)
    return sizes.scatter_add_(1, flat, torch.ones_like(flat, dtype=sizes.dtype))


def resize_labels(labels: Tensor, spatial: tuple[int, ...]) -> Tensor:
    """Resize labels to another spatial shape by nearest neighbour.

    Args:
        labels: (C or 1, *spatial').
        spatial: the wanted spatial shape, with as many dimensions as the labels have.

    Returns:
        Labels (C or 1, *spatial); the given tensor itself where the shape is right already or every spatial
        dimension is 1.

    Example:
        >>> resize_labels(torch.tensor([[1, 2]]), (4,))
        tensor([[1, 1, 2, 2]])
    """
    old = labels.shape[1:]
    if tuple(old) == tuple(spatial) or all(size == 1 for size in old):
        return labels
    for axis, (have, want) in enumerate(zip(old, spatial, strict=True), start=1):
        nearest = torch.arange(want, device=labels.device) * have // want
        labels = labels.index_select(axis, nearest)
    return labels


RESCALES = ("batch", "expected")


class ClusterDrop(DropRegularizer):
    """Drop clusters of features in training; the identity in eval mode and where drop_prob is 0.

    Source: DropCluster, https://arxiv.org/abs/2002.02997.

    Args:
        labels: cluster of each feature, integers >= 0, (C or 1, *spatial). See `cluster_drop` for what
            dimensions of 1 mean and for inputs of another spatial size.
        drop_prob: probability in [0, 1) that a cluster, and so each of its features, is dropped.
        num_clusters: K, the width of the keep table; ``None`` for the largest label plus one. A larger value
            leaves room for later labels.
        per_map: True where each map has clusters of its own; False where the labels number the clusters of
            the whole layer.
        per_sample: True draws for each sample, False once for the whole batch.
        rescale: ``"batch"`` scales what is kept by (number of features) / (number kept) over the batch,
            ``"expected"`` by 1 / (1 - drop_prob).
        paired: whether the two halves of each batch are to drop different clusters, for the pairs of R-Block:
            see `draw_uniform`. Needs ``per_sample``.
        inplace: whether to overwrite the input; not under ``torch.compile``, which plans memory itself.

    Raises:
        TypeError: where an argument has a wrong type.
        ValueError: where it is out of its range.

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
        rescale: str = "batch",
        paired: bool = False,
        inplace: bool = False,
    ) -> None:
        super().__init__(drop_prob, paired=paired)
        check_integers("labels", labels)
        if not labels.ndim or not labels.numel():
            raise ValueError(f"labels of shape {tuple(labels.shape)}: must be (C or 1, *spatial), not empty")
        check_choice("rescale", rescale, RESCALES)
        for name, value in (("per_map", per_map), ("per_sample", per_sample), ("inplace", inplace)):
            check_bool(name, value)
        if paired and not per_sample:
            raise ValueError(f"paired=True: needs per_sample=True, got per_sample={per_sample!r}")
        if num_clusters is None:
            num_clusters = int(labels.max()) + 1
        self.num_clusters = check_number("num_clusters", num_clusters, 1, integer=True)
        self.per_map, self.per_sample, self.rescale = per_map, per_sample, rescale
        self.inplace = inplace
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
            x: (N, C, *spatial), floating point.

        Returns:
            A tensor like ``x``.

        Raises:
            ValueError: where the labels have other dimensions or channels than ``x``.
        """
        if self.labels.ndim != x.ndim - 1 or len(self.labels) not in (1, x.shape[1]):
            raise ValueError(
                f"labels of shape {tuple(self.labels.shape)}: do not fit activations {tuple(x.shape)}"
            )
        shape = (len(x) if self.per_sample else 1, self._num_groups, self.num_clusters)
        keep = draw_keep_table(shape, self.drop_prob, device=x.device, draw=self.draw)
        scale = None if self.rescale == "batch" else expected_scale(self.drop_prob)
        inplace = self.inplace and not torch.compiler.is_compiling()
        return cluster_drop(x, self.labels, keep, scale=scale, sizes=self.sizes, inplace=inplace)

    def _settings(self) -> dict[str, object]:
        return {
            **super()._settings(),
            "labels": tuple(self.labels.shape),
            "num_clusters": self.num_clusters,
            "per_map": self.per_map,
            "per_sample": self.per_sample,
            "rescale": self.rescale,
        }


def smallest_integer_type(num_labels: int) -> torch.dtype:
    """Return the smallest integer type that holds labels in [0, num_labels).

    Args:
        num_labels: at least 1.

    Returns:
        uint8, int16 or int32.

    Example:
        >>> smallest_integer_type(257)
        torch.int16
    """
    return torch.uint8 if num_labels <= 256 else torch.int16 if num_labels <= 32768 else torch.int32


def _kept_ratio(keep: Tensor, sizes: Tensor, num_features: int) -> Tensor:
    """(number of features) / (number kept) over the batch, 0-d float32; finite where nothing is kept."""
    total = float(num_features * keep.shape[0])
    # Counting what is dropped makes the ratio exactly 1 where nothing is.
    dropped = ((~keep).sum(0, dtype=torch.float32) * sizes).sum()
    return total / (total - dropped).clamp(min=1.0)


def _multiply(x: Tensor, labels: Tensor, keep: Tensor, scale: Tensor, inplace: bool) -> Tensor:
    """Multiply by the looked-up table, in the order in which the activation lies in memory."""
    if torch.compiler.is_compiling():  # which plans order and memory itself
        mask = look_up((keep * scale).to(x.dtype), labels.long())
        return x.mul_(mask) if inplace else x * mask
    out = x if inplace else torch.empty_like(x)  # no view: the model may write into what it is given
    if x.is_contiguous() or not x.movedim(1, -1).is_contiguous():
        _multiply_into(out, x, labels.long(), keep, scale)
    else:
        first = 0 if keep.shape[1] == 1 else torch.arange(keep.shape[1], device=x.device) * keep.shape[2]
        index = labels.movedim(0, -1).long() + first
        _multiply_into(out.movedim(1, -1), x.movedim(1, -1), index, keep.flatten(1)[:, None], scale)
    return out


def _multiply_into(out: Tensor, x: Tensor, index: Tensor, keep: Tensor, scale: Tensor) -> None:
    """Multiply x (N, R, ...) by keep (N or 1, R or 1, K) at index (R or 1, ...) and by the scale."""
    if packing_pays(x, index, keep):
        multiply_packed(out, x, index, keep, scale.to(x.dtype))
    else:
        torch.mul(x, look_up((keep * scale).to(x.dtype), index), out=out)


class _MaskedMultiply(torch.autograd.Function):
    """The product with a looked-up table is its own adjoint, so backward applies the function again."""

    @staticmethod
    def forward(x: Tensor, labels: Tensor, keep: Tensor, scale: Tensor, inplace: bool) -> Tensor:
        return _multiply(x, labels, keep, scale, inplace)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:4])
        if inputs[4]:
            ctx.mark_dirty(inputs[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _MaskedMultiply.apply(grads[0], *ctx.saved_tensors, False), None, None, None, None
