"""Patterns against an independent matcher, through wrappers, and on real timm models."""

import functools
import re
from fnmatch import fnmatchcase

import pytest
import timm
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_dropcluster.layers.patterns import nearest_names
from lightning_dropcluster.layers.selection import (
    CONV_LAYERS,
    check_layer_types,
    check_patterns,
    count_channels,
    select_layers,
)

SEGMENTS = st.sampled_from(["a", "b", "ab", "a1", "0", "conv1"])
TREES = st.dictionaries(
    SEGMENTS,
    st.recursive(
        st.sampled_from(["conv", "act"]),
        lambda inner: st.dictionaries(SEGMENTS, inner, max_size=3),
        max_leaves=8,
    ),
    min_size=1,
    max_size=4,
)
GLOBS = st.lists(
    st.sampled_from(["a", "b", "0", "*", "a*", "*1", "?", "??", "[ab]", "[!a]*", "[0-9]", "**"]),
    min_size=1,
    max_size=4,
)
relaxed = settings(deadline=None, max_examples=200)


def build(tree: dict | str) -> nn.Module:
    if isinstance(tree, dict):
        return nn.ModuleDict({name: build(inner) for name, inner in tree.items()})
    return nn.Conv1d(1, 1, 1) if tree == "conv" else nn.ReLU()


def conv_names(tree: dict | str, path: tuple[str, ...] = (), kind: str = "conv") -> list[str]:
    if isinstance(tree, dict):
        return [found for name, inner in tree.items() for found in conv_names(inner, (*path, name), kind)]
    return [".".join(path)] if tree == kind else []


def fits(name: list[str], pattern: list[str]) -> bool:
    """Compare segment by segment; ``**`` is any number of segments, at the end at least one."""
    if not pattern:
        return not name
    if pattern[0] == "**":
        at_least = 0 if pattern[1:] else 1
        return any(fits(name[n:], pattern[1:]) for n in range(at_least, len(name) + 1))
    return bool(name) and fnmatchcase(name[0], pattern[0]) and fits(name[1:], pattern[1:])


def expected(names: list[str], pattern: list[str]) -> list[str] | str:
    """What a pattern picks from the root, else from the only child in which it picks anything."""
    from_root = [name for name in names if fits(name.split("."), pattern)]
    below = [name for name in names if fits(name.split(".")[1:], pattern)]
    children = {name.split(".")[0] for name in below}
    return from_root or (below if len(children) == 1 else "is ambiguous" if children else "matches no")


def picked(model: nn.Module, *args, **options) -> list[str]:
    return list(select_layers(model, *args, **options))


def conv(**options) -> nn.Conv2d:
    return nn.Conv2d(1, 1, 1, **options)


