"""Injection: run modules x -> x on the outputs of chosen layers, and leave nothing behind."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle


class Injection:
    """Regularisers attached to layers by forward hooks.

    A hook acts only while its layer is in training mode. It acts on every call of a layer that runs several
    times in a forward pass. Copies and pickles of an attached model carry hooks that do nothing.

    Args:
        layers: name to layer.
        regularizers: a module x -> x for each of these names; it is not registered in the model, so the
            model's state_dict does not know of it.
        in_eval: whether to act while the layer is in eval mode too. Compiled code then stays, and does not
            know of the hooks: run the model eagerly.

    Raises:
        ValueError: where the names differ.

    Example:
        >>> conv = nn.Conv2d(1, 1, 1)
        >>> with Injection({"conv": conv}, {"conv": nn.Dropout2d()}):
        ...     len(conv._forward_hooks)
        1
        >>> len(conv._forward_hooks)
        0
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        regularizers: Mapping[str, nn.Module],
        *,
        in_eval: bool = False,
    ) -> None:
        if set(layers) != set(regularizers):
            raise ValueError(
                f"regularizers={sorted(regularizers)}: must name the same layers as layers={sorted(layers)}"
            )
        self.layers, self.in_eval = dict(layers), in_eval
        self._hooks = {name: _Hook(name, layers[name], regularizers[name], in_eval) for name in layers}
        self._handles: list[RemovableHandle] = []

    @property
    def attached(self) -> bool:
        """Whether the hooks are on the layers."""
        return bool(self._handles)

    def attach(self) -> "Injection":
        """Put the hooks on the layers; nothing happens where they are on already.

        What ``torch.compile`` has compiled so far is compiled anew, since it would not notice the hooks; not
        where they act in eval mode too, see above.

        Returns:
            Itself, for use in a ``with`` statement.
        """
        if not self.attached:
            if not self.in_eval:
                forget_compiled_code()
            for hook in self._hooks.values():
                hook.fired = False
            self._handles = [
                layer.register_forward_hook(self._hooks[name]) for name, layer in self.layers.items()
            ]
        return self

    def detach(self) -> None:
        """Take the hooks off; nothing happens where they are off already."""
        while self._handles:
            self._handles.pop().remove()

    def silent(self) -> list[str]:
        """Name the layers that have not run in training mode since they were attached, but are in it.

        Returns:
            Their names, in order.
        """
        return [n for n, hook in self._hooks.items() if not hook.fired and self.layers[n].training]

    def __enter__(self) -> "Injection":
        return self.attach()

    def __exit__(self, *exception: object) -> None:
        self.detach()


def silence_error(silent: list[str]) -> RuntimeError | None:
    """Return what to raise where layers have not run in training.

    Args:
        silent: their names.

    Returns:
        An error that names them, ``None`` where there are none.
    """
    if not silent:
        return None
    return RuntimeError(
        f"layers: {', '.join(map(repr, silent))} did not run in any training step so far; "
        "choose layers whose forward the training step calls (with gradient checkpointing some of timm's "
        "models, ResNets among them, call the blocks of a stage, not the stage)"
    )


class _Hook:
    """A forward hook that hands the output of a layer in training mode to a regulariser."""

    def __init__(self, name: str, layer: nn.Module, regularizer: nn.Module, in_eval: bool) -> None:
        self.name, self.regularizer, self.in_eval = name, regularizer, in_eval
        self.fired = False
        # A conv says how many dimensions a batch has; of other layers anything with a batch will do.
        self.num_dims = len(layer.kernel_size) + 2 if isinstance(layer, _ConvNd) else None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        if not (module.training or self.in_eval):
            return None
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise TypeError(
                f"layers: the output of {self.name!r} ({type(module).__name__}) is {_describe(output)}; "
                "it must be one floating-point tensor"
            )
        if output.ndim != self.num_dims if self.num_dims else output.ndim < 2:
            raise ValueError(
                f"layers: the output of {self.name!r} has shape {tuple(output.shape)}; "
                f"it must be a batch, of {self.num_dims or 'at least 2'} dimensions"
            )
        self.fired = True
        return self.regularizer(output)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _CopiedHook, ()


class _CopiedHook:
    """What a copy of an attached model has in place of a hook: nobody would steer or remove a live one."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        return None


def forget_compiled_code() -> None:
    """Have everything compiled anew: compiled code does not notice new hooks, and anybody may hold some."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def _describe(output: Any) -> str:
    return f"a {output.dtype} tensor" if isinstance(output, Tensor) else f"a {type(output).__name__}"
