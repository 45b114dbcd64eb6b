"""Only facts that the model knows, or only those that it does not: `dataset.known`.

Before the first edit the untouched model is asked the prompts of the edits, in the order of the cases: its greedy
continuation, as long as the run's free answers, holds the true answer or not, as `match_answer` has it. With
`probability` no text is written: the fact is known if its true answer is likelier than the edit's. As many are asked as
it takes to find `n_edits`, a group at a time; each group's answers are written down, and not asked again. Several ranks
share the cases of a group.

    known.jsonl     {"answers": [{"case", "answer", "text", "exact", "contained"}, ...]}, one line per group; with
                    `probability` {"case", "answer", "nll_true", "nll_new", "probability"}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from errata.benchmarks.bench.context import Bench
from errata.benchmarks.bench.measurements import fitting
from errata.benchmarks.datasets.json_records import Dropped, Loaded
from errata.benchmarks.runs.run_folder import RunFolder
from errata.editors.core import ranks
from errata.editors.core.contexts.asking import AskedPrompt, read_on
from errata.editors.core.errors import DatasetError
from errata.editors.core.request import EditRequest
from errata.evaluate.generation import generate, match_answer
from errata.evaluate.probes import Case, Probe
from errata.evaluate.scoring import score

ANSWERS = "known.jsonl"
PROBABILITY = "probability"  # value of `dataset.known`
# Cases that are asked together. Groups are cut by the index of a case, so that a resumed run asks the same groups.
_TOGETHER = 64
# Datasets whose edits teach the true answer where they state no other.
_TEACH_THE_TRUTH = ("zsre",)


@dataclasses.dataclass(frozen=True)
class KnownCases:
    """The cases that are edited, those that could not be asked, and how many were: `asked` is `known` and `unknown`."""

    loaded: Loaded
    asked: int
    known: int

    @property
    def counts(self) -> dict[str, int]:
        """As results.json has them."""
        return {"asked": self.asked, "known": self.known, "unknown": self.asked - self.known}


def choose_known(bench: Bench, folder: RunFolder, loaded: Loaded, take: Callable[[Loaded], Loaded]) -> KnownCases:
    """Ask the model until there are enough cases.

    Args:
        bench: On the untouched model, with `dataset.known` in its configuration.
        folder: Where the answers are, and are written down.
        loaded: The candidates.
        take: Of the cases found so far, those that one run can edit, at most `n_edits`.

    Raises:
        DatasetError: there are fewer than `n_edits`, or none.
    """
    config = bench.config
    wanted = config.dataset.known
    level = "contained" if wanted == "absent" else str(wanted)
    found, dropped, asked, known = [], [], 0, 0
    for group, answers, unfit in _asked(bench, folder, loaded.cases):
        dropped += unfit
        gives = _given(answers, level, any if wanted == "absent" else all)
        asked, known = asked + len(gives), known + sum(gives.values())
        found += [case for case in group if case.id in gives and gives[case.id] != (wanted == "absent")]
        if config.n_edits is not None and len(take(dataclasses.replace(loaded, cases=found)).cases) == config.n_edits:
            break
    taken = take(dataclasses.replace(loaded, cases=found, dropped=[*loaded.dropped, *dropped]))
    if not taken.cases or (config.n_edits is not None and len(taken.cases) < config.n_edits):
        raise DatasetError(
            f"expected {config.n_edits or 'some'} cases with dataset.known={wanted}, got {len(taken.cases)}: "
            f"of {asked} that were asked the model knows {known}",
            path=config.dataset.path,
        )
    return KnownCases(taken, asked, known)


def _asked(
    bench: Bench, folder: RunFolder, cases: Sequence[Case]
) -> Iterator[tuple[list[Case], list[dict[str, Any]], list[Dropped]]]:
    """Each group of cases with the model's answers and the cases that could not be asked."""
    written = folder.records(ANSWERS)
    for place, start in enumerate(range(0, len(cases), _TOGETHER)):
        group = list(cases[start : start + _TOGETHER])
        fit, unfit = fitting(dataclasses.replace(bench, cases=group))
        # Two answers are compared by their probabilities, so that a record has to state both.
        taught = "" if bench.config.dataset.known == PROBABILITY else bench.config.dataset.name
        truths = {case.id: _truths(case, taught) for case in fit.cases}
        unfit += [
            Dropped(name, "target_true", "has no true answer that the model could know")
            for name, truth in truths.items()
            if truth is None
        ]
        if place == len(written):
            bench.stop.check()
            asked = [(case, truth) for case in fit.cases if (truth := truths[case.id]) is not None]
            said = ranks.share_out(asked, partial(_answers, bench))
            written.append({"answers": [answer for answers in said for answer in answers]})
            folder.append(ANSWERS, written[-1])
            bench.stop.advanced()
        bench.progress(min(start + _TOGETHER, len(cases)), len(cases), "facts that the model may know")
        yield group, written[place]["answers"], unfit


def _given(answers: Sequence[dict[str, Any]], level: str, rule: Callable[[Iterable[bool]], bool]) -> dict[str, bool]:
    """Whether the model gives the true answers to the prompts of each case, all or any of them."""
    by_case: dict[str, list[bool]] = {}
    for answer in answers:
        by_case.setdefault(answer["case"], []).append(answer[level])
    return {case: rule(given) for case, given in by_case.items()}


def _answers(bench: Bench, asked: Sequence[tuple[Case, Sequence[str]]]) -> list[list[dict[str, Any]]]:
    """Return for each case what the model says to its prompts, and whether that gives the true answers."""
    if not asked:
        return []
    each = [(case, *pair) for case, truths in asked for pair in zip(case.requests, truths, strict=True)]
    found = iter(_compared(bench, each) if bench.config.dataset.known == PROBABILITY else _written(bench, each))
    return [[next(found) for _ in truths] for _, truths in asked]


def _written(bench: Bench, asked: Sequence[tuple[Case, EditRequest, str]]) -> list[dict[str, Any]]:
    """Return what the model writes behind each prompt, and whether it holds the true answer."""
    questions = [AskedPrompt(request.text, request.chat) for _, request, _ in asked]
    prompts = read_on(bench.model, bench.tokenizer, questions)
    tokens = bench.config.generation.tokens
    texts = generate(bench.model, bench.tokenizer, prompts, tokens, batch_tokens=bench.batch_tokens)
    return [
        {"case": case.id, "answer": truth, "text": text, **match_answer(text, truth)._asdict()}
        for (case, _, truth), text in zip(asked, texts, strict=True)
    ]


def _compared(bench: Bench, asked: Sequence[tuple[Case, EditRequest, str]]) -> list[dict[str, Any]]:
    """Return how likely the true answer and the edit's are behind each prompt, and whether the true one is likelier."""
    probes = [Probe("rewrite", r.text, truth, r.target, r.join, r.chat) for _, r, truth in asked]
    scores = score(bench.model, bench.tokenizer, probes, batch_tokens=bench.batch_tokens)
    found = []
    for (case, _, truth), said in zip(asked, scores, strict=True):
        true, new = said.nll_target, said.nll_other
        is_known = true is not None and new is not None and true < new
        found.append({"case": case.id, "answer": truth, "nll_true": true, "nll_new": new, PROBABILITY: is_known})
    return found


def _truths(case: Case, dataset: str) -> list[str] | None:
    """The true answer to the prompt of each request; None where the record does not state all of them."""
    is_taught = dataset in _TEACH_THE_TRUTH
    found = [r.target if r.target_true is None and is_taught else r.target_true for r in case.requests]
    return None if None in found else [truth for truth in found if truth is not None]
