"""Tables and panels of runs over strengths: `protocol=dial` and `protocol=league`.

A row of a table is a method at one strength. What an edit achieves stands beside what it costs: the rise of the loss on
general text over the untouched model's, with the standard error of that paired difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from errata.benchmarks.reports.escaping import markdown_text
from errata.benchmarks.reports.glossary import metric_titles
from errata.benchmarks.reports.naming import Results, labels, readable
from errata.benchmarks.reports.palette import MUTED, Look, looks
from errata.benchmarks.reports.panels import Panel
from errata.benchmarks.reports.seeds import members
from errata.benchmarks.reports.tables import figure, share
from errata.benchmarks.runs.json_values import number
from errata.evaluate.strength_grid import NO_EDIT

SHOWN = ("reliability", "generalization", "locality")
_LEAST_RISE = 1e-5  # below it the axis of costs is linear
Point = Mapping[str, Any]


@dataclass(frozen=True)
class TextTable:
    """A table as texts.

    Attributes:
        title: What it shows.
        heads: One per column.
        rows: Cells, as many as heads.
        notes: What a reader has to know.
    """

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]


def strength_table(runs: Sequence[Results], scoring: str) -> TextTable | None:
    """Return the table of a group's runs over strengths; None where it has none.

    Args:
        runs: Of one group.
        scoring: Whose metrics are shown.
    """
    named = _named(runs)
    if not named:
        return None
    is_league = "league" in named[0][1]
    metrics = [name for name in SHOWN if any(_entry(p, scoring, name) for _, run in named for p in points(run))]
    titles = [f"{title}, %" for _, title in metric_titles(metrics)]
    is_canonical = any(point.get("canonical") for _, run in named for point in points(run))
    heads = ["", *(["league"] if is_league else []), "strength", "rise of the loss", *titles, "facts kept, %"]
    heads += [title for *_, title in _CANONICAL] if is_canonical else []
    rows = [
        [
            *(label, *([_league(point)] if is_league else []), *_cells(point, scoring, metrics)),
            *(_canonical_cells(point) if is_canonical else ()),
        ]
        for label, run in named
        for point in (*_untouched(run), *points(run))
    ]
    return TextTable(_title(is_league), heads, rows, _notes(named, is_league))


def _title(is_league: bool) -> str:
    return "At equal damage" if is_league else "Over the strength of the edit"


def _named(runs: Sequence[Results]) -> list[tuple[str, Results]]:
    """Return the runs over strengths with their labels, one for each seed."""
    found = []
    for label, row in zip(labels(runs), runs, strict=True):
        own = [run for run in members(row) if "dial" in run or "league" in run]
        seeds = [f" seed={run['config']['seed']}" if len(own) > 1 else "" for run in own]
        found += [(f"{readable(label)}{seed}", run) for seed, run in zip(seeds, own, strict=True)]
    return found


def points(run: Results) -> list[Point]:
    """Return what was scored of a run over strengths: of a dial by strength; of leagues at full strength, then one for
    each cap."""
    if "dial" in run:
        is_fixed = run["dial"]["fixed"] is not None
        return [point for point in run["dial"]["points"] if point["strength"] in (0, 1) or not is_fixed]
    trial = next((trial for trial in run["league"]["trials"] if trial["strength"] == 1), None)
    full = {"strength": 1, "rise": None if trial is None else trial["rise"], "summary": run["summary"]}
    canonical = run["league"].get("canonical")
    full |= {"cap": None, "retention": run["collapse"]["retention"]} | (
        {"canonical": canonical["full"]} if canonical else {}
    )
    return [full, *run["league"]["entries"]]


def _untouched(run: Results) -> list[Point]:
    """Return what the untouched model does, of runs of leagues whose canonical examples nothing else says it of."""
    found = run.get("league", {}).get("canonical")
    if found is None:
        return []
    rise = {"value": 0.0, "error": 0.0}
    shared = {"cap": 0, "strength": 0, "rise": rise, "summary": run["before"], "retention": None}
    return [{**shared, "canonical": found["untouched"]}]


def _league(point: Point) -> str:
    if point["cap"] == 0:
        return "untouched"
    return "none" if point["cap"] is None else _percent(point["cap"], None)


def _cells(point: Point, scoring: str, metrics: Sequence[str]) -> Iterator[str]:
    yield f"{point['strength']:.4g}"
    if point["rise"] is None:
        yield "refused"
        yield from ["-"] * (len(metrics) + 1)
        return
    yield rise_text(point["rise"])
    for name in metrics:
        entry = _entry(point, scoring, name)
        yield "-" if entry is None else share(entry["mean"])
    yield "-" if point["retention"] is None else share(point["retention"])


# Of a set of canonical examples: part, number, and the title of its column.
_CANONICAL = (
    ("train", "failures", "failures: trained, %"),
    ("evaluation", "failures", "failures: evaluation, %"),
    ("hard_negatives", "token_loss", "hard negatives, nats per token"),
)


def _canonical_cells(point: Point) -> Iterator[str]:
    measured = point.get("canonical") or {}
    for part, name, _ in _CANONICAL:
        entry = measured.get(part)
        yield "-" if entry is None else share(entry[name]) if name == "failures" else f"{number(entry[name]):.4f}"


def rise_text(rise: Mapping[str, Any]) -> str:
    """Return the rise of a loss with its standard error: "9.97e-05 ± 1.9e-04"; 0 of the untouched model."""
    value, error = number(rise["value"]), number(rise["error"])
    if value == 0:
        return "0"
    return f"{value:.2e} ± {error:.1e}" if math.isfinite(value) else figure(value)


def _entry(point: Point, scoring: str, metric: str) -> Mapping[str, float] | None:
    return point.get("summary", {}).get(scoring, {}).get(metric)


def _notes(named: Sequence[tuple[str, Results]], is_league: bool) -> list[str]:
    measured = [run["league" if is_league else "dial"]["text"] for _, run in named]
    texts = dict.fromkeys(f"{text['tokens']:,} tokens in {text['rows']:,} rows" for text in measured if text)
    notes = [
        f"The rise of the loss on general text ({' or '.join(texts)}), as a share of the untouched model's, with the "
        "standard error of the paired difference."
    ]
    if is_league:
        steps = " or ".join(dict.fromkeys(f"{run['league']['steps']:,}" for _, run in named))
        notes.append(
            f"The strength is the largest k / {steps} whose loss is below (1 + league) times the untouched model's; "
            "1 is the edit as it was made, 0 the untouched model."
        )
        for margin in sorted({run["league"].get("margin", 0) for _, run in named} - {0}):
            own = [label for label, run in named if run["league"].get("margin", 0) == margin]
            notes.append(f"The loss was compared with {margin:g} standard errors of its rise added: {', '.join(own)}.")
    fixed = {label: said for label, run in named if (said := run["league" if is_league else "dial"]["fixed"])}
    if refused := [label for label, said in fixed.items() if said == NO_EDIT]:
        notes.append(f"No strength but 0, since every edit was refused: {', '.join(refused)}.")
    if fixed := [label for label in fixed if label not in refused]:
        notes.append(f"No strengths but 0 and 1, since no weight changes: {', '.join(fixed)}.")
    return notes


def tables_markdown(tables: Sequence[TextTable]) -> str:
    """Return the tables in Markdown."""
    lines = []
    for table in tables:
        lines += [f"## {markdown_text(table.title)}", "", *(f"{markdown_text(note)}" for note in table.notes), ""]
        lines += [f"| {' | '.join(table.heads)} |", f"|---{'|---:' * (len(table.heads) - 1)}|"]
        lines += [f"| {' | '.join([markdown_text(first), *cells])} |" for first, *cells in table.rows]
        lines.append("")
    return "\n".join(lines)


def strength_panels(runs: Sequence[Results], scoring: str) -> list[Panel]:
    """Return what an edit achieves against what it costs, and both over the strength; nothing of other protocols."""
    named = _named(runs)
    if not named:
        return []
    every = [point for _, run in named for point in points(run)]
    shown = [
        (name, title) for name, title in metric_titles(SHOWN) if any(_entry(point, scoring, name) for point in every)
    ]
    if "league" in named[0][1]:
        return [Panel(title, partial(_leagues, named=named, scoring=scoring, metric=name)) for name, title in shown]
    against = [cost_panel(f"{title} against damage", named, scoring, name) for name, title in shown]
    over = [Panel(title, partial(_over, named=named, scoring=scoring, metric=name)) for name, title in shown]
    return [*against, *over, Panel("Loss on general text", partial(_losses, named=named))]


def cost_panel(title: str, named: Sequence[tuple[str, Results]], scoring: str, metric: str) -> Panel:
    """Return what edits achieve against what they cost: a line per method through its strengths from 0 on.

    Args:
        title: Of the panel.
        named: Runs of the dial with their labels.
        scoring: Whose metric is drawn.
        metric: Its name.
    """
    return Panel(title, partial(_against, named=named, scoring=scoring, metric=metric), (3.6, 3.0))


def _looks(named: Sequence[tuple[str, Results]]) -> Sequence[Look]:
    return looks([run for _, run in named])


def _measured(run: Results) -> list[Point]:
    return [point for point in points(run) if point["rise"] is not None]


def _against(axis: Any, *, named: Sequence[tuple[str, Results]], scoring: str, metric: str) -> None:
    """Draw a line per method from the untouched model on; full strength has the method's mark, others are dots."""
    costs = []
    for (label, run), look in zip(named, _looks(named), strict=True):
        found = [
            (point["strength"], number(point["rise"]["value"]), 100 * entry["mean"])
            for point in _measured(run)
            if point["strength"] >= 0 and (entry := _entry(point, scoring, metric)) is not None
        ]
        found = [one for one in found if math.isfinite(one[1])]
        costs += [cost for _, cost, _ in found]
        style: Any = {"color": look.colour, "alpha": look.alpha, "mew": 0, "clip_on": False}
        if run["dial"]["fixed"] is None:
            axis.plot([x for _, x, _ in found], [y for *_, y in found], linestyle=look.dash, linewidth=1.3, **style)
            axis.plot(
                [x for _, x, _ in found], [y for *_, y in found], marker="o", linestyle="none", markersize=2.6, **style
            )
        full = [(x, y) for strength, x, y in found if strength == 1]
        axis.plot(*zip(*full, strict=True), marker=look.marker, markersize=8, linestyle="none", label=label, **style)
    _cost_axis(axis, costs)
    axis.set_ylim(-2, 103)
    axis.set_ylabel("%")


