import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from fits import make_trainer
from torch import nn
from torch.distributions import Categorical, kl_divergence

from lightning_dropcluster import DropCluster, RBlock, SpatialDropout
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


def test_a_single_logit_has_no_classes_to_compare():
    with pytest.raises(ValueError, match=r"first of shape \(8, 1\): must have two classes"):
        disagreement(torch.zeros(8, 1), torch.ones(8, 1))


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


class Classifier(RBlock, pl.LightningModule):
    def __init__(self, paired=True):
        super().__init__()
        self.conv, self.drop = nn.Conv2d(3, 8, 3), SpatialDropout(0.5, paired=paired)
        self.head = nn.Linear(8, 4)
        self.seen, self.kept = [], []

    def forward(self, images):
        self.seen.append(len(images))
        features = self.drop(self.conv(images))
        self.kept.append(features.flatten(2).any(2))
        return self.head(features.mean((2, 3)))

    def training_step(self, batch, batch_idx):
        images, targets = batch
        return self.r_block_loss(images, targets, weight=0.7)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def make_batch():
    torch.manual_seed(0)
    return torch.randn(5, 3, 6, 6), torch.randint(4, (5,))


def test_one_pass_over_a_doubled_batch_gives_the_loss_of_its_halves():
    model, (images, targets) = Classifier(), make_batch()
    torch.manual_seed(1)
    loss = model.training_step((images, targets), 0)
    torch.manual_seed(1)
    first, second = model(torch.cat([images, images])).chunk(2)
    torch.testing.assert_close(loss, r_block_loss(first, second, targets, weight=0.7))
    assert model.seen == [10, 10]


@pytest.mark.parametrize("paired", [True, False])
def test_pairs_make_the_submodels_differ_as_much_as_can_be(paired):
    model = Classifier(paired)
    model.training_step(make_batch(), 0)
    first, second = model.kept[0].chunk(2)
    assert torch.equal(first, ~second) == paired


def test_without_dropping_it_is_the_plain_loss():
    model, (images, targets) = Classifier(), make_batch()
    model.drop.set_drop_prob(0.0)
    loss = model.training_step((images, targets), 0)
    torch.testing.assert_close(loss, F.cross_entropy(model.eval()(images), targets))


def test_trains_in_lightning():
    torch.manual_seed(0)
    model, (images, targets) = Classifier(), make_batch()
    loader = torch.utils.data.DataLoader(list(zip(images, targets, strict=True)), batch_size=5)
    before = F.cross_entropy(model.eval()(images), targets)
    trainer = pl.Trainer(
        max_epochs=30,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(model.train(), loader)
    assert F.cross_entropy(model.eval()(images), targets) < before


class Plain(Classifier):
    """Drops nothing by itself, and keeps what reaches its head."""

    def forward(self, images):
        features = self.conv(images)
        self.kept.append(features != 0)
        return self.head(features.mean((2, 3)))


@pytest.mark.parametrize("paired", [True, False])
def test_the_callback_drops_other_clusters_in_each_half(paired):
    torch.manual_seed(0)
    model, (images, targets) = Plain(), make_batch()
    callback = DropCluster(
        "conv", 0.5, start=0, schedule="constant", num_samples=5, cluster_size=2, paired=paired
    )
    loader = torch.utils.data.DataLoader(list(zip(images, targets, strict=True)), batch_size=5)
    make_trainer(callback).fit(model, loader)
    first, second = model.kept[-1].chunk(2)
    assert torch.equal(first, ~second) == paired
    with callback.sampling(model.eval()):
        model(images)  # of an odd number, without pairs
    assert not model.kept[-1].all()
