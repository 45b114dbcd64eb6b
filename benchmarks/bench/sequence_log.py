"""What a sequence of edits writes down as it goes, and finds again when it was killed.

    journal/            every edit with its factors, every refused one with its reason (editors/core/storage/journal.py)
    checkpoints.jsonl   the scores of all edits so far, one line per checkpoint; curve.json is made of them
    parts.jsonl         what is done of a checkpoint that is being scored (partial_results.py)
    trials.jsonl        of a run over strengths, with strengths.jsonl (strength_log.py)
    steps.jsonl         of a composition (composition_log.py)

An edit is written as soon as the model carries it. A resumed sequence applies the written edits, which gives the model
exactly the bits that it had, and makes the others.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from errata.benchmarks.bench.composition_log import StepLog
from errata.benchmarks.bench.strength_log import StrengthLog
from errata.benchmarks.runs.json_values import encodable
from errata.benchmarks.runs.partial_results import PartialResults
from errata.benchmarks.runs.run_folder import CURVE, SECONDS, RunFolder
from errata.benchmarks.runs.stopping import Stop
from errata.editors.core.errors import DamagedEditsError, OtherBaseError
from errata.editors.core.files.atomic import set_aside
from errata.editors.core.ledger.entry import Entry
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.storage.journal import Journal
from errata.editors.core.storage.record_format import EditRecord
from errata.evaluate.probes import Case, rounds

logger = logging.getLogger(__name__)

JOURNAL, CHECKPOINTS = "journal", "checkpoints.jsonl"


@dataclasses.dataclass(frozen=True)
class EditOutcome:
    """What became of one case of a sequence: the method's report, or why there is no edit, and what the guard said."""

    report: Mapping[str, Any]
    status: Literal["ok", "failed", "undone"] = "ok"
    reason: str | None = None
    warnings: Sequence[str] = ()
    guard: Mapping[str, Any] | None = None


class SequenceLog:
    """The log of one sequence, in its run's folder.

    Args:
        folder: The run's folder, opened.
        model: What the journal says of the model: name, revision, fingerprint.
    """

    def __init__(self, folder: RunFolder, model: Mapping[str, Any]) -> None:
        self._folder = folder
        self._model = dict(model)
        self._journal = self._opened()
        self._points = {point["edits"]: point for point in folder.records(CHECKPOINTS, _no_checkpoint)}

    def _opened(self) -> Journal:
        """Open the journal. One that is damaged, or of another run, is set aside with a warning."""
        path = self._folder.path / JOURNAL
        try:
            return Journal.open(path, self._model, self._folder.key)
        except (DamagedEditsError, OtherBaseError) as error:
            return self._begun_again(error)

    def _begun_again(self, error: Exception) -> Journal:
        path = self._folder.path / JOURNAL
        logger.warning("%s; the folder is set aside as %s, and the edits are made again", error, set_aside(path).name)
        return Journal.open(path, self._model, self._folder.key)

    def edits(self, ledger: Ledger, cases: Sequence[Case]) -> Iterator[tuple[Entry | None, list[EditOutcome]]]:
        """What was written down: edits for `ledger.extend`, and the cases that each was for, in order. From the first
        record on that this run cannot have written, the journal is set aside with a warning.

        Args:
            ledger: That of the model.
            cases: The cases of the run, in their order.
        """
        try:
            self._journal.check(ledger)
        except OtherBaseError as error:
            self._journal = self._begun_again(error)
        left = list(cases)
        for record in self._journal.recover(lambda record: _fault(record, left)):
            made = [EditOutcome(**one) for one in record.notes["made"]]
            del left[: len(made)]
            yield record.entry, made

    def edited(self, ledger: Ledger, entry: Entry | None, made: Sequence[EditOutcome]) -> None:
        """Write down an edit that the model now carries, or the refusal of one; on the disk when the call returns."""
        if entry is not None:
            # Without the seconds, which never repeat.
            info = dataclasses.replace(entry.info, diagnostics=tuple(dict(one.report) for one in made))
            entry = dataclasses.replace(entry, info=info)
        self._journal.append(entry, {"made": encodable([dataclasses.asdict(one) for one in made])}, ledger)

    @property
    def points(self) -> list[dict[str, Any]]:
        """The checkpoints so far."""
        return [self._points[edits] for edits in sorted(self._points)]

    def has_point(self, edits: int) -> bool:
        """Return whether the model was scored after this number of edits."""
        return edits in self._points

    def checkpoint(self, point: Mapping[str, Any]) -> None:
        """Write a checkpoint down; one that is there already is the same."""
        if not self.has_point(point["edits"]):
            self._folder.append(CHECKPOINTS, point)
            self._points[point["edits"]] = dict(point)
            self._folder.write_json(CURVE, self.points)

    @property
    def strengths(self) -> StrengthLog:
        """What was measured of the edits at several strengths."""
        return StrengthLog(self._folder)

    @property
    def steps(self) -> StepLog:
        """What was measured behind the steps of a composition."""
        return StepLog(self._folder)

    def parts(self, edits: int | str, stop: Stop) -> PartialResults:
        """Return the parts of the evaluation after this number of edits, or of these at a strength."""
        return PartialResults(self._folder, stop, edits)

    def seconds(self, entry: Mapping[str, Any]) -> None:
        """Write down how long something took."""
        self._folder.append(SECONDS, entry)

    @property
    def nbytes(self) -> int:
        """Bytes of the edits on the disk."""
        return self._journal.nbytes


def _fault(record: EditRecord, cases: Sequence[Case]) -> str | None:
    """Return why a record of a journal is not one of the next cases, or None."""
    try:
        count = len([EditOutcome(**one) for one in record.notes["made"]])
    except (KeyError, TypeError) as error:
        return f"does not say what became of its cases: {error!r}"
    if not 0 < count <= len(cases):
        return f"is for {count} cases, but the run has {len(cases)} left"
    expected = [request for together in rounds(cases[:count]) for request in together]
    if record.entry is not None and list(record.entry.info.requests) != expected:
        return f"is an edit of other cases than {', '.join(case.id for case in cases[: min(count, 3)])}"
    return None


def _no_checkpoint(point: Mapping[str, Any]) -> str | None:
    edits = point.get("edits")
    return None if isinstance(edits, int) and edits > 0 else "does not say after how many edits it was measured"
