"""A look before training: what patterns pick, how many clusters it makes, and what gathering them takes."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import nn

from lightning_dropcluster.checks import check_channel_dim
from lightning_dropcluster.inspection.channels import trace_channels
from lightning_dropcluster.inspection.suggestions import (
    suggest_last_patterns,
    suggest_patterns,
    suggest_stages,
)
from lightning_dropcluster.inspection.tracing import Call
from lightning_dropcluster.layers.channels import Layout, find_layouts, misreading
from lightning_dropcluster.layers.selection import CONV_LAYERS, Layers, LayerTypes, select_layers
from lightning_dropcluster.learning.scopes import SCOPES, Grouping, Shape
from lightning_dropcluster.learning.sketch import SketchSettings


@dataclass(frozen=True)
class LayerPreview:
    """One layer as the callback would treat it.

    Args:
        name: as `select_layers` gives it.
        type: the module's class.
        shape: (C, *spatial) of the output, with tokens of an image on their grid; ``None`` where the output
            is not one tensor, or the layer does not run in eval mode.
        problems: how many clusterings there are, for example one per feature map.
        num_clusters: clusters in each of them.
        sketch_bytes: memory of the layer's sketch while a gathering window is open.
        output_type: name of the output's class, empty where the layer does not run in eval mode.
        channel_dim: 1 or -1 where the dimension of the channels is known, else ``None``.
        is_misread: whether another ``channel_dim`` was given, so that rows or tokens are taken for channels.
    """

    name: str
    type: str
    shape: Shape | None
    problems: int = 0
    num_clusters: int = 0
    sketch_bytes: int = 0
    output_type: str = ""
    channel_dim: int | None = None
    is_misread: bool = False

    @property
    def features(self) -> int:
        """Cells of the output."""
        return prod(self.shape) if self.shape else 0

    def cells(self) -> tuple[str, ...]:
        """Write the layer as a table row."""
        if self.shape is None:
            given = {"": "does not run in eval mode", "Tensor": "gives a tensor without channels"}
            output = given.get(self.output_type, f"gives {self.output_type}, not one tensor")
            return self.name, self.type, output, "", "", ""
        shape = "×".join(map(str, self.shape))
        if self.is_misread:
            shape += ", channels last" if self.channel_dim == -1 else ", channels first"
        clusters = (
            f"{self.num_clusters:,}" if self.problems == 1 else f"{self.problems} × {self.num_clusters:,}"
        )
        return self.name, self.type, shape, f"{self.features:,}", clusters, format_bytes(self.sketch_bytes)


HEADINGS = ("layer", "type", "output", "features", "clusters", "sketch")
"""What the columns of `LayerPreview.cells` hold."""


@dataclass(frozen=True, repr=False)
class Preview:
    """What `preview` found; printing it shows a table.

    Args:
        layers: the layers picked, in the order of ``named_modules()``.
        patterns: common choices in this model, title to patterns for ``layers=``.
        stages: names of the stages but the last, as far as timm tells them: their outputs, which no shortcut
            bypasses. `DropCluster` takes them where it is told no layers.
        stage_dims: the dimension of the channels in each of these outputs, 1 or -1.
        last_patterns: common choices in a transformer, title to patterns for ``layers=`` with
            ``channel_dim=-1``.
    """

    layers: tuple[LayerPreview, ...]
    patterns: Mapping[str, Sequence[str]]
    stages: Sequence[str] = ()
    stage_dims: Sequence[int] = ()
    last_patterns: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def sketch_bytes(self) -> int:
        """Memory of all sketches while a gathering window is open."""
        return sum(layer.sketch_bytes for layer in self.layers)

    def total(self) -> tuple[str, ...]:
        """Write the last row of the table."""
        features = sum(layer.features for layer in self.layers)
        clusters = sum(layer.problems * layer.num_clusters for layer in self.layers)
        count = f"{len(self.layers)} layer{'s' * (len(self.layers) != 1)}"
        return count, "", "", f"{features:,}", f"{clusters:,}", format_bytes(self.sketch_bytes)

    def __repr__(self) -> str:
        rows = [HEADINGS, *(layer.cells() for layer in self.layers), self.total()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(_align(i, text, widths[i]) for i, text in enumerate(row)).rstrip() for row in rows]
        rule = "─" * (sum(widths) + 2 * len(widths) - 2)
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def preview(
    module: nn.Module,
    layers: Layers | None = None,
    example_input: Any = None,
    *,
    num_clusters: int | None = None,
    cluster_size: float | None = None,
    scope: str = "map",
    num_samples: int = 1024,
    sketch_dim: int = 64,
    channel_dim: int = 1,
    layer_types: LayerTypes | None = None,
) -> Preview:
    """Show what `DropCluster` with these arguments would work on, without training.

    One forward pass in eval mode without gradients finds the layers' shapes; on the meta device it takes
    neither time nor memory. Afterwards the model is as it was: its modes, hooks, buffers and the state of
    the random generators.

    Args:
        module: a LightningModule or any other module. If it has no ``forward`` of its own, its children
            that hold picked layers are called instead.
        layers: as for `DropCluster`; all conv layers if none are given and no timm model names its stages.
        example_input: a batch as ``forward`` takes it (a tensor, a tuple of arguments or a dict of keyword
            arguments), or the shape (C, *spatial) of one sample as a tuple of integers. ``None`` takes the
            module's ``example_input_array``.
        num_clusters: as for `DropCluster`.
        cluster_size: as for `DropCluster`.
        scope: as for `DropCluster`.
        num_samples: as for `DropCluster`; nothing shown depends on it.
        sketch_dim: as for `DropCluster`.
        channel_dim: as for `DropCluster`. A warning names layers that have their channels elsewhere, as far
            as timm or a second pass with larger images tells.
        layer_types: as for `DropCluster`.

    Returns:
        The layers picked and common patterns; printing it shows a table.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of its range, a pattern picks nothing, or there is no input.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2))
        >>> preview(model, "0", (3, 32, 32))
        layer    type    output   features  clusters  sketch
        ────────────────────────────────────────────────────
        0        Conv2d  8×32×32     8,192    8 × 64  2.2 MB
        ────────────────────────────────────────────────────
        1 layer                      8,192       512  2.2 MB
    """
    grouping = Grouping(scope, num_clusters, cluster_size)
    sketches = SketchSettings(scope, num_samples, sketch_dim)
    picked = _select(module, layers, layer_types, check_channel_dim(channel_dim))
    calls = trace_channels(module, picked, example_input)
    first = {name: Call(name, layer, None, None, "") for name, layer in picked.items()}
    for call in calls:
        if call.name in first and first[call.name].shape is None:
            first[call.name] = call
    layouts = find_layouts(module, picked, None if layers is None else channel_dim)
    found = tuple(_describe(call, layouts[call.name], grouping, sketches) for call in first.values())
    if misread := misread_warning([layer.name for layer in found if layer.is_misread], channel_dim):
        warnings.warn(misread, stacklevel=2)
    stages = suggest_stages(calls)
    return Preview(
        found,
        suggest_patterns(module, calls),
        tuple(stage.name for stage in stages),
        tuple(stage.channel_dim or 1 for stage in stages),
        suggest_last_patterns(module, calls),
    )


def misread_warning(names: Sequence[str], channel_dim: int) -> str | None:
    """Say that the channels of layers are elsewhere, and what to do."""
    if not names:
        return None
    place, remedy = misreading(channel_dim)
    listed = ", ".join(names[:5]) + ", ..." * (len(names) > 5)
    return f"channel_dim={channel_dim}: channels come {place} in the outputs of {listed}; {remedy}"


def format_bytes(size: int) -> str:
    """Write a size in memory for people.

    Example:
        >>> format_bytes(2_195_459)
        '2.2 MB'
        >>> format_bytes(4_224)
        '4.2 kB'
    """
    for unit, bytes_in_it in (("GB", 1e9), ("MB", 1e6)):
        if size >= bytes_in_it:
            return f"{size / bytes_in_it:,.1f} {unit}"
    return f"{size / 1e3:,.1f} kB"


def _select(
    module: nn.Module, layers: Layers | None, layer_types: LayerTypes | None, channel_dim: int
) -> dict[str, nn.Module]:
    try:
        return select_layers(module, layers, layer_types, channel_dim=channel_dim)
    except ValueError:
        if layers is not None:
            raise
        return select_layers(module, "**", layer_types or CONV_LAYERS)


def _describe(call: Call, layout: Layout, grouping: Grouping, sketches: SketchSettings) -> LayerPreview:
    kind = type(call.module).__name__
    if call.shape is None:
        return LayerPreview(call.name, kind, None, output_type=call.output_type)
    # A conv is only ever meant with its channels first.
    used = 1 if isinstance(call.module, CONV_LAYERS) else layout.channel_dim
    output = torch.empty(1, *call.shape, device="meta")
    shape = tuple(replace(layout, channel_dim=used).split(output)[0].shape[1:])
    sketch = sketches.make(shape, 0, torch.device("meta"))
    return LayerPreview(
        call.name,
        kind,
        shape,
        problems=SCOPES[grouping.scope].problems(shape)[0],
        num_clusters=grouping.clusters_for(shape),
        sketch_bytes=sum(buffer.nbytes for buffer in sketch.buffers()),
        output_type=call.output_type,
        channel_dim=call.channel_dim,
        is_misread=None not in (used, call.channel_dim) and used != call.channel_dim,
    )


def _align(column: int, text: str, width: int) -> str:
    return text.ljust(width) if column < 3 else text.rjust(width)
