"""Training that is killed in any phase and resumed equals training that was never killed."""

import os
import signal
import time
import warnings
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from fits import Classifier, ResumableLoader, make_loader, make_trainer
from processes import digest, finish, read, start
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_dropcluster import DropCluster
from lightning_dropcluster.clustering import FaissKMeans

LAYERS = "layer[12].*.conv2"


def make_callback(**options) -> DropCluster:
    """In 4 epochs of 4 batches of 8: windows are open in steps 4 to 5, 8 to 9 and 12 to 13."""
    settings = {"start": 0.25, "every_n_epochs": 1, "num_samples": 12, "sketch_dim": 8}
    return DropCluster(LAYERS, 0.5, **(settings | options))


class KeepGenerator(pl.Callback):
    """What a user adds to resume bit by bit: the state of torch's generator in the checkpoint."""

    def __init__(self) -> None:
        self.state: torch.Tensor | None = None

    def on_save_checkpoint(self, trainer, pl_module, checkpoint) -> None:
        checkpoint["generator"] = torch.get_rng_state()

    def on_load_checkpoint(self, trainer, pl_module, checkpoint) -> None:
        self.state = checkpoint["generator"]

    def on_train_start(self, trainer, pl_module) -> None:
        if self.state is not None:
            torch.set_rng_state(self.state)


class Diary(pl.Callback):
    """Note after every step everything that a resumed run has to have in common with the whole one."""

    def __init__(self, callback: DropCluster) -> None:
        self.callback = callback
        self.steps: dict[int, dict[str, str]] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        state = self.callback.state_dict()
        self.steps[trainer.global_step] = {
            "state": digest(state),
            "labels": digest(state["clusters"]),
            "window": digest(state["window"]),
            "progress": digest(state["progress"]),
            "drop_prob": digest(self.callback.drop_prob_now),
            "weights": digest(pl_module.state_dict()),
            "generator": digest(torch.get_rng_state()),
        }


class Death(pl.Callback):
    """Kill this process where a moment has come."""

    def __init__(self, moment: str, step: int) -> None:
        self.moment, self.step = moment, step

    def come(self, moment: str, step: int) -> None:
        if (moment, step) == (self.moment, self.step):
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.come("before the step", trainer.global_step)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.come("in the step", trainer.global_step)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint) -> None:
        self.come("while saving", trainer.global_step)


class DeadlyClusterer(FaissKMeans):
    """Kill this process in the call of that number; the first two are the callback's trial."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.call = call

    def fit(self, *args, **options):
        self.call -= 1
        if self.call == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().fit(*args, **options)


def train(folder: Path, options: dict, moment: str = "", step: int = -1, pause: float = 0.0) -> dict:
    """Train for 16 steps, or go on from the last checkpoint in the folder, and save after every step."""
    warnings.simplefilter("ignore")
    epochs = 1 if "every_n_train_steps" in options else 4
    if moment == "clustering":
        options = options | {"clusterer": DeadlyClusterer(step)}
    callback, module = make_callback(**options), Classifier()
    diary = Diary(callback)
    save = ModelCheckpoint(folder, every_n_train_steps=1, save_last=True, save_top_k=1)
    others = [KeepGenerator(), Death(moment, step), diary, Slow(pause), save]
    trainer = make_trainer(callback, *others, enable_checkpointing=True, max_epochs=epochs)
    last = folder / "last.ckpt"
    torch.manual_seed(1)
    loader = ResumableLoader(make_loader(128 // epochs))
    trainer.fit(module, loader, ckpt_path=last if last.exists() else None)
    return {"steps": diary.steps, "labels": callback.labels, "weights": module.state_dict()}


class Slow(pl.Callback):
    def __init__(self, pause: float) -> None:
        self.pause = pause

    def on_train_batch_end(self, *args) -> None:
        time.sleep(self.pause)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that are never killed, each made once."""
    made: dict[str, dict] = {}

    def get(options: dict) -> dict:
        key = repr(options)
        if key not in made:
            folder = tmp_path_factory.mktemp("whole")
            finish([start(train, folder / "told.pt", folder, options)])
            made[key] = read(folder / "told.pt")
        return made[key]

    return get


def resume(folder: Path, options: dict) -> dict:
    finish([start(train, folder / "told.pt", folder, options)])
    return read(folder / "told.pt")


