"""Injection: run modules x -> x on the outputs of chosen layers, and leave nothing behind."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _globals
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


def unused_layers_error(names: list[str]) -> RuntimeError | None:
    """Return an error that names layers which never ran in training, ``None`` where there are none."""
    if not names:
        return None
    return RuntimeError(
        f"layers: {', '.join(map(repr, names))} did not run in any training step so far; "
        "choose layers whose forward the training step calls. A stage is not called where its blocks or "
        "layers are called one by one: by gradient checkpointing in some of timm's models (ResNets among "
        "them), by feature extractors and others that trace with torch.fx, by code that loops over its "
        "children; pick the layers inside it. Leave out a model that training does not run, such as an "
        "average of the weights, by naming the child that trains in the pattern"
    )


def backward_hook_warning(layers: Mapping[str, nn.Module]) -> str | None:
    """Say which layers have parameters and backward hooks, which see the gradient behind what is dropped."""
    every = bool(_globals._global_backward_hooks or _globals._global_backward_pre_hooks)
    names = [
        name
        for name, layer in layers.items()
        if (every or layer._backward_hooks or layer._backward_pre_hooks)
        and next(layer.parameters(), None) is not None
    ]
    if not names:
        return None
    return (
        f"layers {', '.join(names)} have backward hooks. torch hands these the gradient of what is left "
        "after dropping, not that of the layer's own output, so per-sample gradients and the like that are "
        "made from it are wrong. Drop behind the layer instead: pick the activation that follows it, for "
        "example with layer_types=torch.nn.ReLU"
    )


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
