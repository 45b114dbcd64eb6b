"""What one looks at after a measurement: a table in the terminal and as Markdown, and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from errata.benchmarks.reports.palette import BLUE, GREY, VERMILION
from errata.benchmarks.reports.panels import STYLE

if TYPE_CHECKING:
    from rich.table import Table

Results = Mapping[str, Any]

HEADINGS = ("phase", "what", "ours, s", "plain, s", "ratio", "target", "agreement")
CLOCKS = {"cpu": "CPU seconds", "wall": "seconds by the clock"}


def rows(results: Results) -> list[tuple[str, ...]]:
    """A row of text a comparison, under HEADINGS."""
    unit = "cpu_seconds" if results["clock"] == "cpu" else "seconds"
    return [
        (
            one["phase"].replace("_", " "),
            one["name"],
            f"{one['ours'][unit]:.3g}",
            f"{one['reference'][unit]:.3g}",
            f"{one['ratio']:.1f}x",
            "" if one["target"] is None else f"{one['target']:g}x",
            "equal" if one["agreement"] == 0 else f"{one['agreement']:.1e}",
        )
        for one in results["comparisons"]
    ]


def headline(results: Results) -> str:
    """Machine and settings in one line."""
    threads = f"{results['threads']} thread{'s' if results['threads'] > 1 else ''}"
    model = results["config"].get("model") or results["config"]["shape"]
    return (
        f"{model}, {results['precision']}, {results['device']}, {threads}, "
        f"torch {results['versions']['torch']}, {CLOCKS[results['clock']]}"
    )


def table(results: Results) -> Table:
    """For the terminal; a ratio below its target stands out."""
    from rich.table import Table
    from rich.text import Text

    found = Table(title=headline(results), box=None, padding=(0, 2), title_justify="left")
    for i, heading in enumerate(HEADINGS):
        found.add_column(heading, justify="left" if i < 2 else "right")
    for one, texts in zip(results["comparisons"], rows(results), strict=True):
        short = one["target"] is not None and one["ratio"] < one["target"]
        style = {4: "red" if short else "green"}
        found.add_row(*(Text(text, style=style.get(i, "")) for i, text in enumerate(texts)))
    return found


def markdown(results: Results) -> str:
    """The same table, the command and the curves' ends."""
    lines = [f"{headline(results)}", "", f"    {results['command']}", ""]
    lines += [f"| {' | '.join(HEADINGS)} |", f"|{'---|' * 2}{'---:|' * (len(HEADINGS) - 2)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows(results)]
    for curve in results["curves"]:
        compared = [point for point in curve["points"] if point["reference"] is not None]
        first, last = compared[0], compared[-1]
        lines += [
            "",
            f"{curve['name']}, one layer of width {curve['settings']['d_in']}, seconds per edit (ours / plain): "
            + "; ".join(
                f"{point['ours']:.2g} / {point['reference']:.2g} at {curve['x']} {point['x']:g}"
                for point in (first, last)
            ),
        ]
    return "\n".join(lines) + "\n"


def picture(results: Results) -> bytes:
    """PNG: ratios as bars with their targets marked, and curves of growth."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    comparisons, kinds = results["comparisons"], list(dict.fromkeys(curve["x"] for curve in results["curves"]))
    heights = ([0.36 * len(comparisons) + 0.7] if comparisons else []) + ([2.7] if kinds else [])
    with rc_context(STYLE):
        canvas = Figure(figsize=(7.2, 0.45 + sum(heights)), layout="constrained")
        parts = canvas.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        canvas.suptitle(headline(results), fontsize=8)
        if comparisons:
            _bars(parts[0].subplots(), comparisons)
        if kinds:
            axes = parts[-1].subplots(1, len(kinds), squeeze=False)[0]
            for axis, kind in zip(axes, kinds, strict=True):
                _curves(axis, kind, [curve for curve in results["curves"] if curve["x"] == kind], results["clock"])
            handles, names = axes[0].get_legend_handles_labels()
            parts[-1].legend(handles, names, loc="outside lower center", ncols=4)
        buffer = BytesIO()
        canvas.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _bars(axis: Any, comparisons: Sequence[Mapping[str, Any]]) -> None:
    """A bar a comparison, its length the ratio on a logarithmic axis; a mark at the target."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    places = range(len(comparisons))
    for place, one in zip(places, comparisons, strict=True):
        met = one["target"] is None or one["ratio"] >= one["target"]
        axis.barh(place, one["ratio"] - 1, left=1, height=0.62, color=BLUE if met else VERMILION)
        # Behind the mark, where it would stand in the number.
        target = one["target"] or 0.0
        end = target if one["ratio"] < target < 1.35 * one["ratio"] else one["ratio"]
        axis.text(end * 1.04, place, f"{one['ratio']:.1f}x", va="center", fontsize=8)
        if one["target"] is not None:
            axis.plot([one["target"]] * 2, [place - 0.4, place + 0.4], color="#111111", linewidth=1.6)
    axis.plot([], [], color="#111111", linewidth=1.6, label="target")
    axis.set_yticks(places, [f"{one['phase'].replace('_', ' ')}: {one['name']}" for one in comparisons])
    axis.invert_yaxis()
    axis.set_xscale("log")
    farthest = max(max(one["ratio"], one["target"] or 1) for one in comparisons)
    axis.set_xlim(min([1.0, *(one["ratio"] for one in comparisons)]) * 0.98, farthest * 1.5)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(axis="x", linewidth=0.4, alpha=0.5)
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel("times faster than the plain way")
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, handlelength=1)  # above, where no bar ends


def _curves(axis: Any, kind: str, curves: Sequence[Mapping[str, Any]], clock: str) -> None:
    """Draw ours as a solid line and the plain way as a dashed one, with one colour per method."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for curve, colour in zip(curves, (BLUE, VERMILION), strict=False):
        for path, line in (("ours", "-"), ("reference", "--")):
            key = path if clock == "cpu" else f"{path}_wall"
            points = [(point["x"], 1000 * point[key]) for point in curve["points"] if point[key] is not None]
            label = f"{curve['name']}, {'ours' if path == 'ours' else 'plain'}"
            axis.plot(
                *zip(*points, strict=True), line, color=colour, label=label, linewidth=1.4, marker="o", markersize=2.6
            )
    settings = curves[0]["settings"]
    axis.set_title(
        f"One layer, {settings['d_in']} wide" + (f", batches of {b}" if (b := settings.get("batch")) else "")
    )
    axis.set_xscale("log" if kind == "batch size" else "linear")
    axis.set_yscale("log")
    axis.set_xlabel(kind)
    axis.set_ylabel("milliseconds of CPU per edit" if clock == "cpu" else "milliseconds per edit")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(linewidth=0.4, alpha=0.5, color=GREY)
