"""Compare two finished runs over the same cases, case by case: `errata compare A B`.

    found = compare(Path("runs/rome-..."), Path("runs/r_rome-..."))
    found.rows[0].metric, found.rows[0].difference.mean, found.rows[0].p_holm

It compares the records of the runs; nothing is run again. Two runs with other models, datasets or cases are refused,
with the reason. Two methods that were each run with several seeds are compared once: the value of a case is its mean
over the seeds that have it, and the means of the methods come with their standard deviation between seeds.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from errata.benchmarks.reports import glossary
from errata.benchmarks.reports.naming import Results, differing, labels, ordered, replicate_key, shared_method, title
from errata.benchmarks.reports.seeds import mean_and_deviation, mean_values
from errata.benchmarks.runs import priming_summary, summary
from errata.benchmarks.runs.json_values import digest, number
from errata.benchmarks.runs.results import read_records, read_results
from errata.benchmarks.runs.run_folder import RECORDS, RESULTS, folder_of_runs
from errata.editors.core.config import did_you_mean
from errata.editors.core.errors import ConfigError
from errata.evaluate import metrics
from errata.evaluate.paired import Difference, difference, holm_adjusted

DAMAGE = "damage"
CaseValues = Mapping[str, metrics.Values]  # case id -> scoring -> metric -> value
# Settings in which two runs of a pair may differ.
_APART = ("editor", "out", "device", "time_limit")
_DAMAGE_TITLES = (
    ("perplexity", "Perplexity ratio, log"),
    ("drift", "Drift of neighbours, nats"),
    ("memorization", "Memorization, log10"),
    ("priming", "Priming, log10"),
)


@dataclasses.dataclass(frozen=True)
class PairedRow:
    """One metric under one scoring: the mean of each run, and the paired difference b - a.

    Attributes:
        scoring, metric: What is compared.
        a, b: The means, NaN without a finite value; over several seeds, the means over seeds.
        not_finite: For each run, the number of cases without a finite value; the means leave them out.
        difference: Over the cases that both have.
        p_holm: Its p-value, adjusted for the number of rows.
        deviation: For each run, the standard deviation of its mean between seeds; None of a single seed.
    """

    scoring: str
    metric: str
    a: float
    b: float
    not_finite: tuple[int, int]
    difference: Difference
    p_holm: float
    deviation: tuple[float, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two runs, or two methods over the same seeds.

    Attributes:
        title: Model, dataset and protocol, after the method where both have the same.
        labels: What tells the two apart.
        folders: Of the two runs; over several seeds, of the first seed.
        cases: Number of cases.
        settings: {name: (a's, b's)} of the settings that differ.
        confidence: Of the intervals.
        rows: One for each scoring and metric that both measured.
        seeds: The number of seeds.
    """

    title: str
    labels: tuple[str, str]
    folders: tuple[str, str]
    cases: int
    settings: Mapping[str, tuple[Any, Any]]
    confidence: float
    rows: Sequence[PairedRow]
    seeds: int = 1

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**plain, "settings": dict(self.settings), "rows": [row.as_dict() for row in self.rows]}


def compare(a: Path, b: Path) -> Comparison:
    """Compare two runs: every metric that both have, with a paired bootstrap interval and a paired test.

    Args:
        a, b: Folders of finished runs.

    Returns:
        Differences are b - a, over cases. Intervals have a's confidence. `p_holm` allows for the number of rows.

    Raises:
        ConfigError: a folder without results, or runs that differ in model, dataset or cases.
    """
    return compare_seeds([(a, b)])


def compare_seeds(pairs: Sequence[tuple[Path, Path]]) -> Comparison:
    """Compare two methods over one or several seeds.

    Args:
        pairs: For each seed, the folders of the two runs, as `compare` takes them. All first runs differ in their seed
            alone, and so do all second ones.

    Returns:
        The comparison over the cases of all seeds. A case that several seeds have counts once, with its mean.

    Raises:
        ConfigError: as `compare`.
    """
    runs = [(read_results(a / RESULTS), read_results(b / RESULTS)) for a, b in pairs]
    each: list[tuple[CaseValues, CaseValues]] = []
    for (a, b), both in zip(pairs, runs, strict=True):
        refuse_unlike(*both)
        one, other = ({record["case"]: record for record in read_records(folder / RECORDS)} for folder in (a, b))
        refuse_other_cases(one, other)
        each.append((_values(one), _values(other)))
    values = [own[0] if len(own) == 1 else mean_values(own) for own in zip(*each, strict=True)]
    config, first = runs[0][0]["config"], runs[0]
    found = list(_differences(*values, seed=config["seed"], confidence=config["confidence"]))
    adjusted = holm_adjusted([entry.p for *_, entry in found])
    rows = [_over_seeds(PairedRow(*entry, p_holm=p), each) for entry, p in zip(found, adjusted, strict=True)]
    one, other = labels(first)
    return Comparison(
        title=", ".join(filter(None, (shared_method(first), title(first[0])))),
        labels=(one, other),
        folders=(str(pairs[0][0]), str(pairs[0][1])),
        cases=len(values[0]),
        settings={name: (values[0], values[1]) for name, values in differing(first).items()},
        confidence=config["confidence"],
        rows=rows,
        seeds=len(pairs),
    )


