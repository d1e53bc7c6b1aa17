"""Running averages are those of activations from which nothing was dropped, whatever drops."""

import copy
from collections import OrderedDict
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from fits import At, Classifier, ResumableLoader, Seeds, make_loader, make_trainer
from pytorch_lightning.callbacks import (
    BaseFinetuning,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_dropcluster import (
    AdvancedDropout,
    DropBlock,
    DropCluster,
    Dropout,
    SpatialDropout,
    StructuredDropout,
)
from lightning_dropcluster.layers.norm_statistics import is_clean_step

CONVS = "re:conv"
OPTIONS = {"start": 0.0, "schedule": "constant"}
CALLBACKS = {
    "clusters": lambda **o: DropCluster(CONVS, 0.5, num_samples=16, cluster_size=4, **OPTIONS, **o),
    "dropout": lambda **o: StructuredDropout(CONVS, Dropout(0.5), **OPTIONS, **o),
    "spatial": lambda **o: StructuredDropout(CONVS, SpatialDropout(0.5), **OPTIONS, **o),
    "blocks": lambda **o: StructuredDropout(CONVS, DropBlock(0.4, block_size=3), **OPTIONS, **o),
    "torch's own": lambda **o: StructuredDropout(CONVS, nn.Dropout2d(0.5), start=0.0, **o),
}
TOLERANCE = 1.25  # of the mean running variance of each layer


class Still(Classifier):
    """Weights that hardly move, so that averages can be compared with one pass at the end."""

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__(small_net() if model is None else model)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.model(batch[0]), batch[1]))


class Recomputed(nn.Sequential):
    """Forget activations and compute them again in the backward pass."""

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def small_net(norm=nn.BatchNorm2d, block=nn.Sequential) -> nn.Module:
    torch.manual_seed(0)
    layers = {
        "conv1": nn.Conv2d(3, 8, 3),
        "norm1": norm(8),
        "act1": nn.ReLU(),
        "conv2": nn.Conv2d(8, 8, 3),
        "block": block(norm(8), nn.ReLU(), nn.Conv2d(8, 8, 3), norm(8)),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flat": nn.Flatten(),
        "fc": nn.Linear(8, 4),
    }
    return nn.Sequential(OrderedDict(layers))


def make_data() -> DataLoader:
    return make_loader(128, 32, size=16)


def averages(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.named_buffers()}


def excess(model: nn.Module) -> float:
    """How far running variances are from those of a clean pass, as a ratio above 1 at the worst layer."""
    clean = copy.deepcopy(model)
    update_bn([batch[0] for batch in make_data()], clean)
    pairs = zip(model.named_buffers(), clean.buffers(), strict=True)
    ratios = torch.stack([a.mean() / b.mean() for (name, a), b in pairs if name.endswith("running_var")])
    return torch.maximum(ratios, 1 / ratios).max().item()


def fit(*callbacks, model=None, **options) -> nn.Module:
    module = Still(model)
    make_trainer(*callbacks, **({"max_epochs": 20} | options)).fit(module, make_data())
    return module.model


@pytest.mark.parametrize("name", CALLBACKS)
def test_averages_are_those_of_a_clean_pass(name):
    assert excess(fit(CALLBACKS[name]())) < TOLERANCE
    assert excess(fit(CALLBACKS[name](clean_statistics=False))) > 1.4


def test_two_callbacks_agree_on_the_clean_steps():
    first = DropCluster("conv1", 0.5, num_samples=16, cluster_size=4, **OPTIONS)
    second = StructuredDropout("conv2", SpatialDropout(0.5), **OPTIONS)
    assert excess(fit(first, second)) < TOLERANCE


@pytest.mark.parametrize(
    "options", [{"accumulate_grad_batches": 4}, {"precision": "bf16-mixed"}, {"max_epochs": 15}], ids=str
)
@pytest.mark.parametrize("name", ["clusters", "spatial"])
def test_averages_are_clean_with(name, options):
    assert excess(fit(CALLBACKS[name](), **options)) < TOLERANCE


@pytest.mark.parametrize(
    "model",
    [
        lambda: small_net(block=Recomputed),
        lambda: small_net(partial(nn.BatchNorm2d, momentum=None)),
        lambda: small_net(partial(nn.BatchNorm2d, momentum=0.3)),
        lambda: small_net(BatchNormAct2d),
    ],
    ids=["activation checkpointing", "cumulative", "quick", "timm"],
)
def test_averages_are_clean_in(model):
    assert excess(fit(CALLBACKS["spatial"](), model=model())) < TOLERANCE


@pytest.mark.parametrize("listed_first", [True, False])
@pytest.mark.parametrize("averaging", [partial(StochasticWeightAveraging, 1e-4, 0.5), EMAWeightAveraging])
def test_averaged_weights_come_with_clean_averages(averaging, listed_first):
    callbacks = [CALLBACKS["spatial"](), averaging()]
    if averaging is EMAWeightAveraging:
        callbacks[1] = averaging(decay=0.9)
    assert excess(fit(*(callbacks if listed_first else callbacks[::-1]), max_epochs=30)) < TOLERANCE


