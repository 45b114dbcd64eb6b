"""Groups of runs as tables: the main table in Markdown and LaTeX, and all numbers in long form for CSV and parquet.

Under every scoring the best mean of a column is bold, and means that cannot be told from it are underlined. A bold
number is better than all those that are neither bold nor underlined. Where records are gone, ties cannot be found, and
the table states it. A cell over another number of cases than its table states its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from errata.benchmarks.ability import ability
from errata.benchmarks.reports import added_columns
from errata.benchmarks.reports.counts import count_of
from errata.benchmarks.reports.escaping import csv_cell, markdown_text, without_controls
from errata.benchmarks.reports.groups import Cell, Group
from errata.benchmarks.reports.naming import Results, shared_method
from errata.benchmarks.reports.seeds import members
from errata.benchmarks.runs.json_values import number
from errata.benchmarks.runs.results import is_sequence

if TYPE_CHECKING:
    import pandas as pd


# The note on a group whose ties are not marked.
UNPAIRED = "Some records are gone or damaged, so that ties could not be found."


def markdown(found: Sequence[Group]) -> str:
    """Return the main table of every group: one row per run under every scoring."""
    levels = " or ".join(dict.fromkeys(map(confidence, found)))
    legend = "Bold: best of its column under a scoring; underlined: cannot be told from it."
    lines = [f"<!-- Shares in percent with {levels} % intervals. {legend} -->"]
    for group in found:
        lines += ["", f"## {markdown_text(group.title)}", "", f"{over(group)}.", ""]
        lines += [] if group.is_paired else [UNPAIRED, ""]
        heads = [shared_method(group.runs) or "", *(title for _, title in group.columns())]
        lines += [_line(heads), _line(["---", *["---:"] * (len(heads) - 1)])]
        for scoring, title in group.scorings():
            lines.append(_line([f"*{title}*", *[""] * (len(heads) - 1)]))
            for place, label in enumerate(group.labels):
                cells = (markdown_cell(cell, group.n) for cell in group.row(place, scoring))
                lines.append(_line([markdown_text(label), *cells]))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def markdown_cell(cell: Cell | None, n: int) -> str:
    """Return a cell in Markdown; `n` is the number of cases that its table states."""
    if cell is None:
        return "-"
    mean, spread = shares(cell)
    mean = f"**{mean}**" if cell.is_best else f"<u>{mean}</u>" if cell.is_tied else mean
    own = own_n(cell, n)
    if cell.deviation is not None:
        return f"{mean} {spread}{f' ({own})' if own else ''}"
    return f"{mean} ({', '.join(filter(None, (spread, own)))})"


def over(group: Group) -> str:
    """Return what the means of a group are over: its cases, and the seeds of its rows where there are several."""
    seeds = dict.fromkeys(run["seeds"] for run in group.runs if "seeds" in run)
    of = f" per seed; mean ± standard deviation over {' or '.join(map(str, seeds))} seeds" if seeds else ""
    return f"Means over {count_of(group.n, 'case')}{of}"


def own_n(cell: Cell, n: int) -> str:
    """Return the number of cases of a cell where it is not that of its table, else nothing."""
    return "" if cell.n == n else f"n = {cell.n}"


def shares(cell: Cell) -> tuple[str, str]:
    """Return a share in percent and its interval, "93.0" and "82–100", or its deviation between seeds, "± 1.2"."""
    if cell.deviation is not None:
        return share(cell.mean), f"± {share(cell.deviation)}"
    return share(cell.mean), between(cell.low, cell.high, "–")


def between(low: float, high: float, dash: str) -> str:
    """Return an interval in whole percent: "82–100"; where an end is negative, "-12 to 9"."""
    ends = [f"{100 * end:.0f}" for end in (low, high)]
    ends = ["0" if end == "-0" else end for end in ends]
    return (" to " if ends[0].startswith("-") else dash).join(ends)


def signed(value: float, digits: int) -> str:
    """Return a number with its sign; a number that rounds to zero has none."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text


def share(value: float) -> str:
    """Return a share in percent."""
    return f"{100 * value:.1f}"