def _values(records: Mapping[str, Mapping[str, Any]]) -> CaseValues:
    return {case: values_of(record) for case, record in records.items()}


def _over_seeds(row: PairedRow, each: Sequence[tuple[CaseValues, CaseValues]]) -> PairedRow:
    """Return a row with its means over seeds and their deviations, where there are several seeds."""
    if len(each) == 1:
        return row
    means: list[list[float]] = [[], []]
    for both in each:
        pairs = paired(*both, row.scoring, row.metric)
        for index in (0, 1):
            if own := finite(pair[index] for pair in pairs):
                means[index].append(fmean(own))
    (a, spread_a), (b, spread_b) = (mean_and_deviation(own) if own else (math.nan, math.nan) for own in means)
    return dataclasses.replace(row, a=a, b=b, deviation=(spread_a, spread_b))


def refuse_unlike(a: Results, b: Results) -> None:
    """Raise an error if two runs had different models, datasets or cases."""
    for name in ("model", "dataset"):
        if a["names"][name] != b["names"][name]:
            _refuse(f"their {name}s are {a['names'][name]!r} and {b['names'][name]!r}")
    for name, what in (("model", "the weights of their models"), ("cases", "their cases")):
        if a["digests"][name] != b["digests"][name]:
            of = [f"{_edits(run['counts']['edits'])}, seed {run['config']['seed']}" for run in (a, b)]
            _refuse(f"{what} differ" + (f" ({of[0]}; {of[1]})" if name == "cases" else ""))


