"""Fits of transformers, whose layers give channels last: all that works for maps works for them."""

import logging

import pytest
import torch
from fits import At, Classifier, ResumableLoader, Seeds, count_hooks, make_loader, make_trainer
from processes import run_ranks
from timm.models import MlpMixer, SwinTransformer, VisionTransformer
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import DataLoader

from lightning_dropcluster import REGULARIZERS, ClusterDrop, DropCluster, StructuredDropout
from lightning_dropcluster.clustering.tiles import tile


def vit(**options):
    torch.manual_seed(0)
    options = {"reg_tokens": 2, "depth": 3} | options
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=8, num_heads=2, num_classes=4, **options)


def swin():
    torch.manual_seed(0)
    return SwinTransformer(
        img_size=32, patch_size=4, window_size=4, embed_dim=8, depths=(1, 1), num_heads=(2, 2), num_classes=4
    )


def mixer():
    torch.manual_seed(0)
    return MlpMixer(img_size=32, patch_size=8, embed_dim=8, num_blocks=3, num_classes=4)


def make_callback(layers="blocks.*", drop_prob=0.5, **options):
    options = {"start": 0.25, "every_n_epochs": 1, "num_samples": 16, "channel_dim": -1} | options
    return DropCluster(layers, drop_prob, **options)


def fit(callback, model, loader, *others, **options):
    module = Classifier(model)
    before = count_hooks(module)
    make_trainer(callback, *others, **options).fit(module, loader)
    assert count_hooks(module) == before
    return module


def keep_outputs(layer):
    kept = []
    layer.register_forward_hook(lambda m, args, out: kept.append(out.detach()))
    return kept


@pytest.mark.parametrize("scope", ["map", "position", "layer", "channel"])
def test_places_of_tokens_are_clustered_and_dropped_and_the_others_stay(loader, scope):
    model = vit()
    outputs = keep_outputs(model.blocks[1])
    callback = make_callback("blocks.1", scope=scope, num_clusters=3, schedule="constant")
    fit(callback, model, loader)
    assert callback.labels["model.blocks.1"].shape == (8, 4, 4)
    dropped = outputs[-1] == 0
    assert outputs[-1].is_contiguous()
    assert not dropped[:, :3].any()
    assert 0.1 < dropped[:, 3:].float().mean() < 0.9


@pytest.mark.parametrize(
    ("make", "layers", "shape"),
    [
        (swin, "layers.*", (8, 8, 8)),
        (swin, "layers.*.blocks.*.mlp.fc1", (32, 8, 8)),
        (swin, "layers.*.blocks.*.attn", (8, 4, 4)),  # of a window
        (vit, "blocks.*.attn.proj", (8, 4, 4)),
        (vit, "patch_embed", (8, 4, 4)),  # no others yet
        (mixer, "blocks.*.mlp_channels", (8, 4, 4)),
    ],
)
def test_layers_of_all_kinds(loader, make, layers, shape):
    callback = make_callback(layers)
    fit(callback, make(), loader, max_epochs=2)
    assert next(iter(callback.labels.values())).shape == shape


@pytest.mark.parametrize("make", [vit, swin, mixer])
def test_without_layers_it_finds_out_by_itself(loader, make, caplog):
    callback = make_callback(None, channel_dim=1)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        module = fit(callback, make(), loader, max_epochs=2)
    assert "layers=None takes the outputs of stages" in caplog.text
    assert {len(labels) for labels in callback.labels.values()} == {8}
    x = next(iter(loader))[0]
    with torch.no_grad(), callback.sampling(module.model.eval(), 0.5) as model:
        assert not torch.equal(model(x), model(x))


def test_sampling_drops_what_training_does(loader):
    callback = make_callback("blocks.1")
    module = fit(callback, vit(), loader)
    outputs = keep_outputs(module.model.blocks[1])
    with torch.no_grad(), callback.sampling(module.eval(), 0.5):
        module(next(iter(loader))[0])
    dropped = outputs[0] == 0
    assert not dropped[:, :3].any()
    assert 0.1 < dropped[:, 3:].float().mean() < 0.9


