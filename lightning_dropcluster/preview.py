"""A look before training: what patterns pick, how many clusters it makes, and what gathering them takes."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dropcluster.checks import MAX_INT, check_number
from lightning_dropcluster.layers import Layers, LayerTypes, select_layers
from lightning_dropcluster.scopes import SCOPES, Grouping, Shape
from lightning_dropcluster.sketch import Sketch
from lightning_dropcluster.suggestions import Call, stage_ends, suggest_patterns, suggest_stages

_NO_FORWARD = {"_forward_unimplemented", "LightningModule.forward"}


@dataclass(frozen=True)
class LayerPreview:
    """One layer as the callback would treat it.

    Args:
        name: as `select_layers` gives it.
        type: the module's class.
        shape: (C, *spatial) of the output, ``None`` where the layer does not run in eval mode.
        problems: how many clusterings there are, for example one per feature map.
        num_clusters: clusters in each of them.
        sketch_bytes: memory of the layer's sketch while a gathering window is open.
    """

    name: str
    type: str
    shape: Shape | None
    problems: int = 0
    num_clusters: int = 0
    sketch_bytes: int = 0

    @property
    def features(self) -> int:
        """Cells of the output."""
        return prod(self.shape) if self.shape else 0

    def cells(self) -> tuple[str, ...]:
        """Write the layer as a table row.

        Returns:
            One text for each of `HEADINGS`.
        """
        if self.shape is None:
            return self.name, self.type, "does not run in eval mode", "", "", ""
        shape = "×".join(map(str, self.shape))
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
        stages: names of the stages but the last, as far as timm tells them, for ``layers=`` together with
            ``layer_types=torch.nn.Module``: their outputs, past which no shortcut leads.
    """

    layers: tuple[LayerPreview, ...]
    patterns: Mapping[str, Sequence[str]]
    stages: Sequence[str] = ()

    @property
    def sketch_bytes(self) -> int:
        """Memory of all sketches while a gathering window is open."""
        return sum(layer.sketch_bytes for layer in self.layers)

    def total(self) -> tuple[str, ...]:
        """Write the last row of the table.

        Returns:
            One text for each of `HEADINGS`.
        """
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
    layers: Layers = "**",
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
        module: a LightningModule or any other module. Where it has no ``forward`` of its own, its children
            that hold picked layers are called instead.
        layers: as for `DropCluster`; all conv layers by default.
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
        TypeError: where an argument has a wrong type.
        ValueError: where an argument is out of its range, a pattern picks nothing, or there is no input.

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
    picked = select_layers(module, layers, layer_types)
    calls = _trace(module, picked, example_input)
    shapes = {call.name: call.shape for call in reversed(calls) if call.shape}
    found = (_describe(name, layer, shapes.get(name), grouping, sizes) for name, layer in picked.items())
    return Preview(tuple(found), suggest_patterns(module, calls), tuple(suggest_stages(calls)))


def format_bytes(size: int) -> str:
    """Write a size in memory for people.

    Args:
        size: in bytes.

    Returns:
        Such as ``"2.2 MB"``.

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


def _describe(
    name: str, layer: nn.Module, shape: Shape | None, grouping: Grouping, sizes: Mapping[str, Any]
) -> LayerPreview:
    if shape is None:
        return LayerPreview(name, type(layer).__name__, None)
    sketch = Sketch(shape, scope=grouping.scope, device=torch.device("meta"), **sizes)
    return LayerPreview(
        name,
        type(layer).__name__,
        shape,
        problems=SCOPES[grouping.scope].problems(shape)[0],
        num_clusters=grouping.clusters_for(shape),
        sketch_bytes=sum(buffer.nbytes for buffer in sketch.buffers()),
    )


def _trace(module: nn.Module, picked: Mapping[str, nn.Module], example_input: Any) -> list[Call]:
    """Run the model once and note which layers run, in what order and with what output."""
    args, kwargs = _arguments(module, example_input)
    calls: list[Call] = []
    ends = stage_ends(module)
    watched = {**_convs(module), **picked, **{name: module.get_submodule(name) for name in ends}}

    def note(name: str, output: Any) -> None:
        shape = tuple(output.shape[1:]) if isinstance(output, Tensor) and output.ndim > 1 else None
        calls.append(Call(name, watched[name], shape, ends.get(name)))

    with ExitStack() as stack:
        for name, layer in watched.items():
            hook = layer.register_forward_hook(lambda _layer, _inputs, output, name=name: note(name, output))
            stack.callback(hook.remove)
        stack.enter_context(_left_as_it_was(module))
        try:
            for called in _callable_modules(module, picked):
                _call_on_copied_buffers(called, args, kwargs)
        except Exception as error:
            shapes = [tuple(x.shape) for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            error.add_note(
                f"example_input: the module was called with inputs of shapes {shapes}; give a batch, or the "
                "shape (C, *spatial) of one sample, without the batch"
            )
            raise
    return calls


def _call_on_copied_buffers(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run a model whose buffers are copies, so that what it writes into them is lost."""
    copies = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with torch.compiler.set_stance("force_eager"):
        torch.func.functional_call(module, copies, args, kwargs)


def _convs(module: nn.Module) -> dict[str, nn.Module]:
    try:
        return select_layers(module, "**")
    except ValueError:  # no conv layer at all: the pattern was for other types
        return {}


def _callable_modules(module: nn.Module, picked: Mapping[str, nn.Module]) -> list[nn.Module]:
    """The module, or its children that hold picked layers where it has no forward."""
    if type(module).forward.__qualname__ not in _NO_FORWARD:
        return [module]
    ids = {id(layer) for layer in picked.values()}
    return [child for child in module.children() if any(id(inner) in ids for inner in child.modules())]


@contextmanager
def _left_as_it_was(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, and afterwards the modes and random generators as before."""
    training = [inner for inner in module.modules() if inner.training]
    devices = {weight.device for weight in module.parameters() if weight.device.type == "cuda"}
    try:
        for inner in training:
            inner.training = False
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        for inner in training:
            inner.training = True


def _arguments(module: nn.Module, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make what ``forward`` is called with, on the model's device."""
    if example is None:
        example = getattr(module, "example_input_array", None)
    if example is None:
        raise ValueError(
            "example_input: give a batch, or the shape of one sample such as (3, 224, 224); the module "
            "has no example_input_array"
        )
    weight = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    if (shape := _sample_shape(example)) is not None:
        return (torch.zeros(1, *shape, dtype=weight.dtype, device=weight.device),), {}
    if isinstance(example, Mapping):
        return (), {name: _moved(value, weight.device) for name, value in example.items()}
    values = example if isinstance(example, tuple | list) else (example,)
    return tuple(_moved(value, weight.device) for value in values), {}


def _sample_shape(example: Any) -> tuple[int, ...] | None:
    """Read the shape of a sample; ``None`` where it is no shape but a batch."""
    is_listed = isinstance(example, tuple | list)
    sides: Any = example if is_listed else (example,)
    if not all(isinstance(side, int | float | str) for side in sides):
        return None
    if not (is_listed and sides and all(type(side) is int and side > 0 for side in sides)):
        raise ValueError(
            f"example_input={example!r}: must be a batch, or the shape (C, *spatial) of one sample, integers "
            "of at least 1"
        )
    return tuple(sides)


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _align(column: int, text: str, width: int) -> str:
    return text.ljust(width) if column < 3 else text.rjust(width)
