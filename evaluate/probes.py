"""Probes and cases: the prompts that a model is scored on before and after an edit, and the answers expected after it.

Every probe takes the edited model's point of view: `target` is the answer that the model should give after a perfect
edit, and `other` is the answer that competes with it. So a probe passes if the target is more probable than the other,
for every kind, and a perfect edit passes all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

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

METRIC_OF_KIND: Mapping[str, str] = MappingProxyType(
    {
        "rewrite": "reliability",
        "paraphrase": "generalization",
        "neighborhood": "locality",
        "distracting_neighborhood": "distracting_locality",
        "portability": "portability",
    }
)


@dataclass(frozen=True)
class Probe:
    """One prompt, the answer expected after the edit (`target`) and a competing one (`other`), if there are any."""

    kind: Kind
    prompt: str
    target: str | None = None
    other: str | None = None
    join: str | None = None
    chat: bool = False

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
