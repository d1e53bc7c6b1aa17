"""The stages of a timm model, as its ``feature_info`` tells them: what is picked without a pattern."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

from torch import nn

from lightning_dropcluster.layers.wrappers import CONV_LAYERS, has_forward, name_modules

_MOST_STAGES = 6  # before the last; models that name more name their blocks

# Segments in names of what is no part of a stage's own path.
_BESIDE = {"downsample", "shortcut", "pos_embed", "pos_embd", "head"}


@dataclass(frozen=True)
class Step:
    """A module in the order in which a model runs, or defines, its own; channels where it ends a stage."""

    name: str
    module: nn.Module
    stage_channels: int | None

    @property
    def ends_stage(self) -> bool:
        """Whether a stage may end with it, see `stage_ends`."""
        return self.stage_channels is not None


_Step = TypeVar("_Step", bound=Step)
_Named = TypeVar("_Named")


def default_layers(root: nn.Module) -> list[str]:
    """Name the outputs of all stages but the last of the one timm model inside."""
    models = _timm_models(root)
    if len(models) != 1:
        found = f"there are {len(models)} ({', '.join(models)})" if models else "there is none"
        raise ValueError(
            f"layers=None: takes the stages of the one timm model inside {type(root).__name__}, as its "
            f"feature_info names them, but {found}; {_say_which(root, list(models))}"
        )
    ((name, model),) = models.items()
    stages = _stages_before_last(root, name)
    if not stages:
        raise ValueError(
            f"layers=None: {type(model).__name__} tells no stages whose outputs could be taken; "
            f"{_say_which(root, [])}"
        )
    return stages


def stage_ends(root: nn.Module) -> dict[str, int]:
    """Find the modules with which the stages of timm models end, by ``feature_info``, with their channels.

    Ends that timm places inside a block are left out, since the block's shortcut leads past them, and lists
    of blocks, which do not run themselves.
    """
    ends: dict[str, int] = {}
    for prefix, model in _timm_models(root).items():
        named = name_modules(model)
        for entry in _entries(model):
            # Models made with features_only=True have underscores in place of the dots.
            for name in (str(entry["module"]), str(entry["module"]).replace(".", "_")):
                if name and _may_end(name, named):
                    ends[_join(prefix, name)] = entry["num_chs"]
    return ends


def split_stages(visited: Sequence[_Step], convs: Sequence[_Step]) -> list[tuple[_Step, list[_Step]]]:
    """Pair each module that ends a stage with the convs on the stage's own path; the stem is no stage."""
    ends = [step for step in visited if step.ends_stage]
    if not (ends and convs):
        return []
    stem = _around(convs[0].name) - _around(ends[-1].name)
    aside = _BESIDE | stem | {end.name for end in ends if _is_one_conv(end.module)}
    stages: list[tuple[_Step, list[_Step]]] = []
    own: list[_Step] = []
    for step in visited:
        on_path = not aside & (_around(step.name) | set(step.name.split(".")))
        if on_path and step in convs:
            own.append(step)
        is_stage = own or (on_path and _has_matrix(step.module))
        # The last end may be a conv behind the last stage, in place of that stage's own end.
        if is_stage and step.ends_stage and (on_path or step == ends[-1]):
            stages.append((step, own))
            own = []
    return stages


def without_last(stages: Sequence[_Named]) -> list[_Named]:
    """Leave out the last stage; of blocks in a row, as in a plain transformer, take the ends of quarters.

    Example:
        >>> without_last(["a", "b", "c"]), without_last(list(range(12)))
        (['a', 'b'], [2, 5, 8])
    """
    blocks = len(stages)
    if blocks <= _MOST_STAGES + 1:
        return list(stages[:-1])
    return [stages[round(blocks * quarter / 4) - 1] for quarter in (1, 2, 3)]


def _timm_models(root: nn.Module) -> dict[str, nn.Module]:
    """Find the models that tell their stages, by what they have: this package does without timm."""
    found: dict[str, nn.Module] = {}
    for name, module in name_modules(root).items():
        is_inside = any(not outer or name.startswith(f"{outer}.") for outer in found)
        if not is_inside and _entries(module) and not any(module is other for other in found.values()):
            found[name] = module
    return found


