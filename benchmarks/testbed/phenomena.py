"""What the papers saw, on testbeds: `python -m errata.benchmarks.testbed.phenomena --models DIR DIR --out DIR`.

For each testbed two groups of single edits, from the half of the subjects that no setting was chosen on:

    first       subjects of one token that stand first in the prompt
    elsewhere   all others

and for each method: how many edits disable the model, the cosine of the key of the bare prompt (k_0) with the mean key
over contexts (k_avg), the ratio (k_0 . u) / (k_avg . u), and the size of the updates. Then edits in sequence, with
perplexity and retention (recall of facts whose subject was never edited) at checkpoints, and their rank correlation.

References: Gupta et al. 2024 (disabling edits, r-ROME); Yang et al. 2024 (perplexity as a witness, C-ROME).
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from errata import editors
from errata.benchmarks.testbed import measure
from errata.benchmarks.testbed.bundle import open_model
from errata.benchmarks.testbed.cases import (
    Split,
    elsewhere_cases,
    first_position_cases,
    known_facts_by_subject,
)
from errata.benchmarks.testbed.files import BUNDLED, read_lines, write_json
from errata.benchmarks.testbed.measure import Question
from errata.benchmarks.testbed.wording import behind_a_sentence
from errata.benchmarks.testbed.world_generator import share
from errata.editors.core.edit import Edit
from errata.editors.core.editor import Editor
from errata.editors.core.errors import DisablingEditWarning
from errata.evaluate.probes import Case

logger = logging.getLogger(__name__)

METHODS = ("rome", "r_rome", "c_rome")
SEQUENCE_METHODS = ("rome", "r_rome", "memit", "alphaedit")
RETAINED, TEXTS = 40, 20
"""Facts of other subjects asked, and held-out texts read, after every edit."""


@dataclass(frozen=True)
class ProbedModel:
    """A testbed opened for experiments."""

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prose: tuple[str, ...]
    known: dict[str, list[Question]]
    """Known facts by subject, each asked once behind a sentence."""

    @staticmethod
    def open(folder: Path) -> ProbedModel:
        """Open a testbed's folder."""
        model, tokenizer = open_model(folder)
        known = {
            subject: [Question(probe.prompt, str(probe.target)) for probe in probes]
            for subject, probes in known_facts_by_subject(folder).items()
        }
        return ProbedModel(folder, model, tokenizer, tuple(read_lines(folder / "heldout.jsonl.gz")), known)

    def editor(self, method: str, **overrides: Any) -> Editor:
        """A method with the folder's own settings, some of them overridden."""
        chosen = editors.get(method)
        editor = chosen(self.model, self.tokenizer)
        if not overrides:
            return editor
        return chosen(self.model, self.tokenizer, chosen.Config.from_dict(editor.config.to_dict() | overrides))

    def others(self, edited: Sequence[str], key: str, count: int) -> list[Question]:
        """Known facts of subjects that were not edited, the same ones for the same key."""
        pool = [question for subject, asked in self.known.items() if subject not in set(edited) for question in asked]
        return sorted(pool, key=lambda question: share(f"{key} {question.prompt}"))[:count]

    def retention(self, edited: Sequence[str], key: str, count: int = RETAINED) -> float:
        """Exact recall of facts whose subjects are not among the edited."""
        return fmean(measure.correct(self.model, self.tokenizer, self.others(edited, key, count)))

    def perplexity(self, count: int = TEXTS) -> float:
        """Perplexity of held-out prose about the world."""
        return measure.perplexity(self.model, self.tokenizer, self.prose[:count])


@dataclass(frozen=True)
class EditDamage:
    """What one edit did: shares of right answers, and what it took."""

    case: str
    bare: float
    """The new object at the edited prompt."""
    behind: float
    """The new object at the edited prompt behind a sentence."""
    paraphrase: float
    neighborhood: float
    portability: float | None
    """The new two-hop answers; None where no two-hop question hangs on the edited fact."""
    retention: float
    perplexity: float
    key_cosine: float
    key_ratio: float
    update_ratio: float
    """||dW|| / ||W||."""


