"""StructuredDropout in whole fits of a tiny timm model."""

import copy
import functools
import pickle

import pytest
import pytorch_lightning as pl
import torch
from fits import (
    At,
    Classifier,
    ResumableLoader,
    case_id,
    count_hooks,
    make_loader,
    make_trainer,
    tiny_resnet,
    two_convs,
)
from processes import run_ranks
from pytorch_lightning.callbacks import LearningRateFinder, WeightAveraging
from pytorch_lightning.strategies import DDPStrategy
from torch import nn

from lightning_dropcluster import (
    REGULARIZERS,
    AdvancedDropout,
    DropBlock,
    DropCluster,
    SpatialDropout,
    StructuredDropout,
    ranks,
)

LAYERS = "layer[12].*.conv2"
NAMES = ["model.layer1.0.conv2", "model.layer2.0.conv2"]


def make_callback(layers=LAYERS, drop_prob=0.5, **options) -> StructuredDropout:
    return StructuredDropout(layers, "spatial_dropout", drop_prob, **options)


class Gate(nn.Module):
    """A learned regulariser: a soft gate for each channel in training."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        gain = self.gain.reshape(1, -1, *[1] * (x.ndim - 2))
        return x * torch.sigmoid(gain * x) if self.training else x


class Counter(nn.Module):
    """A regulariser with a buffer of its own, which changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += 1
        return x


