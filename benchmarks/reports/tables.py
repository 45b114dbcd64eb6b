"""Groups of runs written out: the main table in Markdown and LaTeX, and everything in long form for CSV and parquet.

Under every scoring the best mean of a column is bold, and those that cannot be told from it are underlined: a bold
number without company is better, one with company only looks it. Where records are gone, ties cannot be found, and the
table says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from errata.benchmarks import ability
from errata.benchmarks.reports import added_columns
from errata.benchmarks.reports.groups import Cell, Group
from errata.benchmarks.reports.naming import Results
from errata.benchmarks.runs.json_values import number
from errata.benchmarks.runs.results import SEQUENCES

if TYPE_CHECKING:
    import pandas as pd


# Said of a group whose ties are not marked.
UNPAIRED = "Some records are gone or damaged, so that ties could not be found."


def markdown(found: Sequence[Group]) -> str:
    """Return the main table of every group: one row per run under every scoring."""
    levels = " or ".join(dict.fromkeys(map(confidence, found)))
    legend = "Bold: best of its column under a scoring; underlined: cannot be told from it."
    lines = [f"<!-- Shares in percent with {levels} % intervals. {legend} -->"]
    for group in found:
        lines += ["", f"## {group.title}", "", *([] if group.is_paired else [UNPAIRED, ""])]
        heads = ["", *(title for _, title in group.columns())]
        lines += [_line(heads), _line(["---", *["---:"] * (len(heads) - 1)])]
        for scoring, title in group.scorings():
            lines.append(_line([f"*{title}*", *[""] * (len(heads) - 1)]))
            for place, label in enumerate(group.labels):
                lines.append(_line([label, *map(_markdown_cell, group.row(place, scoring))]))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown_cell(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    mean, interval = shares(cell)
    mean = f"**{mean}**" if cell.is_best else f"<u>{mean}</u>" if cell.is_tied else mean
    return f"{mean} ({interval})"


def shares(cell: Cell) -> tuple[str, str]:
    """A share and its interval in percent: "93.0", "82-100"."""
    return f"{100 * cell.mean:.1f}", f"{100 * cell.low:.0f}–{100 * cell.high:.0f}"


def share(value: float) -> str:
    """A share in percent."""
    return f"{100 * value:.1f}"


def damage(runs: Sequence[Results]) -> dict[str, list[str]]:
    """Return rows of what the edits cost: {what: one cell per run}."""
    rows: dict[str, list[str]] = {}
    is_asked, is_able = any("asked" in run["counts"] for run in runs), any(run.get("ability") for run in runs)
    for run in runs:
        counts, collapse = run["counts"], run["collapse"]
        # In a sequence no one can tell which edit did it.
        is_apart = run["names"]["protocol"] not in SEQUENCES
        measured = is_apart and (collapse["perplexity_ratio"] is not None or collapse["retention"] is not None)
        cells = {
            **({"facts asked, known": _known(counts)} if is_asked else {}),
            "edits, refused": f"{counts['edits']}, {counts['failed']}",
            "disabling edits": str(counts["disabling"]) if measured else "-",
            "perplexity": _from_to(collapse, "perplexity"),
            "perplexity, worst edit": f"× {figure(collapse['perplexity_ratio_worst'])}" if is_apart else "-",
            **({"general ability, %": _ability(run)} if is_able else {}),
            "known facts kept, %": "-" if collapse["retention"] is None else share(collapse["retention"]),
            "drift of neighbours, nats": figure(collapse["neighborhood_kl"]),
            "fluency, bits": _from_to(collapse, "fluency"),
            "seconds per edit": figure(run["speed"]["seconds_per_edit"]),
        }
        cells |= {column.title: _added(value) for column, value in added_columns.added_values(run)}
        for name, cell in cells.items():
            rows.setdefault(name, []).append(cell)
    return rows


def _ability(run: Results) -> str:
    """Mean over lm-eval's tasks, before and after."""
    means = [ability.mean_of_plain((run.get("ability") or {}).get(moment)) for moment in ("before", "after")]
    return "-" if None in means else " → ".join(share(value) for value in means if value is not None)


def _known(counts: Mapping[str, int]) -> str:
    """Of a run with `dataset.known`."""
    return f"{counts['asked']}, {counts['known']}" if "asked" in counts else "-"


