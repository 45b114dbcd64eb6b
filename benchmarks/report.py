"""What one looks at after a run: a table in the terminal and as Markdown, and two plots.

- scores.png: every metric before and after the edits, with its interval, a panel a protocol.
- damage.png: perplexity after each edit against the key ratio that foretells it; disabling edits stand out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.benchmarks import summary
from errata.benchmarks.store import RESULTS, RunFolder, number, read_results

if TYPE_CHECKING:
    from rich.console import Console

Results = Mapping[str, Any]

PROTOCOL_TITLES = (
    ("probability", "Probability comparison"),
    ("teacher_forced", "Teacher-forced tokens"),
    ("generation", "Free generation"),
)
METRIC_TITLES = (
    ("reliability", "Reliability"),
    ("generalization", "Generalization"),
    ("locality", "Locality"),
    ("distracting_locality", "Distracting\nlocality"),
    ("portability", "Portability"),
)
SCORES, DAMAGE, MARKDOWN = "scores.png", "damage.png", "report.md"
# Okabe and Ito's palette, which the colour-blind can tell apart.
GREY, BLUE, VERMILION = "#b8b8b8", "#0072b2", "#d55e00"
STYLE: Any = {
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 170,
}


def read(folder: Path) -> Results:
    """The results of a finished run."""
    return {**read_results(folder / RESULTS), "folder": str(folder)}


def write(folder: RunFolder, results: Results, records: Sequence[Mapping[str, Any]]) -> None:
    """Plots and Markdown of one run, into its folder."""
    pictures = [(SCORES, scores_figure(results)), (DAMAGE, damage_figure(results, summary.curve(records)))]
    drawn = [name for name, figure in pictures if figure is not None]
    for name, figure in pictures:
        if figure is not None:
            folder.write_bytes(name, figure)
    folder.write_text(MARKDOWN, markdown(results, drawn))


# --- tables -------------------------------------------------------------------------------------------------------


def show(runs: Sequence[Results], console: Console) -> None:
    """One table a protocol, before and after side by side; among several runs the best of a column is bold."""
    from rich.table import Table
    from rich.text import Text

    for protocol, title in PROTOCOL_TITLES:
        metrics = [
            entry for entry in METRIC_TITLES if any(entry[0] in run["summary"].get(protocol, {}) for run in runs)
        ]
        if not metrics:
            continue
        table = Table(title=f"{title}: before → after, %", title_justify="left", box=None, padding=(0, 2, 0, 0))
        table.add_column("")
        for _, name in metrics:
            table.add_column(name.replace("\n", " "), justify="right")
        for run, name in zip(runs, labels(runs), strict=True):
            table.add_row(name, *(_cell(runs, run, protocol, metric) for metric, _ in metrics))
        console.print(table, "")
    console.print(_damage_table(runs), "")
    for run, name in zip(runs, labels(runs), strict=True):
        for warning in run["warnings"]:
            console.print(Text.assemble((f"{name}: ", "yellow"), warning), soft_wrap=True)
    for run in runs:
        console.print(Text.assemble(("results  ", "dim"), run["folder"]), soft_wrap=True)
    if len(runs) == 1:
        console.print(Text.assemble(("again    ", "dim"), runs[0]["command"]), soft_wrap=True)


def labels(runs: Sequence[Results]) -> list[str]:
    """What tells the runs apart: of editor, model, dataset and protocol those that differ; a digest where none does."""
    names = ("editor", "model", "dataset", "protocol")
    differing = [name for name in names if len({run["names"][name] for run in runs}) > 1] or ["editor"]
    found = [" ".join(str(run["names"][name]) for name in differing) for run in runs]
    repeated = len(set(found)) < len(found)
    return [
        f"{name} {run['digests']['settings'][:6]}" if repeated else name for name, run in zip(found, runs, strict=True)
    ]


def _cell(runs: Sequence[Results], run: Results, protocol: str, metric: str) -> str:
    after = run["summary"].get(protocol, {}).get(metric)
    if after is None:
        return "-"
    before = run["before"][protocol][metric]
    means = [r["summary"][protocol][metric]["mean"] for r in runs if metric in r["summary"].get(protocol, {})]
    best = len(runs) > 1 and after["mean"] == max(means) and len(set(means)) > 1
    value = f"{100 * after['mean']:.1f}"
    interval = f" [dim]({100 * after['low']:.0f}-{100 * after['high']:.0f})[/]"
    return f"{100 * before['mean']:.1f} → {f'[bold]{value}[/]' if best else value}{interval}"


def _damage_table(runs: Sequence[Results]) -> Any:
    from rich.table import Table

    table = Table(title="Damage and speed", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for name in ("edits", "refused", "disabling", "perplexity", "worst", "drift (KL)", "s per edit"):
        table.add_column(name, justify="right")
    for run, name in zip(runs, labels(runs), strict=True):
        counts, collapse = run["counts"], run["collapse"]
        perplexity = f"{figure(collapse['perplexity_before'])} → {figure(collapse['perplexity_after'])}"
        disabling = "-" if collapse["perplexity_ratio"] is None else str(counts["disabling"])
        cells = (str(counts["edits"]), str(counts["failed"]), disabling, perplexity)
        worst = collapse["perplexity_ratio_worst"]
        table.add_row(
            name,
            *cells,
            "-" if worst is None else f"x {figure(worst)}",
            figure(collapse["neighborhood_kl"]),
            figure(run["speed"]["seconds_per_edit"]),
        )
    return table


def figure(value: Any) -> str:
    """A number in three digits or so; `-` for none."""
    if value is None:
        return "-"
    plain = number(value)
    if not math.isfinite(plain):
        return "inf"
    return f"{plain:,.0f}" if abs(plain) >= 1000 else f"{plain:.3g}"


def markdown(results: Results, pictures: Sequence[str]) -> str:
    """The same as a page."""
    names = results["names"]
    lines = [f"# {names['editor']} on {names['model']}, {names['dataset']}, {names['protocol']}", ""]
    counts = results["counts"]
    lines += [f"{counts['edits']} edits, {counts['failed']} refused, {counts['disabling']} disabling.", ""]
    lines += ["Shares in percent, with bootstrap intervals over cases.", ""]
    lines += ["| protocol | metric | before | after | interval | cases |", "|---|---|---:|---:|---|---:|"]
    for protocol, metrics in results["summary"].items():
        for metric, after in metrics.items():
            before = results["before"][protocol][metric]["mean"]
            interval = f"{100 * after['low']:.1f} to {100 * after['high']:.1f}"
            shares = f"{100 * before:.1f} | {100 * after['mean']:.1f}"
            lines.append(f"| {protocol} | {metric} | {shares} | {interval} | {after['n']} |")
    lines += ["", "| damage and speed | |", "|---|---:|"]
    lines += [f"| {k} | {figure(v)} |" for part in ("collapse", "speed") for k, v in results[part].items()]
    if results["warnings"]:
        lines += ["", *(f"- {warning}" for warning in results["warnings"])]
    lines += ["", *(f"![{name}]({name})" for name in pictures)]
    return "\n".join([*lines, "", "Again:", "", "```", results["command"], "```", ""])


# --- plots --------------------------------------------------------------------------------------------------------


def scores_figure(results: Results) -> bytes | None:
    """Bars before and after, with intervals; None without scores."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels = [entry for entry in PROTOCOL_TITLES if results["summary"].get(entry[0])]
    if not panels:
        return None
    counts = [len(_metrics(results, protocol)) for protocol, _ in panels]
    with rc_context(STYLE):
        canvas = Figure(figsize=(1.2 + 0.62 * sum(counts), 2.6), layout="constrained")
        axes = canvas.subplots(1, len(panels), sharey=True, squeeze=False, width_ratios=counts)[0]
        for axis, (protocol, title) in zip(axes, panels, strict=True):
            _bars(axis, results, protocol)
            axis.set_title(title)
        axes[0].set_ylabel("share of cases, %")
        handles, names = axes[0].get_legend_handles_labels()
        canvas.legend(handles, names, loc="outside lower center", ncols=2)
        names = results["names"]
        canvas.suptitle(f"{names['editor']} on {Path(names['model']).name}, {results['counts']['edits']} single edits")
        return _png(canvas)


