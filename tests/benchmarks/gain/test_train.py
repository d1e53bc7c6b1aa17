import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import hypothesis
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import auto_cli

from benchmarks.common.models import tell_channels
from benchmarks.common.record import commit, device_name, quiet, write_line
from benchmarks.demo import Demo
from benchmarks.demo import main as demo_main
from benchmarks.gain import old_averages
from benchmarks.gain.corruptions import CORRUPTIONS
from benchmarks.gain.methods import ramp
from benchmarks.gain.protocol import load_stage
from benchmarks.gain.scoring import fit_temperature
from benchmarks.gain.settings import ClustersName, RegularizerName
from benchmarks.gain.train import Settings, build_batches, build_model, run

TRAIN = [sys.executable, "-m", "benchmarks.gain.train"]
ROOT = Path(__file__).resolve().parents[3]
TINY = Settings(model="test_resnet.r160_in1k", data="fake", epochs=1, batch_size=16, progress_bar=False)
DROP = replace(TINY, regularizer="dropcluster", stem="cifar", start=0, num_samples=32)
KEYS = {
    "accuracy",
    "nll",
    "ece",
    "split",
    "corrupted",
    "seconds",
    "recluster_seconds",
    "versions",
    "commit",
    "device",
    "arguments",
}


def scores(record):
    return [record[name] for name in ("accuracy", "nll", "ece")]


