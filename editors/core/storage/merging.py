"""Comparing and merging two folders of edits.

Two requests are about the same fact if subject and prompt are the same text, apart from case and white space. Prompts
that ask the same question in other words are not recognised.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from errata.editors.core.algebra.derivation import added_entries, merged_entries
from errata.editors.core.algebra.merge_rules import MergeRule
from errata.editors.core.errors import MergeError, OtherBaseError
from errata.editors.core.ledger.entry import Entry
from errata.editors.core.request import EditRequest
from errata.editors.core.storage.edit_folder import Edits

MAX_NAMED = 5  # a refusal names this many conflicts, and counts the others


def fact_key(request: EditRequest) -> str:
    """Return a text that is the same for all requests about the same fact."""
    text = " ".join(unicodedata.normalize("NFC", request.text).casefold().split())
    return f"{text}\n(chat)" if request.chat else text  # no text of one line ends so


@dataclass(frozen=True)
class Conflict:
    """Two requests that want different answers for the same fact, with the ids of their edits."""

    first: EditRequest
    second: EditRequest
    ids: tuple[str, str]

    def __str__(self) -> str:
        return f"{self.first.text!r} should be {self.first.target!r} ({self.ids[0]}) and {self.second.target!r}"


@dataclass(frozen=True)
class FolderDifference:
    """The differences of two folders, fact by fact.

    Attributes:
        removed: Facts that only the first has.
        added: Facts that only the second has.
        changed: Facts of both with different answers, as (first, second).
        remade: Facts of both with the same answer, but from different edits, as (first, second).
        same: Number of edits that both have.
    """

    removed: tuple[EditRequest, ...]
    added: tuple[EditRequest, ...]
    changed: tuple[tuple[EditRequest, EditRequest], ...]
    remade: tuple[tuple[EditRequest, EditRequest], ...]
    same: int

    @property
    def is_none(self) -> bool:
        return not (self.removed or self.added or self.changed or self.remade)


def compare(first: Edits, second: Edits) -> FolderDifference:
    """Compare two folders fact by fact. Edits with the same id count as the same edit."""
    shared = set(first.ids) & set(second.ids)
    ours = {fact_key(request): request for request, _ in _facts(first, shared)}
    theirs = {fact_key(request): request for request, _ in _facts(second, shared)}
    both = [(ours[key], theirs[key]) for key in ours if key in theirs]
    return FolderDifference(
        tuple(request for key, request in ours.items() if key not in theirs),
        tuple(request for key, request in theirs.items() if key not in ours),
        tuple(pair for pair in both if not _agree(*pair)),
        tuple(pair for pair in both if _agree(*pair)),
        len(shared),
    )


def conflicts(first: Edits, second: Edits) -> list[Conflict]:
    """Return the facts for which the latest answers of the two differ, and the second's is from an unshared edit."""
    shared = set(first.ids) & set(second.ids)
    ours = {fact_key(request): (request, id_) for request, id_ in _facts(first, ())}
    theirs = {fact_key(request): (request, id_) for request, id_ in _facts(second, shared)}
    both = [(*ours[key], *theirs[key]) for key in theirs if key in ours]
    return [Conflict(our, their, (our_id, id_)) for our, our_id, their, id_ in both if not _agree(our, their)]


def merge(first: Edits, second: Edits, *, prefer: Literal["first", "second"] | None = None) -> Edits:
    """Return the edits of the first, followed by those edits of the second that add something to it.

    The weights are the sum of all these edits. The edits of the second were computed without those of the first, so
    that some may no longer answer their requests. `errata check` tests that.

    Args:
        first: Edits that come first in the sum.
        second: Edits to add.
        prefer: Whose edits to keep if both have different answers for the same fact; None: refuse.

    Raises:
        OtherBaseError: The edits are of two models; it lists the differences.
        MergeError: They want different answers for the same fact, and `prefer` is None; `.conflicts` lists all. Or an
            edit that is not preferred also makes other facts, which would be lost; it lists those.
    """
    _check_one_base(first, second)
    found = conflicts(first, second)
    if found and prefer is None:
        named = [str(conflict) for conflict in found]
        more = f"; and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
        raise MergeError(
            f"{len(named)} facts have two answers: {'; '.join(named[:MAX_NAMED])}{more}; take out those that are "
            "wrong, or say whose to prefer",
            conflicts=named,
        )
    gone = {conflict.ids[0] for conflict in found} if prefer == "second" else _overruled(first, second, found)
    _check_nothing_lost(first, second, gone)
    first, second = first.without(gone), second.without(gone)
    added = _entries_to_add(first, second)
    notes = {**second.notes, **first.notes}
    return replace(
        first,
        entries=first.entries + tuple(added),
        base={**second.base, **first.base},
        tokenizer=first.tokenizer or second.tokenizer,
        notes={id_: notes[id_] for id_ in (*set(first.ids), *(entry.id for entry in added)) if id_ in notes},
    )