def _metrics(results: Results, protocol: str) -> list[tuple[str, str]]:
    return [entry for entry in METRIC_TITLES if entry[0] in results["summary"][protocol]]


def _bars(axis: Any, results: Results, protocol: str) -> None:
    metrics = _metrics(results, protocol)
    for table, shift, colour, label in (("before", -0.2, GREY, "before"), ("summary", 0.2, BLUE, "after")):
        entries = [results[table][protocol][metric] for metric, _ in metrics]
        means = [100 * entry["mean"] for entry in entries]
        below = [max(0.0, mean - 100 * entry["low"]) for mean, entry in zip(means, entries, strict=True)]
        above = [max(0.0, 100 * entry["high"] - mean) for mean, entry in zip(means, entries, strict=True)]
        places = [i + shift for i in range(len(metrics))]
        bars = {"elinewidth": 0.9, "capsize": 1.8, "capthick": 0.9, "ecolor": "#222222"}
        axis.bar(places, means, 0.38, color=colour, label=label, yerr=(below, above), error_kw=bars)
    axis.set_xticks(range(len(metrics)), [name for _, name in metrics], rotation=35, ha="right", rotation_mode="anchor")
    axis.set_ylim(0, 104)
    axis.grid(axis="y", linewidth=0.4, alpha=0.5)