def damage(runs: Sequence[Results]) -> dict[str, list[str]]:
    """Return rows of what the edits cost: {what: one cell per run}."""
    rows: dict[str, list[str]] = {}
    is_timed = any(run["speed"].get("cpu_seconds_per_edit") is not None for run in runs)
    is_placed = any(run.get("layers") for run in runs)
    is_doubted = any(run.get("doubts") for run in runs)
    is_asked, is_able = any("asked" in run["counts"] for run in runs), any(run.get("ability") for run in runs)
    there = [run.get("writing", {}).get("after", {}) for run in runs]
    written = [name for name in ("fluency", "consistency") if any(name in table for table in there)]
    leaking = any(run.get("priming") for run in runs)
    for run in runs:
        counts, collapse = run["counts"], run["collapse"]
        # In a sequence no one can tell which edit did it.
        is_apart = not is_sequence(run)
        measured = is_apart and (collapse["perplexity_ratio"] is not None or collapse["retention"] is not None)
        worst = figure(collapse["perplexity_ratio_worst"])
        cells = {
            **({"layers": ", ".join(map(str, run.get("layers") or "-"))} if is_placed else {}),
            **({"facts asked": _known(counts, "asked"), "facts known": _known(counts, "known")} if is_asked else {}),
            "edits": f"{counts['edits']:,}",
            "edits refused": f"{counts['failed']:,}",
            "edits that took": f"{run['took']:,}" if "took" in run else "-",
            **({"doubtful edits": _doubts(run)} if is_doubted else {}),
            "disabling edits": f"{counts['disabling']:,}" if measured else "-",
            "perplexity": _from_to(collapse, "perplexity"),
            "perplexity, worst edit": "-" if worst == "-" or not is_apart else f"× {worst}",
            **({"general ability, %": _ability(run)} if is_able else {}),
            "known facts kept, %": "-" if collapse["retention"] is None else share(collapse["retention"]),
            "drift of neighbours, nats": figure(collapse["neighborhood_kl"]),
            **({f"{name}, log10": _priming(run, name) for name in ("memorization", "priming")} if leaking else {}),
            "fluency, bits": _from_to(collapse, "fluency"),
            **{f"{name}, papers' form": _writing(run, name) for name in written},
            "seconds per edit": figure(run["speed"]["seconds_per_edit"]),
            **({"CPU seconds per edit": figure(run["speed"].get("cpu_seconds_per_edit"))} if is_timed else {}),
        }
        cells |= {column.title: _added(value) for column, value in added_columns.added_values(run)}
        for name, cell in cells.items():
            rows.setdefault(name, []).append(cell)
    return rows


def _ability(run: Results) -> str:
    """Return the mean over lm-eval's tasks, before and after; over several seeds, the mean of these."""
    asked = [member.get("ability") or {} for member in members(run)]
    each = [[ability.mean_of_plain(scores.get(moment)) for moment in ("before", "after")] for scores in asked]
    known = [[value for value in pair if value is not None] for pair in each if None not in pair]
    if not known:
        return "-"
    chance = ability.chance_of_plain(asked[0].get("after"))
    guessed = "" if chance is None else f" (chance {share(chance)})"
    return " → ".join(share(fmean(values)) for values in zip(*known, strict=True)) + guessed


def _doubts(run: Results) -> str:
    """Return how many edits show each sign of doubt (editors/core/doubts.py): "search 3, size 1"; 0 for none."""
    if "doubts" not in run:
        return "-"
    return ", ".join(f"{name} {count:,}" for name, count in run["doubts"].items()) or "0"


def _known(counts: Mapping[str, int], name: str) -> str:
    """Return a count of a run with `dataset.known`."""
    return f"{counts[name]:,}" if name in counts else "-"


def _from_to(collapse: Mapping[str, Any], name: str) -> str:
    before, after = figure(collapse[f"{name}_before"]), figure(collapse[f"{name}_after"])
    return "-" if after == "-" else f"{before} → {after}"


def _writing(run: Results, name: str) -> str:
    """Return a score of texts behind open prompts, before and after."""
    tables = [run.get("writing", {}).get(moment, {}) for moment in ("before", "after")]
    return " → ".join(figure(table[name]["mean"]) for table in tables) if all(name in t for t in tables) else "-"


