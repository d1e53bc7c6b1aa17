"""What the callbacks share: when to attach, to step and to let go. The only file that imports Lightning."""

import importlib
import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from lightning_dropcluster import ranks
from lightning_dropcluster.callbacks.auto_drop_prob import AutoDropProb
from lightning_dropcluster.callbacks.schedule import Schedule, TrainingPosition
from lightning_dropcluster.callbacks.step_scope import StepScope, suspend
from lightning_dropcluster.checks import check_bool, check_number, check_text
from lightning_dropcluster.layers.injection import backward_hook_warning, unused_layers_error
from lightning_dropcluster.layers.norm_statistics import NormStatistics, is_clean_step
from lightning_dropcluster.layers.selection import (
    Layers,
    LayerTypes,
    check_layer_types,
    check_patterns,
    select_layers,
)
from lightning_dropcluster.layers.stages import default_layers
from lightning_dropcluster.learning.state import check_clean_steps

if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningModule, Trainer

    _Base = Callback
else:

    def _callback_bases() -> tuple[type, ...]:
        """The Callback classes of both namespaces: each Trainer and LightningCLI knows only its own."""
        bases = []
        for namespace in ("lightning.pytorch", "pytorch_lightning"):
            try:
                bases.append(importlib.import_module(namespace).Callback)
            except ImportError:
                continue
        return tuple(dict.fromkeys(bases))

    _Base = type("_Base", _callback_bases(), {})

# Lightning's own logger, which is shown.
_log = logging.getLogger(_Base.__mro__[1].__module__.partition(".callbacks")[0])


