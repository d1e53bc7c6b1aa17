"""The layers that regularisers act on: a module x -> x for each, its drop probability, its state."""

import copy
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_dropcluster import ranks
from lightning_dropcluster.layers.injection import HookedLayers, Injection
from lightning_dropcluster.layers.wrappers import LEARNED_CHILD, LearnedChild
from lightning_dropcluster.methods import Regularizer
from lightning_dropcluster.methods.factory import (
    Source,
    check_setting,
    has_drop_prob,
    is_learned,
    make_regularizer,
    own_drop_prob,
)


class RegularizedLayers(HookedLayers):
    """Everything that happens to the chosen layers; the callback only says when."""

    def __init__(self, source: Source, drop_prob: float | Literal["auto"] | None) -> None:
        super().__init__()
        self.source, self.drop_prob = source, drop_prob
        self.regularizers: dict[str, nn.Module] = {}
        self._drop_probs: dict[str, float] = {}

    @property
    def have_drop_prob(self) -> bool:
        """Whether any regulariser lets its drop probability be set."""
        return any(has_drop_prob(regularizer) for regularizer in self.regularizers.values())

    @property
    def are_learned(self) -> bool:
        """Whether any regulariser has parameters."""
        return any(map(is_learned, self.regularizers.values()))

    def register(self, modules: Mapping[str, nn.Module]) -> None:
        """Put regularisers that have parameters into their layers; nothing happens where they are there."""
        # All are made before the model changes.
        made = {name: self._get_or_make(name, layer) for name, layer in modules.items()}
        for name, layer in modules.items():
            if is_learned(made[name]):
                _check_name_is_free(name, layer)
        for name, layer in modules.items():
            if is_learned(made[name]) and not self._is_registered(name, layer):
                weight = next(layer.parameters(), torch.empty(0))
                layer.add_module(LEARNED_CHILD, LearnedChild(made[name].to(weight.device)))

    def attach(self, modules: Mapping[str, nn.Module], device: torch.device) -> None:
        """Hook the layers; those whose regulariser was forgotten get a new one."""
        self.detach()
        for name, layer in modules.items():
            regularizer = self._get_or_make(name, layer)
            if is_learned(regularizer) and not self._is_registered(name, layer):
                raise ValueError(
                    f"regularizer={self.source!r}: has parameters, but those for {name!r} are not in the "
                    "model: the layer was made after setup, or another StructuredDropout has taken it. Make "
                    "the layers in __init__, or call register(self) of this callback at the end of "
                    "configure_model"
                )
            for part in regularizer.modules():
                if isinstance(part, Regularizer):
                    part.shift = ranks.draw_shift()  # ranks that are seeded alike must not drop alike
            regularizer.to(device)
        self._injection = Injection(modules, {name: self.regularizers[name] for name in modules})
        for name, hook in self.hooks.items():
            hook.trial = self._copy_to_try(name)
        self.pause()
        self._injection.attach()

    def forget(self) -> None:
        """Forget the regularisers of an earlier training."""
        self.regularizers = {}

    def begin_step(self, fraction: float, drop_prob: float | None = None, *, is_clean: bool = False) -> float:
        """Set what the hooks do in the coming step."""
        used = {name: full if drop_prob is None else drop_prob for name, full in self._drop_probs.items()}
        for name, hook in self._injection.hooks.items():
            regularizer: Any = self.regularizers[name]
            if has_drop_prob(regularizer):
                used[name] *= fraction
                regularizer.set_drop_prob(used[name])
            would_act, hook.first_call = fraction > 0.0 and used[name] != 0.0, True
            hook.active = would_act and not is_clean
            if hook.active:
                hook.trial = None
            hook.touches = would_act and is_clean and is_learned(regularizer)
        told = [used[name] for name in self._injection.hooks if not math.isnan(used[name])]
        return max(told, default=math.nan) if fraction > 0.0 else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the regularisers, which the model's own state_dict leaves out."""
        states = {name: regularizer.state_dict() for name, regularizer in self.regularizers.items()}
        return {
            name: {key: value.cpu() if isinstance(value, Tensor) else value for key, value in state.items()}
            for name, state in states.items()
            if state
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over the states of the regularisers of hooked layers."""
        for name in self._injection.hooks.keys() & state.keys():
            try:
                self.regularizers[name].load_state_dict(state[name])
            except RuntimeError as error:
                raise ValueError(
                    f"state_dict: of another regulariser than that of layer {name!r}: {error}"
                ) from error

    def _is_registered(self, name: str, layer: nn.Module) -> bool:
        child = layer._modules.get(LEARNED_CHILD)
        return isinstance(child, LearnedChild) and child.regularizer is self.regularizers.get(name)

    def _copy_to_try(self, name: str) -> Any:
        """Copy a regulariser to try; ``None`` for learned ones, whose parameters a strategy may shard."""
        if is_learned(self.regularizers[name]):
            return None
        try:
            trial: Any = copy.deepcopy(self.regularizers[name])
        except Exception:  # modules may hold what cannot be copied
            return None
        if has_drop_prob(trial):
            trial.set_drop_prob(self._drop_probs[name])
        return trial

    def _get_or_make(self, name: str, layer: nn.Module) -> nn.Module:
        return self.regularizers[name] if name in self.regularizers else self._make(name, layer)

    def _make(self, name: str, layer: nn.Module) -> nn.Module:
        """Make the regulariser of a layer, and note its full drop probability."""
        regularizer = make_regularizer(self.source, layer, name)
        check_setting("drop_prob", self.drop_prob, regularizer)
        full = own_drop_prob(regularizer) if self.drop_prob is None else self.drop_prob
        if isinstance(full, str):
            full = 0.0  # "auto": each step brings its own
        if has_drop_prob(regularizer) and math.isnan(full):
            raise ValueError(
                f"drop_prob=None: must be given, since {type(regularizer).__name__} has no such attribute"
            )
        self._drop_probs[name], self.regularizers[name] = full, regularizer
        return regularizer


def unregister(model: nn.Module) -> None:
    """Take learned regularisers out of a model."""
    for module in list(model.modules()):
        if isinstance(module._modules.get(LEARNED_CHILD), LearnedChild):
            del module._modules[LEARNED_CHILD]


def _check_name_is_free(name: str, layer: nn.Module) -> None:
    if hasattr(layer, LEARNED_CHILD) and not isinstance(layer._modules.get(LEARNED_CHILD), LearnedChild):
        raise ValueError(
            f"layers: {name!r} has an attribute {LEARNED_CHILD!r} of its own, the name under which a "
            "regulariser with parameters is put there; rename it"
        )
