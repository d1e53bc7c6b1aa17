"""Injection: run modules x -> x on the outputs of chosen layers, and leave nothing behind."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_dropcluster.layers.copies import copy_as_usual, leave_hooks_out_of_copies
from lightning_dropcluster.layers.hooks import LayerHook


class Injection:
    """Regularisers attached to layers by forward hooks, see `LayerHook`.

    A hook acts on every call of a layer that runs several times in a forward pass. It comes before the hooks
    of others, so that they see what the next layer gets, but after those of torch itself (quantisation,
    sharding), without which the output is not complete. Copies and pickles of the layers have no such hook.

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
        regularizers: Mapping[str, nn.Module | None],
        *,
        in_eval: bool = False,
    ) -> None:
        if set(layers) != set(regularizers):
            raise ValueError(
                f"regularizers={sorted(regularizers)}: must name the same layers as layers={sorted(layers)}"
            )
        self.layers, self.in_eval = dict(layers), in_eval
        self.hooks = {
            name: LayerHook(name, layer, regularizers[name], in_eval=in_eval)
            for name, layer in layers.items()
        }
        self._handles: list[RemovableHandle] = []

    @property
    def attached(self) -> bool:
        """Whether the hooks are on the layers."""
        return bool(self._handles)

    def attach(self) -> "Injection":
        """Put the hooks on the layers; nothing happens where they are on already.

        What ``torch.compile`` has compiled so far is compiled anew, since it would not notice the hooks.
        Hooks that act in eval mode too leave it alone: run the model eagerly there.
        """
        if not self.attached:
            if not self.in_eval:
                forget_compiled_code()
            for name, hook in self.hooks.items():
                hook.fired = False
                self._handles.append(_put_first(self.layers[name], hook))
                leave_hooks_out_of_copies(self.layers[name])
        return self

    def detach(self) -> None:
        """Take the hooks off; nothing happens where they are off already."""
        while self._handles:
            self._handles.pop().remove()
        for layer in self.layers.values():
            copy_as_usual(layer)

    def never_ran(self) -> list[str]:
        """Name the layers that have not run in training mode since they were attached, but are in it."""
        return [n for n, hook in self.hooks.items() if not hook.fired and self.layers[n].training]

    def pause(self) -> None:
        """Regularise nothing until the next step begins."""
        for hook in self.hooks.values():
            hook.active = False

    def __enter__(self) -> "Injection":
        return self.attach()

    def __exit__(self, *exception: object) -> None:
        self.detach()


class HookedLayers:
    """The layers that a callback has hooked; none before it attaches and after it has let go."""

    def __init__(self) -> None:
        self._injection = Injection({}, {})

    @property
    def hooks(self) -> dict[str, LayerHook]:
        """The hook of each layer."""
        return self._injection.hooks

    def detach(self) -> None:
        """Take every hook off; nothing happens where that is done."""
        self._injection.detach()
        self._injection = Injection({}, {})

    def pause(self) -> None:
        """Drop nothing until the next step begins."""
        self._injection.pause()

    def never_ran(self) -> list[str]:
        """Name the layers in training mode that have not run since they were hooked."""
        return self._injection.never_ran()


def forget_compiled_code() -> None:
    """Have everything compiled anew: compiled code does not notice new hooks, and anybody may hold some."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def _put_first(layer: nn.Module, hook: LayerHook) -> RemovableHandle:
    """Register a hook before all others but torch's own."""
    handle = layer.register_forward_hook(hook, prepend=True)
    hooks: Any = layer._forward_hooks  # an OrderedDict, though torch declares less
    for key in reversed([key for key, other in hooks.items() if _is_of_torch(other)]):
        hooks.move_to_end(key, last=False)
    return handle


def _is_of_torch(hook: object) -> bool:
    return (getattr(hook, "__module__", None) or "").partition(".")[0] == "torch"
