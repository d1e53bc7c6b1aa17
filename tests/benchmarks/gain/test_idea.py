import pytest
import torch

from benchmarks.gain.idea import DROP_PROB, draw_hidden, main
from lightning_dropcluster import ClusterDrop, DropBlock, Dropout

LABELS = torch.arange(24).repeat_interleave(24).reshape(24, 24)


@pytest.mark.parametrize("method", [Dropout, DropBlock, lambda p: ClusterDrop(LABELS[None], p)])
def test_each_method_hides_about_the_same_share(method):
    torch.manual_seed(0)
    assert abs(draw_hidden(method(DROP_PROB), LABELS.shape).float().mean() - DROP_PROB) < 0.05


def test_clusters_are_hidden_whole():
    hidden = draw_hidden(ClusterDrop(LABELS[None], DROP_PROB), LABELS.shape)
    assert torch.equal(hidden.any(1), hidden.all(1))


def test_the_picture_is_drawn_from_learned_clusters(tmp_path, capsys):
    main(str(tmp_path / "new" / "idea.png"), crops=8, epochs=2)
    assert (tmp_path / "new" / "idea.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.endswith("idea.png\n")
