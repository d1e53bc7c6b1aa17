"""The memory benchmark runs, and what it counts is in proportion."""

import json

import pytest
import torch

from benchmarks.cost import memory
from benchmarks.cost.peak import LiveMemory


@pytest.mark.filterwarnings("ignore:DropCluster")  # tiny maps have few distinct profiles
def test_it_writes_a_line_for_each_case(capsys):
    memory.main(memory.Settings(quick=True))
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    by_case = {record["case"]: record for record in records}
    assert {"labels and sizes", "saved for backward", "open sketch"} <= by_case.keys()
    assert 0 < by_case["saved for backward"]["ratio"] < 1
    assert 0.1 < by_case["gathering, peak"]["ratio"] < by_case["gathering, peak"]["goal"]
    samples = {record["bytes"] for record in records if "samples" in record}
    assert len(samples) == 1


def test_shared_memory_counts_once():
    x = torch.randn(1000, requires_grad=True)
    assert memory.saved_bytes(lambda: (x.square() + x[:10].square().sum()).sum().backward()) == 4000


def test_live_memory_is_what_is_held_at_a_time():
    x = torch.ones(1000)
    with LiveMemory() as live:
        for _ in range(3):
            y = x + 1
            z = y.view(10, 100).mul_(2) * 3
            del y, z
    assert live.peak == 8000
