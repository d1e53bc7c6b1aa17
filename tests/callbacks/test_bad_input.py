"""Whatever a user can get wrong ends in an error that names the argument, the value and the rule."""

import copy
import re
from contextlib import nullcontext

import pytest
import torch
from fits import Classifier, case_id, count_hooks, make_loader, make_trainer
from sklearn.cluster import KMeans
from torch import nn

from lightning_dropcluster import (
    AdvancedDropout,
    ClusterDrop,
    DropCluster,
    FaissKMeans,
    plot_clusters,
    plot_history,
    plot_overlay,
    preview,
    select_layers,
)
from lightning_dropcluster.layers.selection import find_layers

NAN, INF = float("nan"), float("inf")
LABELS = torch.zeros(2, 4, 4).long()


class NoFit:
    def __repr__(self):
        return "NoFit()"


class Returns:
    """A clusterer that returns what it was given."""

    def __init__(self, make):
        self.make = make

    def fit(self, profiles, num_clusters, init_labels=None, grid=None):
        return self.make(profiles, num_clusters)


class OnlyCold:
    """A clusterer that fails later: at its first warm start."""

    def fit(self, profiles, num_clusters, init_labels=None, grid=None):
        if init_labels is not None:
            raise RuntimeError("cannot start from labels")
        return torch.zeros(profiles.shape[:2], dtype=torch.int64)


class OnlyUnitLengths:
    """A clusterer that no positions may be appended for."""

    def fit(self, profiles, num_clusters, init_labels=None, grid=None):
        torch.testing.assert_close(profiles.norm(dim=2), torch.ones(profiles.shape[:2]))
        return torch.zeros(profiles.shape[:2], dtype=torch.int64)


