"""The callback in whole fits of a tiny timm model."""

import copy
import csv
import gc
import pickle
import weakref
from contextlib import nullcontext

import pytest
import pytorch_lightning as pl
import torch
from fits import (
    At,
    Classifier,
    ResumableLoader,
    count_hooks,
    make_loader,
    make_trainer,
    tiny_resnet,
    two_convs,
)
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from lightning_dropcluster import DropCluster, TorchKMeans

LAYERS = "layer[12].*.conv2"


def make_callback(layers=LAYERS, drop_prob=0.5, **options) -> DropCluster:
    return DropCluster(
        layers, drop_prob, **({"start": 0.25, "every_n_epochs": 1, "num_samples": 16} | options)
    )


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


class Boom(Exception):
    pass


def test_labels_exist_after_start_and_change_after_reclustering(loader):
    callback, seen = make_callback(), []
    trainer = make_trainer(callback, At(lambda *_: seen.append(callback.labels)))
    trainer.fit(Classifier(), loader)
    assert [bool(labels) for labels in seen[:6]] == [False] * 5 + [True]
    assert not equal(seen[5], seen[-1])
    names = ["model.layer1.0.conv2", "model.layer2.0.conv2"]
    assert list(callback.labels) == names
    model = tiny_resnet()
    for name, labels in callback.labels.items():
        assert labels.dtype == torch.int64
        assert labels.shape[0] == model.get_submodule(name.removeprefix("model.")).out_channels


def test_drop_prob_is_zero_until_the_first_labels_and_then_rises_linearly(loader):
    callback, used = make_callback(drop_prob=0.8), []
    make_trainer(callback, At(lambda *_: used.append(callback.drop_prob_now))).fit(Classifier(), loader)
    assert used[:6] == [0.0] * 6
    assert used[6:] == pytest.approx([0.8 * (step - 4) / 12 for step in range(6, 16)])
    assert callback.drop_prob_now == 0.0


def test_whole_clusters_are_dropped_together(loader):
    callback, outputs, model = make_callback("conv1", start=0.0, schedule="constant"), [], tiny_resnet()

    class Watch(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            model.conv1.register_forward_hook(lambda m, a, out: outputs.append(out.detach().clone()))

    make_trainer(callback, Watch(), max_epochs=2).fit(Classifier(model), loader)
    labels = callback.labels["model.conv1"]
    for sample in outputs[-1]:
        for features, clusters in zip(sample, labels, strict=True):
            for cluster in clusters.unique():
                assert (features[clusters == cluster] == 0).float().mean() in (0.0, 1.0)
    assert 0.3 < (outputs[-1] == 0).float().mean() < 0.7


def test_eval_output_is_that_of_a_model_which_never_had_the_callback(loader):
    module = Classifier()
    make_trainer(make_callback()).fit(module, loader)
    plain = tiny_resnet()
    plain.load_state_dict(module.model.state_dict(), strict=True)
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(module.model.eval()(x), plain.eval()(x))


def test_training_before_the_first_labels_is_bit_identical_to_plain_training(loader):
    plain, gathered = Classifier(), Classifier()
    make_trainer(max_epochs=1).fit(plain, loader)
    with pytest.warns(UserWarning, match="ended before num_samples=10000 samples of one size were gathered"):
        make_trainer(make_callback(num_samples=10_000, start=0.0), max_epochs=1).fit(gathered, loader)
    assert plain.losses == gathered.losses
    assert equal(plain.state_dict(), gathered.state_dict())


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["training_step", "clusterer", "logger", "backward", None])
def test_nothing_is_left_attached(loader, error, where, monkeypatch):
    def fail(*args, **kwargs):
        raise error("on purpose")

    module, callback = Classifier(), make_callback()
    before = count_hooks(module)
    callbacks = [callback]
    if where == "training_step":
        callbacks.append(At(fail))
    elif where == "clusterer":
        monkeypatch.setattr("lightning_dropcluster.learning.reclustering._cluster", fail)
    elif where == "logger":
        monkeypatch.setattr(Classifier, "log_dict", fail)
    elif where == "backward":
        monkeypatch.setattr(Classifier, "backward", fail)
    if where is None:
        make_trainer(*callbacks).fit(module, loader)
    else:
        with pytest.raises((error, SystemExit)):
            make_trainer(*callbacks).fit(module, loader)
    assert count_hooks(module) == before


