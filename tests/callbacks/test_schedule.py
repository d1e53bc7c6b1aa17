"""Schedule against a brute-force simulation of training."""

import functools
import json
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dropcluster.callbacks.ramps import constant, cosine, linear
from lightning_dropcluster.callbacks.schedule import Schedule, TrainingPosition

RAMPS = {"linear": linear, "cosine": cosine, "constant": constant}


@dataclass(frozen=True)
class Run:
    """A training run, simulated batch by batch."""

    epochs: int
    batches: int
    accumulate: int
    steps_per_update: int
    limits: str

    @functools.cached_property
    def max_steps(self) -> int:
        updates = -(-self.batches // self.accumulate)
        return self.epochs * updates * self.steps_per_update

    def positions(self) -> list[TrainingPosition]:
        max_epochs = self.epochs if "epochs" in self.limits else -1
        max_steps = self.max_steps if "steps" in self.limits else -1
        found, step = [], 0
        for epoch in range(self.epochs):
            for batch in range(self.batches):
                found.append(TrainingPosition(epoch, step, batch, self.batches, max_epochs, max_steps))
                if (batch + 1) % self.accumulate == 0 or batch + 1 == self.batches:
                    step += self.steps_per_update
        return found

    def fraction(self, now: TrainingPosition) -> Fraction:
        by_epoch = Fraction(now.epoch * self.batches + now.batch, self.epochs * self.batches)
        by_step = Fraction(now.step, self.max_steps)
        return max([by_epoch] * ("epochs" in self.limits) + [by_step] * ("steps" in self.limits))


@dataclass(frozen=True)
class Settings:
    """What a `Schedule` is made of."""

    start: int | float
    schedule: str
    counts: str
    every: int

    def make(self) -> Schedule:
        name = {"epoch": "every_n_epochs", "step": "every_n_train_steps"}[self.counts]
        return Schedule(self.start, RAMPS[self.schedule], **{name: self.every})

    def has_started(self, run: Run, now: TrainingPosition) -> bool:
        where = now.epoch if isinstance(self.start, int) else run.fraction(now)
        return where >= Fraction(self.start)

    def due(self, run: Run) -> list[bool]:
        """Walk along the grid of due moments, one epoch or step at a time."""
        origin, seen, due = None, set(), []
        for now in run.positions():
            count = getattr(now, self.counts)
            if origin is None and self.has_started(run, now):
                origin = count
            passed = [] if origin is None else range(origin, count + 1)
            grid = {m for m in passed if m == origin or (self.every and (m - origin) % self.every == 0)}
            due.append(bool(grid - seen))
            seen |= grid
        return due

    def shares(self, run: Run) -> list[float]:
        """Stretch the schedule over what is left of training at the start."""
        began, shares = None, []
        for now in run.positions():
            fraction = run.fraction(now)
            if began is None and self.has_started(run, now):
                began = fraction if isinstance(self.start, int) else Fraction(self.start)
            passed = None if began is None else float((fraction - began) / (1 - began))
            shares.append(0.0 if passed is None else RAMPS[self.schedule](passed))
        return shares


RUNS = st.builds(
    Run,
    epochs=st.integers(1, 6),
    batches=st.integers(1, 5),
    accumulate=st.integers(1, 3),
    steps_per_update=st.integers(1, 2),
    limits=st.sampled_from(["epochs", "steps", "epochs and steps"]),
)
SETTINGS = st.builds(
    Settings,
    start=st.integers(0, 5) | st.integers(0, 15).map(lambda n: n / 16),
    schedule=st.sampled_from(sorted(RAMPS)),
    counts=st.sampled_from(["epoch", "step"]),
    every=st.integers(0, 5),
)
thorough = settings(deadline=None, max_examples=200)


def walk(schedule: Schedule, positions: list[TrainingPosition]) -> list[tuple[float, bool]]:
    return [schedule.advance(now) for now in positions]


@thorough
@given(RUNS, SETTINGS)
def test_due_moments_are_those_of_the_simulation(run, options):
    assert [due for _, due in walk(options.make(), run.positions())] == options.due(run)


@thorough
@given(RUNS, SETTINGS)
def test_shares_are_those_of_the_simulation(run, options):
    assert [share for share, _ in walk(options.make(), run.positions())] == pytest.approx(options.shares(run))


@thorough
@given(RUNS, SETTINGS)
def test_shares_never_fall_and_stay_in_the_unit_interval(run, options):
    shares = [share for share, _ in walk(options.make(), run.positions())]
    assert [0.0, *shares, 1.0] == sorted([0.0, *shares, 1.0])


@thorough
@given(RUNS, SETTINGS, st.data())
def test_a_run_resumed_at_any_step_goes_on_as_if_it_had_never_stopped(run, options, data):
    positions = run.positions()
    stop = data.draw(st.integers(0, len(positions)))
    first, second = options.make(), options.make()
    before = walk(first, positions[:stop])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + walk(second, positions[stop:]) == walk(options.make(), positions)


@thorough
@given(RUNS, SETTINGS)
def test_labels_to_start_from_take_the_place_of_the_first_due_moment_only(run, options):
    schedule, due = options.make(), options.due(run)
    schedule.reset(has_labels=True)
    if True in due:
        due[due.index(True)] = False
    assert [is_due for _, is_due in walk(schedule, run.positions())] == due


@thorough
@given(RUNS, SETTINGS)
def test_reset_forgets_an_earlier_run(run, options):
    schedule = options.make()
    first = walk(schedule, run.positions())
    schedule.reset()
    assert walk(schedule, run.positions()) == first


@thorough
@given(RUNS)
def test_the_fraction_is_exact_and_below_one(run):
    for now in run.positions():
        assert now.fraction == pytest.approx(float(run.fraction(now)))
        assert 0.0 <= now.fraction < 1.0


@pytest.mark.parametrize(
    ("position", "fraction"),
    [
        (TrainingPosition(3, 100, 5, 10, -1, -1), None),
        (TrainingPosition(3, 100, 5, 10, 0, -1), None),
        (TrainingPosition(3, 0, 5, float("inf"), 4, -1), 0.75),
        (TrainingPosition(3, 0, 5, 0, 4, -1), 0.75),
        (TrainingPosition(3, 0, 20, 10, 4, -1), 1.0),
        (TrainingPosition(9, 0, 0, 10, 4, -1), 1.0),
        (TrainingPosition(1, 30, 0, 10, 4, 40), 0.75),
        (TrainingPosition(3, 10, 0, 10, 4, 40), 0.75),
    ],
)
def test_the_fraction_in_unusual_runs(position, fraction):
    assert position.fraction == fraction


def test_without_an_end_the_share_is_one_from_the_start_on():
    positions = [TrainingPosition(epoch, epoch, 0, 1, -1, -1) for epoch in range(5)]
    assert walk(Schedule(2, constant, every_n_epochs=2), positions) == [
        (0.0, False),
        (0.0, False),
        (1.0, True),
        (1.0, False),
        (1.0, True),
    ]


def test_a_training_continued_without_an_end_stays_at_the_top_of_the_ramp():
    first, second = Schedule(2, linear), Schedule(2, constant)
    walk(first, [TrainingPosition(epoch, epoch, 0, 1, 4, -1) for epoch in range(4)])
    second.load_state_dict(first.state_dict())
    assert second.advance(TrainingPosition(4, 4, 0, 1, -1, -1)) == (1.0, False)


def test_reclustering_is_due_every_five_epochs_where_nothing_is_said():
    positions = [TrainingPosition(epoch, epoch, 0, 1, 20, -1) for epoch in range(20)]
    due = [due for _, due in walk(Schedule(3, linear), positions)]
    assert [epoch for epoch in range(20) if due[epoch]] == [3, 8, 13, 18]


def test_a_training_continued_with_more_epochs_keeps_its_due_moments():
    def positions(epochs, limit):
        return [TrainingPosition(epoch, epoch, 0, 1, limit, -1) for epoch in epochs]

    first, second = Schedule(0.5, linear, every_n_epochs=2), Schedule(0.5, linear, every_n_epochs=2)
    walk(first, positions(range(4), 4))
    second.load_state_dict(first.state_dict())
    due = [due for _, due in walk(second, positions(range(4, 12), 12))]
    assert [epoch for epoch in range(4, 12) if due[epoch - 4]] == [4, 6, 8, 10]


@pytest.mark.parametrize("start", [0.5, 2])
@pytest.mark.parametrize("unit", ["epochs", "steps"])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_training_continued_for_longer_goes_on_with_the_ramp_from_where_it_began(start, unit, resumed):
    def positions(moments, limit):
        limits = (limit, -1) if unit == "epochs" else (-1, limit)
        return [TrainingPosition(moment, moment, 0, 1, *limits) for moment in moments]

    schedule = Schedule(start, linear, every_n_epochs=0)
    walk(schedule, positions(range(4), 4))
    if resumed:
        state, schedule = json.loads(json.dumps(schedule.state_dict())), Schedule(start, linear, 0)
        schedule.load_state_dict(state)
    shares = [share for share, _ in walk(schedule, positions(range(4, 13), 12))]
    assert shares == pytest.approx([(moment - 2) / 10 for moment in range(4, 13)])


@pytest.mark.parametrize("start", [1.0, -0.1, 7.5, float("nan"), -1])
def test_a_start_out_of_its_range_is_refused(start):
    with pytest.raises(ValueError, match=f"start={start!r}: must be"):
        Schedule(start, linear)


@pytest.mark.parametrize("start", ["0.5", None, True])
def test_a_start_that_is_no_number_is_a_type_error(start):
    with pytest.raises(TypeError, match=f"start={start!r}: must be a fraction of training"):
        Schedule(start, linear)


@pytest.mark.parametrize("max_epochs", [None, -1])
def test_a_fraction_of_training_without_an_end_is_refused(max_epochs):
    with pytest.raises(
        ValueError, match=r"start=0\.25: a fraction of training needs max_epochs or max_steps"
    ):
        Schedule(0.25, constant).check(max_epochs, -1)


class Half:
    """A callable without a name of its own."""

    def __call__(self, fraction: float) -> float:
        return 0.5


@pytest.mark.parametrize("schedule", [Half(), lambda fraction: 0.5])
def test_any_schedule_that_never_changes_needs_no_end(schedule):
    schedule = Schedule(0, schedule)
    schedule.check(-1, -1)
    assert schedule.advance(TrainingPosition(3, 3, 0, 1, -1, -1)) == (0.5, True)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_ramp_without_an_end_is_refused(schedule):
    with pytest.raises(ValueError, match="schedule: a ramp to the end of training needs max_epochs"):
        Schedule(2, RAMPS[schedule]).check(-1, -1)


@pytest.mark.parametrize(
    ("schedule", "limits"),
    [
        (Schedule(2, constant), (-1, -1)),
        (Schedule(2, constant), (None, -1)),
        (Schedule(0.25, linear), (4, -1)),
        (Schedule(0.25, linear), (-1, 100)),
        (Schedule(2, linear), (None, 100)),
        (Schedule(3, linear), (4, -1)),
    ],
)
def test_settings_that_fit_the_training_pass(schedule, limits):
    schedule.check(*limits)


@pytest.mark.parametrize("max_epochs", [1, 4])
def test_a_start_after_the_end_is_late(max_epochs):
    schedule = Schedule(4, linear)
    schedule.check(max_epochs, -1)
    assert schedule.is_late


@pytest.mark.parametrize("start", [np.int64(2), np.float32(0.25), np.float64(0.25)])
def test_numbers_of_numpy_become_plain_ones(start):
    schedule = Schedule(start, linear, every_n_epochs=np.int64(1))
    schedule.advance(
        TrainingPosition(epoch=2, step=8, batch=0, batches_per_epoch=4, max_epochs=4, max_steps=-1)
    )
    entries = schedule.state_dict()
    assert {type(value) for value in (*entries.values(), *entries["began"])} == {int, bool, list}


def at_epoch(epoch):
    return TrainingPosition(epoch, 4 * epoch, 0, 4, max_epochs=40, max_steps=-1)


def test_with_another_interval_a_resumed_run_reclusters_at_once_and_keeps_its_ramp():
    before, after = Schedule(4, linear, every_n_epochs=1), Schedule(4, linear, every_n_epochs=5)
    for epoch in range(20):
        before.advance(at_epoch(epoch))
    after.load_state_dict(before.state_dict())
    due = [epoch for epoch in range(20, 31) if after.advance(at_epoch(epoch))[1]]
    assert due == [20, 25, 30]
    assert after.advance(at_epoch(31))[0] == before.advance(at_epoch(31))[0]


def test_a_run_resumed_with_0_keeps_its_clusters():
    before, after = Schedule(4, linear, every_n_epochs=1), Schedule(4, linear, every_n_epochs=0)
    for epoch in range(20):
        before.advance(at_epoch(epoch))
    after.load_state_dict(before.state_dict())
    assert not any(after.advance(at_epoch(epoch))[1] for epoch in range(20, 40))
