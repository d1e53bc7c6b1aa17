"""The gathering window: one sketch per layer, filled from the ordinary training batches."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor

from lightning_dropcluster import ranks
from lightning_dropcluster.layers.hooks import LayerHook
from lightning_dropcluster.learning.scopes import Shape
from lightning_dropcluster.learning.sketch import Sketch, SketchSettings
from lightning_dropcluster.memory import check_available, is_out_of_memory

Verdict = Literal["open", "full", "stalled", "scattered", "failed"]
_MOST_LEFT_OUT = 4  # times num_samples, after which sizes are too many to wait for one of them


class GatheringWindow:
    """An open window over some layers; windows are numbered from 0.

    A layer with a shape in ``shapes`` is gathered in that shape, whatever it gives. ``left_out`` counts the
    samples of other sizes than the sketches', ``failed`` names the layers that could not be gathered, with
    the cause where it lies on this rank.
    """

    def __init__(
        self,
        hooks: Mapping[str, LayerHook],
        settings: SketchSettings,
        number: int,
        device: torch.device,
        shapes: Mapping[str, Shape] | None = None,
    ) -> None:
        self.shapes = shapes or {}
        self.hooks, self.settings, self.number, self.device = hooks, settings, number, device
        self._resized: set[str] = set()
        self._passed: dict[str, Counter[Shape]] = {}  # samples of other sizes, since the sketch last grew
        self.left_out = 0
        self.failed: dict[str, Exception | None] = {}

    def arm(self) -> None:
        """Prepare for a step: layers whose shape is known by now get a sketch."""
        for name, hook in self.hooks.items():
            sketch = self._sketches().get(name) if _changed_size(hook) else None
            if sketch is not None and not sketch.count and name not in self._resized:
                # Made for the size before the window. Once only: sizes that take turns would never meet.
                self._resized.add(name)
                hook.sketch = None
        self._make_missing()

    def verdict(self) -> Verdict:
        """How it stands after a step, the same on every rank; every rank must ask.

        It is full once ``num_samples`` were seen over all ranks, and has stalled once as many of one other
        size have passed without growth; sizes that take turns fill a window in the end, if they are few.
        """
        failed = [hook.gather_error is not None for hook in self.hooks.values()]
        counts = [self._count_seen(), self._count_passed(), self.left_out]
        mine = torch.tensor([*counts, *failed], device=self.device)
        seen, passed, left_out, *failed = ranks.sum_over_ranks(mine).tolist()
        self.failed = {n: h.gather_error for (n, h), f in zip(self.hooks.items(), failed, strict=True) if f}
        if self.failed:
            return "failed"
        wanted = self.settings.num_samples
        if seen >= wanted:
            return "full"
        if left_out >= _MOST_LEFT_OUT * wanted:
            return "scattered"
        return "stalled" if passed >= wanted else "open"

    def shapes_of_all(self) -> dict[str, Shape]:
        """Return the layers' shapes on the first rank, the same on every rank; every rank must ask."""
        known = {name: hook.shape for name, hook in self.hooks.items() if hook.shape is not None}
        table = ranks.from_rank(self._table(known).to(self.device), 0).tolist()
        shapes = {name: tuple(filter(None, row)) for name, row in zip(self.hooks, table, strict=True)}
        return {name: shape for name, shape in shapes.items() if shape}

    def close(self) -> dict[str, Sketch]:
        """Take the sketches out of the hooks, of the layers that have one."""
        sketches = self._sketches()
        for hook in self.hooks.values():
            hook.sketch = hook.gather_error = None
        return sketches

    def merge(self) -> dict[str, Sketch]:
        """Close the window and add the sketches up over ranks; every rank must call this.

        Layers that cannot be clustered are left out, and a warning names each.
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
        """Return the sketches; none with several ranks, where an open window starts again on resume."""
        if ranks.world_size() > 1:
            return {}
        return {
            name: {
                "shape": list(sketch.shape),
                "passed": [[list(shape), count] for shape, count in self._passed.get(name, {}).items()],
                **{k: v.to("cpu", copy=True) for k, v in sketch.state_dict().items()},
            }
            for name, sketch in self._sketches().items()
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on with the sketches of a checkpoint; those that do not fit the settings start again."""
        for name, entry in state.items():
            if name not in self.hooks or ranks.world_size() > 1:
                continue
            tensors = {key: value for key, value in entry.items() if key not in ("shape", "passed")}
            try:
                sketch = self._make(name, tuple(entry["shape"]))
                sketch.load_state_dict(tensors)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):  # else the next step will tell
                    ranks.warn(
                        f"the open sketch of layer {name!r} was made with other settings and starts again"
                    )
                continue
            sketch.num_samples = max(sketch.num_samples, int(sketch.count))  # asked for when it was saved
            self.hooks[name].sketch = sketch
            self._passed[name] = Counter({tuple(shape): count for shape, count in entry.get("passed", ())})

    def _make_missing(self) -> None:
        """Make the sketches that can be made by now; where memory does not suffice, none is kept."""
        missing = {
            name: self.shapes.get(name, hook.shape)
            for name, hook in self.hooks.items()
            if hook.sketch is None and hook.shape is not None
        }
        if not missing:
            return
        # To blame where all together do not fit.
        failed = max(missing, key=lambda name: self.settings.num_bytes(missing[name]))
        try:
            # On a CPU the allocator would promise what is not there.
            check_available(sum(map(self.settings.num_bytes, missing.values())), self.device)
            for failed, shape in missing.items():
                self.hooks[failed].sketch = self._make(failed, shape)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.close()
            self.hooks[failed].gather_error = error.with_traceback(None)

    def _make(self, name: str, shape: Shape) -> Sketch:
        return self.settings.make(shape, self.number, self.device, any_size=name in self.shapes)

    def _count_seen(self) -> int:
        """Samples of the slowest of the layers that ran in this step.

        Some fold windows or heads into the batch, others run only now and then.
        """
        ran = [s.count for name, s in self._sketches().items() if not self.hooks[name].first_call]
        return int(torch.stack(ran).min()) if ran else 0

    def _count_passed(self) -> int:
        """Samples of one other size that have passed since a sketch, not full yet, grew; the most of all."""
        most = left_out = 0
        for name, sketch in self._sketches().items():
            hook, passed = self.hooks[name], self._passed.setdefault(name, Counter())
            if hook.first_call or hook.shape is None:  # it did not run in this step
                continue
            if sketch.takes(hook.shape):
                passed.clear()
            elif sketch.count < sketch.num_samples:
                passed[hook.shape] += hook.batch_size
                left_out, most = max(left_out, hook.batch_size), max(most, passed[hook.shape])
        self.left_out += left_out
        return most

    def _sketches(self) -> dict[str, Sketch]:
        """Name to open sketch; a hook knows of it only that it gathers."""
        return {n: cast(Sketch, hook.sketch) for n, hook in self.hooks.items() if hook.sketch is not None}

    def _table(self, shapes: Mapping[str, Shape]) -> Tensor:
        """Write shapes in a row for each layer, zeros where there is none."""
        return torch.tensor([[*shapes.get(name, ()), *[0] * 8][:8] for name in self.hooks])

    def _gathered_alike(self, sketches: Mapping[str, Sketch]) -> list[str]:
        """Name the layers that have a sketch of the same shape on every rank."""
        names, mine = list(self.hooks), self._table({name: one.shape for name, one in sketches.items()})
        table = torch.zeros(ranks.world_size(), *mine.shape, dtype=torch.int64, device=self.device)
        table[ranks.rank()] = mine
        table = ranks.sum_over_ranks(table).cpu()
        alike = (table == table[:1]).flatten(2).all(2).all(0) & (table[0, :, 0] > 0)
        for name in (name for name, same in zip(names, alike, strict=True) if not same):
            others = ", or not alike on all ranks" if ranks.world_size() > 1 else ""
            ranks.warn(f"layer {name!r} was not gathered{others}; it is not clustered")
        return [name for name, same in zip(names, alike, strict=True) if same]


def _changed_size(hook: LayerHook) -> bool:
    return hook.sketch is not None and hook.shape is not None and not hook.sketch.takes(hook.shape)
