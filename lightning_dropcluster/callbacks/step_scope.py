"""The training step and its backward pass; what hooks of callbacks run in between is no part of it."""

from collections.abc import Mapping
from typing import Any

from lightning_dropcluster.layers.hooks import LayerHook
from lightning_dropcluster.layers.norm_statistics import NormStatistics

# Whose method, which, and whether hooks act while it runs. With manual optimisation the last three run within
# the training step, and call the hooks of callbacks.
_PARTS = (
    ("strategy", "training_step", True),
    ("precision_plugin", "backward", True),  # activation checkpointing runs layers again in it
    ("precision_plugin", "pre_backward", False),
    ("precision_plugin", "post_backward", False),
    ("precision_plugin", "_after_closure", False),
)


class StepScope:
    """Lets hooks act in the training step of a batch alone, between `open` and `close`.

    Lightning has no event for a callback between the other callbacks' and the training step, so for this time
    the strategy's own methods are wrapped; callbacks of one Trainer share the wrappers.
    """

    def __init__(self) -> None:
        self._hooks: Mapping[str, LayerHook] = {}
        self.statistics = NormStatistics()
        self._wrapped: list[tuple[Any, str]] = []

    def open(self, strategy: Any, hooks: Mapping[str, LayerHook], statistics: NormStatistics) -> None:
        """Begin a batch; statistics are told where each part of it in which hooks act begins and ends."""
        self.close()
        self._hooks, self.statistics = hooks, statistics
        suspend(hooks)
        for place, name, acts in _PARTS:
            owner = strategy if place == "strategy" else strategy.precision_plugin
            if not isinstance(vars(owner).get(name), _Part):
                vars(owner)[name] = _Part(getattr(owner, name), vars(owner).get(name), acts)
            vars(owner)[name].listeners.append(self)
            self._wrapped.append((owner, name))

    def close(self) -> None:
        """End the batch: hooks stay without effect, and the last to close leaves the strategy as it was."""
        while self._wrapped:
            owner, name = self._wrapped.pop()
            part = vars(owner)[name]
            part.listeners.remove(self)
            if not part.listeners:
                del vars(owner)[name]
                if part.before is not None:
                    vars(owner)[name] = part.before
        self._hooks, self.statistics = {}, NormStatistics()

    def set_suspended(self, suspended: bool) -> bool:
        """Switch the hooks, and return how they were."""
        before = all(hook.suspended for hook in self._hooks.values())
        for hook in self._hooks.values():
            hook.suspended = suspended
        return before


class _Part:
    """Stands in for a method while a batch is under way."""

    def __init__(self, method: Any, before: Any, acts: bool) -> None:
        self.method, self.before, self.acts = method, before, acts
        self.listeners: list[StepScope] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        listeners = list(self.listeners)
        for listener in listeners if self.acts else ():
            listener.statistics.begin_pass()
        states = [listener.set_suspended(not self.acts) for listener in listeners]
        try:
            result = self.method(*args, **kwargs)
        finally:
            for listener, state in zip(listeners, states, strict=True):
                listener.set_suspended(state)
        for listener in listeners if self.acts else ():
            listener.statistics.end_pass()
        return result


def suspend(hooks: Mapping[str, LayerHook]) -> None:
    """Have hooks do nothing until the next training step."""
    for hook in hooks.values():
        hook.suspended = True
