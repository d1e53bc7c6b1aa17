"""Suggested patterns: exact by construction, right for the families of timm."""

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_dropcluster import preview, select_layers
from lightning_dropcluster.inspection.suggestions import fewest_patterns
from lightning_dropcluster.layers.patterns import compile_pattern

STEM, ENDS, LATE = "stem", "last conv of each stage", "k × k convs of the last two stages"
DEPTHWISE, LARGE = "all depthwise convs", "all k × k convs"

FAMILIES = {
    "resnet18": ("conv1", ["layer1.1.conv2", "layer2.1.conv2", "layer3.1.conv2", "layer4.1.conv2"]),
    "convnext_atto": ("stem.0", [f"stages.{i}.blocks.{j}.mlp.fc2" for i, j in enumerate((1, 1, 5, 1))]),
    "efficientnet_b0": (
        "conv_stem",
        ["blocks.0.0.conv_pw", *(f"blocks.{i}.conv_pwl" for i in ("1.1", "2.1", "4.2", "6.0"))],
    ),
    "vgg11": ("features.0", [f"features.{i}" for i in (3, 8, 13, 18)]),
    "regnetx_002": ("stem.conv", [f"s{i}.b{j}.conv3.conv" for i, j in ((1, 1), (2, 1), (3, 4), (4, 7))]),
    "mobilenetv3_small_050": (
        "conv_stem",
        ["blocks.0.0.conv_pw", "blocks.1.1.conv_pwl", "blocks.3.1.conv_pwl", "blocks.5.0.conv"],
    ),
    "densenet121": (
        "features.conv0",
        [f"features.denseblock{i}.denselayer{j}.conv2" for i, j in ((1, 6), (2, 12), (3, 24), (4, 16))],
    ),
    "vit_tiny_patch16_224": ("patch_embed.proj", None),
    "ecaresnet26t": ("conv1.0", [f"layer{i}.1.conv3" for i in (1, 2, 3, 4)]),  # whose gates are Conv1d
    "eca_nfnet_l0": ("stem.conv1", [f"stages.{i}.{j}.conv3" for i, j in enumerate((0, 1, 5, 2))]),
    "gernet_s": (
        "stem.conv",
        [
            f"stages.{name}.conv"
            for name in ("0.0.conv2_kxk", "1.2.conv2_kxk", "2.6.conv3_1x1", "4.0.conv3_1x1")
        ],
    ),
    "edgenext_xx_small": (
        "stem.0",
        [
            f"stages.{i}.blocks.{name}"
            for i, name in enumerate(("1.conv_dw", "1.convs.0", "5.convs.1", "1.convs.2"))
        ],
    ),
    "selecsls42b": ("stem.0", [f"features.{i}.conv6.0" for i in (1, 3, 5)]),
    "nest_tiny": ("patch_embed.proj", None),  # whose other convs have larger maps than their stages
    "repvgg_a0": (None, [f"stages.{i}.{j}.conv_kxk.conv" for i, j in enumerate((1, 3, 13, 0))]),
}


def on_meta(name):
    with torch.device("meta"):
        return timm.create_model(name)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    model = on_meta(family)
    stem, ends = FAMILIES[family]
    patterns = preview(model, example_input=model.default_cfg["input_size"]).patterns
    assert patterns.get(STEM) == (stem and [stem])
    assert patterns.get(ENDS) == ends
    convs = {
        name: conv for name, conv in select_layers(model, "**").items() if not isinstance(conv, nn.Conv1d)
    }
    assert set(select_layers(model, patterns[LARGE])) == {
        name for name, conv in convs.items() if max(conv.kernel_size) > 1 and "pre_logits" not in name
    }  # VGG's classifier is a conv of 7 × 7 whose maps are 1 × 1
    depthwise = {name for name, conv in convs.items() if conv.groups == conv.in_channels > 1}
    picked = select_layers(model, patterns[DEPTHWISE]) if DEPTHWISE in patterns else {}
    assert set(picked) == depthwise


@pytest.mark.parametrize(
    ("family", "stages"),
    [
        ("resnet18", ("layer1", "layer2", "layer3")),
        ("convnext_atto", ("stages.0", "stages.1", "stages.2")),
        ("efficientnet_b0", ("blocks.0", "blocks.1", "blocks.2", "blocks.4")),
        ("nfnet_f0", ("stages.0", "stages.1", "stages.2")),  # stem and head are convs among its stages
        ("maxvit_tiny_tf_224", ("stages.0", "stages.1", "stages.2")),  # whose stem has two convs
        ("resnet50d", ("layer1", "layer2", "layer3")),  # timm lists the activation behind its three convs
        ("tresnet_m", ("body.layer1", "body.layer2", "body.layer3")),  # timm lists a module without a name
        ("vgg16", ("features.3", "features.8", "features.15", "features.22")),  # timm lists the last pooling
        ("nest_tiny", ("levels.0", "levels.1")),  # no conv of its own in the first
        ("inception_v3", ("Mixed_5d", "Mixed_6e")),  # single convs are no stages
        ("selecsls42b", ()),  # all but the head give lists
        ("convmixer_768_32", ("blocks.7", "blocks.15", "blocks.23")),  # all of its 32 blocks are stages
        ("swin_tiny_patch4_window7_224", ("layers.0", "layers.1", "layers.2")),  # channels last
        ("vit_tiny_patch16_224", ("blocks.2", "blocks.5", "blocks.8")),  # tokens
        ("xception41", ()),  # whose stages end inside blocks, which have shortcuts around them
        ("hrnet_w18_small", ()),  # several outputs
    ],
)
def test_outputs_of_stages(family, stages):
    model = on_meta(family)
    assert preview(model, example_input=model.default_cfg["input_size"]).stages == stages
    assert not stages or tuple(select_layers(model, list(stages), nn.Module)) == stages


