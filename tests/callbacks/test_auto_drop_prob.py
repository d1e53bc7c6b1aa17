"""drop_prob="auto": the probability follows how much the network overfits."""

import math

import pytest
import pytorch_lightning as pl
import torch
from fits import At, Classifier, ResumableLoader, Seeds, make_loader, make_trainer
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from lightning_dropcluster import DropCluster, Dropout, StructuredDropout
from lightning_dropcluster.callbacks.auto_drop_prob import AutoDropProb
from lightning_dropcluster.layers.norm_statistics import is_clean_step

LOSSES = st.floats(-1e6, 1e6, width=32)
CPU = torch.device("cpu")


class Validated(Classifier):
    """Logs a validation loss that is the mean training loss plus a gap."""

    gap, name = 0.8, "val_loss"

    def validation_step(self, batch, batch_idx):
        recent = self.losses[-4:] or [0.0]
        self.log(self.name, sum(recent) / len(recent) + self.gap, batch_size=8)


def followed(validations, training=1.0, most=0.8):
    auto = AutoDropProb(most)
    for validation in validations:
        auto.add(torch.tensor(training))
        assert auto.compare(validation, CPU)
    return auto.drop_prob


def make_callback(**options) -> DropCluster:
    return DropCluster("conv1", "auto", **({"start": 0.0, "num_samples": 16} | options))


def test_it_goes_half_the_way_to_the_gap_beyond_a_tenth_of_the_first_loss():
    assert followed([1.55]) == pytest.approx(0.25)
    assert followed([1.55] * 30) == pytest.approx(0.5)
    assert followed([1.1] * 30) == 0.0


def test_it_ends_at_zero_where_overfitting_does():
    assert followed([1.55] * 5 + [1.0] * 5) == 0.0


@given(st.lists(LOSSES, min_size=1, max_size=5), LOSSES, st.floats(0, 0.99))
def test_it_never_leaves_its_bounds(validations, training, most):
    assert 0.0 <= followed(validations, training, most) <= most


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_that_are_no_numbers_change_nothing(bad):
    assert followed([1.5, bad, bad]) == followed([1.5])
    auto = AutoDropProb(0.8)
    auto.add(torch.tensor(bad))
    auto.compare(1.0, CPU)
    assert auto.drop_prob == 0.0
    for _ in range(30):
        auto.add(torch.tensor(1.0))
        auto.compare(1.55, CPU)
    assert auto.drop_prob == pytest.approx(0.5)


def test_a_network_that_does_not_overfit_drops_nothing():
    assert followed([0.5, 0.9, 1.0]) == 0.0


def test_a_validation_loss_counts_for_at_most_the_first_one():
    assert followed([1.3, 5.0, 9.0, 1.6]) == followed([1.3] * 4)
    assert followed([math.nan, 1.3, 5.0]) == followed([1.3] * 2)
    assert followed([1.3, 1.2, 1.25]) < followed([1.3] * 3)


def test_losses_below_zero_count_from_the_lowest():
    auto = AutoDropProb(0.8)
    auto.add(torch.tensor(0.0))
    auto.compare(0.0, CPU)
    for _ in range(30):
        auto.add(torch.tensor(-4.0))
        auto.compare(-3.0, CPU)
    assert auto.drop_prob == pytest.approx((0.25 - 0.1) / 0.9)


def test_a_validation_without_clean_steps_before_it_changes_nothing():
    auto = AutoDropProb(0.8)
    auto.add(torch.tensor(1.0))
    for _ in range(5):
        auto.compare(1.55, CPU)
    assert auto.drop_prob == pytest.approx(0.25)


@pytest.mark.parametrize(
    "callback", [make_callback, lambda: StructuredDropout("conv1", Dropout(0.9), "auto")], ids=["own", "peer"]
)
def test_training_follows_and_logs_it(callback, loader):
    callback, used = callback(), []
    record = At(
        lambda trainer, _: used.append(float(trainer.callback_metrics[f"{callback.log_name}/drop_prob"]))
    )
    module = Validated()
    make_trainer(callback, record, max_epochs=10).fit(module, loader, loader)
    assert used[:4] == [0.0] * 4
    assert max(used) == pytest.approx((module.gap / module.losses[0] - 0.1) / 0.9, rel=0.2)


