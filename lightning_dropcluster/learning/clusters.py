"""The clusters of one layer: a small label table that stands for labels of the layer's full shape."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_dropcluster.checks import check_integers, describe
from lightning_dropcluster.layers.plain import as_plain
from lightning_dropcluster.layers.selection import count_channels
from lightning_dropcluster.learning.scopes import Scope, Shape
from lightning_dropcluster.methods.dropping.label_tables import smallest_integer_type


@dataclass(frozen=True)
class Clusters:
    """One layer's clusters: a table of integers that broadcasts to the layer's shape (C, *spatial).

    While the layer is hooked the table is the very buffer of its `ClusterDrop`, which is written in place.
    """

    table: Tensor
    shape: Shape

    @property
    def labels(self) -> Tensor:
        """The cluster of each feature, int64 (C, *spatial)."""
        return self.table.long().expand(self.shape).cpu().clone()

    def copy(self) -> "Clusters":
        """Return clusters whose table nobody writes to."""
        return Clusters(self.table.clone(), self.shape)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the table on the CPU, and the shape as plain scalars."""
        return {"table": self.table.to("cpu", copy=True), "shape": list(self.shape)}


def clusters_from_labels(labels: Tensor, scope: Scope, name: str) -> Clusters:
    """Check labels (C, *spatial), numbered from 0 within each problem of the scope, and pack them."""
    check_integers(f"labels of layer {name!r}", labels)
    labels = as_plain(labels)
    if labels.ndim < 1 or not labels.numel():
        raise ValueError(f"labels of layer {name!r} have shape {tuple(labels.shape)}: must be (C, *spatial)")
    return _pack(scope.compress(labels), tuple(labels.shape), scope, name)


def clusters_from_state(state: Any, scope: Scope, name: str) -> Clusters:
    """Check what a checkpoint holds for one layer, which `Clusters.state_dict` made, and unpack it."""
    if not isinstance(state, Mapping) or set(state) != {"table", "shape"}:
        raise ValueError(f"state of layer {name!r}: must hold 'table' and 'shape', but is {describe(state)}")
    table, shape = state["table"], state["shape"]
    check_integers(f"labels of layer {name!r}", table)
    check_shape(shape, f"state of layer {name!r}: shape")
    if tuple(table.shape) != scope.label_shape(tuple(shape)):
        raise ValueError(
            f"state of layer {name!r}: a table of shape {tuple(table.shape)} does not fit "
            f"shape={tuple(shape)} and scope={scope.name!r}"
        )
    return _pack(table, tuple(shape), scope, name)


def check_shape(shape: Any, what: str) -> None:
    """Check a layer's shape that came from a checkpoint."""
    if not (isinstance(shape, list | tuple) and shape and all(type(n) is int and n > 0 for n in shape)):
        raise ValueError(f"{what}={describe(shape)}: must be a list (C, *spatial) of positive integers")


def smallest_table(table: Tensor) -> Tensor:
    """Store a label table, contiguous, in the smallest integer type that fits."""
    return table.to(smallest_integer_type(int(table.max()) + 1)).contiguous()


def check_channels(clusters: Clusters, layer: nn.Module, name: str) -> None:
    """Check that labels belong to a layer of that many channels, where it tells."""
    channels = count_channels(layer)
    if channels is not None and channels != clusters.shape[0]:
        raise ValueError(
            f"labels of layer {name!r} have {clusters.shape[0]} channels, but the layer has {channels}"
        )


def _pack(table: Tensor, shape: Shape, scope: Scope, name: str) -> Clusters:
    low, high = int(table.min()), int(table.max())
    items = scope.problems(shape)[1]
    if low < 0 or high >= items:
        raise ValueError(f"labels of layer {name!r} are in [{low}, {high}]: must be in [0, {items})")
    return Clusters(smallest_table(table), shape)