@pytest.mark.parametrize(
    ("family", "late"),
    [
        ("resnet50", ["layer3.*.conv2", "layer4.*.conv2"]),
        ("vgg11", [f"features.{i}" for i in (11, 13, 16, 18)]),
    ],
)
def test_last_two_stages(family, late):
    assert preview(on_meta(family), example_input=(3, 224, 224)).patterns[LATE] == late


class Permute(nn.Module):
    def __init__(self, *order):
        super().__init__()
        self.order = order

    def forward(self, x):
        return x.permute(self.order)


def test_a_stage_may_end_with_channels_last():
    def conv():
        return nn.Conv2d(4, 4, 3, padding=1)

    last = nn.Sequential(conv(), Permute(0, 2, 3, 1))
    model = nn.Sequential(conv(), nn.Sequential(conv()), last, nn.Sequential(Permute(0, 3, 1, 2), conv()))
    model.feature_info = [{"module": str(stage), "num_chs": 4} for stage in (0, 1, 2, 3)]
    found = preview(model, example_input=(4, 9, 9))
    assert (found.stages, found.stage_dims) == (("1", "2"), (1, -1))


BLOCKS, ATTENTION, MLP = "outputs of blocks", "attention branches", "MLP branches"


@pytest.mark.parametrize(
    ("family", "patterns"),
    [
        ("vit_tiny_patch16_224", {BLOCKS: ["blocks.*"], ATTENTION: ["**.attn"], MLP: ["**.mlp"]}),
        (
            "swin_tiny_patch4_window7_224",
            {BLOCKS: ["**.blocks.*"], ATTENTION: ["**.blocks.*.attn"], MLP: ["**.blocks.*.mlp"]},
        ),
        ("mixer_s16_224", {BLOCKS: ["blocks.*"], MLP: ["**.mlp_channels"]}),
        ("mvitv2_tiny", {}),  # whose blocks give the size besides
        ("resnet18", {}),
    ],
)
def test_parts_of_transformers(family, patterns):
    model = on_meta(family)
    found = preview(model, example_input=model.default_cfg["input_size"]).last_patterns
    assert found == patterns
    for chosen in found.values():
        assert select_layers(model, chosen, channel_dim=-1)


def test_models_that_give_features_have_underscores_in_their_names():
    with torch.device("meta"):
        model = timm.create_model("convnext_atto", features_only=True)
    assert preview(model, example_input=(3, 64, 64)).stages == ("stages_0", "stages_1", "stages_2")


@pytest.mark.parametrize("family", ["mobileone_s0", "fastvit_t8"])
def test_a_first_conv_past_which_another_leads_is_no_stem(family):
    assert STEM not in preview(on_meta(family), example_input=(3, 64, 64)).patterns


def test_names_have_the_childs_prefix_in_a_lightning_module():
    for family, names in (
        ("resnet18", ("layer1.1.conv2", "layer1")),
        ("test_resnet", ("layer1.0.conv2", "layer1")),
        ("tresnet_m", ("body.layer1.2.conv2.conv", "body.layer1")),
    ):
        found = preview(nn.ModuleDict({"model": on_meta(family)}), example_input=(3, 64, 64))
        assert (found.patterns[ENDS][0], found.stages[0]) == tuple(f"model.{name}" for name in names)


def test_a_model_that_names_no_stages_has_patterns_too():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1))
    assert preview(model, example_input=(3, 9, 9)).patterns == {
        STEM: ["0"],
        DEPTHWISE: ["1"],
        LARGE: ["0", "1"],
    }


def test_a_model_without_convs_has_none():
    assert preview(nn.Sequential(nn.Linear(2, 2)), "0", (2,), layer_types=nn.Linear).patterns == {}


segment = st.sampled_from(["a", "b", "0", "1", "conv1", "conv2"])
names = st.lists(
    st.lists(segment, min_size=1, max_size=4).map(".".join), min_size=1, max_size=12, unique=True
)


@given(names.flatmap(lambda every: st.tuples(st.just(every), st.sets(st.sampled_from(every), min_size=1))))
def test_a_cover_picks_exactly_what_is_wanted(case):
    every, wanted = case
    patterns = [compile_pattern(pattern) for pattern in fewest_patterns(every, list(wanted))]
    assert {name for name in every if any(matches(name) for matches in patterns)} == wanted
    assert len(patterns) <= len(wanted)