def _cost_axis(axis: Any, costs: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_xscale("symlog", linthresh=_LEAST_RISE, linscale=0.6)
    least, most = 1.5 * min([0.0, *costs]), 2 * max([1e-2, *costs])
    axis.set_xlim(least, most)
    # Every second power of ten where there are many, and none so close to 0 that their labels would meet.
    powers = [10.0**k for k in (range(-5, 4) if most < 1 and least == 0 else range(-4, 4, 2))]
    axis.set_xticks([-p for p in reversed(powers) if -p >= least] + [0.0] + [p for p in powers if p <= most])
    axis.xaxis.set_major_formatter(FuncFormatter(_percent))
    axis.xaxis.set_minor_locator(_none())
    for cap in (1e-5, 1e-4, 1e-3):
        axis.axvline(cap, color=MUTED, linewidth=0.6, linestyle=(0, (1, 2)))
    axis.set_xlabel("rise of the loss on general text")
    axis.grid(axis="y")


def _none() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _percent(value: float, _: object) -> str:
    return "0" if value == 0 else f"{100 * value:g} %"


def _over(axis: Any, *, named: Sequence[tuple[str, Results]], scoring: str, metric: str) -> None:
    for (label, run), look in zip(named, _looks(named), strict=True):
        found = [(p["strength"], e) for p in _measured(run) if (e := _entry(p, scoring, metric)) is not None]
        _line(axis, [(x, 100 * e["mean"]) for x, e in found], look, label, run)
    axis.set_ylim(-2, 103)
    axis.set_ylabel("%")
    _strength_axis(axis)


def _losses(axis: Any, *, named: Sequence[tuple[str, Results]]) -> None:
    for (label, run), look in zip(named, _looks(named), strict=True):
        found = [(p["strength"], number(p["rise"]["value"])) for p in _measured(run)]
        _line(axis, [(x, y) for x, y in found if math.isfinite(y)], look, label, run)
    axis.set_yscale("symlog", linthresh=1e-3)
    axis.set_ylabel("rise, as a share")
    _strength_axis(axis)


def _line(axis: Any, found: Sequence[tuple[float, float]], look: Look, label: str, run: Results) -> None:
    style: Any = {"color": look.colour, "alpha": look.alpha, "marker": look.marker, "mew": 0, "markersize": 4}
    is_fixed = run["dial"]["fixed"] is not None
    line: Any = {"linestyle": "none"} if is_fixed else {"linestyle": look.dash, "linewidth": 1.2}
    axis.plot([x for x, _ in found], [y for _, y in found], label=label, **style, **line)


def _strength_axis(axis: Any) -> None:
    for strength in (0, 1):
        axis.axvline(strength, color=MUTED, linewidth=0.6, linestyle=(0, (1, 2)))
    axis.set_xlabel("strength")
    axis.grid(axis="y")


def _leagues(axis: Any, *, named: Sequence[tuple[str, Results]], scoring: str, metric: str) -> None:
    """Draw the score at each league, the strictest first, and at full strength."""
    caps = sorted({entry["cap"] for _, run in named for entry in run["league"]["entries"]})
    places = {cap: place for place, cap in enumerate([*caps, None])}
    for (label, run), look in zip(named, _looks(named), strict=True):
        found = [
            (places[point["cap"]], 100 * entry["mean"])
            for point in points(run)
            if (entry := _entry(point, scoring, metric)) is not None
        ]
        style: Any = {"color": look.colour, "alpha": look.alpha, "linestyle": look.dash, "linewidth": 1.2}
        axis.plot(*zip(*sorted(found), strict=True), marker=look.marker, markersize=4.5, mew=0, label=label, **style)
    axis.set_xticks(range(len(caps) + 1), [*(_percent(cap, None) for cap in caps), "no cap"])
    axis.set_xlabel("allowed rise of the loss")
    axis.set_ylim(-2, 103)
    axis.set_ylabel("%")
    axis.grid(axis="y")
