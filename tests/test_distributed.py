"""Training on several ranks: real processes that talk by gloo, on the CPU."""

import os
import pickle
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from fits import At, Classifier, ResumableLoader, make_loader, make_trainer, tiny_resnet
from processes import digest, fit, run_ranks
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, Subset

from lightning_dropcluster import DropCluster, SpatialDropout, StructuredDropout, ranks
from lightning_dropcluster.clustering import FaissKMeans, adjusted_rand_index
from lightning_dropcluster.learning.sketch import Sketch

LAYERS = "layer[12].*.conv2"  # of 8 maps each


class Counting(FaissKMeans):
    """Count the problems of each call but the first two, which are the callback's trial."""

    def __init__(self) -> None:
        super().__init__()
        self.problems: list[int] = []

    def fit(self, profiles, *args, **options):
        self.problems.append(len(profiles))
        return super().fit(profiles, *args, **options)


class Failing(FaissKMeans):
    """Raise on one rank, from its call of that number on and once."""

    def __init__(self, error: Exception, rank: int, call: int) -> None:
        super().__init__()
        self.error, self.rank, self.call = error, rank, call

    def fit(self, *args, **options):
        self.call -= 1
        if self.call == 0 and ranks.rank() == self.rank:
            raise self.error
        return super().fit(*args, **options)


class WatchMasks(pl.Callback):
    """Keep what was last dropped of a layer, and the generator that it was drawn from; not of clean steps."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dropped = self.generator = ""

    def on_train_start(self, trainer, pl_module) -> None:
        def look(module, args, output):
            if (output == 0).any():
                self.dropped, self.generator = digest(output == 0), digest(torch.get_rng_state())

        self.handle = pl_module.get_submodule(self.name).register_forward_hook(look)

    def on_train_end(self, trainer, pl_module) -> None:
        self.handle.remove()


def make_callback(layers=LAYERS, drop_prob=0.5, **options) -> DropCluster:
    return DropCluster(
        layers, drop_prob, **({"start": 0.25, "every_n_epochs": 1, "num_samples": 16} | options)
    )


def ddp(world_size: int, **options) -> dict:
    return {"strategy": DDPStrategy(timeout=timedelta(seconds=60), **options), "devices": world_size}


def train(world_size: int, options: dict, num_samples: int = 48, batch_size: int = 4) -> dict:
    pl.seed_everything(0, verbose=False)
    clusterer = Counting()
    callback, watch = make_callback(clusterer=clusterer, **options), WatchMasks("model.layer1.0.conv2")
    module, loader = Classifier(), make_loader(num_samples, batch_size)
    told = fit(callback, module, loader, watch, **ddp(world_size))
    return told | {"problems": clusterer.problems[2:], "dropped": watch.dropped, "generator": watch.generator}


def column(told: dict, name: str) -> list:
    return [day[name] for day in told["days"]]


def assert_alike(results: list[dict]) -> None:
    """All ranks went the same way, in every step and to the last bit."""
    for told in results:
        assert told["error"] is None
        assert told["days"] == results[0]["days"]
        assert told["weights"] == results[0]["weights"]
        assert told["hooks"] == 0


@pytest.mark.parametrize(
    ("world_size", "options", "num_samples"),
    [
        pytest.param(2, {}, 45),
        pytest.param(4, {}, 90, marks=pytest.mark.long),
        pytest.param(4, {"num_samples": 30}, 90, marks=pytest.mark.long),
    ],
)
def test_ranks_share_the_work_and_agree_on_labels(world_size, options, num_samples, tmp_path):
    """Also where the samples do not divide evenly: the last batch is smaller than the others."""
    results = run_ranks(train, world_size, tmp_path, world_size, options, num_samples)
    assert_alike(results)
    labels = column(results[0], "labels")
    assert len(set(labels)) == 4  # none, and three clusterings
    for told in results:
        assert told["problems"] == [8 // world_size] * 6
    assert len({told["generator"] for told in results}) == 1  # seeded alike ...
    assert len({told["dropped"] for told in results}) == world_size  # ... and yet with masks of their own
    for told in results[1:]:
        assert told["warnings"] == []


def train_with_clean_averages(world_size: int) -> dict:
    """Train with averages that hardly move, and an "auto" that sees other losses on each rank."""

    class Validated(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-4)

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", 2.0 + ranks.rank())

    pl.seed_everything(0, verbose=False)
    module, loader = Validated(), make_loader(128, 16)
    callback = StructuredDropout(LAYERS, SpatialDropout(), "auto", start=0.0)
    trainer = make_trainer(callback, max_epochs=20, **ddp(world_size))
    trainer.fit(module, loader, make_loader(16, 8))
    kept = torch.cat([value.flatten() for name, value in module.named_buffers() if name.endswith("_var")])
    update_bn([batch for batch, _ in make_loader(128, 32)], module.model)
    clean = torch.cat([value.flatten() for name, value in module.named_buffers() if name.endswith("_var")])
    return {"kept": kept, "clean": clean, "auto": callback.state_dict()["auto"]["drop_prob"]}


def test_ranks_keep_clean_averages_and_drop_alike(tmp_path):
    first, second = run_ranks(train_with_clean_averages, 2, tmp_path, 2)
    torch.testing.assert_close(first["kept"], second["kept"])
    assert (first["kept"].mean() / first["clean"].mean()).log().abs() < 0.2
    assert first["auto"] == second["auto"] > 0.1


def train_with_a_loud_batch(world_size: int) -> list[float]:
    """Show the second rank alone a loud batch, in the last step before dropping begins."""

    class Loud(Classifier):
        def training_step(self, batch, batch_idx):
            (x, y), is_loud = batch, (batch_idx, ranks.rank()) == (8, 1)
            return super().training_step((30 * x if is_loud else x, y), batch_idx)

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *rest):
            lowest.append(min(float(b.min()) for n, b in pl_module.named_buffers() if n.endswith("_var")))

    lowest: list[float] = []
    pl.seed_everything(0, verbose=False)
    callback = StructuredDropout(LAYERS, SpatialDropout(), 0.3, start=0.5)
    trainer = make_trainer(callback, Watch(), max_epochs=1, **ddp(world_size))
    trainer.fit(Loud(), make_loader(128, 4))
    return lowest


def test_variances_stay_positive_where_ranks_saw_different_batches(tmp_path):
    for lowest in run_ranks(train_with_a_loud_batch, 2, tmp_path, 2):
        assert len(lowest) == 16
        assert min(lowest) > 0.0


def still(world_size: int, batch_size: int, sketch_dim: int) -> dict:
    """Train with a learning rate of 0, so that every run sees the same activations in the stem."""

    class Still(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    callback = make_callback("conv1", start=0.0, num_samples=512, sketch_dim=sketch_dim)
    return fit(callback, Still(), make_loader(544, batch_size), max_epochs=1, **ddp(world_size))


def stem_profiles() -> torch.Tensor:
    """The stem's exact profiles over the samples of the window, which follows the first batch."""
    batches = torch.cat([batch for batch, _ in make_loader(544)])[16 : 16 + 512]
    with torch.no_grad():
        maps = tiny_resnet().conv1(batches)
    sketch = Sketch(tuple(maps.shape[1:]), num_samples=512, sketch_dim=512)
    sketch.update(maps)
    return sketch.profiles()


