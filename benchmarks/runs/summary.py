"""From records to the numbers of a run: a pure function of records.jsonl.

A refused single edit left its model untouched: it counts with the untouched model's answers, and in the damage with
what its record says of that model, a perplexity ratio of 1, no drift and the untouched retention. In a sequence it is
scored like the others, on the model as it stands.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from errata.benchmarks.runs.json_values import number
from errata.editors.core.doubts import MEANINGS
from errata.evaluate import metrics
from errata.evaluate.collapse import ngram_entropy
from errata.evaluate.metrics import Outcome
from errata.evaluate.probes import Probe, kinds
from errata.evaluate.scoring import ProbeScore

# An edit that multiplies the perplexity of plain text by more than this, or loses more of the known facts of other
# subjects than it keeps, has disabled its model.
DISABLING_PERPLEXITY = 2.0
DISABLING_RETENTION = 0.5
# ROME, MEMIT and their successors score zsRE by teacher-forced accuracy, and CounterFact by comparing probabilities.
# Other benchmarks are scored as their authors do, or by what is nearest to it (docs/benchmarks.md).
_PAPERS_SCORING: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("zsre", "world_zsre", "knowedit", "wikibigedit", "ultraeditbench", "fever"), "teacher_forced"),
        **dict.fromkeys(("mquake", "akew"), "generation"),
        **dict.fromkeys(("rippleedits", "qaedit", "hallueditbench"), "generation_containment"),
        "unke": "teacher_forced",
    }
)
_PAPERS_NAMES = (
    ("reliability", "efficacy"),
    ("generalization", "paraphrase"),
    ("locality", "specificity"),
    ("distracting_locality", "distracting_specificity"),
)

Record = Mapping[str, Any]
Moment = Literal["before", "after"]


@dataclass(frozen=True)
class Summary:
    """Tables after and before the edits, the damage done, and what was counted."""

    after: metrics.Summary
    before: metrics.Summary
    papers: dict[str, Any]
    collapse: dict[str, Any]
    counts: dict[str, int]
    failures: list[dict[str, Any]]


def summarise(
    records: Sequence[Record], *, dataset: str = "counterfact", confidence: float = 0.95, seed: int = 0
) -> Summary:
    """Tables with bootstrap intervals over cases; the mean over a case's probes is its value.

    Args:
        records: As a protocol wrote them.
        dataset: Whose papers' names and scoring `Summary.papers` has.
        confidence: Of the intervals.
        seed: Of the bootstrap.
    """
    failed = [record for record in records if record["status"] == "failed"]
    counts = {
        "edits": len(records),
        "failed": len(failed),
        "undone": sum(record["status"] == "undone" for record in records),
        "guard_tripped": sum(bool((record.get("guard") or {}).get("tripped")) for record in records),
        "foretold_disabling": sum(bool(record["warnings"]) for record in records),
        "disabling": sum(map(is_disabling, records)),
    }
    failures = [{"case": record["case"], "reason": record["reason"]} for record in failed]
    cases = [metrics.case_values(outcomes(record)) for record in records]
    after = metrics.summarise(cases, seed=seed, confidence=confidence)
    before = _before(records, confidence, seed)
    papers = _papers(cases, after, dataset, confidence, seed)
    return Summary(after, before, papers, _collapse(records), counts, failures)


def intervals(records: Sequence[Record], *, confidence: float, seed: int) -> dict[str, dict[str, Any]]:
    """Return {interval: edits and the tables after them} of cases that are of an interval of time, in its order."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if "interval" in record:
            found.setdefault(record["interval"], []).append(record)
    return {
        name: {
            "edits": len(own),
            "summary": metrics.summarise(
                [metrics.case_values(outcomes(record)) for record in own], seed=seed, confidence=confidence
            ),
        }
        for name, own in sorted(found.items())
    }


def doubted(records: Sequence[Record]) -> dict[str, int]:
    """Count the edits by the signs in their reports that they will not hold or do damage (editors/core/doubts.py)."""
    found = Counter(name for record in records for name in record["diagnostics"].get("doubts", ()))
    return {name: found[name] for name in MEANINGS if found[name]}


def papers_scoring(dataset: str) -> str:
    """Return the scoring under which the papers report a dataset."""
    return _PAPERS_SCORING.get(dataset, "probability")


def _papers(
    cases: Sequence[metrics.Values], after: metrics.Summary, dataset: str, confidence: float, seed: int
) -> dict[str, Any]:
    """Efficacy, paraphrase, specificity and their harmonic mean, under the papers' scoring."""
    scoring = papers_scoring(dataset)
    table = after.get(scoring, {})
    found: dict[str, Any] = {name: table[metric] for metric, name in _PAPERS_NAMES if metric in table}
    score = metrics.papers_score(cases, scoring, seed=seed, confidence=confidence)
    return {"scoring": scoring, **found, **({} if score is None else {"score": score.as_dict()})}


