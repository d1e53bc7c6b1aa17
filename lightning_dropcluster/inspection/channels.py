"""Which dimension of an output holds the channels, as far as a model tells; parts that have them last."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from math import prod
from typing import Any

from torch import nn

from lightning_dropcluster.inspection.tracing import Call, trace
from lightning_dropcluster.layers.wrappers import CONV_LAYERS, name_modules
from lightning_dropcluster.learning.scopes import Shape

_ATTENTION, _MLP = re.compile(r"(self_)?attn\d*"), re.compile(r"mlp(_channels)?\d*")


def trace_channels(module: nn.Module, picked: Mapping[str, nn.Module], example_input: Any) -> list[Call]:
    """Trace what is picked and what may be suggested, and find out where the channels are."""
    parts = {name: part for chosen in transformer_parts(module).values() for name, part in chosen.items()}
    calls = tell_channels(trace(module, picked, example_input, others=parts))
    shapes = [call.shape or () for call in calls if call.name in picked and call.channel_dim is None]
    if any(len(shape) > 1 for shape in shapes):
        with suppress(Exception):  # many models take images of one size alone
            return tell_channels(calls, trace(module, picked, example_input, larger=True))
    return calls


def tell_channels(calls: Sequence[Call], larger: Sequence[Call] = ()) -> list[Call]:
    """Note in calls where the channels are; perhaps with the help of calls with larger images."""
    sizes = {call.name: call.shape for call in reversed(larger)}
    told, num_channels = [], None
    for call in reversed(calls):
        num_channels = call.stage_channels or num_channels  # of the stage that is under way
        told.append(replace(call, channel_dim=_tell(call, num_channels, sizes.get(call.name))))
    return told[::-1]


def transformer_parts(root: nn.Module) -> dict[str, dict[str, nn.Module]]:
    """Find attention, MLPs and what holds one of them, by their names: title to modules."""
    names = name_modules(root)
    last = {name: name.rpartition(".")[2] for name in names}
    attention = [name for name in names if _ATTENTION.fullmatch(last[name])]
    mlps = [name for name in names if _MLP.fullmatch(last[name])]
    blocks = dict.fromkeys(name.rpartition(".")[0] for name in (*attention, *mlps))
    choices = {"outputs of blocks": [*filter(None, blocks)]}
    choices |= {"attention branches": attention, "MLP branches": mlps}
    return {title: {name: names[name] for name in chosen} for title, chosen in choices.items()}


def _tell(call: Call, num_channels: int | None, larger: Shape | None) -> int | None:
    if call.shape is None or prod(call.shape) == max(call.shape):
        return None
    if isinstance(call.module, CONV_LAYERS):
        return 1
    if isinstance(call.module, nn.Linear):
        return -1
    first, last = call.shape[0], call.shape[-1]
    knows = call.ends_stage or any(isinstance(inner, nn.Linear) for inner in call.module.modules())
    if knows and (first == num_channels) != (last == num_channels):
        return 1 if first == num_channels else -1
    if larger is not None and (first == larger[0]) != (last == larger[-1]):
        return 1 if first == larger[0] else -1
    return None
