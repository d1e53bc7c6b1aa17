"""The command line as users meet it: what it prints, and what it says where something is wrong."""

import re
import subprocess
import sys
from importlib.metadata import version

import fsspec
import pytest
import torch
from fits import Classifier, make_loader, make_trainer
from PIL import Image
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_dropcluster import DropCluster
from lightning_dropcluster.cli import main
from lightning_dropcluster.cli.checkpoints import LayerHistory, save_plots
from lightning_dropcluster.cli.command import parse_size


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the command at a width, and return what it printed."""

    def run(*args, columns=80):
        monkeypatch.setenv("COLUMNS", str(columns))
        main(args)
        return capsys.readouterr().out

    return run


def fails(capsys, *args):
    with pytest.raises(SystemExit) as error:
        main(args)
    return f"{error.value}\n{capsys.readouterr().err}"


@pytest.mark.parametrize("columns", [80, 120])
def test_every_conv_layer_has_a_row(run, columns):
    lines = run("layers", "resnet18", columns=columns).splitlines()
    assert lines[0].rstrip() == "resnet18 at 3×224×224"
    rows = [line.split() for line in lines if "Conv2d" in line]
    assert len(rows) == 20
    assert rows[0] == ["conv1", "Conv2d", "64×112×112", "802,816", "64", "×", "784", "211.9", "MB"]
    assert max(map(len, (line.rstrip() for line in lines if "layers=" not in line))) <= columns


def test_what_a_pattern_picks_is_marked_and_the_rest_counted(run):
    out = run("layers", "resnet18", "--match", "layer4.*.conv2")
    assert re.findall(r"● +(\S+)", out) == ["layer4.0.conv2", "layer4.1.conv2"]
    assert "… 16 more" in out
    assert "2 layers" in out
    every = run("layers", "resnet18", "--match", "layer4.*.conv2", "--all")
    assert every.count("Conv2d") == 20
    assert every.count("●") == 2


def test_several_patterns_and_settings(run):
    out = run("layers", "resnet18", "--match", "conv1", "re:^layer1", "--scope=position", "--num_clusters=9")
    assert out.count("●") == 5
    assert re.search(r"● +conv1 .* 802,816 +9 ", out)


@pytest.mark.parametrize(("size", "title"), [("1x28x28", "1×28×28"), ("64", "3×64×64")])
def test_other_input_sizes(run, size, title):
    assert run("layers", "resnet18", "--input", size).startswith(f"resnet18 at {title}")


def test_suggestions_can_be_pasted(run):
    out = run("layers", "resnet50")
    pasted = [eval(f"dict({line.strip()})") for line in out.splitlines() if "layers=" in line]
    assert pasted[0] == {"layers": ["layer1", "layer2", "layer3"]}
    assert pasted[1] == {"layers": "conv1"}
    assert pasted[3] == {"layers": ["layer3.*.conv2", "layer4.*.conv2"]}


@pytest.mark.parametrize("options", [["--any-layer"], []])
def test_modules_of_any_type_are_listed_among_the_convs(run, options):
    out = run("layers", "resnet18", "--match", "layer[1-3]", *options, "--all")
    rows = re.findall(r"● +(\S+) +(\S+) +(\S+)", out)
    assert rows == [
        ("layer1", "Sequential", "64×56×56"),
        ("layer2", "Sequential", "128×28×28"),
        ("layer3", "Sequential", "256×14×14"),
    ]
    assert out.count("Conv2d") == 20
    assert "3 layers" in out


@pytest.mark.parametrize(
    ("model", "pattern", "output"),
    [
        ("hrnet_w18_small", "stage2", "gives list, not one tensor"),
        ("swin_tiny_patch4_window7_224", "layers.0", "56×56×96, channels last"),
        ("vit_tiny_patch16_224", "blocks.0", "197×192, channels last"),
        ("poolformer_s12", "stages.0", "64×56×56 "),
        ("resnet18", "layer1", "64×56×56 "),
    ],
)
def test_what_cannot_be_taken_for_maps_is_told(run, model, pattern, output):
    out = run("layers", model, "--match", pattern, "--any-layer", columns=160)
    assert re.search(rf"● +{pattern} +\w+ +{output}", out)


def test_transformers_have_patterns_with_their_dimension(run):
    out = run("layers", "vit_tiny_patch16_224", "--match", "blocks.*", "--channel-dim=-1", columns=160)
    assert re.search(r"● +blocks.0 +Block +192×14×14 +37,632 +192 × 12", out)
    assert 'layers=["blocks.2", "blocks.5", "blocks.8"], channel_dim=-1' in out
    assert 'layers="blocks.*", channel_dim=-1' in out
    assert "channels come" not in out


def test_the_wrong_dimension_has_a_note(run):
    options = ("layers", "swin_tiny_patch4_window7_224", "--match", "layers.0")
    note = "channel_dim=1: channels come last in the outputs of layers.0; give channel_dim=-1."
    assert note in run(*options, columns=160)


def test_maps_of_one_cluster_have_a_note(run):
    model, note = "mobilenetv3_small_050", "each map is one cluster, so whole maps are dropped"
    small = ("layers", model, "--input=64", "--match", "blocks.4.0.conv_dw", "blocks.5.**")
    assert f"In 2 layers {note}" in run(*small, columns=160)
    assert note not in run(*small, "--scope=channel", columns=160)
    one_feature_each = run("layers", model, "--match", "**.se.conv_reduce", columns=160)
    assert note not in one_feature_each
    assert f"In 1 layer {note}" in run(
        "layers", "resnet18", "--match", "layer4.1.conv2", "--input=96", columns=160
    )
    assert note not in run("layers", "resnet18", "--match", "layer4.1.conv2", columns=160)


def test_a_pipe_gets_whole_names(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    main(["layers", "hrnet_w18_small", "--match", "re:^never$|conv1$"])
    assert "stage4.0.branches.0.0.conv1 " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["resnte50"], "model='resnte50': timm .* has no such model; nearest: resnet50, "),
        (
            ["resnet18", "--match", "layr1.conv"],
            "layers='layr1.conv' matches no layer; nearest: layer1",
        ),
        (["resnet18", "--any-layer"], "--any-layer: needs --match"),
        (["resnet18", "--input", "3x7"], "input='3x7': must be a size such as 3x224x224 or 224"),
        (["resnet18", "--scope", "maps"], "scope='maps': must be one of map, position"),
        (["vit_tiny_patch16_224", "--input", "32"], "does not run on input=.*doesn't match model"),
        (["resnet18", "--match", "re:("], "no valid regular expression"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(capsys, args, message):
    said = fails(capsys, "layers", *args).strip()
    assert re.fullmatch(f"lightning-dropcluster layers: .*{message}.*", said)


@pytest.mark.parametrize("text", ["", "3x", "x", "0x2x2", "3x7", "224×224", "3,7", "axb", "3x4x5x6"])
def test_bad_sizes(text):
    with pytest.raises(ValueError, match="must be a size"):
        parse_size(text)


def test_options_may_be_spelt_with_hyphens(run):
    args = ("layers", "resnet18", "--match", "layer[1-3]")
    assert run(*args, "--any-layer", "--num-clusters=3") == run(*args, "--any_layer", "--num_clusters", "3")


def test_help_spells_options_with_hyphens_too(capsys):
    with pytest.raises(SystemExit):
        main(["layers", "--help"])
    said = capsys.readouterr().out
    assert "--any-layer" in said
    assert "_layer" not in said.replace("layer_types", "")
    assert said.count("List the layers of a timm model") == 1


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert version("lightning-dropcluster") in capsys.readouterr().out


@pytest.mark.parametrize("package", ["rich", "jsonargparse"])
def test_a_missing_package_names_the_extra(capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert "pip install '.[cli]' in the clone" in fails(capsys, "layers", "resnet18")


def test_help_comes_from_the_docstring(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["layers", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "List the layers of a timm model" in out
    assert "samples gathered for each clustering. (type: int, default: 1024)" in out


def test_a_process_of_its_own_imports_what_the_command_needs():
    command = [sys.executable, "-X", "importtime", "-m", "lightning_dropcluster", "layers", "resnet18"]
    ran = subprocess.run([*command, "--input=32"], capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.startswith("resnet18 at 3×32×32")
    imported = set(re.findall(r"^import time:.*\| +(\S+)$", ran.stderr, re.MULTILINE))
    assert "timm" in imported
    assert not imported & {"pytorch_lightning", "lightning", "torchmetrics", "matplotlib", "sklearn"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Checkpoints of a run that clustered two layers in every epoch."""
    folder = tmp_path_factory.mktemp("run")
    callback = DropCluster(["conv1", "layer1.0.conv2"], start=0.0, every_n_epochs=1, num_samples=8)
    saver = ModelCheckpoint(folder, save_top_k=-1, every_n_epochs=1)
    trainer = make_trainer(callback, saver, max_epochs=3, enable_checkpointing=True)
    trainer.fit(Classifier(), make_loader())
    return folder


