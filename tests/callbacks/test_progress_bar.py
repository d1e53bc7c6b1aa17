"""The line that says how long a reclustering takes, in bars of rich and tqdm."""

import io
import re
import time

import pytest
from fits import Classifier, make_loader, make_trainer
from pytorch_lightning.callbacks import RichProgressBar, TQDMProgressBar

from lightning_dropcluster import DropCluster, TorchKMeans
from lightning_dropcluster.callbacks import progress_bar
from lightning_dropcluster.callbacks.progress_bar import WaitingLine


class Slow(TorchKMeans):
    """Takes a while for each layer."""

    def fit(self, profiles, num_clusters, init_labels=None, grid=None):
        if profiles.shape[1] > 12:  # not for the trial at the start
            time.sleep(0.3)
        return super().fit(profiles, num_clusters, init_labels, grid)


def fit(bar, monkeypatch, delay=0.02, **options):
    """Fit with a bar, and return the lines that were written to it."""
    written = []
    monkeypatch.setattr(WaitingLine.__init__, "__defaults__", (delay, 0.05))
    for kind in (progress_bar._RichLine, progress_bar._TqdmLine):
        write = kind.write

        def spy(self, text, share, write=write):
            written.append((text, share))
            return write(self, text, share)

        monkeypatch.setattr(kind, "write", spy)
    callback = DropCluster(
        ["conv1", "layer1.0.conv2"], start=0.0, every_n_epochs=1, num_samples=8, clusterer=Slow(), **options
    )
    trainer = make_trainer(callback, *([bar] if bar else []), max_epochs=2, enable_progress_bar=bool(bar))
    trainer.fit(Classifier(), make_loader())
    return written


@pytest.mark.parametrize("kind", [RichProgressBar, TQDMProgressBar])
def test_a_long_reclustering_says_layer_and_time_left(kind, monkeypatch, capsys):
    written = fit(kind(), monkeypatch)
    texts = [text for text, _ in written]
    assert texts[0] == "Reclustering model.conv1"  # nothing to judge by yet
    assert any(re.fullmatch(r"Reclustering model.layer1.0.conv2, about \d+ s left", text) for text in texts)
    again = texts[len(texts) - texts[::-1].index("Reclustering model.conv1, about 1 s left") - 1 :]
    assert again, "the second time is judged by the first"
    assert all(0.0 <= share < 1.0 for _, share in written)
    if kind is TQDMProgressBar:  # rich writes nothing but the end where there is no terminal
        assert "Reclustering model.conv1, about 1 s left |" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [RichProgressBar, TQDMProgressBar])
def test_a_short_one_says_nothing(kind, monkeypatch, capsys):
    assert fit(kind(), monkeypatch, delay=30.0) == []
    out = capsys.readouterr()
    assert "Reclustering" not in out.out + out.err


@pytest.mark.parametrize("bar", [None, RichProgressBar(refresh_rate=0), TQDMProgressBar(refresh_rate=0)])
def test_silent_where_the_bar_is_off(bar, monkeypatch):
    assert fit(bar, monkeypatch) == []


def test_the_bars_own_tasks_stay_where_they_are(monkeypatch):
    """Lightning takes a task's id for its position, so no task may be taken out of the list."""
    bar = RichProgressBar()
    fit(bar, monkeypatch)
    assert [task.id for task in bar.progress.tasks] == list(range(len(bar.progress.tasks)))
    ours = [task for task in bar.progress.tasks if "Reclustering" in task.description]
    assert len(ours) == 1
    assert not ours[0].visible


class Faulty:
    is_enabled = True

    @property
    def progress(self):
        raise OSError("no terminal")


@pytest.mark.parametrize("bar", [Faulty(), object(), io.StringIO()])
def test_other_bars_and_faulty_ones_do_no_harm(bar):
    line = WaitingLine(bar, delay=0.0, pause=0.01)
    for _ in range(2):
        with line as note:
            note("conv1", 0.5)
            time.sleep(0.05)


def test_errors_pass_and_the_thread_ends():
    line = WaitingLine(None)
    with pytest.raises(KeyError), line:
        raise KeyError("x")
    assert line._thread is None
