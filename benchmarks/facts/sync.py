"""Facts kept as edits: a folder is brought to what a file of facts says, and asked whether they hold.

    todo = plan(facts, Edits.read("facts.edits"))         # what is new, what has changed, what is gone
    done = carry_out(todo, editor, Path("facts.edits"))

What is made is a matter of the facts alone: an edit stays as long as each of its facts is in the file, word for word.
The others are taken back, to the bits of a model that never had them, and what is new comes on top of what stays. While
this goes on the folder is written once a minute, each time whole: a command that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from errata.benchmarks.bench.attempts import REFUSALS, reason_of
from errata.benchmarks.facts.asking import CheckResult, asked, known_of
from errata.benchmarks.facts.fact_file import StatedFact
from errata.editors.core.editor import Editor
from errata.editors.core.errors import ConfigError, ErrataError
from errata.editors.core.ledger.entry import EditInfo, Entry
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.progress import Progress, silent
from errata.editors.core.request import EditRequest
from errata.editors.core.storage.edit_folder import Edits
from errata.editors.core.storage.merging import fact_key

SECONDS = 60.0
Method = tuple[str, Mapping[str, Any]]  # its name, and its configuration as plain values


@dataclass(frozen=True)
class SyncPlan:
    """What is to be done to a folder.

    Attributes:
        kept: The edits that stay; None where there is no folder.
        unchanged: Facts that they are of.
        added: Facts that are new.
        changed: Facts with what they were before.
        again: Facts that are as they were, but whose edit cannot stay: it was made together with one that has changed
            or gone, or otherwise than is now asked for.
        removed: Facts that are no longer in the file.
        beneath: Edits that go although all of their facts stay, as later edits of these are there.
    """

    kept: Edits | None
    unchanged: tuple[StatedFact, ...] = ()
    added: tuple[StatedFact, ...] = ()
    changed: tuple[tuple[EditRequest, StatedFact], ...] = ()
    again: tuple[StatedFact, ...] = ()
    removed: tuple[EditRequest, ...] = ()
    beneath: tuple[str, ...] = ()

    @property
    def facts(self) -> list[StatedFact]:
        """All facts of the file that are or will be edits."""
        return [*self.unchanged, *self.added, *(fact for _, fact in self.changed), *self.again]

    @property
    def to_make(self) -> list[StatedFact]:
        """In the order of the file."""
        found = [*self.added, *(fact for _, fact in self.changed), *self.again]
        return sorted(found, key=lambda fact: fact.line)

    @property
    def is_done(self) -> bool:
        """Whether the folder is as the file says."""
        return not self.to_make and not self.removed and not self.beneath


@dataclass(frozen=True)
class SyncResult:
    """What has become of a plan: the facts that the model now carries, and those that were refused, with the reason."""

    checked: tuple[CheckResult, ...]
    refused: tuple[tuple[StatedFact, str], ...]


# --- planning -------------------------------------------------------------------------------------------------------


def plan(facts: Sequence[StatedFact], edits: Edits | None, method: Method | None = None) -> SyncPlan:
    """What tells a folder from a file.

    Args:
        facts: Those of the file.
        edits: Those of the folder; None: there is none.
        method: How they must have been made; None: as they were.
    """
    if edits is None:
        return SyncPlan(None, added=tuple(facts))
    by_key = {fact_key(fact.request): fact for fact in facts}
    staying = [entry for entry in edits.entries if _stays(entry, by_key, method)]
    kept_keys = {fact_key(request) for entry in staying for request in entry.info.requests}
    stay = {entry.id for entry in staying}
    going = [entry for entry in edits.entries if entry.id not in stay]
    beneath = tuple(entry.id for entry in going if {fact_key(request) for request in entry.info.requests} <= kept_keys)
    held = {fact_key(request): request for entry in edits.entries for request in entry.info.requests}
    gone = {key: request for key, request in held.items() if key not in by_key}
    gone_ids = {request.id: key for key, request in gone.items()}
    sorted_out: dict[str, list[Any]] = {"unchanged": [], "added": [], "changed": [], "again": []}
    for key, fact in by_key.items():
        before = held.get(key) or gone.get(gone_ids.get(fact.request.id, ""))
        if key in kept_keys:
            sorted_out["unchanged"].append(fact)
        elif before is None:
            sorted_out["added"].append(fact)
        elif _content(before) != _content(fact.request):
            sorted_out["changed"].append((before, fact))
            gone.pop(fact_key(before), None)
        else:
            sorted_out["again"].append(fact)
    kept = edits.only(stay)
    kept = replace(kept, entries=tuple(_labelled(entry, by_key) for entry in kept.entries))
    sorted_facts = {name: tuple(found) for name, found in sorted_out.items()}
    return SyncPlan(kept, **sorted_facts, removed=tuple(gone.values()), beneath=beneath)


def method_of(edits: Edits) -> Method | None:
    """How the newest edit of a folder was made; None where no one says."""
    info = edits.entries[-1].info if edits.entries else EditInfo()
    return (info.method, info.config) if info.method else None


def _stays(entry: Entry, facts: Mapping[str, StatedFact], method: Method | None) -> bool:
    if method is not None and _plain([entry.info.method, entry.info.config]) != _plain([*method]):
        return False
    wanted = [(request, facts.get(fact_key(request))) for request in entry.info.requests]
    return all(fact is not None and _content(fact.request) == _content(request) for request, fact in wanted)


def _plain(value: Any) -> str:
    """In which lists are what tuples are."""
    return json.dumps(value, sort_keys=True)


def _content(request: EditRequest) -> tuple[str | bool | None, ...]:
    """What an edit depends on: no method looks at the answer before, or at the id."""
    return request.prompt, request.subject, request.target, request.join, request.chat


def _labelled(entry: Entry, facts: Mapping[str, StatedFact]) -> Entry:
    """With the ids that the file now gives."""
    requests = tuple(facts[fact_key(request)].request for request in entry.info.requests)
    return replace(entry, info=replace(entry.info, requests=requests))


# --- carrying out ---------------------------------------------------------------------------------------------------


def carry_out(
    plan: SyncPlan,
    editor: Editor,
    out: Path,
    *,
    batch_size: int = 1,
    progress: Progress = silent,
    seconds: float = SECONDS,
) -> SyncResult:
    """Make what is to be made, and write the folder.

    Args:
        plan: What is to be done.
        editor: On the model that the edits are of, which carries none.
        out: The folder.
        batch_size: Facts that are made as one edit; such can only be taken back together.
        progress: Told of every fact that is made.
        seconds: How long what was made may be nowhere but in memory.

    Raises:
        ConfigError: the method closes a sequence with a step that belongs to no fact.
        OtherBaseError: the edits that stay are of another model.
        ExportError: the folder holds something else.
        OSError: it cannot be written; it is as it was.
    """
    if editor.closes:
        raise ConfigError("editor.prune closes a sequence of edits and belongs to none of them; leave it out here")
    if plan.kept is not None:
        plan.kept.apply_to(editor.model, editor.tokenizer)
    writer = _Writer(editor, out, plan.kept.notes if plan.kept else {}, seconds)
    facts, refused = plan.to_make, []
    progress(0, len(facts), "edits")
    try:
        for start in range(0, len(facts), batch_size):
            refused += _made(editor, facts[start : start + batch_size])
            writer.now_and_then()
            progress(min(start + batch_size, len(facts)), len(facts), "edits")
        checked, scores = _scored(editor.ledger, editor.tokenizer, writer.notes, plan.facts)
    except (KeyboardInterrupt, ErrataError):
        writer.write_if_new()
        raise
    writer.notes = {
        entry.id: {**writer.notes.get(entry.id, {}), "scores": {r.id: scores[r.id] for r in entry.info.requests}}
        for entry in editor.ledger.entries
    }
    writer.write()
    return SyncResult(checked, tuple(refused))


class _Writer:
    """Writes the folder of what an editor's model carries."""

    def __init__(self, editor: Editor, out: Path, notes: Mapping[str, Mapping[str, Any]], seconds: float) -> None:
        self.notes: Mapping[str, Mapping[str, Any]] = notes
        self._editor, self._out, self._seconds = editor, out, seconds
        self._last, self._written = time.monotonic(), {entry.id for entry in editor.ledger.entries}

    def now_and_then(self) -> None:
        if time.monotonic() - self._last >= self._seconds:
            self.write()

    def write_if_new(self) -> None:
        """What would otherwise have to be made again."""
        if {entry.id for entry in self._editor.ledger.entries} - self._written:
            self.write()

    def write(self) -> None:
        carried = {id_: note for id_, note in self.notes.items() if id_ in self._editor.ledger}
        Edits.of(self._editor.ledger, tokenizer=self._editor.tokenizer, notes=carried).rewrite(self._out)
        self._last, self._written = time.monotonic(), {entry.id for entry in self._editor.ledger.entries}


def _made(editor: Editor, facts: Sequence[StatedFact]) -> list[tuple[StatedFact, str]]:
    """One edit of these facts; where it is refused, one of each half, down to the single fact that is at fault."""
    try:
        editor.apply([fact.request for fact in facts])
    except REFUSALS as error:
        if len(facts) == 1:
            return [(facts[0], reason_of(error))]
        half = len(facts) // 2
        return [*_made(editor, facts[:half]), *_made(editor, facts[half:])]
    return []


def _scored(
    ledger: Ledger, tokenizer: Any, notes: Mapping[str, Mapping[str, Any]], facts: Sequence[StatedFact]
) -> tuple[tuple[CheckResult, ...], dict[str | None, dict[str, Any]]]:
    """Of every fact that the model carries whether it holds, and the same for the notes, with what was before."""
    requests = [request for entry in ledger.entries for request in entry.info.requests]
    after = asked(ledger, tokenizer, requests, facts, known_of(notes))
    with ledger.untouched():
        before = asked(ledger, tokenizer, requests, (), {}, with_texts=False)
    scores = {
        now.request.id: {"before": then.probability, "after": now.probability, "holds": now.holds}
        for then, now in zip(before, after, strict=True)
    }
    return tuple(after), scores