def damage_figure(results: Results, curve: Sequence[Mapping[str, Any]]) -> bytes | None:
    """Perplexity ratio of every edit against its key ratio, on logarithmic axes; None where either was not measured."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    points = [(p["key_ratio"], number(p["perplexity_ratio"])) for p in curve if p.get("key_ratio") is not None]
    points = [(x, y) for x, y in points if not math.isnan(y)]
    if not points:
        return None
    top = max([y for _, y in points if math.isfinite(y)], default=1.0) * 2
    points = [(x, min(y, top)) for x, y in points]
    with rc_context(STYLE):
        canvas = Figure(figsize=(3.6, 2.7), layout="constrained")
        axis = canvas.subplots()
        bad = [point for point in points if point[1] > summary.DISABLING_PERPLEXITY]
        good = [point for point in points if point[1] <= summary.DISABLING_PERPLEXITY]
        for some, colour, marker, label in ((good, BLUE, "o", "harmless"), (bad, VERMILION, "X", "disabling")):
            if some:
                kind = {"s": 20, "alpha": 0.75, "linewidths": 0, "color": colour, "marker": marker}
                axis.scatter(*zip(*some, strict=True), label=f"{label} ({len(some)})", **kind)
        axis.axhline(summary.DISABLING_PERPLEXITY, color="#444444", linewidth=0.7, linestyle=(0, (4, 3)))
        axis.set_xscale("symlog", linthresh=0.01)
        axis.set_yscale("log")
        axis.set_xlabel(r"key ratio  $(k_0 \cdot u)\,/\,(\bar k \cdot u)$")
        axis.set_ylabel("perplexity after / before")
        axis.grid(linewidth=0.4, alpha=0.4)
        axis.legend(loc="best", handletextpad=0.2)
        names = results["names"]
        axis.set_title(f"{names['editor']} on {Path(names['model']).name}: a dot an edit")
        return _png(canvas)


def _png(canvas: Any) -> bytes:
    from io import BytesIO

    buffer = BytesIO()
    # Without a date and version the same numbers give the same file.
    canvas.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