def inertia(profiles: torch.Tensor, labels: torch.Tensor) -> float:
    member = nn.functional.one_hot(labels.flatten(1)).float()
    centroids = (member.mT @ profiles) / member.sum(1).clamp(min=1)[:, :, None]
    return (profiles - member @ centroids).square().sum().item()


@pytest.mark.long
@pytest.mark.parametrize("world_size", [2, 4])
def test_labels_are_as_good_as_those_of_a_single_process(world_size, tmp_path):
    """The exact inertia on the same samples; without random signs even the labels are the same."""
    profiles = stem_profiles()
    for sketch_dim in (512, 256):
        alone = run_ranks(still, 1, tmp_path, 1, 16, sketch_dim)[0]["labels"]["model.conv1"]
        several = run_ranks(still, world_size, tmp_path, world_size, 16 // world_size, sketch_dim)
        assert_alike(several)
        shared = several[0]["labels"]["model.conv1"]
        ratio = inertia(profiles, shared) / inertia(profiles, alone)
        assert ratio == pytest.approx(1.0, abs=0.01)
        if sketch_dim == 512:
            assert adjusted_rand_index(shared.flatten(1), alone.flatten(1)) > 0.95


def train_lopsided(world_size: int) -> dict:
    """Each rank has loaders of its own: rank 0 gets batches of 8, the others of 2."""
    loader = make_loader(64, 8) if os.environ["LOCAL_RANK"] == "0" else make_loader(16, 2)
    callback = make_callback("conv1", start=0.0, num_samples=20)
    return fit(callback, Classifier(), loader, use_distributed_sampler=False, **ddp(world_size))


@pytest.mark.long
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_rank_that_gathers_fewer_samples(world_size, tmp_path):
    results = run_ranks(train_lopsided, world_size, tmp_path, world_size)
    assert_alike(results)
    assert column(results[0], "labels")[0] == digest({})
    assert len(set(column(results[0], "labels"))) >= 4
    # Rank 0 fills its share at once; the window waits for the others', 2 samples a step.
    share = 20 // world_size
    assert column(results[0], "is_open").index(False) == -(-share // 2)


def train_failing(world_size: int, error: Exception, rank: int, call: int) -> dict:
    callback = make_callback(clusterer=Failing(error, rank, call))
    return fit(callback, Classifier(), make_loader(48, 4), **ddp(world_size))


@pytest.mark.long
@pytest.mark.parametrize("world_size", [2, 4])
def test_an_error_in_the_clusterer_of_one_rank_surfaces_on_all(world_size, tmp_path):
    error = ValueError("out of luck")
    results = run_ranks(train_failing, world_size, tmp_path, world_size, error, 1, 5)
    for rank, told in enumerate(results):
        assert told["hooks"] == 0
        if rank == 1:
            assert told["error"] == "ValueError: out of luck"
        else:
            assert told["error"] == "RuntimeError: failed on rank 1: see the error there"


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_out_of_memory_on_one_rank_keeps_the_old_labels_on_all(rank, tmp_path):
    results = run_ranks(train_failing, 2, tmp_path, 2, MemoryError("too much"), rank, 5)
    assert_alike(results)
    assert len(set(column(results[0], "labels"))) == 3  # none, the first and the third
    cause = "too much" if rank == 0 else "on another rank"
    said = f"DropCluster: out of memory in reclustering; the old labels stay ({cause})"
    assert results[0]["warnings"].count(said) == 1
    assert results[1]["warnings"] == []


class SkipsOnOneRank(Classifier):
    """A model with a second head, which rank 1 never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 4, 3)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if ranks.rank() == 1 else loss + 0.0 * self.head(batch[0]).sum()


def train_silent(num_samples: int) -> dict:
    callback = make_callback(["model.conv1", "head"], num_samples=num_samples)
    options = ddp(2, find_unused_parameters=True)
    return fit(callback, SkipsOnOneRank(), make_loader(48, 4), **options)


@pytest.mark.long
@pytest.mark.parametrize("num_samples", [16, 10_000])
def test_a_layer_that_is_silent_on_one_rank_is_an_error_on_all(num_samples, tmp_path):
    """Both where the window gets full, and where the epoch ends before."""
    results = run_ranks(train_silent, 2, tmp_path, num_samples)
    assert "layers: 'head' did not run in any training step" in results[1]["error"]
    assert results[0]["error"] == "RuntimeError: failed on rank 1: see the error there"
    assert [told["hooks"] for told in results] == [0, 0]


def train_other_sizes() -> dict:
    """The images of rank 1 change their size after the window was opened."""

    class Resized(Classifier):
        def training_step(self, batch, batch_idx):
            if ranks.rank() == 1 and self.global_step > 4:
                batch = [batch[0][..., :24, :24], batch[1]]
            return super().training_step(batch, batch_idx)

    callback = make_callback("conv1", num_samples=30)
    return fit(callback, Resized(), make_loader(32, 4), **ddp(2))


@pytest.mark.long
def test_a_size_that_changes_on_one_rank_alone_keeps_the_ranks_together(tmp_path):
    results = run_ranks(train_other_sizes, 2, tmp_path)
    assert_alike(results)
    assert "before num_samples=30 samples of one size were gathered" in results[0]["warnings"][0]


def train_with_synchronised_batchnorm() -> dict:
    return fit(make_callback(), Classifier(), make_loader(48, 4), sync_batchnorm=True, **ddp(2))


@pytest.mark.long
def test_synchronised_batchnorm(tmp_path):
    """On several ranks of a CPU torch refuses it, and no hook is left; conversion itself changes nothing."""
    for told in run_ranks(train_with_synchronised_batchnorm, 2, tmp_path):
        assert "SyncBatchNorm layers only work with GPU modules" in told["error"]
        assert told["hooks"] == 0
    plain, converted = Classifier(), Classifier()
    converted.model = nn.SyncBatchNorm.convert_sync_batchnorm(converted.model)
    first, second = (fit_seeded(module) for module in (plain, converted))
    assert any(isinstance(module, nn.SyncBatchNorm) for module in converted.modules())
    assert first == second
    assert len(set(column(first, "labels"))) == 4


def fit_seeded(module: Classifier) -> dict:
    pl.seed_everything(0, verbose=False)
    told = fit(make_callback(), module, make_loader())
    return {key: told[key] for key in ("days", "weights", "error", "hooks")}


def train_sharded(path: Path) -> dict:
    """Shard parameters by FSDP2, as its documentation does: the inner modules first."""

    class Sharded(Classifier):
        def configure_model(self):
            mesh = self.device_mesh["data_parallel"]
            for block in (self.model.layer1, self.model.layer2, self.model):
                fully_shard(block, mesh=mesh)

    def save(trainer, module):
        if trainer.global_step == 9:
            trainer.save_checkpoint(path)

    module, clusterer = Sharded(), Counting()
    callback = make_callback(["conv1", LAYERS], clusterer=clusterer)
    timeout = timedelta(seconds=60)
    strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False, timeout=timeout)
    told = fit(callback, module, make_loader(48, 4), At(save), strategy=strategy, devices=2)
    sharded = sum(isinstance(parameter, DTensor) for parameter in module.parameters())
    return told | {"problems": clusterer.problems[2:], "sharded": sharded}


@pytest.mark.long
def test_sharded_parameters(tmp_path):
    """FSDP2 through ModelParallelStrategy; Lightning's FSDPStrategy (FSDP1) refuses to run on a CPU."""
    path = tmp_path / "sharded.ckpt"
    results = run_ranks(train_sharded, 2, tmp_path, path)
    assert_alike(results)
    assert len(set(column(results[0], "labels"))) == 4
    for told in results:
        assert told["sharded"] == len(list(Classifier().parameters()))
        assert told["problems"] == [32, 4, 4] * 3  # of the stem and the blocks
    callback = make_callback(["conv1", LAYERS])
    resumed = fit(callback, Classifier(), ResumableLoader(make_loader(48, 8)), ckpt_path=path)
    assert resumed["error"] is None
    assert column(resumed, "step")[0] == 10
    assert column(resumed, "labels")[0] == column(results[0], "labels")[8]


@pytest.mark.long
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 4), (2, 2)])
@pytest.mark.parametrize("moment", ["open", "labels"])
def test_a_checkpoint_goes_on_with_another_number_of_ranks(before, after, moment, tmp_path):
    path = tmp_path / "moment.ckpt"
    results = run_ranks(train_elsewhere, before, tmp_path, before, path, SAVED_AFTER[moment])
    assert_alike(results)
    state = next(iter(torch.load(path, weights_only=True)["callbacks"].values()))
    assert (state["window"] is not None) == (moment != "labels")
    assert bool(state["clusters"]) == (moment == "labels")
    resumed = run_ranks(train_elsewhere, after, tmp_path, after, path)
    assert_alike(resumed)
    labels = column(resumed[0], "labels")
    assert len(labels) == 12 - SAVED_AFTER[moment]
    assert labels[-1] != digest({})
    if moment == "labels":
        assert labels[0] == digest(results[0]["labels"])


