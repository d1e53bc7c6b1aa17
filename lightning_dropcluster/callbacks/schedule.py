"""The schedule: from the trainer's counters to the part of drop_prob in use, and when to recluster."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

from lightning_dropcluster.callbacks.ramps import Ramp, intervals_passed, stretched
from lightning_dropcluster.checks import check_not_both, check_number


@dataclass(frozen=True)
class TrainingPosition:
    """A moment of training in Lightning's counters; a limit of -1 is none."""

    epoch: int
    step: int
    batch: int
    batches_per_epoch: float
    max_epochs: int
    max_steps: int
    batches_per_step: float = 1

    @property
    def fraction(self) -> float | None:
        """The part of training that has passed, by the limit that is nearer; ``None`` where there is none.

        In epochs of unknown length it moves once an epoch.
        """
        parts = []
        if self.max_epochs > 0:
            within = self.batch / self.batches_per_epoch if self.batches_per_epoch else 0.0
            parts.append((self.epoch + min(1.0, within)) / self.max_epochs)
        if self.max_steps > 0:
            parts.append(self.step / self.max_steps)
        return min(1.0, max(parts)) if parts else None

    @property
    def batches_left(self) -> float:
        """Batches from this one to the nearer limit; infinite where that is not known."""
        left = [math.inf]
        if self.max_epochs > 0:
            left.append((self.max_epochs - self.epoch) * self.batches_per_epoch - self.batch)
        if self.max_steps > 0:
            left.append((self.max_steps - self.step) * self.batches_per_step)
        return min(left)


class Schedule:
    """When dropping starts, how far the ramp is, and when to recluster.

    Due moments lie on a grid: the start, then every interval. The position is kept in whole epochs or steps,
    so that a resumed run goes on where it was. ``start`` is a fraction of training as a float, else an epoch.
    """

    def __init__(
        self,
        start: int | float,
        ramp: Ramp,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
    ) -> None:
        self.start = _check_start(start)
        self.ramp = ramp
        check_not_both("every_n_epochs", every_n_epochs, "every_n_train_steps", every_n_train_steps)
        self.counts_steps = every_n_train_steps is not None
        name, every = "every_n_epochs", 5 if every_n_epochs is None else every_n_epochs
        if every_n_train_steps is not None:
            name, every = "every_n_train_steps", every_n_train_steps
        self.every = check_number(name, every, 0, integer=True)
        self.is_late = False
        self.reset()

    @property
    def has_begun(self) -> bool:
        """Whether the start has been reached."""
        return self._began is not None

    @property
    def follows_length(self) -> bool:
        """Whether the start or the ramp depends on how long training is."""
        return (isinstance(self.start, float) and self.start > 0) or self._is_ramp()

    def reset(self, has_labels: bool = False) -> None:
        """Go back to before the start; where there are labels, the first due moment will be skipped."""
        self._origin: int | None = None
        self._began: tuple[int, int, int] | None = None  # epoch, step and batch of the start
        self._passed = int(has_labels)

    def check(self, max_epochs: int | None, max_steps: int) -> None:
        """Check the settings against the length of training, and note whether the start lies beyond it."""
        endless = max_epochs in (None, -1) and max_steps == -1
        if endless and isinstance(self.start, float):
            raise ValueError(
                f"start={self.start!r}: a fraction of training needs max_epochs or max_steps in the Trainer; "
                "give an epoch, or set a limit"
            )
        if endless and self._is_ramp():
            raise ValueError(
                "schedule: a ramp to the end of training needs max_epochs or max_steps in the Trainer; "
                "give schedule='constant', or set a limit"
            )
        self.is_late = (
            isinstance(self.start, int) and max_epochs is not None and 0 <= max_epochs <= self.start
        )

    def advance(self, now: TrainingPosition) -> tuple[float, bool]:
        """Note the position before a batch; return the part of drop_prob in use, and whether to recluster."""
        if self._began is not None and self._began > (now.epoch, now.step, now.batch):
            self.reset(has_labels=True)  # of another training, whose state was loaded by hand
        if self._began is None:
            if not self._has_started(now):
                return 0.0, False
            self._began = now.epoch, now.step, now.batch
        if self._origin is None:
            self._origin = now.step if self.counts_steps else now.epoch
        passed = intervals_passed(now.step if self.counts_steps else now.epoch, self._origin, self.every)
        is_due, self._passed = passed > self._passed, max(passed, self._passed)
        fraction = 1.0 if now.fraction is None else now.fraction
        return stretched(self.ramp, self._start_of_ramp(now))(fraction), is_due

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain scalars."""
        return {
            "origin": self._origin,
            "passed": self._passed,
            "began": None if self._began is None else list(self._began),
            "every": self.every,
            "counts_steps": self.counts_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a position.

        With another interval than before, count from here and recluster at once; with 0 never again.
        """
        self._began = None if state["began"] is None else tuple(state["began"])
        self._origin, self._passed = None, int(self.every == 0 and state["passed"] > 0)
        if (state["every"], state["counts_steps"]) == (self.every, self.counts_steps):
            self._origin, self._passed = state["origin"], state["passed"]

    def _is_ramp(self) -> bool:
        return len({self.ramp(fraction) for fraction in (0.0, 0.5, 1.0)}) > 1

    def _start_of_ramp(self, now: TrainingPosition) -> float:
        """The start as a fraction of training, which may have become longer since."""
        assert self._began is not None
        epoch, step, batch = self._began
        began = replace(now, epoch=epoch, step=step, batch=batch).fraction or 0.0
        return min(self.start, began) if isinstance(self.start, float) else began

    def _has_started(self, now: TrainingPosition) -> bool:
        if isinstance(self.start, int):
            return now.epoch >= self.start
        return (now.fraction or 0.0) >= self.start


def _check_start(start: Any) -> int | float:
    is_epoch = isinstance(start, Integral)
    try:
        if is_epoch:
            return check_number("start", start, 0, integer=True)
        return check_number("start", start, 0, 1, high_open=True)
    except (TypeError, ValueError) as error:
        rule = (
            "must be a fraction of training in [0, 1), as a float, or an epoch of at least 0, as an integer"
        )
        raise type(error)(f"start={start!r}: {rule}") from error
