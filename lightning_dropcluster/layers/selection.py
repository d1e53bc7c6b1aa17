"""Name patterns to layers: which modules of a model a callback works on."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeGuard

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_dropcluster.checks import check_channel_dim, describe
from lightning_dropcluster.layers.patterns import compile_pattern, matching_names, nearest_names
from lightning_dropcluster.layers.stages import default_layers
from lightning_dropcluster.layers.wrappers import CONV_LAYERS, adapted_layer, has_forward, name_modules

Pattern = str | Callable[[str, nn.Module], bool]
Layers = Sequence[Pattern] | Pattern
"""How users say which layers, see `select_layers`. Lists come first, or jsonargparse could not save them."""
LayerTypes = type[nn.Module] | Sequence[type[nn.Module]]

_WIDEN = "give layer_types=torch.nn.Module"


def select_layers(
    root: nn.Module,
    layers: Layers | None = None,
    layer_types: LayerTypes | None = None,
    *,
    channel_dim: int = 1,
) -> dict[str, nn.Module]:
    """Return the layers of a model that name patterns pick.

    A pattern takes the conv layers that it matches; where it matches none, the modules that it names, such as
    the stages ``"layer[1-3]"``. Without a pattern, it takes all stages but the last of the one timm model
    inside, as its ``feature_info`` names them.

    Names are those of ``root.named_modules()`` without the segments that ``torch.compile``, FSDP,
    DataParallel, activation checkpointing, Opacus and PEFT insert. An adapter of PEFT counts as the layer
    that it adapts, and its own layers, such as ``lora_A``, are never picked. A string is a glob over the
    whole name: ``*`` and ``?`` stay inside one segment, ``**`` crosses dots (``**.`` at the start of a
    segment also matches nothing), ``[12]`` is a set of characters. A string that starts with ``re:`` is a
    regular expression, searched for anywhere in the name. A callable gets the name and the module, of conv
    layers unless ``layer_types`` says otherwise. A pattern that picks nothing from the root is tried from
    each direct child, so ``"conv1"`` finds ``model.conv1``.

    Args:
        root: the model, usually a LightningModule.
        layers: one pattern or a list of them, each of which must pick at least one layer; ``None`` for the
            stages.
        layer_types: the module types that may be picked, subclasses included, instead of conv layers or what
            a pattern names.
        channel_dim: -1 for layers that give (N, *spatial, C). Patterns then never mean conv layers, unless
            ``layer_types`` does.

    Returns:
        Name to module, in the order of ``named_modules()``. A module that stands under several names appears
        once, under the first of the names that were picked.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a pattern is empty or no valid expression, picks no layer, or picks layers in two
            direct children of the root, and where there is no pattern and not one timm model; the message
            lists the nearest names, or patterns to copy.

    Example:
        >>> model = nn.ModuleDict({"stem": nn.Conv2d(3, 8, 3), "norm": nn.BatchNorm2d(8)})
        >>> list(select_layers(nn.ModuleDict({"model": model}), "st*"))
        ['model.stem']
    """
    _check_module("root", root)
    check_channel_dim(channel_dim)
    names = name_modules(root)
    if layers is None:
        return {name: names[name] for name in default_layers(root)}
    patterns, types = check_patterns(layers), check_layer_types(layer_types)
    picked = {name for pattern in patterns for name in _pick(names, pattern, types, channel_dim)}
    unique: dict[int, str] = {}
    for name in names:
        if name in picked:
            unique.setdefault(id(names[name]), name)
    return {name: names[name] for name in unique.values()}


def find_layers(root: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Return the layers of these full names, in a LightningModule or in the bare model that it holds.

    In a bare model the names count without their first segment.

    Example:
        >>> list(find_layers(nn.ModuleDict({"stem": nn.Conv2d(3, 8, 3)}), ["model.stem"]))
        ['model.stem']
    """
    _check_module("model", root)
    there = name_modules(root)
    found = {name: there.get(name, there.get(name.partition(".")[2] or name)) for name in names}
    for name, module in found.items():
        if module is None:
            near = ", ".join(nearest_names(name, there)) or "none"
            raise ValueError(f"model: there is no layer {name!r} in {type(root).__name__}; nearest: {near}")
    return {name: module for name, module in found.items() if module is not None}


