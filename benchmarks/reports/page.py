"""The report as one HTML page. It contains its styles and pictures, and fetches and runs nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from errata.benchmarks.datasets.published import BENCHMARKS
from errata.benchmarks.reports import batch_sizes, charts, examples_page, glossary, panels, tables
from errata.benchmarks.reports.added_columns import ADDED
from errata.benchmarks.reports.counts import count_of
from errata.benchmarks.reports.groups import SCORE, Cell, Group
from errata.benchmarks.reports.naming import Results, differing, readable, shared_method
from errata.benchmarks.reports.orders import order_panels, order_table
from errata.benchmarks.reports.palette import LOOKS, looks, variable
from errata.benchmarks.reports.seeds import members
from errata.benchmarks.reports.strengths import TextTable, strength_panels, strength_table
from errata.benchmarks.runs.status import RunStatus
from errata.evaluate.paired import difference

STYLES = ("colours.css", "page.css")
# matplotlib's markers as characters.
_MARKS = dict(zip("osD^vPX*<>hdpH", "●■◆▲▼✚✖★◀▶⬢⬧⬟⬣", strict=True))
_AS_TEXT = "\ufe0e"  # behind a sign that a browser would otherwise draw as a coloured picture
_HOW = {
    "single": "each by itself on the untouched model",
    "sequential": "on top of each other, all scored at the end",
    "batch": "all at once",
    "dial": "all at once, at several strengths",
    "league": "all at once, at the largest strengths that cost the same",
    "compose": "all at once, before or behind a compression or an unlearning",
}


def html(groups: Sequence[Group], command: str, *, missing: Sequence[RunStatus] = ()) -> str:
    """Return the page.

    Args:
        groups: What is reported.
        command: The command that makes the page again.
        missing: Runs without results, which the page names.
    """
    runs = [run for group in groups for row in group.runs for run in members(row)]
    most = examples_page.examples_per_kind(sum(len(group.runs) for group in groups))
    body = [
        *_head(groups, runs),
        _missing(missing),
        *(_section(group, most) for group in groups),
        _meaning(groups),
        _settings(runs),
        f'<footer class="note">Made by errata {escape(_version(runs))}: <code>{escape(command)}</code></footer>',
    ]
    folder = files("errata.benchmarks.reports")
    style = "".join((folder / name).read_text(encoding="utf-8") for name in STYLES)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_headline(runs)}: errata</title>\n<style>\n{style}{_colours()}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body>\n</html>\n"
    )


def _colours() -> str:
    light = "".join(f" {variable(look.colour)}: {look.colour};" for look in LOOKS.values())
    dark = "".join(f" {variable(look.colour)}: {look.dark};" for look in LOOKS.values())
    return f":root {{{light} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{{dark} }} }}\n"


# --- the top ------------------------------------------------------------------------------------------------------


def _head(groups: Sequence[Group], runs: Sequence[Results]) -> Iterator[str]:
    edits = sum(run["counts"]["edits"] for run in runs)
    seconds = sum(run["speed"].get("total_seconds") or 0 for run in runs)
    yield '<p class="kicker">errata, knowledge editing</p>'
    yield f"<h1>{_headline(runs)}</h1>"
    yield (
        f'<p class="lead">{count_of(len(runs), "run")}, {count_of(edits, "edit")} in all, {_duration(seconds)}. '
        f"Models: {_listed(Path(run['names']['model']).name for run in runs)}. "
        f"Datasets: {_listed(run['names']['dataset'] for run in runs)}. "
        f"Computed in {_listed(run['machine']['precision'] for run in runs)} "
        f"on {_listed(_device(run) for run in runs)}.</p>"
    )
    findings = [finding for group in groups if (finding := _finding(group))]
    if findings:
        yield "<ul>" + "".join(f"<li>{finding}</li>" for finding in findings) + "</ul>"
    if len(groups) > 1:
        links = "".join(f'<li><a href="#{group.name}">{escape(group.title)}</a></li>' for group in groups)
        yield f"<nav><ul>{links}</ul></nav>"


def _missing(runs: Sequence[RunStatus]) -> str:
    if not runs:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(run.state)}</th><td class="text">{escape(run.name)}</td>'
        f'<td class="text">{escape(run.reason or "")}</td></tr>'
        for run in runs
    )
    missing = count_of(len(runs), "run")
    return (
        f'<div class="alarm"><h2>{missing} not in this report</h2><div class="scroll" tabindex="0" '
        f'role="group" aria-label="Runs without results"><table><tbody>{rows}</tbody></table></div></div>'
    )


def _device(run: Results) -> str:
    device = run["machine"]["device"]
    return f"a CPU ({device})" if device.lower() in ("x86_64", "amd64", "aarch64", "arm64") else device


def _headline(runs: Sequence[Results]) -> str:
    """Return methods and models as HTML."""
    methods = dict.fromkeys(readable(run["names"]["editor"]) for run in runs)
    models = dict.fromkeys(Path(run["names"]["model"]).name for run in runs)
    shown = _listed(methods) if len(methods) <= 5 else f"{len(methods)} methods"
    return f"{shown} on {_listed(models) if len(models) <= 3 else f'{len(models)} models'}"


def _finding(group: Group) -> str | None:
    """Return which row has the highest score, and which rows cannot be told from it; None where no score is marked."""
    cells = group.cells.get((group.scoring, SCORE), ())
    best = [label for label, cell in zip(group.labels, cells, strict=False) if cell and cell.is_best]
    tied = [label for label, cell in zip(group.labels, cells, strict=False) if cell and cell.is_tied]
    if not best:
        return None
    found = next(cell for cell in cells if cell and cell.is_best)
    mean, interval = tables.shares(found)
    cases = count_of(found.n, "case")
    those = f"{len(tied)} others" if len(tied) > 3 else _listed(tied) if tied else ""
    rest = f"; {those} cannot be told from it on {cases}" if tied else ""
    have = "has" if len(best) == 1 else "have"
    return f"{escape(group.title)}: <b>{_listed(best)}</b> {have} the highest score, {mean} ({interval}){rest}."


def _listed(names: Any) -> str:
    """Return names in a list with "and" before the last, as HTML."""
    *most, last = [escape(str(name)) for name in dict.fromkeys(names)]
    return f"{', '.join(most)} and {last}" if most else last


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _version(runs: Sequence[Results]) -> str:
    return ", ".join(dict.fromkeys(run["versions"]["errata"] for run in runs))


# --- a group ------------------------------------------------------------------------------------------------------


def _section(group: Group, most: int) -> str:
    protocol = group.runs[0]["names"]["protocol"]
    counts = dict.fromkeys(run["counts"]["edits"] for row in group.runs for run in members(row))
    edits = count_of(next(iter(counts)), "edit") if len(counts) == 1 else f"{_or(counts)} edits"
    how = f"{edits} in each run, {_HOW.get(protocol, protocol)}."
    parts = [
        f'<section id="{group.name}"><h2>{escape(group.title)}</h2><p class="note">{escape(how)}</p>',
        _table(group),
        *_pictures(group),
        _strengths(group),
        _orders(group),
        _damage(group),
        _differences(group),
        examples_page.details(group, most),
        _warnings(group),
    ]
    return "\n".join(part for part in parts if part) + "\n</section>"


def _or(values: Iterable[Any]) -> str:
    """Return values in a list with "or" before the last."""
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}" if others else last


def _legend(group: Group) -> str:
    entries = (
        f"<li>{_mark(look)}{escape(label)}</li>" for look, label in zip(looks(group.runs), group.labels, strict=True)
    )
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _mark(look: Any) -> str:
    style = f"--c: var({variable(look.colour)}); opacity: {look.alpha:.2f}"
    return f'<span class="mark" style="{style}" aria-hidden="true">{_sign(look.marker)}</span>'


def _sign(marker: str) -> str:
    return f"{marker[1:-1]}{_AS_TEXT}" if marker.startswith("$") else _MARKS[marker]


def _table(group: Group) -> str:
    columns = group.columns()
    heads = "".join(f'<th scope="col"><span>{escape(title)}</span></th>' for _, title in columns)
    rows = [row for scoring, title in group.scorings() for row in _rows(group, scoring, title)]
    caption = f"{tables.over(group)}. Percent, {tables.confidence(group)} % intervals. Bold: best; underlined: tied."
    if not group.is_paired:
        caption += f" {tables.UNPAIRED}"
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="Scores"><table>'
        f"<thead><tr><th>{escape(shared_method(group.runs) or '')}</th>{heads}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        f'<p class="note">{caption}</p>'
    )


def _rows(group: Group, scoring: str, title: str) -> Iterator[str]:
    columns = group.columns()
    papers = f"<span>{_papers(group)}</span>" if scoring == group.scoring else ""
    heading = f"<div>{title}{papers}</div>"
    yield f'<tr class="band"><th scope="rowgroup" colspan="{len(columns) + 1}">{heading}</th></tr>'
    for index, (label, look) in enumerate(zip(group.labels, looks(group.runs), strict=True)):
        cells = "".join(_table_cell(cell, group.n) for cell in group.row(index, scoring))
        yield f'<tr><th scope="row">{_mark(look)}{escape(label)}</th>{cells}</tr>'
    before = "".join(f"<td>{_before(group, scoring, name)}</td>" for name, _ in columns)
    yield f'<tr class="before"><th scope="row">untouched</th>{before}</tr>'


def _before(group: Group, scoring: str, metric: str) -> str:
    """Return the untouched model's mean, from the first row that has it."""
    tables_before = (run["before"].get(scoring, {}).get(metric) for run in group.runs)
    entry = next((entry for entry in tables_before if entry is not None), None)
    if entry is None:
        return ""
    own = "" if entry.get("n", group.n) == group.n else f"<small>n = {entry['n']}</small>"
    return tables.share(entry["mean"]) + own


