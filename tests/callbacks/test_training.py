"""What real training does to a callback: precisions, averaged weights, tuners, odd lengths, workers."""

import math
import subprocess
import sys
import warnings

import pytest
import pytorch_lightning as pl
import torch
from fits import At, Classifier, count_hooks, make_loader, make_trainer
from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from pytorch_lightning.tuner import Tuner
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lightning_dropcluster import DropCluster, Dropout, StructuredDropout
from lightning_dropcluster.callbacks import training
from lightning_dropcluster.clustering import adjusted_rand_index
from lightning_dropcluster.learning import scopes

NAME = "model.conv"


class Small(nn.Module):
    """A conv net that keeps what its hooked layer gave to the next one in training."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.training:
            self.seen.append(x.detach())
        return self.head(F.relu(x).mean((2, 3)))


class Tunable(Classifier):
    """A classifier for Lightning's tuners."""

    def __init__(self) -> None:
        super().__init__(Small())
        self.lr, self.batch_size = 0.01, 4

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> DataLoader:
        return make_loader(32, self.batch_size, 16)

    val_dataloader = train_dataloader


class Frozen(Classifier):
    """A classifier that never changes."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Endless(IterableDataset):
    """Batches of a loader, without a length."""

    def __init__(self, num_batches: int) -> None:
        self.num_batches = num_batches

    def __iter__(self):
        for batch in list(make_loader(32, 8, 16)) * (self.num_batches // 4):
            yield tuple(batch)


def make_callback(layers="conv", drop_prob=0.5, **options) -> DropCluster:
    return DropCluster(
        layers, drop_prob, **({"start": 0.25, "every_n_epochs": 1, "num_samples": 8} | options)
    )


def share_of_zeros(x: Tensor) -> float:
    return (x == 0).double().mean().item()


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def drop_probs(callback: DropCluster, loader, **options) -> list[float]:
    """Fit and return what each step used."""
    used: list[float] = []
    record = At(lambda *_: used.append(callback.drop_prob_now))
    make_trainer(callback, record, **options).fit(Classifier(Small()), loader)
    return used


@pytest.fixture
def loader() -> DataLoader:
    return make_loader(32, 8, 16)


# Precision and layout

no_cuda = not torch.cuda.is_available()
PRECISIONS = [
    pytest.param("bf16-mixed", torch.bfloat16, 0.5, id="bf16-mixed"),
    pytest.param("bf16-true", torch.bfloat16, 0.5, id="bf16-true"),
    pytest.param("64-true", torch.float64, 0.99, id="64-true"),
    pytest.param(
        "16-mixed",
        torch.float16,
        0.5,
        id="16-mixed",
        marks=[pytest.mark.gpu, pytest.mark.skipif(no_cuda, reason="16-mixed needs CUDA")],
    ),
]


@pytest.mark.parametrize(("precision", "dtype", "likeness"), PRECISIONS)
def test_precisions(loader, precision, dtype, likeness):
    runs = {}
    for name in ("32-true", precision):
        module, sketched = Frozen(Small()), set()
        callback = make_callback(num_samples=12, schedule="constant", every_n_epochs=0)

        def look(trainer, module, callback=callback, sketched=sketched):
            for hook in callback._layers.hooks.values():
                if hook.sketch is not None:
                    sketched |= {b.dtype for b in hook.sketch.buffers() if b.is_floating_point()}

        accelerator = "gpu" if dtype is torch.float16 else "cpu"
        make_trainer(callback, At(look), precision=name, accelerator=accelerator).fit(module, loader)
        assert sketched == {torch.float32}
        runs[name] = callback.labels[NAME], module
    (labels, plain), (labels_there, module) = runs.values()
    assert {x.dtype for x in module.model.seen} == {dtype}
    assert adjusted_rand_index(labels_there.flatten(1), labels.flatten(1)) > likeness
    # Before the first labels, and then on the average over what is drawn.
    assert module.losses[:5] == pytest.approx(plain.losses[:5], rel=0.02)
    assert sum(module.losses) == pytest.approx(sum(plain.losses), rel=0.05)
    dropped = torch.tensor([share_of_zeros(x) for x in module.model.seen[6:]])
    assert dropped.mean() == pytest.approx(0.5, abs=0.05)


def test_small_probabilities_in_half_precision(loader):
    """A draw in bfloat16 has steps of 1/256, and would drop 0.4 % where 0.01 % is asked for."""
    callback, module = make_callback(drop_prob=1e-4, start=0.0, schedule="constant"), Frozen(Small())
    make_trainer(callback, precision="bf16-true", max_epochs=8).fit(module, loader)
    assert sum(share_of_zeros(x) for x in module.model.seen[2:]) / len(module.model.seen) < 1e-3


def test_another_default_type(loader):
    module = Classifier(Small())
    callback = make_callback(start=0.0)
    torch.set_default_dtype(torch.float64)
    try:
        make_trainer(callback, max_epochs=2).fit(module, loader)
    finally:
        torch.set_default_dtype(torch.float32)
    assert callback.labels


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("scope", ["map", "channel"])
def test_channels_last_is_kept(loader, per_sample, scope):
    formats = []

    def look(x: Tensor) -> None:
        formats.append(x.is_contiguous(memory_format=torch.channels_last))

    class ChannelsLast(Classifier):
        def training_step(self, batch, batch_idx):
            x = self.model.conv(batch[0].contiguous(memory_format=torch.channels_last))
            x.register_hook(
                lambda grad: formats.append(grad.is_contiguous(memory_format=torch.channels_last))
            )
            formats.append(x.is_contiguous(memory_format=torch.channels_last))
            return F.cross_entropy(self.model.head(F.relu(x).mean((2, 3))), batch[1])

    module = ChannelsLast(Small().to(memory_format=torch.channels_last))
    callback = make_callback(start=0.0, per_sample=per_sample, scope=scope)
    make_trainer(callback, max_epochs=2).fit(module, loader)
    assert callback.labels
    assert len(formats) == 16
    assert all(formats)


# Optimisation


def test_accumulation_gathers_and_drops_in_every_batch(loader):
    runs = []
    for batches in (1, 4):
        module, callback = Frozen(Small()), make_callback(num_samples=20)
        torch.manual_seed(1)
        used = []
        make_trainer(
            callback,
            At(lambda *_, c=callback, u=used: u.append(c.drop_prob_now)),
            accumulate_grad_batches=batches,
        ).fit(module, loader)
        runs.append((used, callback.labels, module.model.seen))
    (used, labels, seen), (used_then, labels_then, seen_then) = runs
    assert used == used_then
    assert used[-1] > 0.0
    assert equal(labels, labels_then)
    assert all(torch.equal(x, y) for x, y in zip(seen, seen_then, strict=True))


class Adversaries(pl.LightningModule):
    """A GAN in small: the discriminator runs three times in a step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.discriminator, self.generator = Small(), nn.Sequential(nn.Conv2d(3, 3, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for_generator, for_discriminator = self.optimizers()
        real, fake = self.discriminator(batch[0]), self.generator(batch[0])
        loss = self.discriminator(fake.detach()).mean() - real.mean()
        for_discriminator.zero_grad()
        self.manual_backward(loss)
        for_discriminator.step()
        self.toggle_optimizer(for_generator)
        for_generator.zero_grad()
        self.manual_backward(-self.discriminator(fake).mean())
        for_generator.step()
        self.untoggle_optimizer(for_generator)

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.01) for part in (self.generator, self.discriminator)]


