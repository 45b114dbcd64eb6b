"""Only facts that the model knows, or only those that it does not: `dataset.known`.

Before the first edit the untouched model is asked the prompts of the edits, in the order of the cases: its greedy
continuation, as long as the run's free answers, holds the true answer or not, as `generation.matches` has it. As many
are asked as it takes to find `n_edits`, a group at a time; each group's answers are written down, and not asked again.

    known.jsonl     {"answers": [{"case", "answer", "text", "exact", "contained"}, ...]}, one line per group
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from errata.benchmarks.bench.context import Bench
from errata.benchmarks.bench.measurements import fitting
from errata.benchmarks.datasets.json_records import Dropped, Loaded
from errata.benchmarks.runs.run_folder import RunFolder
from errata.editors.core.errors import DatasetError
from errata.editors.core.model.reading import as_read
from errata.evaluate.generation import generate, match_answer
from errata.evaluate.probes import Case

ANSWERS = "known.jsonl"
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
    level = "exact" if wanted == "exact" else "contained"
    found, dropped, asked, known = [], [], 0, 0
    for group, answers, unfit in _asked(bench, folder, loaded.cases):
        dropped += unfit
        gives = {answer["case"]: answer[level] for answer in answers}
        asked, known = asked + len(gives), known + sum(gives.values())
        found += [case for case in group if case.id in gives and gives[case.id] != (wanted == "absent")]
        if config.n_edits is not None and len(take(Loaded(found)).cases) == config.n_edits:
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
        truths = {case.id: _truth(case, bench.config.dataset.name) for case in fit.cases}
        unfit += [
            Dropped(name, "target_true", "has no true answer that the model could know")
            for name, truth in truths.items()
            if truth is None
        ]
        if place == len(written):
            bench.stop.check()
            asked = [(case, truth) for case in fit.cases if (truth := truths[case.id]) is not None]
            written.append({"answers": _answers(bench, asked)})
            folder.append(ANSWERS, written[-1])
            bench.stop.advanced()
        bench.progress(min(start + _TOGETHER, len(cases)), len(cases), "facts that the model may know")
        yield group, written[place]["answers"], unfit


def _answers(bench: Bench, asked: Sequence[tuple[Case, str]]) -> list[dict[str, Any]]:
    """What the model says to the prompt of each case, and whether that gives the true answer."""
    if not asked:
        return []
    prompts = [as_read(bench.tokenizer, case.request.text, chat=case.request.chat).text for case, _ in asked]
    tokens = bench.config.generation.tokens
    texts = generate(bench.model, bench.tokenizer, prompts, tokens, batch_tokens=bench.batch_tokens)
    return [
        {"case": case.id, "answer": truth, "text": text, **match_answer(text, truth)._asdict()}
        for (case, truth), text in zip(asked, texts, strict=True)
    ]


def _truth(case: Case, dataset: str) -> str | None:
    """The true answer to an edit's prompt; None where its record states none."""
    request = case.request
    return request.target if request.target_true is None and dataset in _TEACH_THE_TRUTH else request.target_true
