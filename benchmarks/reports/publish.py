"""A folder of runs made into a report: `errata report DIR`.

publish(Path("runs"))       # runs/report/index.html, table.md, table.tex, table.csv, table.parquet, and pictures
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from errata.benchmarks.reports import batch_sizes, charts, page, panels, tables
from errata.benchmarks.reports.groups import Group, groups
from errata.benchmarks.reports.naming import Results
from errata.benchmarks.reports.palette import LOOKS
from errata.benchmarks.runs.results import read_results
from errata.benchmarks.runs.run_folder import RESULTS, folder_of_runs
from errata.benchmarks.runs.status import survey
from errata.editors.core.errors import ConfigError
from errata.editors.core.files.atomic import make_folder, write_atomically

REPORT, PAGE, TABLE = "report", "index.html", "table"


def publish(root: Path, out: Path | None = None, *, command: str = "errata report") -> list[Path]:
    """Write a report on all finished runs in a folder and below it.

    Args:
        root: A folder of runs.
        out: Where to; None: `report` in `root`.
        command: How the report is made again.

    Returns:
        The files, the page first.

    Raises:
        ConfigError: no such folder, no finished run in it, or no folder can be made at `out`.
    """
    runs = finished(root)
    if not runs:
        raise ConfigError(f"no finished run in {root}: nothing to report")
    folder = make_folder(root / REPORT if out is None else out)
    found = groups(runs)
    missing = [run for run in survey(root).runs if run.state != "done"]
    files = {PAGE: page.html(found, command, missing=missing).encode(), **_tables(found), **_pictures(found)}
    for name, content in files.items():
        write_atomically(folder / name, content)
    return [folder / name for name in files]


def finished(root: Path) -> list[Results]:
    """The results of all finished runs, methods in one order everywhere."""
    there = sorted(folder_of_runs(root).rglob(RESULTS))
    runs = [{**read_results(path), "folder": str(path.parent)} for path in there]
    return sorted(runs, key=_place)


def _place(run: Results) -> tuple[int, int, int]:
    """Where a run stands among others: by its method, then by the settings that are most often varied."""
    method, config = run["names"]["editor"], run["config"]
    place = list(LOOKS).index(method) if method in LOOKS else len(LOOKS)
    return place, config.get("batch_size") or 0, config.get("seed") or 0


def _tables(found: Sequence[Group]) -> dict[str, bytes]:
    long, parquet = tables.long_form(found), io.BytesIO()
    long.to_parquet(parquet, index=False)
    return {
        f"{TABLE}.md": tables.markdown(found).encode(),
        f"{TABLE}.tex": tables.latex(found).encode(),
        f"{TABLE}.csv": long.to_csv(index=False).encode(),
        f"{TABLE}.parquet": parquet.getvalue(),
    }


def _pictures(found: Sequence[Group]) -> dict[str, bytes]:
    """The page's pictures as PNG, for slides and papers."""
    files: dict[str, bytes] = {}
    for group in found:
        shown = {
            "scores": charts.scores(group.runs, group.scoring),
            "batch-sizes": batch_sizes.panels(group.runs, group.scoring),
            "curves": charts.collapse(group.runs),
            "growth": charts.growth(group.runs),
            "costs": charts.costs(group.runs, group.scoring),
        }
        files |= {f"{group.name}-{name}.png": panels.png(some) for name, some in shown.items() if some}
    return files
