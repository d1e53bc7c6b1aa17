"""The cluster learner: it owns what is learned of the layers, and the callback talks to it alone."""

import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_dropcluster import ranks
from lightning_dropcluster.clustering import Clusterer
from lightning_dropcluster.clustering.protocol import count_clusters
from lightning_dropcluster.layers.hooks import LayerHook
from lightning_dropcluster.layers.injection import Injection
from lightning_dropcluster.layers.troubles import unused_layers_error
from lightning_dropcluster.learning.clustered_layers import ClusteredLayers
from lightning_dropcluster.learning.clusters import Clusters
from lightning_dropcluster.learning.reclustering import OnProgress, cluster_share, recluster
from lightning_dropcluster.learning.reports import Report, make_report, warnings_for
from lightning_dropcluster.learning.running_profiles import RunningProfiles
from lightning_dropcluster.learning.scopes import SCOPES, Grouping, Shape
from lightning_dropcluster.learning.sketch import SketchSettings
from lightning_dropcluster.learning.troubles import (
    few_samples_warning,
    lack_of_memory,
    sizes_warning,
    trouble,
)
from lightning_dropcluster.learning.window import GatheringWindow
from lightning_dropcluster.methods import ClusterDrop

Phase = Literal["idle", "gathering", "full"]
"""Between windows; while one is open, or will be once the layers are hooked; while its labels are made."""

_TROUBLE = ("gathering",)  # what is warned of once


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
        self.windows_opened, self.seconds = 0, 0.0
        self.waiting: AbstractContextManager[OnProgress | None] = nullcontext()
        self._layers = ClusteredLayers(grouping, make_drop)
        self._running_profiles = RunningProfiles(sketch_momentum)
        self._resized_to: dict[str, Shape] = {}  # layers whose sizes are too many
        self._is_first_step = True
        self._warned: set[Hashable] = set()

    @property
    def hooks(self) -> dict[str, LayerHook]:
        """The hook of each layer, see `ClusteredLayers`."""
        return self._layers.hooks

    @property
    def labels_pending(self) -> bool:
        """Whether a window was opened that has not come to labels yet."""
        return self.phase != "idle"

    @property
    def is_untouched(self) -> bool:
        """Whether it has neither clusters nor had a window."""
        return not (self.clusters or self.windows_opened)

    def reset(self, clusters: Mapping[str, Clusters]) -> None:
        """Forget an earlier training; the clusters are those to start from."""
        self.clusters, self.phase = dict(clusters), "idle"
        self.windows_opened, self.seconds, self._resized_to = 0, 0.0, {}
        self._running_profiles.clear()
        self._warned.clear()

    def attach(self, modules: Mapping[str, nn.Module], device: torch.device) -> None:
        """Hook the layers; a window that came to no labels before the last `detach` is opened again."""
        self.detach()
        self._is_first_step = True
        self.clusters |= self._layers.attach(modules, self.clusters, device)
        if self.labels_pending:
            self.window = self._make_window()

    def detach(self) -> None:
        """Take every hook off and free what only training needs; nothing happens where that is done."""
        self._close_window()
        self._layers.detach()
        self.waiting = nullcontext()

    def open_window(self) -> None:
        """Start to gather, unless a window is open already."""
        if self.window is None:
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
        """Recluster where the window is full, and return a report for each layer that has new labels.

        Every rank must call this.
        """
        self.pause()
        self._layers.check_calls()
        if self._is_first_step:
            self._is_first_step = False
            # Now, and not only at the start.
            if lack := lack_of_memory(self.hooks, self.sketches, self._layers.device):
                self._warn_once(_TROUBLE, lack)
        verdict = "open" if self.window is None else self.window.verdict()
        if verdict == "full":
            started = time.perf_counter()  # not before: to count the samples was to wait for device and ranks
            try:
                return self._recluster()
            finally:
                self.seconds += time.perf_counter() - started
        if verdict == "stalled":
            self._restart_window()
        elif verdict == "scattered":
            self._take_all_sizes()
        elif verdict == "failed":
            self._give_up()
        return {}

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
        alone = ranks.world_size() == 1
        window = {} if self.window is None else self.window.state_dict()
        return {
            "clusters": {name: clusters.state_dict() for name, clusters in self.clusters.items()},
            "shapes": {name: list(h.shape) for name, h in self.hooks.items() if h.shape is not None},
            "windows_opened": self.windows_opened,
            "window": window if self.labels_pending else None,
            "samples_left_out": self.window.left_out if alone and self.window is not None else 0,
            "resized_to": {name: list(shape) for name, shape in self._resized_to.items()},
            "memory": self._running_profiles.state_dict() if alone else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what was under way; the clusters are held already, and the hooks are on."""
        self._close_window()
        self.windows_opened = state["windows_opened"]
        resized_to = state.get("resized_to", {})  # of later versions only
        self._resized_to = {name: tuple(shape) for name, shape in resized_to.items()}
        for name in self.hooks.keys() & state["shapes"].keys():
            self.hooks[name].shape, self.hooks[name].fired = tuple(state["shapes"][name]), True
        self.clusters |= self._layers.bind_all(self.clusters)
        self.phase = "idle"
        if state["window"] is not None:
            self.window, self.phase = self._make_window(), "gathering"
            self.window.load_state_dict(state["window"])
            self.window.left_out = state.get("samples_left_out", 0)
        self._running_profiles.load_state_dict(state["memory"])

    def _make_window(self) -> GatheringWindow:
        number, device = self.windows_opened - 1, self._layers.device
        return GatheringWindow(self.hooks, self.sketches, number, device, self._resized_to)

    def _close_window(self) -> None:
        if self.window is not None:
            self.window.close()
            self.window = None

    def _restart_window(self) -> None:
        """Gather anew, maps of the size that they have now."""
        assert self.window is not None
        left_out = self.window.left_out
        self._close_window()
        self.open_window()
        self.window.left_out = left_out

    def _take_all_sizes(self) -> None:
        """From now on gather maps of all sizes, in that which they have now on the first rank."""
        assert self.window is not None
        self._resized_to = self.window.shapes_of_all()
        self._close_window()
        self.open_window()
        self._warn_once(("sizes",), sizes_warning(self.sketches.num_samples))

    def _give_up(self) -> None:
        """Close a window that cannot be filled; there may be another at the next due moment."""
        assert self.window is not None
        self._warn_once(_TROUBLE, trouble(self.window.failed, self.hooks, self.sketches))
        self._close_window()
        self.phase = "idle"

    def _recluster(self) -> dict[str, Report]:
        """Close a full window and have its sketches clustered; where none can be, open another at first."""
        assert self.window is not None
        if not self.clusters:
            ranks.raise_together(unused_layers_error(self.never_ran()), self._layers.device)
        sketches, self.window, self.phase = self.window.merge(), None, "full"
        if not sketches and not self.clusters:
            self.open_window()
            return {}
        for name, sketch in sketches.items():
            if 2 * (count := int(sketch.count)) < self.sketches.num_samples:
                message = few_samples_warning(name, count, self.sketches.num_samples)
                self._warn_once(("few samples", name), message)
        old = {name: self.clusters[name] for name in sketches if name in self.clusters}
        tables = {name: c.table for name, c in old.items() if c.shape == sketches[name].shape}
        with self.waiting as on_progress:
            settings = (self.clusterer, self.grouping, self._running_profiles, on_progress, self.hooks)
            labels = recluster(lambda: cluster_share(sketches, tables, *settings), self._layers.device)
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

    def _warn_once(self, about: Hashable, message: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            ranks.warn(message)
