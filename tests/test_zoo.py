"""The callback on many architectures: each gathers, clusters, drops, and is as it was afterwards."""

import copy

import pytest
import pytorch_lightning as pl
import timm
import torch
import torchvision
from fits import count_hooks, make_loader, make_trainer
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, TensorDataset

from lightning_dropcluster import DropCluster
from lightning_dropcluster.layers.selection import select_layers


def every_downsample(name: str, module: nn.Module) -> bool:
    return name.endswith("downsample.proj")


# timm's module (the family): name, pattern, input size
ZOO = {
    "resnet": [("resnet10t", "layer[12].*.conv2", 32), ("seresnet18", "conv1", 32)],
    "byobnet": [
        ("repvgg_a0", "stages.0.*.conv_kxk.conv", 32),
        ("mobileone_s0", "re:stages.0.*conv_kxk", 32),
        ("gernet_s", "stem.conv", 32),
    ],
    "convnext": [("convnext_atto", ["stem.0", "stages.1.blocks.*.conv_dw"], 32)],
    "densenet": [("densenet121", "features.denseblock1.**.conv2", 32)],
    "efficientnet": [
        ("test_efficientnet", "model.blocks.1.**", 32),
        ("efficientnet_lite0", "conv_stem", 32),
        ("mobilenetv2_035", "blocks.[12].*.conv_dw", 32),
        ("mnasnet_050", "blocks.1.*.conv_pw", 32),
        ("tf_mixnet_s", "blocks.1.*.conv_*.*", 32),
    ],
    "nfnet": [("nf_resnet26", "stem.conv", 32), ("eca_nfnet_l0", "stem.conv[12]", 32)],
    "swin_transformer": [("swin_tiny_patch4_window7_224", "patch_embed.proj", 64)],
    "vision_transformer": [("test_vit", "patch_embed.proj", 64), ("vit_tiny_patch16_224", "**.proj", 64)],
    "beit": [("beit_base_patch16_224", "patch_embed.proj", 32)],
    "byoanet": [
        ("botnet26t_256", "stem.*.conv", 32),
        ("lambda_resnet26t", "stages.[01].*.conv2_kxk.conv", 32),
    ],
    "cait": [("cait_xxs24_224", "patch_embed.proj", 64)],
    "coat": [("coat_lite_tiny", "patch_embed[12].proj", 32)],
    "convit": [("convit_tiny", "patch_embed.proj", 64)],
    "convmixer": [("convmixer_768_32", "blocks.[01].0.fn.0", 32)],
    "crossvit": [("crossvit_tiny_240", "patch_embed.*.proj", 240)],
    "csatv2": [("csatv2", "stages.0.*.dwconv", 64)],
    "cspnet": [("cs3darknet_s", "stem.*.conv", 32)],
    "davit": [("davit_tiny", "stem.conv", 32)],
    "dla": [("dla46_c", "level[23].**.conv2", 32)],
    "dpn": [("dpn48b", "features.conv1_1.conv", 32)],
    "edgenext": [("edgenext_xx_small", "stages.0.blocks.*.conv_dw", 32)],
    "efficientformer": [("efficientformer_l1", "stem.conv[12]", 224)],
    "efficientformer_v2": [("efficientformerv2_s0", "stem.*.conv", 32)],
    "efficientvim": [("efficientvim_m1", "patch_embed.conv.*.conv", 64)],
    "efficientvit_mit": [("efficientvit_b0", "stem.in_conv.conv", 32)],
    "efficientvit_msra": [("efficientvit_m0", "patch_embed.conv[12].conv", 64)],
    "fasternet": [("fasternet_t0", "stages.[01].**.partial_conv3", 32)],
    "fastvit": [("fastvit_t8", "stages.0.**.conv_scale.conv", 32), ("fastvit_t8", "stem.0.conv_kxk.*.*", 32)],
    "focalnet": [("focalnet_tiny_srf", "stem.proj", 32)],
    "gcvit": [("gcvit_xxtiny", "stem.conv1", 32)],
    "ghostnet": [
        ("ghostnet_050", "blocks.[12].*.ghost1.*.0", 32),
        ("ghostnetv3_050", "blocks.0.0.ghost1.primary_rpr_conv.*.conv", 64),
    ],
    "hardcorenas": [("hardcorenas_a", "conv_stem", 32)],
    "hgnet": [("hgnetv2_b0", "stem.*.conv", 32)],
    "hiera": [("hiera_tiny_224", "patch_embed.proj", 64)],
    "hrnet": [("hrnet_w18_small", "stage[23].**.branches.0.**.conv1", 32)],
    "iformer": [("iformer_t", "stem.*.c", 32)],
    "inception_next": [("inception_next_atto", "stages.0.**.dwconv_*", 32)],
    "inception_v3": [("inception_v3", "Conv2d_1a_3x3.conv", 128)],
    "levit": [("levit_128s", "stem.*.linear", 64), ("levit_conv_128s", "stem.*.linear", 64)],
    "lowformer": [("lowformer_b0", "stem.0.conv", 32)],
    "mambaout": [("mambaout_femto", "stages.0.blocks.*.conv", 32)],
    "maxxvit": [("coatnet_nano_rw_224", "stem.conv[12]", 32), ("maxvit_pico_rw_256", "stem.conv1", 32)],
    "metaformer": [("poolformer_s12", "stem.conv", 32), ("caformer_s18", "stages.0.**.dwconv", 32)],
    "mlp_mixer": [("mixer_s32_224", "stem.proj", 64)],
    "mobilenetv3": [("mobilenetv3_small_050", "conv_stem", 32), ("lcnet_035", "blocks.0.*.conv_dw", 32)],
    "mobilevit": [("mobilevit_xxs", "stem.conv", 64), ("mobilevitv2_050", "stages.0.**.conv", 64)],
    "mvitv2": [("mvitv2_tiny", "patch_embed.proj", 64)],
    "nest": [("nest_tiny", "patch_embed.proj", 64)],
    "nextvit": [("nextvit_small", "stem.*.conv", 32)],
    "pit": [("pit_ti_224", "transformers.*.pool.conv", 64)],
    "pvt_v2": [("pvt_v2_b0", every_downsample, 64)],
    "rdnet": [("rdnet_tiny", "stem.0", 32)],
    "regnet": [("regnetx_002", "s[12].*.conv2.conv", 32), ("regnety_002", "stem.conv", 32)],
    "repghost": [("repghostnet_050", "blocks.[12].*.ghost1.*.0", 32)],
    "repvit": [("repvit_m0_9", "stem.*.c", 32)],
    "res2net": [("res2net50_14w_8s", "layer1.*.convs.*", 32)],
    "resnest": [("resnest14d", "layer1.*.conv2.conv", 32)],
    "resnetv2": [("resnetv2_18", "stages.[01].**.conv2", 32), ("resnetv2_50x1_bit", "stem.conv", 32)],
    "rexnet": [("rexnet_100", "features.[12].conv_dw.conv", 32)],
    "selecsls": [("selecsls42", "stem.0", 32)],
    "senet": [("legacy_seresnet18", "layer0.conv1", 32)],
    "sequencer": [("sequencer2d_s", "stem.proj", 64)],
    "shvit": [("shvit_s1", "patch_embed.*.c", 64)],
    "sknet": [("skresnet18", "layer1.*.conv1.paths.*.conv", 32)],
    "starnet": [("starnet_s050", "stages.0.*.dwconv.conv", 32)],
    "swiftformer": [("swiftformer_xs", "stem.[03]", 64)],
    "tiny_vit": [("tiny_vit_5m_224", "patch_embed.*.conv", 32)],
    "tnt": [("tnt_s_patch16_224", "pixel_embed.proj", 64)],
    "tresnet": [("tresnet_m", "body.layer1.*.conv1.conv", 32)],
    "twins": [("twins_pcpvt_small", "pos_block.*.proj.0", 64)],
    "vgg": [("vgg11", "features.[0-3]", 32)],
    "visformer": [("visformer_tiny", "stem.0", 32)],
    "vision_transformer_hybrid": [("vit_tiny_r_s16_p8_224", "patch_embed.backbone.conv", 64)],
    "vitamin": [("vitamin_small_224", "patch_embed.backbone.stem.conv[12]", 64)],
    "volo": [("volo_d1_224", "patch_embed.conv.[036]", 64)],
    "vovnet": [("ese_vovnet19b_slim", "stem.*.conv", 32)],
    "xception_aligned": [("xception41", "blocks.0.**.conv_dw", 32)],
    "xcit": [("xcit_nano_12_p16_224", "blocks.[01].local_mp.conv*", 64)],
}
QUICK = (
    *("resnet", "byobnet", "convnext", "densenet", "efficientnet", "mobilenetv3", "nfnet", "regnet"),
    *("swin_transformer", "fastvit"),
)
REPARAMETERISED = {
    "repvgg_a0": "conv_kxk.conv",
    "mobileone_s0": "conv_kxk.0.conv",
    "fastvit_t8": "conv_scale.conv",
    "repvit_m0_9": "conv.c",
    "ghostnetv3_050": "primary_rpr_conv.0.conv",
    "repghostnet_050": "primary_conv.0",
    "efficientvit_m0": "conv1.conv",
    "levit_conv_128s": "stem.conv1.linear",
}


