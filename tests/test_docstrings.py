"""What users call or subclass says its arguments with their shapes, what it returns and what it raises."""

import ast
import inspect
import re
import textwrap
from dataclasses import is_dataclass

import pytest
from docstring_parser import DocstringStyle, parse

import lightning_dropcluster
from lightning_dropcluster import functional


def public_names():
    """Yield (name, class or function) of what users see and subclass, and of methods that override none."""
    for package in (lightning_dropcluster, functional):
        for name in package.__all__:
            value = getattr(package, name)
            if inspect.isroutine(value) or inspect.isclass(value):
                yield name, value
            if inspect.isclass(value):
                for method in vars(value).values():
                    function = inspect.unwrap(getattr(method, "__func__", method))
                    if inspect.isfunction(function) and is_new(function, value):
                        yield function.__qualname__, function


def is_new(function, owner) -> bool:
    name = function.__name__
    return not name.startswith("_") and not any(hasattr(base, name) for base in owner.__mro__[1:])


PUBLIC = dict(public_names())


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_is_complete(name):
    missing = list(faults(PUBLIC[name]))
    assert not missing, f"{name}: {'; '.join(missing)}"


def faults(value):
    documented = parse(value.__doc__ or "", DocstringStyle.GOOGLE)
    said = {parameter.arg_name: parameter.description or "" for parameter in documented.params}
    parameters = {} if inherits_init(value) else dict(inspect.signature(value).parameters)
    for name in ("self", "cls"):
        parameters.pop(name, None)
    for name, parameter in parameters.items():
        if name not in said and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            yield f"no {name} under Args"
        elif is_tensor(parameter) and not re.search(r"\(.*\)|shape|0-d|not used", said[name], re.DOTALL):
            yield f"no shape of {name}"
    summary = documented.short_description or ""
    if not summary:
        yield "no summary"
    if inspect.isfunction(value):
        returns = annotation(inspect.signature(value).return_annotation)
        if returns != "None" and documented.returns is None and not summary.startswith("Return "):
            yield "no Returns or Yields"
    if raises(value) and not documented.raises:
        yield "no Raises"


def inherits_init(value) -> bool:
    """Whether this is a class that leaves __init__, and what is said of it, to another."""
    function = vars(value).get("__init__") if inspect.isclass(value) else value
    return getattr(function, "__module__", None) != value.__module__


def is_tensor(parameter) -> bool:
    return re.match(r"(torch\.)?Tensor\b", annotation(parameter.annotation)) is not None


def annotation(hint) -> str:
    return hint if isinstance(hint, str) else getattr(hint, "__name__", str(hint))


def raises(value) -> bool:
    """Whether the body, of a class that of its __init__, raises or checks what it was given."""
    function = value
    if inspect.isclass(value):
        function = vars(value).get("__post_init__" if is_dataclass(value) else "__init__")
    if not inspect.isfunction(function) or function.__module__ != value.__module__:
        return False
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return any(
        (isinstance(node, ast.Raise) and node.exc is not None)
        or (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id.startswith("check_")
        )
        for node in ast.walk(tree)
    )
