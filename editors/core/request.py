"""What a user asks for: one fact, as a prompt about a subject and the answer that the model should give.

    EditRequest("The mother tongue of {} is", subject="Danielle Darrieux", target="English")

The prompt holds `{}` where the subject goes, or the subject itself. `{}` is found as text: a prompt is never passed
through `str.format`, so every other brace in it is just a brace.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from errata.editors.core.errors import RequestError

SLOT = "{}"
# Longer than any prompt of a benchmark by two orders of magnitude, and still harmless to tokenise.
MAX_CHARACTERS = 20_000


@dataclass(frozen=True)
class EditRequest:
    """One correction.

    Attributes:
        prompt: Text that the answer continues, with `{}` in the subject's place, or with the subject written out
            (then it must stand there exactly once). White space at its end is yours: nothing is added behind it.
        subject: The entity that the fact is about, as it is spelled in the prompt. None where the fact has none: ROME
            and its family need one, and the other methods never look at it.
        target: The new answer.
        target_true: The answer that the new one replaces, where known; scoring compares with it.
        id: Name of the request in results; by default a digest of its content.
        join: What stands between prompt and answer. None: a blank where the writing has one between words and nothing
            where it has none (model/joining.py); "" for code, say.
        chat: Whether the prompt is a message to an instruct model: it is then read inside the tokenizer's chat template
            (model/reading.py), at the place where the assistant's answer begins.

    Raises:
        RequestError: a field is empty, of the wrong type, too long or holds a NUL or an unpaired surrogate; the subject
            is not in the prompt, or is there more than once and no `{}` says which is meant.
    """

    prompt: str
    subject: str | None
    target: str
    target_true: str | None = None
    id: str | None = None
    join: str | None = None
    chat: bool = False

    def __post_init__(self) -> None:
        for field in ("prompt", "target"):
            self._check_text(field, required=True)
        for field in ("subject", "target_true", "id"):
            self._check_text(field, required=False)
        self._check_form()
        self._check_slot()
        if self.target_true is not None and self.target.strip() == self.target_true.strip():
            raise self._error("target_true", f"the new answer {self.target!r} is the one that it should replace")
        if self.id is None:
            content = json.dumps([self.prompt, self.subject, self.target, self.target_true, *self._form().items()])
            object.__setattr__(self, "id", hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:12])

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values; `join` and `chat` only where they say something."""
        fields = {name: getattr(self, name) for name in ("prompt", "subject", "target", "target_true", "id")}
        return {**fields, **self._form()}

    def _form(self) -> dict[str, Any]:
        return form_of(self.join, self.chat)

    @property
    def template(self) -> tuple[str, str]:
        """The prompt before and after the subject; all of it and nothing where there is no subject."""
        if self.subject is None:
            return self.prompt, ""
        if SLOT in self.prompt:
            before, _, after = self.prompt.partition(SLOT)
        else:
            before, _, after = self.prompt.partition(self.subject)
        return before, after

    @property
    def text(self) -> str:
        """The prompt with the subject in its place."""
        before, after = self.template
        return f"{before}{self.subject or ''}{after}"

    @property
    def subject_span(self) -> tuple[int, int]:
        """Where the subject stands in `text`, as (first character, one past the last).

        Raises:
            RequestError: there is no subject.
        """
        start = len(self.template[0])
        return start, start + len(self.given_subject)

    @property
    def given_subject(self) -> str:
        """The subject, for code that cannot do without one.

        Raises:
            RequestError: there is none.
        """
        if self.subject is None:
            raise self._error(
                "subject",
                "is missing; a method that edits at the subject needs to know it; use one that does not (grace, ft_m, "
                "ft_l, lora, mend; `errata methods` marks them)",
            )
        return self.subject

    def _check_text(self, field: str, *, required: bool) -> None:
        value = getattr(self, field)
        if value is None and not required:
            return
        if not isinstance(value, str):
            raise self._error(field, f"expected text, got {type(value).__name__}")
        if not value.strip():
            raise self._error(field, "expected text, got an empty string; leave no field blank")
        if len(value) > MAX_CHARACTERS:
            raise self._error(field, f"has {len(value):,} characters; the limit is {MAX_CHARACTERS:,}")
        if "\x00" in value or any(0xD800 <= ord(char) <= 0xDFFF for char in value):
            raise self._error(field, "holds a NUL or an unpaired surrogate, which no tokenizer can read")

    def _check_form(self) -> None:
        if self.join is not None and not isinstance(self.join, str):
            raise self._error("join", f"expected text or null, got {type(self.join).__name__}")
        if not isinstance(self.chat, bool):
            raise self._error("chat", f"expected true or false, got {self.chat!r}")

    def _check_slot(self) -> None:
        if self.subject is None:
            if SLOT in self.prompt:
                raise self._error("subject", f"is missing, and {SLOT!r} stands for it: {_shorten(self.prompt)}")
            return
        slots, mentions = self.prompt.count(SLOT), self.prompt.count(self.subject)
        if slots > 1:
            raise self._error("prompt", f"holds {slots} slots {SLOT!r}; keep the one where the subject goes")
        if slots == 0 and mentions == 0:
            raise self._error(
                "prompt", f"holds neither {SLOT!r} nor the subject {self.subject!r}: {_shorten(self.prompt)}"
            )
        if slots == 0 and mentions > 1:
            raise self._error(
                "prompt", f"mentions the subject {self.subject!r} {mentions} times; write {SLOT!r} for the one meant"
            )
        if SLOT in self.subject:
            raise self._error("subject", f"holds {SLOT!r}, which marks the subject's place in the prompt")
        if self.subject != self.subject.strip():
            raise self._error("subject", f"begins or ends with white space: {self.subject!r}; strip it")

    def _error(self, field: str, message: str) -> RequestError:
        return RequestError(message, record=self.id if isinstance(self.id, str) else None, field=field)


