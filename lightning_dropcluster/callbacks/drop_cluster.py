"""DropCluster: learn clusters while the model trains, and drop them."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_dropcluster.callbacks import advice, training
from lightning_dropcluster.callbacks.base import LayerCallback, check_drop_prob
from lightning_dropcluster.callbacks.progress_bar import WaitingLine
from lightning_dropcluster.callbacks.ramps import make_ramp
from lightning_dropcluster.callbacks.schedule import Schedule
from lightning_dropcluster.checks import check_bool, check_number
from lightning_dropcluster.clustering import Clusterer, FaissKMeans, TorchKMeans
from lightning_dropcluster.clustering.protocol import check_clusterer
from lightning_dropcluster.layers.selection import Layers, LayerTypes
from lightning_dropcluster.learning.checkpoints import read_initial_labels
from lightning_dropcluster.learning.clusters import Clusters
from lightning_dropcluster.learning.learner import ClusterLearner
from lightning_dropcluster.learning.reclustering import try_clusterer
from lightning_dropcluster.learning.reports import Report
from lightning_dropcluster.learning.scopes import SCOPES, Grouping
from lightning_dropcluster.learning.sketch import SketchSettings
from lightning_dropcluster.learning.state import read_state
from lightning_dropcluster.methods import ClusterDrop
from lightning_dropcluster.visualization.logged import PictureLog

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


class DropCluster(LayerCallback):
    """Drop clusters of features that respond alike, and learn the clusters during training.

    Forward hooks on the chosen layers gather responses to the training batches. FAISS k-means groups the
    features that respond alike, and whole groups are dropped at random while the model trains. Nothing is
    dropped in validation, test or prediction, and nothing stays attached after ``fit``.

    Source: DropCluster, https://arxiv.org/abs/2002.02997. Differences: clusters come from k-means and need
    not be spatially connected (the clusterers `Ward` and `ReNA` keep them connected), you can choose any
    layers (the paper drops in the stem), and clusters are updated on a schedule.

    Args:
        layers: where to drop. A glob over module names such as ``"conv1"`` or ``"layer[12].*.conv2"`` (``*``
            stays within a segment, ``**`` crosses dots), a regular expression after ``"re:"``, a callable
            (name, module) -> bool, or a list of these. ``None`` takes the outputs of all stages but the last
            of the one timm model inside, and logs which. See `select_layers`.
        drop_prob: probability in [0, 1) that a cluster, and so each of its features, is dropped at the end
            of the schedule. ``"auto"`` follows how much the network overfits: after each validation it moves
            halfway to (gap - 0.1) / 0.9. The gap is (validation loss - training loss) / (loss of the first
            step), where the validation loss is at most its first value, and the training loss is that of
            steps that drop nothing.
        num_clusters: clusters per feature map (per layer for the other scopes); or
        cluster_size: mean number of features per cluster, at least 1. 16 if neither is given.
        scope: what is grouped: ``"map"``, the features within each feature map; ``"position"``, positions,
            the same in all channels; ``"layer"``, all features of the layer; ``"channel"``, whole feature
            maps.
        start: when clusters are first learned and dropping begins. A float is a fraction of training in
            [0, 1), an integer is an epoch. The fraction refers to ``max_epochs`` or ``max_steps``, whichever
            is further along.
        schedule: how drop_prob grows from ``start`` to the end of training: ``"linear"``, ``"cosine"``,
            ``"constant"``, or a callable fraction -> fraction. ``None`` means ``"linear"``, or
            ``"constant"`` with ``drop_prob="auto"``.
        every_n_epochs: recluster every so many epochs after ``start``; 0 for never again. 5 if neither this
            nor the next is given.
        every_n_train_steps: recluster every so many optimiser steps instead.
        num_samples: samples gathered for each reclustering, over all ranks.
        sketch_dim: columns of the sketch. Memory is features x (sketch_dim + 2) x 4 bytes, less if positions
            or whole maps are grouped.
        sketch_momentum: weight in [0, 1) that earlier windows keep when a new one is added. Above 0, small
            windows suffice, as in ``every_n_train_steps=20, num_samples=128, sketch_momentum=0.5``.
        clusterer: any object with ``fit`` as in `Clusterer`. ``None`` means `FaissKMeans`, on macOS
            `TorchKMeans`.
        per_sample: draw for each sample, or once for the whole batch.
        fill: what replaces a dropped cluster: ``"zero"``, as in the paper, or ``"mean"``, its own mean in
            that sample and map, which keeps what members share and drops what sets them apart. Deviations of
            kept clusters are then scaled by 1 / (1 - drop_prob). See `cluster_drop`.
        rescale: only used with ``fill="zero"``: ``"batch"`` scales what is kept by (number of features) /
            (number kept) over the batch, ``"expected"`` by 1 / (1 - drop_prob).
        paired: with `RBlock`, the two halves of each batch drop different clusters; see `draw_uniform`. Needs
            ``per_sample``.
        position_weight: how much the row and column of a feature count in the clustering, as the distance
            between opposite edges of a map; uncorrelated profiles have a distance of 1.41. At most a million.
        channel_dim: 1 for layers that give (N, C, *spatial), -1 for those with channels last, such as blocks
            and branches of transformers. Tokens of an image are laid out on their grid; class and register
            tokens, which have no place there, are neither clustered nor dropped. With ``layers=None`` the
            stages themselves tell.
        clean_statistics: let BatchNorm's running averages follow only steps that drop nothing, one in eight
            and the last 20 or, if fewer, the last tenth of training, so that they are right in evaluation
            (https://arxiv.org/abs/1801.05134). Has no effect on models without running averages.
        layer_types: the module types that patterns may pick. ``None`` means conv layers if a pattern matches
            any, else the modules it names.
        initial_labels: labels to start from, as in ``labels``, or the path of an earlier run's checkpoint. If
            they cover every chosen layer, the first clustering is skipped.
        monitor: the name under which the validation loss is logged, for ``drop_prob="auto"``.
        max_drop_prob: the highest probability that ``drop_prob="auto"`` uses, in [0, 1).
        log_pictures: send pictures of new clusters to loggers that take images. This takes at most 2 % of
            the time.
        seed: for the sketch and the clustering. The draw of what is dropped uses torch's generator.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[DropCluster()], logger=False)
    """

    log_name = "dropcluster"
    _layers: ClusterLearner

    def __init__(
        self,
        layers: Layers | None = None,
        drop_prob: float | Literal["auto"] = 0.15,
        *,
        num_clusters: int | None = None,
        cluster_size: float | None = None,
        scope: str = "map",
        start: int | float = 0.25,
        schedule: str | Callable[[float], float] | None = None,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        num_samples: int = 1024,
        sketch_dim: int = 64,
        sketch_momentum: float = 0.0,
        clusterer: Clusterer | None = None,
        per_sample: bool = True,
        fill: str = "zero",
        rescale: str = "batch",
        paired: bool = False,
        position_weight: float = 0.0,
        channel_dim: int = 1,
        clean_statistics: bool = True,
        layer_types: LayerTypes | None = None,
        initial_labels: str | PathLike[str] | Mapping[str, Tensor] | None = None,
        monitor: str = "val_loss",
        max_drop_prob: float = 0.8,
        log_pictures: bool = True,
        seed: int = 0,
    ) -> None:
        drop_prob = check_drop_prob(drop_prob)
        grouping = Grouping(scope, num_clusters, cluster_size, position_weight)
        sketches = SketchSettings(scope, num_samples, sketch_dim, seed)
        sketch_momentum = check_number("sketch_momentum", sketch_momentum, 0, 1, high_open=True)
        if clusterer is not None:
            check_clusterer(clusterer)
        # The module checks its own settings, here as early as the others.
        make_drop = partial(ClusterDrop, per_sample=per_sample, fill=fill, rescale=rescale, paired=paired)
        make_drop(torch.zeros(1, 1).int())
        check_bool("log_pictures", log_pictures)
        ramp = make_ramp(schedule, drop_prob)
        super().__init__(
            layers,
            layer_types,
            Schedule(start, ramp, every_n_epochs, every_n_train_steps),
            channel_dim=channel_dim,
            drop_prob=drop_prob,
            monitor=monitor,
            max_drop_prob=max_drop_prob,
            clean_statistics=clean_statistics,
        )
        self.scope = scope
        self._pictures = PictureLog(scope) if log_pictures else None
        self._first_clusters: dict[str, Clusters] = {}
        if initial_labels is not None:
            self._first_clusters = read_initial_labels(initial_labels, SCOPES[scope])
        self._layers = ClusterLearner(
            grouping,
            clusterer if clusterer is not None else _default_clusterer(sketches.seed),
            sketches,
            sketch_momentum=sketch_momentum,
            make_drop=make_drop,
        )

    # What there is to see

    @property
    def labels(self) -> dict[str, Tensor]:
        """The cluster of each feature: layer name to int64 labels (C, *spatial); empty before the first.

        After ``fit``, ``test`` or ``predict`` has loaded a checkpoint, they are those of the checkpoint. With
        ``strategy="ddp_spawn"`` they stay in the spawned processes, because Lightning brings none of a
        callback's state back: read them from a checkpoint, as ``initial_labels`` does.
        """
        return {name: clusters.labels for name, clusters in self._layers.clusters.items()}

    @property
    def recluster_seconds(self) -> float:
        """Seconds that training has waited for reclustering."""
        return self._layers.seconds

    @property
    def state_key(self) -> str:
        """The key of this state in a checkpoint: equal for equal layers, layer types and scope."""
        return self._key(scope=self.scope)

    # When things happen

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Learn clusters at once if training resumes after the start with layers that have none."""
        super().on_train_start(trainer, pl_module)
        if self._schedule.has_begun:
            self._layers.open_missed_window()

    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Recluster after the batch that filled the window."""
        reports = self._layers.end_step()
        if reports and not trainer.barebones:
            self._log_reports(trainer, pl_module, reports)
        if self._pictures is not None and reports and trainer.is_global_zero:
            clusters = {name: self._layers.clusters[name] for name in reports}
            self._pictures.send(trainer, clusters, self._log_prefix, training.logger_step(trainer))
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Say so where there never were any labels."""
        super().on_train_end(trainer, pl_module)
        self._warn(advice.no_clusters(trainer, self._schedule, self._layers))

    def _reset(self) -> None:
        super()._reset()
        self._layers.reset({})
        if self._pictures is not None:
            self._pictures = PictureLog(self.scope)

    def _attach(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        convs = [layer for layer in self._hooked.values() if isinstance(layer, _ConvNd)]
        dims = max((len(conv.kernel_size) for conv in convs), default=2)
        try_clusterer(self._layers.clusterer, self._layers.grouping, pl_module.device, dims)
        self._check_initial_labels()
        is_new = trainer.global_step == 0 or self._layers.is_untouched
        if is_new and _is_untouched(self._loaded):
            self._loaded = None
            first = {name: c for name, c in self._first_clusters.items() if name in self._hooked}
            self._layers.reset(first)
            self._schedule.reset(has_labels=len(first) == len(self._hooked))
        self._layers.attach(self._hooked, pl_module.device)
        if trainer.is_global_zero:
            self._layers.waiting = WaitingLine(trainer.progress_bar_callback)

    def _begin_step(self, fraction: float, is_due: bool, is_clean: bool) -> float:
        if is_due:
            self._layers.open_window()
        return self._layers.begin_step(self._full_drop_prob * fraction, is_clean=is_clean)

    # Uncertainty

    @contextmanager
    def sampling(self, model: nn.Module, drop_prob: float | None = None) -> Iterator[nn.Module]:
        """Drop clusters at test time too, with a draw for each sample: Monte Carlo dropout.

        Source: Gal and Ghahramani 2016, https://arxiv.org/abs/1506.02142; with structured dropout,
        https://arxiv.org/abs/1906.09551. Put the model in eval mode, so that BatchNorm uses its running
        averages. A compiled model runs eagerly inside the ``with`` statement.

        Args:
            model: the LightningModule, a copy of it, or the bare model that it holds.
            drop_prob: probability in [0, 1) that a cluster is dropped. ``None`` means this callback's.

        Yields:
            The model. After the ``with`` statement it is as it was before.

        Raises:
            ValueError: if there are no clusters yet, the model lacks a layer, or ``drop_prob`` is out of
                range.

        Example:
            >>> def predict(callback, model, x):
            ...     with callback.sampling(model.eval()):
            ...         return torch.stack([model(x).softmax(1) for _ in range(20)]).mean(0)
        """
        used = self._full_drop_prob if drop_prob is None else drop_prob
        if used == 0.0 and drop_prob is None and self.drop_prob == "auto":
            self._warn(
                "sampling: 'auto' has found no overfitting, so its drop probability is 0 and all passes are "
                "the same; give sampling a drop_prob"
            )
        used = check_number("drop_prob", used, 0, 1, high_open=True)
        # Eagerly: a fit under way would have to compile everything anew, after each sampling.
        injection = self._layers.make_sampler(model, used)
        self._lay_out(model, injection.layers, injection.hooks)
        with injection, torch.compiler.set_stance("force_eager"):
            yield model

    # Checkpoints

    def _state(self) -> dict[str, Any]:
        return {"scope": self.scope, "channel_dim": self.channel_dim, **self._layers.state_dict()}

    def _read_state(self, state: Mapping[str, Any]) -> None:
        self._layers.clusters = read_state(state, self.scope, self.channel_dim)

    def _load(self, state: Mapping[str, Any]) -> None:
        self._layers.load_state_dict(state)

    # Reports

    def _log_reports(
        self, trainer: "Trainer", pl_module: "LightningModule", reports: dict[str, Report]
    ) -> None:
        metrics = {
            f"{self._log_prefix}/{name}/{key}": value
            for name, report in reports.items()
            for key, value in report.items()
        }
        # To the loggers at once, as Lightning's own callbacks do: `log` would pass on every
        # log_every_n_steps-th step's values alone, or the mean of an epoch at its end.
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=training.logger_step(trainer))
        pl_module.log_dict(metrics, on_step=False, on_epoch=True, batch_size=1, sync_dist=True, logger=False)

    def _check_initial_labels(self) -> None:
        if self._first_clusters and not self._first_clusters.keys() & self._hooked.keys():
            raise ValueError(
                f"initial_labels: has labels of {', '.join(map(repr, self._first_clusters))}, but of none of "
                f"the chosen layers ({', '.join(self._hooked)})"
            )


def _default_clusterer(seed: int) -> Clusterer:
    """FAISS, but for macOS, where its OpenMP and torch's abort the process when both run."""
    return TorchKMeans(seed=seed) if sys.platform == "darwin" else FaissKMeans(seed=seed)


def _is_untouched(state: Mapping[str, Any] | None) -> bool:
    """Whether there is no state, or one from before any layer ran, as tuners restore it."""
    return state is None or not (state["clusters"] or state["shapes"] or state["windows_opened"])
