import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

from lightning_dropcluster.functional import disagreement, r_block_loss


def make_logits(*shape):
    torch.manual_seed(0)
    return torch.randn(5, 4, *shape, dtype=torch.float64), torch.randn(5, 4, *shape, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(), (3, 2)], ids=str)
def test_disagreement_is_the_symmetric_divergence(shape):
    p, q = (Categorical(logits=logits.movedim(1, -1)) for logits in make_logits(*shape))
    expected = (kl_divergence(p, q) + kl_divergence(q, p)).mean() / 2
    torch.testing.assert_close(disagreement(*make_logits(*shape)), expected)


def test_disagreement_is_symmetric_and_zero_for_equal_predictions():
    first, second = make_logits()
    assert disagreement(first, second) == disagreement(second, first) > 0
    assert disagreement(first, first + 3.0) == pytest.approx(0, abs=1e-12)


def test_the_loss_is_half_of_r_drops():
    first, second = make_logits()
    targets, alpha = torch.tensor([0, 1, 2, 3, 0]), 0.6
    log_p, log_q = first.log_softmax(1), second.log_softmax(1)
    divergence = (
        F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        + F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    ) / 2
    r_drop = F.cross_entropy(first, targets) + F.cross_entropy(second, targets) + alpha * divergence
    torch.testing.assert_close(r_block_loss(first, second, targets, weight=alpha / 2), r_drop / 2)


def test_the_task_loss_may_be_another():
    first, second = make_logits()
    targets = torch.rand(5, 4, dtype=torch.float64)
    loss = r_block_loss(first, second, targets, weight=0.0, task_loss=F.binary_cross_entropy_with_logits)
    both = torch.cat([first, second]), torch.cat([targets, targets])
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(*both))


def test_coarse_logits_are_compared_in_single_precision():
    first, second = (logits.bfloat16() for logits in make_logits())
    assert disagreement(first, second).dtype == torch.float32
    torch.testing.assert_close(disagreement(first, second), disagreement(first.float(), second.float()))


def test_logits_of_different_shapes_raise():
    with pytest.raises(ValueError, match=r"second of shape \(5, 1\)"):
        disagreement(torch.zeros(5, 4), torch.zeros(5, 1))
