"""Edits that meet a compression or an unlearning: `protocol=compose`.

    compose.order=edit-compress     all edits at once, then the compression of the edited model
    compose.order=compress-edit     the compression, all edits on the compressed model, then what `compose.end` says

The model is measured behind each step and at the end, always against the untouched model: the one with neither edits
nor compression. Edits are made as by `protocol=batch`. Second moments are the untouched model's in either order, as in
the authors' code, whose file of them belongs to the model's name. A guard charges edits with what they do to the model
that they were made on: one that was compressed or unlearned before is what they are compared with.

Beside errata's own scorings the records hold the authors' set F1 (evaluate/set_f1.py) of edited prompts, of their
paraphrases, and of neighbours, whose answer is what the untouched model writes. Beside an unlearning stands what the
model still knows of its texts (forgetting.py).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from errata.benchmarks.bench import guard
from errata.benchmarks.bench.baseline import Baseline
from errata.benchmarks.bench.checkpoints import Checkpoints
from errata.benchmarks.bench.composition_config import COMPRESS, EDIT, UNLEARN, ComposeConfig
from errata.benchmarks.bench.composition_log import END, GUARD, UNTOUCHED
from errata.benchmarks.bench.config import BenchConfig
from errata.benchmarks.bench.context import Bench, Write
from errata.benchmarks.bench.forgetting import TextSet, measured, sets_of
from errata.benchmarks.bench.sequence_log import EditOutcome
from errata.benchmarks.bench.sequence_runner import SequenceRunner
from errata.benchmarks.bench.sequences import scored_point
from errata.editors.core.contexts.asking import AskedPrompt, read_on
from errata.editors.core.interventions import registry
from errata.editors.core.interventions.intervention import Applied, Intervention, InterventionConfig
from errata.editors.core.model.tokens import answer_ids
from errata.evaluate.probes import Case, Probe
from errata.evaluate.set_f1 import left_out_ids, set_match, written_ids

SET_F1 = "set_f1"
_KINDS = ("rewrite", "paraphrase", "neighborhood")
_NEIGHBOUR = "neighborhood"


def intervention_configs(config: BenchConfig) -> dict[str, InterventionConfig]:
    """Return the configuration of each intervention of a run, by role; nothing of other protocols.

    Raises:
        ConfigError: An intervention is missing or unknown, or a field of it is wrong.
    """
    if config.protocol.name != "compose":
        return {}
    return named_configs(config.compose, config.seed, path="compose.")


def named_configs(compose: ComposeConfig, seed: int, *, path: str) -> dict[str, InterventionConfig]:
    """Return the configuration of each intervention that a composition names, by role.

    Args:
        compose: The composition.
        seed: Of an intervention that has none of its own.
        path: What stands before a role where an error names a field.

    Raises:
        ConfigError: An intervention is missing or unknown, or a field of it is wrong.
    """
    found = {}
    for role in compose.roles:
        if role != EDIT:
            name, fields = compose.named(role)
            kind = registry.get(name, "compress" if role == COMPRESS else "unlearn")
            found[role] = kind.Config.from_dict({"seed": seed, **fields}, path=f"{path}{role}.")
    return found


def compose(bench: Bench, before: Baseline, done: Collection[str], write: Write) -> None:
    """Edits and interventions in the configured order, scored behind each step and at the end."""
    if all(case.id in done for case in bench.cases):
        return
    run = _Composition(bench, before)
    try:
        records = run.records()
        for record in records:
            if record["case"] not in done:
                write(record, {})
    finally:
        bench.editor.rollback()


class _Composition:
    """One run: its model goes through the steps in order."""

    def __init__(self, bench: Bench, before: Baseline) -> None:
        assert bench.log is not None, "a composition has a log"
        self._bench, self._log, self._steps = bench, bench.log, bench.log.steps
        self._runner = SequenceRunner(bench, before, bench.log)
        self._checkpoints = Checkpoints(bench, before, bench.log)
        self._compressed: Applied | None = None
        self._untouched: Mapping[str, Any] = {}
        self._sets: Mapping[str, TextSet] = {}

    @property
    def _made(self) -> Sequence[EditOutcome]:
        """What became of the edits so far; where none was made yet, the cases are asked as they are."""
        return self._runner.made or [EditOutcome({})] * len(self._bench.cases)

    def records(self) -> list[dict[str, Any]]:
        """Do all steps, and return the records of the end."""
        bench, roles = self._bench, self._bench.config.compose.roles
        self._sets = self._asked_sets()
        untouched = self._steps.kept(UNTOUCHED, lambda: {**self._forgotten(), **self._written()}, bench.stop)
        self._untouched = untouched["written"]
        for place, role in enumerate(roles):
            self._step(role)
            if place < len(roles) - 1:
                self._measured("-".join(roles[: place + 1]))
        if self._compressed is not None and roles[-1] != COMPRESS:
            self._compress_at_end(self._compressed)
        with bench.memory.phase("evaluation"):
            # Before the evaluation, whose parts another one's would replace.
            written = self._steps.kept(END, self._at_end, bench.stop)["written"]
            records, able = self._checkpoints.evaluated(self._runner.made, is_end=True)
        records = [self._with_set_f1(record, written) for record in records]
        point = {**scored_point(bench, records, self._runner.made), "ability": able}
        self._log.checkpoint(point)
        bench.track(len(self._runner.made), point)
        return records

    def _step(self, role: str) -> None:
        bench = self._bench
        bench.stop.check()
        if role == EDIT:
            if bench.guard is not None and not bench.config.compose.order.startswith(EDIT):
                said = self._steps.kept(GUARD, lambda: asdict(guard.start_of(bench)), bench.stop)
                self._runner.start = guard.Start(said["perplexity"], said["facts"])
            with bench.memory.phase("edits"):
                self._runner.go_to(bench.cases, 0)
                self._runner.catch_up()
                bench.editor.finish()
            bench.progress(len(self._runner.made), len(bench.cases), "edits")
        else:
            applied = self._applied(role)
            if role == COMPRESS:
                self._compressed = applied

    def _applied(self, role: str) -> Applied:
        """Return an intervention that the model now carries."""
        bench, config = self._bench, intervention_configs(self._bench.config)[role]
        kind = registry.get(bench.config.compose.named(role)[0])
        intervention: Intervention = kind(config)
        started = time.perf_counter()
        with bench.memory.phase("interventions"):
            applied = intervention.apply(bench.model, bench.tokenizer, progress=bench.editor.progress)
        self._log.seconds({"intervention": intervention.name, "seconds": time.perf_counter() - started})
        return applied

    def _compress_at_end(self, applied: Applied) -> None:
        """Bring the model back to what the compression allows, as `compose.end` says."""
        end = self._bench.config.compose.end
        if end == "again":
            self._compressed = self._applied(COMPRESS)
        elif end == "keep":
            applied.project()

    def _measured(self, step: str) -> None:
        """Measure the model behind a step."""

        def measure() -> Mapping[str, Any]:
            with self._bench.memory.phase("evaluation"):
                records = self._checkpoints.as_it_stands(self._made, step)
                written = self._written()["written"]
            records = [self._with_set_f1(record, written) for record in records]
            point = scored_point(self._bench, records, self._made)
            return {
                **{name: value for name, value in point.items() if name != "edits"},
                **self._bits(),
                **self._forgotten(),
            }

        self._steps.kept(step, measure, self._bench.stop)

    def _bits(self) -> dict[str, Any]:
        """Return the average bits of the model as it stands; None where it was not compressed."""
        return {"average_bits": None if self._compressed is None else self._compressed.average_bits()}

    def _at_end(self) -> dict[str, Any]:
        return {**self._bits(), **self._forgotten(), **self._written()}

    def _asked_sets(self) -> dict[str, TextSet]:
        """Return what is asked about the texts of the unlearning; nothing without one."""
        own = intervention_configs(self._bench.config).get(UNLEARN)
        return {} if own is None else sets_of(self._bench.model, own)

    def _forgotten(self) -> dict[str, Any]:
        """Return what the model as it stands still knows of the texts of the unlearning."""
        return {"forgetting": measured(self._bench, self._sets)} if self._sets else {}

    def _written(self) -> dict[str, Any]:
        """Return what the model as it stands writes behind each probe, as ids: {case: one list per probe or None}."""
        bench = self._bench
        asked = [probe for case in bench.cases for probe in case.probes if _is_compared(probe)]
        read = read_on(bench.model, bench.tokenizer, [AskedPrompt(p.prompt, p.chat, p.join) for p in asked])
        lengths = [len(self._answer(probe)) for probe in asked]
        found = iter(written_ids(bench.model, bench.tokenizer, read, lengths, batch_tokens=bench.batch_tokens))
        return {"written": {case.id: [_next(found, probe) for probe in case.probes] for case in bench.cases}}

    def _answer(self, probe: Probe) -> list[int]:
        assert probe.target is not None
        return answer_ids(self._bench.tokenizer, probe.prompt, probe.target, probe.join)

    def _with_set_f1(self, record: dict[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
        """Return a record with the set F1 of each probe that is compared."""
        case: Case = next(case for case in self._bench.cases if case.id == record["case"])
        left_out, probes = left_out_ids(self._bench.tokenizer), []
        for probe, entry, then, now in zip(
            case.probes, record["probes"], self._untouched[case.id], written[case.id], strict=True
        ):
            if then is not None:
                answer = then if probe.kind == _NEIGHBOUR else self._answer(probe)
                match = partial(set_match, answer=answer, left_out=left_out)
                said = {"before": match(then).f1, "after": match(now).f1}
                entry |= {m: {**entry[m], "measured": {SET_F1: f1}} for m, f1 in said.items()}
            probes.append(entry)
        return {**record, "probes": probes}


def _is_compared(probe: Probe) -> bool:
    """Return whether the answer of a probe is the next thing that the model writes."""
    is_next = probe.free.after is None and not probe.follow_ups
    return probe.kind in _KINDS and probe.target is not None and is_next


def _next(found: Any, probe: Probe) -> list[int] | None:
    return list(next(found)) if _is_compared(probe) else None