def single_edits(patient: ProbedModel, editor: Editor, cases: Sequence[Case]) -> list[EditDamage]:
    """Each case edited alone, on the untouched model."""
    with _unwarned():
        edits = editor.compute([case.request for case in cases])
    outcomes = []
    for case, edit in zip(cases, edits, strict=True):
        with edit.applied():
            outcomes.append(_outcome(patient, case, edit))
    return outcomes


def _outcome(patient: ProbedModel, case: Case, edit: Edit) -> EditDamage:
    def asked(kind: str) -> list[Question]:
        return [Question(probe.prompt, str(probe.target)) for probe in case.probes if probe.kind == kind]

    rewrite = asked("rewrite")
    behind = [Question(behind_a_sentence(question.prompt), question.answer) for question in rewrite]
    groups = [rewrite, behind, asked("paraphrase"), asked("neighborhood")]
    groups += [patient.others([case.request.given_subject], case.id, RETAINED), asked("portability")]
    right = iter(
        measure.correct(patient.model, patient.tokenizer, [question for group in groups for question in group])
    )
    bare, after, paraphrase, neighborhood, retention, portability = (
        fmean(next(right) for _ in group) if group else None for group in groups
    )
    (report,) = edit.diagnostics
    return EditDamage(
        case=case.id,
        bare=bare or 0.0,
        behind=after or 0.0,
        paraphrase=paraphrase or 0.0,
        neighborhood=neighborhood or 0.0,
        portability=portability,
        retention=retention or 0.0,
        perplexity=patient.perplexity(),
        key_cosine=report["key_cosine"],
        key_ratio=report["key_ratio"],
        update_ratio=report["update_ratio"],
    )


def disabling(outcome: EditDamage, before: float) -> bool:
    """Whether an edit disabled the model: other subjects' facts below half, or the perplexity more than doubled.

    Args:
        before: the untouched model's perplexity.
    """
    return outcome.retention < 0.5 or outcome.perplexity > 2 * before


def summary(outcomes: Sequence[EditDamage], before: float) -> dict[str, float | None]:
    """The figures of one method on one group of cases."""
    followed = [o.portability for o in outcomes if o.portability is not None]
    return {
        "edits": len(outcomes),
        "disabling": sum(disabling(outcome, before) for outcome in outcomes),
        "reliability": fmean(o.bare for o in outcomes),
        "reliability_behind": fmean(o.behind for o in outcomes),
        "generalization": fmean(o.paraphrase for o in outcomes),
        "locality": fmean(o.neighborhood for o in outcomes),
        "portability": fmean(followed) if followed else None,
        "retention": fmean(o.retention for o in outcomes),
        "key_cosine_median": median(o.key_cosine for o in outcomes),
        "key_ratio_median": median(o.key_ratio for o in outcomes),
        "update_ratio_median": median(o.update_ratio for o in outcomes),
        "update_ratio_max": max(o.update_ratio for o in outcomes),
        "perplexity_before": before,
        "perplexity_median": median(o.perplexity for o in outcomes),
        "perplexity_max": max(o.perplexity for o in outcomes),
    }


def chosen_cases(folder: Path, count: int, split: Split = "test") -> dict[str, list[Case]]:
    """`count` cases of each group, in an order that their ids decide."""
    groups = {
        "first": first_position_cases(folder, split=split),
        "elsewhere": elsewhere_cases(folder, split=split),
    }
    return {name: sorted(found, key=lambda case: share(f"draw {case.id}"))[:count] for name, found in groups.items()}


def sequence(
    patient: ProbedModel, method: str, cases: Sequence[Case], every: int, facts: int = 120
) -> list[dict[str, float]]:
    """Return perplexity and retention of never-edited subjects before and during edits on top of each other.

    The cases' own subjects are never asked, so that one set of facts serves all checkpoints.
    """
    edited = [case.request.given_subject for case in cases]
    editor = patient.editor(method)
    points: list[dict[str, float]] = []

    def note(done: int) -> None:
        kept = patient.retention(edited, "sequence", facts)
        points.append({"edits": done, "perplexity": patient.perplexity(100), "retention": kept})

    applied: list[Edit] = []
    try:
        note(0)
        for done, case in enumerate(cases, 1):
            with _unwarned():
                applied.append(editor.apply(case.request))
            if done % every == 0:
                note(done)
    finally:
        for edit in reversed(applied):
            edit.undo()
    return points


