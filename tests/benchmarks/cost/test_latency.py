"""The latency benchmark runs; what it measures is not a test's business."""

import json

import pytest

from benchmarks.cost import latency


@pytest.mark.filterwarnings("ignore:DropCluster")  # tiny maps have few distinct profiles
def test_it_writes_a_line_for_each_case(capsys, monkeypatch):
    monkeypatch.setattr(latency, "MODELS", (("test_resnet", "layer*.*.conv2"),))
    monkeypatch.setattr(latency, "SHAPES", ((2, 8, 8, 8),))
    latency.main(latency.Settings(quick=True, repeats=2, batch_size=2, size=32))
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    steps = {record["case"] for record in records if record["benchmark"] == "step"}
    assert {"no callback", "DropCluster", "DropCluster, gathering", "naive x * mask * scale"} <= steps
    formats = {record["memory_format"] for record in records if record["benchmark"] == "op"}
    assert formats == {"contiguous_format", "channels_last"}
    assert all(record["median_ms"] > 0 and record["commit"] for record in records)
