"""Pictures of the clusters in checkpoints, as the command line makes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_dropcluster.cli.tables import console
from lightning_dropcluster.layers.patterns import matching_names, nearest_names
from lightning_dropcluster.learning.checkpoints import SavedClusters, find_checkpoints, read_checkpoint
from lightning_dropcluster.visualization import (
    neighbor_colors,
    plot_clusters,
    plot_history,
    plot_overlay,
    plot_sizes,
    save_animation,
)
from lightning_dropcluster.visualization.panels import agreement, headline

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LayerHistory:
    """One layer's clusters in some checkpoints, the oldest first, all of one size."""

    name: str
    scope: str
    epochs: list[int]
    labels: list[Tensor]


def read_histories(
    paths: Iterable[str | PathLike[str]], match: Sequence[str] = ("**",)
) -> list[LayerHistory]:
    """Read the clusters of some layers from checkpoints, or folders of them."""
    saved = sorted((one for path in paths for one in _read(path)), key=lambda one: one.step)
    names = dict.fromkeys(name for one in saved for name in one.clusters)
    if not names:
        raise ValueError(f"no clusters of a DropCluster in {', '.join(map(str, paths))}")
    picked = _pick(names, match)
    return [_history(name, saved) for name in names if name in picked]


def print_history(history: LayerHistory) -> None:
    """Print what clusters a layer has, and how they changed."""
    labels, epochs = history.labels, history.epochs
    count = int(labels[-1].max()) + 1
    parts = [f"epoch {epochs[-1]}", f"{count} cluster{'s' * (count != 1)}", f"scope {history.scope}"]
    if len(labels) > 1:
        since = agreement(labels[-1], labels[-2], history.scope)
        parts.append(f"agreement with epoch {epochs[-2]}: {since:.2f}")
    console().print(f"[bold]{history.name}[/]  {headline(parts)}")


def save_plots(history: LayerHistory, folder: Path, *, image: Tensor | None, max_maps: int) -> Iterator[Path]:
    """Draw a layer's clusters, their sizes, over an image if there is one, and over time; yield each path."""
    labels, moments = history.labels[-1], len(history.labels)
    if not 2 <= labels.ndim <= 4:
        return  # not maps
    file = re.sub(r"[\\/:]", "_", history.name)  # a checkpoint may come from anywhere: no path leads out
    title = headline([history.name, f"epoch {history.epochs[-1]}"])
    shared: dict[str, Any] = {"title": history.name, "scope": history.scope}
    colors = neighbor_colors(*(one[:max_maps] for one in history.labels))
    previous = history.labels[-2] if moments > 1 else None
    options = {"epoch": history.epochs[-1], "previous": previous, "colors": colors, "max_maps": max_maps}
    yield _save(plot_clusters(labels, **shared, **options), folder / f"{file}.png")
    yield _save(plot_sizes(labels, title=title, scope=history.scope), folder / f"{file}.sizes.png")
    if image is not None and labels.ndim == 3:
        figure = plot_overlay(labels, image, title=title, colors=colors, max_maps=min(max_maps, 7))
        yield _save(figure, folder / f"{file}.overlay.png")
    if moments > 1:
        yield _save(
            plot_history(history.labels, epochs=history.epochs, **shared),
            folder / f"{file}.history.png",
        )
        path = folder / f"{file}.history.gif"
        save_animation(path, history.labels, epochs=history.epochs, max_maps=max_maps, **shared)
        yield path


def read_image(path: str) -> Tensor:
    """Read an image file of any format that Pillow reads, as (3, H, W) in [0, 1]."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            pixels = image.convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"image={path!r}: no image that Pillow reads") from error
    data = torch.frombuffer(bytearray(pixels.tobytes()), dtype=torch.uint8)
    return data.reshape(pixels.height, pixels.width, 3).permute(2, 0, 1) / 255


def _history(name: str, saved: Iterable[SavedClusters]) -> LayerHistory:
    history = LayerHistory(name, "", [], [])
    for one in (one for one in saved if name in one.clusters):
        labels, scope = one.clusters[name].labels, one.scopes[name].name
        if not history.labels or labels.shape != history.labels[-1].shape or scope != history.scope:
            history = LayerHistory(name, scope, [], [])
        if not history.labels or not torch.equal(labels, history.labels[-1]):
            history.epochs.append(one.epoch)
            history.labels.append(labels)
    return history


def _read(path: str | PathLike[str]) -> list[SavedClusters]:
    """Read a checkpoint, or all in a folder."""
    try:
        return [read_checkpoint(path)]
    except IsADirectoryError as error:
        found = find_checkpoints(path)
        if not found:
            raise ValueError(f"no checkpoint (*.ckpt) in the folder {path}, and it is {error}") from error
        return [one for inner in found for one in _read(inner)]
    except (OSError, ImportError, TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from error


def _pick(names: Iterable[str], match: Sequence[str]) -> set[str]:
    """Names that the patterns pick."""
    picked: set[str] = set()
    for pattern in match:
        found = matching_names(names, pattern)
        if not found:
            near = ", ".join(nearest_names(pattern, names))
            raise ValueError(f"match={pattern!r} picks none of the layers with clusters; nearest: {near}")
        picked.update(found)
    return picked


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path)
    return path
