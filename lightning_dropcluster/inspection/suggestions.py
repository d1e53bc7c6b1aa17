"""Name patterns for common choices of layers, found from the model itself."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence

from torch import nn

from lightning_dropcluster.inspection.channels import transformer_parts
from lightning_dropcluster.inspection.tracing import Call
from lightning_dropcluster.layers.patterns import compile_pattern
from lightning_dropcluster.layers.selection import select_layers
from lightning_dropcluster.layers.stages import split_stages, without_last
from lightning_dropcluster.layers.wrappers import name_modules

_MOST_PATTERNS = 8  # a longer list says less than a look at the table


def suggest_patterns(root: nn.Module, calls: Sequence[Call]) -> dict[str, list[str]]:
    """Write common choices as patterns that pick exactly these layers."""
    convs = _convs(calls)
    if not convs:
        return {}
    stages = split_stages(calls, convs)
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


def suggest_last_patterns(root: nn.Module, calls: Sequence[Call]) -> dict[str, list[str]]:
    """Write patterns, for ``channel_dim=-1``, of what a transformer has."""
    last = {call.name for call in calls if call.channel_dim == -1}
    names = list(name_modules(root))
    patterns = {
        title: fewest_patterns(names, chosen)
        for title, parts in transformer_parts(root).items()
        if (chosen := [name for name in parts if name in last])
    }
    return {title: globs for title, globs in patterns.items() if len(globs) <= _MOST_PATTERNS}


def suggest_stages(calls: Sequence[Call]) -> list[Call]:
    """Find the outputs of the stages but the last, which no shortcut bypasses."""
    stages = without_last([end for end, _ in split_stages(calls, _convs(calls))])
    return [end for end in stages if end.gives_stage_maps]


def fewest_patterns(names: Collection[str], wanted: Collection[str]) -> list[str]:
    """Find few short patterns that together pick the names wanted and no others.

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
            yield f"**.{tail.lstrip('*.')}"
        yield f"{head}.{tail}"
        if not parts[-1].isdigit():
            yield f"{head}.**.{parts[-1]}"
        yield f"{head}.**"


def _convs(calls: Sequence[Call]) -> list[Call]:
    """Leave out convs of fewer dimensions than the first: such a gate works on one number per channel."""
    convs = [call for call in calls if call.is_conv]
    return [call for call in convs if len(call.grid) >= len(convs[0].grid)]


def _last_conv(end: Call, convs: Sequence[Call]) -> Call | None:
    """Find the last conv with maps as large as the stage's; those of other sizes are in branches."""
    fitting = [conv for conv in convs if not end.gives_stage_maps or conv.grid == end.grid]
    return fitting[-1] if fitting else None


def _kernel(call: Call) -> tuple[int, ...]:
    return getattr(call.module, "kernel_size", (1,))


def _is_depthwise(conv: nn.Module) -> bool:
    groups = getattr(conv, "groups", 1)
    return groups > 1 and groups == getattr(conv, "in_channels", None)
