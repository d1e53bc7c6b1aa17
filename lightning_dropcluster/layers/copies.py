"""Copies and pickles of a hooked layer are plain: nobody would steer or remove a hook of theirs."""

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from lightning_dropcluster.layers.hooks import LayerHook

_METHODS = ("__deepcopy__", "__reduce_ex__")  # copy and pickle look them up on the object itself


def leave_hooks_out_of_copies(layer: nn.Module) -> None:
    """Have copies and pickles of a layer made without our hooks, whatever its class does to make them."""
    vars(layer).update(zip(_METHODS, (partial(_deepcopy, layer), partial(_reduce, layer)), strict=True))


def copy_as_usual(layer: nn.Module) -> None:
    """Undo `leave_hooks_out_of_copies`, unless the layer still has one of our hooks."""
    if not any(isinstance(hook, LayerHook) for hook in layer._forward_hooks.values()):
        for name in _METHODS:
            vars(layer).pop(name, None)


def _deepcopy(layer: nn.Module, memo: dict[int, Any]) -> nn.Module:
    with _without_hooks(layer):
        return copy.deepcopy(layer, memo)


def _reduce(layer: nn.Module, protocol: Any) -> Any:
    with _without_hooks(layer):
        return layer.__reduce_ex__(protocol)


@contextmanager
def _without_hooks(layer: nn.Module) -> Iterator[None]:
    """Show the layer as it would be without our hooks; what was read meanwhile stays so."""
    attributes = vars(layer)
    hooks = {key: hook for key, hook in layer._forward_hooks.items() if not isinstance(hook, LayerHook)}
    plain = {name: value for name, value in attributes.items() if name not in _METHODS}
    object.__setattr__(layer, "__dict__", plain | {"_forward_hooks": OrderedDict(hooks)})
    try:
        yield
    finally:
        object.__setattr__(layer, "__dict__", attributes)
