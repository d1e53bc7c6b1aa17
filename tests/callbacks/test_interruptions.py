"""Training that is interrupted, goes on or ends at awkward moments: no window, label or error gets lost."""

import pytest
import pytorch_lightning as pl
import torch
from fits import At, Classifier, ResumableLoader, make_loader, make_trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_dropcluster import DropCluster, StructuredDropout

# Lightning misses the callback that saved.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


def make_callback(layers="conv1", **options) -> DropCluster:
    return DropCluster(layers, **({"start": 0.0, "num_samples": 64, "num_clusters": 4} | options))


def stop_at(step, error):
    def act(trainer, _):
        if trainer.global_step == step:
            raise error

    return At(act)


class Turns(Classifier):
    """Two parts that are trained in turn, as in a GAN."""

    def __init__(self):
        super().__init__()
        self.aux = nn.Conv2d(3, 4, 3, padding=1)

    def training_step(self, batch, batch_idx):
        return (
            self.aux(batch[0]).square().mean() if batch_idx % 2 else super().training_step(batch, batch_idx)
        )


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_labels_lost_to_an_early_checkpoint_are_learned_again(loader, tmp_path):
    """A test of an early checkpoint brings its labels, none, into a training that goes on after the start."""
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    callback, module = make_callback(start=1, num_samples=8, every_n_epochs=0), Classifier()
    trainer = make_trainer(callback, saver, enable_checkpointing=True, max_epochs=3)
    trainer.fit(module, loader)
    trainer.test(module, loader, ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert not callback.labels
    trainer.fit_loop.max_epochs = 5
    trainer.fit(module, loader)
    assert callback.labels


def test_a_layer_without_clusters_gets_them_in_a_resumed_training(loader, tmp_path):
    options = {"layers": ["model.conv1", "aux"], "num_samples": 16, "every_n_epochs": 0}
    trainer = make_trainer(make_callback(**options), max_epochs=2)
    trainer.fit(Turns(), loader)
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    checkpoint = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    for state in checkpoint["callbacks"].values():
        del state["clusters"]["aux"]
    torch.save(checkpoint, tmp_path / "partial.ckpt")
    callback = make_callback(**options)
    make_trainer(callback, max_epochs=4).fit(Turns(), loader, ckpt_path=tmp_path / "partial.ckpt")
    assert set(callback.labels) == {"model.conv1", "aux"}


@pytest.mark.parametrize("options", [{"val_check_interval": 0.5}, {"check_val_every_n_epoch": 2}])
def test_a_checkpoint_from_the_last_validation_of_an_epoch_is_resumed(loader, tmp_path, options):
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}")
    make_trainer(make_callback(), saver, enable_checkpointing=True, max_epochs=3, **options).fit(
        Classifier(), loader, make_loader(8)
    )
    callback = make_callback()
    make_trainer(callback, max_epochs=4).fit(
        Classifier(), loader, make_loader(8), ckpt_path=tmp_path / "step=8.ckpt"
    )
    assert callback.labels


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_callback(["model.conv1", "aux"]),
        lambda: StructuredDropout(["model.conv1", "aux"], "dropout"),
    ],
    ids=["DropCluster", "StructuredDropout"],
)
def test_layers_that_take_turns_are_no_error_where_a_run_goes_on_late_in_an_epoch(tmp_path, make):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    loader = ResumableLoader(make_loader())
    make_trainer(make(), saver, enable_checkpointing=True, max_epochs=8).fit(Turns(), loader)
    trainer = make_trainer(make(), max_epochs=8)
    trainer.fit(Turns(), ResumableLoader(make_loader()), ckpt_path=tmp_path / "step=3.ckpt")
    assert trainer.global_step == 32


class EarlyHead(Classifier):
    """One part is trained in the first two epochs alone."""

    def __init__(self):
        super().__init__()
        self.aux = nn.Conv2d(3, 4, 3, padding=1)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if self.current_epoch > 1 else loss + self.aux(batch[0]).square().mean()


