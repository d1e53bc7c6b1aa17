"""The gathering window: one sketch per layer, filled from the ordinary training batches."""

from collections.abc import Mapping
from typing import Any, cast

import torch

from lightning_dropcluster import ranks
from lightning_dropcluster.layers.hooks import LayerHook
from lightning_dropcluster.learning.scopes import Scope
from lightning_dropcluster.learning.sketch import Sketch


class GatheringWindow:
    """An open window over some layers.

    Args:
        hooks: name to hook.
        scope: what is grouped.
        number: of the window, from 0.
        num_samples: samples to gather, over all ranks; each rank gathers its share.
        sketch_dim: columns of the sketches.
        seed: of the sketches' signs.
        device: where the model is.
    """

    def __init__(
        self,
        hooks: Mapping[str, LayerHook],
        *,
        scope: Scope,
        number: int,
        num_samples: int,
        sketch_dim: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.hooks, self.scope, self.number = hooks, scope, number
        self.num_samples, self.sketch_dim, self.seed, self.device = num_samples, sketch_dim, seed, device
        self._resized: set[str] = set()
        self._counts: dict[str, int] = {}

    def has_stalled(self) -> bool:
        """Whether maps have another size now than their sketch, which has grown no more since last asked.

        Returns:
            True where a layer is so; sizes that take turns fill a window in the end.
        """
        before = self._counts
        self._counts = {name: int(sketch.count) for name, sketch in self._sketches().items()}
        idle = [name for name, count in self._counts.items() if count == before.get(name)]
        return any(_changed_size(self.hooks[name]) for name in idle)

    def arm(self) -> None:
        """Prepare for a step: layers whose shape is known by now get a sketch."""
        for name, hook in self.hooks.items():
            sketch = self._sketches().get(name) if _changed_size(hook) else None
            if sketch is not None and not sketch.count and name not in self._resized:
                # Made for the size before the window. Once only: sizes that take turns would never meet.
                self._resized.add(name)
                hook.sketch = None
            if hook.sketch is None and hook.shape is not None:
                hook.sketch = self._make_sketch(hook.shape)

    def is_full(self) -> bool:
        """Count the samples; every rank must ask alike, since this is a collective.

        Returns:
            True once ``num_samples`` were seen over all ranks, by the slowest of the layers that ran in this
            step: some fold windows or heads into the batch, others run only now and then.
        """
        ran = [s.count for name, s in self._sketches().items() if not self.hooks[name].first_call]
        nothing = torch.zeros((), dtype=torch.int64, device=self.device)
        seen = torch.stack(ran).min() if ran else nothing
        return int(ranks.sum_over_ranks(seen)) >= self.num_samples

    def close(self) -> dict[str, Sketch]:
        """Take the sketches out of the hooks.

        Returns:
            Name to sketch, of the layers that have one.
        """
        sketches = self._sketches()
        for hook in self.hooks.values():
            hook.sketch = None
        return sketches

    def merge(self) -> dict[str, Sketch]:
        """Close the window and add the sketches up over ranks; every rank must call this.

        Returns:
            Name to merged sketch, equal on every rank, of the layers that can be clustered. A warning names
            each of the others.
        """
        sketches, merged = self.close(), {}
        for name in self._gathered_alike(sketches):
            sketches[name].merge()
            if not sketches[name].count:
                ranks.warn(f"layer {name!r} did not run while the window was open; it is not clustered")
            elif not sketches[name].is_finite():
                ranks.warn(f"activations of layer {name!r} were NaN, infinite or huge; it is not clustered")
            else:
                merged[name] = sketches[name]
        return merged

    def state_dict(self) -> dict[str, Any]:
        """Return the sketches for a checkpoint.

        Returns:
            Name to tensors and shape; empty with several ranks, where an open window starts again on resume.
        """
        if ranks.world_size() > 1:
            return {}
        return {
            name: {"shape": list(sketch.shape), **{k: v.cpu() for k, v in sketch.state_dict().items()}}
            for name, sketch in self._sketches().items()
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on with the sketches of a checkpoint; those that do not fit the settings start again.

        Args:
            state: what `state_dict` returned.
        """
        for name, entry in state.items():
            if name not in self.hooks or ranks.world_size() > 1:
                continue
            sketch = self._make_sketch(tuple(entry["shape"]))
            tensors = {key: value for key, value in entry.items() if key != "shape"}
            try:
                sketch.load_state_dict(tensors)
            except RuntimeError:
                ranks.warn(f"the open sketch of layer {name!r} was made with other settings and starts again")
                continue
            sketch.num_samples = max(sketch.num_samples, int(sketch.count))  # asked for when it was saved
            self.hooks[name].sketch = sketch

    def _sketches(self) -> dict[str, Sketch]:
        """Name to open sketch; a hook knows of it only that it gathers."""
        return {n: cast(Sketch, hook.sketch) for n, hook in self.hooks.items() if hook.sketch is not None}

    def _make_sketch(self, shape: tuple[int, ...]) -> Sketch:
        size = ranks.world_size()
        return Sketch(
            shape,
            scope=self.scope.name,
            num_samples=-(-self.num_samples // size),
            sketch_dim=self.sketch_dim,
            seed=self.seed,
            window=self.number,
            rank=ranks.rank(),
            world_size=size,
            device=self.device,
        )

    def _gathered_alike(self, sketches: Mapping[str, Sketch]) -> list[str]:
        """Name the layers that have a sketch of the same shape on every rank."""
        names = list(self.hooks)
        mine = torch.zeros(len(names), 8, dtype=torch.int64)
        for row, name in zip(mine, names, strict=True):
            if name in sketches:
                shape = sketches[name].shape
                row[: len(shape)] = torch.tensor(shape)
        table = torch.zeros(ranks.world_size(), *mine.shape, dtype=torch.int64, device=self.device)
        table[ranks.rank()] = mine
        table = ranks.sum_over_ranks(table).cpu()
        alike = (table == table[:1]).flatten(2).all(2).all(0) & (table[0, :, 0] > 0)
        for name in (name for name, same in zip(names, alike, strict=True) if not same):
            others = ", or not alike on all ranks" if ranks.world_size() > 1 else ""
            ranks.warn(f"layer {name!r} was not gathered{others}; it is not clustered")
        return [name for name, same in zip(names, alike, strict=True) if same]


def _changed_size(hook: LayerHook) -> bool:
    return hook.sketch is not None and hook.sketch.shape != hook.shape
