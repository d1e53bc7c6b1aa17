"""Layers with channels last: all behind the hook sees maps, and the layer's output keeps its form."""

import pytest
import timm
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from lightning_dropcluster import select_layers
from lightning_dropcluster.layers.channels import Layout, find_layouts
from lightning_dropcluster.layers.injection import Injection
from lightning_dropcluster.methods import REGULARIZERS, ClusterDrop

IMAGE = {"has_tokens": True, "num_prefix_tokens": 1, "grid_size": (2, 6)}
CASES = {
    "maps": (Layout(-1), (3, 5, 4, 8), (3, 8, 5, 4)),
    "volumes": (Layout(-1), (3, 2, 5, 4, 8), (3, 8, 2, 5, 4)),
    "a sequence": (Layout(-1), (3, 9, 8), (3, 8, 9)),
    "one vector": (Layout(-1), (3, 8), (3, 8)),
    "maps of an image": (Layout(-1, **IMAGE), (3, 5, 4, 8), (3, 8, 5, 4)),
    "the grid told": (Layout(-1, **IMAGE), (3, 12, 8), (3, 8, 2, 6)),
    "the grid told, with a prefix": (Layout(-1, **IMAGE), (3, 13, 8), (3, 8, 2, 6)),
    "a square": (Layout(-1, has_tokens=True, num_prefix_tokens=1), (3, 16, 8), (3, 8, 4, 4)),
    "a square by chance": (Layout(-1, **IMAGE), (3, 25, 8), (3, 8, 1, 24)),
    "a square, with a prefix": (Layout(-1, **IMAGE), (3, 17, 8), (3, 8, 4, 4)),
    "no grid": (Layout(-1, **IMAGE), (3, 15, 8), (3, 8, 1, 14)),
    "fewer tokens than a prefix": (Layout(-1, **IMAGE), (3, 1, 8), (3, 8, 1, 1)),
    "channels first": (Layout(1, **IMAGE), (3, 8, 16), (3, 8, 16)),
    "found out, last": (Layout(None, 8, **IMAGE), (3, 17, 8), (3, 8, 4, 4)),
    "found out, first": (Layout(None, 8, **IMAGE), (3, 8, 5, 4), (3, 8, 5, 4)),
    "found out, both": (Layout(None, 8, **IMAGE), (3, 8, 5, 8), (3, 8, 5, 8)),
    "found out, both, told": (Layout(None, 8, told_last=True), (3, 8, 5, 8), (3, 8, 8, 5)),
    "found out, both, tokens": (Layout(None, 8, has_tokens=True), (3, 8, 8), (3, 8, 1, 8)),
}


@pytest.mark.parametrize(("layout", "shape", "seen"), CASES.values(), ids=CASES)
def test_what_is_split_is_a_view_and_joins_to_what_it_was(layout, shape, seen):
    x = torch.randn(shape)
    features, prefix = layout.split(x)
    assert features.shape == seen
    assert features.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    joined = layout.join(features.clone(), prefix, x)
    assert torch.equal(joined, x)
    assert joined.stride() == x.stride()


@pytest.mark.parametrize("layout", [Layout(-1), Layout(-1, has_tokens=True, num_prefix_tokens=1)])
def test_what_a_regulariser_lays_out_anew_is_contiguous_again(layout):
    x = torch.randn(3, 17, 8)
    features, prefix = layout.split(x)
    joined = layout.join(features.contiguous(), prefix, x)
    assert torch.equal(joined, x)
    assert joined.is_contiguous()


def test_tokens_before_the_grid_are_left_as_they_are():
    x = torch.randn(2, 17, 3)
    features, prefix = Layout(-1, has_tokens=True, num_prefix_tokens=1).split(x)
    assert torch.equal(prefix, x[:, :1])
    assert torch.equal(features[:, :, 1, 2], x[:, 1 + 4 + 2])


def test_channels_known_to_be_elsewhere_are_a_named_error():
    for layout, shape, message in (
        (Layout(1, 8), (3, 5, 4, 8), r"channel_dim=1: .*'a' .*\(3, 5, 4, 8\) with its 8 channels last; give"),
        (Layout(-1, 8), (3, 8, 5, 4), r"channel_dim=-1: .* with its 8 channels first; leave it out"),
        (Layout(None, 8), (3, 5, 4), r"layers=None: takes 'a' for a stage of 8 channels.*name other layers"),
    ):
        with pytest.raises(ValueError, match=message):
            layout.check("a", shape)
    Layout(1, 8).check("a", (3, 5, 4))  # nobody knows
    Layout(-1).check("a", (3, 5, 4))


@pytest.mark.parametrize("value", [0, 2, None, True, "last", -1.0])
def test_other_dimensions_are_a_named_error(value):
    with pytest.raises(ValueError, match=r"channel_dim=.*: must be 1 or -1"):
        select_layers(nn.Sequential(nn.Conv2d(1, 1, 1)), "0", channel_dim=value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_tiny_patch16_224", Layout(-1, 192, True, 1, (14, 14))),
        ("vit_small_patch14_reg4_dinov2", Layout(-1, 384, True, 5, (37, 37))),
        ("mixer_s16_224", Layout(-1, 512, True)),
        ("hiera_tiny_224", Layout(-1, 96)),  # whose tokens are in another order
    ],
)
def test_models_tell_how_their_tokens_lie(name, expected):
    with torch.device("meta"):
        root = nn.ModuleDict({"model": timm.create_model(name)})
    layers = select_layers(root, "blocks.0", channel_dim=-1)
    assert find_layouts(root, layers, -1) == {"model.blocks.0": expected}