@pytest.mark.parametrize("saves", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: make_callback(["model.conv1", "aux"], num_samples=16, every_n_epochs=2),
        lambda: StructuredDropout(["model.conv1", "aux"], "dropout"),
    ],
    ids=["DropCluster", "StructuredDropout"],
)
@pytest.mark.filterwarnings("ignore:DropCluster. layer 'aux' ")
def test_a_layer_that_has_run_in_an_earlier_fit_need_not_run_again(loader, tmp_path, make, saves):
    callback, module = make(), EarlyHead()
    trainer = make_trainer(callback)
    trainer.fit(module, loader)
    trainer.fit_loop.max_epochs, path = 7, None
    if saves:
        path = tmp_path / "after.ckpt"
        trainer.save_checkpoint(path)
        trainer, module = make_trainer(make(), max_epochs=7), EarlyHead()
    trainer.fit(module, loader, ckpt_path=path)
    assert trainer.current_epoch == 7


@pytest.mark.parametrize("last_batch", [0, 1])
def test_an_epoch_that_is_broken_off_says_nothing_of_the_layers(loader, last_batch):
    class BreaksOff(Turns):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if self.current_epoch == 0 and batch_idx == last_batch else None

    callback = StructuredDropout(["model.conv1", "aux"], "dropout")
    trainer = make_trainer(callback, max_epochs=2)
    trainer.fit(BreaksOff(), loader)
    assert trainer.current_epoch == 2


