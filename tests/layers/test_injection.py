"""Injection: what hooks do, and that nothing of them is left behind."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator

import pytest
import timm
import torch
from fits import count_hooks
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.ao.quantization import get_default_qat_qconfig, prepare_qat
from torch.nn.modules.module import register_module_full_backward_hook
from torch.nn.utils.parametrizations import spectral_norm

from lightning_dropcluster.layers.channels import Layout
from lightning_dropcluster.layers.injection import Injection
from lightning_dropcluster.layers.troubles import backward_hook_warning


class Negate(nn.Module):
    """A regulariser with a weight of its own; it counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.calls = nn.Parameter(-torch.ones(())), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.weight


class Scale(nn.Module):
    """A regulariser that compiled code traces without a Python side effect."""

    def forward(self, x: Tensor) -> Tensor:
        return x * -2.0


class Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0.0


class Returns(nn.Module):
    """A layer that returns what it is told to."""

    def __init__(self, output: object) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> object:
        return self.output


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))


def inject(net: nn.Module, *names: str) -> Injection:
    return Injection({name: net.get_submodule(name) for name in names}, {name: Negate() for name in names})


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# What a hook does


def test_the_output_of_the_layer_goes_through_the_regularizer():
    net, x = make_net(), images()
    plain = net[0](x)
    with inject(net, "0"):
        assert torch.equal(net[0](x), -plain)


def test_gradients_reach_the_layer_through_the_regularizer():
    net, x = make_net(), images()
    (plain,) = torch.autograd.grad(net[0](x).sum(), net[0].weight)
    with inject(net, "0"):
        (gradient,) = torch.autograd.grad(net[0](x).sum(), net[0].weight)
    assert torch.equal(gradient, -plain)


def test_eval_mode_is_the_identity():
    net, x = make_net().eval(), images()
    plain = net(x)
    with inject(net, "0", "3") as injection:
        assert torch.equal(net(x), plain)
        assert injection.never_ran() == []
        net.train()
        assert injection.never_ran() == ["0", "3"]


def test_a_layer_in_eval_mode_is_left_alone_in_a_model_that_trains():
    net, x = make_net(), images()
    net[0].eval()
    plain = net[0](x)
    with inject(net, "0"):
        assert net.training
        assert torch.equal(net[0](x), plain)


def test_every_call_of_a_layer_that_runs_several_times_is_regularized():
    layer, negate = nn.Conv1d(1, 1, 1), Negate()
    x = torch.ones(1, 1, 4)
    expected = -layer(-layer(-layer(x)))
    with Injection({"layer": layer}, {"layer": negate}):
        assert torch.equal(layer(layer(layer(x))), expected)
    assert negate.calls == 3


