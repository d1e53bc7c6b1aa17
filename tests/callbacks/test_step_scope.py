"""Dropping and gathering happen in the training step and its backward pass, wherever else the model runs."""

import pytest
import pytorch_lightning as pl
import torch
from fits import Classifier, make_trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_dropcluster import DropCluster, SpatialDropout, StructuredDropout

HOOKS = [
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_train_epoch_end",
]


class Manual(Classifier):
    """Steps by itself, twice a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for _ in range(2):
            self.optimizers().zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()


class Closures(Classifier):
    """An optimiser that calls the training step several times for a step."""

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=1e-4, max_iter=2)


class Checkpointed(Classifier):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(checkpoint(self.model, batch[0], use_reentrant=False), batch[1])


def watch(module: nn.Module) -> list[bool]:
    """Note of each call of the stem whether anything of it is dropped."""
    seen: list[bool] = []
    module.model.conv1.register_forward_hook(lambda _, args, output: seen.append(bool((output == 0).any())))
    return seen


def run_elsewhere(*names: str) -> pl.Callback:
    """A callback that runs the model in some of its hooks, in training mode."""
    calls: list[str] = []

    def running(name):
        def run(self, trainer, pl_module, *args):
            calls.append(name)
            with torch.no_grad():
                pl_module.model(torch.randn(2, 3, 24, 24))

        return run

    callback = type("Elsewhere", (pl.Callback,), {name: running(name) for name in names})()
    callback.calls = calls
    return callback


def make_callback(kind: str) -> pl.Callback:
    if kind == "structured":
        return StructuredDropout("conv1", nn.Dropout2d(), clean_statistics=False)
    options = {"start": 0.0, "schedule": "constant", "num_samples": 16, "num_clusters": 4}
    return DropCluster("conv1", 0.5, clean_statistics=False, **options)


@pytest.mark.parametrize("make", [Classifier, Manual, Closures], ids=lambda make: make.__name__)
def test_what_other_callbacks_run_is_not_dropped(loader, make):
    module, before, after = make(), run_elsewhere(*HOOKS), run_elsewhere(*HOOKS)
    seen = watch(module)
    trainer = make_trainer(before, make_callback("structured"), after, max_epochs=1)
    strategy, precision = vars(trainer.strategy).keys(), vars(trainer.strategy.precision_plugin).keys()
    trainer.fit(module, loader)
    assert set(before.calls) | {"on_before_zero_grad"} == set(
        HOOKS
    )  # which manual optimisation does not call
    assert seen.count(True) == len(module.losses)
    assert len(seen) == len(module.losses) + len(before.calls) + len(after.calls)
    assert vars(trainer.strategy).keys() == strategy
    assert vars(trainer.strategy.precision_plugin).keys() == precision


def test_what_other_callbacks_run_is_not_gathered(loader):
    callback = make_callback("clusters")
    make_trainer(run_elsewhere("on_train_batch_start"), callback, max_epochs=1).fit(Classifier(), loader)
    assert callback.labels["model.conv1"].shape == (64, 16, 16)


def test_two_callbacks_share_the_step(loader):
    module = Classifier()
    seen = watch(module)
    callbacks = [
        StructuredDropout(stage, nn.Dropout2d(), clean_statistics=False)
        for stage in ("conv1", "layer1.*.conv1")
    ]
    trainer = make_trainer(*callbacks, run_elsewhere("on_before_optimizer_step"), max_epochs=1)
    trainer.fit(module, loader)
    assert seen == [True, False] * 4
    assert "training_step" not in vars(trainer.strategy)


def test_a_strategy_with_a_training_step_of_its_own_keeps_it(loader):
    trainer, steps = make_trainer(make_callback("structured"), max_epochs=1), []
    step = trainer.strategy.training_step
    trainer.strategy.training_step = own = lambda *args: steps.append(args) or step(*args)
    trainer.fit(Classifier(), loader)
    assert len(steps) == 4
    assert trainer.strategy.training_step is own


@pytest.mark.parametrize("kind", ["structured", "clusters"])
def test_activation_checkpointing_drops_alike_in_both_passes(loader, kind):
    weights = []
    for make in (Classifier, Checkpointed):
        torch.manual_seed(1)
        module = make()
        make_trainer(make_callback(kind), max_epochs=2).fit(module, loader)
        weights.append([weight.detach() for weight in module.parameters()])
    for first, second in zip(*weights, strict=True):
        torch.testing.assert_close(first, second)


class Failing(Classifier):
    def training_step(self, batch, batch_idx):
        raise RuntimeError("on purpose")


def test_after_an_error_the_strategy_is_as_it_was(loader):
    trainer = make_trainer(make_callback("structured"))
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.fit(Failing(), loader)
    assert "training_step" not in vars(trainer.strategy)


class Spread(Classifier):
    """Moves a layer to another device by hand, after callbacks have attached."""

    def __init__(self) -> None:
        super().__init__()
        self.far = nn.Conv2d(3, 8, 3)

    def on_fit_start(self):
        self.far.to("meta")

    def training_step(self, batch, batch_idx):
        assert self.far(batch[0].to("meta")).device.type == "meta"
        return super().training_step(batch, batch_idx)

    def on_train_end(self):
        self.far.to_empty(device="cpu")


@pytest.mark.parametrize("regularizer", ["drop_block", nn.Sequential(SpatialDropout(0.1))])
def test_a_regulariser_is_where_the_activation_is(loader, regularizer):
    module = Spread()
    seen = watch(module)
    callback = StructuredDropout(["far", "model.conv1"], regularizer, start=0.25, clean_statistics=False)
    make_trainer(callback).fit(module, loader)
    devices = [next(made.buffers()).device.type for made in callback.regularizers.values()]
    assert devices == ["cpu", "meta"]
    assert seen.count(True) in (11, 12)  # of probability 0 in the first step after the start
