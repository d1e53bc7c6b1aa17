"""What the callbacks share: when to attach, to step and to let go."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

from lightning_dropcluster import ranks
from lightning_dropcluster.callbacks import advice, training
from lightning_dropcluster.callbacks.auto_drop_prob import AutoDropProb
from lightning_dropcluster.callbacks.clean_steps import CleanSteps
from lightning_dropcluster.callbacks.namespaces import LOG, CallbackBase
from lightning_dropcluster.callbacks.schedule import Schedule
from lightning_dropcluster.callbacks.step_scope import StepScope, suspend
from lightning_dropcluster.checks import check_bool, check_channel_dim, check_number, check_text
from lightning_dropcluster.layers.channels import find_layouts
from lightning_dropcluster.layers.hooks import LayerHook
from lightning_dropcluster.layers.selection import (
    Layers,
    LayerTypes,
    check_layer_types,
    check_patterns,
    select_layers,
)
from lightning_dropcluster.layers.troubles import backward_hook_warning, idle_warnings, unused_layers_error
from lightning_dropcluster.learning.state import check_clean_steps

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


class LayerCallback(CallbackBase):
    """A callback that drops in chosen layers, to the measure of a schedule, and leaves nothing attached.

    Subclasses say what happens in `_attach`, `_begin_step`, `_state`, `_read_state` and `_load`, and extend
    `_reset`; this class says when.
    """

    log_name: ClassVar[str]
    _layers: Any  # what subclasses do it with

    def __init__(
        self,
        layers: Layers | None,
        layer_types: LayerTypes | None,
        schedule: Schedule,
        *,
        channel_dim: int,
        drop_prob: float | Literal["auto"] | None,
        monitor: str,
        max_drop_prob: float,
        clean_statistics: bool,
    ) -> None:
        super().__init__()
        if layers is not None:
            check_patterns(layers)
        elif layer_types is not None:
            raise ValueError(f"layer_types={layer_types!r}: needs layers; without them stages are taken")
        check_layer_types(layer_types)
        self.channel_dim = check_channel_dim(channel_dim)
        check_text("monitor", monitor)
        max_drop_prob = check_number("max_drop_prob", max_drop_prob, 0, 1, high_open=True)
        check_bool("clean_statistics", clean_statistics)
        self.layers, self.layer_types = layers, layer_types
        self.drop_prob = drop_prob
        self.monitor, self.max_drop_prob, self.clean_statistics = monitor, max_drop_prob, clean_statistics
        self._schedule = schedule
        auto = AutoDropProb(max_drop_prob) if drop_prob == "auto" else None
        self._clean_steps = CleanSteps(clean_statistics, auto)
        self._hooked: dict[str, nn.Module] = {}
        self._drop_prob_now = 0.0
        self._loaded: dict[str, Any] | None = None
        self._loaded_before: dict[str, Any] | None = None
        self._was_loaded = False
        self._is_fresh = self._saw_first_batch = False
        self._log_prefix = self.log_name
        self._scope = StepScope()

    @property
    def drop_prob_now(self) -> float:
        """The drop probability at this point of training; 0 before anything is dropped.

        Steps that drop nothing for the sake of clean statistics do not change it. NaN where a regulariser is
        applied that has none.
        """
        return self._drop_prob_now

    # When things happen

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Forget an earlier training: tuners save the state right after this, and restore it in the end."""
        self._loaded_before = self._loaded
        if stage == "fit" and self._loaded is None and trainer.global_step == 0:
            self._reset()

    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Attach: the first moment at which every model exists, on its device, with its state loaded."""
        self.detach()
        modules = self._select(pl_module)
        self._meet_others(trainer, modules)
        self._hooked = modules
        self._attach(trainer, pl_module)
        if self._clean_steps.auto is not None:
            advice.check_validation(trainer)
        self._clean_steps.attach(pl_module, [other._clean_steps for other in self._others_before(trainer)])
        suspend(self._layers.hooks)
        self._lay_out(pl_module, modules, self._layers.hooks)
        if self.layers is None and ranks.rank() == 0:
            self._say_stages()
        self._schedule.check(trainer.max_epochs, trainer.max_steps)
        self._warn(advice.late_start(trainer, self._schedule))
        self._apply_loaded()

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Say so where a resumed checkpoint lacks this callback, or the schedule cannot move."""
        self._is_fresh = trainer.global_step == 0  # only now have the counters been restored
        if trainer.ckpt_path and not self._was_loaded:
            self._warn(f"the checkpoint has no state of this callback ({self.state_key}); it starts afresh")
        self._was_loaded = False
        self._warn(backward_hook_warning(self._hooked))
        self._warn(advice.unknown_length(trainer, self._schedule))

    def on_train_batch_start(
        self, trainer: "Trainer", pl_module: "LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Set the drop probability of the step."""
        position = training.position(trainer, batch_idx)
        if batch_idx == 0:
            self._clean_steps.look_at(pl_module)
        fraction, is_due = self._schedule.advance(position)
        if training.only_updates_statistics(trainer):
            fraction, is_due = 0.0, False
        if is_due or (self._schedule.has_begun and batch_idx == 0):
            for warning in idle_warnings(pl_module, self._hooked):
                self._warn(warning)
        is_clean = self._clean_steps.is_due(trainer, position.batches_left)
        self._drop_prob_now = self._begin_step(fraction, is_due, is_clean)
        self._clean_steps.begin_step(self._drop_prob_now, is_clean)
        self._scope.open(trainer.strategy, self._layers.hooks, self._clean_steps.statistics)
        if not (trainer.barebones or math.isnan(self._drop_prob_now)):
            # As a number Lightning would copy it to the device, and wait.
            value = torch.full((), self._drop_prob_now, dtype=torch.float32, device=pl_module.device)
            pl_module.log(f"{self._log_prefix}/drop_prob", value, batch_size=1)

    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Fail where a layer of a new training has not run in a whole epoch; before the start, warn."""
        self._scope.close()
        self._layers.pause()
        self._clean_steps.end_step(trainer, outputs)
        self._saw_first_batch |= batch_idx == 0
        if not (self._is_fresh and self._saw_first_batch and trainer.is_last_batch):
            return
        error = unused_layers_error(self._layers.never_ran())
        if self._schedule.has_begun:
            ranks.raise_together(error, pl_module.device)
        elif error is not None:
            self._warn(str(error))

    def on_train_epoch_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Drop nothing where the last batch was skipped, and so never ended."""
        self._scope.close()
        self._layers.pause()
        self._clean_steps.cancel_step()

    def on_validation_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Let the drop probability follow the validation loss."""
        if self._hooked:
            self._warn(self._clean_steps.follow(trainer, pl_module, self.monitor))

    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Say so where the start was never reached."""
        self._warn(advice.unreached_start(trainer, self._schedule, self._clean_steps.auto))

    def on_exception(
        self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException
    ) -> None:
        """Leave nothing attached: Lightning calls no teardown after an error."""
        self.detach()
        self._let_go_of(pl_module)
        self._forget_loaded()

    def teardown(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Leave nothing attached; another Trainer may validate in the midst of a fit."""
        if stage == "fit":
            self.detach()
            self._let_go_of(pl_module)
        self._forget_loaded()
        if stage != "fit":
            self._loaded = self._loaded_before  # by hand, for a fit to come

    def detach(self) -> None:
        """Take all hooks off; labels stay.

        Nothing happens where no hook is on.
        """
        self._scope.close()
        self._layers.detach()
        self._clean_steps.detach()
        self._hooked = {}
        self._drop_prob_now = 0.0
        self._is_fresh = self._saw_first_batch = False

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the schedule and what training has made, as tensors and plain scalars."""
        if self._loaded is not None and not self._hooked:
            return self._loaded
        return {
            "progress": self._schedule.state_dict(),
            **self._clean_steps.state_dict(),
            **self._state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; where the layers are not hooked yet, as soon as they are."""
        self._read_state(state_dict)
        check_clean_steps(state_dict)
        self._clean_steps.load_state_dict(state_dict)  # `sampling` needs no hooks
        self._loaded, self._was_loaded = state_dict, True
        if self._hooked:
            self._apply_loaded()

    def _let_go_of(self, pl_module: "LightningModule") -> None:
        """Drop the methods of the module that Lightning gives to callbacks, anew for each fit."""
        for name in ("log", "log_dict"):
            vars(self).pop(name, None)

    def _forget_loaded(self) -> None:
        self._loaded, self._was_loaded = None, False

    def _apply_loaded(self) -> None:
        if self._loaded is not None:
            state, self._loaded = self._loaded, None
            self._schedule.load_state_dict(state["progress"])
            self._clean_steps.load_state_dict(state)
            self._load(state)

    def _key(self, **settings: Any) -> str:
        """Make what a checkpoint files the state under: equal for equal layers and settings."""
        patterns = (
            None
            if self.layers is None
            else [
                p if isinstance(p, str) else getattr(p, "__qualname__", type(p).__name__)
                for p in check_patterns(self.layers)
            ]
        )
        if (types := check_layer_types(self.layer_types)) is not None:
            settings["layer_types"] = [kind.__qualname__ for kind in types]
        return self._generate_state_key(layers=patterns, **settings)

    # What subclasses say

    def _reset(self) -> None:
        """Go back to before the start."""
        self._schedule.reset()
        self._clean_steps.reset()

    def _attach(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Hook ``self._hooked``; forget an earlier training where a new one begins."""
        raise NotImplementedError

    def _begin_step(self, fraction: float, is_due: bool, is_clean: bool) -> float:
        """Prepare for a step, and return the drop probability that it would use if it were not clean."""
        raise NotImplementedError

    def _state(self) -> dict[str, Any]:
        """Return what is to be in the state besides ``"progress"``."""
        raise NotImplementedError

    def _read_state(self, state: Mapping[str, Any]) -> None:
        """Check a state, ``"progress"`` included, and take over what needs no hooks."""
        raise NotImplementedError

    def _load(self, state: Mapping[str, Any]) -> None:
        """Take over a checked state; the hooks are on."""
        raise NotImplementedError

    @property
    def _full_drop_prob(self) -> Any:
        """What the schedule leads to."""
        auto = self._clean_steps.auto
        return self.drop_prob if auto is None else auto.drop_prob

    # The others and the user

    def _meet_others(self, trainer: "Trainer", modules: Mapping[str, nn.Module]) -> None:
        """Log under a name of its own, and share no layer with another such callback of the Trainer."""
        earlier = self._others_before(trainer)
        for other in earlier:
            taken = {id(module) for module in other._hooked.values()}  # a module may have two names
            shared = [name for name, module in modules.items() if id(module) in taken]
            if shared:
                raise ValueError(
                    f"layers={self.layers!r}: {', '.join(shared)} belong to another "
                    f"{type(other).__name__} of this Trainer (layers={other.layers!r})"
                )
        position = sum(other.log_name == self.log_name for other in earlier)
        self._log_prefix = f"{self.log_name}-{position}" if position else self.log_name

    def _others_before(self, trainer: "Trainer") -> "list[LayerCallback]":
        return [other for other in self._listed_before(trainer) if isinstance(other, LayerCallback)]

    def _select(self, root: nn.Module) -> dict[str, nn.Module]:
        return select_layers(root, self.layers, self.layer_types, channel_dim=self.channel_dim)

    def _lay_out(
        self, root: nn.Module, layers: Mapping[str, nn.Module], hooks: Mapping[str, LayerHook]
    ) -> None:
        """Tell hooks where outputs have their channels; of stages timm knows how many these are."""
        channel_dim = None if self.layers is None else self.channel_dim
        for name, layout in find_layouts(root, layers, channel_dim).items():
            hooks[name].layout = layout

    def _say_stages(self) -> None:
        names = ", ".join(map(repr, self._hooked))
        LOG.info(f"{type(self).__name__}: layers=None takes the outputs of stages, layers=[{names}]")

    def _listed_before(self, trainer: "Trainer") -> list[Any]:
        """List the callbacks before this one; all where another callback holds it."""
        every: list[Any] = list(trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]
        return every[: every.index(self)] if self in every else every

    def _warn(self, message: str | None) -> None:
        if message is not None:
            ranks.warn(message, type(self).__name__)


def check_drop_prob(drop_prob: Any) -> Any:
    """Return a number in [0, 1), or ``"auto"``; anything else is an error."""
    if isinstance(drop_prob, str) and drop_prob != "auto":
        raise TypeError(f"drop_prob={drop_prob!r}: must be a number in [0, 1) or 'auto'")
    return drop_prob if drop_prob == "auto" else check_number("drop_prob", drop_prob, 0, 1, high_open=True)