def rank_correlation(points: Sequence[dict[str, float]]) -> float:
    """Spearman's correlation of perplexity with retention over checkpoints."""
    from scipy.stats import spearmanr

    found: Any = spearmanr([p["perplexity"] for p in points], [p["retention"] for p in points])
    return float(found.statistic)


def examine(folder: Path, count: int, sequence_edits: int) -> dict[str, Any]:
    """All phenomena of one testbed, as JSON values."""
    patient = ProbedModel.open(folder)
    before = patient.perplexity()
    groups = chosen_cases(folder, count)
    found: dict[str, Any] = {"model": folder.name, "known": sum(map(len, patient.known.values())), "single": {}}
    for method in METHODS:
        editor = patient.editor(method)
        for group, cases in groups.items():
            outcomes = single_edits(patient, editor, cases)
            logger.info("%s %s %s: %s", folder.name, method, group, summary(outcomes, before))
            found["single"].setdefault(group, {})[method] = {
                "summary": summary(outcomes, before),
                "outcomes": [asdict(outcome) for outcome in outcomes],
            }
    if sequence_edits:
        cases = elsewhere_cases(folder, split="test")
        cases = sorted(cases, key=lambda case: share(f"sequence {case.id}"))[:sequence_edits]
        every = max(1, sequence_edits // 10)
        curves = {method: sequence(patient, method, cases, every) for method in SEQUENCE_METHODS}
        points = [point for curve in curves.values() for point in curve]
        found["sequence"] = {"curves": curves, "spearman": rank_correlation(points)}
    return found


COLUMNS = (
    "edits",
    "disabling",
    "reliability",
    "reliability_behind",
    "generalization",
    "locality",
    "portability",
    "retention",
    "key_cosine_median",
    "key_ratio_median",
    "update_ratio_median",
    "update_ratio_max",
    "perplexity_median",
    "perplexity_max",
)


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """The findings as a table, one line for each testbed, group and method."""
    lines = ["| testbed | group | method | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 3) + "|"]
    for testbed in found:
        for group, methods in testbed["single"].items():
            for method, result in methods.items():
                cells = [_cell(result["summary"].get(column)) for column in COLUMNS]
                lines.append(f"| {testbed['model']} | {group} | {method} | " + " | ".join(cells) + " |")
    for testbed in found:
        if "sequence" in testbed:
            lines += [
                "",
                f"{testbed['model']}: Spearman of perplexity with retention {testbed['sequence']['spearman']:.2f}",
            ]
            for method, curve in testbed["sequence"]["curves"].items():
                end = curve[-1]
                figures = f"retention {end['retention']:.2f}, perplexity {end['perplexity']:.2f}"
                lines.append(f"- {method}, after {end['edits']:.0f} edits: {figures}")
    return "\n".join(lines) + "\n"


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


@contextmanager
def _unwarned() -> Iterator[None]:
    """Disabling edits are what is counted here: no warning of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DisablingEditWarning)
        yield


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="errata.benchmarks.testbed.phenomena", description="What the testbed shows.")
    parser.add_argument("--models", type=Path, nargs="+", default=[BUNDLED], help="testbed folders")
    parser.add_argument("--cases", type=int, default=40, help="single edits in each group")
    parser.add_argument("--sequence", type=int, default=50, help="edits in sequence; 0 for none")
    parser.add_argument("--out", type=Path, required=True, help="folder for phenomena.json and phenomena.md")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    found = [examine(folder, chosen.cases, chosen.sequence) for folder in chosen.models]
    chosen.out.mkdir(parents=True, exist_ok=True)
    write_json(chosen.out / "phenomena.json", found, indent=1)
    (chosen.out / "phenomena.md").write_text(markdown(found), encoding="utf-8")
    logging.getLogger(__name__).info("%s", json.dumps([str(path) for path in sorted(chosen.out.iterdir())]))


if __name__ == "__main__":
    main()
