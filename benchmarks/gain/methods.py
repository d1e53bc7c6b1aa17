"""The methods that are compared, each as a callback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from torch import nn

from benchmarks.common.models import tell_channels
from benchmarks.gain.controls import Blocks, Explained, MixedSizes, RandomStart, Shuffled
from benchmarks.gain.settings import ClustersName, Settings
from lightning_dropcluster import REGULARIZERS, DropCluster, StructuredDropout
from lightning_dropcluster.clustering import Clusterer, FaissKMeans, Ward

UNHOOKED = ("none", "drop_path")
WITH_BLOCKS = ("drop_block", "prob_drop_block", "corr_drop")


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
    options: dict[str, Any]
    common: dict[str, Any] = {
        "start": settings.start,
        "schedule": settings.schedule,
        "layer_types": nn.Module if settings.any_layer else None,
    }
    if settings.regularizer == "dropcluster":
        options = {**common, **_cluster_options(settings), **changes}
        return DropCluster(layers, settings.drop_prob, **options)
    if settings.regularizer == "advanced_dropout":  # learns what others are told, and is made layer by layer
        tell_channels(model)
        return StructuredDropout(layers, settings.regularizer, **{**common, "schedule": None})
    options = {"paired": settings.pair_weight > 0}
    if settings.regularizer in WITH_BLOCKS:
        options["block_size"] = settings.block_size
    regularizer = REGULARIZERS[settings.regularizer](settings.drop_prob, **options)
    return StructuredDropout(layers, regularizer, **common)


def _cluster_options(settings: Settings) -> dict[str, Any]:
    return {
        "cluster_size": settings.cluster_size,
        "scope": settings.scope,
        "every_n_epochs": settings.every_n_epochs,
        "num_samples": settings.num_samples,
        "per_sample": settings.per_sample,
        "paired": settings.pair_weight > 0,
        "clusterer": _clusterer(settings),
        "seed": settings.seed,
    }


def _clusterer(settings: Settings) -> Clusterer:
    seed = settings.seed
    make: dict[ClustersName, Callable[[], Clusterer]] = {
        "learned": lambda: FaissKMeans(seed=seed),
        "shuffled": lambda: Shuffled(FaissKMeans(seed=seed), seed),
        "blocks": Blocks,
        "random-start": lambda: RandomStart(seed),
        "ward": Ward,
        "mixed-sizes": lambda: MixedSizes(FaissKMeans(seed=seed), seed),
        "explained": lambda: Explained(FaissKMeans(seed=seed)),
    }
    return make[settings.clusters]()
