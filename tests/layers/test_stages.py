"""What is picked without a pattern: the outputs of all stages but the last of the one timm model inside."""

import functools
import logging
import re

import pytest
import timm
import torch
from fits import Classifier, make_trainer
from timm.models import SwinTransformer
from torch import nn

from lightning_dropcluster import DropCluster, StructuredDropout, preview, select_layers
from lightning_dropcluster.layers.stages import default_layers, stage_ends

FAMILIES = {
    "resnet18": ["layer1", "layer2", "layer3"],
    "resnet50d": ["layer1", "layer2", "layer3"],  # timm lists the activation behind the stem
    "resnetv2_50": ["stages.0", "stages.1", "stages.2"],
    "efficientnet_b0": ["blocks.0", "blocks.1", "blocks.2", "blocks.4"],
    "mobilenetv3_small_050": ["blocks.0", "blocks.1", "blocks.3"],
    "convnext_atto": ["stages.0", "stages.1", "stages.2"],
    "regnetx_002": ["s1", "s2", "s3"],
    "vgg11_bn": ["features.6", "features.13", "features.20"],
    "densenet121": ["features.denseblock1", "features.denseblock2", "features.denseblock3"],
    "darknet53": ["stages.0", "stages.1", "stages.2", "stages.3"],
    "cspresnet50": ["stages.0", "stages.1", "stages.2"],
    "repvgg_a0": ["stages.0", "stages.1", "stages.2"],
    "legacy_xception": ["act2"],  # the others end inside blocks
    "inception_v3": ["Mixed_5d", "Mixed_6e"],
    "nfnet_f0": ["stages.0", "stages.1", "stages.2"],  # stem and head are convs among its stages
    "tresnet_m": ["body.layer1", "body.layer2", "body.layer3"],
    "maxvit_tiny_tf_224": ["stages.0", "stages.1", "stages.2"],
}


LIGHT = ["resnet18", "mobilenetv3_small_050", "convnext_atto", "regnetx_002", "densenet121", "repvgg_a0"]


@functools.cache
def on_meta(name: str, **options: bool) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    model = on_meta(family)
    root = nn.ModuleDict({"model": model})
    names, channels = default_layers(root), stage_ends(root)
    assert names == [f"model.{name}" for name in FAMILIES[family]]
    found = preview(model, None, model.default_cfg["input_size"])
    shapes = {f"model.{layer.name}": layer.shape for layer in found.layers}
    assert {name: shape[0] for name, shape in shapes.items()} == {name: channels[name] for name in names}
    assert all(len(shape) == 3 and shape[1] * shape[2] > 1 for shape in shapes.values())


@pytest.mark.parametrize("family", LIGHT)
def test_no_shortcut_bypasses_them(family):
    """With one of them set to zero, nothing of the image arrives at the head, whatever the image is."""
    model = timm.create_model(family, num_classes=0).eval()
    images = torch.randn(2, 3, 64, 64)
    for layer in select_layers(model).values():
        handle = layer.register_forward_hook(lambda _, args, output: output * 0.0)
        with torch.no_grad():
            first, second = model(images)
        handle.remove()
        assert torch.equal(first, second)


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel])
def test_the_model_is_found_wherever_it_is(wrap):
    inner = nn.ModuleDict({"encoder": wrap(on_meta("resnet18")), "head": nn.Linear(1, 1)})
    root = nn.ModuleDict({"loss": nn.CrossEntropyLoss(), "net": inner})
    assert list(select_layers(root)) == [f"net.encoder.layer{stage}" for stage in (1, 2, 3)]


def test_a_model_made_for_its_features_has_other_names():
    model = on_meta("convnext_atto", features_only=True)
    assert list(select_layers(model)) == ["stages_0", "stages_1", "stages_2"]


