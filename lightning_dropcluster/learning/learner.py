"""The cluster learner: it owns what is learned of the layers, and the callback talks to it alone."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_dropcluster import ranks
from lightning_dropcluster.clustering import Clusterer
from lightning_dropcluster.clustering.protocol import count_clusters
from lightning_dropcluster.layers.hooks import LayerHook
from lightning_dropcluster.layers.injection import Injection, unused_layers_error
from lightning_dropcluster.learning.clustered_layers import ClusteredLayers
from lightning_dropcluster.learning.clusters import Clusters
from lightning_dropcluster.learning.reclustering import OnProgress, cluster_share, recluster
from lightning_dropcluster.learning.reports import Report, make_report, warnings_for
from lightning_dropcluster.learning.running_profiles import RunningProfiles
from lightning_dropcluster.learning.scopes import SCOPES, Grouping, Shape
from lightning_dropcluster.learning.sketch import SketchSettings
from lightning_dropcluster.learning.window import GatheringWindow
from lightning_dropcluster.methods import ClusterDrop

Phase = Literal["idle", "gathering", "full"]
"""Between windows; while one is open, or will be once the layers are hooked; while its labels are made."""


class ClusterLearner:
    """Gathers, reclusters and lets the layers drop their clusters; the callback only says when.

    ``waiting`` is entered while labels are made, ``seconds`` counts the time that this has taken so far.
    """

    def __init__(
        self,
        grouping: Grouping,
        clusterer: Clusterer,
        sketches: SketchSettings,
        *,
        sketch_momentum: float = 0.0,
        make_drop: Callable[..., ClusterDrop] = ClusterDrop,
    ) -> None:
        self.grouping, self.clusterer, self.sketches = grouping, clusterer, sketches
        self.clusters: dict[str, Clusters] = {}
        self.window: GatheringWindow | None = None
        self.phase: Phase = "idle"
        self.windows_opened = 0
        self.seconds = 0.0
        self.waiting: AbstractContextManager[OnProgress | None] = nullcontext()
        self._layers = ClusteredLayers(grouping, make_drop)
        self._running_profiles = RunningProfiles(sketch_momentum)
        self._stalled = 0  # windows in a row
        self._warned: set[str] = set()

    @property
    def hooks(self) -> dict[str, LayerHook]:
        """The hook of each layer, see `ClusteredLayers`."""
        return self._layers.hooks

    @property
    def labels_pending(self) -> bool:
        """Whether a window was opened that has not come to labels yet."""
        return self.phase != "idle"

    def reset(self, clusters: Mapping[str, Clusters]) -> None:
        """Forget an earlier training; the clusters are those to start from."""
        self.clusters, self.phase = dict(clusters), "idle"
        self.windows_opened, self.seconds, self._stalled = 0, 0.0, 0
        self._running_profiles.clear()
        self._warned.clear()

    def attach(self, modules: Mapping[str, nn.Module], device: torch.device) -> None:
        """Hook the layers; a window that came to no labels before the last `detach` is opened again."""
        self.detach()
        self.clusters |= self._layers.attach(modules, self.clusters, device)
        if self.labels_pending:
            self.window = self._make_window()

    def detach(self) -> None:
        """Take every hook off and free what only training needs; nothing happens where that is done."""
        self._close_window()
        self._layers.detach()
        self.waiting = nullcontext()

    def open_window(self) -> None:
        """Start to gather, unless a window is open already.

        A window that has stalled, on any rank, starts again: every rank must call this.
        """
        if self.window is not None:
            if not ranks.any_rank(self.window.has_stalled(), self._layers.device):
                return
            self._warn_of_many_sizes()
            self._close_window()
        self.windows_opened += 1
        self.window, self.phase = self._make_window(), "gathering"

    def open_missed_window(self) -> None:
        """Start to gather where a layer has no clusters; for a training that goes on after the start."""
        if self.hooks.keys() - self.clusters.keys():
            self.open_window()

    def begin_step(self, drop_prob: float, *, is_clean: bool = False) -> float:
        """Prepare the hooks for a step, which drops nothing where it is clean.

        Returns:
            The drop probability in use but for clean steps: 0 before the first clusters.
        """
        if self.window is not None:
            self.window.arm()
        clustered = () if is_clean else self.clusters
        self._layers.arm(drop_prob, clustered, gathers=self.window is not None)
        return drop_prob if self.hooks.keys() & self.clusters.keys() else 0.0

    def end_step(self) -> dict[str, Report]:
        """Recluster where the window is full; every rank must call this.

        Returns:
            A report for each layer that has new labels.
        """
        self.pause()
        self._layers.check_calls()
        if self.window is None or not self.window.is_full():
            return {}
        # Only now does the clock run: to count the samples was to wait for device and ranks.
        with self._clock():
            return self._recluster(self.window)

    def pause(self) -> None:
        """Drop nothing until the next step begins."""
        self._layers.pause()

    def never_ran(self) -> list[str]:
        """Name the layers in training mode that have not run since they were hooked."""
        return self._layers.never_ran()

    def make_sampler(self, model: nn.Module, drop_prob: float) -> Injection:
        """Make hooks, not attached yet, that drop clusters in eval mode too, with a draw for each sample."""
        return self._layers.make_sampler(model, self.clusters, drop_prob)

    def state_dict(self) -> dict[str, Any]:
        """Return small tensors and plain scalars, equal on every rank.

        Of one process they hold the open window and the running profiles too. With several ranks, and after
        `detach`, a window starts again on resume.
        """
        window = {} if self.window is None else self.window.state_dict()
        return {
            "clusters": {name: clusters.state_dict() for name, clusters in self.clusters.items()},
            "shapes": {name: list(h.shape) for name, h in self.hooks.items() if h.shape is not None},
            "windows_opened": self.windows_opened,
            "window": window if self.labels_pending else None,
            "memory": self._running_profiles.state_dict() if ranks.world_size() == 1 else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what was under way; the clusters are held already, and the hooks are on."""
        self._close_window()
        self.windows_opened = state["windows_opened"]
        for name in self.hooks.keys() & state["shapes"].keys():
            self.hooks[name].shape, self.hooks[name].fired = tuple(state["shapes"][name]), True
        self.clusters |= self._layers.bind_all(self.clusters)
        self.phase = "idle"
        if state["window"] is not None:
            self.window, self.phase = self._make_window(), "gathering"
            self.window.load_state_dict(state["window"])
        self._running_profiles.load_state_dict(state["memory"])

    def _make_window(self) -> GatheringWindow:
        return GatheringWindow(self.hooks, self.sketches, self.windows_opened - 1, self._layers.device)

    def _close_window(self) -> None:
        if self.window is not None:
            self.window.close()
            self.window = None

    def _recluster(self, window: GatheringWindow) -> dict[str, Report]:
        """Close a full window and have its sketches clustered; where none can be, open another at first."""
        device = self._layers.device
        if not self.clusters:
            ranks.raise_together(unused_layers_error(self.never_ran()), device)
        sketches, self.window, self.phase, self._stalled = window.merge(), None, "full", 0
        if not sketches and not self.clusters:
            self.open_window()
            return {}
        old = {
            name: clusters.table
            for name, clusters in self.clusters.items()
            if name in sketches and clusters.shape == sketches[name].shape
        }
        with self.waiting as on_progress:
            share = partial(
                cluster_share,
                sketches,
                old,
                self.clusterer,
                self.grouping,
                self._running_profiles,
                on_progress,
            )
            labels = recluster(share, device)
        self.phase = "idle"
        return {name: self._adopt(name, table, sketches[name].shape) for name, table in labels.items()}

    def _adopt(self, name: str, labels: Tensor, shape: Shape) -> Report:
        """Make labels (B, F) the layer's own."""
        counts = count_clusters(labels).cpu()
        for message in warnings_for(name, counts, shape, self.grouping):
            self._warn_once(name, message)
        report = make_report(labels, counts, shape, self.clusters.get(name))  # before the old are overwritten
        table = labels.reshape(SCOPES[self.grouping.scope].label_shape(shape))
        self.clusters[name] = self._layers.bind(name, Clusters(table, shape))
        return report

    @contextmanager
    def _clock(self) -> Iterator[None]:
        """Add what is done inside to the seconds spent on reclustering."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started

    def _warn_of_many_sizes(self) -> None:
        """A second window in a row that sizes have left behind: they do not just grow now and then."""
        self._stalled += 1
        if self._stalled == 2:
            ranks.warn(
                f"sizes of maps changed before num_samples={self.sketches.num_samples} samples of one size "
                "were gathered, so there are no new clusters; lower num_samples, or train with fewer sizes"
            )

    def _warn_once(self, name: str, message: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            ranks.warn(message)