def test_each_layer_has_its_own_regularizer():
    net = make_net()
    regularizers = {"0": Negate(), "3": Negate()}
    with Injection({"3": net[3], "0": net[0]}, regularizers):
        net[3](net[0](images()))
        net[0](images())
    assert [regularizers[name].calls for name in ("0", "3")] == [2, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_type_of_the_output_is_the_regularizers_business(dtype):
    layer = Returns(torch.ones(2, 3, dtype=dtype))
    with Injection({"layer": layer}, {"layer": nn.Identity()}):
        assert layer(images()) is layer.output


# Nothing is left behind


def test_hooks_are_on_inside_and_off_outside():
    net = make_net()
    with inject(net, "0", "3") as injection:
        assert (count_hooks(net), injection.attached) == (2, True)
    assert (count_hooks(net), injection.attached) == (0, False)


def test_hooks_are_off_after_an_exception():
    net = make_net()
    with pytest.raises(KeyError, match="boom"), inject(net, "0", "3"):
        raise KeyError("boom")
    assert count_hooks(net) == 0


def test_hooks_are_off_after_an_exception_in_the_forward_pass():
    net = make_net()
    with pytest.raises(RuntimeError, match="channels"), inject(net, "0", "3"):
        net(torch.ones(1, 5, 8, 8))
    assert count_hooks(net) == 0


def test_attaching_and_detaching_twice_is_the_same_as_once():
    net = make_net()
    injection = inject(net, "0", "3")
    assert injection.attach() is injection is injection.attach()
    assert count_hooks(net) == 2
    injection.detach()
    injection.detach()
    assert count_hooks(net) == 0


def test_an_injection_can_be_attached_again():
    net, x = make_net(), images()
    injection = inject(net, "0")
    for _ in range(3):
        plain = net[0](x)
        with injection:
            assert torch.equal(net[0](x), -plain)
    assert count_hooks(net) == 0


def test_nothing_is_attached_before_it_is_asked_for():
    net = make_net()
    assert not inject(net, "0").attached
    assert count_hooks(net) == 0


def test_the_hooks_of_others_stay_and_see_what_the_next_layer_gets():
    layer, before, after, x = make_net()[0], [], [], images()
    plain = layer(x)
    layer.register_forward_hook(lambda module, args, output: before.append(output))
    injection = Injection({"x": layer}, {"x": Negate()}).attach()
    layer.register_forward_hook(lambda module, args, output: after.append(output))
    for expected in (layer(x), plain):
        if expected is plain:
            injection.detach()
            layer(x)
        assert torch.equal(before[-1], expected)
        assert torch.equal(after[-1], expected)
    assert count_hooks(layer) == 2


def test_a_hook_that_changes_the_output_gets_it_regularized():
    layer, x = make_net()[0], images()
    plain = layer(x)
    layer.register_forward_hook(lambda module, args, output: output + 1)
    with Injection({"x": layer}, {"x": Negate()}):
        assert torch.equal(layer(x), 1 - plain)


def test_features_that_timm_takes_by_hooks_are_regularized():
    model = timm.create_model("test_resnet", features_only=True, feature_cls="hook", out_indices=(1,)).train()
    (stage,) = (layer for name, layer in model.named_modules() if name.endswith("layer1"))
    with Injection({"stage": stage}, {"stage": Zero()}):
        assert not model(images())[0].any()


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_observers_of_quantisation_see_what_is_not_dropped():
    net = make_net()
    net.qconfig = get_default_qat_qconfig("qnnpack")
    net = prepare_qat(net)
    with Injection({"0": net[0]}, {"0": Zero()}):
        net(images())
        assert net[0].activation_post_process.activation_post_process.max_val > 0


def test_two_injections_on_one_layer_do_not_disturb_each_other():
    net, x = make_net(), images()
    plain = net[0](x)
    with inject(net, "0"):
        with inject(net, "0"):
            assert torch.equal(net[0](x), plain)
        assert torch.equal(net[0](x), -plain)
    assert count_hooks(net) == 0


def test_state_dict_parameters_and_modules_are_unchanged():
    net = make_net()
    keys, parameters, modules = list(net.state_dict()), list(net.parameters()), list(net.modules())
    with inject(net, "0", "3"):
        assert list(net.state_dict()) == keys
        assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
        assert all(a is b for a, b in zip(net.modules(), modules, strict=True))


# Copies


def through_torch_save(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_its_parts(net: nn.Module) -> nn.Module:
    return nn.Sequential(*map(copy.copy, net))


def twice(net: nn.Module) -> nn.Module:
    return copy.deepcopy(pickle.loads(pickle.dumps(net)))


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "torch.save": through_torch_save,
    "copy": through_its_parts,
    "twice": twice,
}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("train", [True, False])
def test_a_copy_of_an_attached_model_computes_what_a_plain_model_does(make_copy, train):
    net, x = make_net(), images()
    with inject(net, "0", "3") as injection:
        copied = make_copy(net)
        assert torch.equal(copied.train(train)(x), make_net().train(train)(x))
        assert injection.never_ran() == ["0", "3"]
        assert not torch.equal(net(x), copied.train()(x))
        for layer, plain in zip(copied, make_net(), strict=True):
            assert (count_hooks(layer), vars(layer).keys()) == (0, vars(plain).keys())
    assert all(vars(one).keys() == vars(plain).keys() for one, plain in zip(net, make_net(), strict=True))


def test_a_copy_outlives_the_injection_and_may_have_one_of_its_own():
    net, x = make_net(), images()
    with inject(net, "0"):
        copied = copy.deepcopy(net)
    plain = copied[0](x)
    with inject(copied, "0"):
        assert torch.equal(copied[0](x), -plain)
        assert torch.equal(net[0](x), plain)
    assert torch.equal(copied[0](x), plain)


class Circular(nn.Conv2d):
    """A layer that knows of the model around it, and copies itself its own way."""

    def __init__(self) -> None:
        super().__init__(1, 1, 1)
        self.around: list[nn.Module] = []

    def __deepcopy__(self, memo: dict) -> "Circular":
        memo[id(self)] = copied = Circular()
        copied.around = copy.deepcopy(self.around, memo)
        copied.hooks_seen = len(self._forward_hooks)
        return copied


@pytest.mark.parametrize("make", [Circular, lambda: spectral_norm(nn.Conv2d(1, 1, 1))])
def test_layers_that_copy_themselves_their_own_way_have_plain_copies(make):
    net = nn.Sequential(make())
    net[0].around = [net]
    with inject(net, "0"):
        copied = copy.deepcopy(net)
    assert (count_hooks(copied), getattr(copied[0], "hooks_seen", 0)) == (0, 0)
    assert copied[0].around[0] is copied


def test_hooks_of_others_are_copied_as_ever():
    net = make_net()
    net[0].register_forward_hook(print)
    with inject(net, "0"):
        assert list(copy.deepcopy(net)[0]._forward_hooks.values()) == [print]


def test_a_file_of_an_attached_model_needs_no_package():
    net, file = make_net(), io.BytesIO()
    with inject(net, "0", "3"):
        torch.save(net, file)
    assert b"lightning_dropcluster" not in file.getvalue()


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_copy_of_an_attached_model_can_be_scripted():
    net, x = make_net(), images()
    with inject(net, "0", "3"):
        assert torch.equal(torch.jit.script(copy.deepcopy(net))(x), make_net()(x))


# Errors


def test_regularizers_for_other_layers_are_refused():
    with pytest.raises(
        ValueError, match=r"regularizers=\['b'\]: must name the same layers as layers=\['a'\]"
    ):
        Injection({"a": nn.ReLU()}, {"b": Negate()})


@pytest.mark.parametrize(
    ("output", "description"),
    [
        ((torch.ones(2, 3),), "a tuple"),
        ([torch.ones(2, 3)], "a list"),
        ({"x": torch.ones(2, 3)}, "a dict"),
        (None, "a NoneType"),
        (torch.ones(2, 3, dtype=torch.int64), r"a torch\.int64 tensor of shape \(2, 3\)"),
        (torch.ones(2, 3, dtype=torch.complex64), r"a torch\.complex64 tensor of shape \(2, 3\)"),
    ],
)
def test_an_output_that_is_no_floating_point_tensor_names_the_layer(output, description):
    layer = Returns(output)
    message = rf"the output of 'model\.x' \(Returns\) is {description}; it must be one floating-point tensor"
    with Injection({"model.x": layer}, {"model.x": Negate()}) as injection:
        with pytest.raises(TypeError, match=message):
            layer(images())
        assert injection.never_ran() == ["model.x"]
        assert layer.eval()(images()) is output


def test_a_stage_that_gives_no_tensor_says_that_it_was_taken_for_one():
    layer = Returns((torch.ones(2, 3),))
    with Injection({"stage2": layer}, {"stage2": Negate()}) as injection:
        injection.hooks["stage2"].layout = Layout(None, 3)
        with pytest.raises(TypeError, match=r"layers=None: takes 'stage2' for a stage, but .* a tuple"):
            layer(images())


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose"])
def test_an_unbatched_input_of_a_conv_names_the_layer(kind, dims):
    layer = getattr(nn, f"{kind}{dims}d")(1, 1, 1)
    message = rf"the output of 'stem' has shape \(1,.*; it must be a batch, of {dims + 2} dimensions"
    with Injection({"stem": layer}, {"stem": Negate()}) as injection:
        with pytest.raises(ValueError, match=message):
            layer(torch.ones(1, *[4] * dims))
        assert injection.never_ran() == ["stem"]
        layer(torch.ones(1, 1, *[4] * dims))
        assert injection.never_ran() == []


def test_any_batch_will_do_of_a_layer_that_is_no_conv():
    layer = nn.Identity()
    with Injection({"x": layer}, {"x": Negate()}):
        for shape in ((2, 3), (2, 3, 4), (2, 3, 4, 5)):
            assert torch.equal(layer(torch.ones(shape)), -torch.ones(shape))
        with pytest.raises(
            ValueError, match=r"has shape \(3,\); it must be a batch, of at least 2 dimensions"
        ):
            layer(torch.ones(3))


def test_hooks_are_off_after_an_error_of_their_own():
    layer = Returns(None)
    with pytest.raises(TypeError, match="it must be one"), Injection({"x": layer}, {"x": Negate()}):
        layer(images())
    assert count_hooks(layer) == 0


# Backward hooks


def nothing(*args: object) -> None:
    pass


BACKWARD_HOOKS = {
    "full": lambda layer: layer.register_full_backward_hook(nothing),
    "before": lambda layer: layer.register_full_backward_pre_hook(nothing),
    "everywhere": lambda layer: register_module_full_backward_hook(nothing),
}


@pytest.mark.parametrize("register", BACKWARD_HOOKS.values(), ids=BACKWARD_HOOKS)
def test_layers_whose_backward_hooks_see_another_gradient_are_named(register):
    layers = {"conv": nn.Conv2d(1, 1, 1), "act": nn.ReLU()}
    assert backward_hook_warning(layers) is None
    handles = [register(layer) for layer in layers.values()]
    try:
        assert "layers conv have backward hooks" in backward_hook_warning(layers)
    finally:
        for handle in handles:
            handle.remove()


# Layers that do not run


def test_silent_names_the_layers_that_have_not_run_yet_in_order():
    net = make_net()
    with inject(net, "3", "0", "1") as injection:
        assert injection.never_ran() == ["3", "0", "1"]
        net[0](images())
        assert injection.never_ran() == ["3", "1"]
        net(images())
        assert injection.never_ran() == []


# torch.compile


class Holder(nn.Module):
    """A model that holds a net, as a LightningModule does."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def compile_child(holder: Holder) -> Holder:
    holder.net = torch.compile(holder.net, backend="eager")
    return holder


def compile_child_in_place(holder: Holder) -> Holder:
    holder.net.compile(backend="eager")
    return holder


def compile_in_place(holder: Holder) -> Holder:
    holder.compile(backend="eager")
    return holder


def compile_outside(holder: Holder) -> nn.Module:
    return torch.compile(holder, backend="eager")


def compile_function(holder: Holder) -> Callable[[Tensor], Tensor]:
    return torch.compile(lambda x: holder(x), backend="eager")


COMPILES = [compile_child, compile_child_in_place, compile_in_place, compile_outside, compile_function]


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("compiled", COMPILES)
def test_compiled_code_that_has_run_notices_a_hook_and_its_removal(compiled):
    layer, x = nn.Conv2d(3, 4, 3), images()
    model = compiled(Holder(nn.Sequential(layer)))
    plain = model(x)
    injection = Injection({"conv": layer}, {"conv": Scale()}).attach()
    assert torch.equal(model(x), -2 * plain)
    assert injection.never_ran() == []
    injection.detach()
    assert torch.equal(model(x), plain)


@pytest.mark.usefixtures("fresh_dynamo")
def test_steps_with_a_hook_compile_once():
    counter, layer = CompileCounter(), nn.Conv2d(3, 4, 3)
    model = Holder(torch.compile(nn.Sequential(layer), backend=counter))
    with Injection({"conv": layer}, {"conv": Scale()}).attach():
        for _ in range(4):
            model(images())
    assert counter.frame_count == 1