def test_a_linear_layer_and_a_conv_tell_their_channels():
    root = nn.ModuleDict({"fc": nn.Linear(2, 3), "conv": nn.Conv1d(2, 5, 1)})
    layouts = find_layouts(root, dict(root.items()), -1)
    assert layouts == {"fc": Layout(-1, 3), "conv": Layout(-1, 5)}


# Patterns


def test_patterns_never_mean_convs_where_channels_are_last():
    model = timm.create_model("test_vit")
    assert list(select_layers(model, "blocks.[01].mlp.fc*", channel_dim=-1)) == [
        f"blocks.{block}.mlp.fc{place}" for block in (0, 1) for place in (1, 2)
    ]
    assert list(select_layers(model, lambda name, _: name == "blocks.0", channel_dim=-1)) == ["blocks.0"]
    with pytest.raises(ValueError, match=r"matches no layer that gives channels last, only patch_embed.proj"):
        select_layers(model, "patch_embed.proj", channel_dim=-1)
    with pytest.raises(ValueError, match=r"matches modules inside one another, such as blocks.0.norm1 in"):
        select_layers(model, "blocks.0**", channel_dim=-1)


# In the hook


class Layer(nn.Module):
    """Gives what it is given."""

    def forward(self, x):
        return x * 1.0


def hooked(regularizer, layout):
    layer = Layer()
    injection = Injection({"layer": layer}, {"layer": regularizer}).attach()
    injection.hooks["layer"].layout = layout
    return layer, injection.hooks["layer"]


VIT = Layout(-1, has_tokens=True, num_prefix_tokens=1)


def make(method):
    if method == "cluster_drop":
        return ClusterDrop(torch.arange(8 * 16).view(8, 4, 4) % 5, 0.5)
    kind = REGULARIZERS[method]
    return (kind(8) if method == "advanced_dropout" else kind(0.5)).train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("layout", "shape"), [(Layout(-1), (6, 4, 4, 8)), (VIT, (6, 17, 8))], ids=["maps", "vit"]
)
@pytest.mark.parametrize("method", REGULARIZERS)
def test_every_method_does_to_channels_last_what_it_does_to_maps(method, layout, shape, dtype):
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    regularizer = make(method).to(dtype)
    layer, _ = hooked(regularizer, layout)
    torch.manual_seed(0)
    out = layer(x)
    assert (out.shape, out.stride(), out.dtype) == (x.shape, x.stride(), dtype)
    features, prefix = layout.split(x)
    torch.manual_seed(0)
    expected = layout.join(regularizer(features.contiguous()), prefix, x)
    torch.testing.assert_close(out, expected)
    assert not torch.equal(out, x)
    if prefix is not None:
        assert torch.equal(out[:, :1], prefix)
    weight = torch.randn_like(out)
    grads = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (out, expected)]
    torch.testing.assert_close(*grads)


def count_frames(layout, shape):
    torch.compiler.reset()
    drop = make("cluster_drop")
    layer, _ = hooked(drop, layout)
    counter = CompileCounter()
    compiled, x = torch.compile(layer, fullgraph=True, backend=counter), torch.randn(shape)
    for drop_prob in (0.1, 0.5, 0.3):
        drop.set_drop_prob(drop_prob)
        torch.manual_seed(0)
        out = compiled(x)
        torch.manual_seed(0)
        assert torch.equal(out, layer(x))
    return counter.frame_count


def test_compiled_code_takes_no_more_frames_than_for_maps():
    frames = count_frames(Layout(), (6, 8, 4, 4))
    assert count_frames(VIT, (6, 17, 8)) == frames
    assert count_frames(Layout(None, 8), (6, 4, 4, 8)) == frames


def test_tokens_of_another_size_of_images_compile_too():
    torch.compiler.reset()
    layer, _ = hooked(make("cluster_drop"), VIT)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for tokens in (17, 26, 37, 50):
        out = compiled(torch.ones(6, tokens, 8))
        assert 0.0 < (out == 0).float().mean() < 1.0


def test_what_is_gathered_are_maps():
    class Shapes:
        shape, seen = (8, 4, 4), []

        def takes(self, shape):
            return shape == self.shape

        def update(self, x):
            self.seen.append(x)

    layer, hook = hooked(None, VIT)
    hook.sketch, hook.first_call = Shapes(), True
    x = torch.randn(2, 17, 8)
    assert torch.equal(layer(x), x)
    assert torch.equal(hook.sketch.seen[0], x[:, 1:].mT.reshape(2, 8, 4, 4))


def test_a_square_swin_stage_has_its_channels_where_timm_says():
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, embed_dim=8, num_heads=(1, 1, 1, 1)
    )
    stage = {"layers.0": model.layers[0]}
    layout = find_layouts(model, stage, None)["layers.0"]
    features, _ = layout.split(torch.arange(8.0).expand(1, 8, 8, 8))  # as many rows as channels
    assert torch.equal(features[0, :, 0, 0], torch.arange(8.0))
