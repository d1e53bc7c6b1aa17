import json

import pytest
import torch
import yaml
from torch import nn

from benchmarks.gain.connectivity import Options, barrier, main, mix


def test_a_barrier_is_what_rises_above_the_straight_line():
    assert barrier(torch.tensor([1.0, 2.0, 3.0])) == 0.0
    assert barrier(torch.tensor([1.0, 5.0, 2.5, 4.0])) == pytest.approx(3.0)
    assert barrier(torch.tensor([3.0, 1.0, 3.0])) == 0.0


def test_ends_of_the_line_are_the_networks_and_its_middle_their_mean():
    first, second = (nn.BatchNorm1d(3).state_dict() for _ in range(2))
    second["weight"] = first["weight"] + 2.0
    assert torch.equal(mix(first, second, 0.0)["weight"], first["weight"])
    assert torch.equal(mix(first, second, 1.0)["weight"], second["weight"])
    assert torch.equal(mix(first, second, 0.5)["weight"], first["weight"] + 1.0)
    assert mix(first, second, 0.5)["num_batches_tracked"].dtype == torch.int64


def test_a_record_for_each_case(tmp_path, capsys):
    stage = tmp_path / "smaller.yaml"
    few = {"model": "test_resnet.r160_in1k", "epochs": 2, "train_samples": 100, "num_samples": 50}
    stage.write_text(yaml.safe_dump({"extends": "quick", "base": few, "validation_samples": 40}))
    main(Options(stage=str(stage), points=3))
    plain, dropped = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert [record["arguments"]["regularizer"] for record in (plain, dropped)] == ["none", "dropcluster"]
    assert len(plain["nll"]) == len(plain["accuracy"]) == 3
    assert plain["nll"][0] != plain["nll"][-1] != dropped["nll"][-1]
    for record in (plain, dropped):
        assert record["nll_barrier"] == pytest.approx(barrier(torch.tensor(record["nll"])), abs=1e-5)
        assert record["accuracy_barrier"] == pytest.approx(
            barrier(-torch.tensor(record["accuracy"])), abs=1e-5
        )


@pytest.mark.parametrize(("name", "least"), [("seeds", 1), ("points", 3)])
def test_bad_options(name, least):
    with pytest.raises(ValueError, match=f"{name} must be at least {least}, got {least - 1}"):
        Options(**{name: least - 1})