def test_without_running_averages_every_step_drops(loader):
    model, zeros = vit(), []
    outputs = keep_outputs(model.blocks[0])
    look = At(lambda *_: zeros.append(bool((outputs[-1] == 0).any())))
    labels = {"model.blocks.0": tile((4, 4), 4).reshape(1, 4, 4).repeat(8, 1, 1)}
    callback = make_callback("blocks.0", start=0.0, schedule="constant", initial_labels=labels)
    fit(callback, model, loader, look)
    assert zeros == [True] * 16


@pytest.mark.parametrize("fill", ["zero", "mean"])
def test_filling(loader, fill):
    model = vit()
    outputs = keep_outputs(model.blocks[0])
    fit(make_callback("blocks.0", fill=fill), model, loader)
    assert bool((outputs[-1][:, 3:] == 0).any()) == (fill == "zero")


def test_one_draw_for_all_samples(loader):
    model = vit()
    outputs = keep_outputs(model.blocks[0])
    fit(make_callback("blocks.0", per_sample=False), model, loader)
    dropped = outputs[-1] == 0
    assert dropped.any()
    assert torch.equal(dropped, dropped[:1].expand_as(dropped))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_precisions(loader, precision):
    model = vit()
    outputs = keep_outputs(model.blocks[0])
    fit(make_callback("blocks.0"), model, loader, precision=precision, max_epochs=2)
    before, after = outputs[0], outputs[-1]
    assert before.dtype == after.dtype
    assert (after == 0).any()
    assert after.isfinite().all()


def test_a_run_resumed_in_an_open_window_goes_on_as_it_was(tmp_path):
    def run(*others, ckpt_path=None):
        callback, module = make_callback(num_samples=24), Classifier(vit())
        trainer = make_trainer(callback, Seeds(), *others)
        trainer.fit(module, ResumableLoader(make_loader()), ckpt_path=ckpt_path)
        return callback, module

    def save(trainer, module):
        if trainer.global_step == 6:
            trainer.save_checkpoint(tmp_path / "six.ckpt")

    whole, module = run(At(save))
    resumed, again = run(ckpt_path=tmp_path / "six.ckpt")
    assert whole.labels.keys() == resumed.labels.keys()
    assert all(torch.equal(whole.labels[name], resumed.labels[name]) for name in whole.labels)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))


def test_a_state_of_another_dimension_is_a_named_error(loader):
    callback = make_callback()
    fit(callback, vit(), loader, max_epochs=1)
    with pytest.raises(ValueError, match="it was written with channel_dim=-1, not channel_dim=1"):
        make_callback(channel_dim=1).load_state_dict(callback.state_dict())


def test_the_wrong_dimension_is_told_in_the_first_step(loader):
    module = Classifier(swin())
    with pytest.raises(ValueError, match=r"^channel_dim=1: .* its 16 channels last; give channel_dim=-1"):
        make_trainer(make_callback("layers.1", channel_dim=1)).fit(module, loader)
    assert count_hooks(module) == 0


@pytest.mark.long
def test_compiled_models_take_no_more_frames_than_with_convs(loader):
    def count(model, layer, channel_dim):
        torch.compiler.reset()
        counter = CompileCounterWithBackend("eager")
        model.compile(backend=counter, fullgraph=True)
        callback = make_callback(layer, channel_dim=channel_dim)
        fit(callback, model, loader)
        assert callback.labels
        return counter.frame_count

    convs = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Conv2d(8, 4, 4), nn.Flatten())
    assert count(vit(depth=1), "blocks.0", -1) <= count(convs, "0", 1)


def test_activation_checkpointing_gives_the_same_gradients(loader):
    def train(checkpointing):
        model = vit()
        model.set_grad_checkpointing(checkpointing)
        callback = make_callback("blocks.*.mlp.fc2")
        module = fit(callback, model, loader, Seeds(), max_epochs=2)
        return callback.labels, list(module.parameters())

    (labels, weights), (others, again) = train(False), train(True)
    assert all(torch.equal(labels[name], others[name]) for name in labels)
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))


