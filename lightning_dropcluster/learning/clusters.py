"""The clusters of one layer: a small label table that stands for labels of the layer's full shape."""

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dropcluster.checks import check_integers, describe
from lightning_dropcluster.layers.selection import count_channels
from lightning_dropcluster.learning.scopes import SCOPES, Scope, Shape
from lightning_dropcluster.methods.cluster_drop import smallest_integer_type


@dataclass(frozen=True)
class Clusters:
    """One layer's clusters.

    Args:
        table: label table in the smallest integer type that fits; it broadcasts to ``shape``.
        shape: (C, *spatial) of the layer when it was clustered.
    """

    table: Tensor
    shape: Shape

    @property
    def labels(self) -> Tensor:
        """The cluster of each feature, int64 (C, *spatial)."""
        return self.table.long().expand(self.shape).cpu().clone()

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain scalars for a checkpoint.

        Returns:
            The table on the CPU, and the shape.
        """
        return {"table": self.table.cpu(), "shape": list(self.shape)}


@dataclass(frozen=True)
class SavedClusters:
    """What a checkpoint holds of all its DropClusters.

    Args:
        epoch: when it was written.
        step: when it was written, in optimiser steps.
        clusters: name of layer to its clusters.
        scopes: name of layer to what was grouped.
    """

    epoch: int
    step: int
    clusters: dict[str, Clusters]
    scopes: dict[str, Scope]


def clusters_from_labels(labels: Tensor, scope: Scope, name: str) -> Clusters:
    """Check labels of a full layer and pack them.

    Args:
        labels: integers (C, *spatial), numbered from 0 within each problem of the scope.
        scope: what was grouped.
        name: of the layer, for errors.

    Returns:
        The clusters.

    Raises:
        TypeError: where the labels are no integer tensor.
        ValueError: where a label is out of range, or the scope shares what differs.
    """
    check_integers(f"labels of layer {name!r}", labels)
    if labels.ndim < 1 or not labels.numel():
        raise ValueError(f"labels of layer {name!r} have shape {tuple(labels.shape)}: must be (C, *spatial)")
    return _pack(scope.compress(labels), tuple(labels.shape), scope, name)


def clusters_from_state(state: Any, scope: Scope, name: str) -> Clusters:
    """Check what a checkpoint holds for one layer and unpack it.

    Args:
        state: what `Clusters.state_dict` returned.
        scope: what was grouped.
        name: of the layer, for errors.

    Returns:
        The clusters.

    Raises:
        TypeError: where the table is no integer tensor.
        ValueError: where anything else is not as `Clusters.state_dict` makes it.
    """
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


def read_initial_labels(source: Any, scope: Scope) -> dict[str, Clusters]:
    """Read clusters to start from.

    Args:
        source: name to labels (C, *spatial), as ``DropCluster.labels`` gives them, or the path of a Lightning
            checkpoint that was written with a DropCluster of the same scope.
        scope: what is grouped.

    Returns:
        Name to clusters.

    Raises:
        TypeError: where ``source`` is neither.
        FileNotFoundError: where there is no such file.
        ValueError: where it holds no labels, or labels that do not fit the scope.
    """
    if isinstance(source, str | PathLike):
        return _clusters_in(source, scope)
    if not isinstance(source, Mapping):
        raise TypeError(
            f"initial_labels={describe(source)}: must be a mapping of layer names to labels, or the path of "
            f"a checkpoint, not {type(source).__name__}"
        )
    if not source:
        raise ValueError("initial_labels={}: must hold the labels of at least one layer")
    try:
        return {str(name): clusters_from_labels(labels, scope, str(name)) for name, labels in source.items()}
    except (TypeError, ValueError) as error:
        raise type(error)(f"initial_labels: {error}") from error


def read_checkpoint(path: str | PathLike[str]) -> SavedClusters:
    """Read the clusters that a Lightning checkpoint holds.

    Args:
        path: of a checkpoint that was written with a DropCluster, or several.

    Returns:
        The clusters of all its layers, none where there was no DropCluster.

    Raises:
        FileNotFoundError: where there is no such file.
        TypeError: where a label table is no integer tensor.
        ValueError: where it is no checkpoint, or its labels are damaged.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        reason = str(error).partition(". ")[0]
        raise ValueError(f"no checkpoint that torch loads with weights_only=True ({reason})") from error
    checkpoint = checkpoint if isinstance(checkpoint, Mapping) else {}
    saved = SavedClusters(checkpoint.get("epoch", 0), checkpoint.get("global_step", 0), {}, {})
    callbacks = checkpoint.get("callbacks")
    for state in callbacks.values() if isinstance(callbacks, Mapping) else ():
        # By what it holds, since a subclass files it under its own name.
        scope = SCOPES.get(str(state.get("scope"))) if isinstance(state, Mapping) else None
        if scope is not None and isinstance(state.get("clusters"), Mapping):
            for name, entry in state["clusters"].items():
                saved.clusters[str(name)] = clusters_from_state(entry, scope, str(name))
                saved.scopes[str(name)] = scope
    return saved


def check_shape(shape: Any, what: str) -> None:
    """Check a layer's shape that came from a checkpoint.

    Args:
        shape: what should be a list (C, *spatial).
        what: to call it in the error.

    Raises:
        ValueError: where it is no list of positive integers.
    """
    if not (isinstance(shape, list | tuple) and shape and all(type(n) is int and n > 0 for n in shape)):
        raise ValueError(f"{what}={describe(shape)}: must be a list (C, *spatial) of positive integers")


def smallest_table(table: Tensor) -> Tensor:
    """Store a label table in the smallest integer type that fits.

    Args:
        table: integers >= 0, of any shape.

    Returns:
        The same labels, contiguous, as uint8, int16 or int32.
    """
    return table.to(smallest_integer_type(int(table.max()) + 1)).contiguous()


def check_channels(clusters: Clusters, layer: nn.Module, name: str) -> None:
    """Check that labels belong to a layer of that many channels.

    Args:
        clusters: of the labels.
        layer: the layer they are meant for.
        name: of the layer, for the error.

    Raises:
        ValueError: where the layer tells another number of channels.
    """
    channels = count_channels(layer)
    if channels is not None and channels != clusters.shape[0]:
        raise ValueError(
            f"labels of layer {name!r} have {clusters.shape[0]} channels, but the layer has {channels}"
        )


def _clusters_in(path: str | PathLike[str], scope: Scope) -> dict[str, Clusters]:
    try:
        saved = read_checkpoint(path)
    except (FileNotFoundError, TypeError, ValueError) as error:
        raise type(error)(f"initial_labels={str(path)!r}: {error}") from error
    found = {name: clusters for name, clusters in saved.clusters.items() if saved.scopes[name] is scope}
    if not found:
        raise ValueError(
            f"initial_labels={str(path)!r}: the checkpoint holds no labels of a DropCluster with "
            f"scope={scope.name!r}"
        )
    return found


def _pack(table: Tensor, shape: Shape, scope: Scope, name: str) -> Clusters:
    low, high = int(table.min()), int(table.max())
    items = scope.problems(shape)[1]
    if low < 0 or high >= items:
        raise ValueError(f"labels of layer {name!r} are in [{low}, {high}]: must be in [0, {items})")
    return Clusters(smallest_table(table), shape)