# What is passed, the exception, and what its message says: the argument with the value, and the rule.
ARGUMENTS = [
    ({"layers": ""}, ValueError, "layers=''", "must not be empty"),
    ({"layers": "re:"}, ValueError, "layers='re:'", "must not be empty"),
    ({"layers": []}, ValueError, "layers=[]", "at least one pattern"),
    ({"layers": ["conv1", 3]}, TypeError, "layers=3", "a string or a callable"),
    ({"layers": None, "layer_types": nn.ReLU}, ValueError, "layer_types=<class", "needs layers"),
    ({"layers": nn.Conv2d}, TypeError, "layers=<class", "a string or a callable"),
    ({"layers": "re:("}, ValueError, "layers='re:('", "regular expression"),
    ({"layers": "conv[2-1]"}, ValueError, "layers='conv[2-1]'", "glob"),
    ({"layer_types": []}, ValueError, "layer_types=[]", "at least one type"),
    ({"layer_types": [int]}, TypeError, "layer_types=[<class 'int'>]", "subclass of torch.nn.Module"),
    ({"drop_prob": 1.0}, ValueError, "drop_prob=1.0", "in [0, 1)"),
    ({"drop_prob": -0.1}, ValueError, "drop_prob=-0.1", "in [0, 1)"),
    ({"drop_prob": NAN}, ValueError, "drop_prob=nan", "in [0, 1)"),
    ({"drop_prob": "0.1"}, TypeError, "drop_prob='0.1'", "a number in [0, 1)"),
    ({"drop_prob": True}, TypeError, "drop_prob=True", "a number in [0, 1)"),
    ({"num_clusters": 4, "cluster_size": 8}, ValueError, "num_clusters=4", "cluster_size=8", "not both"),
    ({"num_clusters": 0}, ValueError, "num_clusters=0", "an integer in [1, "),
    ({"num_clusters": 2.5}, TypeError, "num_clusters=2.5", "an integer in [1, "),
    ({"num_clusters": 5000, "scope": "layer"}, ValueError, "num_clusters=5000", "in [1, 4096]"),
    ({"num_clusters": 2**40}, ValueError, "num_clusters=1099511627776", "in [1, "),
    ({"cluster_size": 0.5}, ValueError, "cluster_size=0.5", "at least 1"),
    ({"cluster_size": INF}, ValueError, "cluster_size=inf", "at least 1"),
    ({"scope": "maps"}, ValueError, "scope='maps'", "one of map, position, layer, channel"),
    ({"schedule": "stepwise"}, ValueError, "schedule='stepwise'", "one of linear, cosine, constant"),
    ({"schedule": 0.5}, TypeError, "schedule=0.5", "a name or a callable"),
    ({"schedule": lambda fraction: 2.0}, ValueError, "schedule=<function", "map [0, 1] to [0, 1]"),
    ({"schedule": lambda f: 1.5 if 0.2 < f < 0.3 else f}, ValueError, "schedule=<", "but 0.21 gave 1.5"),
    ({"schedule": lambda f, g: f}, ValueError, "schedule=<function", "calling it with 0.0 failed"),
    ({"start": 1.0}, ValueError, "start=1.0", "in [0, 1)"),
    ({"start": -1}, ValueError, "start=-1", "in [0, 1), as a float", "of at least 0, as an integer"),
    ({"start": 5.0}, ValueError, "start=5.0", "in [0, 1), as a float", "of at least 0, as an integer"),
    ({"start": NAN}, ValueError, "start=nan", "in [0, 1)"),
    ({"start": "half"}, TypeError, "start='half'", "in [0, 1), as a float", "as an integer"),
    ({"every_n_epochs": 2, "every_n_train_steps": 9}, ValueError, "every_n_epochs=2", "9", "not both"),
    ({"every_n_epochs": -1}, ValueError, "every_n_epochs=-1", "at least 0"),
    ({"every_n_train_steps": 1.5}, TypeError, "every_n_train_steps=1.5", "an integer of at least 0"),
    ({"num_samples": 0}, ValueError, "num_samples=0", "in [1, 2147483647]"),
    ({"sketch_dim": 0}, ValueError, "sketch_dim=0", "in [1, 2147483647]"),
    ({"sketch_dim": 64.0}, TypeError, "sketch_dim=64.0", "an integer"),
    ({"sketch_momentum": 1.0}, ValueError, "sketch_momentum=1.0", "a number in [0, 1)"),
    ({"sketch_momentum": None}, TypeError, "sketch_momentum=None", "a number in [0, 1)"),
    ({"clusterer": NoFit()}, TypeError, "clusterer=NoFit()", "must be an object with a method fit"),
    ({"clusterer": FaissKMeans}, TypeError, "clusterer=<class", "must be an object with a method fit"),
    ({"clusterer": KMeans()}, TypeError, "clusterer=KMeans()", "must be an object with a method fit"),
    ({"per_sample": 1}, TypeError, "per_sample=1", "True or False"),
    ({"paired": 1}, TypeError, "paired=1", "True or False"),
    (
        {"paired": True, "per_sample": False},
        ValueError,
        "paired=True",
        "per_sample=True, got per_sample=False",
    ),
    ({"fill": "median"}, ValueError, "fill='median'", "one of zero, mean"),
    ({"rescale": "sum"}, ValueError, "rescale='sum'", "one of batch, expected"),
    ({"position_weight": 1.0, "scope": "channel"}, ValueError, "position_weight=1.0", "must be 0 with scope"),
    ({"position_weight": -0.5}, ValueError, "position_weight=-0.5", "in [0, 1000000.0]"),
    ({"seed": -1}, ValueError, "seed=-1", "in [0, 2147483647]"),
    ({"initial_labels": 7}, TypeError, "initial_labels=7", "a mapping of layer names to labels, or the path"),
    ({"initial_labels": {"a": torch.full((2, 4), 0.5)}}, TypeError, "initial_labels: ", "'a'", "an integer"),
    ({"initial_labels": {"a": torch.full((2, 4), 4)}}, ValueError, "layer 'a'", "[4, 4]", "in [0, 4)"),
    ({"initial_labels": {"a": torch.full((2, 4), -1)}}, ValueError, "layer 'a'", "in [0, 4)"),
    ({"initial_labels": "no/such.ckpt"}, FileNotFoundError, "initial_labels='no/such.ckpt'", ""),
]


@pytest.mark.parametrize("case", ARGUMENTS, ids=lambda case: case_id(case[0]))
def test_arguments(case):
    options, error, *parts = case
    with pytest.raises(error) as caught:
        DropCluster(**({"layers": "conv1"} | options))
    assert all(part in str(caught.value) for part in parts), str(caught.value)


class TwoHeads(Classifier):
    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(self.model)


class Tuples(Classifier):
    def __init__(self):
        super().__init__()

        class Pair(nn.Conv2d):
            def forward(self, x):
                return super().forward(x), x

        self.model.pair = Pair(3, 3, 1)

    def training_step(self, batch, batch_idx):
        self.model.pair(batch[0])
        return super().training_step(batch, batch_idx)


class Unbatched(Classifier):
    def training_step(self, batch, batch_idx):
        for image in batch[0]:
            self.model.conv1(image)
        return super().training_step(batch, batch_idx)


def short(labels):
    return {"model.conv1": labels}