def check_patterns(layers: Layers) -> list[Pattern]:
    """Return the patterns as a list."""
    patterns = list(layers) if _is_sequence(layers) else [layers]
    if not patterns:
        raise ValueError(f"layers={layers!r}: give at least one pattern")
    for pattern in patterns:
        if isinstance(pattern, str):
            compile_pattern(pattern)
        elif not callable(pattern) or isinstance(pattern, type | nn.Module):
            raise TypeError(
                f"layers={pattern!r}: a pattern is a string or a callable (name, module) -> bool, "
                f"not {type(pattern).__name__}"
            )
    return patterns  # pyright: ignore[reportReturnType]


def check_layer_types(layer_types: LayerTypes | None) -> tuple[type[nn.Module], ...] | None:
    """Return the layer types as a tuple that ``isinstance`` takes; ``None`` leaves them to the pattern."""
    if layer_types is None:
        return None
    types = tuple(layer_types) if _is_sequence(layer_types) else (layer_types,)
    if not types:
        raise ValueError(f"layer_types={layer_types!r}: give at least one type, or leave it out")
    for entry in types:
        if not (isinstance(entry, type) and issubclass(entry, nn.Module)):
            raise TypeError(f"layer_types={layer_types!r}: {entry!r} is no subclass of torch.nn.Module")
    return types  # pyright: ignore[reportReturnType]


def count_channels(layer: nn.Module) -> int | None:
    """Return how many channels a layer gives, ``None`` where it does not tell."""
    layer = adapted_layer(layer)
    # What timm's models call num_features may be meant of their head.
    by_type = {_NormBase: "num_features", nn.Linear: "out_features"}
    told = next((told for kind, told in by_type.items() if isinstance(layer, kind)), "out_channels")
    channels = getattr(layer, told, None)
    return channels if isinstance(channels, int) else None


def _check_module(name: str, value: object) -> None:
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name}={describe(value)}: must be a torch.nn.Module, not {type(value).__name__}")