class LayerCallback(_Base):
    """A callback that drops in chosen layers, to the measure of a schedule, and leaves nothing attached.

    Subclasses say what happens in `_attach`, `_begin_step`, `_state`, `_read_state` and `_load`, and extend
    `_reset`; this class says when.

    Args:
        layers: which layers, see `select_layers`.
        layer_types: the module types that patterns may pick, see `select_layers`.
        schedule: from the trainer's counters to the part of drop_prob in use.
        drop_prob: at the end of the schedule; ``"auto"`` follows ``monitor``; ``None`` where the layers know.
        monitor: the validation loss that ``"auto"`` looks at.
        max_drop_prob: the most that ``"auto"`` drops.
        clean_statistics: whether running averages are to be those of steps that drop nothing.

    Raises:
        TypeError: where an argument has a wrong type.
        ValueError: where an argument is out of its range.
    """

    log_name: ClassVar[str]
    _layers: Any  # what subclasses do it with; it names its `silent` layers, and can `rest` and `detach`

    def __init__(
        self,
        layers: Layers | None,
        layer_types: LayerTypes | None,
        schedule: Schedule,
        *,
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
        check_text("monitor", monitor)
        max_drop_prob = check_number("max_drop_prob", max_drop_prob, 0, 1, high_open=True)
        check_bool("clean_statistics", clean_statistics)
        self.layers, self.layer_types = layers, layer_types
        self.drop_prob = drop_prob
        self.monitor, self.max_drop_prob, self.clean_statistics = monitor, max_drop_prob, clean_statistics
        self._auto = AutoDropProb(max_drop_prob) if drop_prob == "auto" else None
        self._schedule = schedule
        self._statistics = NormStatistics()
        self._has_clean_steps = self._drops = False
        self._hooked: dict[str, nn.Module] = {}
        self._drop_prob_now = 0.0
        self._loaded: dict[str, Any] | None = None
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
        if stage == "fit" and self._loaded is None and trainer.global_step == 0:
            self._reset()

    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Attach: the first moment at which every model exists, on its device, with its state loaded."""
        self.detach()
        modules = select_layers(pl_module, self.layers, self.layer_types)
        self._meet_others(trainer, modules)
        self._hooked = modules
        self._attach(trainer, pl_module)
        self._attach_statistics(trainer, pl_module)
        suspend(self._layers.hooks)
        if self.layers is None:
            self._expect_stages(pl_module)
        self._check_start(trainer)
        self._apply_loaded()

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Say so where a resumed checkpoint lacks this callback, or the schedule cannot move."""
        self._is_fresh = trainer.global_step == 0  # only now have the counters been restored
        if trainer.ckpt_path and not self._was_loaded:
            self._warn(f"the checkpoint has no state of this callback ({self.state_key}); it starts afresh")
        self._was_loaded = False
        if warning := backward_hook_warning(self._hooked):
            self._warn(warning)
        is_one_epoch = trainer.max_epochs == 1 and trainer.max_steps == -1
        if is_one_epoch and math.isinf(trainer.num_training_batches) and self._schedule.follows_length:
            self._warn(
                "max_epochs=1 with data of unknown length: how far training is cannot be told, so the "
                "schedule stays at its beginning; set max_steps or limit_train_batches in the Trainer"
            )

    def on_train_batch_start(
        self, trainer: "Trainer", pl_module: "LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Set the drop probability of the step."""
        position = _position(trainer, batch_idx)
        fraction, is_due = self._schedule.advance(position)
        if _only_updates_statistics(trainer):
            fraction, is_due = 0.0, False
        if is_due or (self._schedule.has_begun and batch_idx == 0):
            self._warn_of_idle_layers(pl_module)
        batch_of_all = trainer.fit_loop.epoch_loop.total_batch_idx
        is_clean = self._has_clean_steps and is_clean_step(batch_of_all, position.batches_left)
        self._drop_prob_now = self._begin_step(fraction, is_due, is_clean)
        self._drops = self._drop_prob_now != 0.0 and not is_clean
        self._statistics.begin_step(self._drops)
        self._scope.open(trainer.strategy, self._layers.hooks)
        if not (trainer.barebones or math.isnan(self._drop_prob_now)):
            pl_module.log(f"{self._log_prefix}/drop_prob", self._drop_prob_now, batch_size=1)

    def on_after_backward(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Put running averages back before other callbacks see them; recomputed forwards move them too."""
        self._statistics.put_back()

    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Fail where a layer of a new training has not run in a whole epoch; before the start, warn."""
        self._scope.close()
        self._layers.pause()
        self._statistics.end_step()
        if self._auto is not None and not self._drops:
            self._add_loss(trainer, outputs)
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
        self._statistics.cancel_step()

    def on_validation_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Let the drop probability follow the validation loss."""
        if self._auto is None or not self._hooked or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        loss = trainer.callback_metrics.get(self.monitor)
        if not self._auto.compare(None if loss is None else float(loss), pl_module.device):
            logged = ", ".join(map(repr, sorted(trainer.callback_metrics))) or "nothing"
            raise ValueError(
                f"monitor={self.monitor!r}: drop_prob='auto' needs it, but validation did not log it; "
                f"logged: {logged}"
            )
        if not self._auto.has_losses:
            raise ValueError(
                "drop_prob='auto': needs the training loss; let training_step return it, also with manual "
                "optimisation"
            )

    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Say so where the start was never reached."""
        schedule = self._schedule
        if not (schedule.has_begun or schedule.is_late or is_trial(trainer)):
            self._warn(
                f"start={schedule.start!r} was not reached before training ended, so nothing was dropped"
            )
        elif self._auto is not None and not (self._auto.has_compared or is_trial(trainer)):
            self._warn("drop_prob='auto': training ended before a validation did, so nothing was dropped")

    def on_exception(
        self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException
    ) -> None:
        """Leave nothing attached: Lightning calls no teardown after an error."""
        self.detach()
        self._forget_loaded()

    def teardown(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Leave nothing attached; another Trainer may validate in the midst of a fit."""
        if stage == "fit":
            self.detach()
        self._forget_loaded()

    def detach(self) -> None:
        """Take all hooks off; labels stay.

        Nothing happens where no hook is on.
        """
        self._scope.close()
        self._layers.detach()
        self._statistics.cancel_step()
        self._statistics = NormStatistics(self._statistics.left_out)
        self._hooked = {}
        self._drop_prob_now = 0.0
        self._is_fresh = self._saw_first_batch = False

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the schedule, and what training has made so far.

        Returns:
            Tensors and plain scalars, which load with ``weights_only=True``.
        """
        if self._loaded is not None and not self._hooked:
            return self._loaded
        return {
            "progress": self._schedule.state_dict(),
            "left_out": self._statistics.left_out,
            "auto": None if self._auto is None else self._auto.state_dict(),
            **self._state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; where the layers are not hooked yet, as soon as they are.

        Args:
            state_dict: what `state_dict` returned.

        Raises:
            TypeError: where an entry has a wrong type.
            ValueError: where an entry is missing or out of its range.
        """
        self._read_state(state_dict)
        check_clean_steps(state_dict)
        self._loaded, self._was_loaded = state_dict, True
        if self._hooked:
            self._apply_loaded()

    def _forget_loaded(self) -> None:
        self._loaded, self._was_loaded = None, False

    def _apply_loaded(self) -> None:
        if self._loaded is not None:
            state, self._loaded = self._loaded, None
            self._schedule.load_state_dict(state["progress"])
            self._statistics.left_out = state.get("left_out", 0)
            if self._auto is not None and state.get("auto") is not None:
                self._auto.load_state_dict(state["auto"])
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
        if self.layer_types is not None:
            settings["layer_types"] = [kind.__qualname__ for kind in check_layer_types(self.layer_types)]
        return self._generate_state_key(layers=patterns, **settings)

    # What subclasses say

    def _reset(self) -> None:
        """Go back to before the start."""
        self._schedule.reset()
        self._statistics.left_out = 0
        if self._auto is not None:
            self._auto.reset()

    def _attach(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Hook ``self._hooked``; forget an earlier training where a new one begins."""
        raise NotImplementedError

    def _begin_step(self, fraction: float, is_due: bool, is_clean: bool) -> float:
        """Prepare for a step, and return the drop probability that it would use if it were not clean.

        Args:
            fraction: of drop_prob, in [0, 1].
            is_due: whether a due moment of the schedule, the first at the start, has just come.
            is_clean: whether the step is to drop nothing.
        """
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
    def _full_drop_prob(self) -> float:
        """What the schedule leads to."""
        return self._auto.drop_prob if self._auto is not None else self.drop_prob

    # Clean steps

    def _attach_statistics(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Look for running averages; callbacks of one Trainer look after them together."""
        if self._auto is not None and not trainer.enable_validation:
            raise ValueError(
                "drop_prob='auto': needs validation, so give fit validation data, define validation_step and "
                "leave limit_val_batches above 0; or give drop_prob as a number"
            )
        self._has_clean_steps = self._auto is not None
        if self.clean_statistics:
            for other in self._others_before(trainer):
                if other.clean_statistics:
                    self._statistics = other._statistics
            self._has_clean_steps |= self._statistics.attach(pl_module)

    def _add_loss(self, trainer: "Trainer", outputs: Any) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and self._auto is not None:
            parts = trainer.accumulate_grad_batches if trainer.lightning_module.automatic_optimization else 1
            self._auto.add(loss * parts)  # Lightning has divided it

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

    def _expect_stages(self, pl_module: nn.Module) -> None:
        """Say which layers were picked without a pattern, and have their outputs checked."""
        for name, num_channels in default_layers(pl_module).items():
            self._layers.hooks[name].num_channels = num_channels
        names = ", ".join(map(repr, self._hooked))
        if ranks.rank() == 0:
            _log.info(f"{type(self).__name__}: layers=None takes the outputs of stages, layers=[{names}]")

    def _listed_before(self, trainer: "Trainer") -> list[Any]:
        """List the callbacks before this one; all where another callback holds it."""
        every: list[Any] = list(trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]
        return every[: every.index(self)] if self in every else every

    def _check_start(self, trainer: "Trainer") -> None:
        self._schedule.check(trainer.max_epochs, trainer.max_steps)
        if self._schedule.is_late and not is_trial(trainer):
            self._warn(
                f"start={self._schedule.start!r}: training ends after max_epochs={trainer.max_epochs}, so "
                "nothing will be dropped"
            )

    def _warn_of_idle_layers(self, pl_module: nn.Module) -> None:
        there = {id(module) for module in pl_module.modules()}
        gone = [name for name, module in self._hooked.items() if id(module) not in there]
        if gone:
            self._warn(
                f"layers {', '.join(gone)} are no longer part of the model, so nothing is dropped or "
                "gathered there; replace or fuse layers before fit, or fit again"
            )
        idle = {name: module for name, module in self._hooked.items() if not module.training}
        frozen = [name for name, module in idle.items() if _is_frozen(pl_module, name, module)]
        for names, what, advice in (
            (
                frozen,
                "frozen and in eval mode",
                "leave them out by naming the child that trains in the pattern",
            ),
            (
                [n for n in idle if n not in frozen],
                "in eval mode",
                "call .train() on them, or leave them out",
            ),
        ):
            if names:
                self._warn(
                    f"layers {', '.join(names)} are {what} in a training step, so nothing is dropped or "
                    f"gathered there; {advice}"
                )

    def _warn(self, message: str) -> None:
        ranks.warn(message, type(self).__name__)


def check_drop_prob(drop_prob: Any) -> Any:
    """Return a number in [0, 1), or ``"auto"``; anything else is an error."""
    if isinstance(drop_prob, str) and drop_prob != "auto":
        raise TypeError(f"drop_prob={drop_prob!r}: must be a number in [0, 1) or 'auto'")
    return drop_prob if drop_prob == "auto" else check_number("drop_prob", drop_prob, 0, 1, high_open=True)


def _is_frozen(root: nn.Module, name: str, layer: nn.Module) -> bool:
    """Whether nothing of a layer is learned; an activation, of its own, has nothing: its child's count."""
    child = getattr(root, name.partition(".")[0], layer)
    weights = list(layer.parameters()) or list(child.parameters() if isinstance(child, nn.Module) else ())
    return bool(weights) and not any(weight.requires_grad for weight in weights)


def is_trial(trainer: "Trainer") -> bool:
    """Whether training is too short on purpose.

    Args:
        trainer: whose training it is.

    Returns:
        True with ``fast_dev_run``.
    """
    return bool(getattr(trainer, "fast_dev_run", False))


def logger_step(trainer: "Trainer") -> int:
    """Return the step under which Lightning sends a batch's values to loggers.

    Args:
        trainer: whose training it is.

    Returns:
        The batches that have stepped, which several optimisers do not multiply.
    """
    return getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step)


def _only_updates_statistics(trainer: "Trainer") -> bool:
    """Whether this is the epoch in which weight averaging trains nothing but BatchNorm's averages."""
    return bool(getattr(trainer.fit_loop, "_skip_backward", False))


def _position(trainer: "Trainer", batch_idx: int) -> TrainingPosition:
    """Where training is now, as the trainer's own counters say it."""
    return TrainingPosition(
        epoch=trainer.current_epoch,
        step=trainer.global_step,
        batch=batch_idx,
        batches_per_epoch=trainer.num_training_batches,
        max_epochs=trainer.max_epochs if trainer.max_epochs is not None else -1,
        max_steps=trainer.max_steps,
        batches_per_step=trainer.accumulate_grad_batches,
    )
