"""The benchmark of turns tells steps that drop from others; what it measures is not a test's business."""

import json

import pytest

from benchmarks.cost import turns


@pytest.mark.filterwarnings("ignore:DropCluster")  # tiny maps have few distinct profiles
def test_it_compares_steps_that_drop_with_their_neighbours(capsys, monkeypatch):
    seen = []
    note = turns.Turns.on_train_batch_start

    def note_too(self, *args):
        note(self, *args)
        if args:
            seen.append(args[0].callbacks[-1].drop_prob_now)  # of the step before

    monkeypatch.setattr(turns.Turns, "on_train_batch_start", note_too)
    settings = turns.Settings("resnet10t", "conv1.0", pairs=4, batch_size=2, size=32)
    turns.main(settings)
    record = json.loads(capsys.readouterr().out)
    assert record["pairs"] >= 2
    assert record["seconds"]["ratio"] > 0 < record["cpu_seconds"]["ratio"]
    drops = turns.Turns(turns.steps_of(settings), None).drops
    assert all(
        (seen[step + 1] > 0) == drops(step) for step in range(turns.WARM_UP, turns.steps_of(settings) - 1)
    )
