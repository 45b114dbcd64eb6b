"""What a file of facts states: corrections, and questions that show whether each of them holds and harms nothing.

    StatedFact(request, line, paraphrases=(Probe(...), ...), unchanged=(Probe(...), ...))

Rows come from the readers in fact_file.py with values as the file has them: texts, true or false, and questions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from errata.editors.core.config import did_you_mean
from errata.editors.core.errors import RequestError
from errata.editors.core.request import SLOT, EditRequest
from errata.editors.core.storage.merging import fact_key
from errata.evaluate.probes import Probe

QUESTIONS = ("paraphrases", "unchanged")
FIELDS = (*(field.name for field in fields(EditRequest)), *QUESTIONS)
REQUIRED = ("prompt", "target")
# What can be said once for a whole file.
DEFAULTS = ("join", "chat")
_QUESTION_FIELDS = ("prompt", "answer", "join", "chat")
_BOOLEANS = {"true": True, "false": False}


@dataclass(frozen=True)
class FactProblem:
    """What is wrong in a line of a file, counted from 1."""

    line: int
    message: str


@dataclass(frozen=True)
class StatedFact:
    """A correction, the line on which it begins, and what is asked about it.

    Attributes:
        request: The correction.
        line: Counted from 1.
        paraphrases: The same question in other words; the model should answer each with the target.
        unchanged: Questions that should be answered as before. Without a target, the untouched model is asked.
    """

    request: EditRequest
    line: int
    paraphrases: tuple[Probe, ...] = ()
    unchanged: tuple[Probe, ...] = ()


Row = tuple[int, dict[str, Any]]  # line, and the values as the file has them
LinedValue = tuple[int, Any]  # line, and one question: a text, or a mapping of its fields
Complain = Callable[[int, str], None]


def fact_of(row: Row, problems: list[FactProblem], defaults: Mapping[str, Any]) -> StatedFact | None:
    """Return the fact of a row; None, and what is wrong with it, where it is none.

    Args:
        row: Its questions are lists of `LinedValue`. A value that is already named as a problem is `...`.
        problems: Gets what is wrong.
        defaults: The values of `join` and `chat` where the row has none.
    """
    line, values = row
    count = len(problems)

    def complain(at: int, message: str) -> None:
        problems.append(FactProblem(at, message))

    for name in values:
        if name not in FIELDS:
            complain(line, f"unknown field {name!r}{did_you_mean(str(name), FIELDS)}")
    for name in REQUIRED:
        if values.get(name) is None:
            complain(line, f"{name} is missing")
    texts = {name: values[name] for name in FIELDS if name in values and name not in (*QUESTIONS, "chat")}
    for name, value in texts.items():
        if value is not None and value is not ... and not isinstance(value, str):
            complain(line, f"{name}: expected text, got {json.dumps(value)}")
    chat = truth(values.get("chat"), "chat", line, complain)
    form = {
        "join": values.get("join", defaults.get("join")),
        "chat": defaults.get("chat", False) if chat is None else chat,
    }
    if len(problems) > count or ... in values.values():
        return None
    try:
        request = EditRequest(**{"subject": None, **texts, **form})
    except RequestError as error:
        complain(line, f"{error.field}: {error.message}" if error.field else error.message)
        return None
    asked = {name: tuple(_questions(name, values.get(name) or [], request, complain)) for name in QUESTIONS}
    return StatedFact(request, line, **asked) if len(problems) == count else None


def truth(value: Any, name: str, line: int, complain: Complain) -> bool | None:
    """Return a value as true or false; None where there is none or it is neither, which is complained of."""
    if value is None or value is ... or isinstance(value, bool):
        return None if value is ... else value
    if isinstance(value, str) and value.strip().lower() in _BOOLEANS:
        return _BOOLEANS[value.strip().lower()]
    complain(line, f"{name}: expected true or false, got {value!r}")
    return None


def _questions(name: str, rows: Sequence[LinedValue], request: EditRequest, complain: Complain) -> Iterator[Probe]:
    """The questions under one name as probes, in the form of the fact where they do not have their own."""
    kind, target = ("paraphrase", request.target) if name == "paraphrases" else ("neighborhood", None)
    for line, value in rows:
        said = {"prompt": value} if isinstance(value, str) else value
        if not isinstance(said, Mapping):
            complain(line, f"{name}: expected a prompt, or prompt and answer, got {json.dumps(said)}")
            continue
        if unknown := [key for key in said if key not in _QUESTION_FIELDS]:
            complain(line, f"{name}: unknown field {unknown[0]!r}{did_you_mean(str(unknown[0]), _QUESTION_FIELDS)}")
            continue
        prompt, answer, join = (said.get(key) for key in ("prompt", "answer", "join"))
        chat = truth(said.get("chat"), f"{name}: chat", line, complain)
        if not isinstance(prompt, str) or not prompt.strip():
            complain(line, f"{name}: expected a prompt, got {'nothing' if prompt is None else repr(prompt)}")
        elif answer is not None and (not isinstance(answer, str) or not answer.strip()):
            complain(line, f"{name}: answer: expected text, got {answer!r}; leave it out where it is not known")
        elif join is not None and not isinstance(join, str):
            complain(line, f"{name}: join: expected text, got {join!r}")
        elif SLOT in prompt and request.subject is None:
            complain(line, f"{name}: {prompt!r} holds {SLOT!r}, but the fact has no subject")
        else:
            text = prompt if request.subject is None else prompt.replace(SLOT, request.subject, 1)
            form = (request.join if join is None else join, request.chat if chat is None else chat)
            yield Probe(kind, text, answer or target, None, *form)


def clashes(facts: Sequence[StatedFact]) -> Iterator[FactProblem]:
    """Facts that another one above repeats or contradicts."""
    by_key: dict[str, StatedFact] = {}
    by_id: dict[str | None, StatedFact] = {}
    for fact in facts:
        request = fact.request
        earlier = by_key.setdefault(fact_key(request), fact)
        if earlier is not fact and earlier.request.target.strip() == request.target.strip():
            yield FactProblem(
                fact.line, f"repeats line {earlier.line}: {request.text!r} -> {request.target!r}; drop one"
            )
        elif earlier is not fact:
            both = f"{earlier.request.target!r} and {request.target!r}"
            yield FactProblem(
                fact.line, f"contradicts line {earlier.line}: {request.text!r} cannot be both {both}; keep one"
            )
        named = by_id.setdefault(request.id, fact)
        if named is not fact and earlier is fact:
            yield FactProblem(fact.line, f"has the id {request.id!r} of line {named.line}; give each its own")