def test_only_training_drops(loader):
    """Not even where the model stays in training mode while it is validated."""

    class TrainModeEverywhere(Classifier):
        def __init__(self):
            super().__init__()
            self.kept = []
            self.model.conv1.register_forward_hook(self.look)

        def on_validation_model_eval(self):
            self.model.train()

        on_test_model_eval = on_predict_model_eval = on_validation_model_eval

        def look(self, module, args, output):
            self.kept.append((self.trainer.state.stage, output))

        def forward(self, x):
            return self.model(x)

    module = TrainModeEverywhere()
    callback = make_callback("conv1", start=0, schedule="constant", num_samples=8)
    zeros = {}

    class Look(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            module.model.conv1.register_forward_hook(
                lambda m, a, out: zeros.setdefault(trainer.state.stage.value, []).append(
                    (out == 0).any().item()
                )
            )

    trainer = make_trainer(callback, Look(), max_epochs=2)
    trainer.fit(module, loader, loader)
    trainer.test(module, loader, verbose=False)
    trainer.predict(module, loader)
    stages = {stage: any(found) for stage, found in zeros.items()}
    assert stages.pop("train")
    assert len(stages) == 4
    assert not any(stages.values())


def test_two_instances_work_side_by_side(loader, tmp_path):
    first, second = make_callback("conv1"), make_callback("layer2.*.conv2", scope="channel")
    trainer = make_trainer(first, second, default_root_dir=tmp_path)
    trainer.fit(Classifier(), loader)
    assert set(first.labels).isdisjoint(second.labels)
    assert first.state_key != second.state_key
    assert {"dropcluster/drop_prob", "dropcluster-1/drop_prob"} <= trainer.callback_metrics.keys()
    trainer.save_checkpoint(tmp_path / "both.ckpt")


def test_layer_types_tell_two_instances_with_one_pattern_apart(loader, tmp_path):
    convs, activations = make_callback("layer1.**"), make_callback("layer1.**", layer_types=nn.ReLU)
    trainer = make_trainer(convs, activations)
    trainer.fit(Classifier(), loader)
    assert convs.labels
    assert activations.labels
    trainer.save_checkpoint(tmp_path / "both.ckpt")
    again = make_callback("layer1.**", layer_types=[nn.ReLU])
    with pytest.warns(UserWarning, match="Be aware that when using `ckpt_path`"):
        make_trainer(again, max_epochs=5).fit(Classifier(), loader, ckpt_path=tmp_path / "both.ckpt")
    assert again.labels.keys() == activations.labels.keys()


def test_a_copy_taken_in_mid_training_goes_on_by_itself(loader):
    callback, copies = make_callback(start=0.0), []
    make_trainer(callback, At(lambda *_: copies.append(copy.deepcopy((callback, module))))).fit(
        module := Classifier(), loader
    )
    assert count_hooks(module) == 0
    twin, model = copies[9]
    twin.detach()
    make_trainer(twin).fit(model, loader)
    assert twin.labels.keys() == callback.labels.keys()


def test_a_second_fit_starts_afresh_and_a_continued_one_goes_on(loader):
    callback, module = make_callback(), Classifier()
    trainer = make_trainer(callback, max_epochs=2)
    trainer.fit(module, loader)
    labels = callback.labels
    trainer.fit_loop.max_epochs = 3
    first = []
    trainer.callbacks.append(At(lambda *_: first.append(callback.labels)))
    trainer.fit(module, loader)
    assert equal(first[0], labels)
    seen = []
    make_trainer(callback, At(lambda *_: seen.append(callback.labels)), max_epochs=2).fit(
        Classifier(), loader
    )
    assert seen[0] == {}
    assert callback.labels


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"limit_train_batches": 0}, {"max_epochs": 0}])
def test_runs_that_hardly_train(loader, options):
    module = Classifier()
    make_trainer(make_callback(), **options).fit(module, loader, loader)
    assert count_hooks(module) == count_hooks(Classifier())


@pytest.mark.parametrize("namespace", ["pytorch_lightning", "lightning.pytorch"])
def test_both_namespaces(loader, namespace):
    lightning = pytest.importorskip(namespace)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.losses = tiny_resnet(), []

        training_step = Classifier.training_step
        configure_optimizers = Classifier.configure_optimizers

    callback = make_callback()
    assert isinstance(callback, lightning.Callback)
    lightning.Trainer(
        max_epochs=2,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    ).fit(Module(), loader)
    assert callback.labels


