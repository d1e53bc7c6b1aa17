"""The scaling benchmark runs, and finds the laws that hold by construction."""

import json

import pytest

from benchmarks.cost import scaling


def test_it_writes_a_line_for_each_value_and_a_law_for_each_quantity(capsys):
    scaling.main(scaling.Settings(quick=True, repeats=1, side=8))
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    laws = {record["over"]: record for record in records if record["benchmark"] == "law"}
    assert {*laws} == {"maps", "features of a map", "samples", "clusters", "layers", "ranks"}
    assert laws["maps"]["bytes"] == pytest.approx(1.0, abs=0.01)
    assert laws["samples"]["bytes"] == laws["clusters"]["bytes"] == 0.0
    ranks = [record["value"] for record in records if record["over"] == "ranks" and "value" in record]
    assert ranks == [1, 2]


def test_exponents_are_fitted_on_logarithms():
    rows = [{"value": value, "cost": 3.0 * value**1.5} for value in (1, 2, 8)]
    assert scaling.exponent(rows, "cost") == 1.5
