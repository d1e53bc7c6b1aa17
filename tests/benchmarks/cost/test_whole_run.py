import json

import pytest

from benchmarks.cost.whole_run import Options, main, split


def test_the_split_adds_up_to_the_whole():
    seconds = {"none": [9.0, 10.0, 30.0], "dropping only": [10.2] * 3, "dropcluster": [11.0] * 3}
    found = split(seconds, 0.5)
    assert found == {"ratio": 1.1, "dropping": 0.02, "clustering": 0.05, "gathering": 0.03}


def test_the_script_writes_a_record(capsys):
    main(Options(quick=True))
    record = json.loads(capsys.readouterr().out)
    assert {name: len(values) for name, values in record["seconds"].items()} == {
        "none": 1,
        "dropcluster": 1,
        "dropping only": 1,
    }
    assert record["clustering"] > 0


def test_bad_options():
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        Options(repeats=0)
