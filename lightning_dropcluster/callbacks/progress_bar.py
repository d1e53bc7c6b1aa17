"""A line in Lightning's progress bar while training waits for a long reclustering."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from typing import Any, Protocol

from lightning_dropcluster.learning.reclustering import OnProgress


class WaitingLine:
    """Says which layer is reclustered and about how long it will take, where that takes over a second.

    A context manager to be entered for each reclustering; it yields the function that reclustering is to
    call. How long it takes is judged by what is done, and before anything is by the last time. The line is
    drawn by a thread of its own, since one layer alone may take long, and it leaves the bar as it was.
    """

    def __init__(self, bar: Any, delay: float = 1.0, pause: float = 0.5) -> None:
        self._bar, self._delay, self._pause = bar, delay, pause
        self._layer, self._share = "", 0.0
        self._started = self._last_took = 0.0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._line: _Line | None = None

    def __enter__(self) -> OnProgress:
        self._layer, self._share, self._started = "", 0.0, time.monotonic()
        self._over.clear()
        if getattr(self._bar, "is_enabled", False):
            self._thread = threading.Thread(target=self._show, name="dropcluster-line", daemon=True)
            self._thread.start()
        return self._note

    def __exit__(self, *error: object) -> None:
        self._last_took = time.monotonic() - self._started
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return nullcontext, ()  # copies of a callback in mid-training show nothing: the bar has one line

    def _note(self, layer: str, share: float) -> None:
        self._layer, self._share = layer, share

    def _show(self) -> None:
        """Draw until it is over."""
        if self._over.wait(self._delay):
            return
        try:
            self._draw()
        except Exception:  # whatever is wrong with a bar, training goes on, without the line
            self._bar = self._line = None

    def _draw(self) -> None:
        self._line = self._line if self._line is not None and self._line.fits() else _line_in(self._bar)
        if self._line is not None:
            while not self._over.is_set():
                self._line.write(*self._state())
                self._over.wait(self._pause)
            self._line.clear()

    def _state(self) -> tuple[str, float]:
        """What to write, and the share that is done."""
        passed = time.monotonic() - self._started
        whole = passed / self._share if self._share else self._last_took
        text = f"Reclustering {self._layer}"
        if whole <= passed:
            return text, self._share
        return f"{text}, about {max(1.0, whole - passed):.0f} s left", passed / whole


class _Line(Protocol):
    def fits(self) -> bool: ...
    def write(self, text: str, share: float) -> None: ...
    def clear(self) -> None: ...


class _RichLine:
    """A task of the rich bar; hidden rather than removed, as Lightning takes a task's id for its position."""

    def __init__(self, bar: Any) -> None:
        self._bar, self._progress = bar, bar.progress
        self._task = self._progress.add_task("", total=100, visible=False)
        self._shown = False

    def fits(self) -> bool:
        return self._bar.progress is self._progress

    def write(self, text: str, share: float) -> None:
        if not self._shown:
            self._progress.reset(self._task)  # its clock starts now
        self._shown = True
        self._progress.update(self._task, description=text, completed=round(100 * share), visible=True)
        self._progress.refresh()

    def clear(self) -> None:
        self._shown = False
        self._progress.update(self._task, visible=False)
        self._progress.refresh()


class _TqdmLine:
    """A bar of the same kind as Lightning's, for terminals or notebooks, below it."""

    def __init__(self, bar: Any) -> None:
        kind = type(bar.train_progress_bar)
        position = 2 * bar.process_position + 1
        self._line = kind(
            total=100, leave=False, position=position, bar_format="{desc} |{bar}| {percentage:.0f}%"
        )

    def fits(self) -> bool:
        return False  # a closed one is of no use

    def write(self, text: str, share: float) -> None:
        self._line.n = round(100 * share)
        self._line.set_description_str(text)

    def clear(self) -> None:
        self._line.close()


def _line_in(bar: Any) -> _Line | None:
    """Find out what kind of bar it is from what it has."""
    if callable(getattr(getattr(bar, "progress", None), "add_task", None)):
        return _RichLine(bar)
    if hasattr(type(bar), "train_progress_bar") and hasattr(bar, "process_position"):
        return _TqdmLine(bar)
    return None
