"""Make a folder of runs into a report: `errata report DIR`.

publish(Path("runs"))       # runs/report/index.html, table.md, table.tex, table.csv, table.parquet, and pictures
# with protocol=dial or protocol=league also strengths.md, with protocol=compose orders.md
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from errata.benchmarks.reports import batch_sizes, charts, page, panels, paper, styled_text, styles, tables
from errata.benchmarks.reports.ability_table import STYLE as ABILITY
from errata.benchmarks.reports.ability_table import ability_tables
from errata.benchmarks.reports.groups import Group, groups
from errata.benchmarks.reports.naming import Results, ordered
from errata.benchmarks.reports.orders import order_panels, order_table
from errata.benchmarks.reports.strengths import strength_panels, strength_table, tables_markdown
from errata.benchmarks.runs.results import read_results
from errata.benchmarks.runs.run_folder import RESULTS, folder_of_runs
from errata.benchmarks.runs.status import survey
from errata.editors.core.errors import ConfigError
from errata.editors.core.files.atomic import make_folder, write_atomically

REPORT, PAGE, TABLE, PAPER = "report", "index.html", "table", "paper"
STRENGTHS, ORDERS = "strengths.md", "orders.md"


def publish(root: Path, out: Path | None = None, *, command: str = "errata report") -> list[Path]:
    """Write a report on all finished runs in a folder and below it.

    Args:
        root: A folder of runs.
        out: The folder of the report; None: `report` in `root`.
        command: The command that makes the report again.

    Returns:
        The files, the page first.

    Raises:
        ConfigError: no such folder, no finished run in it, or no folder can be made at `out`.
    """
    found = _groups_in(root)
    folder = make_folder(root / REPORT if out is None else out)  # before the pictures, which take seconds
    missing = [run for run in survey(root).runs if run.state != "done"]
    files = {PAGE: page.html(found, command, missing=missing).encode(), **_tables(found), **_pictures(found)}
    return _written(root, folder, files)


def publish_paper(root: Path, out: Path | None = None, *, scoring: str = "probability") -> list[Path]:
    """Write the tables of a paper on all finished runs in a folder: Markdown, LaTeX and CSV.

    Args:
        root: A folder of runs.
        out: The folder of the tables; None: `report` in `root`.
        scoring: probability, teacher_forced, generation or generation_containment.

    Returns:
        The files, Markdown first.

    Raises:
        ConfigError: as `publish`, or a scoring that is unknown or was not measured.
    """
    found = paper.paper_tables(_groups_in(root), scoring)
    texts = {"md": paper.markdown(found), "tex": paper.latex(found), "csv": paper.as_csv(found)}
    return _written(root, out, {f"{PAPER}-{scoring}.{ending}": text.encode() for ending, text in texts.items()})


def publish_styled(root: Path, out: Path | None = None, *, style: str) -> list[Path]:
    """Write tables with the columns of published ones on all finished runs in a folder: Markdown, LaTeX and CSV.

    Args:
        root: A folder of runs.
        out: The folder of the tables; None: `report` in `root`.
        style: alphaedit, wild, knowedit or wikibigedit (styles.py); ability (ability_table.py).

    Returns:
        The files, Markdown first, and a picture of efficacy over the edits so far where there are checkpoints.

    Raises:
        ConfigError: as `publish`, or the runs did not measure what the style shows.
    """
    there = _groups_in(root)
    found = ability_tables(there) if style == ABILITY else styles.styled_tables(there, style)
    texts = {"md": styled_text.markdown(found), "tex": styled_text.latex(found), "csv": styled_text.as_csv(found)}
    files = {f"{style}.{ending}": text.encode() for ending, text in texts.items()}
    for index, table in enumerate(found, 1):
        if drawn := styled_text.efficacy(table):
            files[f"{style}-efficacy{index if len(found) > 1 else ''}.png"] = panels.png(drawn, title=table.title)
    return _written(root, out, files)


def finished(root: Path) -> list[Results]:
    """Return the results of all finished runs, in the order in which reports show them."""
    there = sorted(folder_of_runs(root).rglob(RESULTS))
    return ordered([{**read_results(path), "folder": str(path.parent)} for path in there])


def _groups_in(root: Path) -> Sequence[Group]:
    """Return the finished runs of a folder in the groups that tables show; there must be one."""
    runs = finished(root)
    if not runs:
        raise ConfigError(f"no finished run in {root}: nothing to report")
    return groups(runs)


def _written(root: Path, out: Path | None, files: Mapping[str, bytes]) -> list[Path]:
    """Write the files of a report into its folder, and return their paths."""
    folder = make_folder(root / REPORT if out is None else out)
    for name, content in files.items():
        write_atomically(folder / name, content)
    return [folder / name for name in files]


def _tables(found: Sequence[Group]) -> dict[str, bytes]:
    long, parquet = tables.long_form(found), io.BytesIO()
    long.to_parquet(parquet, index=False)
    strengths = [table for group in found if (table := strength_table(group.runs, group.scoring)) is not None]
    orders = [table for group in found if (table := order_table(group.runs, group.scoring)) is not None]
    return {
        **({ORDERS: tables_markdown(orders).encode()} if orders else {}),
        **({STRENGTHS: tables_markdown(strengths).encode()} if strengths else {}),
        f"{TABLE}.md": tables.markdown(found).encode(),
        f"{TABLE}.tex": tables.latex(found).encode(),
        f"{TABLE}.csv": tables.csv(long).encode(),
        f"{TABLE}.parquet": parquet.getvalue(),
    }


def _pictures(found: Sequence[Group]) -> dict[str, bytes]:
    """Return the page's pictures as PNG, for slides and papers."""
    files: dict[str, bytes] = {}
    for group in found:
        shown = {
            "scores": charts.scores(group.runs, group.scoring, group.n),
            "batch-sizes": batch_sizes.panels(group.runs, group.scoring),
            "curves": charts.collapse(group.runs),
            "growth": charts.growth(group.runs),
            "costs": charts.costs(group.runs, group.scoring),
            "strengths": strength_panels(group.runs, group.scoring),
            "orders": order_panels(group.runs, group.scoring),
        }
        files |= {f"{group.name}-{name}.png": panels.png(some) for name, some in shown.items() if some}
    return files
