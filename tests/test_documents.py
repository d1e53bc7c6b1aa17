"""Every fenced block of the documents does what it says."""

import doctest
import inspect
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import timm
import torch
import torch.nn.functional as F
from fits import Classifier, make_loader
from jsonargparse import ArgumentParser
from pytorch_lightning.cli import LightningCLI
from sybil import Document, Example
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from torch import nn

import lightning_dropcluster
from lightning_dropcluster import DropCluster, preview, select_layers
from lightning_dropcluster.cli import main

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    path for pattern in ("*.md", "docs/*.md", "benchmarks/*.md") for path in sorted(ROOT.glob(pattern))
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


class Documented(Classifier):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.model(batch[0]), batch[1]))


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return make_loader(1024, batch_size=128, size=16)

    def val_dataloader(self):
        return make_loader(128, batch_size=128, size=16)


def run_config(example: Example) -> None:
    """Fit with the YAML as LightningCLI's configuration."""
    Path("config.yaml").write_text(example.parsed)
    short = ["--trainer.max_epochs=3", "--trainer.logger=false", "--trainer.accelerator=cpu"]
    cli = LightningCLI(
        Documented,
        Data,
        args=["fit", "--config=config.yaml", *short],
        save_config_callback=None,
        seed_everything_default=False,
    )
    assert any(isinstance(c, DropCluster) and c.labels for c in cli.trainer.callbacks)


def check_commands(example: Example) -> None:
    """See that each command exists with its options; none is run."""
    for line in example.parsed.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            check_command(*words)


def check_command(program: str, *arguments: str) -> None:
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in arguments if "=" not in word} <= set(targets)
    elif program == "pip":
        assert arguments[0] == "install"
        for target in arguments[1:]:
            check_requirement(target)
    elif program in PROJECT["scripts"]:
        parse_only(main, arguments)
    elif program.endswith("python"):
        assert arguments[0] == "-m"
        parse_only(partial(runpy.run_module, arguments[1], run_name="__main__"), arguments[2:])
    else:
        pytest.fail(f"no check for {program!r}")


def check_requirement(target: str) -> None:
    name, extras = re.fullmatch(r"([\w.-]+)(?:\[(.+)\])?", target).groups()
    assert name in (".", PROJECT["name"])
    assert set((extras or "").split(",")) - {""} <= PROJECT["optional-dependencies"].keys()


class Parsed(BaseException):
    """The command line was understood."""


def parse_only(start: Callable[[], Any], arguments: Sequence[str]) -> None:
    """Start a command in this process, and stop it when it has parsed its command line."""

    def parse_args(self, *args, **options):
        ArgumentParser.parse_args = understood  # for those of subcommands
        self.parse_args(*args, **options)
        raise Parsed

    understood = ArgumentParser.parse_args
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        patch.setattr("sys.argv", ["command", *arguments])
        patch.setattr(ArgumentParser, "parse_args", parse_args)
        with pytest.raises(Parsed):
            start()


PARSERS = [
    PythonCodeBlockParser(doctest_optionflags=doctest.ELLIPSIS),
    CodeBlockParser("yaml", run_config),
    CodeBlockParser("sh", check_commands),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning 2.6 lags behind jsonargparse
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # of a benchmark that another test imported
@pytest.mark.filterwarnings("ignore:.*tensorboardX")  # what Lightning says of its default logger
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_block_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    document = Document.parse(str(path), *PARSERS)
    loader = make_loader(64, batch_size=64, size=16)
    document.namespace.update(
        model=Documented(), train_loader=loader, val_loader=loader, images=torch.randn(2, 3, 32, 32)
    )
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
    page = (ROOT / "docs" / "settings.md").read_text()
    table = re.findall(r"^\| `(.+)` \| .*\| .*\| .*\|$", page, re.MULTILINE)
    named = {name for row in table for name in row.split("` or `")}
    assert named == set(inspect.signature(DropCluster).parameters) - {"layers"}
