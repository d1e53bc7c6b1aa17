"""Schedules: closures from fraction to fraction, and the grid of due moments."""

import functools
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_dropcluster.callbacks.ramps import (
    RAMPS,
    constant,
    cosine,
    intervals_passed,
    linear,
    make_ramp,
    stretched,
)

FRACTIONS = st.floats(0.0, 1.0)
NAMES = st.sampled_from(sorted(RAMPS))
relaxed = settings(deadline=None)


@relaxed
@given(NAMES, FRACTIONS)
def test_every_schedule_stays_in_the_unit_interval(name, fraction):
    assert 0.0 <= make_ramp(name)(fraction) <= 1.0


@relaxed
@given(NAMES, FRACTIONS, FRACTIONS)
def test_every_schedule_never_falls(name, first, second):
    assert make_ramp(name)(min(first, second)) <= make_ramp(name)(max(first, second))


@pytest.mark.parametrize("name", RAMPS)
def test_every_schedule_ends_at_one(name):
    assert make_ramp(name)(1.0) == 1.0


@relaxed
@given(FRACTIONS)
def test_linear_is_the_identity_and_constant_is_one(fraction):
    assert (linear(fraction), constant(fraction)) == (fraction, 1.0)


@relaxed
@given(FRACTIONS)
def test_cosine_is_symmetric_about_the_middle(fraction):
    assert cosine(fraction) + cosine(1.0 - fraction) == pytest.approx(1.0)


def test_cosine_is_flat_at_both_ends_and_steepest_in_the_middle():
    steps = [cosine((n + 1) / 10) - cosine(n / 10) for n in range(10)]
    assert steps[0] < 0.03
    assert steps[-1] < 0.03
    assert max(steps) == pytest.approx(steps[4])


@relaxed
@given(NAMES, FRACTIONS, FRACTIONS)
def test_a_ramp_is_zero_before_its_start_and_in_the_unit_interval_after(name, start, fraction):
    value = stretched(make_ramp(name), start)(fraction)
    assert value == 0.0 if fraction < start else 0.0 <= value <= 1.0


@relaxed
@given(NAMES, FRACTIONS, FRACTIONS, FRACTIONS)
def test_a_ramp_never_falls(name, start, first, second):
    value = stretched(make_ramp(name), start)
    assert value(min(first, second)) <= value(max(first, second))


@relaxed
@given(NAMES, FRACTIONS)
@example("linear", 1.0)
def test_a_ramp_ends_at_one(name, start):
    assert stretched(make_ramp(name), start)(1.0) == 1.0


@relaxed
@given(st.floats(0.0, 0.99), FRACTIONS)
def test_a_linear_ramp_is_the_straight_line_from_start_to_end(start, part):
    assert stretched(linear, start)(start + part * (1.0 - start)) == pytest.approx(part, abs=1e-6)


@relaxed
@given(NAMES, FRACTIONS)
def test_a_ramp_from_zero_is_the_schedule(name, fraction):
    assert stretched(make_ramp(name), 0.0)(fraction) == make_ramp(name)(fraction)


@pytest.mark.parametrize(
    "schedule", [lambda fraction: fraction**2, functools.partial(pow, 0.5), lambda fraction: 1]
)
def test_a_callable_is_taken_as_it_is(schedule):
    assert make_ramp(schedule) is schedule


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), None, "1"])
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_a_callable_that_leaves_the_unit_interval_is_refused(where, value):
    with pytest.raises(ValueError, match=re.escape(f"but {where} gave {value!r}")):
        make_ramp(lambda fraction: value if fraction == where else fraction)


def test_an_unknown_name_lists_the_names():
    with pytest.raises(ValueError, match="schedule='step': must be a callable or one of linear, cosine, con"):
        make_ramp("step")


@pytest.mark.parametrize("schedule", [0.5, ["linear"]])
def test_what_is_neither_name_nor_callable_is_a_type_error(schedule):
    with pytest.raises(TypeError, match=f"give a name or a callable, not {type(schedule).__name__}"):
        make_ramp(schedule)


@relaxed
@given(st.integers(0, 60), st.integers(0, 30), st.integers(0, 9))
def test_intervals_passed_counts_the_grid_points_up_to_now(position, origin, every):
    grid = range(origin, position + 1, every) if every else range(origin, min(position, origin) + 1)
    assert intervals_passed(position, origin, every) == len(grid)
