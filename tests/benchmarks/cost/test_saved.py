import pytest
import torch

from benchmarks.cost.saved import cases

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="")]
)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_compiled_code_keeps_neither_masks_nor_means(device):
    chosen = {} if device == "cuda" else {"layouts": [torch.channels_last]}
    assert all(case["more_than_plain"] < 0.05 for case in cases(8, 16, 16, torch.device(device), **chosen))
