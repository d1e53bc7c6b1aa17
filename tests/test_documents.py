"""Every fenced block of the documents does what it says."""

import doctest
import inspect
import os
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from itertools import chain
from pathlib import Path

import pytest
import pytorch_lightning as pl
import timm
import torch
from fits import Classifier, make_loader
from pytorch_lightning.cli import LightningCLI
from sybil import Document, Example
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from torch import nn

import lightning_dropcluster
from lightning_dropcluster import DropCluster, preview, select_layers

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    path for pattern in ("*.md", "docs/*.md", "benchmarks/*.md") for path in sorted(ROOT.glob(pattern))
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return make_loader(1024, batch_size=128, size=16)


def run_config(example: Example) -> None:
    """Fit with the YAML as LightningCLI's configuration."""
    Path("config.yaml").write_text(example.parsed)
    short = ["--trainer.max_epochs=3", "--trainer.logger=false", "--trainer.accelerator=cpu"]
    cli = LightningCLI(
        Classifier,
        Data,
        args=["fit", "--config=config.yaml", *short],
        save_config_callback=None,
        seed_everything_default=False,
    )
    assert any(isinstance(c, DropCluster) and c.labels for c in cli.trainer.callbacks)


def check_commands(example: Example) -> None:
    """See that bash can read the block, and that each command exists with its options."""
    subprocess.run(["bash", "-n"], input=example.parsed, text=True, check=True)
    for line in example.parsed.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            check_command(*words)


def check_command(program: str, *arguments: str) -> None:
    if program == "make":
        subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True)
    elif program == "pip":
        assert arguments[0] == "install"
        for target in arguments[1:]:
            check_requirement(target)
    elif program in PROJECT["scripts"]:
        check_options(["-m", PROJECT["scripts"][program].partition(".")[0], arguments[0]], arguments[1:])
    elif program.endswith("python"):
        check_options(list(arguments[:2]), arguments[2:])  # -m MODULE
    else:
        pytest.fail(f"no check for {program!r}")


def check_requirement(target: str) -> None:
    name, extras = re.fullmatch(r"([\w.-]+)(?:\[(.+)\])?", target).groups()
    assert name in (".", PROJECT["name"])
    assert set((extras or "").split(",")) - {""} <= PROJECT["optional-dependencies"].keys()


def check_options(script: list[str], arguments: tuple[str, ...]) -> None:
    options = {word.partition("=")[0].replace("_", "-") for word in arguments if word.startswith("--")}
    assert options <= known_options(*script)


@cache
def known_options(*script: str) -> set[str]:
    """Read what a script's help lists; starting one takes seconds, and documents name the same ones."""
    shown = subprocess.run(
        [sys.executable, *script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {option.replace("_", "-") for option in re.findall(r"--[a-z_-]+", shown.stdout)}


PARSERS = [
    PythonCodeBlockParser(doctest_optionflags=doctest.ELLIPSIS),
    CodeBlockParser("yaml", run_config),
    CodeBlockParser("sh", check_commands),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning 2.6 lags behind jsonargparse
@pytest.mark.filterwarnings("ignore:.*tensorboardX")  # what Lightning says of its default logger
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_block_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    document = Document.parse(str(path), *PARSERS)
    loader = make_loader(64, batch_size=64, size=16)
    document.namespace.update(model=Classifier(), train_loader=loader, images=torch.randn(2, 3, 32, 32))
    for example in document:
        example.evaluate()
    languages = re.findall(r"^ *```(\w+)", path.read_text(), re.MULTILINE)
    assert set(languages) <= {"python", "yaml", "sh", "text"}, "no parser knows the language of a block"


def test_the_site_builds_without_warnings_and_needs_no_other_host(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    for page in pages.values():
        assert not re.search(r'<(script|link|img|iframe)[^>]+(src|href)="(https?:)?//', page)
    for name in lightning_dropcluster.__all__:
        assert re.search(rf'<h3 id="[\w.]+\.{name}"', pages["reference.html"]), name


ROWS = re.findall(r"^\| `(\w+)` (\|.*)$", (ROOT / "docs" / "patterns.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("name", "cells"), ROWS, ids=[name for name, _ in ROWS])
def test_patterns_for_common_models_pick_something(name, cells):
    with torch.device("meta"):
        model = timm.create_model(name)
    stem, stages, *others = [re.findall(r'"(.+?)"', cell) for cell in cells.strip("|").split("|")]
    assert stem
    for pattern in chain(stem, *others):
        assert select_layers(model, pattern)
    suggested = preview(model, example_input=model.default_cfg["input_size"]).stages
    assert not stages or tuple(select_layers(model, stages, nn.Module)) == suggested


def test_the_table_of_settings_is_that_of_the_callback():
    table = re.findall(r"^\| `(.+)` \| .*\| .*\| .*\|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    named = {name for row in table for name in row.split("` or `")}
    assert named == set(inspect.signature(DropCluster).parameters) - {"layers"}
