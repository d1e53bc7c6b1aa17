"""ClusterDrop: the module that drops clusters; the callback DropCluster attaches one to each layer."""

import torch
from torch import Tensor

from lightning_dropcluster.checks import check_bool, check_choice, check_integers, check_number
from lightning_dropcluster.functional import cluster_drop, cluster_sizes, draw_keep_table
from lightning_dropcluster.functional.masking import expected_scale
from lightning_dropcluster.regularizers.regularizer import DropRegularizer

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
