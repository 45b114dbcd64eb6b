"""Read what runs recorded of every probe as a table for pandas.

probes = load_records("runs")
probes[(probes["kind"] == "rewrite") & (probes["after.probability"] == 0)]     # the edits that failed
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.benchmarks.runs import summary
from errata.benchmarks.runs.json_values import number
from errata.benchmarks.runs.results import named, read_records, results_with_names
from errata.benchmarks.runs.run_folder import RECORDS, RESULTS, folder_of_runs
from errata.evaluate import metrics
from errata.evaluate.probes import kinds

if TYPE_CHECKING:
    import pandas as pd


def load_records(folder: str | Path) -> pd.DataFrame:
    """Return everything that the finished runs in a folder and below it recorded, as a table.

    Args:
        folder: A run's folder, or any folder above.

    Returns:
        A pandas.DataFrame with one row per case and probe. Columns: `run`, `editor`, `model`, `dataset`, `protocol`,
        `seed`; of the edit `case`, `index` (its number in the run, from 0), `subject`, `target`, `status` ("ok",
        "failed", "undone"), `reason`; of the probe `probe` (its number in the case, from 0), `kind`, `group` (the named
        group that it is scored in), `prompt`, `wanted`, `other`. Then, for the untouched model under `before.` and for
        the edited one under `after.`: `text` (what it wrote), `nll_wanted` and `nll_other` (mean negative
        log-probability per token, in nats), and `probability`, `teacher_forced`, `generation`,
        `generation_containment`, how far the probe is answered as wanted, from 0 to 1. What was not measured is None or
        NaN. After a refused edit the answers are those before.

    Raises:
        ConfigError: no such folder, or a results.json that is not one.
        DatasetError: records that are gone or damaged.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for path in sorted(folder_of_runs(folder).rglob(RESULTS)):
        results = results_with_names(path)
        run = {**named(path, results), "seed": results.get("config", {}).get("seed")}
        for record in read_records(path.with_name(RECORDS)):
            rows.extend({**run, **row} for row in probe_rows(record))
    return pd.DataFrame(rows)


def probe_rows(record: summary.Record) -> Iterator[dict[str, Any]]:
    """Yield one row per probe of a record."""
    request = record.get("request", {})
    edit = {
        "case": record["case"],
        "index": record["place"],
        "subject": request.get("subject"),
        "target": request.get("target"),
        "status": record["status"],
        "reason": record["reason"],
    }
    moments: tuple[summary.Moment, ...] = ("before", "after")
    outcomes = {moment: iter(summary.outcomes(record, moment)) for moment in moments}
    known = kinds()
    for index, entry in enumerate(record["probes"]):
        asked = {"kind": entry["kind"], "group": entry.get("group"), "prompt": entry["prompt"]}
        row = {**edit, "probe": index, **asked, "wanted": entry["target"], "other": entry["other"]}
        for moment in moments:
            said = entry[moment] or entry["before"]
            # Without the package of its kind, no one knows how a probe is judged.
            success = metrics.success_by_scoring(next(outcomes[moment])) if entry["kind"] in known else {}
            row |= _answer(moment, said, success)
        yield row


def _answer(moment: str, said: Mapping[str, Any], success: Mapping[str, float]) -> dict[str, Any]:
    """Return the columns of one answer."""
    columns = {"text": said["text"], "nll_wanted": number(said["nll_target"]), "nll_other": number(said["nll_other"])}
    columns |= {scoring: success.get(scoring) for scoring in metrics.SCORINGS}
    return {f"{moment}.{name}": value for name, value in columns.items()}
