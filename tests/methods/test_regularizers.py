"""Every regulariser of the registry goes through the same tests."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call, grad, jacfwd, jacrev, vmap
from torch.utils.checkpoint import checkpoint

from lightning_dropcluster import REGULARIZERS
from lightning_dropcluster.functional import expected_drop_rate

CHANNELS, SPATIAL = 4, (6, 8)
LABELS = (torch.arange(CHANNELS * 48) % 7).reshape(CHANNELS, *SPATIAL)


def without_overlap(drop_prob: float) -> float:
    return drop_prob


def blocks_of_3(drop_prob: float) -> float:
    return expected_drop_rate(SPATIAL, drop_prob, 3)


@dataclass(frozen=True)
class Case:
    """How to make a regulariser, and the promises in which the methods differ.

    Args:
        options: further arguments of the constructor.
        rate: the share of features dropped on average where all are alike, as a function of drop_prob.
        keeps_mean: whether the mean is kept; not where the choice depends on the activation.
        any_size: whether it takes activations of any spatial size.
        shared: bound on what both halves of a pair drop, in units of what independent halves do.
    """

    options: dict
    rate: Callable[[float], float] = without_overlap
    keeps_mean: bool = True
    any_size: bool = True
    shared: float = 1e-9


CASES = {
    "advanced_dropout": Case({"num_channels": CHANNELS, "reduction": 2}),
    "channel_corr_drop": Case({}, keeps_mean=False),
    "cluster_drop": Case({"labels": LABELS}, any_size=False),
    "corr_drop": Case({"block_size": 3}, keeps_mean=False),
    "drop_block": Case({"block_size": 3}, blocks_of_3, shared=0.9),
    "dropout": Case({}),
    "prob_drop_block": Case({"block_size": 3}, blocks_of_3, keeps_mean=False, shared=0.9),
    "spatial_dropout": Case({}),
}
# Forward mode makes torch script some of its own decompositions.
forward_mode = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
DROPPING = [name for name in CASES if hasattr(REGULARIZERS[name], "set_drop_prob")]
SIZES = [name for name in CASES if CASES[name].any_size]


def make(name: str, drop_prob: float = 0.2, **options) -> nn.Module:
    if name in DROPPING:
        options["drop_prob"] = drop_prob
    torch.manual_seed(3)
    return REGULARIZERS[name](**CASES[name].options, **options)


def make_input(samples: int = 8, spatial: tuple[int, ...] = SPATIAL, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, CHANNELS, *spatial, generator=generator)


def seeded(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    torch.manual_seed(7)
    return module(x)


def standard_error(values: Tensor) -> Tensor:
    return values.std() / len(values) ** 0.5


def test_every_regulariser_has_a_case():
    assert CASES.keys() == REGULARIZERS.keys()


@pytest.mark.parametrize("name", CASES)
class TestRegularizer:
    def test_is_the_identity_in_eval_mode(self, name):
        x = make_input()
        assert make(name).eval()(x) is x

    def test_keeps_the_mean(self, name):
        module, x = make(name), make_input(samples=16).abs()
        x = x if CASES[name].keeps_mean else torch.ones_like(x)
        means = torch.stack([module(x).mean() for _ in range(400)])
        assert (means.mean() - x.mean()).abs() < 4 * standard_error(means) + 1e-6
        assert standard_error(means) < 0.02 * x.mean()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
    def test_keeps_the_dtype(self, name, dtype):
        x = make_input().to(dtype)
        out = seeded(make(name), x)
        assert out.dtype == dtype
        reference = seeded(make(name), x.double())
        torch.testing.assert_close(out.double(), reference, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)

    def test_keeps_the_dtype_under_autocast(self, name):
        x = make_input().bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            assert seeded(make(name), x).dtype == torch.bfloat16
            assert seeded(make(name), x.float()).dtype == torch.float32

    def test_keeps_the_dtype_as_a_module_of_a_coarse_type(self, name):
        x = make_input().bfloat16()
        assert seeded(make(name).bfloat16(), x).dtype == torch.bfloat16

    def test_keeps_the_memory_format_and_gives_the_same_in_it(self, name):
        x = make_input()
        last = x.contiguous(memory_format=torch.channels_last)
        out = seeded(make(name), last)
        assert out.stride() == last.stride()
        torch.testing.assert_close(out, seeded(make(name), x))

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
    def test_lets_the_model_write_into_its_output(self, name, memory_format):
        x = make_input().contiguous(memory_format=memory_format).requires_grad_()
        seeded(make(name), x).relu_().sum().backward()
        other = make_input().contiguous(memory_format=memory_format).requires_grad_()
        seeded(make(name), other).relu().sum().backward()
        assert torch.equal(x.grad, other.grad)

    def test_leaves_its_input_alone(self, name):
        x = make_input()
        before = x.clone()
        make(name)(x)
        assert torch.equal(x, before)

    def test_has_exact_gradients_for_a_fixed_draw(self, name):
        module, x = make(name).double(), make_input(samples=1).double().requires_grad_()
        for parameter in module.parameters():  # so that the divisor, which gets no gradient, is constant
            nn.init.zeros_(parameter)
        assert torch.autograd.gradcheck(lambda x: seeded(module, x), x, fast_mode=True)

    def test_activation_checkpointing_repeats_the_draw(self, name):
        module, gradients = make(name), []
        for call in (module, lambda x: checkpoint(module, x, use_reentrant=False)):
            x = make_input().requires_grad_()
            seeded(call, x).square().sum().backward()
            gradients.append(x.grad)
        assert torch.equal(*gradients)

    @forward_mode
    def test_forward_mode_agrees_with_backward(self, name):
        module, x = make(name), make_input(samples=2)
        forward = seeded(jacfwd(module, randomness="same"), x)
        torch.testing.assert_close(forward, seeded(jacrev(module), x))

    def test_vmap_of_grad_equals_a_loop_for_the_same_draw(self, name):
        module, x = make(name), make_input()
        parameters = dict(module.named_parameters())

        def gradient(sample):
            return grad(lambda one: functional_call(module, parameters, (one[None],)).square().sum())(sample)

        together = seeded(vmap(gradient, randomness="same"), x)
        torch.testing.assert_close(together, torch.stack([seeded(gradient, sample) for sample in x]))

    def test_vmap_draws_apart_where_asked_to(self, name):
        outputs = vmap(make(name), randomness="different")(make_input(samples=2).expand(5, -1, -1, -1, -1))
        assert len(outputs.unique(dim=0)) == 5

    def test_compiles_without_a_graph_break(self, name):
        torch.compiler.reset()
        module, x, results = make(name), make_input(), []
        for call in (module, torch.compile(module, fullgraph=True, backend="eager")):
            leaf = x.clone().requires_grad_()
            out = seeded(call, leaf)
            results.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaf)))
        torch.testing.assert_close(results[1], results[0])

    def test_copies_and_pickles_are_equal(self, name):
        module, x = make(name), make_input()
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(seeded(other, x), seeded(module, x))

    def test_shows_its_settings(self, name):
        shown = repr(make(name))
        assert shown.startswith(f"{REGULARIZERS[name].__name__}(")
        for option, value in CASES[name].options.items():
            if option not in ("labels", "reduction"):
                assert f"{option}={value}" in shown

    def test_ranks_seeded_alike_draw_apart(self, name):
        first, second = make(name), make(name)
        second.shift = 0.618
        x = make_input()
        assert not torch.equal(seeded(first, x), seeded(second, x))

    def test_state_dict_holds_what_is_learned_and_nothing_else(self, name):
        module = make(name)
        clusters = {"labels", "sizes"} if name == "cluster_drop" else set()
        assert module.state_dict().keys() == dict(module.named_parameters()).keys() | clusters
        assert bool(list(module.parameters())) == (name not in DROPPING)

    def test_refuses_to_pair_an_odd_batch(self, name):
        with pytest.raises(ValueError, match="paired=True"):
            make(name, paired=True)(make_input(samples=3))

    def test_refuses_flags_that_are_none(self, name):
        with pytest.raises(TypeError, match="paired=1"):
            make(name, paired=1)

    def test_shows_that_it_draws_pairs(self, name):
        assert "paired=True" in repr(make(name, paired=True))


@pytest.mark.parametrize("name", DROPPING)
class TestDropRegularizer:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_is_the_identity_at_drop_prob_zero_to_the_last_bit(self, name, dtype):
        x = make_input().to(dtype)
        x.flatten()[:3] = torch.tensor([-0.0, torch.inf, -torch.inf])
        assert torch.equal(make(name, 0.0)(x).view(torch.uint8), x.view(torch.uint8))

    @pytest.mark.parametrize("drop_prob", [0.1, 0.4])
    def test_drops_the_share_that_it_says(self, name, drop_prob):
        x = torch.ones(2000, CHANNELS, *SPATIAL)
        shares = (make(name, drop_prob)(x) == 0).float().mean((1, 2, 3))
        assert (shares.mean() - CASES[name].rate(drop_prob)).abs() < 4 * standard_error(shares)

    def test_scales_all_that_it_keeps_alike(self, name):
        x = make_input()
        factors = seeded(make(name), x) / x
        kept = factors[factors != 0]
        assert 0 < len(kept) < x.numel()
        torch.testing.assert_close(kept, kept[:1].expand_as(kept))
        assert kept[0] > 1

    def test_stays_finite_where_nearly_all_is_dropped(self, name):
        x = make_input().requires_grad_()
        out = make(name, 0.99999999)(x)
        out.sum().backward()
        assert out.isfinite().all()
        assert x.grad.isfinite().all()

    def test_takes_maps_of_zeros(self, name):
        assert torch.equal(make(name)(torch.zeros(8, CHANNELS, *SPATIAL)), torch.zeros(8, CHANNELS, *SPATIAL))

    def test_compiles_once_for_all_probabilities(self, name):
        torch.compiler.reset()
        module, x, counter = make(name), make_input(), CompileCounter()
        compiled = torch.compile(module, fullgraph=True, backend=counter)
        for drop_prob in (0.0, 0.1, 0.35):
            module.set_drop_prob(drop_prob)
            torch.testing.assert_close(seeded(compiled, x), seeded(module, x))
        assert counter.frame_count == 1

    def test_sets_its_probability_in_place_and_not_that_of_copies(self, name):
        module = make(name)
        other, buffer = copy.deepcopy(module), module.drop_prob
        module.set_drop_prob(0.5)
        assert module.drop_prob is buffer
        assert buffer == 0.5
        assert other.drop_prob == pytest.approx(0.2)

    def test_shows_its_probability(self, name):
        assert "drop_prob=0.2" in repr(make(name))

    @pytest.mark.parametrize("drop_prob", [-0.1, 1.0, float("nan")])
    def test_refuses_probabilities_out_of_range(self, name, drop_prob):
        for call in (make(name).set_drop_prob, lambda value: make(name, value)):
            with pytest.raises(ValueError, match=r"drop_prob=.*: must be .*in \[0, 1\)"):
                call(drop_prob)

    def test_drops_the_halves_of_a_pair_apart_and_as_much(self, name):
        x = torch.ones(2000, CHANNELS, *SPATIAL)
        module, shared = make(name, 0.3, paired=True), {}
        for module.paired in (True, False):
            first, second = (seeded(module, x) == 0).float().chunk(2)
            shared[module.paired] = (first * second).mean()
            difference = (first - second).mean((1, 2, 3))
            assert difference.mean().abs() < 4 * standard_error(difference)
        assert shared[True] <= CASES[name].shared * shared[False]

    @pytest.mark.parametrize("drop_prob", ["0.1", None, True])
    def test_refuses_probabilities_that_are_no_numbers(self, name, drop_prob):
        with pytest.raises(TypeError, match="drop_prob="):
            make(name, drop_prob)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("spatial", [(1,), (9,), (2, 1), (3, 4, 5)], ids=str)
def test_takes_maps_of_any_size_and_number_of_dimensions(name, spatial):
    x = make_input(spatial=spatial)
    assert seeded(make(name), x).shape == x.shape


@pytest.mark.parametrize("name", [name for name in CASES if "block_size" in CASES[name].options])
@pytest.mark.parametrize(("block_size", "error"), [(0, ValueError), (2.5, TypeError), (True, TypeError)])
def test_refuses_block_sizes_that_are_none(name, block_size, error):
    with pytest.raises(error, match="block_size="):
        REGULARIZERS[name](block_size=block_size)


@pytest.mark.parametrize("name", ["corr_drop", "drop_block", "prob_drop_block"])
def test_blocks_need_spatial_dimensions(name):
    with pytest.raises(ValueError, match="spatial"):
        make(name)(torch.ones(8, CHANNELS))