def _priming(run: Results, name: str) -> str:
    """Return log10 of S_mem or S_prime with its interval; over several seeds, the mean of these."""
    found = [member.get("priming", {}).get(name, {}).get("log10_s") for member in members(run)]
    known = [entry for entry in found if entry is not None]
    if not known:
        return "-"
    if len(known) > 1:
        return f"{fmean(entry['mean'] for entry in known):.2f}"
    return f"{known[0]['mean']:.2f} ({known[0]['low']:.2f} to {known[0]['high']:.2f})"


def _added(value: added_columns.Value) -> str:
    """Return the cell of another package's column."""
    return value if isinstance(value, str) else figure(value)


def figure(value: Any) -> str:
    """Return a number with about three digits; `-` for none."""
    if value is None:
        return "-"
    plain = number(value)
    if not math.isfinite(plain):
        return "inf"
    return f"{plain:,.0f}" if abs(plain) >= 1000 else f"{plain:.3g}"


LATEX = str.maketrans(
    {c: rf"\{c}" for c in "&%$#_{}"} | {"~": r"\textasciitilde{}", "^": r"\^{}", "\\": r"\textbackslash{}"}
)


def latex_text(text: str) -> str:
    """Return the text as LaTeX prints it, in one line: an empty line would end a caption."""
    return " ".join(without_controls(text).split()).translate(LATEX)


def latex(found: Sequence[Group]) -> str:
    """Return a `table` for each group, for \\usepackage{booktabs}; intervals are small, after the means."""
    return "\n".join(_latex_table(group) for group in found)


def _latex_table(group: Group) -> str:
    columns = group.columns()
    heads = " & ".join(map(latex_text, [shared_method(group.runs) or "", *(title for _, title in columns)]))
    unpaired = "" if group.is_paired else f" {UNPAIRED}"
    means = over(group).replace("±", r"$\pm$")
    lines = [
        r"% Needs \usepackage{booktabs}. Bold: best of its column under a scoring; underlined: cannot be told from it.",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{latex_text(group.title)}. Percent, with {confidence(group)}\,\% intervals. "
        rf"{means}.{unpaired}}}",
        rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
        r"\toprule",
        heads + r" \\",
    ]
    for scoring, title in group.scorings():
        lines += [r"\midrule", rf"\multicolumn{{{len(columns) + 1}}}{{l}}{{\emph{{{title}}}}} \\"]
        for place, label in enumerate(group.labels):
            cells = (latex_cell(cell, group.n) for cell in group.row(place, scoring))
            lines.append(" & ".join([latex_text(label), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def confidence(group: Group) -> str:
    """Return the confidence of a group's intervals in percent."""
    return f"{100 * group.runs[0]['config']['confidence']:g}"


def latex_cell(cell: Cell | None, n: int) -> str:
    """Return a cell in LaTeX; `n` is the number of cases that its table states."""
    if cell is None:
        return "--"
    mean, spread = shares(cell)
    mean = rf"\textbf{{{mean}}}" if cell.is_best else rf"\underline{{{mean}}}" if cell.is_tied else mean
    own = own_n(cell, n).replace("n = ", "$n=$")
    if cell.deviation is not None:
        beside = " ".join(filter(None, (spread.replace("±", r"$\pm$"), f"({own})" if own else "")))
    else:
        beside = f"({', '.join(filter(None, (spread.replace('–', '--'), own)))})"
    return rf"{mean} {{\scriptsize {beside}}}"


def csv(table: pd.DataFrame) -> str:
    """Return a table as CSV, with no cell that a spreadsheet would carry out."""
    return table.map(lambda cell: csv_cell(cell) if isinstance(cell, str) else cell).to_csv(index=False)


def long_form(found: Sequence[Group]) -> pd.DataFrame:
    """Return one row for each row of a group, scoring and metric, with the untouched model's mean."""
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
                    value |= {"seeds": cell.seeds, "deviation": number(cell.deviation), "not_finite": cell.not_finite}
                    rows.append(
                        {**names, **value, "before": number(before), **marks, **_costs(run), "run": run["folder"]}
                    )
    return pd.DataFrame(rows)


def _costs(run: Results) -> dict[str, Any]:
    """Return what all rows of a run have in common."""
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
