"""The layers of a timm model, as the command line lists them."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import timm
import torch
from torch import nn

from lightning_dropcluster.cli.tables import print_layers
from lightning_dropcluster.inspection.preview import Preview, preview
from lightning_dropcluster.layers.patterns import nearest_names
from lightning_dropcluster.layers.selection import CONV_LAYERS, select_layers


def show_layers(
    name: str,
    match: list[str] | None,
    shape: tuple[int, ...] | None,
    *,
    any_layer: bool,
    show_all: bool,
    channel_dim: int,
    **settings: Any,
) -> None:
    """Print a model's conv layers and what patterns pick; the settings are those of `preview`."""
    if any_layer and match is None:
        raise ValueError("--any-layer: needs --match, or every module would be picked")
    kinds = nn.Module if any_layer else None
    if match is None:
        kinds = CONV_LAYERS
    pick = partial(select_layers, layers=match or "**", layer_types=kinds, channel_dim=channel_dim)
    network, found = _look(name, shape, pick, settings | {"channel_dim": channel_dim})
    picked = None if match is None else set(pick(network))
    size = "×".join(map(str, shape or network.default_cfg["input_size"]))
    print_layers(
        name, size, found, picked, scope=settings["scope"], channel_dim=channel_dim, show_all=show_all
    )


def _convs(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, CONV_LAYERS))


def _look(
    name: str,
    shape: tuple[int, ...] | None,
    pick: Callable[[nn.Module], dict[str, nn.Module]],
    settings: dict[str, Any],
) -> tuple[Any, Preview]:
    """Build a model and preview its conv layers and what is picked: on the meta device, or in memory."""
    for device in ("meta", "cpu"):
        try:
            with torch.device(device):
                model = _create(name, shape)
            shown = {id(layer) for layer in [*pick(model).values(), *_convs(model)]}
            with warnings.catch_warnings(action="ignore"):  # the notes below the table say it
                found = preview(
                    model,
                    lambda _, module, shown=shown: id(module) in shown,
                    shape or model.default_cfg["input_size"],
                    layer_types=nn.Module,
                    **settings,
                )
            return model, found
        except (NotImplementedError, RuntimeError, AssertionError) as error:
            failure = error
    raise ValueError(f"{name}: the model does not run on input={shape or 'its own size'}: {failure}")


def _create(name: str, shape: tuple[int, ...] | None) -> Any:
    if not timm.is_model(name):
        near = ", ".join(nearest_names(name, timm.list_models()))
        raise ValueError(f"model={name!r}: timm {timm.__version__} has no such model; nearest: {near}")
    options: dict[str, Any] = {} if shape is None or shape[0] == 3 else {"in_chans": shape[0]}
    return timm.create_model(name, **options)
