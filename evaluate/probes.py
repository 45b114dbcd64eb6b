"""Probes and cases: the prompts that a model is scored on before and after an edit, and the answers expected after it.

Every probe takes the edited model's point of view: `target` is the answer that the model should give after a perfect
edit, and `other` is the answer that competes with it. So a probe passes if the target is more probable than the other,
for every kind, and a perfect edit passes all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from errata.editors.core.config import did_you_mean
from errata.editors.core.errors import RequestError
from errata.editors.core.extensions import ExtensionPoint
from errata.editors.core.request import EditRequest, form_of

Kind = Literal[
    "rewrite",  # the edited prompt itself: target = the new answer, other = the true one
    "paraphrase",  # the same question in other words: as rewrite
    "neighborhood",  # another subject with the same true answer: target = that answer, other = the new one
    "distracting_neighborhood",  # the same behind a sentence that states the edit (CounterFact+)
    "attribute",  # another subject for which the new answer is true: target = it, other = the true one
    "portability",  # a consequence of the edit: target = what now follows, other = what followed before
    "generation",  # an open prompt about the subject, for fluency: no answer
]
KINDS: tuple[Kind, ...] = get_args(Kind)
# Those about other subjects than the edited one.
_ABOUT_OTHERS = ("neighborhood", "distracting_neighborhood", "attribute")


@dataclass(frozen=True)
class ProbeKind:
    """A kind of probe of another package, registered by an entry point of `errata.probe_kinds`.

    Attributes:
        name: What `Probe.kind` says; also the name of the entry point.
        metric: The metric that says how often such probes are answered as expected; None: none does.
        title: How tables call the metric.
        meaning: What the metric means, in a sentence or two, for the page of a report.
        is_about_others: Whether the prompts are about other subjects than the edited one, which must keep their
            answers. A second metric then says how often they keep the untouched model's answer, and a sequence leaves
            out those that mention a subject of its other edits.
    """

    name: str
    metric: str | None = None
    title: str = ""
    meaning: str = ""
    is_about_others: bool = False


ADDED = ExtensionPoint(
    "errata.probe_kinds",
    "kind of probe",
    "a ProbeKind",
    lambda loaded: isinstance(loaded, ProbeKind),
    own=KINDS,
    named_by="name",
)


def kinds() -> tuple[str, ...]:
    """Return every kind of probe, those of this package first."""
    return ADDED.names()


def kinds_about_others() -> tuple[str, ...]:
    """Return the kinds of probes that are about other subjects than the edited one.

    Raises:
        ConfigError: Another package's kind cannot be imported.
    """
    return (*_ABOUT_OTHERS, *(kind.name for kind in ADDED.load_others() if kind.is_about_others))


@dataclass(frozen=True)
class Probe:
    """One prompt, the answer expected after the edit (`target`) and a competing one (`other`), if there are any.

    Raises:
        RequestError: There is no such kind; names the nearest.
    """

    kind: str
    prompt: str
    target: str | None = None
    other: str | None = None
    join: str | None = None
    chat: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS and self.kind not in ADDED.others():
            raise RequestError(f"unknown kind of probe {self.kind!r}{did_you_mean(self.kind, kinds())}", field="kind")

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values; `join` and `chat` only where they say something."""
        fields = {name: getattr(self, name) for name in ("kind", "prompt", "target", "other")}
        return {**fields, **form_of(self.join, self.chat)}


@dataclass(frozen=True)
class Case:
    """One edit request with the probes that measure its effect."""

    id: str
    request: EditRequest
    probes: tuple[Probe, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, without fields that say nothing, so that digests of older cases stay the same."""
        probes = [probe.as_dict() for probe in self.probes]
        return {"id": self.id, "request": self.request.as_dict(), "probes": probes}


def distracting(request: EditRequest, prompt: str) -> str:
    """Return CounterFact+'s prompt: the edit stated in a sentence, then a neighborhood prompt.

    Source: Hoelscher-Obermaier et al. 2023, section 3.
    """
    return f"{request.text} {request.target}. {prompt}"
