"""The methods that are compared, each as a callback."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
from torch import nn

from benchmarks.common.models import OWN_RATES, tell_channels
from benchmarks.gain.controls import Blocks, Shuffled
from benchmarks.gain.settings import Settings
from lightning_dropcluster import REGULARIZERS, DropCluster, StructuredDropout
from lightning_dropcluster.callbacks.ramps import RAMPS, Ramp
from lightning_dropcluster.clustering import Clusterer, FaissKMeans

UNHOOKED = ("none", *OWN_RATES)
WITH_BLOCKS = ("drop_block", "prob_drop_block", "corr_drop")

# Settings that callbacks take under the same name; a new option of theirs belongs here and in `Settings`.
OF_BOTH = ("start", "clean_statistics", "channel_dim")
OF_DROP_CLUSTER = ("fill", "cluster_size", "scope", "every_n_epochs", "num_samples", "per_sample", "seed")


def build_callback(settings: Settings, model: nn.Module, **changes: Any) -> pl.Callback | None:
    """Make the callback that the settings describe.

    Args:
        settings: of the run.
        model: whose first convolution is taken where the settings name no layers.
        changes: options of DropCluster, in place of those that the settings name.

    Returns:
        The callback, or None where nothing is hooked.
    """
    if settings.regularizer in UNHOOKED:
        return None
    first = next((name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)), "**")
    layers = f"model.{first}" if settings.layers is None else settings.layers
    common = {**_named(settings, OF_BOTH), "layer_types": nn.Module if settings.any_layer else None}
    is_auto = settings.drop_prob == "auto"
    common["schedule"] = None if is_auto else ramp(settings)
    paired = {"paired": settings.pair_weight > 0}
    if settings.regularizer == "dropcluster":
        own = {**_named(settings, OF_DROP_CLUSTER), **paired, "clusterer": _clusterer(settings)}
        return DropCluster(layers, settings.drop_prob, **{**common, **own, **changes})
    if settings.regularizer == "advanced_dropout":  # learns what others are told, and is made layer by layer
        tell_channels(model)
        return StructuredDropout(layers, settings.regularizer, **{**common, "schedule": None})
    blocks = {"block_size": settings.block_size} if settings.regularizer in WITH_BLOCKS else {}
    regularizer = REGULARIZERS[settings.regularizer](
        0.0 if is_auto else settings.drop_prob, **paired, **blocks
    )
    return StructuredDropout(layers, regularizer, "auto" if is_auto else None, **common)


def build_second(settings: Settings, model: nn.Module) -> pl.Callback | None:
    """Make the callback that works beside the first; None where there is none."""
    if settings.beside is None:
        return None
    return build_callback(replace(settings, **settings.beside, beside=None), model)


def ramp(settings: Settings) -> str | Ramp:
    """Make the schedule that the settings describe, which may fall to 0 before training ends."""
    if settings.end == 1:
        return settings.schedule
    whole, end = RAMPS[settings.schedule], (settings.end - settings.start) / (1 - settings.start)
    return lambda passed: whole(passed / end) if passed < end else 0.0


def _named(settings: Settings, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in names}


def _clusterer(settings: Settings) -> Clusterer:
    learned = FaissKMeans(seed=settings.seed)
    kinds: dict[str, Clusterer] = {
        "learned": learned,
        "shuffled": Shuffled(learned, settings.seed),
        "blocks": Blocks(),
    }
    return kinds[settings.clusters]
