"""The benchmark of turns tells steps that drop from others; what it measures is not a test's business."""

import json

import pytest

from benchmarks.cost import turns
from benchmarks.cost.timing import Took


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


def test_no_step_counts_as_plain_that_comes_right_after_one_that_drops():
    steps = turns.steps_of(turns.Settings(pairs=30))
    made = turns.Turns(steps, None)
    made.moments = [Took(step * (step - 1) // 2, 0) for step in range(steps + 1)]  # each takes its number
    pairs = [(on.seconds, off.seconds) for on, off in made.pairs()]
    assert 25 <= len(pairs) <= 35
    assert all(made.drops(on) and not made.drops(off) and not made.drops(off - 1) for on, off in pairs)
    assert 0.3 < sum(on < off for on, off in pairs) / len(pairs) < 0.7