class Residual(nn.Module):
    """Two convs, a norm and an activation: the block of `small_resnet`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act, self.conv2 = conv(), nn.BatchNorm2d(1), nn.ReLU(), conv()

    def forward(self, x):
        return x + self.conv2(self.act(self.bn1(self.conv1(x))))


def small_resnet() -> nn.Module:
    layers = {f"layer{n}": nn.Sequential(Residual(), Residual()) for n in (1, 2)}
    return nn.ModuleDict({"conv1": conv(), "bn1": nn.BatchNorm2d(1), **layers, "fc": nn.Linear(1, 1)})


def in_module(model: nn.Module) -> nn.Module:
    return nn.ModuleDict({"model": model})


# Globs


@relaxed
@given(TREES, GLOBS)
def test_a_glob_picks_what_segment_wise_fnmatch_picks(tree, glob):
    model, pattern = build(tree), ".".join(glob)
    answer = expected(conv_names(tree), glob)
    if answer == "matches no":  # conv layer; then what it names
        answer = expected(conv_names(tree, kind="act"), glob)
    if isinstance(answer, list):
        assert picked(model, pattern) == answer
    else:
        with pytest.raises(ValueError, match=answer):
            select_layers(model, pattern)


@relaxed
@given(TREES, st.data())
def test_a_list_picks_the_union_in_the_order_of_the_model(tree, data):
    names = conv_names(tree)
    assume(names)
    wanted = data.draw(st.lists(st.sampled_from(names), min_size=1))
    assert picked(build(tree), wanted) == [name for name in names if name in wanted]


@relaxed
@given(st.text("ab_-+$^(){}|\\ ", min_size=1).filter(str.strip), st.text("ab_-+$^(){}|\\ ", min_size=1))
def test_other_signs_in_a_pattern_stand_for_themselves(name, other):
    assume(name != other)
    model = nn.Module()
    model.add_module(name, conv())
    model.add_module(other, conv())
    assert picked(model, name) == [name]


@relaxed
@given(TREES)
def test_the_modules_are_those_of_the_model_by_their_names(tree):
    model = build(tree)
    assume(conv_names(tree))
    for name, module in select_layers(model, "**").items():
        assert module is model.get_submodule(name)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("conv1", ["conv1"]),
        ("layer1.*.conv1", ["layer1.0.conv1", "layer1.1.conv1"]),
        ("layer1.0.*", ["layer1.0.conv1", "layer1.0.conv2"]),
        ("layer?.0.conv2", ["layer1.0.conv2", "layer2.0.conv2"]),
        ("layer[12].1.conv1", ["layer1.1.conv1", "layer2.1.conv1"]),
        ("layer[!1].1.conv1", ["layer2.1.conv1"]),
        ("layer2.[0-9].conv[2-9]", ["layer2.0.conv2", "layer2.1.conv2"]),
        ("layer1.**", ["layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2"]),
        ("**.1.conv2", ["layer1.1.conv2", "layer2.1.conv2"]),
        ("**.conv1", ["conv1"] + [f"layer{n}.{m}.conv1" for n in (1, 2) for m in (0, 1)]),
        ("layer1**2", ["layer1.0.conv2", "layer1.1.conv2"]),
        ("layer1**.conv2", ["layer1.0.conv2", "layer1.1.conv2"]),
        ("**1.conv2", ["layer1.1.conv2", "layer2.1.conv2"]),
        ("l*.**.conv2", [f"layer{n}.{m}.conv2" for n in (1, 2) for m in (0, 1)]),
        ("re:^conv", ["conv1"]),
        ("re:1[.]conv2$", ["layer1.1.conv2", "layer2.1.conv2"]),
        (["layer2.1.conv2", "conv1"], ["conv1", "layer2.1.conv2"]),
        (("re:^conv1", "conv*"), ["conv1"]),
        (lambda name, module: name.endswith("1.conv2"), ["layer1.1.conv2", "layer2.1.conv2"]),
        ([lambda name, module: "2.1.conv2" in name, "conv1"], ["conv1", "layer2.1.conv2"]),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_patterns_on_a_resnet_and_on_a_module_that_holds_one(pattern, names, prefix):
    model = in_module(small_resnet()) if prefix else small_resnet()
    assert picked(model, pattern) == [prefix + name for name in names]


@pytest.mark.parametrize("pattern", ["*conv2", "layer1*conv1", "layer1?0?conv1", "layer1[!x]0[!x]conv1"])
def test_one_star_and_its_kin_do_not_cross_a_dot(pattern):
    with pytest.raises(ValueError, match="matches no layer"):
        select_layers(small_resnet(), pattern)


def test_case_counts():
    with pytest.raises(ValueError, match="layers='Conv1' matches no layer"):
        select_layers(small_resnet(), "Conv1")


def test_a_callable_sees_each_name_with_its_module():
    model, seen = small_resnet(), {}
    select_layers(model, lambda name, module: seen.update({name: module}) or True)
    assert seen == select_layers(model, "**")


def test_a_callable_may_choose_by_the_module():
    model = nn.ModuleDict({"a": conv(), "b": conv(bias=False)})
    assert picked(model, lambda name, module: module.bias is None) == ["b"]


# Root or single child


def test_the_root_goes_before_its_children():
    model = nn.ModuleDict({"conv1": conv(), "model": small_resnet()})
    assert picked(model, "conv1") == ["conv1"]


@pytest.mark.parametrize("pattern", ["conv1", "re:^conv1", lambda name, module: name == "conv1"])
def test_a_pattern_that_picks_layers_in_two_children_is_ambiguous(pattern):
    model = nn.ModuleDict({"student": small_resnet(), "teacher": small_resnet()})
    with pytest.raises(ValueError, match=r"ambiguous.* 2 children \('student.conv1', 'teacher.conv1'\)"):
        select_layers(model, pattern)
    assert picked(model, "student.conv1") == ["student.conv1"]


def test_each_pattern_of_a_list_finds_its_own_child():
    model = nn.ModuleDict({"a": nn.ModuleDict({"x": conv()}), "b": nn.ModuleDict({"y": conv()})})
    assert picked(model, ["y", "x"]) == ["a.x", "b.y"]


def test_grandchildren_are_not_searched():
    with pytest.raises(ValueError, match=r"'conv1' matches no layer; nearest: system\.model\.conv1"):
        select_layers(nn.ModuleDict({"system": in_module(small_resnet())}), "conv1")


def test_a_conv_alone_is_picked_by_a_callable():
    layer = conv()
    assert select_layers(layer, lambda name, module: True) == {"": layer}


# Wrappers


class Fsdp(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module


WRAPPERS = {
    "compile": torch.compile,
    "fsdp": Fsdp,
    "checkpoint": checkpoint_wrapper,
    "fsdp over checkpoint": lambda module: Fsdp(checkpoint_wrapper(module)),
    "compile over fsdp": lambda module: torch.compile(Fsdp(module)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("where", ["conv1", "layer1", "layer1.0", "layer2.1.conv2"])
def test_wrapper_segments_are_left_out_and_the_inner_module_is_picked(wrap, where):
    model = in_module(small_resnet())
    plain = select_layers(model, "**")
    model.set_submodule(f"model.{where}", wrap(model.get_submodule(f"model.{where}")))
    assert select_layers(model, "**") == plain
    assert list(select_layers(model, f"{where}**")) == [n for n in plain if n.startswith(f"model.{where}")]


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_root_has_the_names_of_the_model_inside(wrap):
    model = small_resnet()
    assert select_layers(wrap(model), "**") == select_layers(model, "**")


# Wrappers that are known by their class, and adapters


def of_package(package: str, name: str, **children: nn.Module) -> nn.Module:
    """A module as another package makes it."""
    module = type(name, (nn.Module,), {"__module__": f"{package}.inside"})()
    for child, inner in children.items():
        module.add_module(child, inner)
    return module


def adapted(layer: nn.Module, name: str = "Conv2d") -> nn.Module:
    """A layer that PEFT has put adapters on."""
    inner = {f"lora_{letter}": nn.ModuleDict({"default": conv()}) for letter in "AB"}
    return of_package("peft", name, base_layer=layer, **inner)


MODEL_WRAPPERS = {
    "data parallel": nn.DataParallel,
    "opacus": lambda model: of_package("opacus", "GradSampleModule", _module=model),
    "peft": lambda model: of_package(
        "peft", "PeftModel", base_model=of_package("peft", "LoraModel", model=model)
    ),
}


@pytest.mark.parametrize("wrap", MODEL_WRAPPERS.values(), ids=MODEL_WRAPPERS)
def test_segments_of_known_wrappers_are_left_out(wrap):
    plain = small_resnet()
    wrapped = in_module(wrap(plain))
    assert select_layers(wrapped, "**") == select_layers(in_module(plain), "**")
    assert picked(wrapped, "conv1") == ["model.conv1"]


def test_names_that_wrappers_use_count_in_other_modules():
    model = nn.ModuleDict(
        {"module": conv(), "base_model": nn.ModuleDict({"model": conv()}), "base_layer": conv()}
    )
    assert picked(model, "**") == ["module", "base_model.model", "base_layer"]


def test_an_adapter_counts_as_the_layer_that_it_adapts_and_its_own_layers_do_not():
    model = small_resnet()
    model["layer1"][0].conv1 = adapter = adapted(model["layer1"][0].conv1)
    model["fc"] = adapted(model["fc"], "Linear")
    found = select_layers(model, "layer1.0.**")
    assert list(found) == ["layer1.0.conv1", "layer1.0.conv2"]
    assert found["layer1.0.conv1"] is adapter
    assert not any("lora" in name or "fc" in name for name in select_layers(model, "**"))
    assert count_channels(adapter) == 1


def test_a_class_is_named_with_its_module_where_its_name_would_mislead():
    other = of_package("other", "Conv2d")
    with pytest.raises(ValueError, match=r"matches no conv layer, only a \(other\.inside\.Conv2d\)"):
        select_layers(nn.ModuleDict({"a": other, "b": conv()}), "a", CONV_LAYERS)
    with pytest.raises(
        ValueError, match=r"matches no other\.inside\.Conv2d layer, only b \(torch\.nn\..*Conv2d"
    ):
        select_layers(nn.ModuleDict({"a": other, "b": conv()}), "b", type(other))


# Layer types


@pytest.mark.parametrize("kind", CONV_LAYERS)
def test_every_conv_type_is_a_layer_and_other_modules_are_not(kind):
    model = nn.ModuleDict({"a": kind(1, 1, 1), "b": nn.Linear(1, 1), "c": nn.BatchNorm2d(1)})
    assert picked(model, "*") == ["a"]


def test_conv_layers_are_the_six_of_torch():
    expected = {f"Conv{transposed}{n}d" for transposed in ("", "Transpose") for n in (1, 2, 3)}
    assert {kind.__name__ for kind in CONV_LAYERS} == expected


def test_subclasses_are_picked():
    model = nn.ModuleDict({"a": timm.layers.StdConv2d(1, 1, 1), "b": timm.layers.Conv2dSame(1, 1, 1)})
    assert picked(model, "*") == ["a", "b"]


@pytest.mark.parametrize(
    ("layer_types", "names"),
    [
        (None, ["conv1", "conv2"]),
        (nn.BatchNorm2d, ["bn1"]),
        ([nn.BatchNorm2d, nn.ReLU], ["bn1", "act"]),
        ((*CONV_LAYERS, nn.ReLU), ["conv1", "act", "conv2"]),
        (nn.Module, ["conv1", "bn1", "act", "conv2"]),
    ],
)
def test_layer_types_say_what_may_be_picked(layer_types, names):
    assert picked(Residual(), "*", layer_types) == names


def test_a_shared_module_appears_once_under_the_first_name_picked():
    shared = conv()
    model = nn.ModuleDict({"a": shared, "b": conv(), "c": shared})
    assert picked(model, "*") == ["a", "b"]
    assert select_layers(model, "[bc]") == {"b": model["b"], "c": shared}


# Errors


@pytest.mark.parametrize("layers", [3, {"conv1"}, nn.Conv2d, nn.ReLU(), ["conv1", 3], [["conv1"]]])
def test_what_is_no_pattern_is_a_type_error(layers):
    with pytest.raises(TypeError, match=r"layers=.*: a pattern is a string or a callable"):
        select_layers(small_resnet(), layers)


@pytest.mark.parametrize("layers", ["", " ", "re:", "re: ", ["conv1", ""]])
def test_an_empty_pattern_is_refused(layers):
    with pytest.raises(ValueError, match=r"layers='.*': a pattern must not be empty"):
        check_patterns(layers)


@pytest.mark.parametrize("layers", [[], ()])
def test_an_empty_list_is_refused(layers):
    with pytest.raises(ValueError, match=rf"layers={re.escape(repr(layers))}: give at least one pattern"):
        check_patterns(layers)


@pytest.mark.parametrize(("pattern", "kind"), [("re:(", "regular expression"), ("layer[2-1]", "glob")])
def test_a_pattern_that_does_not_compile_is_refused(pattern, kind):
    with pytest.raises(ValueError, match=rf"layers='{re.escape(pattern)}': no valid {kind} \("):
        check_patterns(pattern)


@pytest.mark.parametrize("pattern", ["conv1", "re:x", len])
def test_one_pattern_becomes_a_list(pattern):
    assert check_patterns(pattern) == [pattern] == check_patterns([pattern])


@pytest.mark.parametrize("layer_types", [[3], ["Conv2d"], int, [nn.ReLU, nn.ReLU()]])
def test_a_layer_type_that_is_no_module_type_is_refused(layer_types):
    with pytest.raises(TypeError, match=r"layer_types=.* is no subclass of torch.nn.Module"):
        check_layer_types(layer_types)


def test_an_empty_list_of_layer_types_is_refused():
    with pytest.raises(ValueError, match=r"layer_types=\[\]: give at least one type"):
        check_layer_types([])


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("conv3", "model.conv1"),
        ("layer1.0.conv3", "model.layer1.0.conv1"),
        ("re:layer2.1.con2", "model.layer2.1.conv2"),
        ("**.layer2.0.cnv1", "model.layer2.0.conv1"),
    ],
)
def test_no_match_lists_the_nearest_names_first(pattern, nearest):
    message = f"layers={pattern!r} matches no layer; nearest: {nearest}, "
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        select_layers(in_module(small_resnet()), pattern)


def test_a_match_of_another_type_is_named_with_the_way_to_pick_it():
    message = (
        r"layers='bn1' matches no conv layer, only .*bn1 \(BatchNorm2d\); for other layers give layer_types="
    )
    with pytest.raises(ValueError, match=message):
        select_layers(in_module(small_resnet()), "bn1", CONV_LAYERS)


def test_a_match_of_a_block_lists_the_layers_inside():
    message = (
        r"only layer1 \(Sequential\); layers inside: layer1.0.conv1, .*\(write 'layer1.\*\*' to pick them"
    )
    with pytest.raises(ValueError, match=message):
        select_layers(small_resnet(), "layer1", CONV_LAYERS)


# Modules that a pattern names


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("layer[12]", ["layer1", "layer2"]),
        ("layer2.*", ["layer2.0", "layer2.1"]),
        ("**.act", [f"layer{n}.{m}.act" for n in (1, 2) for m in (0, 1)]),
        (["conv1", "bn1"], ["conv1", "bn1"]),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_pattern_that_matches_no_conv_layer_takes_what_it_names(pattern, names, prefix):
    model = in_module(small_resnet()) if prefix else small_resnet()
    assert picked(model, pattern) == [prefix + name for name in names]


def test_a_callable_is_asked_about_conv_layers_alone():
    with pytest.raises(ValueError, match="matches no layer; nearest conv layers"):
        select_layers(small_resnet(), lambda name, module: name == "layer1")


def test_a_list_that_runs_can_be_named():
    densenet = timm.create_model("densenet121")
    names = ["features.denseblock1", "features.denseblock2"]  # ModuleDicts with a forward
    assert picked(densenet, "features.denseblock[12]") == names


def test_lists_are_named_with_the_layers_inside():
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ReLU()])})
    with pytest.raises(
        ValueError, match=r"no layer that gives maps, only blocks \(ModuleList\); layers inside: blocks.0"
    ):
        select_layers(model, "blocks")


def test_modules_inside_one_another_are_not_both_meant():
    model = nn.Sequential(nn.Sequential(nn.BatchNorm2d(1)), nn.ReLU())
    with pytest.raises(
        ValueError, match=r"'\*\*' matches no conv layer, and .* such as 0.0 in 0; name those"
    ):
        select_layers(model, "**")


def test_other_layer_types_are_named_in_the_error():
    with pytest.raises(ValueError, match=r"only conv1 .*nearest BatchNorm2d/ReLU layers: bn1, "):
        select_layers(small_resnet(), "conv1", [nn.BatchNorm2d, nn.ReLU])


def test_where_any_module_may_be_picked_modules_are_nearest():
    with pytest.raises(ValueError, match="layers='leyer1' matches no layer; nearest modules: layer1, "):
        select_layers(small_resnet(), "leyer1", nn.Module)


def test_a_model_without_layers_says_so():
    with pytest.raises(ValueError, match="layers='conv' matches no layer; nearest: none"):
        select_layers(nn.ModuleDict({}), "conv")


def test_one_pattern_of_a_list_that_picks_nothing_is_an_error():
    with pytest.raises(ValueError, match="layers='conv9' matches no layer"):
        select_layers(small_resnet(), ["conv1", "conv9"])


@relaxed
@given(st.lists(st.text("ab1", min_size=1), min_size=1, unique=True), st.integers(1, 5), st.data())
def test_an_equal_name_is_the_nearest_of_all(names, count, data):
    name = data.draw(st.sampled_from(names))
    nearest = nearest_names(name, names, count)
    assert nearest[0] == name
    assert len(nearest) == len(set(nearest) & set(names)) == min(count, len(names))


def test_a_short_pattern_is_compared_with_the_ends_of_long_names():
    assert nearest_names("conv1", ["cv", "model.backbone.stages.layer3.conv2"], 1) == [
        "model.backbone.stages.layer3.conv2"
    ]


# Real models


@functools.cache
def timm_model(name: str) -> nn.Module:
    with torch.device("meta"):
        return in_module(timm.create_model(name, pretrained=False))


@pytest.mark.parametrize(
    ("name", "pattern", "count"),
    [
        ("resnet18", "conv1", 1),
        ("resnet18", "layer[12].*.conv2", 4),
        ("resnet18", "layer*.*.conv?", 16),
        ("resnet18", "layer*.0.downsample.*", 3),
        ("resnet18", "**", 20),
        ("convnext_atto", "stem.*", 1),
        ("convnext_atto", "stages.*.blocks.*.conv_dw", 2 + 2 + 6 + 2),
        ("efficientnet_b0", "conv_stem", 1),
        ("efficientnet_b0", "blocks.**.conv_dw", 16),
        ("efficientnet_b0", "re:se[.]conv_(reduce|expand)$", 32),
        ("vgg11", "features.*", 8),
        ("densenet121", "features.denseblock*.*.conv2", 6 + 12 + 24 + 16),
        ("densenet121", "features.transition[123].conv", 3),
        ("mobilenetv3_small_050", "blocks.*.*.conv_dw", 11),
        ("regnetx_002", "stem.conv", 1),
        ("regnetx_002", "s[1-4].*.conv2.conv", 1 + 1 + 4 + 7),
    ],
)
def test_patterns_on_timm_families(name, pattern, count):
    layers = select_layers(timm_model(name), pattern)
    assert len(layers) == count
    assert all(isinstance(layer, nn.Conv2d) for layer in layers.values())


@pytest.mark.parametrize(
    ("name", "pattern", "first"),
    [
        ("resnet18", ["layer4.1.conv2", "conv1"], "model.conv1"),
        ("convnext_atto", "stem.0", "model.stem.0"),
        ("efficientnet_b0", "blocks.**.conv_pw", "model.blocks.0.0.conv_pw"),
        ("vgg11", "features.?", "model.features.0"),
        ("densenet121", "re:conv0$", "model.features.conv0"),
        ("mobilenetv3_small_050", lambda name, module: module.groups > 1, "model.blocks.0.0.conv_dw"),
        ("regnetx_002", "**.conv2.conv", "model.s1.b1.conv2.conv"),
    ],
)
def test_the_first_layer_picked_in_timm_families(name, pattern, first):
    assert picked(timm_model(name), pattern)[0] == first


def test_a_module_shared_by_two_children_is_not_ambiguous():
    root = nn.Module()
    root.a = root.b = nn.ModuleDict({"conv": nn.Conv2d(1, 1, 1)})
    assert list(select_layers(root, "conv")) == ["a.conv"]


@pytest.mark.parametrize(("pattern", "picked"), [("[!-a]", ["b"]), ("[a||b]", ["a", "b"]), ("[!]", [])])
def test_odd_sets_of_characters(pattern, picked):
    root = nn.ModuleDict({name: nn.Conv2d(1, 1, 1) for name in ("a", "b")})
    if picked:
        assert list(select_layers(root, pattern)) == picked
    else:
        with pytest.raises(ValueError, match="matches no layer"):
            select_layers(root, pattern)


def test_a_callable_only_sees_layers_of_the_types_wanted():
    root = nn.Sequential(nn.ReLU(), nn.Conv2d(1, 1, 3))
    with pytest.raises(ValueError, match="matches no layer; nearest conv layers: 1"):
        select_layers(root, lambda name, module: module.kernel_size == (9, 9))


def test_a_callable_that_fails_names_the_layer():
    with pytest.raises(AttributeError) as error:
        select_layers(nn.Sequential(nn.ReLU()), lambda name, module: module.kernel_size, nn.Module)
    assert re.search(r"layers=<function .*> failed for '0' \(ReLU\)|failed for ''", error.value.__notes__[0])


@pytest.mark.parametrize(
    ("layer", "channels"),
    [
        (nn.Conv2d(3, 4, 1), 4),
        (nn.InstanceNorm3d(5), 5),
        (BatchNormAct2d(6), 6),
        (timm.create_model("test_resnet"), None),  # its num_features are those of its head
        (nn.ReLU(), None),
    ],
)
def test_only_layers_that_mean_their_output_tell_its_channels(layer, channels):
    assert count_channels(layer) == channels


@pytest.mark.parametrize("layer_types", [3, nn.ReLU()])
def test_layer_types_that_are_no_types(layer_types):
    with pytest.raises(TypeError, match=r"^layer_types=.* is no subclass of torch\.nn\.Module"):
        select_layers(nn.Conv2d(1, 1, 1), "*", layer_types)