def test_two_optimisers_by_hand(loader):
    """Steps are those of all optimisers, as Lightning counts them: two in a batch."""
    module, counts = Adversaries(), []
    callback = make_callback(
        "discriminator.conv",
        start=0.0,
        num_samples=16,
        every_n_epochs=None,
        every_n_train_steps=12,
        schedule="constant",
    )

    def look(trainer, module):
        sketch = next(iter(callback._layers.hooks.values())).sketch
        counts.append(0 if sketch is None else int(sketch.count))

    make_trainer(callback, At(look), max_steps=32, max_epochs=-1).fit(module, loader)
    assert len(counts) == 16
    # Not in the first batch, which shows the shape; then once in a batch, and again after 12 steps.
    assert counts == [0, 8, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 8, 0, 0, 0]
    zeros = [x == 0 for x in module.discriminator.seen[9:]]
    for first, second, third in zip(zeros[::3], zeros[1::3], zeros[2::3], strict=True):
        assert not torch.equal(first, second)
        assert not torch.equal(second, third)
        assert first.any()
        assert second.any()
        assert third.any()


def test_the_clean_end_counts_batches_with_two_optimisers_too(loader):
    """The generator's graph runs backward after that of the discriminator, behind BatchNorm."""
    module, left = Adversaries(), []
    module.generator.append(nn.BatchNorm2d(3))

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            left.append(training.position(trainer, batch_idx).batches_left)

    dropping = StructuredDropout("discriminator.conv", Dropout(0.5))
    make_trainer(dropping, Look(), max_steps=12, max_epochs=-1).fit(module, loader)
    assert left[1:] == [5, 4, 3, 2, 1]


