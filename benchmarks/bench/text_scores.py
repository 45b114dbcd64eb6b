"""What is measured on the texts of a record before it is written: verdicts, overlap, fluency and consistency.

A record then holds these numbers, so that a report needs neither the judge nor the libraries. Verdicts are also kept in
the run's folder (verdicts.jsonl), by a digest of what was judged, so that a run that goes on asks for none again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from errata.benchmarks.bench.config import BenchConfig
from errata.benchmarks.datasets.references import References
from errata.benchmarks.runs.json_values import digest
from errata.evaluate import judging, overlap
from errata.evaluate.judging import Claim, Judge
from errata.evaluate.open_texts import papers_fluency
from errata.evaluate.probes import Case, Probe

VERDICTS = "verdicts.jsonl"
Moment = Literal["before", "after"]
MOMENTS: tuple[Moment, ...] = ("before", "after")
Record = dict[str, Any]


@dataclass
class Verdicts:
    """A judge that is asked about each claim once.

    Attributes:
        name: Of the judge.
        judge: It.
        known: {digest of a claim: verdict}.
        keep: Called with what to write down of each new verdict.
    """

    name: str
    judge: Judge
    known: dict[str, bool] = field(default_factory=dict)
    keep: Callable[[dict[str, Any]], object] = lambda _: None

    def of(self, claims: Sequence[Claim]) -> list[bool]:
        """Return the verdict on each claim."""
        keys = [digest([self.name, claim.question, list(claim.answers), claim.text]) for claim in claims]
        new = {key: claim for key, claim in zip(keys, claims, strict=True) if key not in self.known}
        if new:
            for key, verdict in zip(new, judging.verdicts(self.judge, self.name, list(new.values())), strict=True):
                self.known[key] = verdict
                self.keep({"claim": key, "verdict": verdict})
        return [self.known[key] for key in keys]


@dataclass(frozen=True)
class TextScores:
    """Measures the texts of records.

    Attributes:
        config: Of the run.
        cases: By their ids.
        verdicts: What a judge says; None without a judge.
        references: Texts for consistency; None: it is left out.
    """

    config: BenchConfig
    cases: Mapping[str, Case]
    verdicts: Verdicts | None = None
    references: References | None = None

    def completed(self, record: Record) -> Record:
        """Return a record with what is measured on its texts; the same where nothing is."""
        measured = [self._measured(entry) for entry in record["probes"]]
        probes = [
            {**entry, **{m: {**entry[m], "measured": entry[m].get("measured", {}) | own[m]} for m in MOMENTS if own[m]}}
            for entry, own in zip(record["probes"], measured, strict=True)
        ]
        writing = self._writing(record) if self.config.generation.fluency == "papers" else {}
        return {**record, "probes": probes, **({"writing": writing} if writing else {})}

    def _measured(self, entry: Mapping[str, Any]) -> dict[Moment, dict[str, float]]:
        """Return shares by scoring of a probe's texts, before and after."""
        found: dict[Moment, dict[str, float]] = {moment: {} for moment in MOMENTS}
        spellings = Probe.of(entry).answers
        said: dict[Moment, Any] = {moment: entry[moment] for moment in MOMENTS if entry[moment] is not None}
        if len(spellings) != 1:
            return found
        if self.config.generation.overlap:
            for moment, own in said.items():
                if own["text"] is not None:
                    found[moment]["bleu"] = overlap.bleu(own["text"], spellings[0])
                    found[moment]["rouge_l"] = overlap.rouge_l(own["text"], spellings[0])
        judged: list[Moment] = [moment for moment, own in said.items() if own.get("wild") is not None]
        if self.verdicts is not None and judged:
            claims = [Claim(entry["prompt"], spellings[0], said[moment]["wild"]) for moment in judged]
            for moment, verdict in zip(judged, self.verdicts.of(claims), strict=True):
                found[moment]["wild_judged"] = float(verdict)
        return found

    def _writing(self, record: Record) -> dict[Moment, dict[str, float]]:
        """Return fluency and consistency of the texts behind a case's open prompts."""
        found: dict[Moment, dict[str, float]] = {}
        for moment in MOMENTS:
            said = [(e["prompt"], e[moment] or e["before"]) for e in record["probes"] if e["kind"] == "generation"]
            texts = [_whole(prompt, own["text"]) for prompt, own in said if own["text"] is not None]
            fluency = papers_fluency(texts)
            if fluency is not None:
                found[moment] = {"fluency": fluency}
                reference = self.references and self.references.about_answer(self.cases[record["case"]].reference)
                if self.references is not None and reference:
                    found[moment]["consistency"] = 100 * self.references.tf_idf.cosine(" ".join(texts), reference)
        return found


def _whole(prompt: str, text: str) -> str:
    """Return a prompt with its text. Some tokenizers leave out the space with which a text begins."""
    return f"{prompt} {text}" if text[:1].isalnum() else f"{prompt}{text}"