def form_of(join: str | None, chat: bool) -> dict[str, Any]:
    """The fields that say how a prompt is read, where they differ from the plain form."""
    return {**({} if join is None else {"join": join}), **({"chat": True} if chat else {})}


def check_batch(requests: EditRequest | Sequence[EditRequest]) -> list[EditRequest]:
    """The requests as a list, once none of them repeats or contradicts another.

    Raises:
        RequestError: no request, something that is not an EditRequest, one request twice, two ids alike, or two
            answers for the same prompt and subject; the message names both.
    """
    batch = [requests] if isinstance(requests, (EditRequest, Mapping)) else list(requests)
    if not batch:
        raise RequestError("expected at least one EditRequest, got none")
    by_text: dict[tuple[str, bool], EditRequest] = {}
    by_id: dict[str | None, EditRequest] = {}
    for place, request in enumerate(batch):
        if not isinstance(request, EditRequest):
            raise RequestError(f"expected an EditRequest, got {type(request).__name__}", record=f"#{place}")
        if (earlier := by_text.get((request.text, request.chat)) or by_id.get(request.id)) is not None:
            raise _conflict(earlier, request)
        by_text[request.text, request.chat] = by_id[request.id] = request
    return batch


def _conflict(first: EditRequest, second: EditRequest) -> RequestError:
    if (first.text, first.chat) != (second.text, second.chat):
        return RequestError(f"has the id of another request ({_shorten(first.text)})", record=second.id, field="id")
    if first.target.strip() == second.target.strip():
        message = f"asks the same as request {first.id}: {_shorten(second.text)} -> {second.target!r}; drop one"
    else:
        message = (
            f"contradicts request {first.id}: {_shorten(second.text)} cannot be both {first.target!r} and "
            f"{second.target!r}; keep one"
        )
    return RequestError(message, record=second.id, field="target")


def _shorten(text: str, width: int = 80) -> str:
    return repr(text if len(text) <= width else text[: width - 3] + "...")
