"""Run parts in turn, each in a process and within a time of its own, and hold them against their goals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

from benchmarks.common.record import ROOT

LEAST_SHARE = 0.5  # of its limit that a part must have left to be started
SHARE_TO_PLAN = 0.8  # of its limit that a part may plan with: it imports before, and ends after
GRACE = 3.0  # seconds for a part that is stopped to say where it was


@dataclass(frozen=True)
class Goal:
    """A bound on an entry of a part's records.

    Args:
        what: for the table.
        key: of the entry, with dots where it is inside of others; of several records the worst counts.
        at_most: bound from above; or
        at_least: from below; without either the entry is shown and never missed.
        where: other entries that the record must have.
        anywhere: whether it must be met on any machine, in whatever size.
    """

    what: str
    key: str
    at_most: float | None = None
    at_least: float | None = None
    where: Mapping[str, Any] = field(default_factory=dict)
    anywhere: bool = False

    def measured(self, records: Sequence[Mapping[str, Any]]) -> float | None:
        """Look the entry up; None where no record has it."""
        fitting = [record for record in records if self.where.items() <= record.items()]
        found = [reduce(lambda part, key: (part or {}).get(key), self.key.split("."), r) for r in fitting]
        values: list[Any] = [value for value in found if value is not None]
        return (min if self.at_least is not None else max)(values, default=None)

    def is_met(self, value: float | None) -> bool | None:
        """Whether it is; None where there is nothing to meet, False where nothing was measured."""
        if self.at_most is not None:
            return value is not None and value <= self.at_most
        if self.at_least is not None:
            return value is not None and value >= self.at_least
        return None


@dataclass(frozen=True)
class Part:
    """A module to run, which takes ``--out FILE`` and appends records to it.

    Args:
        name: to choose it by.
        command: the module and its arguments, in which "{seconds}" stands for the time it may plan with.
        limit: of seconds, after which it is stopped.
        goals: that its records are held against.
    """

    name: str
    command: Sequence[str]
    limit: float
    goals: Sequence[Goal] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of a part: "done", or why it is not; its records so far; and what it printed."""

    part: Part
    state: str
    seconds: float = 0.0
    records: Sequence[Mapping[str, Any]] = ()
    log: str = ""

    @property
    def verdicts(self) -> list[tuple[Goal, float | None, bool | None]]:
        """Each goal with what was measured, and whether it is met."""
        found = [(goal, goal.measured(self.records)) for goal in self.part.goals]
        return [(goal, value, goal.is_met(value)) for goal, value in found]

    @property
    def is_good(self) -> bool:
        """Whether the part came to its end and missed no goal."""
        return self.state == "done" and all(met is not False for _, _, met in self.verdicts)


def run_parts(
    parts: Sequence[Part], budget: float, folder: Path, env: Mapping[str, str] | None = None
) -> Iterator[Outcome]:
    """Run parts in their order for as long as the time lasts, and tell of each as soon as it has ended.

    Args:
        parts: what to run; one that fails, crashes or hangs takes nothing from the others but time.
        budget: seconds for all of them. A part that would have less than half of its limit is left out.
        folder: for what they write.
        env: their environment; by default that of this process.

    Yields:
        What became of each part.
    """
    end = time.monotonic() + budget
    for part in parts:
        left = min(part.limit, end - time.monotonic())
        if left < LEAST_SHARE * part.limit:
            yield Outcome(part, f"skipped, {max(0.0, left):.0f} s were left of {budget:.0f} s")
        else:
            yield run_part(part, left, folder, env)


def run_part(part: Part, limit: float, folder: Path, env: Mapping[str, str] | None = None) -> Outcome:
    """Run one part, and stop all processes that it started."""
    out, log = folder / f"{part.name}.jsonl", folder / f"{part.name}.log"
    command = [word.format(seconds=int(SHARE_TO_PLAN * limit)) for word in part.command]
    started = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *command, "--out", str(out)],
            cwd=ROOT,
            env=env,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            state = f"failed, exit code {code}" if code else "done"
        except subprocess.TimeoutExpired:
            state = f"stopped after {limit:.0f} s"
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                process.send_signal(signal.SIGABRT)  # with PYTHONFAULTHANDLER it prints where it is
                process.wait(GRACE)
        finally:
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)  # one that waits for a device that hangs cannot even be killed
    took, printed = round(time.monotonic() - started, 1), log.read_text(errors="replace")
    return Outcome(part, state, took, read_records(out), printed)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read what was written, but a last line that was cut off."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