def test_it_waits_for_the_start_and_takes_a_schedule(loader):
    used, callback = [], make_callback(start=5, schedule=lambda fraction: 0.5)
    make_trainer(callback, At(lambda *_: used.append(callback.drop_prob_now)), max_epochs=12).fit(
        Validated(), loader, loader
    )
    assert not any(used[:20])
    assert 0.15 < used[-1] < 0.3


def test_accumulated_gradients_do_not_shrink_the_training_loss(loader):
    callbacks = [make_callback(clean_statistics=False) for _ in range(2)]
    for callback, parts in zip(callbacks, (1, 2), strict=True):
        module = Validated()
        module.configure_optimizers = lambda m=module: torch.optim.SGD(m.parameters(), lr=0.0)
        trainer = make_trainer(callback, max_epochs=3, accumulate_grad_batches=parts)
        trainer.fit(module, loader, loader)
    first, second = (callback.state_dict()["auto"]["first"] for callback in callbacks)
    assert first == pytest.approx(second)


@pytest.mark.parametrize("returned", ["dict", "manual"])
def test_the_loss_is_found_in_what_a_step_returns(loader, returned):
    class Other(Validated):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if not self.automatic_optimization:
                self.optimizers().zero_grad()
                self.manual_backward(loss)
                self.optimizers().step()
            return {"loss": loss}

    module, callback = Other(), make_callback()
    module.automatic_optimization = returned != "manual"
    make_trainer(callback).fit(module, loader, loader)
    assert callback.state_dict()["auto"]["first"] == pytest.approx(module.losses[0])


def test_a_missing_validation_loss_is_an_error_that_lists_what_is_logged(loader):
    module = Validated()
    module.name = "valid/loss"
    said = r"monitor='val_loss'.*'valid/loss'"
    with pytest.raises(ValueError, match=said), pytest.warns(UserWarning, match=said):  # in the trial first
        make_trainer(make_callback()).fit(module, loader, loader)
    make_trainer(make_callback(monitor="valid/loss")).fit(module.train(), loader, loader)


def test_training_without_validation_is_an_error_at_fit(loader):
    with pytest.raises(ValueError, match="drop_prob='auto': needs validation"):
        make_trainer(make_callback()).fit(Validated(), loader)


def test_training_without_a_loss_is_an_error_at_the_first_validation(loader):
    class Silent(Validated):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.losses.append(1.0)
            self.model(batch[0])

    with pytest.raises(ValueError, match="drop_prob='auto': needs the training loss"):
        make_trainer(make_callback()).fit(Silent(), loader, loader)


def test_a_first_loss_that_is_no_number_does_not_end_training(loader):
    class Late(Validated):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * math.nan if self.global_step == 0 else loss

    callback = make_callback()
    module = Late()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    module.configure_gradient_clipping = lambda *args, **options: module.zero_grad()
    make_trainer(callback, max_epochs=6).fit(module, loader, loader)
    assert 0.0 < callback.state_dict()["auto"]["drop_prob"] < 1.0


def test_a_resumed_run_knows_that_validations_were_there():
    auto = AutoDropProb(0.8)
    auto.add(torch.tensor(1.0))
    auto.compare(1.9, CPU)
    resumed = AutoDropProb(0.8)
    resumed.load_state_dict(auto.state_dict())
    assert resumed.has_compared
    assert resumed.has_losses