# What is passed, to which module, the exception, and what its message says.
FITS = [
    (
        {"layers": "conv9"},
        Classifier,
        ValueError,
        "layers='conv9' matches no layer",
        "nearest",
        "model.conv1",
    ),
    (
        {"layers": "layer1", "layer_types": nn.Conv2d},
        Classifier,
        ValueError,
        "layers='layer1' matches no Conv2d layer",
        "'layer1.**'",
        "for its own output give layer_types=torch.nn.Module",
    ),
    (
        {"layers": "fc"},
        Classifier,
        ValueError,
        "layers='fc' matches no layer that gives maps, only model.fc (Linear)",
    ),
    ({"layers": "conv1"}, TwoHeads, ValueError, "layers='conv1' is ambiguous", "'teacher.conv1'"),
    ({"layers": "pair"}, Tuples, TypeError, "'model.pair'", "a tuple", "one floating-point tensor"),
    ({"layers": "conv1"}, Unbatched, ValueError, "'model.conv1' has shape (64, 16, 16)", "4 dimensions"),
    (
        {"clusterer": Returns(lambda p, k: torch.zeros(p.shape[:1]).long())},
        Classifier,
        ValueError,
        "clusterer: fit must return labels of shape (4, 12)",
        "but returned (4,)",
    ),
    ({"clusterer": OnlyCold()}, Classifier, RuntimeError, "cannot start from labels"),
    ({"clusterer": OnlyUnitLengths(), "position_weight": 1.0}, Classifier, AssertionError, "not close"),
    (
        {"clusterer": Returns(lambda p, k: torch.full(p.shape[:2], k))},
        Classifier,
        ValueError,
        "clusterer: fit must return labels in [0, 3)",
        "[3, 3]",
    ),
    (
        {"clusterer": Returns(lambda p, k: torch.zeros(p.shape[:2]))},
        Classifier,
        TypeError,
        "clusterer: the labels that fit returns: must be an integer tensor",
        "torch.float32",
    ),
    (
        {"clusterer": Returns(lambda p, k: None)},
        Classifier,
        TypeError,
        "clusterer: the labels that fit returns: must be an integer tensor",
        "not None",
    ),
    (
        {"initial_labels": short(torch.zeros(8, 4, 4).long())},
        Classifier,
        ValueError,
        "labels of layer 'model.conv1' have 8 channels, but the layer has 64",
    ),
    (
        {"initial_labels": {"conv2": torch.zeros(64, 4, 4).long()}},
        Classifier,
        ValueError,
        "initial_labels: has labels of 'conv2', but of none of the chosen layers (model.conv1)",
    ),
    (
        {"initial_labels": short(torch.arange(16).reshape(1, 4, 4).repeat(64, 1, 1)), "layers": "layer1.**"},
        Classifier,
        ValueError,
        "initial_labels: has labels of 'model.conv1', but of none",
    ),
]


@pytest.mark.parametrize("shape", [(4, 8, 8), (8, 64)])
def test_labels_that_do_not_fit_a_stage_are_told_in_the_first_step(shape):
    labels = {"model.layer1": torch.zeros(shape, dtype=torch.int64)}
    callback = DropCluster("layer1", 0.5, initial_labels=labels, start=0.5)
    trainer = make_trainer(callback)
    with pytest.raises(ValueError, match=r"labels of layer 'model.layer1', a table of shape .* \(8, 8, 8\)"):
        trainer.fit(Classifier(), make_loader())
    assert trainer.global_step == 0


@pytest.mark.parametrize("case", FITS, ids=lambda case: case_id(case[0]))
def test_fits(case, loader):
    options, make_module, error, *parts = case
    module = make_module()
    hooks, weights = count_hooks(module), copy.deepcopy(module.state_dict())
    with pytest.raises(error) as caught:
        make_trainer(DropCluster(**({"layers": "conv1", "start": 0.0} | options))).fit(module, loader)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert count_hooks(module) == hooks
    trained = [k for k, v in module.state_dict().items() if not torch.equal(v, weights[k])]
    assert all(re.search("running|num_batches", name) for name in trained), "no optimiser step was taken"


def test_two_callbacks_on_one_layer(loader):
    module = Classifier()
    hooks = count_hooks(module)
    with pytest.raises(ValueError, match=r"layers='layer1\.\*\*': .* belong to another DropCluster"):
        make_trainer(DropCluster("layer1.*.conv2"), DropCluster("layer1.**")).fit(module, loader)
    assert count_hooks(module) == hooks


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"start": 0.25}, "start=0.25: a fraction of training needs max_epochs or max_steps"),
        ({"start": 1}, "schedule: a ramp to the end of training needs max_epochs or max_steps"),
    ],
)
def test_training_without_an_end_has_no_fractions(loader, options, match):
    with pytest.raises(ValueError, match=match):
        make_trainer(DropCluster("conv1", **options), max_epochs=-1).fit(Classifier(), loader)


def test_a_start_after_the_end_is_warned_of(loader):
    with pytest.warns(
        UserWarning,
        match="DropCluster: start=9: training ends after max_epochs=2, so nothing will be dropped",
    ):
        make_trainer(DropCluster("conv1", start=9), max_epochs=2).fit(Classifier(), loader)