def _from_to(collapse: Mapping[str, Any], name: str) -> str:
    before, after = figure(collapse[f"{name}_before"]), figure(collapse[f"{name}_after"])
    return "-" if after == "-" else f"{before} → {after}"


def _added(value: added_columns.Value) -> str:
    """Return the cell of another package's column."""
    return value if isinstance(value, str) else figure(value)


def figure(value: Any) -> str:
    """A number in three digits or so; `-` for none."""
    if value is None:
        return "-"
    plain = number(value)
    if not math.isfinite(plain):
        return "inf"
    return f"{plain:,.0f}" if abs(plain) >= 1000 else f"{plain:.3g}"


_LATEX = str.maketrans(
    {c: rf"\{c}" for c in "&%$#_{}"} | {"~": r"\textasciitilde{}", "^": r"\^{}", "\\": r"\textbackslash{}"}
)


def latex(found: Sequence[Group]) -> str:
    """A `table` for each group, for \\usepackage{booktabs}; intervals stand small behind the means."""
    return "\n".join(_latex_table(group) for group in found)


def _latex_table(group: Group) -> str:
    columns = group.columns()
    heads, unpaired = " & ".join(["", *(title for _, title in columns)]), "" if group.is_paired else f" {UNPAIRED}"
    lines = [
        r"% Needs \usepackage{booktabs}. Bold: best of its column under a scoring; underlined: cannot be told from it.",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{group.title.translate(_LATEX)}. Percent, with {confidence(group)}\,\% intervals.{unpaired}}}",
        rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
        r"\toprule",
        heads + r" \\",
    ]
    for scoring, title in group.scorings():
        lines += [r"\midrule", rf"\multicolumn{{{len(columns) + 1}}}{{l}}{{\emph{{{title}}}}} \\"]
        for place, label in enumerate(group.labels):
            cells = map(_latex_cell, group.row(place, scoring))
            lines.append(" & ".join([label.translate(_LATEX), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def confidence(group: Group) -> str:
    """Of the intervals of a group, in percent."""
    return f"{100 * group.runs[0]['config']['confidence']:g}"


def _latex_cell(cell: Cell | None) -> str:
    if cell is None:
        return "--"
    mean, interval = shares(cell)
    mean = rf"\textbf{{{mean}}}" if cell.is_best else rf"\underline{{{mean}}}" if cell.is_tied else mean
    return rf"{mean} {{\scriptsize ({interval.replace('–', '--')})}}"


def long_form(found: Sequence[Group]) -> pd.DataFrame:
    """One row for each run, scoring and metric, with what the untouched model had."""
    import pandas as pd

    rows = []
    for group in found:
        for (scoring, metric), cells in group.cells.items():
            for run, label, cell in zip(group.runs, group.labels, cells, strict=True):
                if cell is not None:
                    before = run["before"].get(scoring, {}).get(metric, {}).get("mean")
                    names = {"group": group.title, "label": label, **run["names"], "scoring": scoring, "metric": metric}
                    marks = {"best": cell.is_best, "tied_with_best": cell.is_tied}
                    value = {"mean": cell.mean, "low": cell.low, "high": cell.high, "n": cell.n}
                    value["not_finite"] = cell.not_finite
                    rows.append(
                        {**names, **value, "before": number(before), **marks, **_costs(run), "run": run["folder"]}
                    )
    return pd.DataFrame(rows)


def _costs(run: Results) -> dict[str, Any]:
    """What repeats in every row of a run."""
    collapse, counts = run["collapse"], run["counts"]
    return {
        "edits": counts["edits"],
        "refused": counts["failed"],
        "disabling": counts["disabling"],
        "perplexity_ratio": number(collapse["perplexity_ratio"]),
        "known_facts_kept": number(collapse["retention"]),
        "seconds_per_edit": number(run["speed"]["seconds_per_edit"]),
        "precision": run.get("machine", {}).get("precision"),
        "device": run.get("machine", {}).get("device"),
        "perplexity_worst": number(collapse["perplexity_ratio_worst"]),
        "settings": run["digests"]["settings"],
        **{column.name: value for column, value in added_columns.added_values(run)},
    }
