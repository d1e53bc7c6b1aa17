"""The package's root: public names that are imported when they are first used."""

import ast
import importlib
import inspect
import subprocess
import sys

import pytest

import lightning_dropcluster


def test_every_public_name_is_what_type_checkers_take_it_for():
    block = next(
        node for node in ast.parse(inspect.getsource(lightning_dropcluster)).body if isinstance(node, ast.If)
    )
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        module = importlib.import_module(node.module)
        seen |= {alias.name: getattr(module, alias.name) for alias in node.names}
    assert sorted(seen) == sorted(lightning_dropcluster.__all__)
    assert all(getattr(lightning_dropcluster, name) is value for name, value in seen.items())


def test_names_are_listed_and_a_star_brings_them():
    assert {*lightning_dropcluster.__all__, "functional", "__version__"} <= set(dir(lightning_dropcluster))
    brought: dict = {}
    exec("from lightning_dropcluster import *", brought)
    assert set(lightning_dropcluster.__all__) <= set(brought)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'lightning_dropcluster' has no attribute 'DropClusters'"):
        lightning_dropcluster.DropClusters  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'DropClusters'"):
        exec("from lightning_dropcluster import DropClusters")


def test_help_needs_no_torch():
    code = "import sys; from lightning_dropcluster.cli import main\n"
    code += "try: main(['layers', '--help'])\nexcept SystemExit: sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)
