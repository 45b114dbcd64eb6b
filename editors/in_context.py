"""ICE, IKE and SCR: the fact is not written into the model, but read before each question.

    New Fact: The mother tongue of Danielle Darrieux is English
    Prompt: Danielle Darrieux speaks

ICE is the fact alone (Cohen et al. 2024, "Evaluating the Ripple Effects of Knowledge Editing in Language Models"). IKE
puts demonstrations before it (Zheng et al. 2023, "Can We Edit Factual Knowledge by In-Context Learning?"). SCR reads a
fact only if it is similar enough to the question (the idea of arXiv 2505.18690, "selective contextual reasoning", which
asks the model; here a bound on the similarity decides). No claim about editing weights says much without them.

The edits are texts in the ledger (core/contexts/context.py says why). An undo, a saved edit, a sequence and the bench
work as for every method. A question reads the `facts` facts that are most similar to it. With one fact on the model,
that is always this one, unless a `threshold` bars it.

What is not possible: the weights do not change, so that no LoRA adapter and no merged model can hold such an edit;
both exports refuse. Text that is not a question reads no facts: perplexities are those of the model alone. Only
errata's scores and texts read them, `model.generate` does not.

Papers and code differ from each other and from this file:

- The authors of IKE take the records nearest by all-MiniLM-L6-v2, draw a kind for each (4 copy, 12 update, 16 retain),
  and end with the edit itself: `form=ike`. EasyEdit takes the nearest of all texts, the nearest first, without the
  edit: `form=easyedit`. Similarity is by words here, unless `encoder=sentence`.
- Their demonstrations are of CounterFact. Without `demonstrations` they are about made-up people here.
- Demonstrations that the model has no positions for are left out, the least similar first. Theirs run on.
- The authors draw from one stream for all edits; here each edit has a stream, so that it does not depend on the others.

Legend: k demonstrations; a fact is a prompt with its new answer.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from errata.editors.core.config import EditorConfig, check_positive
from errata.editors.core.contexts.asking import stated
from errata.editors.core.contexts.context import Context, Encoder, Fact, Retrieval, Retrieve
from errata.editors.core.contexts.demonstrations import (
    DemonstrationRecord,
    drawn,
    made_up,
    read_demonstrations,
)
from errata.editors.core.contexts.similarity import BATCH_TOKENS, similarities
from errata.editors.core.edit import Solution
from errata.editors.core.editor import Editor
from errata.editors.core.errors import ConfigError, NumericalError, RequestError
from errata.editors.core.forward.gradient_factors import AnsweredRow, answer_losses
from errata.editors.core.ledger.interrupts import safe_point
from errata.editors.core.ledger.patch import Patch
from errata.editors.core.model.activations import limit_batch_tokens, run_base
from errata.editors.core.model.batching import PROMPT_PADDING, pack_batches
from errata.editors.core.model.joining import joined
from errata.editors.core.model.reading import read_ids
from errata.editors.core.model.tokens import pad_id, right_padded
from errata.editors.core.request import EditRequest


@dataclass(frozen=True, kw_only=True)
class ICEConfig(EditorConfig):
    """ICE's fields."""

    retrieve: Retrieve = "nearest"
    """Which facts a question reads: nearest, those most similar to it; own, those of the newest edit."""

    facts: int = 1
    """How many of the nearest facts."""

    threshold: float | None = None
    """A fact whose cosine with the question is below this is not read; null: there is no such bound."""

    encoder: Encoder = "tfidf"
    """What is compared: tfidf, the words; hidden, the model's own hidden states; sentence, sentence embeddings (needs
    sentence-transformers)."""

    sentence_encoder: str = "sentence-transformers/all-MiniLM-L6-v2"
    """The model of `encoder=sentence`, a name or a folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("facts",))
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            raise ConfigError(f"threshold: expected a cosine, between -1 and 1, got {self.threshold}")


@dataclass(frozen=True, kw_only=True)
class IKEConfig(ICEConfig):
    """IKE's fields. Defaults are those of its authors' code, except the encoder."""

    FILES = ("demonstrations",)

    demonstrations: str | None = None
    """File of records to demonstrate with, in CounterFact's or EasyEdit's form; null: 64 records about made-up
    people."""

    k: int = 32
    """Number of demonstrations (16 in EasyEdit's files)."""

    form: Literal["ike", "easyedit"] = "ike"
    """Which demonstrations are taken, and in which order; see the top of this file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("k",))


@dataclass(frozen=True, kw_only=True)
class SCRConfig(ICEConfig):
    """SCR's fields."""

    threshold: float | None = 0.5
    """A fact whose cosine with the question is below this is not read; null: there is no such bound. The value is ours,
    for `encoder=tfidf`."""


class ICE(Editor):
    """In-context editing: the fact is read before the question (Cohen et al. 2024)."""

    name = "ice"
    writes_weights = False
    one_by_one = True
    Config = ICEConfig
    config: ICEConfig

    def setup(self) -> None:
        embedding = self.model.get_input_embeddings()  # type: ignore[operator]
        self.pad = pad_id(self.tokenizer)
        self.module_name = next(name for name, module in self.model.named_modules() if module is embedding)

    def retrieval(self) -> Retrieval:
        """Return how questions find their facts."""
        config = self.config
        return Retrieval(config.retrieve, config.facts, config.threshold, config.encoder, config.sentence_encoder)

    def demonstrations(self, requests: Sequence[EditRequest]) -> list[tuple[str, ...]]:
        """Return the texts to read before the fact of each request: none here."""
        return [()] * len(requests)

    def solve(self, requests: Sequence[EditRequest]) -> list[Solution]:
        started = time.perf_counter()
        facts = [
            Fact(statement(request), texts)
            for request, texts in zip(requests, self.demonstrations(requests), strict=True)
        ]
        rows = [self.row(request) for request in requests]
        losses = self._losses(requests, rows)
        seconds = (time.perf_counter() - started) / len(requests)
        solutions = []
        for request, fact, row, loss in zip(requests, facts, rows, losses, strict=True):
            patch = Patch({}, {self.module_name: Context((fact,), self.retrieval())})
            report = {"loss": loss, "tokens": len(row.ids), "demonstrations": len(fact.demonstrations)}
            solutions.append(Solution((request,), patch, ({**report, "seconds": seconds},)))
        return solutions

    @torch.no_grad()
    def _losses(self, requests: Sequence[EditRequest], rows: Sequence[AnsweredRow]) -> list[float]:
        """Return the loss of each answer behind its fact and its own question, in nats per token.

        Raises:
            NumericalError: It is not finite. The model itself is broken then.
        """
        losses = [0.0] * len(rows)
        limit = limit_batch_tokens(BATCH_TOKENS, self.architecture.device)
        for group in pack_batches([len(row.ids) for row in rows], batch_tokens=limit, max_padding=PROMPT_PADDING):
            safe_point()
            chosen = [rows[i] for i in group]
            batch = right_padded([row.ids for row in chosen], self.pad).to(self.architecture.device)
            each = answer_losses(self.architecture, run_base(self.architecture, batch), chosen)
            for i, part in zip(group, each.split([len(row.answer) for row in chosen]), strict=True):
                losses[i] = float(part.mean())
                if not math.isfinite(losses[i]):
                    message = "the model gives no finite probability to its answer; the model itself is broken"
                    raise NumericalError(message, record=requests[i].id)
        return losses

    def row(self, request: EditRequest) -> AnsweredRow:
        """Return the fact, its own question and the answer as ids, once the model has positions for them.

        Raises:
            RequestError: The answer has no tokens, or the model is too short for fact, question and answer.
        """
        text = stated([Fact(statement(request))], (), request.text)
        try:
            ids, answer = read_ids(self.tokenizer, text, request.target, chat=request.chat, join=request.join)
        except RequestError as error:
            raise error.of(request.id) from error
        length = len(ids) + len(answer) - 1
        self.architecture.check_length(length, f"{length} tokens with the fact before it", request.id)
        return AnsweredRow((*ids, *answer[:-1]), tuple(answer))


class IKE(ICE):
    """In-context knowledge editing with demonstrations (Zheng et al. 2023)."""

    name = "ike"
    Config = IKEConfig
    config: IKEConfig

    def setup(self) -> None:
        super().setup()
        path = self.config.demonstrations
        self.records = made_up(64) if path is None else read_demonstrations(path)

    def retrieval(self) -> Retrieval:
        config = self.config
        return Retrieval(
            config.retrieve,
            config.facts,
            config.threshold,
            config.encoder,
            config.sentence_encoder,
            nearest_last=config.form == "ike",
        )

    def demonstrations(self, requests: Sequence[EditRequest]) -> list[tuple[str, ...]]:
        """Return the demonstrations of each request, as they are read."""
        if self.config.form == "easyedit":
            texts = [text for record in self.records for text in record.every]
            queries = [f"{stated([Fact(statement(request))], (), request.text)}\n\n" for request in requests]
            return [tuple(texts[i] for i in order) for order in self._nearest(texts, queries)]
        texts = [record.copied for record in self.records]
        queries = [stated([Fact(statement(request))], (), request.text) for request in requests]
        return [
            self.drawn([self.records[i] for i in order], request)
            for order, request in zip(self._nearest(texts, queries), requests, strict=True)
        ]

    def drawn(self, records: Sequence[DemonstrationRecord], request: EditRequest) -> tuple[str, ...]:
        """Return demonstrations by these records, the most similar first."""
        draws = random.Random(json.dumps([self.config.seed, request.text, request.target]))
        return tuple(drawn(records, statement(request), draws))

    def _nearest(self, texts: Sequence[str], queries: Sequence[str]) -> list[list[int]]:
        """Return the indices of the k texts that are most similar to each query, the most similar first."""
        rows = similarities(
            self.config.encoder,
            texts,
            queries,
            model=self.model,
            tokenizer=self.tokenizer,
            sentence_encoder=self.config.sentence_encoder,
        )
        return [sorted(range(len(row)), key=lambda i, row=row: -row[i])[: self.config.k] for row in rows]


class SCR(ICE):
    """In-context editing behind a bound on similarity: other questions read no fact (after arXiv 2505.18690)."""

    name = "scr"
    Config = SCRConfig
    config: SCRConfig


def statement(request: EditRequest) -> str:
    """Return the request's prompt with its new answer."""
    return joined(request.text, request.target, request.join)