def test_a_checkpoint_is_drawn(run, checkpoints, tmp_path):
    last = max(checkpoints.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    out = run("plot", str(last), "--output", str(tmp_path / "new"), "--match", "conv1", columns=200)
    assert re.match(r"model.conv1  epoch 2 · 16 clusters · scope map\n", out)
    written = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert written == ["model.conv1.png", "model.conv1.sizes.png"]
    assert all(str(tmp_path / "new" / name) in out for name in written)


def test_layers_without_maps_are_not_drawn(tmp_path):
    history = LayerHistory("global_pool", "map", [0], [torch.zeros(8, dtype=torch.int64)])
    assert not list(save_plots(history, tmp_path, image=None, max_maps=1))


def test_the_name_of_a_layer_leads_to_no_other_folder(tmp_path):
    labels = torch.zeros(2, 4, 4).long()
    for name in ("../escaped", str(tmp_path / "elsewhere"), "a/b"):
        for path in save_plots(LayerHistory(name, "map", [0], [labels]), tmp_path, image=None, max_maps=1):
            assert path.parent == tmp_path
            assert path.exists()


def test_checkpoints_of_a_run_become_a_history(run, checkpoints, tmp_path):
    Image.new("L", (9, 7)).save(tmp_path / "image.png")
    image = f"--image={tmp_path / 'image.png'}"
    out = run("plot", str(checkpoints), f"--output={tmp_path}", image, "--max_maps=2", columns=200)
    assert re.search(r"model.layer1.0.conv2  epoch 2 .* agreement with epoch 1: -?[01]\.\d\d", out)
    for ending in ("png", "sizes.png", "overlay.png", "history.png", "history.gif"):
        for layer in ("model.conv1", "model.layer1.0.conv2"):
            with Image.open(tmp_path / f"{layer}.{ending}") as picture:
                assert getattr(picture, "n_frames", 1) == (3 if ending == "history.gif" else 1)


def test_sharded_checkpoints_and_urls_are_drawn(run, checkpoints, tmp_path):
    memory = fsspec.filesystem("memory")
    for path in checkpoints.glob("*.ckpt"):
        memory.pipe_file(f"/sharded/{path.name}/meta.pt", path.read_bytes())
        memory.pipe_file(f"/sharded/{path.name}/__0_0.distcp", b"a shard")
    small = (f"--output={tmp_path}", "--match=conv1", "--max_maps=1")
    out = run("plot", "memory://sharded", *small, columns=200)
    assert out == run("plot", str(checkpoints), *small, columns=200)
    memory.rm("/sharded", recursive=True)


def test_what_cannot_be_drawn_is_said_in_one_line(capsys, checkpoints, tmp_path):
    torch.save({"callbacks": {}}, tmp_path / "empty.ckpt")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    (tmp_path / "folder").mkdir()
    one = str(next(checkpoints.glob("*.ckpt")))
    for args, message in (
        ([str(tmp_path / "none.ckpt")], "No such file"),
        ([str(tmp_path / "empty.ckpt")], "no clusters of a DropCluster in "),
        ([str(tmp_path / "text.ckpt")], "text.ckpt: no checkpoint that torch loads with weights_only=True"),
        (["memory://none.ckpt"], "memory://none.ckpt: No such file"),
        ([str(tmp_path / "folder")], r"no checkpoint \(\*.ckpt\) in the folder"),
        ([one, "--match", "conv2"], "match='conv2' picks none of the layers with clusters; nearest: model.l"),
        ([one, "--image", str(tmp_path / "text.ckpt")], "no image that Pillow reads"),
        ([one, "--max_maps", "0"], "max_maps=0: must be an integer of at least 1"),
    ):
        assert re.match(f"lightning-dropcluster plot: .*{message}", fails(capsys, "plot", *args))
