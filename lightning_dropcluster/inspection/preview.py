"""A look before training: what patterns pick, how many clusters it makes, and what gathering them takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from lightning_dropcluster.checks import MAX_INT, check_number
from lightning_dropcluster.inspection.suggestions import suggest_patterns, suggest_stages
from lightning_dropcluster.inspection.tracing import Call, trace
from lightning_dropcluster.layers.selection import CONV_LAYERS, Layers, LayerTypes, select_layers
from lightning_dropcluster.learning.scopes import SCOPES, Grouping, Shape
from lightning_dropcluster.learning.sketch import Sketch


@dataclass(frozen=True)
class LayerPreview:
    """One layer as the callback would treat it.

    Args:
        name: as `select_layers` gives it.
        type: the module's class.
        shape: (C, *spatial) of the output, ``None`` where that is not one tensor, or the layer does not
            run in eval mode.
        problems: how many clusterings there are, for example one per feature map.
        num_clusters: clusters in each of them.
        sketch_bytes: memory of the layer's sketch while a gathering window is open.
        output_type: name of the output's class, empty where the layer does not run in eval mode.
        channels_last: whether the last dimension is known to hold the channels, as it does in the stages of
            Swin and the blocks of ViT; rows or tokens would be taken for channels.
    """

    name: str
    type: str
    shape: Shape | None
    problems: int = 0
    num_clusters: int = 0
    sketch_bytes: int = 0
    output_type: str = ""
    channels_last: bool = False

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
        shape = "×".join(map(str, self.shape)) + ", channels last" * self.channels_last
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
    """

    layers: tuple[LayerPreview, ...]
    patterns: Mapping[str, Sequence[str]]
    stages: Sequence[str] = ()

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
    layer_types: LayerTypes | None = None,
) -> Preview:
    """Show what `DropCluster` with these arguments would work on, without training.

    One forward pass in eval mode without gradients tells the layers' shapes; on the meta device it takes
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
        num_samples: as for `DropCluster`.
        sketch_dim: as for `DropCluster`.
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
    sizes = {
        "num_samples": check_number("num_samples", num_samples, 1, MAX_INT, integer=True),
        "sketch_dim": check_number("sketch_dim", sketch_dim, 1, MAX_INT, integer=True),
    }
    picked = _select(module, layers, layer_types)
    calls = trace(module, picked, example_input)
    first = {name: Call(name, layer, None, "") for name, layer in picked.items()}
    for call in calls:
        if call.name in first and first[call.name].shape is None:
            first[call.name] = call
    found = (_describe(call, grouping, sizes) for call in first.values())
    return Preview(tuple(found), suggest_patterns(module, calls), tuple(suggest_stages(calls)))


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


def _select(module: nn.Module, layers: Layers | None, layer_types: LayerTypes | None) -> dict[str, nn.Module]:
    try:
        return select_layers(module, layers, layer_types)
    except ValueError:
        if layers is not None:
            raise
        return select_layers(module, "**", layer_types or CONV_LAYERS)


def _describe(call: Call, grouping: Grouping, sizes: Mapping[str, Any]) -> LayerPreview:
    kind, shape = type(call.module).__name__, call.shape
    if shape is None:
        return LayerPreview(call.name, kind, None, output_type=call.output_type)
    sketch = Sketch(shape, scope=grouping.scope, device=torch.device("meta"), **sizes)
    return LayerPreview(
        call.name,
        kind,
        shape,
        problems=SCOPES[grouping.scope].problems(shape)[0],
        num_clusters=grouping.clusters_for(shape),
        sketch_bytes=sum(buffer.nbytes for buffer in sketch.buffers()),
        output_type=call.output_type,
        channels_last=call.has_channels_last,
    )


def _align(column: int, text: str, width: int) -> str:
    return text.ljust(width) if column < 3 else text.rjust(width)
