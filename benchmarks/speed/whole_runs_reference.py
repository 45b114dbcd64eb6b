"""Whole runs as the originals do them: one record after another. Nothing in the library uses it.

For each record: the search for its value by whole rows, the keys by whole passes, one plain solve, the written weights;
then all its answers from whole logits, its free texts as a batch of its own, and the perplexity of one text after
another; and the same answers and texts of the untouched model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.benchmarks.bench.context import Bench
from errata.benchmarks.speed.end_to_end_reference import memit
from errata.benchmarks.speed.keys_reference import restored, states_at
from errata.benchmarks.speed.scoring_reference import by_record
from errata.benchmarks.speed.targets_reference import find_targets_reference
from errata.editors.core.families.locate_then_edit import LocateThenEdit
from errata.editors.core.families.search_rows import SearchProblem
from errata.editors.core.model import tokens
from errata.editors.core.model.architecture import Architecture
from errata.editors.core.model.own_forward import evaluating
from errata.editors.core.solve.solvers import update_directions
from errata.editors.memit import MEMIT
from errata.evaluate.generation import generate
from errata.evaluate.probes import Case


@dataclass(frozen=True)
class PlainAnswers:
    """What was said after the edit of one record, and the CPU seconds of each part of the work for it."""

    nlls: list[float]
    texts: list[str]
    seconds: dict[str, float]


def run(bench: Bench, editor: LocateThenEdit, *, together: bool) -> list[PlainAnswers]:
    """Edit, ask and restore.

    Args:
        bench: What is asked.
        editor: MEMIT or ROME, with its moments.
        together: Make one edit of all records, and not one of each.
    """
    with torch.no_grad(), evaluating(editor.model):
        clock: dict[str, float] = {}
        with _timed(bench, clock, "untouched"):
            for case in bench.cases:
                _asked(bench, case, {})
        _perplexity(bench, clock)
        groups = [bench.cases] if together else [[case] for case in bench.cases]
        found = [answers for group in groups for answers in _edited(bench, editor, group)]
    found[0].seconds.update({f"before {name}": spent for name, spent in clock.items()})
    return found


def spent_once(answers: Sequence[PlainAnswers], *, together: bool) -> float:
    """Return the CPU seconds that do not depend on how many records there are; arguments as of `run` and `parts`."""
    names = ["before perplexity", *(["perplexity", "solves"] if together else [])]
    return sum(parts(answers).get(name, 0.0) for name in names)


def parts(answers: Sequence[PlainAnswers]) -> dict[str, float]:
    """Return the CPU seconds of each part of the work, over all records."""
    names = dict.fromkeys(name for one in answers for name in one.seconds)
    return {name: sum(one.seconds.get(name, 0.0) for one in answers) for name in names}


def _edited(bench: Bench, editor: LocateThenEdit, group: Sequence[Case]) -> Iterator[PlainAnswers]:
    """Yield what is said about each record of a group that is edited at once."""
    clock: dict[str, float] = {}
    with _timed(bench, clock, "edit"), torch.enable_grad():
        problems = [editor.problem(case.request) for case in group]
        updates = _updates(editor, problems, clock)
    clock["edit"] -= clock.get("solves", 0.0)
    with restored(editor.architecture, editor.layers):
        for layer, update in updates.items():
            weight = editor.architecture.weight(layer)
            weight += update.to(weight)
        _perplexity(bench, clock)
        for case in group:
            yield _asked(bench, case, clock)
            clock = {}


def _updates(editor: LocateThenEdit, problems: Sequence[SearchProblem], clock: dict[str, float]) -> dict[int, Tensor]:
    objective, layers = editor.settings.objective, editor.layers
    if isinstance(editor, MEMIT):
        moments = {layer: editor.moment(layer) for layer in layers}
        weight = editor.settings.mom2_update_weight
        assert weight is not None  # the editor has filled it in
        return memit(editor.architecture, problems, objective, layers, moments, weight, clock)
    (problem,), (layer,) = problems, layers
    return {layer: _rome(editor.architecture, problem, layer, editor)}


def _rome(parts: Architecture, problem: SearchProblem, layer: int, editor: LocateThenEdit) -> Tensor:
    """Return (v* - W k) u^T / (u . k), (d_out, d_in) float64, with the inverse moment computed before, as theirs is."""
    (target,) = find_targets_reference(parts, [problem], editor.settings.objective, layer=layer, site="mlp", pad=0)
    rows = [(row.ids, row.start) for row in problem.rows]
    with torch.no_grad():
        return _rank_one(parts, rows, layer, editor, target.delta)


def _rank_one(
    parts: Architecture, rows: Sequence[tuple[Sequence[int], int]], layer: int, editor: LocateThenEdit, delta: Tensor
) -> Tensor:
    keys = states_at(parts, rows, parts.down(layer), of="input").double()  # (contexts, d_in)
    (bare,) = states_at(parts, rows[:1], parts.down(layer), of="input").double()
    (u,) = update_directions(keys.mean(0, keepdim=True), editor.factor(layer))
    return torch.outer(delta.double(), u) / (bare @ u)


def _asked(bench: Bench, case: Case, clock: dict[str, float]) -> PlainAnswers:
    """All answers of a record from one padded pass; its free texts from one batch per length."""
    model, tokenizer, lengths = bench.model, bench.tokenizer, bench.config.generation
    with _timed(bench, clock, "scores"):
        nlls = by_record(model, tokenizer, [case])
    with _timed(bench, clock, "texts"):
        is_open = [probe.kind == "generation" for probe in case.probes]
        prompts = [probe.prompt for probe in case.probes]
        said: dict[bool, dict[str, str]] = {}
        for wanted, length in ((True, lengths.fluency_tokens), (False, lengths.tokens)):
            asked = list(dict.fromkeys(p for p, one in zip(prompts, is_open, strict=True) if one == wanted))
            said[wanted] = dict(zip(asked, generate(model, tokenizer, asked, length), strict=True)) if asked else {}
    return PlainAnswers(nlls, [said[one][p] for p, one in zip(prompts, is_open, strict=True)], dict(clock))


def _perplexity(bench: Bench, clock: dict[str, float]) -> float:
    """Perplexity of all texts, one after another, from whole logits."""
    total, count = 0.0, 0
    with _timed(bench, clock, "perplexity"):
        for text in bench.texts:
            ids = torch.tensor([tokens.prompt_ids(bench.tokenizer, text)[:1024]], device=bench.model.device)
            logits: Any = bench.model(input_ids=ids).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
    return math.exp(min(700.0, total / max(1, count)))


@contextmanager
def _timed(bench: Bench, clock: dict[str, float], name: str) -> Iterator[None]:
    """Add the CPU seconds of the block to the clock's entry, and note its memory."""
    started = time.process_time()
    try:
        with bench.memory.phase(name):
            yield
    finally:
        clock[name] = clock.get(name, 0.0) + time.process_time() - started