def test_the_last_line_of_the_script_is_the_record(tmp_path):
    out = tmp_path / "results" / "runs.jsonl"
    words = [
        "--data",
        "fake",
        "--model",
        TINY.model,
        "--epochs",
        "1",
        "--batch_size",
        "16",
        "--out",
        str(out),
    ]
    done = subprocess.run([*TRAIN, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    record = json.loads(line)
    assert set(record) == KEYS
    assert 0 <= record["accuracy"] <= 1
    assert record["arguments"]["model"] == TINY.model
    assert record["arguments"]["out"] == "runs.jsonl"
    assert record["versions"]["torch"] == torch.__version__
    assert out.read_text() == line + "\n"
    assert str(tmp_path) not in line


@pytest.fixture(scope="module")
def plain():
    """The record of the smallest run."""
    return run(TINY)


def test_runs_repeat_for_a_seed(plain, capsys):
    assert scores(plain) == scores(run(TINY))
    assert scores(plain) != scores(run(replace(TINY, seed=1)))
    assert plain["recluster_seconds"] == 0
    assert capsys.readouterr().out == ""


def test_dropcluster_runs_and_is_drawn(tmp_path):
    plot = tmp_path / "new" / "clusters.png"
    record = run(replace(DROP, plot=str(plot), augment=True))
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert record["recluster_seconds"] > 0
    assert record["arguments"]["plot"] == "clusters.png"


@pytest.mark.parametrize("name", [name for name in get_args(RegularizerName) if name != "patch_dropout"])
def test_every_regularizer_trains(name, plain):
    record = run(replace(DROP, regularizer=name, drop_prob=0.5, stem="timm"))
    assert (scores(record) == scores(plain)) == (name == "none")


def test_the_methods_of_the_transformer_train():
    stage = load_stage("vit-2000")
    small = {"data": "fake", "train_samples": 40, "calibration_samples": 0, "num_samples": 16}
    base = replace(stage.base, **small, epochs=1, batch_size=8, start=0, schedule="constant", drop_prob=0.5)
    methods = [m.fixed for m in stage.methods if m.name in ("DropPath", "PatchDropout", "DropCluster, mean")]
    found = [tuple(scores(run(replace(base, **method, progress_bar=False)))) for method in methods]
    assert len(set(found)) == 3


def test_a_learned_regularizer_has_a_rate_of_its_own():
    settings = replace(DROP, regularizer="advanced_dropout", layers="act1", any_layer=True)
    same, slow = (scores(run(replace(settings, regularizer_lr=lr))) for lr in (settings.lr, 1e-6))
    assert same == scores(run(settings))
    assert slow != same


def test_every_kind_of_clusters_and_pairs_train_otherwise():
    changes = [{"clusters": name} for name in get_args(ClustersName)]
    changes += [{"pair_weight": 1.0}, {"per_sample": False}]
    found = [tuple(scores(run(replace(DROP, drop_prob=0.5, **change)))) for change in changes]
    assert len(set(found)) == len(changes)
    assert tuple(scores(run(replace(DROP, drop_prob=0.5, any_layer=True)))) == found[0]


def test_a_second_callback_drops_beside_the_first():
    both = replace(
        DROP,
        layers="conv1",
        any_layer=True,
        beside={"regularizer": "dropout", "drop_prob": 0.5, "layers": "layer1"},
    )
    assert scores(run(replace(both, beside={**both.beside, "drop_prob": 0.0}))) != scores(run(both))


def test_dropping_ends_where_it_is_told():
    settings = replace(TINY, regularizer="dropout", start=0.2, end=0.6)
    schedule = ramp(settings)
    assert [schedule(step / 4) for step in range(5)] == pytest.approx([0, 0.5, 0, 0, 0])
    assert ramp(replace(settings, end=1.0)) == "linear"
    assert {"accuracy", "arguments"} <= run(settings).keys()


def test_validation_leaves_the_test_images_alone(plain):
    settings = replace(TINY, train_samples=40, validation_samples=30)
    data = build_batches(settings).data
    assert (len(data.train), len(data.test)) == (40, 30)
    assert run(settings)["split"] == "validation"
    assert plain["split"] == "test"


def test_corrupted_images_are_scored_by_name_and_severity():
    record = run(replace(TINY, corrupted_samples=10))
    assert set(record["corrupted"]) == set(CORRUPTIONS)
    assert {len(values) for each in record["corrupted"].values() for values in each.values()} == {5}
    with pytest.raises(ValueError, match=r"corrupted_samples must be in 0 to 40 \(all images to .*, got 41"):
        run(replace(TINY, corrupted_samples=41))


def test_a_fitted_temperature_leaves_accuracy_as_it_is():
    record = run(replace(TINY, train_samples=20, calibration_samples=20))
    assert record["scaled"]["accuracy"] == record["accuracy"]
    assert record["scaled"]["temperature"] != 1


def test_old_averages_are_those_of_steps_that_drop(monkeypatch):
    dropping = replace(DROP, drop_prob=0.5, old_averages=True, train_samples=40, epochs=2)
    clean = run(replace(dropping, clean_statistics=True))
    assert scores(clean) != scores(clean["old_averages"])
    monkeypatch.setattr(old_averages, "is_clean_step", lambda batch, left: False)
    plain = run(dropping)
    assert scores(plain) == scores(plain["old_averages"])
    monkeypatch.setattr(old_averages, "is_clean_step", lambda batch, left: True)
    assert scores(run(dropping)["old_averages"]) != scores(plain)


@given(st.floats(0.1, 10), st.integers(0, 99))
@hypothesis.settings(deadline=None, max_examples=20)
def test_the_temperature_that_made_labels_unlikely_is_found_again(temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    true = torch.randn(20_000, 3, generator=generator)
    labels = true.softmax(1).multinomial(1, generator=generator).flatten()
    assert fit_temperature(true * temperature, labels) == pytest.approx(temperature, rel=0.1)


def test_no_plot_without_clusters(tmp_path):
    plot = tmp_path / "clusters.png"
    with pytest.warns(UserWarning, match=r"training ended before num_samples=9999"):
        run(replace(DROP, plot=str(plot), num_samples=9999))
    assert not plot.exists()


def test_cifar_folder_trains(jpeg_tree):
    settings = replace(TINY, data="cifar10", data_dir=str(jpeg_tree), train_samples=9, batch_size=4)
    assert build_batches(settings).data.train.labels.bincount().tolist() == [3, 3, 3]
    record = run(settings)
    assert record["arguments"]["data_dir"] == jpeg_tree.name


@pytest.mark.parametrize("name", ["resnet10t", "test_resnet.r160_in1k"])
def test_the_cifar_stem_keeps_the_resolution(name):
    model = build_model(name, "cifar", 10)
    seen = []
    model.layer1.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-2:]))
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert seen == [(32, 32)]


