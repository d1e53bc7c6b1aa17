"""Making regularisers: from what a user gives to a module x -> x for one layer."""

import copy
import inspect
import math
from collections.abc import Callable
from numbers import Real
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_dropcluster.layers.selection import count_channels

Source = nn.Module | Callable[..., nn.Module]
"""A module to copy, or what makes one of nothing or of the layer's number of channels."""


def make_regularizer(source: Source, layer: nn.Module, name: str) -> nn.Module:
    """Make the regulariser of a layer."""
    if isinstance(source, nn.Module):
        made = copy.deepcopy(source)
    else:
        arguments = _arguments(source, layer, name)
        try:
            made = source(*arguments)
        except Exception as error:
            call = ", ".join(map(str, arguments))
            raise ValueError(f"regularizer={source!r}: calling it with ({call}) failed: {error}") from error
    if not isinstance(made, nn.Module):
        raise TypeError(f"regularizer={source!r}: must make a torch.nn.Module, not a {type(made).__name__}")
    if any(map(is_lazy, made.parameters())):
        raise ValueError(
            f"regularizer={source!r}: makes lazy parameters, which no optimiser takes; let it take the "
            "number of channels"
        )
    return made.train()


def has_drop_prob(regularizer: object) -> bool:
    """Whether a module, or the modules of a class, let their drop probability be set."""
    return callable(getattr(regularizer, "set_drop_prob", None))


def is_learned(regularizer: nn.Module) -> bool:
    """Whether a module has parameters."""
    return next(regularizer.parameters(), None) is not None


def own_drop_prob(regularizer: nn.Module) -> float:
    """Return the drop probability that a module tells."""
    for value in (getattr(regularizer, "drop_prob", None), getattr(regularizer, "p", None)):
        if isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1):
            return float(value)
    return math.nan


def check_setting(name: str, value: Any, regularizer: nn.Module | type) -> None:
    """Check that a setting of the drop probability goes with a regulariser."""
    if value is not None and not has_drop_prob(regularizer):
        kind = regularizer if isinstance(regularizer, type) else type(regularizer)
        raise ValueError(
            f"{name}={value!r}: {kind.__name__} has no method set_drop_prob(float), so it is applied as it "
            f"is from start on; leave {name} out"
        )


def _arguments(source: Callable[..., nn.Module], layer: nn.Module, name: str) -> list[int]:
    """What to call a source with: nothing, or the layer's number of channels."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(source).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind in kinds]
    if not needed:
        return []
    if len(needed) > 1:
        raise ValueError(
            f"regularizer={source!r}: needs {', '.join(needed[1:])}; give a callable of the number of "
            "channels alone, or a module"
        )
    channels = count_channels(layer)
    if channels is None:
        raise ValueError(
            f"regularizer={source!r}: needs the number of channels, which layer {name!r} does not tell: set "
            "the layer's attribute out_channels, or give a module"
        )
    return [channels]