SAVED_AFTER = {"open": 3, "labels": 7}  # steps; the window is full after the fourth


def train_elsewhere(world_size: int, path: Path, save_after: int | None = None) -> dict:
    """Train for 12 steps of 16 samples over all ranks; save and stop on the way, or go on from there."""

    def save(trainer, module):
        if trainer.global_step == save_after:
            trainer.save_checkpoint(path)
            trainer.should_stop = True

    part = Subset(make_loader(64).dataset, range(int(os.environ["LOCAL_RANK"]), 64, world_size))
    loader = DataLoader(part, batch_size=16 // world_size, generator=torch.Generator())
    callback = make_callback(
        start=0,
        schedule="constant",
        num_samples=48,
        every_n_epochs=None,
        every_n_train_steps=8,
    )
    return fit(
        callback,
        Classifier(),
        ResumableLoader(loader),
        At(save),
        ckpt_path=None if save_after else path,
        use_distributed_sampler=False,
        max_epochs=3,
        **ddp(world_size),
    )


def run_script(*arguments: str) -> list[str]:
    """Run a script as users do: Lightning starts the other ranks."""
    here = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "1"}
    script = Path(here) / "train_on_ranks.py"
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(
        command, env=environment, check=True, timeout=240, capture_output=True, text=True
    ).stdout.splitlines()


@pytest.mark.long
def test_a_script_whose_ranks_lightning_starts():
    # Ranks may write into one another's lines.
    told = re.findall(r"labels \w+ of 2 layers", "".join(run_script("ddp")))
    assert len(told) == 2
    assert len(set(told)) == 1


@pytest.mark.long
def test_spawned_ranks_leave_their_labels_behind():
    """Lightning brings weights and metrics back to the parent, but nothing of the callbacks."""
    told = run_script("ddp_spawn")
    assert told[0] == f"labels {digest({})} of 0 layers"
    assert "dropcluster/model.layer1.0.conv2/num_clusters" in told[1]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_a_callback_can_be_sent_to_spawned_ranks(schedule):
    pickle.dumps(DropCluster("conv1", schedule=schedule))
