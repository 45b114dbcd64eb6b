"""The record of an edit that is a text: facts that are read before every question, as in in-context editing.

Such a record is an adapter of the token embedding, and its hook does nothing. That is on purpose. As an adapter it
travels with the ledger: it is applied, undone, saved, merged and journalled like any other edit. A hook could not do
its work.
The text must be tokenised with the question, and what is retrieved depends on the question alone. A forward pass sees
only ids, and in scoring the question and its answer in one row. So the code that turns a question into ids asks for the
contexts (asking.py): scores and generation do. Other methods compute their edits on bare prompts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from errata.editors.core.errors import LedgerError
from errata.editors.core.ledger.adapter import Adapter, Folded
from errata.editors.core.ledger.adapter_hooks import active_hooks

Retrieve = Literal["nearest", "own"]
Encoder = Literal["tfidf", "hidden", "sentence"]


@dataclass(frozen=True)
class Fact:
    """One fact.

    Attributes:
        statement: The prompt with its new answer.
        demonstrations: Texts to read before it, as they are read.
    """

    statement: str
    demonstrations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Retrieval:
    """Which facts a question reads.

    Attributes:
        retrieve: nearest: those most similar to the question; own: those of the newest edit, whatever the question.
        facts: How many of the nearest.
        threshold: A fact that is less similar to the question is not read; None: there is no such bound.
        encoder: What similarity is: the cosine of TF-IDF vectors, of the model's own hidden states, or of sentence
            embeddings.
        sentence_encoder: Name of the model that embeds sentences.
        nearest_last: Whether the demonstrations of a fact end with the most similar one. If they do not fit, the least
            similar ones are left out.
    """

    retrieve: Retrieve = "nearest"
    facts: int = 1
    threshold: float | None = None
    encoder: Encoder = "tfidf"
    sentence_encoder: str = ""
    nearest_last: bool = True


@dataclass(frozen=True)
class Context(Adapter):
    """The facts of one edit."""

    facts: tuple[Fact, ...]
    retrieval: Retrieval
    kind = "context"

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return {"facts": _as_bytes(self.facts)}

    @property
    def numbers(self) -> Mapping[str, Any]:
        return asdict(self.retrieval)

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> Self:
        try:
            records = json.loads(bytes(tensors["facts"].cpu().tolist()).decode("utf-8"))
            facts = tuple(Fact(record["statement"], tuple(record["demonstrations"])) for record in records)
            return cls(facts, Retrieval(**numbers))
        except (KeyError, TypeError, ValueError) as error:
            raise LedgerError(f"this is no record of a context: {type(error).__name__}: {error}") from error

    @classmethod
    def joined(cls, adapters: Sequence[Self]) -> Self:
        return cls(tuple(fact for each in adapters for fact in each.facts), adapters[0].retrieval)

    @classmethod
    def folded(cls, adapters: Sequence[Self]) -> Contexts:
        return Contexts(()).extended(adapters)

    def check(self, module: nn.Module) -> None:  # noqa: ARG002 - a text fits every model
        if not self.facts:
            raise LedgerError("expected a context with at least one fact")

    def norm(self) -> float:
        """Return the number of facts: a text has no norm."""
        return float(len(self.facts))


@dataclass(frozen=True)
class Contexts(Folded):
    """The facts of all edits on a model, in their order."""

    records: tuple[Context, ...]
    kind = "context"

    @property
    def facts(self) -> tuple[Fact, ...]:
        return tuple(fact for record in self.records for fact in record.facts)

    @property
    def retrieval(self) -> Retrieval:
        return self.records[-1].retrieval

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any, /) -> None:
        """Do nothing: contexts act where a question becomes ids."""

    def extended(self, adapters: Sequence[Context]) -> Contexts:
        records = (*self.records, *adapters)
        if any(record.retrieval != records[0].retrieval for record in records):
            raise LedgerError(
                "the facts on this model are retrieved in another way; undo them first, or use the same settings"
            )
        return Contexts(records)

    def to(self, device: torch.device) -> Contexts:  # noqa: ARG002 - a text is on no device
        return self

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return {"facts": _as_bytes(self.facts)}


def contexts_of(model: nn.Module) -> Contexts | None:
    """Return the facts that questions to a model read now; None if there are none, as inside `untouched()`."""
    for module in model.modules():
        for hook in active_hooks(module):
            if isinstance(hook.folded, Contexts):
                return hook.folded
    return None


def _as_bytes(facts: Sequence[Fact]) -> Tensor:
    text = json.dumps([asdict(fact) for fact in facts])
    return torch.tensor(list(text.encode("utf-8")), dtype=torch.uint8)
