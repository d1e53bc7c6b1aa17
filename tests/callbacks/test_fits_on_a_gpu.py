"""Whole fits on a GPU, as Lightning runs them: precisions, layouts, determinism, a rank of its own."""

import faiss
import pytest
import torch
import torch.distributed as dist
from fits import At, Classifier, make_loader, make_trainer, tiny_resnet
from torch import Tensor

from lightning_dropcluster import DropCluster
from lightning_dropcluster.clustering import adjusted_rand_index

DEVICE = "cuda"
HAS_GPU = torch.cuda.is_available() and faiss.get_num_gpus() > 0
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU, reason="needs CUDA and FAISS with GPU support"),
]
DTYPES = {
    "32-true": torch.float32,
    "16-mixed": torch.float16,
    "bf16-mixed": torch.bfloat16,
    "bf16-true": torch.bfloat16,
}
FORMATS = [torch.contiguous_format, torch.channels_last]


class Watched(Classifier):
    """A classifier that keeps what the conv behind a hooked one was given, and learns nothing."""

    def __init__(self, memory_format: torch.memory_format = torch.contiguous_format, lr: float = 0.0) -> None:
        super().__init__(tiny_resnet().to(memory_format=memory_format))
        self.lr, self.seen = lr, list[Tensor]()
        after = self.model.layer1[0].bn1
        after.register_forward_pre_hook(lambda _, inputs: self.seen.append(inputs[0].detach()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


def fit(module=None, *, fill="zero", device=DEVICE, act=lambda *_: None, **options):
    torch.manual_seed(0)
    module = Watched() if module is None else module
    callback = DropCluster(
        "layer1.0.conv1",
        0.5,
        cluster_size=4,
        start=0.25,
        schedule="constant",
        every_n_epochs=1,
        num_samples=12,
        fill=fill,
        clean_statistics=False,
        log_pictures=False,
    )
    accelerator = "gpu" if device == "cuda" else device
    trainer = make_trainer(callback, At(act), accelerator=accelerator, devices=1, **options)
    trainer.fit(module, make_loader(size=64))
    return callback, module


def labels_of(callback: DropCluster) -> Tensor:
    return callback.labels["model.layer1.0.conv1"].flatten(1).cpu()


@pytest.fixture(scope="module")
def on_the_cpu():
    return fit(device="cpu")


@pytest.mark.parametrize("fill", ["zero", "mean"])
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("precision", DTYPES)
def test_a_fit_is_that_on_the_cpu_but_for_rounding(on_the_cpu, precision, memory_format, fill):
    callback, module = fit(Watched(memory_format), precision=precision, fill=fill)
    there, plain = on_the_cpu
    assert adjusted_rand_index(labels_of(callback), labels_of(there)) > 0.5
    assert module.losses[:4] == pytest.approx(plain.losses[:4], rel=0.02)  # nothing drops yet
    last = module.seen[-1]
    assert (last.dtype, last.device.type) == (DTYPES[precision], DEVICE)
    assert last.is_contiguous(memory_format=memory_format)
    assert last.isfinite().all()
    if fill == "zero":
        dropped = torch.stack([(x == 0).double().mean() for x in module.seen[6:]])
        assert dropped.mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_deterministic_fits_are_equal_to_the_last_bit(precision):
    try:
        runs = [fit(Watched(lr=0.01), deterministic=True, precision=precision) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    (one, module), (other, twin) = runs
    assert torch.equal(labels_of(one), labels_of(other))
    assert all(map(torch.equal, module.state_dict().values(), twin.state_dict().values()))


def test_one_rank_with_nccl_is_a_fit_without():
    backends = []
    try:
        callback, module = fit(
            strategy="ddp", use_distributed_sampler=False, act=lambda *_: backends.append(dist.get_backend())
        )
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    alone, twin = fit()
    assert set(backends) == {"nccl"}
    assert torch.equal(labels_of(callback), labels_of(alone))
    assert module.losses == pytest.approx(twin.losses, rel=1e-3)


def test_training_goes_on_where_the_device_has_no_memory_for_reclustering(monkeypatch):
    seen = []

    def ask_for_too_much(*_):
        torch.empty(2**48, dtype=torch.uint8, device=DEVICE)

    def act(trainer, _):
        (callback,) = (each for each in trainer.callbacks if isinstance(each, DropCluster))
        seen.append(callback.labels)
        if trainer.global_step == 8:
            monkeypatch.setattr("lightning_dropcluster.learning.reclustering._cluster", ask_for_too_much)

    with pytest.warns(UserWarning, match="out of memory in reclustering; the old labels stay"):
        callback, module = fit(act=act)
    assert len(module.losses) == 16
    assert torch.equal(seen[7]["model.layer1.0.conv1"].cpu(), callback.labels["model.layer1.0.conv1"].cpu())
