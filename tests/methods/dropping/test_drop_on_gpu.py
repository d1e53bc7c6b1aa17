"""Dropping on a GPU, against the plain form on the CPU."""

import pytest
import pytorch_lightning as pl
import torch
from fits import Classifier, make_loader, make_trainer, tiny_resnet
from problems import FLOATS, make_problem
from torch import nn
from torch.nn import functional as F

from lightning_dropcluster import ClusterDrop, DropCluster
from lightning_dropcluster.functional import cluster_drop, cluster_sizes
from lightning_dropcluster.methods.dropping.fused_drop import can_fuse, drop_fused

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
FORMATS = [torch.contiguous_format, torch.channels_last]
DEVICE = "cuda"


@pytest.mark.parametrize("fill", ["zero", "mean"])
@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equals_the_cpu(dtype, layout, fill):
    mean, drop_prob = fill == "mean", torch.tensor(0.3)
    x, labels, _ = make_problem(samples=70, channels=20, spatial=(12, 14), clusters=10)
    x, uniform = x.to(dtype).contiguous(memory_format=layout).requires_grad_(), torch.rand(70, 20, 10)
    scale = 1 / (1 - drop_prob) if mean else None
    expected = cluster_drop(x, labels, uniform >= drop_prob, fill=fill, scale=scale)
    there = x.detach().to(DEVICE).requires_grad_()
    sizes = cluster_sizes(labels, 20, 10).int()
    labels, sizes, uniform, drop_prob = (t.to(DEVICE) for t in (labels.byte(), sizes, uniform, drop_prob))
    assert can_fuse(there, labels, 10, mean)
    out = drop_fused(there, labels, sizes, uniform, drop_prob, by_batch=not mean, mean=mean)
    grad = torch.randn_like(x)
    expected.backward(grad)
    out.backward(grad.to(DEVICE))
    close = {torch.float64: 1e-6, torch.float32: 1e-5}.get(dtype, 0.02)  # the scale is in float32
    for one, other in ((out.cpu(), expected), (there.grad.cpu(), x.grad)):
        torch.testing.assert_close(one, other, rtol=close, atol=close)
        assert torch.equal(one == 0, other == 0)
        assert one.stride() == x.stride()


@pytest.mark.parametrize("fill", ["zero", "mean"])
def test_deterministic_mode_repeats_every_bit(fill):
    x, labels, _ = make_problem(samples=40, channels=8, spatial=(16, 16), clusters=12)
    drop, x = ClusterDrop(labels, 0.3, fill=fill).to(DEVICE), x.to(DEVICE)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            torch.manual_seed(0)
            leaf = x.clone().requires_grad_()
            out = drop(leaf)
            out.backward(x)
            runs.append((out.detach(), leaf.grad))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, *runs))


def test_channels_last_stays_through_a_block():
    labels = torch.randint(4, (16, 8, 8))
    block = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), ClusterDrop(labels, 0.3), nn.BatchNorm2d(16))
    block = block.to(DEVICE, memory_format=torch.channels_last)
    x = torch.randn(8, 3, 8, 8, device=DEVICE).to(memory_format=torch.channels_last)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = block(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("fill", ["zero", "mean"])
def test_graphs_are_recorded_once_whatever_labels_and_probability_become(fill, monkeypatch):
    from torch._inductor.cudagraph_trees import CUDAGraphTreeManager

    recorded, record = [], CUDAGraphTreeManager.record_function

    def note(self, *args):
        recorded.append(args)
        return record(self, *args)

    monkeypatch.setattr(CUDAGraphTreeManager, "record_function", note)
    torch.compiler.reset()
    labels = torch.randint(4, (16, 8, 8))
    drop = ClusterDrop(labels, 0.3, fill=fill)
    block = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), drop, nn.ReLU()).to(DEVICE)
    compiled, x = torch.compile(block, mode="reduce-overhead"), torch.randn(8, 3, 8, 8, device=DEVICE)

    def step():
        torch.compiler.cudagraph_mark_step_begin()
        block.zero_grad()
        out = compiled(x)
        out.sum().backward()
        return out.detach().clone()

    outs = [step() for _ in range(4)]
    before = len(recorded)
    assert before
    assert not torch.equal(outs[-1], outs[-2])  # each replay draws anew
    drop.set_labels(labels.flip(2).to(DEVICE))
    step()
    drop.set_drop_prob(0.0)
    assert torch.equal(step(), block(x).detach())
    assert len(recorded) == before


@pytest.mark.parametrize("fill", ["zero", "mean"])
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "32-true"])
def test_fits(precision, fill):
    pl.seed_everything(0)
    module = Classifier(tiny_resnet())
    callback = DropCluster(
        "layer*.*.conv2", fill=fill, start=0, num_samples=8, every_n_epochs=1, cluster_size=4
    )
    make_trainer(callback, accelerator="gpu", precision=precision, max_epochs=3).fit(module, make_loader())
    assert callback.labels
    assert torch.tensor(module.losses).isfinite().all()


@pytest.mark.parametrize("fill", ["zero", "mean"])
def test_compiled_code_serves_batches_of_all_sizes(fill):
    torch.compiler.reset()
    labels = torch.randint(4, (16, 8, 8))
    block = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), ClusterDrop(labels, 0.3, fill=fill)).to(DEVICE)
    compiled, counter = torch.compile(block), torch._dynamo.utils.counters
    frames = counter["frames"]["total"]
    for samples in (8, 12, 20, 33, 7, 40):
        compiled(torch.randn(samples, 3, 8, 8, device=DEVICE)).sum().backward()
    assert counter["frames"]["total"] - frames <= 3


class Watched(Classifier):
    """In its last epoch it is an error if the host waits for the device in a step."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def on_train_batch_end(self, outputs, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("default")


class Watch(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("error" if trainer.current_epoch == 2 else "default")


def test_the_host_waits_for_nothing_in_a_step():
    callback = DropCluster("layer*.*.conv2", start=0, num_samples=8, every_n_epochs=9, cluster_size=4)
    trainer = make_trainer(Watch(), callback, accelerator="gpu", max_epochs=3)
    try:  # forty steps an epoch, of which the last has some that drop
        trainer.fit(Watched(tiny_resnet()), make_loader(num_samples=320))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert callback.labels
