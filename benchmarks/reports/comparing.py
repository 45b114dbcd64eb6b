"""Two finished runs over the same cases, case by case: `errata compare A B`.

    found = compare(Path("runs/rome-..."), Path("runs/r_rome-..."))
    found.rows[0].metric, found.rows[0].difference.mean, found.rows[0].p_holm

What is compared is what the runs recorded of every case; nothing is run. Two runs that were not asked the same are
refused, with what tells them apart.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from errata.benchmarks.reports.figures import METRIC_TITLES, PROTOCOL_TITLES
from errata.benchmarks.reports.naming import Results, differing, labels, title
from errata.benchmarks.runs import summary
from errata.benchmarks.runs.json_values import digest, number
from errata.benchmarks.runs.results import read_records, read_results
from errata.benchmarks.runs.run_folder import RECORDS, RESULTS, folder_of_runs
from errata.editors.core.config import did_you_mean
from errata.editors.core.errors import ConfigError
from errata.evaluate import metrics
from errata.evaluate.paired import Difference, difference, holm_adjusted

DAMAGE = "damage"
CaseValues = Mapping[str, metrics.Values]  # case id -> scoring -> metric -> value
# Of two runs that are compared: what may differ.
_APART = ("editor", "out", "device", "time_limit")
_DAMAGE_TITLES = (("perplexity", "Perplexity ratio, log"), ("drift", "Drift of neighbours, nats"))


@dataclasses.dataclass(frozen=True)
class PairedRow:
    """One metric under one scoring: each run's mean, and the paired difference b - a. `not_finite`: how many cases of
    each run have no finite value; the means are those of the others, NaN without any."""

    scoring: str
    metric: str
    a: float
    b: float
    not_finite: tuple[int, int]
    difference: Difference
    p_holm: float

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two runs, what differs in their settings as {name: (a's, b's)}, and a row for everything both measured."""

    title: str
    labels: tuple[str, str]
    folders: tuple[str, str]
    cases: int
    settings: Mapping[str, tuple[Any, Any]]
    confidence: float
    rows: Sequence[PairedRow]

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**plain, "settings": dict(self.settings), "rows": [row.as_dict() for row in self.rows]}


def compare(a: Path, b: Path) -> Comparison:
    """Every metric that both runs have, with a paired bootstrap interval and a paired test.

    Args:
        a, b: Folders of finished runs.

    Returns:
        Differences are b - a, over cases. Intervals have a's confidence. `p_holm` allows for the number of rows.

    Raises:
        ConfigError: a folder without results, or runs that differ in model, dataset or cases.
    """
    runs = read_results(a / RESULTS), read_results(b / RESULTS)
    refuse_unlike(*runs)
    records = [{r["case"]: r for r in read_records(folder / RECORDS)} for folder in (a, b)]
    refuse_other_cases(*records)
    values = [{case: values_of(record) for case, record in found.items()} for found in records]
    config = runs[0]["config"]
    found = list(_differences(*values, seed=config["seed"], confidence=config["confidence"]))
    adjusted = holm_adjusted([entry.p for *_, entry in found])
    rows = [PairedRow(*entry, p_holm=p) for entry, p in zip(found, adjusted, strict=True)]
    one, other = labels(runs)
    return Comparison(
        title=title(runs[0]),
        labels=(one, other),
        folders=(str(a), str(b)),
        cases=len(records[0]),
        settings={name: (values[0], values[1]) for name, values in differing(runs).items()},
        confidence=config["confidence"],
        rows=rows,
    )


def refuse_unlike(a: Results, b: Results) -> None:
    """Raise where two runs had not the same model, dataset and cases."""
    for name in ("model", "dataset"):
        if a["names"][name] != b["names"][name]:
            _refuse(f"their {name}s are {a['names'][name]!r} and {b['names'][name]!r}")
    for name, what in (("model", "the weights of their models"), ("cases", "their cases")):
        if a["digests"][name] != b["digests"][name]:
            of = [f"{run['counts']['edits']} edits, seed {run['config']['seed']}" for run in (a, b)]
            _refuse(f"{what} differ" + (f" ({of[0]}; {of[1]})" if name == "cases" else ""))