def refuse_other_cases(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Raise an error if records, {case id: record}, are not about the same cases with the same probes."""
    if only := sorted(a.keys() ^ b.keys()):
        _refuse(f"{_cases(len(only))} in one of them alone, such as {only[0]!r}")
    for case, record in a.items():
        asked = [[(p["kind"], p["prompt"], p["target"], p["other"]) for p in r["probes"]] for r in (record, b[case])]
        if asked[0] != asked[1]:
            _refuse(f"case {case!r} was asked other things")


def _edits(count: int) -> str:
    return "1 edit" if count == 1 else f"{count} edits"


def _cases(count: int) -> str:
    return "1 case is" if count == 1 else f"{count} cases are"


def _refuse(reason: str) -> None:
    raise ConfigError(f"the two runs cannot be compared: {reason}; give runs over the same cases of one model")


def values_of(record: Mapping[str, Any]) -> metrics.Values:
    """Return the values of a case under every scoring, and the damage of its edit; damage that is not finite is inf."""
    values = metrics.case_values(summary.outcomes(record))
    ratio, drift = summary.perplexity_ratio(record), record["neighborhood_kl"]
    damage: dict[str, float] = {}
    if ratio is not None and not record.get("sequence"):
        damage["perplexity"] = math.log(ratio)
    if drift is not None:
        damage["drift"] = number(drift) if math.isfinite(number(drift)) else math.inf
    return {**values, DAMAGE: {**damage, **priming_summary.values(record)}}


def _differences(
    a: CaseValues, b: CaseValues, *, seed: int, confidence: float
) -> Iterator[tuple[str, str, float, float, tuple[int, int], Difference]]:
    """Yield scoring, metric, means, the cases that are not finite, and the difference, for all that both measured."""
    measured = {metric for values in (a, b) for case in values.values() for table in case.values() for metric in table}
    for scoring, metric in measures(measured):
        pairs = paired(a, b, scoring, metric)
        if pairs:
            one, other = zip(*pairs, strict=True)
            some = [finite(one), finite(other)]
            mean_a, mean_b = (fmean(found) if found else math.nan for found in some)
            missing = (len(one) - len(some[0]), len(other) - len(some[1]))
            found = difference(one, other, seed=seed, confidence=confidence)
            yield scoring, metric, mean_a, mean_b, missing, found


def finite(values: Iterable[float]) -> list[float]:
    """Return the values that can be averaged."""
    return [value for value in values if math.isfinite(value)]


def measures(measured: Iterable[str]) -> list[tuple[str, str]]:
    """Return scorings and metrics in the order in which they are shown, those of damage last.

    Args:
        measured: Names of the metrics that any run has.
    """
    names = [name for name, _ in glossary.metric_titles(measured)]
    shares = itertools.product((name for name, _ in glossary.SCORING_TITLES), names)
    return [*shares, *((DAMAGE, name) for name, _ in _DAMAGE_TITLES)]


def metric_title(row: PairedRow) -> str:
    """Return the title of a row's metric."""
    return dict([*glossary.metric_titles([row.metric]), *_DAMAGE_TITLES])[row.metric]


def paired(a: CaseValues, b: CaseValues, scoring: str, metric: str) -> list[tuple[float, float]]:
    """Return pairs of values, one per case for which both have one."""
    values = [(a[case].get(scoring, {}).get(metric), b[case].get(scoring, {}).get(metric)) for case in a if case in b]
    return [(one, other) for one, other in values if one is not None and other is not None]


# --- which runs are meant -----------------------------------------------------------------------------------------


def pairs(words: Sequence[str]) -> list[tuple[Path, Path]]:
    """Return the runs that `errata compare` is given: two folders, or every pair of two methods in a folder of runs.

    One method, or none where all runs have the same, means every pair of settings of that method.

    The runs of a pair have model, dataset, cases and all settings outside the method in common. No pair comes twice.

    Raises:
        ConfigError: another number of words, no such folder, a method without a run, or nothing to pair.
    """
    return [pair for row in seed_pairs(words) for pair in row]


def seed_pairs(words: Sequence[str]) -> list[list[tuple[Path, Path]]]:
    """Return the pairs of `pairs` in lists: those of one list differ in their seed alone."""
    if len(words) == 2 and (Path(words[1]).is_dir() or (Path(words[0]) / RESULTS).is_file()):
        return [[(_run(words[0]), _run(words[1]))]]
    if not 1 <= len(words) <= 3:
        raise ConfigError(f"expected RUN RUN, or DIR METHOD METHOD, or DIR METHOD, got {len(words)} words")
    root, *names = words
    found: dict[str, list[tuple[Path, Results]]] = {}
    for path in sorted(folder_of_runs(root).rglob(RESULTS)):
        results = read_results(path)
        found.setdefault(results["names"]["editor"], []).append((path.parent, results))
    if not names and len(found) != 1:
        raise ConfigError(f"{root}: name the method or the two methods to compare: {', '.join(sorted(found))}")
    one, other = (names or list(found))[0], (names or list(found))[-1]
    for name in (one, other):
        if name not in found:
            raise ConfigError(f"no finished run of {name!r} in {root}{did_you_mean(name, sorted(found))}")
    matched = _matched(found[one], found[other], is_same=one == other)
    if not matched and one == other:
        raise ConfigError(f"no two runs of {one} in {root} differ in the settings of the method alone")
    if not matched:
        raise ConfigError(
            f"no run of {one} and run of {other} in {root} differ in the method alone; give the two folders"
        )
    return matched


Finished = tuple[Path, Results]


def _matched(ours: Sequence[Finished], theirs: Sequence[Finished], *, is_same: bool) -> list[list[tuple[Path, Path]]]:
    """Return the pairs of runs that differ in the method alone, together where they differ in their seed alone."""
    if is_same:
        # In the order of their settings, so that the pairs of all seeds run the same way.
        folders = {id(run): folder for folder, run in ours}
        inner = [(folders[id(run)], run) for run in ordered([run for _, run in ours])]
        couples = itertools.combinations(inner, 2)
    else:
        couples = itertools.product(ours, theirs)
    rows: dict[str, list[tuple[Path, Path]]] = {}
    for (one, a), (other, b) in couples:
        if one != other and _like(a) == _like(b):
            # The same seed twice is two runs, not two seeds.
            rows.setdefault(digest([replicate_key(a), replicate_key(b)]), []).append((one, other))
    found = []
    for row in rows.values():
        seeds = [read_results(one / RESULTS)["config"]["seed"] for one, _ in row]
        found += [row] if len(set(seeds)) == len(seeds) else [[pair] for pair in row]
    return found


def _run(folder: str) -> Path:
    if not (Path(folder) / RESULTS).is_file():
        raise ConfigError(f"expected the folder of a finished run, got {folder!r}, which has no {RESULTS}")
    return Path(folder)


def _like(results: Results) -> str:
    """Return a digest of all that the runs of a pair have in common: everything but the method, device and time."""
    config = {name: value for name, value in results["config"].items() if name not in _APART}
    return digest([config, results["digests"]["model"], results["digests"]["cases"]])
