"""The benchmark of small windows runs, and counts what it gathers."""

import json

import pytest

from benchmarks.cost import stepwise


@pytest.mark.filterwarnings("ignore:DropCluster")  # 64 samples have few distinct profiles
def test_it_writes_a_line_for_each_case(capsys):
    settings = stepwise.Settings(
        model="test_resnet.r160_in1k", train_samples=128, epochs=1, samples=64, small_samples=16, steps=1
    )
    stepwise.main(settings)
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {"large", "small, momentum 0.0", "small, momentum 0.5"} <= {r["case"] for r in records}
    assert records[0]["samples_gathered"] == 64
    for record in records:
        assert record["inertia_ratio"] > 0.5
        assert -0.1 < record["agreement"] <= 1.0