class Anything(pl.LightningModule):
    """Train any model: the loss is over whatever tensors it returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        outputs = tensors_of(self.model(batch[0]))
        return torch.stack([output.float().square().mean() for output in outputs]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Watch(pl.Callback):
    """Note the share of zeros in the outputs of layers, by step."""

    def __init__(self, layers, layer_types=None, channel_dim=1) -> None:
        self.layers, self.layer_types, self.channel_dim, self.handles = layers, layer_types, channel_dim, []
        self.zeros: dict[str, list[list[float]]] = {}
        self.num_labels: list[int] = []

    def on_train_start(self, trainer, pl_module):
        def watch(name, module):
            self.zeros[name] = []
            return module.register_forward_hook(
                lambda m, args, out: self.zeros[name][-1].append((out == 0).float().mean().item())
            )

        picked = select_layers(pl_module, self.layers, self.layer_types, channel_dim=self.channel_dim)
        self.handles = [watch(name, module) for name, module in picked.items()]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for calls in self.zeros.values():
            calls.append([])

    def on_train_end(self, trainer, pl_module):
        for handle in self.handles:
            handle.remove()


def tensors_of(output) -> list[Tensor]:
    found = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    assert found
    return found


def make_timm(name: str, size: int) -> nn.Module:
    cfg = timm.models.get_pretrained_cfg(name)
    fixed = cfg.fixed_input_size and cfg.input_size[-1] != size
    options = {"img_size": size} if fixed else {"mlp_ratio": 0.02} if name.startswith("vgg") else {}
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, num_classes=4, **options)


def noise_loader(*shape: int, num_samples: int = 10) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    dataset = TensorDataset(torch.randn(num_samples, *shape, generator=generator))
    return DataLoader(dataset, batch_size=2, generator=generator)


def fit_and_check(make_model, layers, loader, *, drops=True, **options) -> tuple[DropCluster, nn.Module]:
    """Gather, cluster and drop in five steps of training; then no trace of it may be left."""
    model, plain = make_model(), make_model()
    torch.manual_seed(2)
    module = Anything(model)
    callback = DropCluster(
        layers,
        0.5,
        **({"start": 0.0, "schedule": "constant", "every_n_epochs": 0, "num_samples": 4} | options),
    )
    picking = {name: options[name] for name in ("layer_types", "channel_dim") if name in options}
    watch = Watch(layers, **picking)
    # Clipped, since BatchNorm over the few positions of small images has huge gradients.
    make_trainer(callback, watch, max_epochs=1, gradient_clip_val=1.0).fit(module, loader)

    picked = select_layers(module, layers, **picking)
    assert list(callback.labels) == list(picked)
    for name, labels in callback.labels.items():
        assert labels.shape[0] == getattr(picked[name], "out_channels", labels.shape[0])
        assert labels.min() == 0
    for name, steps in watch.zeros.items():
        before, after = steps[0], steps[-1]
        assert before, f"{name} did not run"
        if drops:
            assert max(before) < 0.05 < max(after) < 1.0, name

    assert count_hooks(model) == count_hooks(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    for trained, fresh in zip(model.modules(), plain.modules(), strict=True):
        assert repr(trained) == repr(fresh)
        assert vars(trained).keys() == vars(fresh).keys()
    plain.load_state_dict(model.state_dict(), strict=True)
    assert_same_outputs(model, plain, next(iter(loader))[0])
    return callback, model


def assert_same_outputs(first: nn.Module, second: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        outputs = [tensors_of(model.eval()(x)) for model in (first, second)]
    for mine, other in zip(*outputs, strict=True):
        assert mine.isfinite().all()
        assert torch.equal(mine, other)


# timm's module: name, pattern (None for the stages), input size; all give channels last, and none is a conv.
LAST = {
    "beit": ("beit_base_patch16_224", "blocks.[01]", 32),
    "cait": ("cait_xxs24_224", "blocks.[01].attn", 64),
    "convit": ("convit_tiny", "blocks.[01].mlp", 64),
    "deit": ("deit_tiny_distilled_patch16_224", "blocks.[01]", 64),
    "eva": ("eva02_tiny_patch14_224", "blocks.[01].mlp", 56),
    "hiera": ("hiera_tiny_224", None, 64),
    "levit": ("levit_128s", None, 64),
    "maxxvit": ("maxvit_pico_rw_256", "stages.[01].**.attn_block", 64),
    "mlp_mixer": ("mixer_s32_224", None, 64),
    "mvitv2": ("mvitv2_tiny", "stages.[01].**.mlp", 64),
    "nest": ("nest_tiny", "levels.0.transformer_encoder.*", 64),
    "pit": ("pit_ti_224", "transformers.0.blocks.*", 64),
    "pvt_v2": ("pvt_v2_b0", "stages.[01].blocks.*", 64),
    "sequencer": ("sequencer2d_s", "stages.0", 64),
    "swin_transformer": ("swin_tiny_patch4_window7_224", None, 64),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", "layers.*.blocks.0.mlp.fc1", 64),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_ns_224", "stages.[01].blocks.*", 64),
    "tiny_vit": ("tiny_vit_5m_224", "stages.1.blocks.*.mlp", 64),
    "tnt": ("tnt_s_patch16_224", "blocks.[01].mlp", 64),
    "twins": ("twins_svt_small", "blocks.0.*.mlp", 64),
    "vision_transformer": ("vit_tiny_patch16_224", None, 64),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", "blocks.[01].attn.proj", 64),
    "vision_transformer_relpos": ("vit_relpos_small_patch16_224", "blocks.[01]", 64),
    "vision_transformer_sam": ("samvit_base_patch16", "blocks.[01]", 64),
    "vitamin": ("vitamin_small_224", "blocks.[01]", 64),
    "volo": ("volo_d1_224", "network.[02]", 64),
    "xcit": ("xcit_nano_12_p16_224", "blocks.[01]", 64),
}
# Transformers and their kin whose stages give maps.
FIRST = {
    "davit": ("davit_tiny", None, 64),
    "efficientformer": ("efficientformer_l1", None, 224),
    "focalnet": ("focalnet_tiny_srf", None, 64),
    "gcvit": ("gcvit_xxtiny", None, 64),
    "metaformer": ("poolformer_s12", None, 64),
    "nextvit": ("nextvit_small", None, 64),
}
QUICK_LAST = ("vision_transformer", "swin_transformer", "levit", "pvt_v2")


def all_entries():
    for family, entries in ZOO.items():
        for position, (name, pattern, size) in enumerate(entries):
            label = pattern if isinstance(pattern, str) else "patterns"
            marks = [] if family in QUICK and position == 0 else [pytest.mark.long]
            yield pytest.param(name, pattern, size, marks=marks, id=f"{family}-{name}-{label}")


def test_the_zoo_is_as_large_as_it_says():
    names = {name for entries in ZOO.values() for name, _, _ in entries}
    assert len(names) >= 40
    assert len(ZOO) >= 25
    assert len(LAST) >= 20
    for family, entries in [*ZOO.items(), *((f, [e]) for f, e in (LAST | FIRST).items())]:
        for name, _, _ in entries:
            assert timm.models.model_entrypoint(name).__module__ == f"timm.models.{family}"


@pytest.mark.parametrize(("name", "pattern", "size"), list(all_entries()))
def test_timm(name, pattern, size):
    fit_and_check(lambda: make_timm(name, size), pattern, make_loader(10, 2, size))


@pytest.mark.parametrize(
    ("name", "layers", "size", "channel_dim"),
    [
        pytest.param(*entry, channel_dim, marks=() if family in QUICK_LAST else pytest.mark.long, id=family)
        for channel_dim, entries in ((-1, LAST), (1, FIRST))
        for family, entry in entries.items()
    ],
)
def test_transformers(name, layers, size, channel_dim):
    options = {"channel_dim": channel_dim, "every_n_epochs": None, "every_n_train_steps": 2}
    fit_and_check(lambda: make_timm(name, size), layers, make_loader(10, 2, size), **options)


@pytest.mark.long
# Convs of position embeddings do not respond to the images at all.
@pytest.mark.filterwarnings("ignore:.*is lowered to the number of distinct profiles")
@pytest.mark.parametrize(
    ("name", "size"),
    [pytest.param(name, max(size, 64), id=name) for (name, _, size), *_ in ZOO.values() if size <= 128],
)
def test_all_convs_at_once(name, size):
    fit_and_check(lambda: make_timm(name, size), "**", make_loader(10, 2, size), drops=False)


# Models whose convs are fused after training


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("repvgg_a0", "fastvit_t8") else [pytest.mark.long])
        for name in REPARAMETERISED
    ],
)
def test_fusing_after_fit_works_as_if_the_callback_had_never_been_there(name):
    size, layers = 64, "re:" + REPARAMETERISED[name].replace(".", r"\.") + "$"
    loader = make_loader(10, 2, size)
    callback, model = fit_and_check(lambda: make_timm(name, size), layers, loader, drops=False)
    plain = make_timm(name, size)
    plain.load_state_dict(model.state_dict())
    fused, expected = (reparameterize_model(m.eval()) for m in (model, plain))
    assert len(list(fused.modules())) < len(list(plain.modules()))
    assert list(fused.state_dict()) == list(expected.state_dict())
    assert count_hooks(fused) == 0
    x = next(iter(loader))[0]
    assert_same_outputs(fused, expected, x)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-3, atol=1e-3)

    gone = [
        name for name in callback.labels if name.removeprefix("model.") not in dict(fused.named_modules())
    ]
    if gone:
        with pytest.raises(ValueError, match=r"matches no (conv )?layer"):
            make_trainer(DropCluster(gone[0])).fit(Anything(copy.deepcopy(fused)), loader)


def test_a_fused_model_can_be_trained_with_drop():
    def make_model():
        return reparameterize_model(make_timm("repvgg_a0", 32).eval()).train()

    fit_and_check(make_model, "stages.0.*.reparam_conv", make_loader(10, 2, 32))


def test_fusing_a_copy_in_mid_fit_works_as_after_it():
    model, seen = make_timm("repvgg_a0", 32), []

    class Fuse(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            fused = reparameterize_model(model.eval())
            plain = make_timm("repvgg_a0", 32)
            plain.load_state_dict(model.state_dict())
            assert_same_outputs(fused, reparameterize_model(plain.eval()), batch[0])
            model.train()
            seen.append(bool(callback.labels))

    callback = DropCluster("stages.0.*.conv_kxk.conv", start=0.0, num_samples=4)
    make_trainer(callback, Fuse(), max_epochs=1).fit(Anything(model), make_loader(10, 2, 32))
    assert seen[-1]


def test_fusing_the_model_itself_in_mid_fit_is_a_named_error():
    model = make_timm("repvgg_a0", 32)

    class Fuse(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            reparameterize_model(model, inplace=True)

    callback = DropCluster("stages.0.*.conv_kxk.conv", start=0.0, num_samples=4)
    module = Anything(model)
    with (
        pytest.warns(UserWarning, match=r"layers model\.stages\.0\.0\.conv_kxk\.conv, .* are no longer part"),
        pytest.raises(RuntimeError, match=r"'model.stages.0.0.conv_kxk.conv'.* did not run"),
    ):
        make_trainer(callback, Fuse(), max_epochs=2).fit(module, make_loader(10, 2, 32))
    assert count_hooks(module) == 0


# Convs that are no nn.Conv2d, or not quite


def test_conditional_convs_are_picked_by_name():
    """They are no conv layers to torch, so a pattern picks them where it matches no others."""
    fit_and_check(
        lambda: make_timm("tf_efficientnet_cc_b0_4e", 32),
        "blocks.4.*.conv_pw",
        make_loader(10, 2, 32),
        drops=False,
    )


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrised_convs(wrap):
    def make_model():
        model = make_timm("resnet10t", 32)
        wrap(model.layer1[0].conv2)
        return model

    fit_and_check(make_model, "layer1.0.conv2", make_loader(10, 2, 32))


def test_a_conv_whose_weight_is_used_without_calling_it_is_a_named_error():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x):
            return self.body(nn.functional.conv2d(x, self.stem.weight))

    with pytest.raises(RuntimeError, match=r"'model.stem' did not run"):
        fit_and_check(Functional, "*", make_loader(10, 2, 32))


# Not timm


def test_torchvision_resnet():
    def make_model():
        torch.manual_seed(0)
        return torchvision.models.resnet18(weights=None, num_classes=4)

    fit_and_check(make_model, ["conv1", "layer[12].**.conv2"], make_loader(10, 2, 32))


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        ("lraspp_mobilenet_v3_large", ["backbone.0.0", "classifier.**"]),
        pytest.param("fcn_resnet50", "classifier.0", marks=pytest.mark.long),
        pytest.param("deeplabv3_mobilenet_v3_large", "classifier.0.convs.*.0", marks=pytest.mark.long),
    ],
)
def test_torchvision_segmentation(make, pattern):
    def make_model():
        torch.manual_seed(0)
        return getattr(torchvision.models.segmentation, make)(weights=None, weights_backbone=None)

    fit_and_check(make_model, pattern, make_loader(10, 2, 64))


class ConvNet(nn.Module):
    """Down, up again and classify, in 1, 2 or 3 dimensions."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        up = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
        self.stem = nn.Sequential(conv(2, 6, 3, padding=1), norm(6), nn.ReLU())
        self.down = conv(6, 8, 2, stride=2)
        self.up = up(8, 4, 2, stride=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.down(self.stem(x))).flatten(2).mean(2))