def equal(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def dropped_shares(loader, *callbacks, layer="conv1", **options) -> list[float]:
    """The share of zeros in a layer's output at each training step."""
    shares, module = [], Classifier()

    class Watch(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            self.handle = module.model.get_submodule(layer).register_forward_hook(
                lambda m, a, out: shares.append((out == 0).float().mean().item())
            )

        def on_train_end(self, trainer, pl_module):
            self.handle.remove()

    make_trainer(*callbacks, Watch(), **options).fit(module, loader)
    assert count_hooks(module) == 0
    return shares


SOURCES = {
    "a module": nn.Dropout2d(0.5),
    "a name": "spatial_dropout",
    "a class": functools.partial(SpatialDropout, 0.5),
    "a function": lambda: nn.Dropout2d(0.5),
    "a function of the channels": lambda channels: nn.Dropout2d(0.5 if channels == 64 else 0.0),
}


@pytest.mark.parametrize("source", SOURCES)
def test_whatever_makes_a_module_serves(loader, source):
    options = {"drop_prob": 0.5} if source == "a name" else {}
    if source in ("a name", "a class"):
        options["schedule"] = "constant"
    callback = StructuredDropout("conv1", SOURCES[source], start=2, clean_statistics=False, **options)
    shares = dropped_shares(loader, callback)
    assert shares[:8] == [0.0] * 8
    assert sum(shares[8:]) / 8 == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("name", sorted(REGULARIZERS.keys() - {"cluster_drop"}))
def test_every_regulariser_by_name(loader, name):
    callback, module, plain = StructuredDropout(LAYERS, name), Classifier(), Classifier()
    make_trainer(callback, max_epochs=2).fit(module, loader)
    make_trainer(max_epochs=2).fit(plain, loader)
    assert [type(made) for made in callback.regularizers.values()] == [REGULARIZERS[name]] * 2
    assert module.losses[-1] != plain.losses[-1]
    assert module.state_dict().keys() == plain.state_dict().keys()


def test_each_layer_has_a_module_of_its_own(loader):
    given = nn.Sequential(nn.Dropout2d(), Counter())
    callback = StructuredDropout(LAYERS, given, clean_statistics=False)
    make_trainer(callback, max_epochs=1).fit(Classifier(), loader)
    assert list(callback.regularizers) == NAMES
    assert given[1].calls == 0
    assert [int(module[1].calls) for module in callback.regularizers.values()] == [4, 4]


def test_drop_prob_follows_the_schedule_where_it_can_be_set(loader, tmp_path):
    callback, used, logged = make_callback(drop_prob=0.8, start=0.25), [], []

    def look(trainer, module):
        used.append(callback.drop_prob_now)
        inside = [float(module.drop_prob) for module in callback.regularizers.values()]
        assert inside == pytest.approx([used[-1]] * 2)
        logged.append(float(trainer.callback_metrics["structured_dropout/drop_prob"]))

    make_trainer(callback, At(look)).fit(Classifier(), loader)
    assert used == pytest.approx([0.0] * 4 + [0.8 * step / 12 for step in range(12)])
    assert logged == pytest.approx(used)
    assert callback.drop_prob_now == 0.0


@pytest.mark.parametrize(
    ("regularizer", "expected"),
    [(DropBlock(0.3), 0.3), (nn.Dropout2d(0.2), 0.2), (nn.Identity(), None)],
    ids=lambda value: str(value),
)
def test_drop_prob_is_the_modules_own_where_none_is_given(loader, regularizer, expected):
    callback, used = StructuredDropout("conv1", regularizer), []
    trainer = make_trainer(callback, At(lambda *_: used.append(callback.drop_prob_now)), max_epochs=2)
    trainer.fit(Classifier(), loader)
    assert ("structured_dropout/drop_prob" in trainer.callback_metrics) == (expected is not None)
    if expected is None:
        assert all(p != p for p in used)
    elif isinstance(regularizer, DropBlock):
        assert used == pytest.approx([expected * step / 8 for step in range(8)])
        assert float(regularizer.drop_prob) == pytest.approx(expected)
    else:
        assert used == [expected] * 8


def test_modules_that_cannot_be_steered_need_no_end_of_training(loader):
    shares = dropped_shares(
        loader,
        StructuredDropout("conv1", nn.Dropout2d()),
        max_epochs=-1,
        max_steps=-1,
        limit_train_batches=2,
        max_time={"seconds": 0},
    )
    assert all(0.0 < share < 1.0 for share in shares)


def test_the_model_is_as_it_was(loader):
    module = Classifier()
    keys = list(module.state_dict())
    make_trainer(make_callback()).fit(module, loader)
    assert list(module.state_dict()) == keys
    plain = tiny_resnet()
    plain.load_state_dict(module.model.state_dict(), strict=True)
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(module.model.eval()(x), plain.eval()(x))


def test_before_the_start_training_is_bit_identical_to_plain_training(loader):
    plain, module = Classifier(), Classifier()
    make_trainer(max_epochs=2).fit(plain, loader)
    make_trainer(StructuredDropout("conv1", nn.Dropout2d(), start=2), max_epochs=3).fit(module, loader)
    assert module.losses[:8] == plain.losses
    assert module.losses[8] != plain.losses[-1]


def test_only_training_drops(loader):
    """Not even where the model stays in training mode while it is validated: see DropCluster's like."""
    stages = {}

    class Look(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            pl_module.model.conv1.register_forward_hook(
                lambda m, a, out: stages.setdefault(trainer.state.stage.value, set()).add(
                    bool((out == 0).any())
                )
            )

    module = Classifier()
    callback = StructuredDropout("conv1", nn.Dropout2d(), clean_statistics=False)
    trainer = make_trainer(callback, Look(), max_epochs=1)
    trainer.fit(module, loader, loader)
    trainer.test(module, loader, verbose=False)
    assert stages == {"sanity_check": {False}, "train": {True}, "validate": {False}, "test": {False}}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("learned", [False, True])
def test_nothing_is_left_attached_after_an_error(loader, error, learned):
    def fail(*args):
        raise error("on purpose")

    module = Classifier()
    callback = StructuredDropout(LAYERS, Gate if learned else nn.Dropout2d)
    with pytest.raises((error, SystemExit)):
        make_trainer(callback, At(fail)).fit(module, loader)
    assert count_hooks(module) == 0


def test_compiled_models_compile_little_and_never_break(loader):
    from torch._dynamo.testing import CompileCounter

    for regularizer in ("drop_block", nn.Dropout2d(), Gate):
        torch._dynamo.reset()
        counter, module = CompileCounter(), Classifier(two_convs())
        module.model.compile(backend=counter, fullgraph=True)
        make_trainer(StructuredDropout("[01].0", regularizer, start=1)).fit(module, loader)
        assert counter.frame_count == 2 + (regularizer is Gate)  # in clean steps its parameters take part


@pytest.mark.parametrize("regularizer", [DropBlock(0.4, block_size=3), nn.Dropout2d(), Gate, Counter])
def test_a_resumed_run_equals_one_that_was_never_interrupted(loader, tmp_path, regularizer):
    path = tmp_path / "middle.ckpt"

    def save(trainer, module):
        if trainer.global_step == 7:
            trainer.save_checkpoint(path)
            save.rng = torch.get_rng_state()

    class Restore(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            torch.set_rng_state(save.rng)

    loader = ResumableLoader(loader)
    whole, first = Classifier(), StructuredDropout(LAYERS, regularizer, start=0.25)
    make_trainer(first, At(save)).fit(whole, loader)
    resumed, second = Classifier(), StructuredDropout(LAYERS, regularizer, start=0.25)
    make_trainer(second, Restore()).fit(resumed, loader, ckpt_path=path)
    assert equal(resumed.state_dict(), whole.state_dict())
    for one, other in zip(first.regularizers.values(), second.regularizers.values(), strict=True):
        assert equal(one.state_dict(), other.state_dict())
    torch.load(path, weights_only=True)


def test_a_second_fit_starts_afresh_and_a_continued_one_goes_on(loader):
    callback, module = StructuredDropout("conv1", Counter, clean_statistics=False), Classifier()
    trainer = make_trainer(callback, max_epochs=2)
    trainer.fit(module, loader)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, loader)
    assert [int(counter.calls) for counter in callback.regularizers.values()] == [12]
    make_trainer(callback, max_epochs=1).fit(Classifier(), loader)
    assert [int(counter.calls) for counter in callback.regularizers.values()] == [4]


def test_a_tuner_leaves_no_trace(loader, tmp_path):
    class Tunable(Classifier):
        lr = 0.01

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    callback, used = make_callback(drop_prob=0.8), []
    tuner, look = LearningRateFinder(num_training_steps=9), At(lambda *_: used.append(callback.drop_prob_now))
    module = Tunable()
    make_trainer(callback, tuner, look, default_root_dir=tmp_path).fit(module, loader)
    assert used == pytest.approx([0.8 * step / 16 for step in range(16)])
    assert count_hooks(module) == 0


def test_the_statistics_epoch_of_weight_averaging_does_not_drop(loader):
    callback, used = StructuredDropout("conv1", nn.Dropout2d()), []
    swa = pl.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)
    record = At(lambda trainer, _: used.append((trainer.current_epoch, callback.drop_prob_now)))
    make_trainer(swa, callback, record).fit(Classifier(), loader)
    by_epoch = dict(used)
    assert (by_epoch[3], by_epoch[4]) == (0.5, 0.0)


def test_the_type_of_an_activation_is_kept(loader):
    class Float(nn.Module):
        def forward(self, x):
            return x * torch.ones(())

    seen, module = set(), Classifier()
    module.model.bn1.register_forward_pre_hook(lambda m, args: seen.add(args[0].dtype))
    callback = StructuredDropout("conv1", Float)
    make_trainer(callback, precision="bf16-mixed", max_epochs=1).fit(module, loader)
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize("namespace", ["pytorch_lightning", "lightning.pytorch"])
def test_both_namespaces(namespace):
    assert isinstance(make_callback(), pytest.importorskip(namespace).Callback)


def test_the_callback_pickles():
    callback = pickle.loads(pickle.dumps(make_callback(start=0.5, schedule="cosine")))
    assert callback.state_key == make_callback().state_key


# Beside others


def test_two_instances_log_under_names_of_their_own(loader, tmp_path):
    callbacks = [make_callback("conv1"), make_callback("layer3.**"), DropCluster("layer1.**", num_samples=8)]
    trainer = make_trainer(*callbacks, max_epochs=1)
    trainer.fit(Classifier(), loader)
    names = {"structured_dropout/drop_prob", "structured_dropout-1/drop_prob", "dropcluster/drop_prob"}
    assert names <= trainer.callback_metrics.keys()
    trainer.save_checkpoint(tmp_path / "all.ckpt")


@pytest.mark.parametrize("make", [DropCluster, make_callback])
def test_a_layer_belongs_to_one_callback(loader, make):
    module = Classifier()
    with pytest.raises(ValueError, match=r"layers='layer1\.\*\*': .* belong to another .* of this Trainer"):
        make_trainer(make("layer1.*.conv2"), make_callback("layer1.**")).fit(module, loader)
    assert count_hooks(module) == 0


def test_a_layer_with_two_names_belongs_to_one_callback(loader):
    module = Classifier()
    module.alias = module.model.conv1
    with pytest.raises(
        ValueError, match=r"layers='alias': alias belong to another .* \(layers='model.conv1'\)"
    ):
        make_trainer(make_callback("model.conv1"), make_callback("alias")).fit(module, loader)


# Learned regularisers


def test_learned_regularisers_are_trained_and_saved_beside_the_model(loader, tmp_path):
    layers, keys = "layer[12].*.conv1", list(Classifier().state_dict())
    callback, module = StructuredDropout(layers, Gate), Classifier()
    look = At(lambda _, module: keys == list(module.state_dict()) or pytest.fail("other keys"))
    trainer = make_trainer(callback, look, max_epochs=2)
    trainer.fit(module, loader)
    assert all((gate.gain != 1.0).any() for gate in callback.regularizers.values())
    assert [name for name, _ in module.named_parameters()] == [
        name for name, _ in Classifier().named_parameters()
    ]
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert list(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]) == keys
    plain = Classifier.load_from_checkpoint(tmp_path / "last.ckpt")
    assert equal(plain.state_dict(), module.state_dict())
    trainer.test(module, loader, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    make_trainer(StructuredDropout(layers, Gate)).test(plain, loader, tmp_path / "last.ckpt", verbose=False)
    resumed = StructuredDropout(layers, Gate)
    make_trainer(resumed, max_epochs=2).fit(plain, loader, ckpt_path=tmp_path / "last.ckpt")
    for name, gate in resumed.regularizers.items():
        assert equal(gate.state_dict(), callback.regularizers[name].state_dict())


def test_a_checkpoint_without_them_is_resumed_without_them(loader, tmp_path):
    trainer, path = make_trainer(max_epochs=1), tmp_path / "plain.ckpt"
    trainer.fit(Classifier(), loader)
    trainer.save_checkpoint(path)
    callback, module = StructuredDropout("conv1", Gate), Classifier()
    with pytest.raises(ValueError, match=r"ckpt_path: was written without regularizer=.*Gate"):
        make_trainer(callback, max_epochs=2).fit(module, loader, ckpt_path=path)
    assert not any("structured" in name for name, _ in module.named_modules())
    make_trainer(max_epochs=2).fit(module, loader, ckpt_path=path)
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    make_trainer(callback, max_epochs=1).fit(module, loader)


def test_a_learned_regulariser_of_a_whole_stage_acts_once(loader):
    class Count(Gate):
        calls = 0

        def forward(self, x):
            Count.calls += 1
            return super().forward(x)

    callback = StructuredDropout("layer1", lambda: Count(), clean_statistics=False)
    make_trainer(callback, max_epochs=1).fit(Classifier(), loader)
    assert Count.calls == 4


def test_learned_regularisers_start_afresh_in_a_second_fit_and_go_on_in_a_continued_one(loader):
    callback, module = StructuredDropout("conv1", lambda channels: Gate(channels)), Classifier()
    trainer = make_trainer(callback, max_epochs=1)
    trainer.fit(module, loader)
    gate = callback.regularizers["model.conv1"]
    assert gate.gain.shape == (64,)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader)
    assert callback.regularizers["model.conv1"] is gate
    make_trainer(callback, max_epochs=1).fit(module, loader)
    assert callback.regularizers["model.conv1"] is not gate


def test_a_maker_that_fails_half_way_is_named_and_leaves_the_model_alone(loader):
    def make(channels):
        if channels > 8:
            raise ValueError("too many channels")
        return Gate(channels)

    module = Classifier()
    before = list(module.state_dict())
    with pytest.raises(ValueError, match="too many channels"):
        make_trainer(StructuredDropout("layer[13].*.conv2", make)).fit(module, loader)
    assert list(module.state_dict()) == before


def test_layers_inside_a_learned_regulariser_are_not_picked(loader):
    callback, names = StructuredDropout("layer1.**", lambda channels: nn.Conv2d(channels, channels, 1)), []
    look = At(lambda *_: names.append(list(callback.regularizers)))
    make_trainer(callback, look, max_epochs=1).fit(Classifier(), loader)
    assert names[-1] == [f"model.layer1.0.{conv}" for conv in ("conv1", "conv2", "downsample.0")]


def test_an_optimiser_of_the_inner_model_alone_learns_them(loader):
    class Inner(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.model.parameters(), lr=0.1)

    module = Inner()
    callback = StructuredDropout("conv1", Gate)
    make_trainer(callback, max_epochs=1).fit(module, loader)
    assert callback.regularizers["model.conv1"].gain != 1.0


class Late(Classifier):
    """Makes its model in configure_model."""

    callback: StructuredDropout | None = None

    def configure_model(self):
        if not hasattr(self.model, "conv1"):
            self.model = tiny_resnet()
            if self.callback is not None:
                self.callback.register(self)

    def __init__(self):
        super().__init__(nn.Identity())


def test_a_model_made_in_configure_model_has_to_register_them(loader):
    with pytest.raises(ValueError, match=r"regularizer=.*Gate.*: has parameters, .* call register\(self\)"):
        make_trainer(StructuredDropout("conv1", Gate)).fit(Late(), loader)
    module = Late()
    module.callback = callback = StructuredDropout("conv1", Gate)
    make_trainer(callback, max_epochs=1).fit(module, loader)
    assert callback.regularizers["model.conv1"].gain != 1.0
    make_trainer(make_callback("conv1"), max_epochs=1).fit(Late(), loader)  # nothing to learn, nothing to do


def test_a_regulariser_registered_before_the_ranks_exist_draws_unlike_on_each(loader, monkeypatch):
    callback, module = StructuredDropout("conv1", "advanced_dropout"), Classifier()
    callback.register(module)
    monkeypatch.setattr(ranks, "rank", lambda: 1)  # as in a spawned process
    callback._layers.attach({"model.conv1": module.model.conv1}, torch.device("cpu"))
    assert callback.regularizers["model.conv1"].shift == 0.618


@pytest.mark.parametrize("is_first", [False, True])
def test_averaged_models_have_them_too(loader, is_first):
    callback, average, module = StructuredDropout("conv1", Gate), WeightAveraging(), Classifier()
    trainer = make_trainer(*([callback, average] if is_first else [average, callback]), max_epochs=2)
    if is_first:
        trainer.fit(module, loader)
        assert abs(callback.regularizers["model.conv1"].gain - 1.0) > 0.0
    else:
        with pytest.raises(ValueError, match="list this callback before WeightAveraging"):
            trainer.fit(module, loader)


def test_copies_of_a_model_in_training_do_not_drop(loader):
    copies = []

    def make_copy(trainer, module):
        if trainer.global_step == 3:
            copies.append(copy.deepcopy(module.model))

    module = Classifier()
    make_trainer(StructuredDropout("conv1", Gate), At(make_copy), max_epochs=1).fit(module, loader)
    with torch.no_grad():
        copies[0].conv1.structured_dropout.regularizer.gain.zero_()
    assert (copies[0].train().conv1(torch.randn(1, 3, 32, 32)) != 0).all()


# Ranks


def train_on_ranks(regularizer: str) -> dict:
    pl.seed_everything(0, verbose=False)
    made = {"learned": Gate, "modules": nn.Sequential(SpatialDropout(0.5))}[regularizer]
    callback, module, masks = StructuredDropout("conv1", made), Classifier(), []
    module.model.bn1.register_forward_pre_hook(lambda m, args: masks.append((args[0] == 0).flatten(2).all(2)))
    make_trainer(callback, max_epochs=2, strategy=DDPStrategy(), devices=2).fit(module, make_loader())
    return {
        "weights": module.state_dict() | callback.state_dict()["regularizers"].get("model.conv1", {}),
        "mask": masks[-1],
        "hooks": len(module.model.conv1._forward_hooks),
    }


@pytest.mark.parametrize("regularizer", ["learned", "modules"])
def test_ranks(regularizer, tmp_path):
    first, second = run_ranks(train_on_ranks, 2, tmp_path, regularizer)
    learned = "gain"
    parameters = [k for k in first["weights"] if "running" not in k]
    assert all(torch.equal(first["weights"][k], second["weights"][k]) for k in parameters)
    assert (learned in parameters) == (regularizer == "learned")
    assert (first["hooks"], second["hooks"]) == (0, 0)
    if regularizer == "modules":  # seeded alike
        assert not torch.equal(first["mask"], second["mask"])


# What a user can get wrong

ARGUMENTS = [
    (None, {}, TypeError, r"regularizer=None: must be a torch.nn.Module, .* give it by name"),
    (3, {}, TypeError, r"regularizer=3: must be a torch.nn.Module, .* not int"),
    ("drop_blok", {}, ValueError, "regularizer='drop_blok': must be one of .*drop_block"),
    ("cluster_drop", {}, ValueError, "regularizer='cluster_drop': must be one of advanced_dropout"),
    ("drop_block", {"drop_prob": 1.0}, ValueError, r"drop_prob=1.0: must be a number in \[0, 1\)"),
    ("drop_block", {"schedule": "steep"}, ValueError, "schedule='steep'"),
    ("drop_block", {"start": -1}, ValueError, "start=-1"),
    (nn.Dropout2d(), {"drop_prob": 0.1}, ValueError, "drop_prob=0.1: Dropout2d has no method set_drop_prob"),
    (nn.Dropout2d, {"drop_prob": 0.1}, ValueError, "drop_prob=0.1: Dropout2d has no method set_drop_prob"),
    (nn.Dropout2d(), {"schedule": "linear"}, ValueError, "schedule='linear': Dropout2d has no"),
    ("drop_block", {"layers": []}, ValueError, r"layers=\[\]"),
    ("drop_block", {"layer_types": int}, TypeError, "layer_types="),
    ("drop_block", {"layers": None, "layer_types": nn.ReLU}, ValueError, "layer_types=.*: needs layers"),
]


@pytest.mark.parametrize("case", ARGUMENTS, ids=str)
def test_faulty_arguments_are_named(case):
    regularizer, options, error, match = case
    with pytest.raises(error, match=match):
        StructuredDropout(**({"layers": "conv1", "regularizer": regularizer} | options))


class Steered(nn.Identity):
    def set_drop_prob(self, drop_prob):
        pass


class Idle(Classifier):
    def __init__(self):
        super().__init__()
        self.model.idle = nn.Conv2d(3, 3, 1)


FITS = [
    (lambda: 3, {}, TypeError, "must make a torch.nn.Module, not a int"),
    (lambda a, b: nn.Identity(), {}, ValueError, "needs b; give a callable of the number of channels alone"),
    (lambda c: 1 / 0, {}, ValueError, r"calling it with \(64\) failed: division by zero"),
    (lambda: nn.Dropout2d(), {"drop_prob": 0.1}, ValueError, "drop_prob=0.1: Dropout2d has no method"),
    (
        lambda: nn.Dropout2d(),
        {"schedule": "linear"},
        ValueError,
        "schedule='linear': Dropout2d has no method",
    ),
    (Steered, {}, ValueError, "drop_prob=None: must be given, since Steered has no such attribute"),
    (lambda: nn.LazyConv2d(3, 1), {}, ValueError, "makes lazy parameters, which no optimiser takes"),
    (
        lambda c: Gate(c),
        {"layers": "act1", "layer_types": nn.ReLU},
        ValueError,
        "'model.act1' does not tell: set the layer's attribute out_channels",
    ),
    (
        nn.MaxPool2d(2),
        {},
        ValueError,
        r"MaxPool2d must return a tensor of shape \(8, 64, 16, 16\) .* \(8, 64",
    ),
    (nn.Dropout2d(), {"layers": "act9"}, ValueError, "layers='act9' matches no layer"),
    (
        nn.Dropout2d(),
        {"layers": "idle"},
        RuntimeError,
        "layers: 'model.idle' did not run in any training",
    ),
]


@pytest.mark.parametrize("case", FITS, ids=case_id)
def test_faulty_fits_are_named(case, loader):
    regularizer, options, error, match = case
    module = Idle()
    with pytest.raises(error, match=match):
        make_trainer(StructuredDropout(**({"layers": "conv1", "regularizer": regularizer} | options))).fit(
            module, loader
        )
    assert count_hooks(module) == 0


@pytest.mark.parametrize("clean_statistics", [True, False])
@pytest.mark.parametrize(
    ("layer", "regularizer", "match"),
    [
        ("conv1", nn.MaxPool2d(2), "MaxPool2d must return a tensor"),
        ("global_pool", DropBlock(), r"must be \(N, C, \*spatial\), blocks being spatial"),
    ],
    ids=case_id,
)
def test_a_shape_that_does_not_fit_is_an_error_long_before_the_start(
    loader, layer, regularizer, match, clean_statistics
):
    module = Classifier()
    callback = StructuredDropout(layer, regularizer, start=2, clean_statistics=clean_statistics)
    trainer = make_trainer(callback, max_epochs=3)
    with pytest.raises(ValueError, match=match):
        trainer.fit(module, loader)
    assert trainer.global_step == 0
    assert count_hooks(module) == 0


def test_what_cannot_be_copied_is_not_tried(loader):
    class Held(nn.Dropout2d):
        def __deepcopy__(self, memo):
            raise TypeError("held")

    shares = dropped_shares(loader, StructuredDropout("conv1", Held, start=1, clean_statistics=False))
    assert shares[:4] == [0.0] * 4
    assert shares[-1] > 0.0


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda s: s.clear(), ValueError, "progress, regularizers missing"),
        (lambda s: s["progress"].update(passed=-1), ValueError, "passed=-1 must be an integer of at least 0"),
        (lambda s: s.update(regularizers=3), TypeError, r"state_dict\['regularizers'\]: must be a mapping"),
        (lambda s: s["regularizers"].update(a=3), TypeError, r"\['regularizers'\]\['a'\]: must be a mapping"),
    ],
)
def test_faulty_states_are_named(change, error, match):
    state = make_callback().state_dict()
    change(state)
    with pytest.raises(error, match=match):
        make_callback().load_state_dict(state)


def test_a_state_of_another_regulariser_is_named(loader):
    callback = StructuredDropout("conv1", Counter)
    state = callback.state_dict() | {"regularizers": {"model.conv1": {"other": torch.zeros(1)}}}
    callback.load_state_dict(state)
    module = Classifier()
    with pytest.raises(ValueError, match=r"state_dict: of another regulariser than that of layer 'model"):
        make_trainer(callback).fit(module, loader)
    assert count_hooks(module) == 0


@pytest.mark.parametrize("regularizer", [nn.Dropout2d(0.1), AdvancedDropout(8)], ids=["plain", "learned"])
def test_a_child_of_the_user_that_has_our_name_is_left_alone(loader, regularizer):
    module = Classifier()
    own = module.model.conv1.structured_dropout = nn.Conv2d(1, 1, 1)
    callback = StructuredDropout("model.conv1", regularizer)
    if isinstance(regularizer, AdvancedDropout):
        with pytest.raises(ValueError, match="'structured_dropout' of its own"):
            make_trainer(callback).fit(module, loader)
    else:
        make_trainer(callback).fit(module, loader)
    assert module.model.conv1.structured_dropout is own
