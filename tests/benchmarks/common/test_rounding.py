"""bfloat16 in float32: what the processor's own would give, forward and backward."""

import pytest
import torch
from torch import nn

from benchmarks.common import rounding
from benchmarks.common.rounding import rounded_bfloat16


@pytest.fixture(autouse=True)
def no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "_has_bfloat16", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


LAYERS = {
    "conv1d": (nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9, 9)),
    "conv3d": (nn.Conv3d(2, 3, 3), (2, 2, 5, 5, 5)),
    "linear": (nn.Linear(8, 3, bias=False), (5, 8)),
}


def _pass(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    out.float().square().sum().backward()
    grads = [tensor.grad for tensor in (x, *layer.parameters()) if tensor.grad is not None]
    layer.zero_grad()
    return [out.detach(), *grads]


@pytest.mark.parametrize("kind", LAYERS)
def test_passes_give_what_bfloat16_gives_but_for_the_last_bit(kind: str):
    layer, shape = LAYERS[kind]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    plain = _pass(layer, x.clone())
    with rounded_bfloat16("bf16-mixed") as is_rounded:
        rounded = _pass(layer, x.clone())
    assert is_rounded
    for ours, reference in zip(rounded, plain, strict=True):
        assert ours.dtype == reference.dtype
        torch.testing.assert_close(ours, reference, rtol=2**-7, atol=2**-7 * float(reference.abs().max()))


def test_gradients_are_rounded_as_bfloat16_rounds_them():
    layer = nn.Conv2d(4, 6, 3)
    with rounded_bfloat16("bf16-mixed"):
        tensors = _pass(layer, torch.randn(2, 4, 9, 9))
    assert all(torch.equal(tensor, tensor.bfloat16().to(tensor.dtype)) for tensor in tensors)


def test_without_autocast_nothing_is_rounded():
    layer, x = nn.Conv2d(4, 6, 3), torch.randn(2, 4, 9, 9)
    plain = layer(x)
    with rounded_bfloat16("bf16-mixed"):
        torch.testing.assert_close(layer(x), plain, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_other_precisions_are_left_alone(precision: str):
    with rounded_bfloat16(precision) as is_rounded:
        assert not is_rounded


def test_a_processor_that_can_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rounding, "_has_bfloat16", lambda: True)
    with rounded_bfloat16("bf16-mixed") as is_rounded:
        assert not is_rounded