@pytest.mark.parametrize("moment", ["before fit", "configure_model", "after validate", "in place"])
def test_compiled_models_compile_four_times_and_never_break(loader, moment):
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()

    class Compiled(Classifier):
        def configure_model(self):
            if moment == "configure_model" and not hasattr(self.model, "_orig_mod"):
                self.model = torch.compile(self.model, backend=counter, fullgraph=True)

    torch._dynamo.reset()
    module = Compiled(two_convs())
    callback = make_callback("[01].0", every_n_epochs=1)
    if moment in ("before fit", "after validate"):
        module.model = torch.compile(module.model, backend=counter, fullgraph=True)
    elif moment == "in place":
        module.model.compile(backend=counter, fullgraph=True)
    trainer = make_trainer(callback)
    if moment == "after validate":
        module.model(next(iter(loader))[0])
        trainer.validate(module, loader, verbose=False)
        counter.clear()
    trainer.fit(module, loader)
    assert len(callback.labels) == 2
    assert counter.frame_count == 4  # idle, gathering, dropping, and clean steps in between


def test_a_model_that_runs_twice_in_a_step_compiles_once_more():
    from torch._dynamo.testing import CompileCounter

    class Twice(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + super().training_step(batch, batch_idx)

    torch._dynamo.reset()
    counter, module = CompileCounter(), Twice(two_convs())
    module.model = torch.compile(module.model, backend=counter, fullgraph=True)
    make_trainer(make_callback("[01].0", every_n_epochs=1)).fit(module, make_loader())
    assert counter.frame_count == 5  # what is gathered is the first pass alone


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_resumed_run_equals_one_that_was_never_interrupted(loader, tmp_path, momentum):
    paths = {}

    def save(trainer, module):
        step = trainer.global_step
        if step in (3, 4, 6, 8, 11, 12):
            paths[step] = tmp_path / f"{step}.ckpt"
            trainer.save_checkpoint(paths[step])
            paths[step, "rng"] = torch.get_rng_state()

    class Restore(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            torch.set_rng_state(paths[step, "rng"])

    loader = ResumableLoader(loader)
    options = {"num_samples": 20, "sketch_dim": 8, "sketch_momentum": momentum}
    whole, whole_callback = Classifier(), make_callback(**options)
    make_trainer(whole_callback, At(save)).fit(whole, loader)
    for step in [key for key in paths if isinstance(key, int)]:
        resumed, callback = Classifier(), make_callback(**options)
        make_trainer(callback, Restore()).fit(resumed, loader, ckpt_path=paths[step])
        assert equal(callback.labels, whole_callback.labels)
        assert equal(resumed.state_dict(), whole.state_dict()), step


def test_checkpoints_load_safely_and_into_plain_timm(loader, tmp_path):
    trainer = make_trainer(make_callback(num_samples=10_000))
    module = Classifier()
    with pytest.warns(UserWarning, match="nothing was dropped"):
        trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    weights = {k.removeprefix("model."): v for k, v in state["state_dict"].items()}
    tiny_resnet().load_state_dict(weights, strict=True)


def test_not_a_number_keeps_the_old_labels_and_warns(loader):
    seen = []

    class Poisoned(Classifier):
        def training_step(self, batch, batch_idx):
            if self.current_epoch == 2:
                with torch.no_grad():
                    self.model.conv1(batch[0] * float("nan"))
                self.model.eval()
            loss = super().training_step(batch, batch_idx)
            self.model.train()
            return loss

    callback = make_callback("conv1", num_samples=8)
    trainer = make_trainer(callback, At(lambda t, _: seen.append((t.current_epoch, callback.labels))))
    with pytest.warns(UserWarning, match=r"layer 'model\.conv1' were NaN, infinite or huge"):
        trainer.fit(Poisoned(), loader)
    by_epoch = dict(seen)
    assert equal(by_epoch[1], by_epoch[2])
    assert not equal(by_epoch[2], by_epoch[3])


def test_a_layer_that_never_runs_is_an_error_that_names_it(loader):
    class Idle(Classifier):
        def __init__(self):
            super().__init__()
            self.model.idle = nn.Conv2d(3, 3, 1)

    for layers in ("idle", ["conv1", "idle"]):
        module = Idle()
        before = count_hooks(module)
        with pytest.raises(RuntimeError, match=r"'model\.idle' did not run"):
            make_trainer(make_callback(layers, start=0.0)).fit(module, loader)
        assert count_hooks(module) == before


def test_labels_come_with_the_step_that_fills_the_window(loader):
    callback, seen = make_callback(start=0.0, num_samples=8), []
    make_trainer(callback, At(lambda *_: seen.append(bool(callback.labels))), max_epochs=1).fit(
        Classifier(), loader
    )
    assert seen.index(True) == 1  # the first batch only shows the layers' shapes


def test_steps_between_reclusterings_count_optimiser_steps(loader):
    callback, opened = make_callback(start=0.0, every_n_epochs=None, every_n_train_steps=2, num_samples=8), []
    trainer = make_trainer(
        callback,
        At(lambda *_: opened.append(callback.state_dict()["windows_opened"])),
        accumulate_grad_batches=2,
    )
    trainer.fit(Classifier(), loader)
    assert opened == [1 + i // 4 for i in range(16)]


def test_zero_means_never_again(loader):
    callback, seen = make_callback(every_n_epochs=0), []
    make_trainer(callback, At(lambda *_: seen.append(callback.labels))).fit(Classifier(), loader)
    assert equal(seen[6], seen[-1])


def test_what_is_logged(loader, tmp_path):
    trainer = make_trainer(make_callback("conv1"), logger=CSVLogger(tmp_path), log_every_n_steps=1)
    trainer.fit(Classifier(), loader)
    logged = (next(tmp_path.glob("**/metrics.csv"))).read_text().splitlines()[0].split(",")
    reported = ("num_clusters", "cluster_size", "concentration", "largest_share", "agreement")
    keys = {f"dropcluster/model.conv1/{name}" for name in reported}
    assert keys | {"dropcluster/drop_prob"} <= set(logged)
    metrics = trainer.callback_metrics
    clusters = (
        metrics["dropcluster/model.conv1/num_clusters"] * metrics["dropcluster/model.conv1/cluster_size"]
    )
    assert clusters == 16 * 16
    assert 0.0 < metrics["dropcluster/model.conv1/agreement"] <= 1.0
    # A bound of 4 times the mean size, of 16 in 256 features, unless dead ones joined.
    share, concentration = (
        metrics[f"dropcluster/model.conv1/{k}"] for k in ("largest_share", "concentration")
    )
    assert concentration <= share <= 4 / 16


def test_each_reclustering_is_logged_with_its_step(loader, tmp_path):
    callback = make_callback("conv1", start=0.0, every_n_epochs=None, every_n_train_steps=2)
    seen, switched = [], []

    def look(trainer, module):
        labels = callback.labels.get("model.conv1")
        if labels is not None and not (seen and torch.equal(labels, seen[-1])):
            seen.append(labels)
            switched.append(trainer.global_step - 1)

    trainer = make_trainer(callback, At(look), max_epochs=2, logger=CSVLogger(tmp_path), log_every_n_steps=50)
    trainer.fit(Classifier(), loader)
    with next(tmp_path.glob("**/metrics.csv")).open() as file:
        steps = [
            int(row["step"]) for row in csv.DictReader(file) if row["dropcluster/model.conv1/num_clusters"]
        ]
    assert len(steps) > 2
    assert steps == switched


def test_copies_and_pickles_of_an_attached_module_work_and_do_not_drop(loader):
    copies = []

    def make_copies(trainer, module):
        if trainer.global_step == 10:
            module._trainer = None
            copies.extend([copy.deepcopy(module), pickle.loads(pickle.dumps(module))])
            module._trainer = trainer

    module = Classifier()
    make_trainer(make_callback(start=0.0, schedule="constant"), At(make_copies)).fit(module, loader)
    x = torch.randn(2, 3, 32, 32)
    for copied in copies:
        assert copied.state_dict().keys() == module.state_dict().keys()
        copied.train()
        plain = tiny_resnet().train()
        plain.load_state_dict(copied.model.state_dict())
        assert torch.equal(copied.model(x), plain(x))


def test_initial_labels_take_the_place_of_the_first_clustering(loader, tmp_path):
    donor = make_callback()
    trainer = make_trainer(donor)
    trainer.fit(Classifier(), loader)
    trainer.save_checkpoint(tmp_path / "donor.ckpt")
    for source in (donor.labels, str(tmp_path / "donor.ckpt"), tmp_path / "donor.ckpt"):
        callback, used = make_callback(initial_labels=source, every_n_epochs=0), []
        make_trainer(callback, At(lambda *_, c=callback, u=used: u.append(c.drop_prob_now))).fit(
            Classifier(), loader
        )
        assert equal(callback.labels, donor.labels)
        assert callback.state_dict()["windows_opened"] == 0
        assert used[3] == 0.0
        assert used[5] > 0.0


@pytest.mark.parametrize(("missing", "opened"), [(False, [0, 0, 1, 2]), (True, [0, 1, 2, 3])])
def test_a_window_opens_at_the_start_only_where_a_layer_has_no_labels(loader, missing, opened):
    donor = make_callback()
    make_trainer(donor).fit(Classifier(), loader)
    labels = dict(list(donor.labels.items())[missing:])
    callback, seen = make_callback(initial_labels=labels), {}
    look = At(
        lambda trainer, _: seen.update({trainer.current_epoch: callback.state_dict()["windows_opened"]})
    )
    make_trainer(callback, look).fit(Classifier(), loader)
    assert list(seen.values()) == opened


def test_inputs_of_changing_size(loader):
    sizes = [make_loader(16, 8, size) for size in (32, 48, 32, 64)]

    class Growing(Classifier):
        def train_dataloader(self):
            return sizes[self.current_epoch]

    callback = make_callback("conv1", start=0.0, num_samples=8)
    make_trainer(callback, reload_dataloaders_every_n_epochs=1).fit(Growing())
    assert callback.labels["model.conv1"].shape[1:] == (32, 32)


def test_activation_checkpointing_gathers_once_and_changes_nothing(loader):
    results = []
    for checkpointing in (False, True):
        module, callback = Classifier(), make_callback(num_samples=10)
        module.model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(3)
        make_trainer(callback).fit(module, loader)
        results.append((callback.labels, module.state_dict()))
    (labels, weights), (labels_again, weights_again) = results
    assert equal(labels, labels_again)
    # BatchNorm sees a checkpointed block twice, so only what is learned can be equal.
    assert all(
        torch.allclose(weights[k], weights_again[k])
        for k in weights
        if "running" not in k and "num_b" not in k
    )


def test_a_layer_that_never_ran_is_the_reason_where_training_is_shorter_than_an_epoch(loader):
    class Idle(Classifier):
        def __init__(self):
            super().__init__()
            self.model.idle = nn.Conv2d(3, 3, 1)

    with pytest.warns(UserWarning, match=r"no clusters were made .*'model\.idle' did not run"):
        make_trainer(make_callback("idle", start=0.0), max_epochs=-1, max_steps=2).fit(Idle(), loader)


def test_the_statistics_epoch_of_weight_averaging_does_not_drop(loader):
    callback, used = make_callback(start=0.0), []
    swa = pl.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)
    record = At(lambda trainer, _: used.append((trainer.current_epoch, callback.drop_prob_now)))
    make_trainer(swa, callback, record).fit(Classifier(), loader)
    by_epoch = dict(used)
    assert by_epoch[3] > 0.0
    assert by_epoch[4] == 0.0


def test_the_ramp_ends_where_training_ends_and_not_with_the_statistics_epoch(loader):
    def used(*others):
        found, callback = [], make_callback(start=0.0)
        record = At(lambda trainer, _: found.append(callback.drop_prob_now))
        make_trainer(*others, callback, record).fit(Classifier(), loader)
        return found

    alone = used()
    swa = pl.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)
    assert used(swa)[: len(alone)] == alone


def test_a_skipped_epoch_does_not_go_on_dropping(loader):
    class Skips(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None

        def on_train_epoch_end(self):
            seen.append(self.model.conv1(torch.ones(4, 3, 32, 32)))

    seen, callback = [], make_callback("conv1", start=0.0, schedule="constant")
    make_trainer(callback).fit(Skips(), loader)
    assert callback.labels
    assert not any((x == 0).any() for x in seen)


def test_validating_with_the_same_callback_in_the_midst_of_a_fit_leaves_the_hooks_on(loader):
    def validate(trainer, module):
        if trainer.global_step == 8:
            make_trainer(callback).validate(copy.deepcopy(module), loader, verbose=False)
        counts.append(count_hooks(module))

    callback, counts = make_callback("conv1"), []
    make_trainer(callback, At(validate)).fit(Classifier(), loader)
    assert set(counts) == {1}


def test_a_state_loaded_by_hand_gives_the_clusters_and_a_schedule_from_the_beginning(loader):
    first, second = make_callback(), make_callback()
    make_trainer(first).fit(Classifier(), loader)
    second.load_state_dict(first.state_dict())
    assert equal(second.labels, first.labels)
    used = []
    make_trainer(second, At(lambda *_: used.append(second.drop_prob_now))).fit(Classifier(), loader)
    assert used[0] == 0.0
    assert used == sorted(used)
    assert second._layers.windows_opened > first._layers.windows_opened
    assert not equal(second.labels, first.labels)


def test_a_callback_that_another_one_calls(loader):
    callback, outer = make_callback(), pl.Callback()
    for moment in ("fit_start", "train_start", "train_batch_start", "train_batch_end", "train_end"):
        setattr(outer, f"on_{moment}", getattr(callback, f"on_{moment}"))
    outer.setup, outer.teardown = callback.setup, callback.teardown
    make_trainer(outer).fit(Classifier(), loader)
    assert callback.labels


def test_macos_gets_the_clusterer_without_a_second_openmp(monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    assert isinstance(DropCluster("conv1")._layers.clusterer, TorchKMeans)


def test_layers_in_eval_mode_are_warned_of_and_left_alone(loader):
    class Frozen(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            self.model.conv1.eval()

    class Before(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.model.conv1.eval()

    callback = make_callback(["conv1", "layer1.0.conv1"], start=0.0)
    with (
        pytest.warns(UserWarning, match=r"layers model\.conv1 are in eval mode"),
        pytest.warns(UserWarning, match=r"layer 'model\.conv1' was not gathered"),
    ):
        make_trainer(Before(), callback).fit(Frozen(), loader)
    assert list(callback.labels) == ["model.layer1.0.conv1"]


def test_layers_put_into_eval_mode_after_the_last_reclustering_are_warned_of(loader):
    def freeze(trainer, module):
        module.model.conv1.train(trainer.global_step < 6)

    callback = make_callback("conv1", start=0.0, every_n_epochs=0)
    with pytest.warns(UserWarning, match=r"layers model\.conv1 are in eval mode"):
        make_trainer(callback, At(freeze)).fit(Classifier(), loader)


@pytest.mark.parametrize(
    ("scope", "options"),
    [
        (scope, options)
        for scope in ("map", "position", "layer", "channel")
        for options in ({}, {"num_clusters": 2}, {"per_sample": False})
    ]
    + [(scope, {"position_weight": 0.5}) for scope in ("map", "position", "layer")],
)
def test_scopes(loader, scope, options):
    callback = make_callback("conv1", scope=scope, clusterer=TorchKMeans(), **options)
    make_trainer(callback, max_epochs=2).fit(Classifier(), loader)
    labels = callback.labels["model.conv1"]
    assert labels.shape == (64, 16, 16)
    if scope == "position":
        assert (labels == labels[:1]).all()
    if scope == "channel":
        assert (labels == labels[:, :1, :1]).all()
    if "num_clusters" in options:
        assert labels.max() == 1


class Signal(nn.Module):
    def __init__(self, conv, size):
        super().__init__()
        self.conv, self.size = conv, size

    def forward(self, x):
        return self.conv(x.flatten(1)[:, :64].reshape(len(x), 1, *self.size)).flatten(2).mean(2)


def test_one_and_three_dimensional_convs():
    for conv, size in ((nn.Conv1d(1, 4, 3), (64,)), (nn.Conv3d(1, 4, 3, padding=1), (4, 4, 4))):
        callback = make_callback("conv", start=0.0, num_samples=8)
        make_trainer(callback, max_epochs=2).fit(Classifier(Signal(conv, size)), make_loader())
        assert callback.labels["model.conv"].ndim == len(size) + 1


def test_a_clusterer_that_does_not_take_volumes_is_refused_before_training():
    class OfMaps(TorchKMeans):
        def fit(self, profiles, num_clusters, init_labels=None, grid=None):
            if len(grid) > 2:
                raise ValueError("no volumes")
            return super().fit(profiles, num_clusters, init_labels, grid)

    model = Classifier(Signal(nn.Conv3d(1, 4, 3, padding=1), (4, 4, 4)))
    trainer = make_trainer(make_callback("conv", clusterer=OfMaps()))
    with pytest.raises(ValueError, match="no volumes"):
        trainer.fit(model, make_loader())
    assert trainer.global_step == 0


def test_detection_like_models_call_a_layer_many_times(loader):
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x):
            return sum(self.head(x[..., ::step, ::step]).mean((2, 3)) for step in (1, 2, 4))

    callback = make_callback("head", start=0.0, num_samples=8)
    make_trainer(callback, max_epochs=2).fit(Classifier(Pyramid()), loader)
    assert callback.labels["model.head"].shape == (4, 32, 32)


class SharedActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3)])
        self.act = nn.ReLU()

    def forward(self, x):
        for conv in self.convs:
            x = self.act(conv(x))
        return x.mean((2, 3))


def test_a_layer_that_sees_several_numbers_of_channels_is_refused_in_the_first_step(loader):
    callback = make_callback("act", layer_types=nn.ReLU)
    trainer = make_trainer(callback, max_epochs=2)
    with pytest.raises(ValueError, match=r"'model\.act' is called .* with 4 and with 6 channels"):
        trainer.fit(Classifier(SharedActivation()), loader)
    assert trainer.global_step == 1


def test_positions_are_alike_in_all_channels_of_all_calls(loader):
    callback = make_callback("act", layer_types=nn.ReLU, scope="position")
    make_trainer(callback, max_epochs=2).fit(Classifier(SharedActivation()), loader)
    assert callback.labels["model.act"].shape == (4, 30, 30)


def test_sampling_drops_at_test_time_and_leaves_nothing(loader):
    callback, module = make_callback("conv1"), Classifier()
    make_trainer(callback).fit(module, loader)
    x, hooks = torch.randn(4, 3, 32, 32), count_hooks(module)
    for model in (module.eval(), module.model, copy.deepcopy(module)):
        plain = model(x)
        with callback.sampling(model) as sampled:
            first, second = sampled(x), sampled(x)
        assert not torch.equal(first, second)
        assert torch.equal(model(x), plain)
    with callback.sampling(module, drop_prob=0.0):
        assert torch.equal(module(x), module.model(x))
    with pytest.raises(Boom), callback.sampling(module):
        raise Boom
    assert count_hooks(module) == hooks
    same = torch.randn(1, 3, 32, 32).expand(8, -1, -1, -1)
    with callback.sampling(module):
        assert len(module(same)[:, 0].unique()) > 1


def test_sampling_runs_eagerly_and_leaves_compiled_code_alone(loader):
    def backend(graph, _inputs):
        compiled.append(1)
        return graph.forward

    callback, module, compiled = make_callback(), Classifier(), []
    make_trainer(callback, max_epochs=2).fit(module, loader)
    torch._dynamo.reset()
    x, network = torch.randn(2, 3, 32, 32), torch.compile(module.model.eval(), backend=backend)
    expected = network(x)
    with callback.sampling(module):
        assert not torch.allclose(network(x), expected)
    assert torch.equal(network(x), expected)
    assert len(compiled) == 1


def test_sampling_follows_the_model_to_its_device_also_from_layers_without_weights(loader):
    callback, module = make_callback("act1", layer_types=nn.Module), Classifier()
    make_trainer(callback, max_epochs=2).fit(module, loader)
    with callback.sampling(module.eval().to("meta")) as elsewhere:
        assert elsewhere(torch.empty(2, 3, 32, 32, device="meta")).device.type == "meta"


def test_sampling_needs_clusters_and_their_layers(loader):
    with pytest.raises(ValueError, match="there are no clusters yet"), make_callback().sampling(Classifier()):
        pass
    callback = make_callback("conv1")
    make_trainer(callback).fit(Classifier(), loader)
    with (
        pytest.raises(ValueError, match=r"no layer 'model\.conv1' in Linear"),
        callback.sampling(nn.Linear(1, 1)),
    ):
        pass
    with pytest.raises(ValueError, match=r"drop_prob=1: must be a number in \[0, 1\)"):
        callback.sampling(Classifier(), 1).__enter__()


@pytest.mark.parametrize(
    "error", [MemoryError("no"), RuntimeError("CUDA out of memory"), torch.OutOfMemoryError()]
)
def test_training_goes_on_where_reclustering_runs_out_of_memory(loader, error, monkeypatch):
    def fail(*args):
        raise error

    callback, seen = make_callback(), []

    def look(trainer, module):
        seen.append(callback.labels)
        if trainer.global_step == 8:
            monkeypatch.setattr("lightning_dropcluster.learning.reclustering._cluster", fail)

    with pytest.warns(UserWarning, match="out of memory in reclustering; the old labels stay"):
        make_trainer(callback, At(look)).fit(Classifier(), loader)
    assert equal(seen[7], seen[-1])
    assert seen[7]


@pytest.mark.parametrize("watched", [None, "by a hook", "by a global hook"])
def test_a_convs_own_output_is_overwritten_only_where_no_other_hook_sees_it(loader, watched):
    pointers, module, callback = set(), Classifier(), make_callback("conv1", start=0.0)

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            drop = callback._layers.hooks["model.conv1"].regularizer
            if drop is not None and callback.labels:
                pointers.add(drop.inplace)

    register = {
        "by a hook": module.model.conv1.register_forward_hook,
        "by a global hook": register_module_forward_hook,
    }
    handle = register[watched](lambda module, args, output: None) if watched else nullcontext()
    with handle:
        make_trainer(callback, Watch()).fit(module, loader)
    assert pointers == {not watched}


def test_an_input_that_a_layer_hands_on_is_not_written_into(loader):
    """As of a conv that somebody has switched off by another forward."""

    class Skips(Classifier):
        def __init__(self):
            super().__init__(nn.ModuleList([nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)]))
            self.model[1].forward = lambda x: x
            self.changed = []

        def training_step(self, batch, batch_idx):
            x = self.model[0](batch[0])
            before = x.detach().clone()
            both = x + self.model[1](x)
            self.changed.append(not torch.equal(x, before))
            return nn.functional.cross_entropy(self.model[2](both.mean((2, 3))), batch[1])

    module = Skips()
    make_trainer(make_callback("model.1", start=0.0, schedule="constant")).fit(module, loader)
    assert not any(module.changed)