def train_on_ranks():
    torch.manual_seed(0)
    callback = make_callback()
    module = fit(callback, vit(), make_loader(), strategy="ddp", devices=2)
    weights = torch.cat([weight.detach().flatten() for weight in module.parameters()])
    return {"labels": dict(callback.labels), "weights": weights}


@pytest.mark.long
def test_two_ranks_agree(tmp_path):
    first, second = run_ranks(train_on_ranks, 2, tmp_path)
    assert first["labels"].keys() == {f"model.blocks.{block}" for block in range(3)}
    assert all(torch.equal(first["labels"][name], second["labels"][name]) for name in first["labels"])
    assert torch.equal(first["weights"], second["weights"])


def test_images_of_another_size_have_their_labels_resized():
    model = vit(dynamic_img_size=True)
    outputs = keep_outputs(model.blocks[0])
    callback = make_callback("blocks.0", start=0.0, every_n_epochs=0, schedule="constant", num_clusters=2)
    sizes = [tuple(batch) for size in (32, 64) for batch in make_loader(size=size)]
    fit(callback, model, DataLoader(sizes, batch_size=None), max_epochs=1)
    labels, dropped = callback.labels["model.blocks.0"], outputs[-1] == 0
    assert labels.shape == (8, 4, 4)
    assert dropped.shape == (8, 3 + 64, 8)
    grids = dropped[:, 3:].unflatten(1, (8, 8)).movedim(-1, 1)
    assert grids.any()
    assert torch.equal(grids, grids[:, :, ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3))


# Peers


@pytest.mark.parametrize("method", [name for name in REGULARIZERS if name != "cluster_drop"])
def test_peers(loader, method):
    model = vit()
    outputs = keep_outputs(model.blocks[1].mlp.fc2)
    drop_prob = None if method == "advanced_dropout" else 0.5
    callback = StructuredDropout("blocks.1.mlp.fc2", method, drop_prob, channel_dim=-1)
    fit(callback, model, loader, max_epochs=1)
    assert outputs[-1].shape == (8, 19, 8)
    assert (outputs[-1][:, :3] != 0).all()
    if drop_prob:
        assert (outputs[-1][:, 3:] == 0).any()


def test_a_block_is_a_square_of_tokens():
    torch.manual_seed(0)
    model = vit()
    outputs = keep_outputs(model.blocks[1])
    block = REGULARIZERS["drop_block"](0.9, block_size=3)
    fit(StructuredDropout("blocks.1", block, channel_dim=-1), model, make_loader(), max_epochs=1)
    dropped = (outputs[-1] == 0)[:, 3:].unflatten(1, (4, 4)).movedim(-1, 1)
    corners = dropped[:, :, 0, 0] & ~dropped[:, :, 3, 3] & ~dropped[:, :, 0, 3] & ~dropped[:, :, 3, 0]
    assert corners.any()
    assert dropped[corners][:, :3, :3].all()


# The module alone


def test_the_module_takes_channels_last_and_tokens():
    labels = torch.arange(3 * 4).view(3, 2, 2) % 4
    drop = ClusterDrop(labels, 0.5, channel_dim=-1)
    for x in (torch.randn(5, 2, 2, 3), torch.randn(5, 4, 3), torch.randn(5, 6, 3)):
        torch.manual_seed(0)
        out = drop(x)
        torch.manual_seed(0)
        tokens = x.flatten(1, -2)[:, -4:]
        expected = ClusterDrop(labels, 0.5)(tokens.unflatten(1, (2, 2)).movedim(-1, 1))
        assert torch.equal(out.flatten(1, -2)[:, -4:], expected.movedim(1, -1).flatten(1, 2))
        assert torch.equal(out.flatten(1, -2)[:, :-4], x.flatten(1, -2)[:, :-4])
        assert out.is_contiguous()
    assert "channel_dim=-1" in repr(drop)
    with pytest.raises(ValueError, match=r"labels of shape \(3, 2, 2\): do not fit"):
        drop(torch.randn(5, 3, 3))
