"""Checks of arguments: what passes, and what the errors say."""

import math
import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dropcluster.checks import check_bool, check_choice, check_not_both, check_number

NUMBERS = st.floats() | st.integers(-5, 5)
BOUNDS = st.integers(-3, 3)
relaxed = settings(deadline=None)


def accepted(*args, **options) -> bool:
    try:
        check_number("x", *args, **options)
    except ValueError:
        return False
    return True


@relaxed
@given(NUMBERS, BOUNDS, BOUNDS | st.just(math.inf), st.booleans())
def test_a_number_passes_exactly_where_it_is_finite_and_in_the_range(value, low, high, high_open):
    inside = low <= value <= high and math.isfinite(value)
    on_edge = high_open and value == high
    assert accepted(value, low, high, high_open=high_open) == (inside and not on_edge)


@relaxed
@given(st.integers(-5, 5), BOUNDS)
def test_integers_are_held_to_the_same_range(value, low):
    assert accepted(value, low, integer=True) == (value >= low)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"low": 0}, "a number of at least 0"),
        ({"low": 1, "integer": True}, "an integer of at least 1"),
        ({"low": 0, "high": 1}, "a number in [0, 1]"),
        ({"low": 0, "high": 1, "high_open": True}, "a number in [0, 1)"),
    ],
)
def test_the_error_names_argument_value_and_rule(options, rule):
    with pytest.raises(ValueError, match=re.escape(f"drop_prob=-2: must be {rule}") + "$"):
        check_number("drop_prob", -2, **options)


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), np.int64(1), Fraction(1, 2)])
def test_numbers_of_other_libraries_pass(value):
    check_number("x", value, 0, 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused(value):
    with pytest.raises(ValueError, match=f"x={value!r}"):
        check_number("x", value, -10)


@pytest.mark.parametrize("value", ["1", None, True, 1j, [1]])
def test_what_is_no_number_is_a_type_error(value):
    with pytest.raises(
        TypeError, match=rf"x={re.escape(repr(value))}: must be .*, not {type(value).__name__}"
    ):
        check_number("x", value, 0)


@pytest.mark.parametrize("value", [1.0, False, "1", None])
def test_what_is_no_integer_is_a_type_error(value):
    with pytest.raises(TypeError, match=f"must be an integer of at least 0, not {type(value).__name__}"):
        check_number("x", value, 0, integer=True)


def test_a_choice_passes():
    check_choice("scope", "map", {"map": 1, "layer": 2})


@pytest.mark.parametrize("value", ["maps", "", None, 3, ["map"]])
@pytest.mark.parametrize("choices", [("map", "layer"), {"map": 1, "layer": 2}])
def test_an_unknown_choice_lists_the_choices(value, choices):
    with pytest.raises(ValueError, match=re.escape(f"scope={value!r}: must be one of map, layer")):
        check_choice("scope", value, choices)


@pytest.mark.parametrize("value", [True, False])
def test_a_bool_passes(value):
    check_bool("per_sample", value)


@pytest.mark.parametrize("value", [0, 1, None, "True"])
def test_what_is_no_bool_is_a_type_error(value):
    with pytest.raises(TypeError, match=f"per_sample={value!r}: must be True or False"):
        check_bool("per_sample", value)


@pytest.mark.parametrize("pair", [(None, None), (0, None), (None, 0)])
def test_at_most_one_of_two_passes(pair):
    check_not_both("a", pair[0], "b", pair[1])


@pytest.mark.parametrize("pair", [(0, 0), (1, 2), (False, "x")])
def test_both_of_two_is_an_error_even_where_they_are_falsy(pair):
    with pytest.raises(ValueError, match=re.escape(f"a={pair[0]!r} and b={pair[1]!r}: give one")):
        check_not_both("a", pair[0], "b", pair[1])