def assert_went_on(resumed: dict, whole: dict, first: int | None = None) -> None:
    steps = resumed["steps"]
    assert first in (None, min(steps))
    assert max(steps) == 16
    for step, told in steps.items():
        assert told == whole["steps"][step], step
    assert digest(resumed["labels"]) == digest(whole["labels"])
    assert digest(resumed["weights"]) == digest(whole["weights"])
    assert whole["labels"]


@pytest.mark.parametrize(
    ("moment", "step", "options", "first"),
    [
        # first: the first step, counted from 1, that the resumed run makes
        pytest.param("in the step", 2, {}, 3, id="before start", marks=pytest.mark.long),
        pytest.param("before the step", 4, {}, 5, id="end of an epoch", marks=pytest.mark.long),
        pytest.param("in the step", 5, {}, 6, id="window open"),
        pytest.param("clustering", 3, {}, 6, id="inside reclustering", marks=pytest.mark.long),
        pytest.param("while saving", 6, {}, 6, id="reclustered but not saved", marks=pytest.mark.long),
        pytest.param("before the step", 6, {}, 7, id="right after reclustering", marks=pytest.mark.long),
        pytest.param("in the step", 7, {}, 8, id="between reclusterings", marks=pytest.mark.long),
        pytest.param("in the step", 9, {}, 10, id="second window", marks=pytest.mark.long),
        pytest.param("clustering", 5, {}, 10, id="second reclustering", marks=pytest.mark.long),
    ],
)
def test_a_killed_run_goes_on_as_if_nothing_had_been(moment, step, options, first, whole, tmp_path):
    killed = start(train, tmp_path / "killed.pt", tmp_path, options, moment, step)
    assert finish([killed]) == [-signal.SIGKILL]
    assert not (tmp_path / "killed.pt").exists()
    resumed = resume(tmp_path, options)
    assert_went_on(resumed, whole(options), first)


@pytest.mark.long
def test_what_the_phases_are(whole):
    """The table above means what it says."""
    steps = whole({})["steps"]
    labels = [steps[step]["labels"] for step in range(1, 17)]
    assert [i for i in range(2, 17) if labels[i - 1] != labels[i - 2]] == [6, 10, 14]
    closed = steps[1]["window"]
    assert [step for step in range(1, 17) if steps[step]["window"] != closed] == [5, 9, 13]


@pytest.mark.long
def test_a_run_killed_again_and_again_from_outside(whole, tmp_path):
    """At moments that nobody chose, perhaps while a file is written; training is slowed down for that.

    In one long epoch: a run resumed at the end of an epoch and again within the next one repeats batches,
    by Lightning's own counters and also without any callback.
    """
    options = {"every_n_epochs": None, "every_n_train_steps": 4}
    steps: list[int] = []
    for attempt in range(4):
        process = start(train, tmp_path / "killed.pt", tmp_path, options, "", -1, 0.05)
        deadline = time.monotonic() + 60.0
        before = modified(tmp_path)
        while modified(tmp_path) == before and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.037 * (attempt + 1))
        process.kill()
        finish([process])
        steps.append(torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"])
    assert steps == sorted(steps)
    assert_went_on(resume(tmp_path, options), whole(options))


def modified(folder: Path) -> float:
    last = folder / "last.ckpt"
    return last.stat().st_mtime_ns if last.exists() else 0


def save_one(path: Path, *callbacks: pl.Callback) -> Path:
    trainer = make_trainer(*callbacks, max_epochs=2)
    trainer.fit(Classifier(), make_loader())
    trainer.save_checkpoint(path)
    return path


@pytest.mark.parametrize("has_it", [True, False])
def test_checkpoints_are_exchanged_with_runs_without_the_callback(has_it, tmp_path):
    """Lightning warns once where a state finds no callback; we do where a callback finds no state."""
    path = save_one(tmp_path / "exchanged.ckpt", *([make_callback()] if has_it else []))
    callback = make_callback()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = Classifier()
        make_trainer(*([] if has_it else [callback])).fit(module, make_loader(), ckpt_path=path)
    about = [str(w.message) for w in caught if "callback" in str(w.message).lower()]
    assert len(about) == 1
    assert has_it or "the checkpoint has no state of this callback" in about[0]
    assert bool(callback.labels) != has_it


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def plant(path: Path, bomb: Bomb) -> None:
    """Hide a bomb in a callback's state of a checkpoint."""
    checkpoint = torch.load(path, weights_only=True)
    next(iter(checkpoint["callbacks"].values()))["clusters"] = bomb
    torch.save(checkpoint, path)


@pytest.mark.parametrize("weights_only", [True, None])
def test_a_checkpoint_never_executes_anything(weights_only, tmp_path):
    path = save_one(tmp_path / "bomb.ckpt", make_callback())
    plant(path, Bomb(tmp_path / "exploded"))
    with pytest.raises(Exception, match="Weights only load failed"):
        make_trainer(make_callback()).fit(
            Classifier(), make_loader(), ckpt_path=path, weights_only=weights_only
        )
    with pytest.raises(ValueError, match=r"unsupported GLOBAL .*mkdir"):
        make_callback(initial_labels=path)
    assert not (tmp_path / "exploded").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "exploded").exists()  # it was a bomb indeed


