"""Whole fits in which gathering meets with trouble: training goes on, and says what to do."""

import pytest
import torch
from fits import At, Classifier, make_trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_dropcluster import DropCluster
from lightning_dropcluster.learning.sketch import Sketch


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )


def make_callback(**options) -> DropCluster:
    settings = {"start": 0.0, "num_samples": 16, "num_clusters": 4, "every_n_epochs": 1} | options
    return DropCluster("0", 0.5, schedule="constant", **settings)


@pytest.mark.parametrize("start", [0.0, 0.5])
def test_sketches_that_memory_never_suffices_for_are_told_in_the_first_step(loader, start):
    told, module = [], Classifier(small())
    look = At(lambda *_: told.append(any("out of memory" in str(one.message) for one in all)))
    callback = make_callback(start=start, sketch_dim=2 * 10**9)
    with (
        pytest.warns(UserWarning, match="no clusters were made and nothing was dropped"),
        pytest.warns(UserWarning, match="out of memory for gathering") as all,
    ):
        make_trainer(callback, look).fit(module, loader)
    messages = [str(one.message) for one in all if "DropCluster" in str(one.message)]
    assert len(messages) == 2
    assert "layer 'model.0': with sketch_dim=2000000000 the sketch of 'model.0' takes 57,6" in messages[0]
    assert "lower sketch_dim" in messages[0]
    assert messages[1] == "DropCluster: no clusters were made and nothing was dropped"
    assert told[0]
    assert len(module.losses) == 16


def test_memory_that_runs_out_in_a_later_window_leaves_the_labels(loader, monkeypatch):
    update, calls, labels = Sketch.update, [], []

    def run_out(self, x):
        calls.append(len(x))
        if len(calls) > 3:  # that of the trial, and the first window
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        update(self, x)

    monkeypatch.setattr(Sketch, "update", run_out)
    callback, module = make_callback(), Classifier(small())
    with pytest.warns(UserWarning, match=r"layer 'model.0': .* Tried to allocate 2.00 GiB") as all:
        make_trainer(callback, At(lambda *_: labels.append(callback.labels))).fit(module, loader)
    assert sum("out of memory" in str(one.message) for one in all) == 1
    assert len(module.losses) == 16
    assert len(calls) == 3 + 3  # each later window ends with its first batch
    assert torch.equal(labels[2]["model.0"], labels[-1]["model.0"])


@pytest.mark.parametrize("every_n_epochs", [0, 5])
def test_a_size_that_changes_for_good_in_the_first_window(loader, every_n_epochs):
    class Growing(Classifier):
        def training_step(self, batch, batch_idx):
            size = 32 if self.current_epoch < 2 else 48
            return super().training_step([F.interpolate(batch[0], size), batch[1]], batch_idx)

    callback, epochs = make_callback(num_samples=96, every_n_epochs=every_n_epochs), []
    look = At(lambda trainer, _: epochs.extend([trainer.current_epoch] if callback.labels else []))
    make_trainer(callback, look, max_epochs=9).fit(Growing(small()), loader)
    assert epochs[0] == 7  # three epochs of the new size pass, and three fill the window
    assert callback.labels["model.0"].shape == (8, 46, 46)


@pytest.mark.parametrize("scope", ["map", "channel"])
def test_audio_of_any_length_is_clustered(scope):
    layers = [nn.Conv1d(1, 8, 9, stride=2), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 4)]
    batches = [(torch.randn(8, 1, 100 + 7 * i), torch.arange(8) % 4) for i in range(20)]
    callback = make_callback(scope=scope)
    with pytest.warns(UserWarning, match="maps are resized for clustering"):
        make_trainer(callback, max_epochs=2).fit(
            Classifier(nn.Sequential(*layers)), DataLoader(batches, batch_size=None)
        )
    assert callback.labels["model.0"].shape[0] == 8


def test_a_layer_that_runs_in_few_steps_is_told_of_once(loader):
    class Now(nn.Module):
        """A net whose second conv runs in each third call."""

        def __init__(self):
            super().__init__()
            self.convs, self.head, self.calls = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in "ab"), small(), 0

        def forward(self, x):
            self.calls += 1
            x = self.convs[0](x)
            return self.head(self.convs[1](x) if self.calls % 3 == 1 else x)

    callback = DropCluster("convs.*", 0.5, start=0.0, num_samples=24, num_clusters=4, every_n_epochs=1)
    with pytest.warns(UserWarning, match="layer 'model.convs.1' ran in few of the steps") as all:
        make_trainer(callback).fit(Classifier(Now()), loader)
    assert sum("in few of the steps" in str(one.message) for one in all) == 1