def _papers(group: Group) -> str:
    dataset = group.runs[0]["names"]["dataset"].removeprefix("world_")
    written = {"counterfact": "CounterFact", "counterfact_plus": "CounterFact+", "zsre": "zsRE"}.get(dataset)
    if dataset in BENCHMARKS:
        return f"nearest to how {BENCHMARKS[dataset].title} is scored"
    return f"as the papers score {written}" if written else "as CounterFact's papers do"


def _table_cell(cell: Cell | None, n: int) -> str:
    if cell is None:
        return "<td>–</td>"
    mean, interval = tables.shares(cell)
    kind = ' class="best"' if cell.is_best else ' class="tied"' if cell.is_tied else ""
    own = "<br>".join(filter(None, (interval, tables.own_n(cell, n))))
    return f"<td{kind}><b>{mean}</b><small>{own}</small></td>"


def _pictures(group: Group) -> Iterator[str]:
    runs, scoring = group.runs, group.scoring
    title = dict(group.scorings()).get(scoring, "")
    scores = charts.scores(runs, scoring, group.n)
    wide = " wide" if any(panel.size[0] > 2.4 for panel in scores) else ""  # long labels need room
    yield _figures(group, f"{title}, with intervals", scores, "dotted: the untouched model", kind=wide)
    yield _legend(group)
    sizes = batch_sizes.panels(runs, scoring)
    yield _figures(group, "The same edits in batches of several sizes", sizes, "all edits at the end", kind=" wide")
    yield _figures(group, "As the edits pile up", charts.collapse(runs), "shares over all edits so far", kind=" wide")
    yield _figures(group, "What more edits cost", charts.growth(runs), "medians along the sequence", kind=" wide")
    yield _figures(group, "What it costs", charts.costs(runs, scoring), "", kind=" wide")