def _entries(module: nn.Module) -> Sequence[Mapping[str, Any]]:
    """What a module's feature_info says of its stages; nothing where it has none."""
    info = getattr(module, "feature_info", None)
    entries: Any = getattr(info, "info", info)
    is_list = isinstance(entries, list | tuple)
    told = is_list and all(
        isinstance(entry, Mapping) and {"module", "num_chs"} <= entry.keys() for entry in entries
    )
    return entries if told else ()


def _stages_before_last(root: nn.Module, model: str) -> list[str]:
    """Find the stages from the order in which the model defines its modules."""
    ends = stage_ends(root)
    steps = [
        Step(name, module, ends.get(name))
        for name, module in _inside_out(root)
        if (not model or f"{name}.".startswith(f"{model}."))
        and (name in ends or isinstance(module, CONV_LAYERS))
    ]
    convs = [step for step in steps if isinstance(step.module, CONV_LAYERS)]
    convs = [conv for conv in convs if _dims(conv) >= _dims(convs[0])]  # others gate, a number a channel
    return without_last([end.name for end, _ in split_stages(steps, convs)])


def _inside_out(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name modules in order, each behind those inside it."""
    names = name_modules(root)
    open_names: list[str] = []
    for name in [*names, None]:
        while open_names and not (name and (not open_names[-1] or name.startswith(f"{open_names[-1]}."))):
            yield open_names[-1], names[open_names.pop()]
        if name is not None:
            open_names.append(name)


def _say_which(root: nn.Module, models: Sequence[str]) -> str:
    """Write patterns to copy: the stages of each model, else the parts of the trunk, and the first conv."""
    names = name_modules(root)
    convs = [name for name, module in names.items() if isinstance(module, CONV_LAYERS)]
    if not convs:
        return "say which layers; there is no conv layer"
    choices = [_stages_before_last(root, model) for model in models]
    if not any(choices):
        trunk = _trunk(convs)
        parts = dict.fromkeys(".".join(c.split(".")[: trunk + 1]) for c in convs)
        run = [part for part in parts if part not in convs and has_forward(names[part])]
        choices = [run[:-1], convs[:1]]
    texts = [
        f"layers={choice[0]!r}" if len(choice) == 1 else f"layers={choice!r}" for choice in choices if choice
    ]
    return f"say which, for example {' or '.join(texts)}"


def _trunk(convs: Sequence[str]) -> int:
    """Count the segments that all names of convs begin with."""
    same = [len(set(column)) == 1 for column in zip(*(name.split(".")[:-1] for name in convs), strict=False)]
    return [*same, False].index(False)


def _dims(conv: Step) -> int:
    return len(getattr(conv.module, "kernel_size", ()))


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _around(name: str) -> set[str]:
    """Name a module and those that hold it."""
    return set(accumulate(name.split("."), "{}.{}".format))


def _is_one_conv(module: nn.Module) -> bool:
    """Whether a module is one conv with its norm and activation: of a stem or head, which timm lists too."""
    convs = [name for name, inner in module.named_modules() if isinstance(inner, CONV_LAYERS)]
    return len(convs) == 1 and "." not in convs[0] and not isinstance(module, nn.Sequential)


def _has_matrix(module: nn.Module) -> bool:
    """Whether a module does more than norm, activation or pooling."""
    return any(weight.ndim > 1 for weight in module.parameters())


def _may_end(name: str, named: Mapping[str, nn.Module]) -> bool:
    return name in named and has_forward(named[name]) and not _is_inside_a_block(name, named)


def _is_inside_a_block(name: str, named: Mapping[str, nn.Module]) -> bool:
    """Whether something other than a plain container stands between a module and its model."""
    around = list(accumulate(name.split("."), "{}.{}".format))[:-1]
    plain = nn.Sequential | nn.ModuleList | nn.ModuleDict
    return not all(isinstance(named[outer], plain) for outer in around)
