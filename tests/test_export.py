"""Export: what leaves training is the plain model."""

import copy
import io

import numpy as np
import onnx
import pytest
import pytorch_lightning as pl
import timm
import torch
from fits import Classifier, count_hooks, make_loader, make_trainer, two_convs
from onnx.reference import ReferenceEvaluator
from torch import nn

from lightning_dropcluster import DropCluster

LAYERS = "[01].0"
MASK_OPS = {"RandomUniform", "RandomUniformLike", "Bernoulli", "Gather", "GatherElements", "Mul"}
LEGACY_EXPORTERS = pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::DeprecationWarning")


def make_callback(**options) -> DropCluster:
    return DropCluster(LAYERS, 0.5, **({"start": 0.0, "schedule": "constant", "num_samples": 16} | options))


def plain_twin(model: nn.Module) -> nn.Module:
    plain = two_convs()
    plain.load_state_dict(model.state_dict(), strict=True)
    return plain.eval()


@pytest.fixture(scope="module")
def fitted() -> tuple[nn.Module, nn.Module]:
    """A model after fit, and one of the same weights that never met the callback; both in eval mode."""
    callback, module = make_callback(), Classifier(two_convs())
    make_trainer(callback, max_epochs=2).fit(module, make_loader())
    assert callback.labels
    return module.model.eval(), plain_twin(module.model)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def in_mid_fit(act) -> None:
    """Fit, and act within a step that drops, between its forward and its backward pass."""
    callback, acted = make_callback(), []

    class Acting(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if callback.drop_prob_now and not acted:
                assert count_hooks(self) == len(callback.labels)
                act(self.model)
                acted.append(True)
            return loss

    module = Acting(two_convs())
    make_trainer(callback, max_epochs=2).fit(module, make_loader())
    assert acted
    assert all(torch.tensor(module.losses).isfinite())


def exported_ops(
    model: nn.Module, x: torch.Tensor, **options
) -> tuple[list[str], torch.export.ExportedProgram]:
    program = torch.export.export(model, (x,), **options)
    return [f"{node.op} {node.target}" for node in program.graph.nodes], program


def onnx_proto(model: nn.Module, x: torch.Tensor, tmp_path, **options) -> onnx.ModelProto:
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), path, verbose=False, **options)
    proto = onnx.load(path)
    onnx.checker.check_model(proto)
    return proto


def run_onnx(proto: onnx.ModelProto, x: torch.Tensor) -> np.ndarray:
    return ReferenceEvaluator(proto).run(None, {proto.graph.input[0].name: x.numpy()})[0]


def traced_ops(traced: torch.jit.ScriptModule) -> list[str]:
    return [node.kind() for node in traced.inlined_graph.nodes()]


# After fit


@pytest.mark.parametrize("strict", [False, True])
def test_torch_export_after_fit(fitted, x, strict):
    model, plain = fitted
    mine, program = exported_ops(model, x, strict=strict)
    expected, other = exported_ops(plain, x, strict=strict)
    assert mine == expected
    assert not any("rand" in op or "bernoulli" in op or "index" in op for op in mine)
    assert list(program.state_dict) == list(other.state_dict)
    assert torch.equal(program.module()(x), plain(x))


def test_torch_export_in_training_mode_has_no_mask(fitted, x):
    model, plain = (copy.deepcopy(m).train() for m in fitted)
    assert exported_ops(model, x)[0] == exported_ops(plain, x)[0]


def test_torch_export_with_a_dynamic_batch(fitted, x):
    model, plain = fitted
    shapes = ({0: torch.export.Dim("batch", min=2)},)
    _, program = exported_ops(model, x, dynamic_shapes=shapes)
    more = torch.randn(7, 3, 32, 32)
    torch.testing.assert_close(program.module()(more), plain(more))


@LEGACY_EXPORTERS
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_export_after_fit(fitted, x, tmp_path, dynamo):
    model, plain = fitted
    mine, expected = (onnx_proto(m, x, tmp_path, dynamo=dynamo) for m in (model, plain))
    ops = [node.op_type for node in mine.graph.node]
    assert ops == [node.op_type for node in expected.graph.node]
    assert not MASK_OPS & set(ops)
    assert np.array_equal(run_onnx(mine, x), run_onnx(expected, x))
    np.testing.assert_allclose(run_onnx(mine, x), plain(x).detach(), rtol=1e-3, atol=1e-4)