def curve(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Damage by edit, in the order of the edits."""
    names = ("key_ratio", "key_cosine", "update_norm", "update_ratio")
    return [
        {
            "edit": record["place"] + 1,
            "case": record["case"],
            "status": record["status"],
            "perplexity": record["perplexity"],
            "perplexity_ratio": perplexity_ratio(record),
            "neighborhood_kl": record["neighborhood_kl"],
            "retention": record["retention"],
            "disabling": is_disabling(record),
            **{name: record["diagnostics"].get(name) for name in names},
            **metrics.case_values(outcomes(record)).get("probability", {}),
        }
        for record in sorted(records, key=lambda record: record["place"])
    ]


def perplexity_ratio(record: Record) -> float | None:
    """Perplexity after the edit over that before. NaN counts as infinite; None where it was not measured, or where the
    untouched model's is not finite and nothing can be told from it."""
    after, before = record["perplexity"], record["perplexity_before"]
    if after is None or before is None or not math.isfinite(number(before)):
        return None
    ratio = number(after) / number(before)
    return math.inf if math.isnan(ratio) else ratio


def is_disabling(record: Record) -> bool:
    """Whether this one edit more than doubled the perplexity of plain text, or lost most facts of other subjects. In a
    sequence no one can tell which edit did."""
    if record.get("sequence"):
        return False
    ratio, kept = perplexity_ratio(record), record["retention"]
    return (ratio is not None and ratio > DISABLING_PERPLEXITY) or (kept is not None and kept < DISABLING_RETENTION)


def took(record: Record) -> bool:
    """Return whether an edit is on the model and gives its new answers at least even odds per token (geometric mean).

    Comparing probabilities asks for less: there an answer passes that is merely more probable than the old one.
    """
    losses = [
        probe["after"]["nll_target"] for probe in record["probes"] if probe["kind"] == "rewrite" and probe["after"]
    ]
    return record["status"] == "ok" and all(loss is None or number(loss) <= math.log(2) for loss in losses)


# What a method reports of its key that explains a disabling edit (see editors/rome.py).
_KEY = ("key_cosine", "key_ratio", "denominator")


def disabled(record: Record) -> dict[str, Any]:
    """For the record of a single edit: whether it disabled the model, and if so by what: the damage, and the key that
    the method divided by."""
    if not is_disabling(record):
        return {"disabling": False, "disabling_reason": None}
    damage = {"perplexity_ratio": perplexity_ratio(record), "retention": record["retention"]}
    key = {name: record["diagnostics"][name] for name in _KEY if name in record["diagnostics"]}
    return {"disabling": True, "disabling_reason": {**damage, **key}}


def outcomes(record: Record, moment: Moment = "after") -> list[Outcome]:
    """Return a record's probes as measured before or after the edit; after a refused edit, as before it.

    There is one for each of `installed_probes`, in their order.
    """
    return [
        Outcome(
            Probe.of(entry),
            _score(entry[moment] or entry["before"]),
            _score(entry["before"]),
            (entry[moment] or entry["before"])["text"],
            entry["before"]["text"],
            _score(entry["between"]) if "between" in entry and moment == "after" else None,
            (entry[moment] or entry["before"]).get("wild"),
            entry["before"].get("wild"),
            (entry[moment] or entry["before"]).get("measured", {}),
            _score(entry["by_itself"]) if "by_itself" in entry and moment == "after" else None,
        )
        for entry in installed_probes(record)
    ]


def installed_probes(record: Record) -> list[Mapping[str, Any]]:
    """Return a record's probes without those of a kind whose package is not installed here: no metric is over them."""
    known = kinds()
    return [entry for entry in record["probes"] if entry["kind"] in known]


def _score(said: Mapping[str, Any]) -> ProbeScore:
    target, other = (None if said[name] is None else number(said[name]) for name in ("nll_target", "nll_other"))
    return ProbeScore(
        nll_target=target,
        nll_other=other,
        target_correct=tuple(said["target_correct"]),
        other_correct=tuple(said["other_correct"]),
        target_choice=tuple(said["target_choice"]),
    )


def _before(records: Sequence[Record], confidence: float, seed: int) -> metrics.Summary:
    cases = [metrics.case_values(outcomes(record, "before")) for record in records]
    return metrics.summarise(cases, seed=seed, confidence=confidence)


def _collapse(records: Sequence[Record]) -> dict[str, Any]:
    """Damage over all edits. Perplexities are averaged as perplexities are, by their logarithms."""
    before = next((record["perplexity_before"] for record in records), None)
    ratios = [ratio for ratio in map(perplexity_ratio, records) if ratio is not None]
    drifts = [number(r["neighborhood_kl"]) for r in records if r["neighborhood_kl"] is not None]
    kept = [r["retention"] for r in records if r["retention"] is not None]
    mean = math.exp(math.fsum(map(math.log, ratios)) / len(ratios)) if ratios else None
    return {
        "perplexity_before": before,
        "perplexity_after": None if mean is None else number(before) * mean,
        "perplexity_ratio": mean,
        "perplexity_ratio_worst": max(ratios, default=None),
        "neighborhood_kl": math.fsum(drifts) / len(drifts) if drifts else None,
        "retention": math.fsum(kept) / len(kept) if kept else None,
        "fluency_before": _fluency(records, "before"),
        "fluency_after": _fluency(records, "after"),
    }


def writing(records: Sequence[Record], *, confidence: float, seed: int) -> dict[str, metrics.Summary]:
    """Return {moment: {"papers": {fluency, consistency}}} of the texts behind open prompts, in the papers' form.

    A refused edit counts as the untouched model's texts. It is empty of runs that did not measure it.
    """
    found: dict[str, metrics.Summary] = {}
    for moment in ("before", "after"):
        values = [{"papers": r["writing"][moment]} for r in records if moment in r.get("writing", {})]
        if values:
            found[moment] = metrics.summarise(values, seed=seed, confidence=confidence)
    return found


def _fluency(records: Sequence[Record], moment: Moment) -> float | None:
    """Mean n-gram entropy of the texts behind open prompts, in bits; None of texts in the papers' form (`writing`)."""
    if any("writing" in record for record in records):
        return None
    probes = (probe for record in records for probe in record["probes"] if probe["kind"] == "generation")
    texts = [(probe[moment] or probe["before"])["text"] for probe in probes]
    entropies = [ngram_entropy(text) for text in texts if text is not None]
    return math.fsum(entropies) / len(entropies) if entropies else None
