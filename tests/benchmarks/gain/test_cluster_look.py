import json

import pytest
import torch

from benchmarks.gain.cluster_look import Options, Recording, draw, look, main
from lightning_dropcluster import FaissKMeans


def test_a_perfect_clustering_explains_everything():
    labels = torch.tensor([[0, 0, 1, 1, 0, 0, 1, 1]])
    profiles = torch.eye(3)[labels]
    found = look("learned", profiles, labels, (2, 4), last=labels)
    assert (found.correlation, found.connected, found.agreement) == (1.0, 1.0, 1.0)
    assert found.spread == pytest.approx(0.5**0.5)  # half a pixel along each axis
    one = look("one", profiles, torch.zeros_like(labels), (2, 4), last=None)
    assert one.correlation == pytest.approx(0.5)  # the mean of two orthogonal profiles
    assert one.agreement is None


def test_a_cluster_in_two_pieces_counts_as_one():
    labels = torch.tensor([[0, 1, 2, 0]])
    assert look("learned", torch.rand(1, 4, 2), labels, (2, 2), None).connected == pytest.approx(2 / 3)


def test_what_is_recorded_is_what_was_found():
    profiles = torch.nn.functional.normalize(
        torch.randn(3, 16, 4, generator=torch.Generator().manual_seed(0)), dim=2
    )
    recording = Recording(FaissKMeans())
    recording.fit(profiles[:, :4], 2, grid=(2, 2))  # another shape: forgotten
    first = recording.fit(profiles, 4, grid=(4, 4))
    assert torch.equal(first, FaissKMeans().fit(profiles, 4, grid=(4, 4)))
    recording.fit(profiles, 4, first, grid=(4, 4))
    assert [[each.kind for each in looks] for looks in recording.looks] == [
        ["learned", "random start", "shuffled", "blocks"]
    ] * 2
    learned, afresh, shuffled, blocks = recording.looks[1]
    assert min(learned.correlation, afresh.correlation) > max(shuffled.correlation, blocks.correlation)
    assert blocks.agreement == 1.0
    assert len(draw(recording.looks).axes) == 4


def test_the_script_writes_a_record_and_a_picture(tmp_path, capsys):
    plot = tmp_path / "new" / "look.png"
    main(Options(layer="layer1.0.conv1", plot=str(plot), out=str(tmp_path / "look.jsonl")))
    record = json.loads(capsys.readouterr().out)
    assert len(record["looks"]) == 2
    assert record["arguments"]["layers"] == "layer1.0.conv1"
    assert record["looks"][0][0]["agreement"] is None
    assert plot.read_bytes().startswith(b"\x89PNG")