def test_activations_tell_their_channels_where_they_are_made_to():
    model = build_model("test_resnet.r160_in1k", "timm", 10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tell_channels(model)
    assert model.act1.out_channels == model.bn1.num_features
    assert model.training
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_trained_weights_are_all_taken_but_for_the_classifier(tmp_path):
    name, file = "test_resnet.r160_in1k", tmp_path / "weights.pth"
    torch.save(timm.create_model(name, num_classes=1000).state_dict(), file)
    found, wanted = build_model(name, "timm", 10, weights=str(file)).state_dict(), torch.load(file)
    apart = {key for key in wanted if not torch.equal(found[key], wanted[key])}
    assert apart == {"fc.weight", "fc.bias"}
    settings = replace(TINY, model=name, weights=str(file))
    config = timm.get_pretrained_cfg(name)
    batches = build_batches(settings)
    assert batches.mean.flatten().tolist() == pytest.approx(config.mean)
    assert batches.std.flatten().tolist() == pytest.approx(config.std)
    assert run(settings)["arguments"]["weights"] == "weights.pth"


def test_weights_that_timm_has_are_asked_of_timm(monkeypatch):
    asked = []
    monkeypatch.setattr(timm, "create_model", lambda name, **options: asked.append((name, options)))
    build_model("resnet18", "timm", 10, weights="timm")
    assert asked == [("resnet18", {"pretrained": True, "num_classes": 10})]


def test_weights_must_be_there():
    with pytest.raises(ValueError, match="weights must be 'timm' or an existing file, got 'nowhere'"):
        build_model("resnet18", "timm", 10, weights="nowhere")
    with pytest.raises(ValueError, match="a file for small_resnet, which timm has no weights for"):
        build_model("small_resnet", "timm", 10, weights="timm")


def test_unfit_models():
    with pytest.raises(
        ValueError, match=r"stem='cifar' needs a ResNet with conv1 and maxpool, got model='test_vit'"
    ):
        build_model("test_vit", "cifar", 10)
    with pytest.raises(
        ValueError, match=r"model must be a name that timm knows, got 'resnet19'; nearest: .*resnet18"
    ):
        build_model("resnet19", "timm", 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, r"epochs must be at least 1, got 0"),
        ({"batch_size": 0}, r"batch_size must be at least 1, got 0"),
        ({"lr": 0.0}, r"lr must be above 0, got 0\.0"),
        ({"lr": float("nan")}, r"lr must be above 0, got nan"),
        ({"regularizer_lr": 0.0}, r"regularizer_lr must be above 0, got 0\.0"),
        ({"corrupted_samples": -1}, r"corrupted_samples must be at least 0, got -1"),
        ({"calibration_samples": -1}, r"calibration_samples must be at least 0, got -1"),
        ({"pair_weight": -1.0}, r"pair_weight must be at least 0, got -1\.0"),
        ({"end": 1.5}, r"end must be 1, or in \(start, 1\), got 1\.5"),
        ({"end": 0.2}, r"end must be 1, or in \(start, 1\), got 0\.2"),
        ({"end": 0.9, "start": 0}, r"end must be 1, or in \(start, 1\), got 0\.9"),
        (
            {"end": 0.9, "drop_prob": "auto", "calibration_samples": 8},
            r"end must be 1 with drop_prob 'auto'",
        ),
        ({"plot": "clusters.png"}, r"plot must be None unless regularizer is 'dropcluster'"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        Settings(**change)


def test_the_command_line_keeps_whole_epochs_apart_from_fractions(capsys):
    whole, fraction = (
        auto_cli(Settings, as_positional=False, args=["--start", word]) for word in ["3", "0.5"]
    )
    assert (whole.start, fraction.start) == (3, 0.5)
    assert isinstance(whole.start, int)
    with pytest.raises(SystemExit):
        auto_cli(Settings, as_positional=False, args=["--regularizer", "dropblock"])
    assert "dropcluster" in capsys.readouterr().err


def test_commit_marks_changed_code(tmp_path):
    def git(*words):
        names = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *names, *words], cwd=tmp_path, check=True, capture_output=True)

    assert commit(tmp_path) is None
    code = tmp_path / "lightning_dropcluster" / "code.py"
    code.parent.mkdir()
    code.write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    (tmp_path / "results.jsonl").write_text("{}")
    clean = commit(tmp_path)
    assert clean is not None
    assert len(clean) == 40
    code.write_text("2")
    assert commit(tmp_path) == clean + "-dirty"


def test_device_name_tells_the_kind_only():
    assert device_name().startswith("cpu, ") or torch.accelerator.is_available()


def test_quiet_sends_prints_elsewhere_and_ends(capsys):
    with quiet():
        print("hint")
    print("result")
    assert capsys.readouterr() == ("result\n", "hint\n")


def test_records_are_appended(tmp_path, capsys):
    out = tmp_path / "a" / "b.jsonl"
    write_line({"x": 1}, str(out))
    write_line({"x": 2}, str(out))
    assert out.read_text() == '{"x": 1}\n{"x": 2}\n' == capsys.readouterr().out


def test_demo_announces_compares_and_draws(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    demo_main(Demo(epochs=2, seeds=2, progress_bar=False))
    out = capsys.readouterr().out
    assert out.index("is scored once") < out.index("accuracy")
    assert out.splitlines()[-1] == "Clusters of the first of layer[1-3]: demo/clusters.png"
    assert (tmp_path / "demo" / "clusters.png").read_bytes().startswith(b"\x89PNG")