def _is_sequence(value: object) -> TypeGuard[Sequence[Any]]:
    """Tell a list, or what configuration tools give in its place, from one pattern or type."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def _pick(
    names: dict[str, nn.Module],
    pattern: Pattern,
    types: tuple[type[nn.Module], ...] | None,
    channel_dim: int,
) -> list[str]:
    """Apply one pattern: to layers of these types; without types to conv layers, else to what it names."""
    last = channel_dim == -1 and types is None
    found = [] if last else _search(names, pattern, types or CONV_LAYERS)
    if not found and types is None and (last or isinstance(pattern, str)):
        found = _search(_nameable(names, channel_dim), pattern, (nn.Module,))
        nested = [(outer, inner) for outer in found for inner in found if inner.startswith(f"{outer}.")]
        if nested:
            outer, inner = nested[0]
            raise ValueError(
                f"layers={pattern!r} matches {'' if last else 'no conv layer, and '}modules inside one "
                f"another, such as {inner} in {outer}; name those whose output you mean"
            )
    if not found:
        raise ValueError(_explain_no_match(names, pattern, types, channel_dim))
    return found


def _search(names: dict[str, nn.Module], pattern: Pattern, types: tuple[type[nn.Module], ...]) -> list[str]:
    """Apply one pattern from the root, else from each direct child."""
    matches = _predicate(pattern)
    candidates = {name: module for name, module in names.items() if isinstance(adapted_layer(module), types)}
    picked = [name for name, module in candidates.items() if matches(name, module)]
    if picked:
        return picked
    by_child: dict[str, list[str]] = {}
    for name, module in candidates.items():
        child, _, rest = name.partition(".")
        if rest and matches(rest, module):
            by_child.setdefault(child, []).append(name)
    if len({frozenset(id(candidates[name]) for name in found) for found in by_child.values()}) > 1:
        examples = ", ".join(f"{found[0]!r}" for found in by_child.values())
        raise ValueError(
            f"layers={pattern!r} is ambiguous: it picks layers in {len(by_child)} children ({examples}); "
            "write the child's name into the pattern"
        )
    return next(iter(by_child.values()), [])  # of one child, or of one module that has several names


def _nameable(names: dict[str, nn.Module], channel_dim: int) -> dict[str, nn.Module]:
    """Leave out what does not run, lists and the like, and what has its channels in the other dimension."""
    others = nn.Linear if channel_dim == 1 else CONV_LAYERS
    return {
        name: module
        for name, module in names.items()
        if has_forward(module) and not isinstance(adapted_layer(module), others)
    }


def _predicate(pattern: Pattern) -> Callable[[str, nn.Module], bool]:
    if not isinstance(pattern, str):
        return partial(_ask, pattern)
    matches = compile_pattern(pattern)
    return lambda name, module: matches(name)


def _ask(pattern: Callable[[str, nn.Module], bool], name: str, module: nn.Module) -> bool:
    try:
        return pattern(name, module)
    except Exception as error:
        error.add_note(f"layers={pattern!r} failed for {name!r} ({type(module).__name__})")
        raise


def _explain_no_match(
    names: dict[str, nn.Module],
    pattern: Pattern,
    types: tuple[type[nn.Module], ...] | None,
    channel_dim: int,
) -> str:
    """Say why a pattern picked nothing, and what would have been near."""
    may_name = types is None and (isinstance(pattern, str) or channel_dim == -1)
    allowed = types or ((nn.Module,) if may_name else CONV_LAYERS)
    there = _nameable(names, channel_dim) if may_name else names
    candidates = [
        name for name, module in there.items() if name and isinstance(adapted_layer(module), allowed)
    ]
    others = matching_names(names, pattern) if isinstance(pattern, str) else []
    called = _names_of_types([*allowed, *(type(names[name]) for name in others)])
    kind = "/".join(called[k] for k in allowed) + " "
    if allowed == CONV_LAYERS:
        kind = "conv "
    elif may_name:
        kind = ""
    if others:
        kinds = ", ".join(f"{name} ({called[type(names[name])]})" for name in others[:3])
        gives = f" that gives {'maps' if channel_dim == 1 else 'channels last'}" * may_name
        head = f"layers={pattern!r} matches no {kind}layer{gives}, only {kinds}"
        inside = [n for n in candidates if any(n.startswith(other + ".") for other in others)]
        widen = "" if may_name else f"; for its own output {_WIDEN}"
        if inside:
            advice = "" if str(pattern).startswith("re:") else f" (write '{pattern}.**' to pick them)"
            return f"{head}; layers inside: {', '.join(inside[:5])}{advice}{widen}"
        head += f"; for other layers {_WIDEN}"
    else:
        head = f"layers={pattern!r} matches no layer"
    nearest = f"nearest {kind}layers"
    if may_name:
        nearest = "nearest"
    elif types == (nn.Module,):
        nearest = "nearest modules"
    near = nearest_names(pattern, candidates) if isinstance(pattern, str) else candidates[:5]
    return f"{head}; {nearest}: {', '.join(near) or 'none'}"


def _names_of_types(types: Iterable[type]) -> dict[type, str]:
    """Name classes, with their modules where the names of two would be the same."""
    unique = set(types)
    count = Counter(kind.__name__ for kind in unique)
    return {k: k.__name__ if count[k.__name__] == 1 else f"{k.__module__}.{k.__qualname__}" for k in unique}