MOMENTS: tuple[dict, ...] = ({"num_samples": 25}, {})


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """States of two moments: a window open, and labels in use."""
    found: list[dict] = []
    for options in MOMENTS:
        callback = make_callback(**options)
        folder = tmp_path_factory.mktemp("states")

        class Save(pl.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, folder=folder):
                if trainer.global_step == 7:
                    trainer.save_checkpoint(folder / "7.ckpt")

        make_trainer(callback, Save()).fit(Classifier(), make_loader())
        found.append(torch.load(folder / "7.ckpt", weights_only=True))
    return found


JUNK = (
    None,
    -1,
    10**12,
    0.5,
    float("nan"),
    "x" * 9,
    [],
    [1],
    {},
    {"x": 1},
    torch.tensor([]),
    torch.tensor(-7),
)


def leaves(value: dict, path: tuple = ()):
    """Every key of nested mappings, as the path to it."""
    for key, entry in value.items():
        yield (*path, key)
        if isinstance(entry, dict):
            yield from leaves(entry, (*path, key))


def replaced(value: dict, path: tuple, junk) -> dict:
    """Copy nested mappings with another entry at one place; no entry where it is `Bomb`."""
    if len(path) > 1:
        return value | {path[0]: replaced(value[path[0]], path[1:], junk)}
    copied = {key: entry for key, entry in value.items() if key != path[0]}
    return copied if junk is Bomb else copied | {path[0]: junk}


@pytest.mark.long
@pytest.mark.parametrize("moment", range(len(MOMENTS)))
def test_a_corrupted_state_is_taken_or_refused_by_name(moment, states, tmp_path):
    """Whatever stands in the callback's part of a checkpoint: a fit that works, or an error that names it."""
    checkpoint = states[moment]
    ((key, state),) = [
        (key, state) for key, state in checkpoint["callbacks"].items() if key.startswith("DropCluster")
    ]
    options = MOMENTS[moment]
    strange: list[str] = []
    refused = 0
    for path in leaves(state):
        for junk in (*JUNK, Bomb):
            bad = replaced(state, path, junk)
            torch.save(checkpoint | {"callbacks": {key: bad}}, tmp_path / "bad.ckpt")
            module = Classifier()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    make_trainer(make_callback(**options), max_steps=9, max_epochs=-1).fit(
                        module, make_loader(), ckpt_path=tmp_path / "bad.ckpt"
                    )
            except (TypeError, ValueError) as error:
                refused += 1
                if "state" not in str(error) and "label" not in str(error):
                    strange.append(f"{path} = {junk!r}: {type(error).__name__}: {error}"[:300])
            except BaseException as error:
                strange.append(f"{path} = {junk!r}: {type(error).__name__}: {error}"[:300])
            if any(m._forward_hooks for m in module.modules()):
                strange.append(f"{path} = {junk!r}: hooks are left")
    assert refused > 50
    assert not strange, "\n".join([str(len(strange)), *strange])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_checkpoint_is_refused(share, tmp_path):
    path = save_one(tmp_path / "cut.ckpt", make_callback())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match="no checkpoint that torch loads with weights_only=True"):
        make_callback(initial_labels=path)
