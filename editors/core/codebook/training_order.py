"""The order in which GRACE trains several corrections of one codebook: which together, and which after others.

Requests are applied one after another, and each one's value is trained on the codebook that the earlier ones leave. Yet
keys and radii do not depend on values. They follow from queries and answers, and queries come from the model below the
module. So the codebook that each request finds is known before anything is trained. Training a value needs other values
in two cases only: it starts from one, or other tokens of its row match keys. Therefore requests that need no value of
each other are trained together (a wave), then those that need only these, and so on.

Example: two requests with rows of five tokens, an empty codebook, eps = 0.5, replace_last, module inputs of width 1.

    column                 0     1     2     3     4
    input x, request A     0     1    [2]    3     4     [ ]: the column whose value is trained; x there is the query
    input x, request B     2     5     6    [7]    8

    kept     the key of A is 2, that of B is 7: both are new. Column 0 of B matches the key of A.
    run      wave 0: A      wave 1: B, with the value of A at its column 0

Without column 0 of B, or with `sequential=False` (each request finds the codebook as it is), both are one wave.

Shapes: L tokens of a row; d width of the module's input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from errata.editors.core.codebook.codebook import Codebook, Correction, Decision, Record
from errata.editors.core.codebook.position_rule import spread_keys
from errata.editors.core.families.trainables import TrainingRow
from errata.editors.core.ledger import arithmetic
from errata.editors.core.request import EditRequest


@dataclass(frozen=True, eq=False)
class GraceQuestion:
    """A request, tokenised and run up to the module.

    Attributes:
        request: The request.
        row: Its tokens.
        x: (L, d) the module's input at each of them.
        columns: The columns in which the value is trained.
        correction: Its correction of the codebook. Training writes the value into it.
        y: (L, d_v) what the value replaces, where that is not the output of the module whose inputs are keys.
    """

    request: EditRequest
    row: TrainingRow
    x: Tensor
    columns: range
    correction: Correction
    y: Tensor | None = None


@dataclass(frozen=True, eq=False)
class TrainingJob:
    """A request, and what its training needs from the codebook.

    Attributes:
        question: The request.
        decision: The rule that applies to it.
        origin: The record whose value training starts from; None for a new start.
        other_columns: For some columns outside its own, the record that gives the module's output there, or None for
            the module itself. In columns that are not listed, the model as it is gives the right output.
    """

    question: GraceQuestion
    decision: Decision
    origin: Record | None
    other_columns: Mapping[int, Record | None]

    @property
    def needs(self) -> list[Correction]:
        """The corrections whose values its training needs."""
        return [record[0] for record in (self.origin, *self.other_columns.values()) if record]


def plan_jobs(book: Codebook, questions: Sequence[GraceQuestion], *, sequential: bool) -> list[TrainingJob]:
    """Return what each request finds in the codebook.

    Args:
        book: The module's codebook as it is, perhaps empty, on the device of the questions.
        questions: The requests.
        sequential: Each request finds the codebook as the earlier ones leave it; otherwise all find it as it is.
    """
    now, jobs = book, []
    if sequential and len(questions) > 1:
        # Planned keys must not take the memory that the ledger's next correction extends.
        book = book.copy()
    for question in questions:
        correction = question.correction
        with arithmetic.plain_arithmetic(question.x.device.type):
            decision = book.decide(correction.keys[0], correction.labels[0], correction.radius(0), correction.rounding)
            origin = book.record(decision.nearest) if decision.rule in ("expand", "keep") else None
            other_columns = _other_columns(now, book, question)
            if sequential and question is not questions[-1]:
                book = book.extended([correction])
        jobs.append(TrainingJob(question, decision, origin, other_columns))
    return jobs


def order_jobs(jobs: Sequence[TrainingJob]) -> list[list[int]]:
    """Return the indices of the jobs in waves: no job needs a value of its own wave or of a later one."""
    wave_of: dict[int, int] = {}
    waves: list[list[int]] = []
    for index, job in enumerate(jobs):
        wave = 1 + max((wave_of.get(id(needed), -1) for needed in job.needs), default=-1)
        wave_of[id(job.question.correction)] = wave
        if wave == len(waves):
            waves.append([])
        waves[wave].append(index)
    return waves


def _other_columns(now: Codebook, book: Codebook, question: GraceQuestion) -> dict[int, Record | None]:
    """Return what gives the module's output outside the request's own columns, where the model as it is may be wrong.

    That is where a key matches now or will match then. With a rule that looks ahead it is everywhere, as a key may
    match behind the row's end, in the padding of its batch.
    """
    before, then = (spread_keys(each.lookup(question.x)[None], each.replacement)[0].tolist() for each in (now, book))
    anywhere = now.looks_ahead and len(now.slots) > 0
    return {
        column: book.record(key) if key >= 0 else None
        for column, (old, key) in enumerate(zip(before, then, strict=True))
        if column not in question.columns and (anywhere or old >= 0 or key >= 0)
    }