@LEGACY_EXPORTERS
def test_jit_trace_and_script_after_fit(fitted, x):
    model, plain = fitted
    traced, expected = torch.jit.trace(model, x), torch.jit.trace(plain, x)
    assert traced_ops(traced) == traced_ops(expected)
    assert torch.equal(traced(x), plain(x))
    assert torch.equal(torch.jit.script(model)(x), plain(x))
    stored = io.BytesIO()
    torch.jit.save(traced, stored)
    stored.seek(0)
    assert torch.equal(torch.jit.load(stored)(x), plain(x))


def test_fx_and_pickle_after_fit(fitted, x):
    model, plain = fitted
    assert torch.equal(torch.fx.symbolic_trace(model)(x), plain(x))
    stored = io.BytesIO()
    torch.save(model, stored)
    assert b"lightning_dropcluster" not in stored.getvalue()
    stored.seek(0)
    assert torch.equal(torch.load(stored, weights_only=False)(x), plain(x))


# During fit


def test_a_checkpoint_written_in_mid_fit_loads_strictly_into_plain_timm(tmp_path):
    def make_model(**options):
        return timm.create_model("test_efficientnet", pretrained=False, num_classes=4, **options)

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 6:
                assert callback.drop_prob_now == 0.5
                trainer.save_checkpoint(path)
                model = copy.deepcopy(pl_module.model).eval()
                seen.append((batch[0], model(batch[0])))

    path, seen = tmp_path / "mid.ckpt", []
    callback = DropCluster("conv_stem", 0.5, start=0.0, schedule="constant", num_samples=16, every_n_epochs=0)
    make_trainer(callback, Watch(), max_epochs=2).fit(Classifier(make_model()), make_loader())

    state = torch.load(path, weights_only=True)["state_dict"]
    state = {name.removeprefix("model."): value for name, value in state.items()}
    plain = make_model()
    plain.load_state_dict(state, strict=True)
    x, expected = seen[0]
    assert torch.equal(plain.eval()(x), expected)

    torch.save(state, tmp_path / "timm.pth")
    loaded = make_model(checkpoint_path=str(tmp_path / "timm.pth"))
    assert torch.equal(loaded.eval()(x), expected)


def test_torch_export_of_a_copy_in_mid_fit(x):
    def act(attached):
        model, plain = copy.deepcopy(attached), plain_twin(attached)
        assert exported_ops(model.train(), x)[0] == exported_ops(plain.train(), x)[0]
        ops, program = exported_ops(model.eval(), x)
        assert ops == exported_ops(plain.eval(), x)[0]
        assert torch.equal(program.module()(x), plain(x))

    in_mid_fit(act)


@LEGACY_EXPORTERS
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_export_of_a_copy_in_mid_fit(x, tmp_path, dynamo):
    def act(attached):
        model, plain = copy.deepcopy(attached).eval(), plain_twin(attached)
        proto = onnx_proto(model, x, tmp_path, dynamo=dynamo)
        assert not MASK_OPS & {node.op_type for node in proto.graph.node}
        np.testing.assert_allclose(run_onnx(proto, x), plain(x).detach(), rtol=1e-3, atol=1e-4)

    in_mid_fit(act)


@LEGACY_EXPORTERS
@pytest.mark.parametrize(
    "compile_copy", [lambda model, x: torch.jit.trace(model, x), lambda m, x: torch.jit.script(m)]
)
def test_jit_of_a_copy_in_mid_fit(x, compile_copy):
    def act(attached):
        model, plain = copy.deepcopy(attached).eval(), plain_twin(attached)
        made = compile_copy(model, x)
        assert traced_ops(made) == traced_ops(compile_copy(plain, x))
        assert torch.equal(made(x), plain(x))

    in_mid_fit(act)


def test_export_of_the_attached_model_itself_in_eval_mode(x):
    """Nothing is dropped in eval mode, so the hooks do not show, while in training mode they do."""

    def act(attached):
        plain = plain_twin(attached)
        in_training = exported_ops(attached, x)[0]
        ops, program = exported_ops(attached.eval(), x)
        attached.train()
        assert any("rand" in op for op in in_training)
        assert ops == exported_ops(plain, x)[0]
        assert torch.equal(program.module()(x), plain(x))

    in_mid_fit(act)


@LEGACY_EXPORTERS
def test_jit_trace_of_the_attached_model_itself_in_eval_mode(x):
    def act(attached):
        traced, plain = torch.jit.trace(attached.eval(), x), plain_twin(attached)
        attached.train()
        assert traced_ops(traced) == traced_ops(torch.jit.trace(plain, x))
        assert torch.equal(traced(x), plain(x))

    in_mid_fit(act)
