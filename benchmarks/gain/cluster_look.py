"""What the learned clusters look like over training: how stable, how compact, and what they explain."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl
import torch
from jsonargparse import auto_cli
from scipy import ndimage
from torch import Tensor

from benchmarks.common.inertia import inertia
from benchmarks.common.record import provenance, quiet, write_line
from benchmarks.gain.controls import Blocks, RandomStart, Shuffled
from benchmarks.gain.methods import build_callback
from benchmarks.gain.protocol import load_stage
from benchmarks.gain.settings import Settings, arguments
from benchmarks.gain.train import build_batches, build_classifier, build_trainer
from lightning_dropcluster import Clusterer, FaissKMeans
from lightning_dropcluster.clustering.agreement import adjusted_rand_index

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAPS = 16
"""Feature maps, evenly spaced, that are looked at."""


@dataclass(frozen=True)
class Options:
    """What a look lets you choose.

    Args:
        stage: whose network and training to use.
        data_dir: see `train.py`.
        layer: name of the one to look at; the stage's own where it is None.
        any_layer: see `train.py`.
        drop_prob: drop probability at the end of training, in [0, 1).
        cluster_size: mean number of features per cluster.
        every_n_epochs: epochs between two clusterings.
        seed: of the run.
        out: file to which the record is appended.
        plot: PNG file for the picture.
    """

    stage: str = "quick"
    data_dir: str | None = None
    layer: str | None = None
    any_layer: bool = False
    drop_prob: float = 0.3
    cluster_size: int | float | None = 16
    every_n_epochs: int = 1
    seed: int = 0
    out: str | None = None
    plot: str | None = None


@dataclass(frozen=True)
class Look:
    """One kind of clusters at one time.

    Args:
        kind: "learned", "random start", "shuffled" or "blocks".
        correlation: share of the squared length of profiles that is left when each is replaced by the mean
            of its cluster: the mean correlation of a feature with its cluster, itself included.
        spread: root mean square distance of features from the middle of their cluster, in pixels.
        connected: share of clusters that are in one piece.
        agreement: adjusted Rand index with the clusters of the time before; None at the first.
    """

    kind: str
    correlation: float
    spread: float
    connected: float
    agreement: float | None


class Recording:
    """A clusterer that looks at what another one finds, and at other clusters of the same number beside."""

    def __init__(self, clusterer: Clusterer) -> None:
        self.clusterer = clusterer
        self.looks: list[list[Look]] = []
        self._shape: torch.Size | None = None
        self._last: dict[str, Tensor] = {}

    def fit(
        self,
        profiles: Tensor,
        num_clusters: int,
        init_labels: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Cluster with the other clusterer; see `Clusterer.fit`."""
        labels = self.clusterer.fit(profiles, num_clusters, init_labels, grid)
        if labels.shape != self._shape:  # the callback's trial before training is forgotten
            self._shape, self._last, self.looks = labels.shape, {}, []
        if grid is not None:
            self.looks.append(self._look(profiles, labels, num_clusters, grid))
        return labels

    def _look(self, profiles: Tensor, labels: Tensor, num_clusters: int, grid: tuple[int, ...]) -> list[Look]:
        some = torch.linspace(0, len(labels) - 1, min(MAPS, len(labels))).round().long()
        now = {
            "learned": labels[some],
            "random start": RandomStart().fit(profiles[some], num_clusters),
            "shuffled": Shuffled(_Found(labels)).fit(profiles, num_clusters)[some],
            "blocks": Blocks().fit(profiles, num_clusters, grid=grid)[some],
        }
        last, self._last = self._last, now
        return [look(kind, profiles[some], found, grid, last.get(kind)) for kind, found in now.items()]


class _Found:
    def __init__(self, labels: Tensor) -> None:
        self.labels = labels

    def fit(self, *_: Any, **__: Any) -> Tensor:
        return self.labels


def look(kind: str, profiles: Tensor, labels: Tensor, grid: tuple[int, ...], last: Tensor | None) -> Look:
    """Describe clusters.

    Args:
        kind: what to call them.
        profiles: (B, F, D), of unit length but for dead features.
        labels: (B, F).
        grid: two sides.
        last: labels (B, F) of the time before.

    Returns:
        The means over problems.
    """
    positions = torch.from_numpy(np.indices(grid).reshape(2, -1).T.copy()).float().expand(len(labels), -1, -1)
    return Look(
        kind,
        float(1 - inertia(profiles, labels).sum() / profiles.square().sum()),
        float((inertia(positions, labels).sum() / labels.numel()).sqrt()),
        float(np.mean([_share_connected(row.reshape(grid).cpu().numpy()) for row in labels])),
        None if last is None else adjusted_rand_index(labels, last),
    )


def _share_connected(labels: np.ndarray) -> float:
    pieces: list[Any] = [ndimage.label(labels == cluster) for cluster in np.unique(labels)]
    return float(np.mean([count == 1 for _, count in pieces]))


def main(options: Options) -> None:
    """Train once, and print one record a clustering and kind."""
    settings = stage_settings(options)
    recording = Recording(FaissKMeans(seed=settings.seed))
    with quiet():
        pl.seed_everything(settings.seed, workers=True, verbose=False)
        batches = build_batches(settings)
        classifier = build_classifier(settings, len(batches.data.classes))
        callback = build_callback(settings, classifier.model, clusterer=recording)
        build_trainer(settings, callback).fit(classifier, datamodule=batches)
    looks = [[asdict(each) for each in looks] for looks in recording.looks]
    write_line({"looks": looks, **provenance(), "arguments": arguments(settings)}, options.out)
    if options.plot is not None:
        Path(options.plot).parent.mkdir(parents=True, exist_ok=True)
        draw(recording.looks).savefig(options.plot)


def stage_settings(options: Options) -> Settings:
    """Take a stage's settings, with DropCluster as the options say."""
    base = load_stage(options.stage).base
    return replace(
        base,
        layers=options.layer or base.layers,
        any_layer=options.any_layer,
        regularizer="dropcluster",
        data_dir=options.data_dir,
        drop_prob=options.drop_prob,
        cluster_size=options.cluster_size,
        every_n_epochs=options.every_n_epochs,
        corrupted_samples=0,
        seed=options.seed,
        progress_bar=False,
    )


def draw(looks: list[list[Look]]) -> Figure:
    """Draw each measure over the clusterings, a line for each kind of clusters."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.2), layout="constrained")
    titles = {
        "correlation": "correlation within clusters",
        "spread": "spread in pixels",
        "connected": "share in one piece",
        "agreement": "agreement with the last",
    }
    for axis, (name, title) in zip(figure.subplots(1, 4), titles.items(), strict=True):
        for kinds in zip(*looks, strict=True):
            axis.plot([getattr(each, name) for each in kinds], "o-", label=kinds[0].kind)
        axis.set(title=title, xlabel="clustering", ylim=(0, None))
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


if __name__ == "__main__":
    main(auto_cli(Options, as_positional=False))
