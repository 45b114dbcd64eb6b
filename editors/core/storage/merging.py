"""Two folders of edits: what one has that the other has not, and both in one ledger.

Two requests are about the same fact where subject and prompt are the same text, whatever its case and white space. That
two prompts ask the same in other words is not seen.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from errata.editors.core.errors import MergeError, OtherBaseError
from errata.editors.core.ledger.entry import Entry
from errata.editors.core.request import EditRequest
from errata.editors.core.storage.edit_folder import Edits

NAMED = 5  # conflicts that a refusal names before it counts


def fact_key(request: EditRequest) -> str:
    """What two requests about the same fact have in common."""
    return " ".join(unicodedata.normalize("NFC", request.text).casefold().split())


@dataclass(frozen=True)
class Conflict:
    """Two requests that want other answers for the same fact, with the edits that they are of."""

    first: EditRequest
    second: EditRequest
    ids: tuple[str, str]

    def __str__(self) -> str:
        return f"{self.first.text!r} shall be {self.first.target!r} ({self.ids[0]}) and {self.second.target!r}"


@dataclass(frozen=True)
class FolderDifference:
    """What tells two folders apart, fact by fact.

    Attributes:
        removed: Facts of the first alone.
        added: Facts of the second alone.
        changed: Facts of both with other answers, as (first, second).
        remade: Facts of both with the same answer and other edits, as (first, second).
        same: How many edits both have.
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
    """What the second has that the first has not, and the other way round. Edits of one id are the same edit."""
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
    """The facts for which both have another answer at last, the second's in edits that they do not share."""
    shared = set(first.ids) & set(second.ids)
    ours = {fact_key(request): (request, id_) for request, id_ in _facts(first, ())}
    theirs = {fact_key(request): (request, id_) for request, id_ in _facts(second, shared)}
    both = [(*ours[key], *theirs[key]) for key in theirs if key in ours]
    return [Conflict(our, their, (own, id_)) for our, own, their, id_ in both if not _agree(our, their)]


def merge(first: Edits, second: Edits, *, prefer: Literal["first", "second"] | None = None) -> Edits:
    """The edits of the first, and on top of them those of the second that say something that it does not.

    The weights are the sum of all. The edits of the second were computed without those of the first: whether each
    still holds is for `errata check` to say.

    Args:
        prefer: Whose edits to keep where they want other answers for the same fact; None: refuse.

    Raises:
        OtherBaseError: they are of two models; says in what these differ.
        MergeError: they want other answers for the same fact; names them all in `.conflicts`. Or an edit that is not
            preferred holds other facts as well, which would be lost; names those.
    """
    _check_one_base(first, second)
    found = conflicts(first, second)
    if found and prefer is None:
        said = [str(conflict) for conflict in found]
        more = f"; and {len(said) - NAMED} more" if len(said) > NAMED else ""
        raise MergeError(
            f"{len(said)} facts have two answers: {'; '.join(said[:NAMED])}{more}; take out those that are wrong, or "
            "say whose to prefer",
            conflicts=said,
        )
    gone = {conflict.ids[0] for conflict in found} if prefer == "second" else _beaten(first, second, found)
    _check_nothing_lost(first, second, gone)
    first, second = first.without(gone), second.without(gone)
    own, more = set(first.ids), _more(first, second)
    notes = {**second.notes, **first.notes}
    return replace(
        first,
        entries=first.entries + tuple(more),
        base={**second.base, **first.base},
        tokenizer=first.tokenizer or second.tokenizer,
        notes={id_: notes[id_] for id_ in (*own, *(entry.id for entry in more)) if id_ in notes},
    )


def _check_one_base(first: Edits, second: Edits) -> None:
    ours, theirs = first.model, second.model
    found = [
        f"{what}: {ours[what]} and {theirs[what]}"
        for what in ("name", "revision")
        if ours.get(what) and theirs.get(what) and ours[what] != theirs[what]
    ]
    weights = [name for name in first.base if name in second.base and not _same_mark(first.base, second.base, name)]
    found += [f"weight: {name}" for name in weights]
    if first.tokenizer and second.tokenizer and first.tokenizer != second.tokenizer:
        found.append("tokenizer")
    # One model may be called by several names; its bytes are then the same, where there are any to compare.
    if weights or "tokenizer" in found or (found and not first.base.keys() & second.base.keys()):
        raise OtherBaseError(f"these edits are of two models, which differ in {', '.join(found)}", differences=found)


def _check_nothing_lost(first: Edits, second: Edits, gone: Collection[str]) -> None:
    """Refuse to take out edits with facts that none of the others is about."""
    kept = {fact_key(request) for edits in (first, second) for request, _ in _facts(edits, gone)}
    lost = {
        fact_key(request): f"{request.text!r} ({id_})"
        for edits in (first, second)
        for request, id_ in _facts(edits, ())
        if id_ in gone and fact_key(request) not in kept
    }
    if lost:
        said = list(lost.values())
        more = f"; and {len(said) - NAMED} more" if len(said) > NAMED else ""
        raise MergeError(
            f"{len(said)} facts were made in one edit with those that are not preferred and would be lost: "
            f"{'; '.join(said[:NAMED])}{more}; remove that edit before, if they may go",
            conflicts=said,
        )


def _same_mark(ours: Mapping[str, str], theirs: Mapping[str, str], name: str) -> bool:
    return ours[name].split()[-1] == theirs[name].split()[-1]


def _facts(edits: Edits, without: Collection[str]) -> Iterator[tuple[EditRequest, str]]:
    """Requests with the ids of their edits; of a fact that was edited again the later one counts, being on top."""
    entry: Entry
    for entry in edits.entries:
        if entry.id not in without:
            yield from ((request, entry.id) for request in entry.info.requests)


def _beaten(first: Edits, second: Edits, found: Sequence[Conflict]) -> set[str]:
    """The second's edits that give a fact of these another answer than the first; those that it has made anew, too."""
    preferred = {fact_key(conflict.first): conflict.first for conflict in found}
    theirs = _facts(second, set(first.ids))
    return {id_ for r, id_ in theirs if fact_key(r) in preferred and not _agree(preferred[fact_key(r)], r)}


def _more(first: Edits, second: Edits) -> list[Entry]:
    """The second's edits of which a fact is not answered by the first as the second answers it at last."""
    shared = set(first.ids)
    said = {fact_key(request): request for request, _ in _facts(first, ())}
    wanted = {fact_key(request): request for request, _ in _facts(second, shared)}
    held = {key for key, request in wanted.items() if key in said and _agree(said[key], request)}
    more = []
    for entry in second.entries:
        if entry.id not in shared and not (entry.info.requests and held.issuperset(map(fact_key, entry.info.requests))):
            more.append(entry)
            # An older answer of the second's lies over the first's now, so that the later one must, too.
            held -= {fact_key(r) for r in entry.info.requests if not _agree(r, wanted[fact_key(r)])}
    return more


def _agree(first: EditRequest, second: EditRequest) -> bool:
    return first.target.strip() == second.target.strip()
