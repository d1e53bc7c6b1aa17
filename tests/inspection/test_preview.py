"""Preview: the shapes of a real run, and a model that is left as it was."""

import copy

import pytest
import timm
import torch
from fits import Classifier, count_hooks, make_loader, make_trainer, tiny_resnet
from torch import nn

from lightning_dropcluster import DropCluster, preview, select_layers
from lightning_dropcluster.inspection.preview import LayerPreview, format_bytes
from lightning_dropcluster.learning.sketch import Sketch

IMAGE = (3, 32, 32)


def test_a_fit_gathers_and_clusters_what_the_preview_said():
    module, callback = Classifier(), DropCluster("layer[12].*.conv2", start=0.0, num_samples=8)
    found = preview(module, "layer[12].*.conv2", IMAGE, num_samples=8)
    make_trainer(callback, max_epochs=1).fit(module, make_loader())
    assert {layer.name: layer.shape for layer in found.layers} == {
        name: tuple(labels.shape) for name, labels in callback.labels.items()
    }
    for layer in found.layers:
        clusters = [len(one.unique()) for one in callback.labels[layer.name]]
        assert (layer.problems, layer.num_clusters) == (len(clusters), max(clusters))
        assert layer.features == callback.labels[layer.name].numel()


@pytest.mark.parametrize("scope", ["map", "position", "layer", "channel"])
def test_sketch_memory_is_that_of_a_sketch(scope):
    (layer,) = preview(tiny_resnet(), "conv1", IMAGE, scope=scope, sketch_dim=16).layers
    sketch = Sketch(layer.shape, scope=scope, sketch_dim=16)
    assert layer.sketch_bytes == sum(buffer.nbytes for buffer in sketch.buffers())