def test_one_callback_that_keeps_them_clean_is_enough():
    first = StructuredDropout("conv1", SpatialDropout(0.5), **OPTIONS)
    second = StructuredDropout("conv2", SpatialDropout(0.5), clean_statistics=False, **OPTIONS)
    assert excess(fit(first, second)) < TOLERANCE
    assert excess(fit(second, first)) < TOLERANCE


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_every_validation_and_checkpoint_sees_clean_averages(tmp_path):
    seen = []

    class Look(pl.Callback):
        def on_validation_start(self, trainer, pl_module):
            seen.append(excess(pl_module.model))

    saver = ModelCheckpoint(tmp_path, monitor="val_loss", every_n_train_steps=9, save_top_k=-1)
    options = {"enable_checkpointing": True, "val_check_interval": 3, "num_sanity_val_steps": 0}
    trainer = make_trainer(CALLBACKS["spatial"](), Look(), saver, max_epochs=24, **options)
    trainer.fit(Still(), make_data(), make_loader(16, 16, size=16))
    assert max(seen[15:]) < TOLERANCE  # before, averages still remember what they began with
    for path in tmp_path.glob("*.ckpt"):
        saved = torch.load(path, weights_only=True)
        if saved["global_step"] > 45:
            module = Still()
            module.load_state_dict(saved["state_dict"])
            assert excess(module.model) < TOLERANCE


def test_frozen_averages_stay():
    class Frozen(Still):
        def on_train_epoch_start(self):
            self.model.block.eval()

    module = Frozen()
    before = averages(module.model.block)
    make_trainer(CALLBACKS["spatial"]()).fit(module, make_data())
    assert all(torch.equal(value, before[name]) for name, value in averages(module.model.block).items())


def test_layers_that_fine_tuning_holds_back_stay():
    class Hold(BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.model.block, train_bn=False)

        def finetune_function(self, pl_module, epoch, optimizer): ...

    module = Still()
    before = averages(module.model.block)
    make_trainer(Hold(), CALLBACKS["spatial"]()).fit(module, make_data())
    assert all(torch.equal(value, before[name]) for name, value in averages(module.model.block).items())


def test_models_without_averages_have_no_clean_steps():
    dropped = []

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.model.norm1.register_forward_pre_hook(lambda m, x: dropped.append((x[0] == 0).any()))

    make_trainer(CALLBACKS["spatial"](), Look()).fit(Still(small_net(partial(nn.GroupNorm, 2))), make_data())
    assert all(dropped)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_resumed_in_mid_epoch_is_the_same_to_the_last_bit(tmp_path):
    def run(ckpt_path=None):
        module, callback = Still(), CALLBACKS["dropout"]()
        save = At(lambda trainer, _: trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt"))
        trainer = make_trainer(callback, Seeds(), save, max_epochs=6)
        trainer.fit(module, ResumableLoader(make_data()), ckpt_path=ckpt_path)
        return module.state_dict(), callback.state_dict()

    weights, state = run()
    for step in (10, 13):
        resumed, again = run(tmp_path / f"{step}.ckpt")
        assert all(torch.equal(value, resumed[name]) for name, value in weights.items())
        assert again == state


def test_an_error_in_a_step_that_drops_leaves_averages_as_they_were():
    class Stops(Still):
        def training_step(self, batch, batch_idx):
            self.before = averages(self.model)
            loss = super().training_step(batch, batch_idx)
            if not is_clean_step(batch_idx):
                raise RuntimeError("on purpose")
            return loss

    module = Stops()
    with pytest.raises(RuntimeError, match="on purpose"):
        make_trainer(CALLBACKS["spatial"]()).fit(module, make_data())
    assert all(torch.equal(value, module.before[name]) for name, value in averages(module.model).items())


def test_learned_parameters_take_part_in_clean_steps():
    """DDP waits for the gradients of all parameters in every step."""
    missing = []

    class Look(pl.Callback):
        def on_after_backward(self, trainer, pl_module):
            missing.extend(name for name, p in pl_module.named_parameters() if p.grad is None)

    make_trainer(StructuredDropout("conv1", AdvancedDropout), Look()).fit(Still(), make_data())
    assert not missing


@pytest.mark.parametrize("every", [1, 3, 5])
def test_a_copy_inside_the_module_that_follows_the_weights_is_left_alone(every):
    class Followed(Still):
        def __init__(self):
            super().__init__()
            self.average = AveragedModel(self.model)  # in training mode, as Lightning leaves it

        def optimizer_step(self, *args, **kwargs):
            super().optimizer_step(*args, **kwargs)
            if self.trainer.global_step % every == 0:
                self.average.update_parameters(self.model)

        def on_train_batch_end(self, *_):
            lowest.append(min(v.min().item() for k, v in self.average.named_buffers() if "running_var" in k))

    lowest = []
    callback = StructuredDropout("model.conv1", Dropout(0.5), **OPTIONS)
    make_trainer(callback, max_epochs=10).fit(Followed(), make_loader())
    assert min(lowest) > 0.0


def test_layers_that_are_made_late_are_kept_clean_too(loader):
    class Late(Still):
        def on_fit_start(self):
            self.model.norm1 = nn.BatchNorm2d(8)

    class Early(Still):
        def __init__(self):
            super().__init__()
            self.model.norm1 = nn.BatchNorm2d(8)

    counts = []
    for kind in (Early, Late):
        module = kind()
        make_trainer(CALLBACKS["dropout"](), max_epochs=8).fit(module, loader)
        counts.append(int(module.model.norm1.num_batches_tracked))
    assert counts[0] == counts[1] < 20


@pytest.mark.parametrize(
    "freeze",
    [nn.Module.eval, lambda norm: pl.callbacks.BaseFinetuning.freeze(norm, train_bn=False)],
    ids=["eval", "BaseFinetuning"],
)
def test_frozen_averages_need_no_clean_steps(loader, freeze):
    class Frozen(Still):
        def on_train_batch_start(self, *_):
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    freeze(module)

    module, dropped = Frozen(), []
    module.model.conv1.register_forward_hook(
        lambda _, args, output: dropped.append(bool((output == 0).any()))
    )
    make_trainer(CALLBACKS["dropout"](), max_epochs=10).fit(module, loader)
    assert all(dropped[1:])