def test_a_trainer_without_a_train_dataloader(monkeypatch):
    # After an error Lightning would leave the DataLoader of all later tests as it has replaced it.
    place = "pytorch_lightning.trainer.connectors.data_connector._replace_dunder_methods"
    monkeypatch.setattr(place, lambda *_: nullcontext())
    module = Classifier()
    hooks = count_hooks(module)
    with pytest.raises(Exception, match="train_dataloader"):
        make_trainer(DropCluster("conv1")).fit(module)
    assert count_hooks(module) == hooks


def test_a_faulty_state_is_refused_when_it_is_loaded():
    """What can be wrong with a state is in tests/learning/test_state.py."""
    state = DropCluster("conv1").state_dict() | {"windows_opened": None}
    with pytest.raises(ValueError, match="windows_opened=None must be an integer"):
        DropCluster("conv1").load_state_dict(state)


def test_a_checkpoint_without_labels_is_no_source_of_labels(tmp_path):
    torch.save({"callbacks": {}}, tmp_path / "empty.ckpt")
    with pytest.raises(ValueError, match="holds no labels of a DropCluster"):
        DropCluster("conv1", initial_labels=tmp_path / "empty.ckpt")


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda: ClusterDrop(torch.zeros(1, 4).long(), 1.5),
            ValueError,
            r"drop_prob=1.5: must be a number in \[0, 1\)",
        ),
        (lambda: ClusterDrop(torch.zeros(1, 4).long(), rescale="x"), ValueError, "rescale='x'"),
        (
            lambda: ClusterDrop(torch.full((1, 4), 3), num_clusters=2),
            ValueError,
            r"\[3, 3\]: must be in \[0, 2\)",
        ),
        (lambda: FaissKMeans(max_iter=2.5), TypeError, "max_iter=2.5: must be an integer"),
        (lambda: FaissKMeans(warm_iter="3"), TypeError, "warm_iter='3': must be an integer"),
        (lambda: FaissKMeans(seed=2**40), ValueError, f"seed={2**40}: must be an integer in"),
        (lambda: FaissKMeans(max_iter=0), ValueError, r"max_iter=0: must be an integer in \[1, "),
        (lambda: FaissKMeans(tolerance=NAN), ValueError, "tolerance=nan: must be a number of at least 0"),
        (lambda: FaissKMeans(min_share=0.9), ValueError, r"min_share=0.9: must be a number in \[0, 0.5\]"),
        (lambda: FaissKMeans(max_share=1.5), ValueError, "max_share=1.5: must be a number of at least 2"),
        (lambda: FaissKMeans(max_share=NAN), ValueError, "max_share=nan: must be a number of at least 2"),
        (lambda: plot_clusters(torch.rand(2, 3, 3)), TypeError, "labels: must be"),
        (lambda: plot_clusters(LABELS - 1), ValueError, r"labels from -1 to -1: must be in \[0, "),
        (
            lambda: plot_clusters(LABELS, previous=LABELS[:1]),
            ValueError,
            r"previous of shape \(1, 4, 4\): must be \(2, 4, 4\)",
        ),
        (lambda: plot_history(LABELS), TypeError, "history: must be a list of .*, not one Tensor"),
        (lambda: plot_history({"conv": LABELS}), TypeError, "history: must be a list of .*, not one dict"),
        (lambda: plot_overlay(LABELS, [[0.0]]), TypeError, "image: must be a tensor of real numbers, not "),
        (
            lambda: find_layers(nn.Sequential(nn.Linear(1, 1)), ["conv"]),
            ValueError,
            "there is no layer 'conv' in Sequential",
        ),
        (
            lambda: find_layers(LABELS, ["conv"]),
            TypeError,
            "model=a torch.int64 tensor: must be a torch.nn.M",
        ),
        (lambda: ClusterDrop(64), TypeError, "labels: must be an integer tensor, not 64"),
        (lambda: ClusterDrop(LABELS.float()), TypeError, "labels: must be an .*, not a torch.float32 tensor"),
        (
            lambda: AdvancedDropout(8)(torch.rand(2, 4, 3)),
            ValueError,
            r"x of shape \(2, 4, 3\): must have num_channels=8",
        ),
        (lambda: select_layers("resnet18", "conv1"), TypeError, "root='resnet18': must be a torch.nn.Module"),
        (
            lambda: preview(Classifier(), "conv1", 224),
            ValueError,
            "example_input=224: must be a batch, or",
        ),
        (lambda: preview(Classifier(), "conv1", (3, 2.5)), ValueError, r"example_input=\(3, 2.5\): must"),
    ],
)
def test_parts_for_themselves(call, error, match):
    with pytest.raises(error, match=match):
        call()