def refuse_other_cases(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Raise where records are not of the same cases with the same probes: {case id: record}."""
    if only := sorted(a.keys() ^ b.keys()):
        _refuse(f"{len(only)} cases are in one of them alone, such as {only[0]!r}")
    for case, record in a.items():
        asked = [[(p["kind"], p["prompt"], p["target"], p["other"]) for p in r["probes"]] for r in (record, b[case])]
        if asked[0] != asked[1]:
            _refuse(f"case {case!r} was asked other things")


def _refuse(reason: str) -> None:
    raise ConfigError(f"the two runs cannot be compared: {reason}; give runs over the same cases of one model")


def values_of(record: Mapping[str, Any]) -> metrics.Values:
    """What a case was given under every scoring, and the damage of its edit; what is not finite of it as infinite."""
    values = metrics.case_values(summary.outcomes(record))
    ratio, drift = summary.perplexity_ratio(record), record["neighborhood_kl"]
    damage: dict[str, float] = {}
    if ratio is not None and not record.get("sequence"):
        damage["perplexity"] = math.log(ratio)
    if drift is not None:
        damage["drift"] = number(drift) if math.isfinite(number(drift)) else math.inf
    return {**values, DAMAGE: damage}


def _differences(
    a: CaseValues, b: CaseValues, *, seed: int, confidence: float
) -> Iterator[tuple[str, str, float, float, tuple[int, int], Difference]]:
    """Scoring, metric, means, what is not finite, and the difference, of everything that both measured of the same
    cases."""
    for scoring, metric in measures():
        pairs = paired(a, b, scoring, metric)
        if pairs:
            one, other = zip(*pairs, strict=True)
            some = [finite(one), finite(other)]
            mean_a, mean_b = (fmean(found) if found else math.nan for found in some)
            missing = (len(one) - len(some[0]), len(other) - len(some[1]))
            found = difference(one, other, seed=seed, confidence=confidence)
            yield scoring, metric, mean_a, mean_b, missing, found


def finite(values: Iterable[float]) -> list[float]:
    """Those that can be averaged."""
    return [value for value in values if math.isfinite(value)]


def measures() -> list[tuple[str, str]]:
    """Scorings and metrics in the order in which they are shown."""
    shares = itertools.product((name for name, _ in PROTOCOL_TITLES), (name for name, _ in METRIC_TITLES))
    return [*shares, *((DAMAGE, name) for name, _ in _DAMAGE_TITLES)]


def metric_title(row: PairedRow) -> str:
    """How a row's metric is called where it is shown."""
    return dict((*METRIC_TITLES, *_DAMAGE_TITLES))[row.metric].replace("\n", " ")


def paired(a: CaseValues, b: CaseValues, scoring: str, metric: str) -> list[tuple[float, float]]:
    """Values of the cases for which both have this one."""
    values = [(a[case].get(scoring, {}).get(metric), b[case].get(scoring, {}).get(metric)) for case in a if case in b]
    return [(one, other) for one, other in values if one is not None and other is not None]


# --- which runs are meant -----------------------------------------------------------------------------------------


def pairs(words: Sequence[str]) -> list[tuple[Path, Path]]:
    """The runs that `errata compare` is given: two folders; or a folder of runs and two methods, and then every pair of
    them in it over the same model, dataset and protocol.

    Raises:
        ConfigError: another number of words, no such folder, a method without a run, or nothing to pair.
    """
    if len(words) == 2:
        return [(_run(words[0]), _run(words[1]))]
    if len(words) != 3:
        raise ConfigError(f"expected RUN RUN, or FOLDER METHOD METHOD, got {len(words)} words")
    root, *names = words
    found: dict[str, list[tuple[Path, Results]]] = {}
    for path in sorted(folder_of_runs(root).rglob(RESULTS)):
        results = read_results(path)
        found.setdefault(results["names"]["editor"], []).append((path.parent, results))
    for name in names:
        if name not in found:
            raise ConfigError(f"no finished run of {name!r} in {root}{did_you_mean(name, sorted(found))}")
    matched = [
        (one, other)
        for (one, a), (other, b) in itertools.product(found[names[0]], found[names[1]])
        if one != other and _like(a) == _like(b)
    ]
    if not matched:
        raise ConfigError(
            f"no run of {names[0]} and run of {names[1]} in {root} differ in the method alone; give the two folders"
        )
    return matched


def _run(folder: str) -> Path:
    if not (Path(folder) / RESULTS).is_file():
        raise ConfigError(f"expected the folder of a finished run, got {folder!r}, which has no {RESULTS}")
    return Path(folder)


def _like(results: Results) -> str:
    """What two runs must have in common to be a pair: all but the method, its settings, where and how long it ran."""
    config = {name: value for name, value in results["config"].items() if name not in _APART}
    return digest([config, results["digests"]["model"], results["digests"]["cases"]])
