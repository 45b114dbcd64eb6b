"""Corrections of one codebook before their values are trained: what each will find there, and which can be trained side
by side although they are made one after another.

What a codebook looks like does not depend on the values in it: keys and radii follow from queries and answers, and
queries from the model beneath the module. So all of it is known before anything is trained. What training does depend
on is the value that it goes on from, and those that other tokens of its row meet. A correction is trained as soon as
these are: all that need nothing of the same edit at once, then those that need only these, and so on.

Shapes: L tokens of a row; d width of the module's input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from errata.editors.core.codebook.codebook import Codebook, Correction, Decision, Record
from errata.editors.core.codebook.position_rule import spread_keys
from errata.editors.core.families.fine_tuning import TrainingRow
from errata.editors.core.ledger import arithmetic
from errata.editors.core.request import EditRequest


@dataclass(frozen=True, eq=False)
class GraceQuestion:
    """A request as a codebook takes it.

    Attributes:
        row: Its tokens.
        x: (L, d) what they bring to the module.
        columns: Those in which the value is trained.
        correction: The record of it; training writes the value into it.
    """

    request: EditRequest
    row: TrainingRow
    x: Tensor
    columns: range
    correction: Correction


@dataclass(frozen=True, eq=False)
class TrainingJob:
    """A request and what it finds of the codebook.

    Attributes:
        decision: Which rule it falls under.
        origin: The record whose value it goes on from; None where it begins anew.
        met: For columns outside its own the record that gives the module's output there, None for the module itself;
            of columns that are not named, the model gives the right output as it stands.
    """

    asked: GraceQuestion
    decision: Decision
    origin: Record | None
    met: Mapping[int, Record | None]

    @property
    def needs(self) -> list[Correction]:
        """The corrections whose values it is trained with."""
        return [record[0] for record in (self.origin, *self.met.values()) if record]


def plan_jobs(book: Codebook, asked: Sequence[GraceQuestion], *, sequential: bool) -> list[TrainingJob]:
    """What each request finds.

    Args:
        book: The module's codebook as the model stands, perhaps an empty one, on the device of what is asked.
        sequential: Each finds the codebook as those before it leave it; else all as it stands.
    """
    now, drafts = book, []
    if sequential and len(asked) > 1:
        book = book.copy()  # what is only drafted takes no memory that the ledger's next correction is to go to
    for one in asked:
        correction = one.correction
        with arithmetic.plain_arithmetic(one.x.device.type):
            decision = book.decide(correction.keys[0], correction.labels[0], correction.eps, correction.rounding)
            origin = book.record(decision.nearest) if decision.rule in ("expand", "keep") else None
            met = _met(now, book, one)
            if sequential and one is not asked[-1]:
                book = book.extended([correction])
        drafts.append(TrainingJob(one, decision, origin, met))
    return drafts


def order_jobs(drafts: Sequence[TrainingJob]) -> list[list[int]]:
    """Places of the drafts in the order in which they can be trained, those together that need nothing of each other:
    none needs a value of its own wave or of a later one."""
    wave_of: dict[int, int] = {}
    found: list[list[int]] = []
    for place, draft in enumerate(drafts):
        wave = 1 + max((wave_of.get(id(needed), -1) for needed in draft.needs), default=-1)
        wave_of[id(draft.asked.correction)] = wave
        if wave == len(found):
            found.append([])
        found[wave].append(place)
    return found


def _met(now: Codebook, book: Codebook, asked: GraceQuestion) -> dict[int, Record | None]:
    """What gives the output outside the request's own columns, wherever it may not be what the model as it stands does:
    where a key is met now or then, or might be behind the row's end, where its batch is padded."""
    before, then = (spread_keys(each.lookup(asked.x)[None], each.replacement)[0].tolist() for each in (now, book))
    anywhere = now.looks_ahead and len(now.slots) > 0
    return {
        column: book.record(key) if key >= 0 else None
        for column, (old, key) in enumerate(zip(before, then, strict=True))
        if column not in asked.columns and (anywhere or old >= 0 or key >= 0)
    }