class TorchvisionLike(nn.Module):
    """Stages without feature_info."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        for stage in (1, 2, 3):
            setattr(self, f"layer{stage}", nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)))


def pasted(message: str) -> list[object]:
    """Read the patterns that an error says to copy."""
    return [eval(text) for text in re.findall(r"layers=(\[.*?\]|'.*?')", message)]


def test_without_a_model_that_tells_its_stages_there_are_patterns_to_copy():
    root = nn.ModuleDict({"model": TorchvisionLike(), "fc": nn.Linear(1, 1)})
    with pytest.raises(
        ValueError,
        match=r"layers=None: takes the stages of the one timm model .*, but there is none; say which",
    ) as error:
        select_layers(root)
    stages, stem = pasted(str(error.value))
    assert (stages, stem) == (["model.layer1", "model.layer2"], "model.conv1")
    assert list(select_layers(root, stages)) == stages


def test_with_two_models_there_are_the_stages_of_each_to_copy():
    root = nn.ModuleDict({"student": on_meta("resnet18"), "teacher": on_meta("vgg11_bn")})
    with pytest.raises(ValueError, match=r"there are 2 \(student, teacher\)") as error:
        select_layers(root)
    assert pasted(str(error.value)) == [
        [f"student.layer{stage}" for stage in (1, 2, 3)],
        [f"teacher.features.{place}" for place in (6, 13, 20)],
    ]


@pytest.mark.parametrize(
    ("family", "blocks"),
    [("vit_tiny_patch16_224", (2, 5, 8)), ("mixer_s16_224", (1, 3, 5)), ("convmixer_768_32", (7, 15, 23))],
)
def test_of_many_blocks_in_a_row_they_are_the_ends_of_quarters(family, blocks):
    assert default_layers(on_meta(family)) == [f"blocks.{block}" for block in blocks]


@pytest.mark.parametrize("family", ["mvitv2_tiny", "xception41", "coat_lite_tiny"])
def test_models_whose_stages_cannot_be_taken_say_so(family):
    with pytest.raises(
        ValueError, match=r"tells no stages whose outputs could be taken; say which, for .*layers="
    ) as error:
        select_layers(on_meta(family))
    for layers in pasted(str(error.value)):
        assert select_layers(on_meta(family), layers)


def test_a_model_without_convs_says_so():
    with pytest.raises(ValueError, match="there is no conv layer"):
        select_layers(nn.Sequential(nn.Linear(1, 1)))


@pytest.mark.parametrize(
    "feature_info",
    [[{"module": "a"}], [3], "stages", {"module": "a", "num_chs": 1}, [{"module": "", "num_chs": 1}]],
)
def test_what_only_looks_like_stages_is_none(feature_info):
    model = TorchvisionLike()
    model.feature_info = feature_info
    with pytest.raises(ValueError, match="layers=None"):
        select_layers(model)


# In a fit


@pytest.mark.parametrize(
    "make", [DropCluster, functools.partial(StructuredDropout, regularizer="drop_block")]
)
def test_a_callback_without_layers_takes_them_and_says_which(loader, caplog, make):
    callback = make(start=0.0)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        make_trainer(callback, max_epochs=1, fast_dev_run=2).fit(Classifier(), loader)
    names = [f"model.layer{stage}" for stage in (1, 2, 3)]
    assert (
        f"{type(callback).__name__}: layers=None takes the outputs of stages, layers={names}" in caplog.text
    )
    assert "'layers': None" in callback.state_key


def test_stages_of_another_number_of_channels_are_named_in_the_first_step(loader):
    swin = SwinTransformer(
        img_size=32, patch_size=2, embed_dim=8, depths=(1, 1), num_heads=(1, 1), num_classes=4
    )
    swin.feature_info[0]["num_chs"] = 9
    with pytest.raises(
        ValueError, match=r"takes 'model.layers.0' for a stage of 9 .* has shape \(8, 16, 16, 8\), neither"
    ):
        make_trainer(DropCluster()).fit(Classifier(swin), loader)