class Untidy(nn.Module):
    """Writes into a buffer, replaces another and draws random numbers whenever it runs."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(2))
        self.norm.eval()

    def forward(self, x):
        self.calls += 1
        self.last = torch.randn(2)
        return self.norm(self.conv(x))


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = Untidy()
    state, modes = copy.deepcopy(model.state_dict()), [inner.training for inner in model.modules()]
    hooks, random = count_hooks(model), torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError, match="channels"):
            preview(model, "conv", (5, 8, 8))
    else:
        assert preview(model, "conv", (3, 8, 8)).layers[0].shape == (4, 6, 6)
    assert all(torch.equal(now, state[name]) for name, now in model.state_dict().items())
    assert [inner.training for inner in model.modules()] == modes
    assert count_hooks(model) == hooks
    assert torch.equal(torch.get_rng_state(), random)
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize(
    "example",
    [torch.zeros(2, 3, 32, 32), (torch.zeros(1, 3, 32, 32),), {"x": torch.zeros(1, 3, 32, 32)}, [3, 32, 32]],
)
def test_inputs_as_forward_takes_them(example):
    assert preview(Classifier(), "conv1", example).layers[0].shape == (64, 16, 16)


def test_lightnings_own_example_serves():
    module = Classifier()
    module.example_input_array = torch.zeros(1, 3, 64, 64)
    assert preview(module, "conv1").layers[0].shape == (64, 32, 32)
    with pytest.raises(ValueError, match="example_input: give a batch, or the shape of one sample"):
        preview(Classifier(), "conv1")


def test_a_module_without_forward_runs_the_child_that_holds_the_layers():
    parts = nn.ModuleDict({"model": tiny_resnet(), "loss": nn.CrossEntropyLoss(), "other": nn.Linear(1, 1)})
    assert preview(parts, "conv1", IMAGE).layers[0].name == "model.conv1"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_meta_device_gives_the_same_answer(dtype):
    real = preview(tiny_resnet().to(dtype), "**", IMAGE)
    assert preview(tiny_resnet().to(dtype).to("meta"), "**", IMAGE) == real


def test_a_compiled_model_is_run_without_compiling():
    model = tiny_resnet()
    compiled = torch.compile(model, backend=lambda *_: pytest.fail("compiled"))
    assert [layer.name for layer in preview(compiled, "**", IMAGE).layers] == list(select_layers(model, "**"))


def test_a_shape_with_the_batch_is_told():
    with pytest.raises(RuntimeError) as error:
        preview(nn.Sequential(nn.Conv2d(3, 4, 3)), "0", (1, 3, 8, 8))
    assert "the module was called with inputs of shapes [(1, 1, 3, 8, 8)]" in error.value.__notes__[0]


def test_layers_that_eval_mode_leaves_out_are_named():
    class WithHelper(nn.Sequential):
        def forward(self, x):
            return self[0](x), self[1](x) if self.training else None

    found = preview(WithHelper(nn.Conv2d(3, 4, 1), nn.Conv2d(3, 2, 1)), "1", IMAGE)
    assert [layer.shape for layer in found.layers] == [None]
    assert "does not run in eval mode" in repr(found)
    assert found.sketch_bytes == 0


def test_of_several_calls_the_first_that_gives_a_tensor_counts():
    class Twice(nn.Sequential):
        def forward(self, x):
            return self[0](None), self[0](x), self[0](x[:, :1])

    found = preview(Twice(nn.Identity()), "0", IMAGE, layer_types=nn.Identity)
    assert [layer.shape for layer in found.layers] == [IMAGE]


def test_an_output_without_channels_is_told():
    found = preview(nn.Sequential(nn.Flatten(0)), "0", IMAGE, layer_types=nn.Flatten)
    assert "gives a tensor without channels" in repr(found)


def test_other_layers_than_convs():
    layers = preview(nn.Sequential(nn.Linear(4, 6), nn.ReLU()), "1", (4,), layer_types=nn.ReLU).layers
    assert [(layer.type, layer.shape) for layer in layers] == [("ReLU", (6,))]


def test_the_table_lists_each_layer_and_adds_up():
    found = preview(Classifier(), ["conv1", "layer1.**"], IMAGE, num_clusters=5)
    lines = repr(found).splitlines()
    assert lines[0].split() == ["layer", "type", "output", "features", "clusters", "sketch"]
    assert [line.split()[0] for line in lines[2:-2]] == [layer.name for layer in found.layers]
    assert "model.conv1" in lines[2]
    assert lines[2].split()[1:] == ["Conv2d", "64×16×16", "16,384", "64", "×", "5", "4.3", "MB"]
    features = sum(layer.features for layer in found.layers)
    assert lines[-1].split() == [
        "4",
        "layers",
        f"{features:,}",
        str((64 + 3 * 8) * 5),
        format_bytes(found.sketch_bytes)[:-3],
        "MB",
    ]
    assert len({len(line) for line in lines}) == 1


def test_cells_say_one_number_where_there_is_one_problem():
    assert LayerPreview("a", "Conv2d", (8, 4, 4), 1, 7, 0).cells()[4] == "7"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_clusters": 0}, "num_clusters=0: must be an integer in"),
        ({"cluster_size": 0.5}, "cluster_size=0.5: must be"),
        ({"num_clusters": 2, "cluster_size": 2}, "give one of the two"),
        ({"scope": "maps"}, "scope='maps': must be one of map, position"),
        ({"sketch_dim": 0}, "sketch_dim=0: must be"),
        ({"num_samples": -1}, "num_samples=-1: must be"),
        ({"layers": "nothing"}, "layers='nothing' matches no layer"),
        ({"example_input": (3, 0, 2)}, r"example_input=\(3, 0, 2\): must be a batch, or the shape"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        preview(tiny_resnet(), **({"layers": "**", "example_input": IMAGE} | arguments))


def test_without_layers_it_shows_what_the_callback_takes_else_the_convs():
    assert [layer.name for layer in preview(Classifier(), example_input=IMAGE).layers] == [
        f"model.layer{stage}" for stage in (1, 2, 3)
    ]
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    assert [layer.name for layer in preview(plain, example_input=IMAGE).layers] == ["0"]


class Tokens(nn.Module):
    """Tokens of whatever image, through a layer that nothing is known of."""

    def __init__(self):
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 8, 4, stride=4), nn.GELU()

    def forward(self, x):
        return self.act(self.stem(x).flatten(2).mT)


@pytest.mark.parametrize(
    ("channel_dim", "layers", "message"),
    [
        (1, "act", r"^channel_dim=1: channels come last in the outputs of act; give channel_dim=-1$"),
        (-1, "1", r"^channel_dim=-1: channels come first in the outputs of 1; leave it out$"),
    ],
)
def test_a_wrong_dimension_is_told_by_images_of_another_size(channel_dim, layers, message):
    model = Tokens() if channel_dim == 1 else nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU())
    with pytest.warns(UserWarning, match=message):
        preview(model, layers, IMAGE, channel_dim=channel_dim)


def test_the_right_dimension_is_not(recwarn):
    found = preview(Tokens(), "act", IMAGE, channel_dim=-1, num_clusters=2)
    assert [(layer.shape, layer.channel_dim, layer.problems) for layer in found.layers] == [((8, 64), -1, 8)]
    assert not recwarn


def test_tokens_lie_on_their_grid():
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=56)
    (layer,) = preview(model, "blocks.0", (3, 56, 56), channel_dim=-1, cluster_size=4).layers
    assert (layer.shape, layer.num_clusters) == ((384, 4, 4), 4)