def test_the_clean_end_counts_the_short_last_step_of_an_epoch():
    left = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            left.append(training.position(trainer, batch_idx).batches_left)

    loader = make_loader(20, 4)  # five batches: a step of four, and one of one
    make_trainer(Look(), max_steps=4, accumulate_grad_batches=4).fit(Classifier(), loader)
    assert len(left) == 10
    assert left[0] == 10
    assert left[5] == 5


def test_several_callbacks_keep_to_themselves(tmp_path, loader):
    def make():
        return (
            make_callback("layer1.0.conv1", start=0.0, scope="channel", num_clusters=2),
            make_callback("layer1.0.conv2", start=1, scope="map", num_clusters=3),
            make_callback("conv1", start=0.75, scope="position", num_clusters=4),
        )

    callbacks, firsts = make(), [{}, {}, {}]

    def look(trainer, module):
        for callback, first in zip(callbacks, firsts, strict=True):
            if callback.labels:
                first.setdefault("batch", trainer.fit_loop.total_batch_idx)

    trainer = make_trainer(*callbacks, At(look))
    trainer.fit(Classifier(), loader)
    assert [first["batch"] for first in firsts] == [1, 4, 12]  # the first batch of all only shows the shapes
    assert [len(next(iter(c.labels.values())).unique()) for c in callbacks] == [2, 3, 4]
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    resumed = make()
    make_trainer(*resumed).fit(Classifier(), loader, ckpt_path=tmp_path / "three.ckpt")
    assert all(equal(a.labels, b.labels) for a, b in zip(callbacks, resumed, strict=True))


# Averaged weights


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize(
    "make_average",
    [
        WeightAveraging,
        lambda: EMAWeightAveraging(decay=0.5),
        lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2),
    ],
    ids=["WeightAveraging", "EMA", "SWA"],
)
def test_averaged_models_have_no_hooks_and_the_same_keys(loader, make_average, is_first):
    average, callback, hooks = make_average(), make_callback(start=0.0), []
    module = Classifier(Small())
    keys = list(module.state_dict())

    def averaged() -> nn.Module | None:
        model = average._average_model
        return getattr(model, "module", model)

    def look(trainer, module):
        hooks.append((count_hooks(module), count_hooks(averaged()) if averaged() is not None else 0))

    both = [callback, average] if is_first else [average, callback]
    make_trainer(*both, At(look)).fit(module, loader, loader)
    assert set(hooks) == {(1, 0)}
    assert callback.labels
    assert count_hooks(module) == 0
    assert list(module.state_dict()) == keys
    if averaged() is not None:
        assert list(averaged().state_dict()) == keys
        assert count_hooks(averaged()) == 0