def _figures(group: Group, title: str, shown: Sequence[panels.Panel], note: str, *, kind: str = "") -> str:
    if not shown:
        return ""
    figures = "".join(
        f'<figure style="max-width: {panel.size[0] * 118:.0f}px"><h4>{escape(panel.title)}</h4>'
        f"{panels.svg(panel, group.title)}</figure>"
        for panel in shown
    )
    aside = f' <span class="note">{escape(note)}</span>' if note else ""
    return f'<h3>{escape(title)}{aside}</h3><div class="panels{kind}">{figures}</div>'


def _strengths(group: Group) -> str:
    """Return the table of runs over strengths, with their panels; nothing of other protocols."""
    table = strength_table(group.runs, group.scoring)
    shown = strength_panels(group.runs, group.scoring)
    return "" if table is None else _texts(group, table, "What it achieves, and what it costs", shown)


def _orders(group: Group) -> str:
    """Return the table of compositions in both orders, with their panels; nothing of other protocols."""
    table = order_table(group.runs, group.scoring)
    return "" if table is None else _texts(group, table, "Both orders", order_panels(group.runs, group.scoring))


def _texts(group: Group, table: TextTable, title: str, shown: Sequence[panels.Panel]) -> str:
    """Return a table of texts with its panels below."""
    heads = "".join(f'<th scope="col">{escape(head)}</th>' for head in table.heads)
    rows = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for first, *cells in table.rows
    )
    return (
        f"<h3>{escape(table.title)}</h3>"
        f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(table.title)}">'
        f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
        + "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
        + _figures(group, title, shown, "")
    )


