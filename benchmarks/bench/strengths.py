"""The dial and the leagues: one edit of all cases, solved once and put on the model at many strengths.

    dial      scores and damage at each of `dial.strengths`
    league    for each of `league.caps` the largest strength whose loss on general text has risen by less, and the
              scores there: equal damage for every method

Both begin as `protocol=batch`: all cases are one edit, as the method makes several at once. ROME and its like make them
one after another; what these steps add together is the edit. Its records are those of full strength. Then the same
edit, read from the run's journal, is scaled as a whole, with the method's closing step. Damage is that of the model
with the whole edit.

An edit that the method refuses is left out of the whole, as in a batch. A strength at which the ledger refuses the
edit, since it is too large, is not admitted to any league, and the dial says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from errata.benchmarks.bench.baseline import Baseline
from errata.benchmarks.bench.checkpoints import Checkpoints
from errata.benchmarks.bench.context import Bench, Write
from errata.benchmarks.bench.sequence_log import EditOutcome
from errata.benchmarks.bench.sequence_runner import SequenceRunner
from errata.benchmarks.bench.sequences import batch, scored_point
from errata.benchmarks.bench.strength_log import written_rise
from errata.benchmarks.datasets.canonical import example_of
from errata.editors.core.edit import Edit
from errata.editors.core.errors import NumericalError
from errata.editors.core.ledger.patch import merge
from errata.evaluate.canonical import measured
from errata.evaluate.general_text import GeneralText, LossRise
from errata.evaluate.strengths import Dial, strongest


def dial(bench: Bench, before: Baseline, done: Collection[str], write: Write) -> None:
    """One edit of all cases, scored at each of the configured strengths."""
    batch(bench, before, done, write)
    turned = _Turned(bench, before)
    for count, strength in enumerate(bench.config.dial.strengths, 1):
        turned.point(strength)
        bench.progress(count, len(bench.config.dial.strengths), "strengths")


def league(bench: Bench, before: Baseline, done: Collection[str], write: Write) -> None:
    """One edit of all cases, scored at the largest strength that each league admits."""
    batch(bench, before, done, write)
    turned, caps = _Turned(bench, before), bench.config.league.caps
    if bench.canonical is not None:
        for strength in (0.0, 1.0):  # which no record has
            turned.point(strength)
    for count, cap in enumerate(caps, 1):
        turned.point(turned.strongest(cap))
        bench.progress(count, len(caps), "leagues")


class _Turned:
    """The edit of a finished batch, at any strength, on the model that carries nothing else."""

    def __init__(self, bench: Bench, before: Baseline) -> None:
        assert bench.log is not None, "a run over strengths has a log"
        self._bench, self._log = bench, bench.log.strengths
        self._checkpoints = Checkpoints(bench, before, bench.log)
        runner = SequenceRunner(bench, before, bench.log)
        try:
            runner.go_to(bench.cases, 0)
            runner.catch_up()
            self._made: list[EditOutcome] = runner.made
            self._dial = Dial(_whole(bench))
        finally:
            bench.editor.rollback()
        self._text: GeneralText | None = None

    def point(self, strength: float) -> Mapping[str, Any]:
        """Return the scores and the loss at a strength; of one that the edit cannot have, why."""
        return self._log.point(strength, partial(self._scored, strength), self._bench.stop)

    def strongest(self, cap: float) -> float:
        """Return the largest strength that a league admits; of an edit that cannot be scaled, 1 or 0."""
        steps = self._bench.config.league.steps if self._dial.reason is None else 1
        return strongest(self._rise, cap, steps=steps, margin=self._bench.config.league.margin)

    def _rise(self, strength: float) -> LossRise | None:
        found = self._log.trial(strength, partial(self._measured, strength), self._bench.stop)
        return written_rise(found)

    def _measured(self, strength: float) -> dict[str, Any]:
        """Return the loss at a strength as plain values."""
        fixed = self._dial.reason
        if not self._dial.has(strength):
            return {"rise": None, "reason": fixed, "fixed": fixed}
        text = self._general_text()
        try:
            with self._dial.at(strength), self._bench.memory.phase("evaluation"):
                return {"rise": dataclasses.asdict(text.rise()), "reason": None, "fixed": fixed}
        except NumericalError as error:
            return {"rise": None, "reason": str(error), "fixed": fixed}

    def _scored(self, strength: float) -> dict[str, Any]:
        trial = self._log.trial(strength, partial(self._measured, strength), self._bench.stop)
        if trial["rise"] is None:
            return trial
        rise = written_rise(trial)
        assert rise is not None
        shared = {"perplexity": rise.perplexity, "perplexity_before": rise.perplexity_untouched}
        with self._dial.at(strength), self._bench.memory.phase("evaluation"):
            records = self._checkpoints.at_strength(self._made, strength, shared)
            canonical = self._canonical()
        return {**trial, **scored_point(self._bench, records, self._made), **canonical}

    def _canonical(self) -> dict[str, Any]:
        """Return failures and losses on a set of canonical examples as the model stands; nothing of other datasets."""
        bench = self._bench
        if bench.canonical is None:
            return {}
        asked = dataclasses.replace(bench.canonical, train=tuple(map(example_of, bench.cases)))
        return {"canonical": measured(asked, bench.model, bench.tokenizer, batch_tokens=bench.batch_tokens)}

    def _general_text(self) -> GeneralText:
        """Return the run's texts, which the untouched model has read."""
        if self._text is None:
            bench, edit = self._bench, self._dial.edit
            self._text = GeneralText(
                bench.model,
                bench.tokenizer,
                bench.texts,
                max_tokens=bench.config.league.tokens,
                patch=None if edit is None else edit.patch,
                batch_tokens=bench.batch_tokens,
            )
        return self._text


def _whole(bench: Bench) -> Edit | None:
    """Return everything that is on the model, with the method's closing step, as one edit; None of nothing."""
    entries = bench.editor.ledger.entries
    if not entries:
        return None
    patches = [entry.patch for entry in entries]
    closing = bench.editor.closing(patches)
    patches += [] if closing is None else [closing]
    requests = tuple(request for entry in entries for request in entry.info.requests)
    reports = tuple(report for entry in entries for report in entry.info.diagnostics)
    editor = bench.editor
    return Edit(editor.name, requests, merge(patches), reports, editor.config.to_dict(), bench.model)