@pytest.mark.filterwarnings("ignore:DropCluster. layer 'model.conv1' was not gathered")
def test_a_layer_is_in_eval_mode_if_it_is_in_the_steps(loader):
    class Unfreeze(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.model.conv1.train(trainer.current_epoch > 0)

        def on_train_epoch_end(self, trainer, pl_module):
            pl_module.model.conv1.train()

    callback = make_callback(["conv1", "layer1.0.conv1"], num_samples=16, every_n_epochs=1)
    with pytest.warns(UserWarning, match="are in eval mode"):
        make_trainer(Unfreeze(), callback).fit(Classifier(), loader)
    assert len(callback.labels) == 2


@pytest.mark.parametrize("every_n_epochs", [0, 5])
def test_a_window_that_an_error_has_closed_is_opened_again(loader, tmp_path, every_n_epochs):
    class Save(pl.Callback):  # as OnExceptionCheckpoint does, which Lightning puts last
        def on_exception(self, trainer, pl_module, exception):
            trainer.save_checkpoint(tmp_path / "crash.ckpt")

    callback = make_callback(every_n_epochs=every_n_epochs)
    trainer = make_trainer(callback, stop_at(2, RuntimeError("crash")), Save())
    with pytest.raises(RuntimeError, match="crash"):
        trainer.fit(Classifier(), loader)
    callback = make_callback(every_n_epochs=every_n_epochs)
    make_trainer(callback).fit(Classifier(), loader, ckpt_path=tmp_path / "crash.ckpt")
    assert callback.labels


@pytest.mark.parametrize("saves", [False, True])
def test_a_window_that_was_open_at_the_end_is_opened_again(loader, tmp_path, saves):
    callback, module = make_callback(every_n_epochs=0), Classifier()
    trainer = make_trainer(callback, max_epochs=1)
    with pytest.warns(UserWarning, match="nothing was dropped"):
        trainer.fit(module, loader)
    trainer.fit_loop.max_epochs = 6
    path = None
    if saves:
        trainer.save_checkpoint(tmp_path / "after.ckpt")
        callback, path = make_callback(every_n_epochs=0), tmp_path / "after.ckpt"
        trainer, module = make_trainer(callback, max_epochs=6), Classifier()
    trainer.fit(module, loader, ckpt_path=path)
    assert callback.labels


def test_training_goes_on_after_control_c(loader):
    callback, module = make_callback(num_samples=16, every_n_epochs=0), Classifier()
    stop = stop_at(1, KeyboardInterrupt())
    trainer = make_trainer(callback, stop)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        trainer.fit(module, loader)
    stop.act, trainer.should_stop = lambda *_: None, False
    trainer.fit(module, loader)
    assert callback.labels


def test_the_state_of_a_resume_that_failed_is_forgotten(loader, tmp_path):
    class Typo(Classifier):
        def configure_optimizers(self):
            raise AttributeError("SDG")

    trainer = make_trainer(make_callback(num_samples=16))
    trainer.fit(Classifier(), loader)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    callback, used = make_callback(num_samples=16, start=3), []
    with pytest.raises(AttributeError, match="SDG"):
        make_trainer(callback, max_epochs=8).fit(Typo(), loader, ckpt_path=tmp_path / "last.ckpt")
    watch = At(lambda trainer, _: used.append((trainer.current_epoch, bool(callback.labels))))
    make_trainer(callback, watch).fit(Classifier(), loader)
    assert not any(has_labels for epoch, has_labels in used if epoch < 3)
    assert callback.labels


def test_a_state_takes_the_place_of_what_is_open(loader):
    callback, states = make_callback(num_samples=20, every_n_epochs=1), []

    def act(trainer, _):
        states.append(callback.state_dict())
        if trainer.global_step == 5:
            before = next(state for state in states if state["window"] is None)
            callback.load_state_dict(before)
            assert callback.state_dict()["window"] is None

    make_trainer(callback, At(act)).fit(Classifier(), loader)
    assert any(state["window"] is not None for state in states)


@pytest.mark.parametrize("every_n_epochs", [0, 5])
def test_a_first_window_that_comes_to_nothing_is_followed_by_another(loader, every_n_epochs):
    class Poisoned(Classifier):
        def training_step(self, batch, batch_idx):
            if self.global_step == 3:
                with torch.no_grad():
                    self.model.conv1(batch[0] * float("nan"))
            return super().training_step(batch, batch_idx)

    callback, seen = make_callback(num_samples=32, every_n_epochs=every_n_epochs), []
    with pytest.warns(UserWarning, match="NaN, infinite or huge; it is not clustered"):
        make_trainer(callback, At(lambda *_: seen.append(bool(callback.labels)))).fit(Poisoned(), loader)
    assert seen.index(True) == 8


@pytest.mark.parametrize("every_n_train_steps", [2, 5])
def test_sizes_that_take_turns_fill_a_window_in_the_end(every_n_train_steps):
    class Alternating(IterableDataset):
        def __iter__(self):
            batches = [next(iter(make_loader(8, 8, size))) for size in (32, 48)]
            return iter(batches * 20)

    callback = make_callback(every_n_train_steps=every_n_train_steps)
    make_trainer(callback, max_epochs=2).fit(Classifier(), DataLoader(Alternating(), batch_size=None))
    assert callback.labels


@pytest.mark.parametrize(
    "callback",
    [make_callback(start=0.95), StructuredDropout("conv1", "dropout", start=0.95)],
    ids=lambda callback: type(callback).__name__,
)
def test_a_start_that_is_never_reached_is_told(loader, callback):
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    with pytest.warns(
        UserWarning, match=r"start=0\.95 was not reached before training ended, so nothing was"
    ):
        make_trainer(callback, Stop(), max_epochs=10).fit(Classifier(), loader)


def test_a_layer_that_does_not_run_is_warned_of_long_before_the_start(loader):
    class Idle(Classifier):
        def __init__(self):
            super().__init__()
            self.idle = nn.Conv2d(3, 3, 1)

    with (
        pytest.warns(UserWarning, match="layers: 'idle' did not run in any training step so far"),
        pytest.raises(RuntimeError, match="layers: 'idle' did not run"),
    ):
        make_trainer(make_callback(["idle", "model.conv1"], start=2)).fit(Idle(), loader)


def test_structured_dropout_acts_in_training_steps_alone(loader):
    shares = []

    class Recalibrate(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            with torch.no_grad():
                shares.append((pl_module.model.conv1(torch.randn(2, 3, 32, 32)) == 0).float().mean().item())

    callback = StructuredDropout("conv1", "dropout", 0.5, schedule="constant")
    make_trainer(callback, Recalibrate(), max_epochs=2).fit(Classifier(), loader)
    assert shares == [0.0, 0.0]