# Tuners


@pytest.mark.parametrize(
    ("way", "has_labels"),
    [
        ("lr_find", False),
        ("lr_find", True),
        ("scale_batch_size", False),
        ("LearningRateFinder", False),
        ("LearningRateFinder", True),
        ("BatchSizeFinder", True),
    ],
)
def test_tuners(loader, way, has_labels, tmp_path):
    """They train in between, without the callback, and save and restore its state."""
    module, used, hooks = Tunable(), [], set()
    labels = {NAME: (torch.arange(256).reshape(1, 16, 16) // 16).repeat(8, 1, 1)} if has_labels else None
    callback = make_callback(initial_labels=labels)

    def look(trainer, module):
        hooks.add(count_hooks(module))
        used.append((bool(callback.labels), callback.drop_prob_now))

    others = {
        "LearningRateFinder": [LearningRateFinder(num_training_steps=20)],
        "BatchSizeFinder": [BatchSizeFinder(max_trials=2, steps_per_trial=1)],
    }.get(way, [])
    trainer = make_trainer(callback, *others, At(look), default_root_dir=tmp_path)
    if way == "lr_find":
        Tuner(trainer).lr_find(module, num_training=20)
    elif way == "scale_batch_size":
        Tuner(trainer).scale_batch_size(module, max_trials=2, steps_per_trial=1)
    assert count_hooks(module) == 0
    assert callback.drop_prob_now == 0.0
    # Nothing of what the tuner trained counts.
    assert callback.labels == {}
    trainer.fit(module)
    assert hooks == {1}
    assert count_hooks(module) == 0
    quarter = len(used) // 4
    assert [there for there, _ in used[:quarter]] == [has_labels] * quarter
    assert all(p == 0.0 for _, p in used[:quarter])
    assert used[-1][0]
    assert used[-1][1] > 0.3


def test_a_tuner_before_a_second_fit_leaves_it_a_fresh_one(tmp_path):
    callback, seen = make_callback(), []
    make_trainer(callback).fit(Tunable())
    tuner = LearningRateFinder(num_training_steps=20)
    look = At(lambda *_: seen.append(bool(callback.labels)))
    make_trainer(callback, tuner, look, default_root_dir=tmp_path).fit(Tunable())
    assert seen[:8] == [False] * 8
    assert seen[-1]


# How long training is


@pytest.mark.parametrize(
    ("options", "batches"),
    [
        ({"overfit_batches": 2}, 2),
        ({"limit_train_batches": 3}, 3),
        ({"limit_train_batches": 0.5}, 2),
        ({"limit_train_batches": 0.25}, 1),
    ],
)
@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_fewer_batches_are_a_shorter_training(loader, options, batches):
    used = drop_probs(make_callback(start=0.5), loader, max_epochs=8, **options)
    total = 8 * batches
    assert len(used) == total
    assert used[: total // 2] == [0.0] * (total // 2)
    ramp = [0.5 * (2 * step / total - 1) for step in range(total)]
    assert used[total // 2 + 1 :] == pytest.approx(ramp[total // 2 + 1 :])


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 20},
        {"max_steps": 20, "max_epochs": -1},
        {"max_steps": 20, "max_epochs": -1, "max_time": {"hours": 1}},
        {"max_steps": 20, "max_epochs": 100},
        {"max_epochs": 5, "max_steps": 1000},
    ],
    ids=str,
)
@pytest.mark.parametrize("has_length", [True, False])
def test_a_fraction_is_that_of_the_limit_that_is_nearer(loader, options, has_length):
    data = loader if has_length else DataLoader(Endless(4), batch_size=None)
    used = drop_probs(make_callback(start=0.5, drop_prob=0.8), data, **({"max_epochs": None} | options))
    assert len(used) == 20
    # Epochs of unknown length move once an epoch.
    position = [step if has_length or options["max_steps"] == 20 else step // 4 * 4 for step in range(20)]
    begin = next(step for step in range(20) if position[step] >= 10)
    ramp = [0.8 * (2 * p / 20 - 1) for p in position]
    assert used[: begin + 1] == [0.0] * (begin + 1)
    assert used[begin + 1 :] == pytest.approx(ramp[begin + 1 :], abs=1e-9)


@pytest.mark.parametrize("has_length", [True, False])
def test_training_without_an_end(loader, has_length):
    """An epoch to start at and a constant schedule need no end."""

    def stop(trainer, module):
        trainer.should_stop = trainer.fit_loop.total_batch_idx >= 15

    used, callback = [], make_callback(start=2, schedule="constant")
    data = loader if has_length else DataLoader(Endless(4), batch_size=None)
    record = At(lambda *_: used.append(callback.drop_prob_now))
    make_trainer(callback, record, At(stop), max_epochs=-1).fit(Classifier(Small()), data)
    assert used == [0.0] * 9 + [0.5] * 7


def test_steps_of_one_endless_epoch_are_counted():
    """Without epochs to count, reclustering goes by steps."""
    callback, opened = make_callback(start=0.25, every_n_epochs=None, every_n_train_steps=8), []
    record = At(lambda *_: opened.append(callback.state_dict()["windows_opened"]))
    make_trainer(callback, record, max_epochs=-1, max_steps=32).fit(
        Classifier(Small()), DataLoader(Endless(1000), batch_size=None)
    )
    assert opened == [max(0, step // 8) for step in range(32)]


@pytest.mark.parametrize(
    "options", [{"val_check_interval": 1}, {"val_check_interval": 0.5}, {"check_val_every_n_epoch": 2}]
)
def test_validation_at_any_time_changes_nothing(loader, options):
    runs = []
    for validation in (None, make_loader(16, 4, 24)):
        module, callback = Classifier(Small()), make_callback(num_samples=20)
        torch.manual_seed(1)
        make_trainer(callback, **options).fit(module, loader, validation)
        runs.append((callback.labels, module.state_dict()))
    (labels, weights), (labels_then, weights_then) = runs
    assert labels
    assert equal(labels, labels_then)
    assert equal(weights, weights_then)


# Inputs


def test_another_size_in_the_midst_of_a_window_is_left_out_and_dropped(loader):
    class Alternating(IterableDataset):
        def __iter__(self):
            large = list(make_loader(32, 8, 24))
            for small, batch in zip(loader, large, strict=True):
                yield tuple(small)
                yield tuple(batch)

    module, counts = Classifier(Small()), []
    callback = make_callback(start=0.0, num_samples=24, schedule="constant", every_n_epochs=0)

    def look(trainer, module):
        sketch = next(iter(callback._layers.hooks.values())).sketch
        counts.append(0 if sketch is None else int(sketch.count))

    make_trainer(callback, At(look), max_epochs=2).fit(module, DataLoader(Alternating(), batch_size=None))
    gathered = [count for count in counts if count]
    assert gathered == sorted(gathered)
    assert len(set(gathered)) > 1
    assert callback.labels
    shares = [(x.shape[-1], share_of_zeros(x)) for x in module.model.seen[-4:]]
    assert {size for size, _ in shares} == {16, 24}
    assert all(0.2 < share < 0.8 for _, share in shares)


def test_sizes_that_hardly_come_twice_are_resized_and_told():
    class Free(IterableDataset):
        def __iter__(self):
            return iter(next(iter(make_loader(8, 8, 16 + 4 * turn))) for turn in range(12))

    callback = make_callback(start=0.0, every_n_epochs=None, every_n_train_steps=3, num_samples=32)
    told = (
        "sizes of maps changed before num_samples=32 samples of one size were gathered, so maps are resized"
    )
    with pytest.warns(UserWarning, match=told) as all:
        make_trainer(callback, max_epochs=2).fit(Classifier(Small()), DataLoader(Free(), batch_size=None))
    assert sum("sizes of maps" in str(warning.message) for warning in all) == 1
    assert callback.labels


def test_sizes_that_grow_now_and_then_stay_compiled():
    class Growing(Classifier):
        def training_step(self, batch, batch_idx):
            images = F.interpolate(batch[0], 10 + 4 * (self.current_epoch // 2))
            return F.cross_entropy(self.model(images), batch[1])

    def backend(graph, _inputs):
        def forward(*args):
            ran.append(1)
            return graph(*args)

        return forward

    torch._dynamo.reset()
    ran, epochs = [], 8
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    net.compile(backend=backend)
    callback = make_callback("0", start=0.0, num_clusters=4)
    make_trainer(callback, max_epochs=epochs).fit(Growing(net), make_loader(32, 8, 16))
    assert callback.labels["model.0"].shape == (8, 20, 20)
    assert len(ran) == 4 * epochs


def test_a_schedule_that_cannot_move_is_told():
    data = DataLoader(Endless(8), batch_size=None)
    with pytest.warns(UserWarning, match=r"max_epochs=1 with data of unknown length: .*set max_steps or"):
        assert set(drop_probs(make_callback(start=0), data, max_epochs=1)) == {0.0}
    assert drop_probs(make_callback(start=0, schedule="constant"), data, max_epochs=1)[-1] == 0.5
    assert drop_probs(make_callback(start=0), data, max_epochs=1, limit_train_batches=8)[-1] > 0


def test_layers_that_were_replaced_are_told(loader):
    def replace(trainer, module):
        if trainer.global_step == 6:
            module.model.conv = nn.Conv2d(3, 8, 3, padding=1)

    with pytest.warns(UserWarning, match=r"layers model\.conv are no longer part of the model"):
        make_trainer(make_callback(start=0.0), At(replace)).fit(Classifier(Small()), loader)


def test_features_that_are_one_cluster_are_told():
    def fit(**options):
        make_trainer(make_callback(start=0.0, **options)).fit(Classifier(Small()), make_loader(32, 8, 4))

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*one cluster holds all")
        for options in ({"cluster_size": 4}, {"num_clusters": 1}, {"scope": "layer"}):
            fit(**options)
    with pytest.warns(
        UserWarning, match=r"'model\.conv': .* \(8, 4, 4\) .* one cluster holds all 16 features.* larger maps"
    ):
        fit()
    with pytest.warns(UserWarning, match="one cluster holds all 8 features.* layers with more channels"):
        fit(scope="channel")


def test_a_layer_with_more_clusters_than_its_scope_allows_is_told(loader, monkeypatch):
    monkeypatch.setattr(scopes, "_MAX_LAYER_CLUSTERS", 4)
    with pytest.warns(UserWarning, match="there are 4 clusters at most, so cluster_size becomes"):
        make_trainer(make_callback(start=0.0, scope="layer", cluster_size=2)).fit(Classifier(Small()), loader)


# Trainers that forbid things


@pytest.mark.filterwarnings("ignore:.*barebones")
def test_barebones_trainers(loader, recwarn):
    callback = make_callback()
    trainer = pl.Trainer(barebones=True, accelerator="cpu", max_epochs=2, callbacks=[callback])
    trainer.fit(Classifier(Small()), loader)
    assert callback.labels
    assert not [w for w in recwarn if "log" in str(w.message)]


def test_inference_after_training(loader):
    module, callback = Classifier(Small()), make_callback()
    trainer = make_trainer(callback)
    trainer.fit(module, loader, loader)
    labels, weights = callback.labels, {k: v.clone() for k, v in module.state_dict().items()}
    plain = Small()
    plain.load_state_dict(module.model.state_dict())
    predicted = torch.cat(trainer.predict(module, loader))
    trainer.validate(module, loader, verbose=False)
    trainer.test(module, loader, verbose=False)
    images = torch.cat([batch[0] for batch in loader])
    with torch.inference_mode():
        assert torch.allclose(predicted, plain.eval()(images), atol=1e-6)
        assert torch.equal(module.model.eval()(images), plain(images))
    assert torch.equal(module.model.train()(images), plain.train()(images))
    assert equal(labels, callback.labels)
    assert equal(weights, module.state_dict())


@pytest.mark.parametrize(
    "options", [{"rescale": "batch"}, {"rescale": "expected"}, {"fill": "mean"}], ids=str
)
def test_probabilities_next_to_one_stay_finite(loader, options):
    """In float32 they would be one, and the expected scale infinite."""
    module = Classifier(Small())
    callback = make_callback(drop_prob=1.0 - 1e-12, start=0.0, schedule="constant", **options)
    make_trainer(callback, max_epochs=2).fit(module, loader)
    assert all(math.isfinite(loss) for loss in module.losses)


def test_filling_with_the_mean_keeps_the_means_of_clusters(loader):
    module, callback = Classifier(Small()), make_callback(fill="mean", start=0.0, schedule="constant")
    make_trainer(callback, max_epochs=2).fit(module, loader)
    conv, labels = module.eval().model.conv, callback.labels[NAME]
    images = torch.randn(4, 3, *labels.shape[1:])
    with callback.sampling(module), torch.no_grad():
        filled = conv(images)
    change = (filled - conv(images)).detach()
    clusters = [change[:, c][:, labels[c] == k] for c, k in [(0, 0), (0, 1), (7, 0), (7, 1)]]
    assert all(cluster.mean(1).abs().max() < 1e-5 < cluster.abs().max() for cluster in clusters)
    assert not (filled == 0).any()


# Workers of data loaders

WORKERS = """
import sys


def main(*ways):
    import pytorch_lightning as pl
    import torch
    from torch.nn import functional as F
    from torch.utils.data import DataLoader, TensorDataset

    from lightning_dropcluster import DropCluster

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3)
            self.threads = []

        def training_step(self, batch, batch_idx):
            self.threads.append(torch.get_num_threads())
            return F.cross_entropy(self.conv(batch[0]).mean((2, 3)), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    data = TensorDataset(torch.randn(32, 3, 32, 32), torch.arange(32) % 4)
    torch.set_num_threads(2)
    for way in ways:
        method, life = way.split("-")
        module, callback = Module(), DropCluster("conv", start=0.0, every_n_epochs=1, num_samples=16)
        loader = DataLoader(
            data, 8, num_workers=2, multiprocessing_context=method, persistent_workers=life == "persistent"
        )
        trainer = pl.Trainer(
            accelerator="cpu", barebones=True, max_epochs=3, callbacks=[callback], num_sanity_val_steps=0
        )
        trainer.fit(module, loader)
        assert set(module.threads) == {2}, module.threads
        assert torch.get_num_threads() == 2
        assert callback.state_dict()["windows_opened"] == 3
        assert callback.labels
    print("trained")


if __name__ == "__main__":
    main(*sys.argv[1:])
"""


@pytest.mark.parametrize(
    "args",
    [
        ("fork-persistent", "fork-anew"),
        pytest.param(("spawn-persistent", "spawn-anew"), marks=pytest.mark.long),
    ],
    ids=" ".join,
)
def test_workers_beside_faiss(tmp_path, args):
    """No deadlock, threads as they were, and no word from OpenMP."""
    script = tmp_path / "train.py"
    script.write_text(WORKERS)
    ran = subprocess.run(
        [sys.executable, script, *args], capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "trained" in ran.stdout
    assert "OMP" not in ran.stderr
    assert "libgomp" not in ran.stderr
