"""Clusterers and regularisers of one's own, written as a third party would: no base class, no registry."""

import importlib
import sys

import pytest
import torch
from fits import Classifier, make_loader, make_trainer
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_dropcluster import Clusterer, DropCluster, StructuredDropout

CLUSTERER = '''
import torch


class Stripes:
    """Cut each map into stripes of equal height, whatever its features respond to."""

    def fit(self, profiles, num_clusters, init_labels=None, grid=None):
        problems, items, _ = profiles.shape
        stripes = torch.arange(items, device=profiles.device) * num_clusters // items
        return stripes.expand(problems, items)
'''

REGULARIZER = '''
import torch
from torch import nn


class DropRows(nn.Module):
    """Drop whole rows of the maps, and keep the mean."""

    def __init__(self, drop_prob=0.1):
        super().__init__()
        self.set_drop_prob(drop_prob)

    def set_drop_prob(self, drop_prob):
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training or not self.drop_prob:
            return x
        keep = torch.rand(len(x), 1, x.shape[2], 1, device=x.device) >= self.drop_prob
        return x * keep / (1 - self.drop_prob)
'''


@pytest.fixture
def third_party(tmp_path, monkeypatch):
    """A function that writes a module of someone else's and imports it."""

    def write(source):
        assert len(source.strip().splitlines()) < 20
        assert "lightning_dropcluster" not in source
        (tmp_path / "third_party.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "third_party", raising=False)
        importlib.invalidate_caches()
        return importlib.import_module("third_party")

    return write


def test_a_clusterer_of_ones_own(third_party, tmp_path):
    clusterer = third_party(CLUSTERER).Stripes()
    assert isinstance(clusterer, Clusterer)
    settings = {"num_clusters": 4, "start": 0.0, "num_samples": 8, "drop_prob": 0.3}
    callback = DropCluster("conv1", clusterer=clusterer, **settings)
    saver = ModelCheckpoint(tmp_path / "run", filename="last")
    trainer = make_trainer(callback, saver, max_epochs=1, enable_checkpointing=True)
    trainer.fit(Classifier(), make_loader())
    stripes = torch.arange(4).repeat_interleave(4)[:, None].expand(16, 16)
    assert (callback.labels["model.conv1"] == stripes).all()
    later = DropCluster(
        "conv1", initial_labels=tmp_path / "run" / "last.ckpt", clusterer=clusterer, **settings
    )
    make_trainer(later, max_epochs=1).fit(Classifier(), make_loader())
    assert later.labels["model.conv1"].equal(callback.labels["model.conv1"])


def test_a_regulariser_of_ones_own(third_party):
    rows = third_party(REGULARIZER).DropRows
    module = Classifier()
    seen = []

    def look(_module, _inputs, output):
        if module.training:
            seen.append(output.detach())

    handle = module.model.bn1.register_forward_pre_hook(lambda m, inputs: look(m, None, inputs[0]))
    options = {"schedule": "constant", "clean_statistics": False}
    make_trainer(StructuredDropout("conv1", rows, 0.5, **options), max_epochs=1).fit(module, make_loader())
    handle.remove()
    dropped = torch.cat(seen).abs().amax(dim=(1, 3)) == 0  # (N, rows)
    assert 0.4 < dropped.float().mean() < 0.6
    assert not any(name.startswith("structured_dropout") for name, _ in module.model.conv1.named_children())