@pytest.mark.parametrize("scope", ["map", "position", "layer", "channel"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convs_and_transposed_convs_of_all_dimensions(dims, scope):
    shape = (2, *((64,), (16, 12), (8, 6, 4))[dims - 1])
    callback, _ = fit_and_check(
        lambda: ConvNet(dims), ["stem.0", "down", "up"], noise_loader(*shape), scope=scope, num_clusters=3
    )
    shapes = {name: tuple(labels.shape[1:]) for name, labels in callback.labels.items()}
    assert shapes["model.stem.0"] == shapes["model.up"] == shape[1:]
    assert shapes["model.down"] == tuple(side // 2 for side in shape[1:])


class Detector(nn.Module):
    """One head for all levels of a pyramid, as RetinaNet and FCOS have it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.downs = nn.ModuleList(nn.Conv2d(8, 8, 3, stride=2, padding=1) for _ in range(3))
        self.head = nn.Conv2d(8, 8, 3, padding=1)
        self.boxes = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        levels = [self.stem(x)]
        for down in self.downs:
            levels.append(down(levels[-1].relu()))
        return [self.boxes(self.head(level).relu()) for level in levels]


@pytest.mark.parametrize("scope", ["map", "position", "layer", "channel"])
def test_a_head_that_runs_on_many_levels(scope):
    watched = []
    callback, _ = fit_and_check(Detector, "head", make_loader(10, 2, 32), scope=scope, num_clusters=4)
    assert callback.labels["model.head"].shape == (8, 16, 16)

    model = Detector()
    with callback.sampling(model.eval(), 0.5):
        model.head.register_forward_hook(lambda m, args, out: watched.append((out == 0).float()))
        model(torch.randn(2, 3, 32, 32))
    assert [out.shape[-1] for out in watched] == [16, 8, 4, 2]
    assert all(0.0 < out.mean() < 1.0 for out in watched)


@pytest.mark.long
@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        ("retinanet_resnet50_fpn", ["detector.head.**.conv.[01].0", "**.layer_blocks.**"]),
        ("fcos_resnet50_fpn", "detector.head.**.conv.0"),
        ("ssdlite320_mobilenet_v3_large", "detector.head.**.module_list.[0-3].0.0"),
    ],
)
def test_torchvision_detection(make, pattern):
    """Their heads run on each level; their loss needs boxes, and their images are resized in the model."""

    class Boxes(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            size = {} if make.startswith("ssd") else {"min_size": 64, "max_size": 64}
            self.detector = getattr(torchvision.models.detection, make)(
                weights=None, weights_backbone=None, num_classes=3, **size
            )

        def forward(self, x):
            x = x.sigmoid()
            if not self.training:
                return tree_map(lambda out: out.float(), self.detector(list(x)))
            box = torch.tensor([[4.0, 6.0, 40.0, 50.0]])
            targets = [{"boxes": box, "labels": torch.ones(1, dtype=torch.int64)} for _ in x]
            return self.detector(list(x), targets)

    fit_and_check(Boxes, pattern, make_loader(10, 2, 64))
