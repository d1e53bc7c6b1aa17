"""Report a comparison: Markdown tables and a picture, with 95 % intervals and differences paired by seed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf, isfinite
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import pandas as pd
from jsonargparse import auto_cli
from scipy import stats

from benchmarks.gain.compare import read_records
from benchmarks.gain.protocol import (
    Record,
    Stage,
    choose,
    final_runs,
    key,
    load_stage,
    tuning_loss,
    tuning_runs,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LOSS = {"nll": "NLL", "scaled nll": "scaled NLL"}


@dataclass(frozen=True)
class Options:
    """Report a comparison: Markdown tables and a picture, with 95 % intervals over seeds.

    Args:
        records: JSON-lines file that `compare.py` wrote.
        stage: whose runs to report; see `compare.py`.
        against: method that all others are set against; by default the first of the stage is set against all.
        seeds: leave out seeds from this number on, to set methods with few seeds beside those with more.
        plot: PNG file for the picture.
    """

    records: str = "compare.jsonl"
    stage: str = "quick"
    against: str | None = None
    seeds: int | None = None
    plot: str | None = None


def main(options: Options) -> None:
    """Print the tables, and draw the picture on request."""
    stage, records = load_stage(options.stage), read_records(options.records)
    if options.seeds is not None:
        stage = with_seeds_below(options.seeds, stage)
    print("\n\n".join(tables(stage, records, options.against)))
    if options.plot is not None:
        Path(options.plot).parent.mkdir(parents=True, exist_ok=True)
        draw(collect(stage, records)).savefig(options.plot)


def with_seeds_below(most: int, stage: Stage) -> Stage:
    """Leave out the final runs of seeds from a number on."""
    return replace(stage, rounds=[([s for s in seeds if s < most], names) for seeds, names in stage.rounds])


def tables(stage: Stage, records: Sequence[Record], against: str | None = None) -> list[str]:
    """Write the tables in Markdown: tuning, means over seeds, paired differences, and what averages change.

    Those of which a stage has nothing are left out.
    """
    runs = collect(stage, records)
    found = [tuning(stage, records), means(runs), differences(runs, compared(stage, against))]
    found.append(of_averages(runs, collect(stage, records, "old_averages")))
    return [table.to_markdown(index=False, disable_numparse=True) for table in found if len(table)]


def collect(stage: Stage, records: Sequence[Record], part: str | None = None) -> pd.DataFrame:
    """List the stage's final runs, as far as they have finished: method, seed and scores.

    Args:
        stage: the comparison.
        records: of finished runs.
        part: of a record that holds the scores, where they are not the first ones.
    """
    found = {key(record["arguments"]): record if part is None else record.get(part) for record in records}
    runs = [(run, scored) for run in final_runs(stage, records) if (scored := found.get(run.key))]
    frame = pd.DataFrame(
        [{"method": run.method, "seed": run.settings.seed, **scores(scored)} for run, scored in runs],
        columns=None if runs else ["method", "seed"],
    )
    frame["method"] = pd.Categorical(frame["method"], [method.name for method in stage.methods])
    return frame


def scores(record: Record) -> dict[str, float]:
    """List the scores of a run; corrupted ones are plain means over corruptions and severities."""
    found = _named("", record)
    if record.get("corrupted"):
        each = list(record["corrupted"].values())
        found |= _named("corrupted ", {name: _mean(part[name] for part in each) for name in each[0]})
    if scaled := record.get("scaled"):
        found |= {"temperature": scaled["temperature"], **_named("scaled ", scaled)}
        del found["scaled accuracy %"]  # a temperature does not change it
    return found


def _named(prefix: str, given: Mapping[str, Any]) -> dict[str, float]:
    accuracy, nll, ece = (_finite(given[name]) for name in ("accuracy", "nll", "ece"))
    return {f"{prefix}accuracy %": 100 * accuracy, f"{prefix}NLL": nll, f"{prefix}ECE %": 100 * ece}


def _mean(lists: Iterable[list[float | None]]) -> float:
    return fmean(_finite(value) for values in lists for value in values)


def _finite(score: float | None) -> float:
    """A score that was not finite is `None` in records, and infinite here."""
    return inf if score is None else score


def tuning(stage: Stage, records: Sequence[Record]) -> pd.DataFrame:
    """List the settings tried, averaged over tuning seeds, the chosen ones marked."""
    found, chosen = {key(record["arguments"]): record for record in records}, choose(stage, records)
    grid = {method.name: iter(method.grid) for method in stage.methods}
    seeds, once = stage.tuning_seeds, replace(stage, tuning_seeds=stage.tuning_seeds[:1])
    rows = []
    for run in sorted(tuning_runs(once), key=lambda run: list(grid).index(run.method)):
        change = next(grid[run.method])
        each = [found[replace(run, settings=replace(run.settings, seed=seed)).key] for seed in seeds]
        rows.append(
            {
                "method": run.method,
                "setting": ", ".join(f"{name}={value}" for name, value in change.items()),
                "validation accuracy %": f"{100 * fmean(record['accuracy'] for record in each):.2f}",
                f"validation {_LOSS[stage.tuned_by]}": f"{fmean(tuning_loss(stage, r) for r in each):.3f}",
                "chosen": "yes" if change == chosen[run.method] else "",
            }
        )
    return pd.DataFrame(rows)


def means(runs: pd.DataFrame) -> pd.DataFrame:
    """Average the scores of each method over its seeds."""
    groups = runs.drop(columns="seed").groupby("method", observed=True)
    table = groups.agg(spell)
    table.insert(0, "seeds", groups.size().astype(str))
    return table.reset_index()


def differences(runs: pd.DataFrame, pairs: Iterable[tuple[str, str]]) -> pd.DataFrame:
    """Average what scores of one method have more than another's, over the seeds that both have."""
    by_method = {name: part.set_index("seed") for name, part in runs.groupby("method", observed=True)}
    rows = []
    for method, less in pairs:
        if method not in by_method or less not in by_method:
            continue
        both = [by_method[name].drop(columns="method") for name in (method, less)]
        difference = both[0].sub(both[1]).mask(both[0].eq(both[1]) & both[0].eq(inf), inf).dropna(how="all")
        if len(difference):
            spelled = difference.apply(spell, sign="+")
            rows.append({"difference": f"{method} less {less}", "pairs": str(len(difference)), **spelled})
    return pd.DataFrame(rows)


