"""StructuredDropout: any module x -> x on layers chosen by pattern."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from lightning_dropcluster.callbacks.base import LayerCallback, check_drop_prob
from lightning_dropcluster.callbacks.ramps import constant, make_ramp
from lightning_dropcluster.callbacks.schedule import Schedule
from lightning_dropcluster.checks import check_choice
from lightning_dropcluster.layers.selection import Layers, LayerTypes
from lightning_dropcluster.learning.state import check_regularizers
from lightning_dropcluster.methods import REGULARIZERS
from lightning_dropcluster.methods.factory import check_setting
from lightning_dropcluster.methods.regularized import RegularizedLayers, unregister

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


class StructuredDropout(LayerCallback):
    """Apply a regulariser, any module x -> x, to the outputs of chosen layers while the model trains.

    Each layer gets its own regulariser. It acts only in training steps, from ``start`` on, and no hook stays
    after ``fit``. A copy is tried on the first batch, so that a shape that does not fit is an error at once.
    If it has a method ``set_drop_prob(float)``, as those of `REGULARIZERS` with a drop probability do, it
    follows the schedule.

    A regulariser with parameters is learned with the model. During ``fit`` it is a child of its layer,
    ``<layer>.structured_dropout``, where optimiser, device and strategy find it. Its parameters are saved in
    this callback's state and not in the model's ``state_dict``, so checkpoints load into the plain model. The
    optimiser's state does include them: a checkpoint written with this callback can only be resumed with it,
    and one written without it only without. Before ``start`` the parameters are unused, which DDP rejects
    unless it is told to find unused parameters.

    Args:
        layers: where, as in `DropCluster`. ``None`` takes the outputs of all stages but the last.
        regularizer: a module, copied for each layer; a name in `REGULARIZERS` except ``"cluster_drop"``,
            which needs labels; or a class or function that makes a module, with no argument or with one, the
            layer's number of channels.
        drop_prob: drop probability in [0, 1) at the end of the schedule. ``None`` means the module's own;
            ``"auto"`` follows how much the network overfits, as in `DropCluster`. Only for modules with
            ``set_drop_prob``.
        start: when dropping begins. A float is a fraction of training in [0, 1), an integer is an epoch.
        schedule: how drop_prob grows from ``start`` to the end of training: ``"linear"``, ``"cosine"``,
            ``"constant"``, or a callable fraction -> fraction. ``None`` means ``"linear"``, or
            ``"constant"`` with ``drop_prob="auto"``. Only for modules with ``set_drop_prob``; others are
            applied unchanged from ``start`` on.
        clean_statistics: let BatchNorm's running averages follow only steps that drop nothing; see
            `DropCluster`.
        channel_dim: as in `DropCluster`.
        layer_types: as in `DropCluster`.
        monitor: the name under which the validation loss is logged, for ``drop_prob="auto"``.
        max_drop_prob: the highest probability that ``drop_prob="auto"`` uses, in [0, 1).

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range, or does not fit the regulariser.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> callback = StructuredDropout("layer[34].**", nn.Dropout2d(0.1))
        >>> trainer = Trainer(callbacks=[callback], logger=False)
    """

    log_name = "structured_dropout"
    _layers: RegularizedLayers

    def __init__(
        self,
        layers: Layers | None = None,
        regularizer: nn.Module | str | Callable[..., nn.Module] | None = None,
        drop_prob: float | Literal["auto"] | None = None,
        *,
        start: int | float = 0,
        schedule: str | Callable[[float], float] | None = None,
        channel_dim: int = 1,
        clean_statistics: bool = True,
        layer_types: LayerTypes | None = None,
        monitor: str = "val_loss",
        max_drop_prob: float = 0.8,
    ) -> None:
        if isinstance(regularizer, str):
            check_choice(
                "regularizer", regularizer, [name for name in REGULARIZERS if name != "cluster_drop"]
            )
        elif regularizer is None or not callable(regularizer):
            raise TypeError(
                f"regularizer={regularizer!r}: must be a torch.nn.Module, the name of one, or a callable "
                f"that makes one, not {type(regularizer).__name__}; give it by name or behind the layers"
            )
        drop_prob = None if drop_prob is None else check_drop_prob(drop_prob)
        source = REGULARIZERS[regularizer] if isinstance(regularizer, str) else regularizer
        ramp = make_ramp(schedule, drop_prob)
        super().__init__(
            layers,
            layer_types,
            Schedule(start, ramp, every_n_epochs=0),
            channel_dim=channel_dim,
            drop_prob=drop_prob,
            monitor=monitor,
            max_drop_prob=max_drop_prob,
            clean_statistics=clean_statistics,
        )
        self.regularizer, self.schedule = regularizer, schedule
        if isinstance(source, nn.Module | type):
            self._check_settings(source)
        self._layers = RegularizedLayers(source, drop_prob)

    @property
    def regularizers(self) -> dict[str, nn.Module]:
        """The regulariser of each layer, layer name to module; empty before the first ``setup``."""
        return dict(self._layers.regularizers)

    @property
    def state_key(self) -> str:
        """What a checkpoint files this callback's state under: equal for equal layers and regulariser."""
        source = self._layers.source
        name = getattr(source, "__qualname__", type(source).__qualname__)
        return self._key(regularizer=name)

    # When things happen

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Register learned regularisers, before the strategy and the optimiser look for parameters."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        modules: dict[str, nn.Module] = {}
        with suppress(ValueError):  # some models come to be in configure_model; on_fit_start looks again
            modules = self._select(pl_module)
        self._layers.register(modules)
        self._check_copies(trainer)

    def _reset(self) -> None:
        super()._reset()
        self._layers.forget()

    def _attach(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._layers.attach(self._hooked, pl_module.device)
        for regularizer in self._layers.regularizers.values():
            self._check_settings(regularizer)
        if not self._layers.have_drop_prob:
            self._schedule.ramp = constant

    def _begin_step(self, fraction: float, is_due: bool, is_clean: bool) -> float:
        return self._layers.begin_step(fraction, self._full_drop_prob, is_clean=is_clean)

    def _let_go_of(self, pl_module: "LightningModule") -> None:
        """Leave the model's parameters as they were, too."""
        super()._let_go_of(pl_module)
        unregister(pl_module)

    def on_load_checkpoint(
        self, trainer: "Trainer", pl_module: "LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to resume where the optimiser would not know of the regularisers' parameters."""
        is_resumed = trainer.state.fn == "fit" and checkpoint.get("optimizer_states")
        if is_resumed and self._layers.are_learned and self.state_key not in checkpoint["callbacks"]:
            raise ValueError(
                f"ckpt_path: was written without regularizer={self.regularizer!r}, so its optimiser knows "
                "nothing of the regulariser's parameters; load the checkpoint's weights into the model and "
                "fit without ckpt_path, or resume without this callback"
            )

    # Learned regularisers

    def register(self, model: nn.Module) -> None:
        """Put regularisers that have parameters into their layers, as ``setup`` does.

        Call it yourself at the end of ``configure_model`` where that makes the layers.

        Args:
            model: the LightningModule.

        Raises:
            ValueError: if the patterns pick no layers, or a regulariser cannot be made.
        """
        self._layers.register(self._select(model))

    def unregister(self, model: nn.Module) -> None:
        """Take learned regularisers out of a copy of a model that was made during ``fit``.

        Args:
            model: the copy, of the LightningModule or of the bare model that it holds.
        """
        unregister(model)

    def _check_copies(self, trainer: "Trainer") -> None:
        """Weight averaging copies the model in setup: the copy must have the parameters too."""
        before = self._listed_before(trainer)
        early = [other for other in before if getattr(other, "_average_model", None) is not None]
        if early and self._layers.are_learned:
            raise ValueError(
                f"regularizer={self.regularizer!r}: has parameters; list this callback before "
                f"{type(early[0]).__name__}, which has copied the model without them"
            )

    # Checkpoints

    def _state(self) -> dict[str, Any]:
        return {"regularizers": self._layers.state_dict()}

    def _read_state(self, state: Mapping[str, Any]) -> None:
        check_regularizers(state)

    def _load(self, state: Mapping[str, Any]) -> None:
        self._layers.load_state_dict(state["regularizers"])

    def _check_settings(self, regularizer: nn.Module | type) -> None:
        check_setting("drop_prob", self.drop_prob, regularizer)
        check_setting("schedule", self.schedule, regularizer)