def test_a_compiled_fit_gives_the_numbers_of_an_eager_one(loader):
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        module, callback = Classifier(two_convs()), make_callback("[01].0")
        if compiled:  # the backend draws from torch's generator, as eager code does
            module.model.compile(backend="eager", fullgraph=True)
        torch.manual_seed(5)
        make_trainer(callback).fit(module, loader)
        results.append((module.losses, callback.labels))
    (losses, labels), (losses_again, labels_again) = results
    assert losses_again == pytest.approx(losses, abs=1e-5)
    assert equal(labels, labels_again)


def test_initial_labels_with_too_few_dimensions_are_an_error_at_the_start(loader):
    callback = DropCluster("conv1", initial_labels={"model.conv1": torch.zeros(64, 256, dtype=torch.long)})
    with pytest.raises(ValueError, match=r"'model.conv1' are for .*\(64, 256\).* 3 dimensions"):
        make_trainer(callback).fit(Classifier(), loader)


def test_initial_labels_count_where_the_trainer_has_trained_before(loader):
    labels = {"model.conv1": torch.arange(16 * 16).view(1, 16, 16).expand(64, -1, -1) // 4}
    callback = DropCluster("conv1", initial_labels=labels, every_n_epochs=0)
    trainer, module = make_trainer(max_epochs=1), Classifier()
    trainer.fit(module, loader)
    trainer.callbacks.append(callback)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader)
    assert torch.equal(callback.labels["model.conv1"].long(), labels["model.conv1"])