def test_training_that_ends_before_a_validation_says_so(loader):
    with pytest.warns(UserWarning, match="training ended before a validation did"):
        make_trainer(make_callback(), check_val_every_n_epoch=9).fit(Validated(), loader, loader)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_run_goes_on_as_it_was(tmp_path):
    class Worse(Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", 2.0 + F.cross_entropy(self.model(batch[0]), batch[1]))

    def run(ckpt_path=None):
        module, callback = Worse(), make_callback()
        save = At(lambda trainer, _: trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt"))
        trainer = make_trainer(callback, Seeds(), save, max_epochs=5)
        trainer.fit(module, ResumableLoader(make_loader()), make_loader(8), ckpt_path=ckpt_path)
        return module.state_dict(), callback.state_dict()["auto"]

    weights, auto = run()
    for step in (6, 9, 11):
        resumed, again = run(tmp_path / f"{step}.ckpt")
        assert all(torch.equal(value, resumed[name]) for name, value in weights.items())
        assert again == auto


@pytest.mark.parametrize(
    ("auto", "said"),
    [
        ({}, "missing"),
        ({"drop_prob": 1.5, "first": 1.0, "sum": 0.0, "count": 0}, "in \\[0, 1\\)"),
        ({"drop_prob": 0.1, "first": "x", "sum": 0.0, "count": 0}, "must be a number"),
        ({"drop_prob": 0.1, "first": 1.0, "sum": 0.0, "count": -1}, "count=-1"),
        ({"drop_prob": 0.1, "first": 1.0, "sum": 0.0, "count": 0, "ceiling": "x"}, "ceiling='x'"),
    ],
)
def test_a_damaged_state_is_refused(auto, said):
    callback = make_callback()
    with pytest.raises(ValueError, match=said):
        callback.load_state_dict(callback.state_dict() | {"auto": auto})


def test_a_state_from_before_there_was_auto_is_taken():
    callback = make_callback()
    state = {key: value for key, value in callback.state_dict().items() if key not in ("auto", "left_out")}
    callback.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"monitor": ""}, "monitor=''"),
        ({"max_drop_prob": 1.0}, r"max_drop_prob=1.0: .*\[0, 1\)"),
        ({"drop_prob": "Auto"}, "drop_prob='Auto'.*'auto'"),
        ({"clean_statistics": 1}, "clean_statistics=1: must be True or False"),
    ],
)
@pytest.mark.parametrize("make", [DropCluster, lambda layers, **o: StructuredDropout(layers, Dropout(), **o)])
def test_bad_arguments(make, options, said):
    with pytest.raises((TypeError, ValueError), match=said):
        make("conv1", **options)


def test_sampling_drops_with_the_probability_reached(loader):
    callback, module = make_callback(), Validated()
    make_trainer(callback, max_epochs=6).fit(module, loader, loader)
    again = make_callback()
    again.load_state_dict(callback.state_dict())
    for each in (callback, again):
        with each.sampling(module.eval()) as network, torch.inference_mode():
            assert not torch.equal(network(torch.ones(2, 3, 32, 32)), network(torch.ones(2, 3, 32, 32)))


def test_sampling_says_that_nothing_is_dropped_where_nothing_was_overfitted(loader):
    callback, module = make_callback(), Validated()
    make_trainer(callback, max_epochs=2).fit(module, loader, loader)
    state = callback.state_dict()
    state["auto"]["drop_prob"] = 0.0
    callback.load_state_dict(state)
    with pytest.warns(UserWarning, match="'auto' has found no overfitting"), callback.sampling(module):
        pass
    with callback.sampling(module, 0.3):  # without a warning
        pass


@pytest.mark.parametrize("first", [True, False])
def test_losses_in_which_another_callback_drops_do_not_count(loader, monkeypatch, first):
    counted, trainers, really_add = [], [], AutoDropProb.add

    def add(self, loss):
        really_add(self, loss)
        counted.append(trainers[0].global_step - 1)

    monkeypatch.setattr(AutoDropProb, "add", add)
    other = StructuredDropout("layer1", Dropout(0.5), clean_statistics=False)
    pair = [make_callback(), other]
    trainers.append(make_trainer(*(pair if first else reversed(pair)), max_epochs=10))
    trainers[0].fit(Validated(), loader, loader)
    steps = trainers[0].global_step
    assert counted == [step for step in range(steps) if is_clean_step(step, steps - step)]


def test_another_trainers_validation_does_not_count(loader):
    class Validates(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            make_trainer(callback).validate(pl_module, loader, verbose=False)

    callback, module = make_callback(), Validated()
    module.name = "val_loss"
    trainer = make_trainer(callback, Validates(), max_epochs=1, check_val_every_n_epoch=5)
    with pytest.warns(UserWarning, match="training ended before a validation did"):
        trainer.fit(module, loader, loader)
