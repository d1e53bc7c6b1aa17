"""One forward pass that tells which layers run, and with what output."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dropcluster.layers.selection import select_layers
from lightning_dropcluster.layers.stages import Step, stage_ends
from lightning_dropcluster.layers.wrappers import CONV_LAYERS, name_modules
from lightning_dropcluster.learning.scopes import Shape

_NO_FORWARD = {"_forward_unimplemented", "LightningModule.forward"}


@dataclass(frozen=True)
class Call(Step):
    """One call of a module in a forward pass."""

    shape: Shape | None
    output_type: str
    is_first: bool = False
    channel_dim: int | None = None  # 1 or -1, where it is known

    @property
    def grid(self) -> Shape:
        """The output's shape without its channels, which come first unless they are known to be last."""
        if not self.shape:
            return ()
        return self.shape[:-1] if self.channel_dim == -1 else self.shape[1:]

    @property
    def gives_stage_maps(self) -> bool:
        """Whether it ends a stage with features of more than one position, wherever the channels are."""
        is_stage = bool(self.shape) and self.stage_channels in (self.shape[0], self.shape[-1])
        return is_stage and prod(self.grid) > 1

    @property
    def is_conv(self) -> bool:
        """Whether a conv layer ran, on maps of more than one position (not a squeeze-and-excite's)."""
        return isinstance(self.module, CONV_LAYERS) and prod(self.grid) > 1


def trace(
    module: nn.Module,
    picked: Mapping[str, nn.Module],
    example_input: Any,
    *,
    others: Mapping[str, nn.Module] | None = None,
    larger: bool = False,
) -> list[Call]:
    """Run a model once and note which layers run, in what order and with what output.

    These are conv layers, ends of stages, what is picked and others; with ``larger`` images are larger.
    """
    args, kwargs = _arguments(module, example_input)
    if larger:
        args = tuple(map(_enlarged, args))
        kwargs = {name: _enlarged(value) for name, value in kwargs.items()}
    calls: list[Call] = []
    ends, named = stage_ends(module), name_modules(module)
    convs = _convs(module)
    watched = {**convs, **(others or {}), **picked, **{name: named[name] for name in ends}}
    first: tuple[Any, ...] = ()  # inputs of the first conv, kept lest another tensor take their place

    def note(name: str, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal first
        given = inputs if name in convs else ()
        first = first or given
        is_first = bool(given) and given[0] is first[0]
        shape = tuple(output.shape[1:]) if isinstance(output, Tensor) and output.ndim > 1 else None
        calls.append(Call(name, watched[name], ends.get(name), shape, type(output).__name__, is_first))

    with ExitStack() as stack:
        for name, layer in watched.items():
            hook = layer.register_forward_hook(lambda _layer, *given, name=name: note(name, *given))
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
        return select_layers(module, "**", CONV_LAYERS)
    except ValueError:  # there is none
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


def _enlarged(value: Any) -> Any:
    """Make an image larger: each side by what most models let it grow by."""
    is_image = isinstance(value, Tensor) and value.ndim > 2
    return value.new_zeros(*value.shape[:2], *(side + 32 for side in value.shape[2:])) if is_image else value


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
