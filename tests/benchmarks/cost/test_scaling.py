"""The scaling benchmark runs, and finds the laws that hold by construction."""

import json

import pytest

from benchmarks.cost import scaling

SMALL = scaling.Settings(quick=True, repeats=1, side=8)


def test_each_quantity_has_a_law():
    laws = {record["over"]: record for record in scaling.growth(SMALL) if record["benchmark"] == "law"}
    assert {*laws} == {"maps", "features of a map", "samples", "clusters", "layers"}
    assert laws["maps"]["bytes"] == pytest.approx(1.0, abs=0.01)
    assert laws["samples"]["bytes"] == laws["clusters"]["bytes"] == 0.0


@pytest.mark.long  # three processes import all of torch
def test_ranks_are_measured_too(capsys):
    scaling.main(SMALL)
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    measured = [record for record in records if record["over"] == "ranks" and "value" in record]
    assert [record["value"] for record in measured] == [1, 2]


def test_exponents_are_fitted_on_logarithms():
    rows = [{"value": value, "cost": 3.0 * value**1.5} for value in (1, 2, 8)]
    assert scaling.exponent(rows, "cost") == 1.5
