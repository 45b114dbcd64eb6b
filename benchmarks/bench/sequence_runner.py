"""The course of a sequence: its edits in order, those that the log holds and then those that are made.

A batch that is refused, or that the guard takes back, is made again in halves, down to the single edit that is at
fault: the others are kept, in batches as large as can be. With `guard.action: stop` the batch that broke the model
stays on and is the last.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence

from errata.benchmarks.bench import guard
from errata.benchmarks.bench.attempts import REFUSALS, case_diagnostics, check_ranks, passed_on, reason_of
from errata.benchmarks.bench.baseline import Baseline
from errata.benchmarks.bench.context import Bench
from errata.benchmarks.bench.sequence_log import EditOutcome, SequenceLog
from errata.benchmarks.runs import environment
from errata.editors.core import ranks
from errata.editors.core.edit import Edit
from errata.editors.core.errors import DisablingEditWarning
from errata.editors.core.ledger.entry import Entry
from errata.evaluate.probes import Case, edit_key, rounds

# Edits read from the log before they are put on the model.
_REPLAYED = 256
Seconds = dict[str, float]


class SequenceRunner:
    """Of one run.

    Attributes:
        made: What became of the cases so far.
        start: What the guard compares with where the model was changed before the first edit.
    """

    def __init__(self, bench: Bench, before: Baseline, log: SequenceLog) -> None:
        self.made: list[EditOutcome] = []
        self.start: guard.Start | None = None
        self._bench, self._before, self._log, self._ledger = bench, before, log, bench.editor.ledger
        self._written = log.edits(self._ledger, bench.cases)
        self._behind: list[Entry] = []  # read from the log, and not on the model yet
        self._clock = time.perf_counter()

    @property
    def ended(self) -> bool:
        """Whether the guard has stopped the sequence."""
        config = self._bench.guard
        last = self.made[-1].guard if self.made else None
        return config is not None and config.action == "stop" and last is not None and last["tripped"]

    def go_to(self, group: Sequence[Case], start: int) -> None:
        """Make the edits of a group, whose first case is the `start`-th, or read what the log has of them."""
        while len(self.made) < start + len(group) and (found := next(self._written, None)) is not None:
            self._read(*found)
        if len(self.made) < start + len(group):
            self.catch_up()
            self._clock = time.perf_counter()
            self._make(group, len(self.made) - start)

    def catch_up(self) -> None:
        """Put what was read on the model: many edits at the price of one sum."""
        self._ledger.extend(self._behind)
        self._behind = []

    def _read(self, entry: Entry | None, made: Sequence[EditOutcome]) -> None:
        self.made += made
        self._behind += [] if entry is None else [entry]
        if len(self._behind) == _REPLAYED:
            self.catch_up()

    def _make(self, group: Sequence[Case], done: int) -> None:
        """Make the edits of a group whose first `done` edits are made. If only some are made, the group was rejected as
        a whole before and continued in halves. A half can also be the last, if it broke the model."""
        if self.ended or done == len(group) or (done == 0 and self._attempt(group)):
            return
        half = (len(group) + 1) // 2
        self._make(group[:half], min(done, half))
        self._make(group[half:], max(0, done - half))

    def _attempt(self, group: Sequence[Case]) -> bool:
        """Apply a group as one edit, and write down what became of it. False where it is rejected and can be halved."""
        self._bench.stop.check()
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", DisablingEditWarning)
                together = rounds(group)
                editor = self._bench.editor
                edit = editor.apply(*together) if len(together) == 1 else editor.compute_together(together).apply()
        except REFUSALS as error:
            check_ranks(error)
            if len(group) == 1:
                self._write_down(group, None, [EditOutcome({}, "failed", reason_of(error))], [{}])
            return len(group) == 1
        check_ranks([edit])
        return self._watched(group, edit, passed_on(caught))

    def _watched(self, group: Sequence[Case], edit: Edit, messages: Sequence[str]) -> bool:
        """Keep an edit, or undo it where the guard says so. False where it is undone and can be halved."""
        started = time.perf_counter()
        # Ranks may measure numbers that round differently, on either side of a limit.
        verdict = ranks.from_first(guard.verdict(self._bench, self._before, self.start))
        spent = time.perf_counter() - started
        is_undone = verdict is not None and verdict.reason is not None and _undoes(self._bench)
        entry = None if is_undone else self._ledger.entries[-1]
        if is_undone:
            edit.undo()
            if len(group) > 1:
                return False
        said = None if verdict is None else verdict.plain()
        reason = f"undone by the guard: {verdict.reason}" if verdict is not None and is_undone else None
        reports = {edit_key(request): report for request, report in zip(edit.requests, edit.diagnostics, strict=True)}
        plain = [case_diagnostics([reports[edit_key(request)] for request in case.requests]) for case in group]
        made = [
            EditOutcome(report, "undone" if is_undone else "ok", reason, own, said)
            for (report, _), own in zip(plain, _by_case(group, edit, messages), strict=True)
        ]
        parts = [seconds if verdict is None else {**seconds, "guard": spent / len(group)} for _, seconds in plain]
        self._write_down(group, entry, made, parts)
        return True

    def _write_down(
        self, group: Sequence[Case], entry: Entry | None, made: Sequence[EditOutcome], parts: Sequence[Seconds]
    ) -> None:
        self._log.edited(self._ledger, entry, made)
        self._bench.stop.advanced()
        self.made += made
        now = time.perf_counter()
        held = {"edits": len(self.made), "memory": environment.memory_in_use(), "disk": self._log.nbytes}
        for case, own in zip(group, parts, strict=True):
            share = (now - self._clock) / len(group) - own.get("guard", 0.0)
            self._log.seconds({"case": case.id, **own, "edit": share, **held})
        self._clock = now


def _undoes(bench: Bench) -> bool:
    return bench.guard is not None and bench.guard.action == "undo"


def _by_case(group: Sequence[Case], edit: Edit, messages: Sequence[str]) -> list[list[str]]:
    """The warnings about the requests of each case."""
    names = {edit_key(request): f"request {request.id} " for request in edit.requests}
    wanted = [[names[edit_key(request)] for request in case.requests] for case in group]
    return [[message for message in messages if any(name in message for name in own)] for own in wanted]