def _damage(group: Group) -> str:
    rows = tables.damage(group.runs)
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in group.labels)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for name, cells in rows.items()
        if set(cells) != {"-"}
    )
    return (
        '<h3>Damage and speed</h3><div class="scroll" tabindex="0" role="group" aria-label="Damage and speed">'
        f"<table><thead><tr><th></th>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _differences(group: Group) -> str:
    """Return the differences of every other row to the one with the highest score, case by case."""
    cells = group.cells.get((group.scoring, SCORE), ())
    best = next((index for index, cell in enumerate(cells) if cell and cell.is_best), None)
    if best is None or not group.is_paired:
        return ""
    columns = [entry for entry in group.columns() if entry[0] != SCORE]
    heads = "".join(f'<th scope="col"><span>{escape(title)}</span></th>' for _, title in columns)
    others = [(index, label) for index, label in enumerate(group.labels) if index != best]
    rows = "".join(
        f'<tr><th scope="row">{escape(label)}</th>{"".join(_difference(group, best, i, m) for m, _ in columns)}</tr>'
        for i, label in others
    )
    return (
        f"<details><summary>Differences to {escape(group.labels[best])}, case by case</summary>"
        '<div class="scroll" tabindex="0" role="group" aria-label="Differences"><table>'
        f"<thead><tr><th></th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
        f'<p class="note">{escape(dict(group.scorings())[group.scoring])}, percentage points, with the interval of the '
        "paired difference and the p-value of its exact test, not corrected for their number.</p></details>"
    )


def _difference(group: Group, best: int, index: int, metric: str) -> str:
    from errata.benchmarks.reports.comparing import paired

    pairs = paired(group.values[best], group.values[index], group.scoring, metric)
    if not pairs:
        return "<td>–</td>"
    config = group.runs[0]["config"]
    a, b = zip(*pairs, strict=True)
    found = difference(a, b, seed=config["seed"], confidence=config["confidence"])
    p = "p &lt; 0.001" if found.p < 0.001 else f"p = {found.p:.3f}"
    interval = f"{tables.signed(100 * found.low, 0)} to {tables.signed(100 * found.high, 0)}"
    own = "" if found.n == group.n else f"<br>n = {found.n}"
    return f"<td><b>{tables.signed(100 * found.mean, 1)}</b><small>{interval}<br>{p}{own}</small></td>"


def _warnings(group: Group) -> str:
    found = [
        f"{label}: {warning}"
        for run, label in zip(group.runs, group.labels, strict=True)
        for warning in run["warnings"]
    ]
    return f"<h3>To know</h3><ul>{''.join(f'<li>{escape(line)}</li>' for line in found)}</ul>" if found else ""


# --- the end ------------------------------------------------------------------------------------------------------


def _meaning(groups: Sequence[Group]) -> str:
    shown = {name for group in groups for key in group.cells for name in key}
    terms = [entry for entry in (*glossary.metric_terms(), *glossary.SCORINGS) if entry[0] in shown]
    added = [(column.name, column.title, column.meaning) for column in ADDED.load_others()]
    listed = "".join(
        f"<dt>{escape(title)}</dt><dd>{escape(text)}</dd>" for _, title, text in (*terms, *glossary.DAMAGE, *added)
    )
    last = f"<p>{escape(glossary.INTERVALS)}</p>"
    return f'<section id="meaning"><h2>What the numbers mean</h2><dl>{listed}</dl>{last}</section>'


def _settings(runs: Sequence[Results]) -> str:
    commands = "".join(
        f'<p class="note">{escape(Path(run["folder"]).name)}</p><pre><code>{escape(run["command"])}</code></pre>'
        for run in runs
    )
    sets = dict.fromkeys(", ".join(f"{name} {version}" for name, version in run["versions"].items()) for run in runs)
    versions = "; or ".join(sets)
    table = differing(runs)
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="text">{escape(_values(values))}</td></tr>'
        for name, values in table.items()
    )
    differ = (
        '<h3>Settings that are not the same in all runs</h3><div class="scroll"><table><tbody>'
        f"{rows}</tbody></table></div>"
        if rows
        else ""
    )
    return (
        '<section id="settings"><h2>Settings and commands</h2>'
        f"<p>{escape(versions)}. Every command gives the same run again; where it is finished, it does nothing.</p>"
        f"<details open><summary>Commands</summary>{commands}</details>{differ}</section>"
    )


def _values(values: Sequence[Any]) -> str:
    return " · ".join("–" if value is None else str(value) for value in dict.fromkeys(map(_plain, values)))


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, list | dict) else value
