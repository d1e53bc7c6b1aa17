"""Pictures of new clusters, sent to whatever logger takes images."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from lightning_dropcluster import ranks
from lightning_dropcluster.learning.clusters import Clusters
from lightning_dropcluster.visualization import neighbor_colors, plot_clusters
from lightning_dropcluster.visualization.panels import render

_MOST_LAYERS, _MOST_MAPS = 4, 9
_LEAST_PAUSE = 50.0  # times what the last pictures took: no more than 2 % of the time goes into pictures

Send = Callable[[str, Tensor, int], None]
"""Takes a tag, an (H, W, 3) uint8 picture and the step."""


class PictureLog:
    """Sends pictures of a callback's clusters to loggers; none of them has to be installed.

    Known are TensorBoard, Weights & Biases, MLflow, Comet, and what has their methods. A logger that takes no
    images gets none. A logger that fails is named in one warning, and training goes on.
    """

    def __init__(self, scope: str) -> None:
        self._scope = scope
        self._last: dict[str, Clusters] = {}
        self._colors: dict[str, Tensor] = {}
        self._ended, self._took = float("-inf"), 0.0
        self._failed: set[int] = set()

    def send(self, trainer: Any, clusters: Mapping[str, Clusters], prefix: str, step: int) -> None:
        """Draw the clusters of the first few layers and send them."""
        # Copies, since the callback writes the next labels over these.
        last, self._last = self._last, {**self._last, **{name: one.copy() for name, one in clusters.items()}}
        senders = {id(one): _sender(one) for one in trainer.loggers if id(one) not in self._failed}
        started = time.monotonic()
        if not any(senders.values()) or trainer.fast_dev_run or not find_spec("matplotlib"):
            return
        if started - self._ended < _LEAST_PAUSE * self._took:
            return
        drawable = [name for name, one in clusters.items() if 2 <= len(one.shape) <= 4]
        for name in drawable[:_MOST_LAYERS]:
            picture = self._draw(name, clusters[name], last.get(name), trainer.current_epoch)
            for key, send in senders.items():
                if send is not None and key not in self._failed:
                    self._try(key, send, f"{prefix}/{name}", picture, step)
        self._ended = time.monotonic()
        self._took = self._ended - started

    def _draw(self, name: str, clusters: Clusters, last: Clusters | None, epoch: int) -> Tensor:
        labels, colors = clusters.labels, self._colors.get(name)
        if colors is None or len(colors) <= int(labels.max()):
            colors = neighbor_colors(labels[:_MOST_MAPS], num_clusters=int(labels.max()) + 1)
            self._colors[name] = colors
        figure = plot_clusters(
            labels,
            title=name,
            epoch=epoch,
            previous=last.labels if last is not None and last.shape == clusters.shape else None,
            scope=self._scope,
            colors=colors,
            max_maps=_MOST_MAPS,
        )
        return render(figure)

    def _try(self, key: int, send: Send, tag: str, picture: Tensor, step: int) -> None:
        try:
            send(tag, picture, step)
        except Exception as error:
            self._failed.add(key)
            ranks.warn(f"a logger did not take a picture and gets no more: {error!r}")


def _sender(logger: Any) -> Send | None:
    """Find out how a logger takes pictures, from the methods that it has."""
    try:
        experiment: Any = getattr(logger, "experiment", None)
    except Exception:  # it will say so itself when metrics are logged
        return None
    if _has(experiment, "add_image"):  # TensorBoard
        return lambda tag, picture, step: experiment.add_image(tag, picture.numpy(), step, dataformats="HWC")
    if _has(logger, "log_image"):  # Weights & Biases
        return lambda tag, picture, step: logger.log_image(key=tag, images=[picture.numpy()], step=step)
    if _has(experiment, "log_image") and hasattr(logger, "run_id"):  # MLflow
        return lambda tag, picture, step: experiment.log_image(
            logger.run_id, picture.numpy(), artifact_file=f"{tag}/{step:08d}.png"
        )
    if _has(experiment, "log_image"):  # Comet
        return lambda tag, picture, step: experiment.log_image(picture.numpy(), name=tag, step=step)
    return None


def _has(thing: Any, method: str) -> bool:
    return callable(getattr(thing, method, None))
