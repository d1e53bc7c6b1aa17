"""The cluster learner by itself: its phases, and the one place where labels are."""

import copy

import pytest
import torch
from torch import nn

from lightning_dropcluster.clustering import TorchKMeans
from lightning_dropcluster.learning.clusters import Clusters
from lightning_dropcluster.learning.learner import ClusterLearner
from lightning_dropcluster.learning.scopes import Grouping
from lightning_dropcluster.learning.sketch import SketchSettings


class Broken(TorchKMeans):
    def fit(self, profiles, num_clusters, init_labels=None, grid=None):
        raise KeyboardInterrupt


def make_learner(clusterer=None):
    """Return a learner hooked to a layer, and the layer."""
    layer = nn.Conv2d(3, 4, 3).train()
    learner = ClusterLearner(
        Grouping(num_clusters=3), clusterer or TorchKMeans(), SketchSettings(num_samples=16)
    )
    learner.attach({"conv": layer}, torch.device("cpu"))
    return learner, layer


def step(learner, layer, seed=0):
    learner.begin_step(0.5)
    layer(torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed)))
    return learner.end_step()


def learn(learner, layer):
    learner.open_window()
    while not step(learner, layer):
        pass


def test_the_phases_follow_one_another():
    learner, layer = make_learner()
    phases = [learner.phase]
    learner.open_window()
    for seed in range(4):
        phases.append(learner.phase)
        step(learner, layer, seed)
    assert phases == ["idle", "gathering", "gathering", "gathering", "idle"]
    assert not learner.labels_pending


def test_labels_that_were_interrupted_are_pending_until_another_window_is_full():
    learner, layer = make_learner(Broken())
    learner.open_window()
    with pytest.raises(KeyboardInterrupt):
        learn(learner, layer)
    assert learner.phase == "full"
    learner.detach()
    learner.clusterer = TorchKMeans()
    learner.attach({"conv": layer}, torch.device("cpu"))
    assert learner.window is not None
    learn(learner, layer)
    assert (learner.phase, learner.windows_opened, [*learner.clusters]) == ("idle", 1, ["conv"])


def test_labels_are_held_once_and_what_is_given_out_stays_as_it_is():
    learner, layer = make_learner()
    learn(learner, layer)
    clusters, drop = learner.clusters["conv"], learner.hooks["conv"].regularizer
    assert clusters.table.data_ptr() == drop.labels.data_ptr()
    given = [clusters.labels, learner.state_dict()["clusters"]["conv"]["table"], clusters.copy().table]
    before = copy.deepcopy(given)
    drop.labels.zero_()
    assert all(torch.equal(now, then) for now, then in zip(given, before, strict=True))


def test_new_labels_are_written_in_place():
    learner, layer = make_learner()
    learn(learner, layer)
    place = learner.clusters["conv"].table.data_ptr()
    learn(learner, layer)
    assert learner.clusters["conv"].table.data_ptr() == place


def test_labels_from_outside_are_copied():
    learner, layer = make_learner()
    mine = Clusters(torch.zeros(4, 6, 6, dtype=torch.uint8), (4, 6, 6))
    learner.reset({"conv": mine})
    learner.attach({"conv": layer}, torch.device("cpu"))
    learn(learner, layer)
    assert not mine.table.any()
    assert learner.clusters["conv"].table.any()