def of_averages(runs: pd.DataFrame, old: pd.DataFrame) -> pd.DataFrame:
    """Average what clean running averages change, each training scored with both."""
    rows = []
    for method, part in runs.groupby("method", observed=True):
        other = old[old["method"] == method].set_index("seed").drop(columns="method")
        change = part.set_index("seed")[other.columns].sub(other).dropna(how="all")
        if len(change):
            spelled = change.apply(spell, sign="+")
            rows.append({"clean less old averages": method, "pairs": str(len(change)), **spelled})
    return pd.DataFrame(rows)


def spell(values: pd.Series, sign: str = "") -> str:
    """Write the mean of some values with Student's 95 % interval; one value has none."""
    values, digits = values.dropna(), 3 if "NLL" in str(values.name) else 2
    if values.empty:
        return "-"
    if not isfinite(values.mean()):
        return "diverged"
    width = f" ± {reach(values):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():{sign}.{digits}f}{width}"


def reach(values: pd.Series, level: float = 0.95) -> float:
    """Return half the width of the interval of Student's t around a mean."""
    return float(stats.t.ppf((1 + level) / 2, len(values) - 1) * values.sem())


def compared(stage: Stage, against: str | None = None) -> list[tuple[str, str]]:
    """List which method is set against which: each against its control, and the first against all.

    Args:
        stage: the comparison.
        against: set all against this method instead.

    Raises:
        ValueError: if the stage has no such method.
    """
    names = [method.name for method in stage.methods]
    if against is not None:
        if against not in names:
            raise ValueError(f"against must be one of {', '.join(names)}, got {against!r}")
        return [(name, against) for name in names if name != against]
    controls = [(method.like, method.name) for method in stage.methods if method.like]
    first = stage.methods[0].name
    others = [(first, method.name) for method in stage.methods if method.name != first]
    return [*controls, *(pair for pair in others if pair not in controls)]


def draw(runs: pd.DataFrame) -> Figure:
    """Draw each score in a panel: a method a row, a dot per seed, the mean with its 95 % interval."""
    from matplotlib.figure import Figure

    names = [name for name in runs.columns if name not in ("method", "seed")]
    methods, rows = dict(list(runs.groupby("method", observed=True))), ceil(len(names) / 3)
    figure = Figure(figsize=(12, 1 + rows * (0.5 + 0.35 * len(methods))), layout="constrained")
    axes = figure.subplots(rows, 3, sharey=True, squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        for row, part in enumerate(methods.values()):
            values: Any = part[name].dropna()
            if len(values) and isfinite(values.mean()):
                axis.plot(values, [row] * len(values), ".", color="0.7", zorder=1)
                width = reach(values) if len(values) > 1 else None
                axis.errorbar(values.mean(), row, xerr=width, fmt="o", color="C0", capsize=3)
        axis.set(title=name, yticks=range(len(methods)), yticklabels=list(methods))
    axes[0, 0].invert_yaxis()
    return figure


if __name__ == "__main__":
    main(auto_cli(Options, as_positional=False))