def merge_into_one(
    first: Edits, second: Edits, rule: MergeRule | None = None, *, prefer: Literal["first", "second"] | None = None
) -> Edits:
    """Return one edit that is made of the edits of two folders, which are summed within each folder.

    Args:
        first: Edits of the first folder.
        second: Edits of the second; those that the first has, too, count there alone.
        rule: What becomes of the two sums, where they contradict each other; None: their sum.
        prefer: As of `merge`.

    Raises:
        AlgebraError: The rule needs the weights of the model, or an edit has adapters.
        OtherBaseError, MergeError: As of `merge`.
    """
    both = merge(first, second, prefer=prefer)
    ours = [entry for entry in both.entries if entry.id in first.ids]
    theirs = [entry for entry in both.entries if entry.id not in first.ids]
    if rule is None:
        made = added_entries(both.entries)
    else:
        made = merged_entries([added_entries(group) for group in (ours, theirs) if group], rule, {})
    return replace(both, entries=(made,), notes={})


def _check_one_base(first: Edits, second: Edits) -> None:
    ours, theirs = first.model, second.model
    differences = [
        f"{what}: {ours[what]} and {theirs[what]}"
        for what in ("name", "revision")
        if ours.get(what) and theirs.get(what) and ours[what] != theirs[what]
    ]
    weights = [name for name in first.base if name in second.base and not _same_bytes(first.base, second.base, name)]
    differences += [f"weight: {name}" for name in weights]
    if first.tokenizer and second.tokenizer and first.tokenizer != second.tokenizer:
        differences.append("tokenizer")
    # One model may have several names. So a different name matters only if there are no common weights to compare.
    if weights or "tokenizer" in differences or (differences and not first.base.keys() & second.base.keys()):
        raise OtherBaseError(
            f"these edits are of two models, which differ in {', '.join(differences)}", differences=differences
        )


def _check_nothing_lost(first: Edits, second: Edits, gone: Collection[str]) -> None:
    """Refuse to leave out edits if no other edit makes one of their facts."""
    kept = {fact_key(request) for edits in (first, second) for request, _ in _facts(edits, gone)}
    lost = {
        fact_key(request): f"{request.text!r} ({id_})"
        for edits in (first, second)
        for request, id_ in _facts(edits, ())
        if id_ in gone and fact_key(request) not in kept
    }
    if lost:
        named = list(lost.values())
        more = f"; and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
        raise MergeError(
            f"{len(named)} facts were made in one edit with those that are not preferred and would be lost: "
            f"{'; '.join(named[:MAX_NAMED])}{more}; if they may go, remove that edit first",
            conflicts=named,
        )


def _same_bytes(ours: Mapping[str, str], theirs: Mapping[str, str], name: str) -> bool:
    # The last word of an identity is the digest. Old folders state nothing else.
    return ours[name].split()[-1] == theirs[name].split()[-1]


def _facts(edits: Edits, without: Collection[str]) -> Iterator[tuple[EditRequest, str]]:
    """Yield each request with the id of its edit. If a fact was edited twice, a dict of these keeps the later one."""
    entry: Entry
    for entry in edits.entries:
        if entry.id not in without:
            yield from ((request, entry.id) for request in entry.info.requests)


def _overruled(first: Edits, second: Edits, found: Sequence[Conflict]) -> set[str]:
    """Return the ids of the second's edits that answer a fact in conflict differently from the first.

    Earlier edits of the second that made the same fact are included, since they would else come into force again.
    """
    preferred = {fact_key(conflict.first): conflict.first for conflict in found}
    theirs = _facts(second, set(first.ids))
    return {id_ for r, id_ in theirs if fact_key(r) in preferred and not _agree(preferred[fact_key(r)], r)}


def _entries_to_add(first: Edits, second: Edits) -> list[Entry]:
    """Return the second's edits that make a fact for which the first lacks the second's latest answer."""
    shared = set(first.ids)
    answers = {fact_key(request): request for request, _ in _facts(first, ())}
    wanted = {fact_key(request): request for request, _ in _facts(second, shared)}
    answered = {key for key, request in wanted.items() if key in answers and _agree(answers[key], request)}
    added = []
    for entry in second.entries:
        if entry.id not in shared and not (
            entry.info.requests and answered.issuperset(map(fact_key, entry.info.requests))
        ):
            added.append(entry)
            # This entry may put an older answer of the second over the first's, so that the later one must follow.
            answered -= {fact_key(r) for r in entry.info.requests if not _agree(r, wanted[fact_key(r)])}
    return added


def _agree(first: EditRequest, second: EditRequest) -> bool:
    return first.target.strip() == second.target.strip()