def test_a_callback_that_is_kept_keeps_no_model(loader):
    callback, module = make_callback(), Classifier()
    make_trainer(callback).fit(module, loader)
    model = weakref.ref(module)
    del module
    gc.collect()
    assert model() is None


def test_a_state_stays_as_it_was_while_training_goes_on(loader):
    states, counts, callback = [], [], make_callback(num_samples=64)

    def count(state):
        return [int(entry["count"]) for entry in state.values()]

    def act(*_):
        if state := callback.state_dict()["window"]:
            states.append(state)
            counts.append(count(state))

    make_trainer(callback, At(act), max_epochs=8).fit(Classifier(), loader)
    assert len(states) > 2
    assert [count(state) for state in states] == counts


def test_a_state_loaded_by_hand_waits_through_a_validation(loader):
    module, before = Classifier(), DropCluster("layer1", start=0, num_samples=8, cluster_size=4)
    make_trainer(before).fit(module, loader)
    after, seen = DropCluster("layer1", start=0.5, num_samples=8, cluster_size=4), []
    after.load_state_dict(before.state_dict())
    trainer = make_trainer(after, At(lambda *_: seen.append(list(after.labels))))
    trainer.validate(module, loader, verbose=False)
    trainer.fit(module, loader)
    assert seen[0] == ["model.layer1"]
