"""Name patterns for common choices of layers, found from the model itself."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate

from torch import nn

from lightning_dropcluster.inspection.tracing import Call
from lightning_dropcluster.layers.patterns import compile_pattern
from lightning_dropcluster.layers.selection import CONV_LAYERS, select_layers

_MOST_PATTERNS = 8  # a longer list says less than a look at the table

# Segments in names of what is no part of a stage's own path.
_BESIDE = {"downsample", "shortcut", "pos_embed", "pos_embd", "head"}


def suggest_patterns(root: nn.Module, calls: Sequence[Call]) -> dict[str, list[str]]:
    """Write common choices as patterns that pick exactly these layers.

    Args:
        root: the model.
        calls: of all its conv layers and `stage_ends`, in the order in which they ran.

    Returns:
        Title to patterns, of the choices that the model has.
    """
    convs = _convs(calls)
    if not convs:
        return {}
    stages = _stages(calls)
    ends = [conv for end, own in stages if (conv := _last_conv(end, own))]
    large = [call for call in convs if max(_kernel(call)) > 1]
    late = set(calls[calls.index(stages[-3][0]) :]) if len(stages) > 2 else set()
    choices = {
        "stem": convs[:1] if sum(call.is_first for call in convs) < 2 else [],
        "last conv of each stage": ends,
        "k × k convs of the last two stages": [call for call in large if call in late],
        "all depthwise convs": [call for call in convs if _is_depthwise(call.module)],
        "all k × k convs": large,
    }
    names = list(select_layers(root, "**"))
    patterns = {
        title: fewest_patterns(names, [c.name for c in chosen]) for title, chosen in choices.items() if chosen
    }
    return {title: globs for title, globs in patterns.items() if len(globs) <= _MOST_PATTERNS}


def suggest_stages(calls: Sequence[Call]) -> list[str]:
    """Name the outputs of the stages but the last, past which no shortcut leads.

    Args:
        calls: as for `suggest_patterns`.

    Returns:
        Names; none where stages do not end with maps of several positions, or are as many as blocks.
    """
    names = [end.name for end, _ in _stages(calls)[:-1] if end.gives_stage_maps]
    return names if len(names) <= _MOST_PATTERNS else []


def fewest_patterns(names: Collection[str], wanted: Collection[str]) -> list[str]:
    """Find few short patterns that together pick the names wanted and no others.

    Args:
        names: of all layers.
        wanted: some of them.

    Returns:
        Globs, in the order of ``wanted``.

    Example:
        >>> fewest_patterns(["a.0.conv1", "a.0.conv2", "a.1.conv1", "a.1.conv2"], ["a.0.conv1", "a.1.conv1"])
        ['**.conv1']
    """
    tally = Counter(pattern for name in wanted for pattern in _generalisations(name))
    exact: dict[str, set[str]] = {name: {name} for name in wanted}
    for pattern in (pattern for pattern, count in tally.items() if count > 1):
        matches = compile_pattern(pattern)
        picked = {name for name in names if matches(name)}
        if picked <= exact.keys():
            exact[pattern] = picked
    missing, chosen = set(wanted), []
    while missing:
        best = max(exact, key=lambda pattern: (len(exact[pattern] & missing), not pattern.endswith("**")))
        chosen.append(best)
        missing -= exact[best]
    return chosen


def _generalisations(name: str) -> Iterator[str]:
    """Write a name as patterns that other names may share; with a number at its end it says too little."""
    parts = name.split(".")
    stars = ["*" if part.isdigit() else part for part in parts]
    for count in range(1, len(parts)):
        head, tail = ".".join(parts[:count]), ".".join(stars[count:])
        if tail.strip("*."):
            yield from (f"**.{tail.lstrip('*.')}", f"{head}.{tail}")
        if not parts[-1].isdigit():
            yield f"{head}.**.{parts[-1]}"
        yield f"{head}.**"


def _convs(calls: Sequence[Call]) -> list[Call]:
    """Leave out convs of fewer dimensions than the first: such a gate works on one number per channel."""
    convs = [call for call in calls if call.is_conv]
    return [call for call in convs if len(call.grid) >= len(convs[0].grid)]


def _stages(calls: Sequence[Call]) -> list[tuple[Call, list[Call]]]:
    """Pair each call that ends a stage with the convs on the stage's own path; the stem is no stage."""
    ends = [call for call in calls if call.ends_stage]
    convs = _convs(calls)
    if not (ends and convs):
        return []
    stem = _around(convs[0]) - _around(ends[-1])
    aside = _BESIDE | stem | {end.name for end in ends if _is_one_conv(end.module)}
    stages: list[tuple[Call, list[Call]]] = []
    own: list[Call] = []
    for call in calls:
        on_path = not aside & (_around(call) | set(call.name.split(".")))
        if on_path and call in convs:
            own.append(call)
        is_stage = own or (on_path and _has_matrix(call.module))
        # The last end may be a conv behind the last stage, in place of that stage's own end.
        if is_stage and call.ends_stage and (on_path or call == ends[-1]):
            stages.append((call, own))
            own = []
    return stages


def _around(call: Call) -> set[str]:
    """Name a module and those that hold it."""
    return set(accumulate(call.name.split("."), "{}.{}".format))


def _is_one_conv(module: nn.Module) -> bool:
    """Whether a module is one conv with its norm and activation: of a stem or head, which timm lists too."""
    convs = [name for name, inner in module.named_modules() if isinstance(inner, CONV_LAYERS)]
    return len(convs) == 1 and "." not in convs[0] and not isinstance(module, nn.Sequential)


def _has_matrix(module: nn.Module) -> bool:
    """Whether a module does more than norm, activation or pooling."""
    return any(weight.ndim > 1 for weight in module.parameters())


def _last_conv(end: Call, convs: Sequence[Call]) -> Call | None:
    """Find the last conv with maps as large as the stage's; those of other sizes are in branches."""
    fitting = [conv for conv in convs if not end.gives_stage_maps or conv.grid == end.grid]
    return fitting[-1] if fitting else None


def _kernel(call: Call) -> tuple[int, ...]:
    return getattr(call.module, "kernel_size", (1,))


def _is_depthwise(conv: nn.Module) -> bool:
    groups = getattr(conv, "groups", 1)
    return groups > 1 and groups == getattr(conv, "in_channels", None)
