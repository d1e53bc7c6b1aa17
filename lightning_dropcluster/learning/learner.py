"""The layers a callback works on, from one step to the next: hooks, windows, labels."""

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks

from lightning_dropcluster import ranks
from lightning_dropcluster.clustering import Clusterer
from lightning_dropcluster.clustering.protocol import count_clusters
from lightning_dropcluster.layers.hooks import LayerHook
from lightning_dropcluster.layers.injection import Injection, forget_compiled_code, unused_layers_error
from lightning_dropcluster.layers.selection import CONV_LAYERS, find_layers
from lightning_dropcluster.learning.clusters import Clusters, check_channels, smallest_table
from lightning_dropcluster.learning.reclustering import OnProgress, Reclustering, cluster_share
from lightning_dropcluster.learning.reports import Report, make_report, warnings_for
from lightning_dropcluster.learning.running_profiles import RunningProfiles
from lightning_dropcluster.learning.scopes import SCOPES, Grouping, Scope, Shape
from lightning_dropcluster.learning.window import GatheringWindow
from lightning_dropcluster.methods import ClusterDrop


class ClusteredLayers:
    """Everything that happens to the chosen layers; the callback only says when.

    Args:
        grouping: how many clusters of what.
        clusterer: who clusters.
        num_samples: samples per window, over all ranks.
        sketch_dim: columns of the sketches.
        sketch_momentum: see `RunningProfiles`.
        seed: of the sketches' signs.
        overlap_steps: see `Reclustering`.
        per_sample: see `ClusterDrop`.
        rescale: see `ClusterDrop`.
        paired: see `ClusterDrop`.
    """

    def __init__(
        self,
        grouping: Grouping,
        clusterer: Clusterer,
        *,
        num_samples: int,
        sketch_dim: int,
        sketch_momentum: float = 0.0,
        seed: int,
        overlap_steps: int,
        per_sample: bool,
        rescale: str,
        paired: bool = False,
    ) -> None:
        self.grouping, self.clusterer = grouping, clusterer
        self.num_samples, self.sketch_dim, self.seed = num_samples, sketch_dim, seed
        self.overlap_steps = overlap_steps
        self.per_sample, self.rescale, self.paired = per_sample, rescale, paired
        self.running_profiles = RunningProfiles(sketch_momentum)
        self.clusters: dict[str, Clusters] = {}
        self.seconds = 0.0
        self.waiting: AbstractContextManager[OnProgress | None] = nullcontext()
        self.windows_opened = 0
        self.window: GatheringWindow | None = None
        self.reclustering: Reclustering | None = None
        self._injection = Injection({}, {})
        self._stalled = 0  # windows in a row
        self._is_owed = False  # since a window was opened, until its labels are there
        self._device = torch.device("cpu")
        self._warned: set[str] = set()

    @property
    def scope(self) -> Scope:
        """What is grouped; not an attribute, since it cannot be sent to a spawned process."""
        return SCOPES[self.grouping.scope]

    @property
    def hooks(self) -> dict[str, LayerHook]:
        """The hook of each layer; its regulariser is a `ClusterDrop`, or ``None`` before the first window."""
        return self._injection.hooks

    def reset(self, clusters: Mapping[str, Clusters]) -> None:
        """Forget an earlier training.

        Args:
            clusters: what to start from.
        """
        self.clusters, self.seconds, self.windows_opened = dict(clusters), 0.0, 0
        self.running_profiles.clear()
        self._warned.clear()
        self._is_owed, self._stalled = False, 0

    def attach(self, modules: Mapping[str, nn.Module], device: torch.device) -> None:
        """Hook the layers; a window that came to no labels before the last `detach` is opened again.

        Args:
            modules: name to layer.
            device: where the model is.

        Raises:
            ValueError: where the clusters held belong to layers with other channel counts.
        """
        self.detach()
        self._device, self._injection = device, Injection(modules, dict.fromkeys(modules))
        for name in self.hooks.keys() & self.clusters.keys():
            self._bind(name)
        self.pause()
        self._injection.attach()
        if self._is_owed:
            self.window = self._make_window()

    def detach(self) -> None:
        """Take every hook off and free what only training needs; nothing happens where that is done."""
        self._injection.detach()
        self._abandon()
        self._injection, self.waiting = Injection({}, {}), nullcontext()

    def open_window(self) -> None:
        """Start to gather, unless a window is open already or its labels are still awaited.

        A window that has stalled, on any rank, starts again: every rank must call this.
        """
        if self.reclustering is not None:
            return
        if self.window is not None:
            if not ranks.any_rank(self.window.has_stalled(), self._device):
                return
            self._warn_of_many_sizes()
            self.window.close()
        self.windows_opened += 1
        self.window, self._is_owed = self._make_window(), True

    def open_missed_window(self) -> None:
        """Start to gather where a layer has no clusters; for a training that goes on after the start."""
        if self.hooks.keys() - self.clusters.keys():
            self.open_window()

    def begin_step(self, drop_prob: float, *, is_clean: bool = False) -> float:
        """Set what the hooks do in the coming step.

        Args:
            drop_prob: for the layers that have clusters.
            is_clean: whether the step is to drop nothing.

        Returns:
            The probability in use but for clean steps: 0 before the first clusters.
        """
        if self.window is not None:
            self.window.arm()
        for name, hook in self.hooks.items():
            used = drop_prob if name in self.clusters and not is_clean else 0.0
            hook.active, hook.first_call = used > 0.0 or self.window is not None, True
            if hook.sketch is not None and hook.regularizer is None:
                # One variant less to compile: before the first clusters drop with probability 0.
                hook.regularizer = self._make_drop(self._no_clusters(hook.sketch.shape))
            if isinstance(hook.regularizer, ClusterDrop):
                hook.regularizer.set_drop_prob(used)
                hook.regularizer.inplace = _may_overwrite_output(self._injection.layers[name])
        return drop_prob if self.hooks.keys() & self.clusters.keys() else 0.0

    def end_step(self) -> dict[str, Report]:
        """Close the window if it is full, and switch to new labels if they are due.

        Returns:
            Name to report, empty where no labels changed.

        Raises:
            RuntimeError: where a layer has never run, or clustering failed on another rank.
            ValueError: where a layer has run with several numbers of channels.
        """
        self.pause()
        self._check_calls()
        if self.reclustering is not None:
            self.reclustering.wait_steps -= 1
        elif self.window is not None and self.window.is_full():
            # Only now does the clock run: to count the samples was to wait for device and ranks.
            with self._clock():
                self._recluster(self.window)
        if self.reclustering is None or self.reclustering.wait_steps > 0:
            return {}
        with self._clock():
            return self.finish()

    def pause(self) -> None:
        """Drop nothing until the next step begins."""
        self._injection.pause()

    def finish(self) -> dict[str, Report]:
        """Switch to the labels that are being made, if any; wait for them where they are not ready.

        Returns:
            Name to report.
        """
        if self.reclustering is None:
            return {}
        labels = self.reclustering.result(self._device)
        shapes, self.reclustering, self._is_owed = self.reclustering.shapes, None, False
        hooked = [name for name in labels if name in self.hooks]
        return {name: self._adopt(name, labels[name], shapes[name]) for name in hooked}

    def never_ran(self) -> list[str]:
        """Name the layers that have never run in a training step, but for those in eval mode.

        Returns:
            Their names, in order.
        """
        return self._injection.never_ran()

    def make_sampler(self, model: nn.Module, drop_prob: float) -> Injection:
        """Make hooks that drop the clusters in eval mode too, with a draw for each sample.

        Args:
            model: the LightningModule, a copy of it, or the bare model.
            drop_prob: probability that a cluster is dropped.

        Returns:
            Hooks that are not attached yet.

        Raises:
            ValueError: where there are no clusters yet, or the model lacks a layer.
        """
        if not self.clusters:
            raise ValueError("sampling: there are no clusters yet; fit first, or load a state")
        layers = find_layers(model, self.clusters)
        drops = {}
        for name, layer in layers.items():
            check_channels(self.clusters[name], layer, name)
            # An activation has no parameters of its own.
            weight = next(chain(layer.parameters(), model.parameters()), torch.empty(0))
            drops[name] = self._make_drop(self.clusters[name], sampling=True).to(weight.device)
            drops[name].set_drop_prob(drop_prob)
        return Injection(layers, drops, in_eval=True)

    def state_dict(self) -> dict[str, Any]:
        """Return small tensors and plain scalars, equal on every rank.

        Returns:
            The clusters and the layers' shapes, and for one process the open window, the labels still
            awaited and the memory. With several ranks, and after `detach`, a window starts again on resume.
        """
        alone = ranks.world_size() == 1
        awaited = self.reclustering.state_dict() if alone and self.reclustering is not None else None
        gathers = self._is_owed and awaited is None
        return {
            "clusters": {name: clusters.state_dict() for name, clusters in self.clusters.items()},
            "shapes": {name: list(h.shape) for name, h in self.hooks.items() if h.shape is not None},
            "windows_opened": self.windows_opened,
            "window": (self.window.state_dict() if self.window is not None else {}) if gathers else None,
            "reclustering": awaited,
            "memory": self.running_profiles.state_dict() if alone else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what was under way from a checkpoint; its clusters are held already, and the hooks on.

        Args:
            state: what `state_dict` returned.
        """
        self._abandon()
        self.windows_opened = state["windows_opened"]
        self._is_owed = state["window"] is not None or state["reclustering"] is not None
        for name in self.hooks.keys() & state["shapes"].keys():
            self.hooks[name].shape, self.hooks[name].fired = tuple(state["shapes"][name]), True
        for name in self.hooks.keys() & self.clusters.keys():
            self._bind(name)
        if state["window"] is not None:
            self.window = self._make_window()
            self.window.load_state_dict(state["window"])
        if state["reclustering"] is not None:
            self.reclustering = Reclustering.from_state(state["reclustering"], self._device)
        self.running_profiles.load_state_dict(state["memory"])

    def _abandon(self) -> None:
        """Let go of an open window and of labels in the making."""
        if self.window is not None:
            self.window.close()
        if self.reclustering is not None:
            self.reclustering.abandon()
        self.window = self.reclustering = None

    def _make_window(self) -> GatheringWindow:
        return GatheringWindow(
            self.hooks,
            scope=self.scope,
            number=self.windows_opened - 1,
            num_samples=self.num_samples,
            sketch_dim=self.sketch_dim,
            seed=self.seed,
            device=self._device,
        )

    def _recluster(self, window: GatheringWindow) -> None:
        """Close a full window and have its sketches clustered; where none can be, open another at first."""
        if not self.clusters:
            ranks.raise_together(unused_layers_error(self.never_ran()), self._device)
        sketches, self.window, self._stalled = window.merge(), None, 0
        if not sketches and not self.clusters:
            return self.open_window()
        tables = {
            name: self.clusters[name].table
            for name in sketches.keys() & self.clusters.keys()
            if self.clusters[name].shape == sketches[name].shape
        }
        in_background = self.overlap_steps > 0
        with nullcontext() if in_background else self.waiting as on_progress:
            self.reclustering = Reclustering(
                {name: sketch.shape for name, sketch in sketches.items()},
                partial(
                    cluster_share,
                    sketches,
                    tables,
                    self.clusterer,
                    self.grouping,
                    self.running_profiles,
                    on_progress,
                ),
                wait_steps=self.overlap_steps,
                in_background=in_background,
            )

    def _check_calls(self) -> None:
        """Refuse layers that see several numbers of channels, before labels of one meet the other."""
        for name, hook in self.hooks.items():
            other, shape = hook.other_channels, hook.shape
            if other is not None and shape is not None and self.scope.label_shape(shape)[0] > 1:
                raise ValueError(
                    f"layers: {name!r} is called several times in a step, with {shape[0]} and with {other} "
                    "channels, and has clusters for one number alone; choose other layers"
                )

    @contextmanager
    def _clock(self) -> Iterator[None]:
        """Add what is done inside to the seconds spent on reclustering."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started

    def _adopt(self, name: str, labels: Tensor, shape: Shape) -> Report:
        """Make labels (B, F) the layer's own."""
        counts = count_clusters(labels).cpu()
        for message in warnings_for(name, counts, shape, self.grouping):
            self._warn_once(name, message)
        report = make_report(labels, counts, shape, self.clusters.get(name))
        self.clusters[name] = Clusters(smallest_table(labels.reshape(self.scope.label_shape(shape))), shape)
        self._bind(name)
        return report

    def _warn_of_many_sizes(self) -> None:
        """A second window in a row that sizes have left behind: they do not just grow now and then."""
        self._stalled += 1
        if self._stalled == 2:
            ranks.warn(
                f"sizes of maps changed before num_samples={self.num_samples} samples of one size were "
                "gathered, so there are no new clusters; lower num_samples, or train with fewer sizes"
            )

    def _warn_once(self, name: str, message: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            ranks.warn(message)

    def _bind(self, name: str) -> None:
        """Write a layer's clusters into its hook, in place where the table's shape allows."""
        clusters, hook = self.clusters[name], self.hooks[name]
        check_channels(clusters, self._injection.layers[name], name)
        table, drop = clusters.table.to(self._device), hook.regularizer
        if isinstance(drop, ClusterDrop) and drop.can_hold(table):
            drop.set_labels(table)
        else:
            if drop is not None:  # code for each size of labels would soon be more than torch keeps
                forget_compiled_code()
            hook.regularizer = self._make_drop(Clusters(table, clusters.shape))

    def _no_clusters(self, shape: Shape) -> Clusters:
        """One cluster of everything, to stand in where nothing is dropped yet."""
        table = torch.zeros(self.scope.label_shape(shape), dtype=torch.uint8, device=self._device)
        return Clusters(table, shape)

    def _make_drop(self, clusters: Clusters, *, sampling: bool = False) -> ClusterDrop:
        drop = ClusterDrop(
            clusters.table,
            0.0,
            num_clusters=max(self.grouping.clusters_for(clusters.shape), int(clusters.table.max()) + 1),
            per_map=self.scope.per_map,
            per_sample=self.per_sample or sampling,
            rescale=self.rescale,
            paired=self.paired and not sampling,
        )
        drop.shift = ranks.draw_shift()
        return drop


def _may_overwrite_output(layer: nn.Module) -> bool:
    """A conv's backward pass does not need its output, nor does anybody else if no other hook saw it.

    One with a ``forward`` of its own may hand its input on.
    """
    is_a_conv = type(layer) in CONV_LAYERS and "forward" not in vars(layer)
    return is_a_conv and len(layer._forward_hooks) == 1 and not _global_forward_hooks
