"""Which heads speak for what a model remembers, and which for what its context says.

    conflict = FalseContext("The capital of Poland is", memory="Warsaw", context="Oslo")
    conflict.text                                   # "The capital of Poland is Oslo. The capital of Poland is"
    found = attribute_heads(model, tokenizer, [conflict])
    found.strongest("memory"), found.strongest("context")

A head's attribution is what it adds to the logit difference of the two answers on the direct way: its output at the
last token, through its slice of the output projection, the final norm at the length that the whole state has, and the
head of the model. Positive is for the context, negative for memory. Attributions of all parts sum to the difference.

Source: Yu, Merullo and Pavlick 2023, section 4; the final norm is ours, since without it parts of layers with different
scales cannot be compared. Direct ways alone are counted: what a head tells later heads is not.

Shapes: n conflicts, L layers, H query heads, w width of a head, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from errata.editors.core.errors import ArchitectureError, ConfigError, RequestError
from errata.editors.core.locating.block_sums import BlockSums, block_sums
from errata.editors.core.locating.frozen_norms import exact, freeze_tail
from errata.editors.core.model import parts
from errata.editors.core.model.activations import batches_by_length, limit_batch_tokens, run_base, without_autocast
from errata.editors.core.model.architecture import Architecture, describe
from errata.editors.core.model.joining import joined
from errata.editors.core.model.own_forward import evaluating
from errata.editors.core.model.reading import as_read
from errata.editors.core.model.tokens import Tokenizer, answer_ids, pad_id, prompt_ids, right_padded
from errata.editors.core.progress import Progress, silent

Side = Literal["context", "memory"]


class Head(NamedTuple):
    """A query head: its layer and its index in it, both counted from 0. As text: "23.4"."""

    layer: int
    index: int

    def __str__(self) -> str:
        return f"{self.layer}.{self.index}"

    @classmethod
    def of(cls, text: str) -> Head:
        """Return the head that a text names.

        Raises:
            ConfigError: it is not of the form LAYER.HEAD.
        """
        layer, dot, index = text.partition(".")
        if not (dot and layer.isdecimal() and index.isdecimal()):
            raise ConfigError(f"expected a head as LAYER.HEAD, such as 3.0, got {text!r}")
        return cls(int(layer), int(index))


@dataclass(frozen=True)
class FalseContext:
    """A question behind a sentence that answers it otherwise than the model remembers.

    Attributes:
        question: Text that the answer continues.
        memory: What the model remembers.
        context: What the sentence says.
        id: Its name in results.
        join: What stands between question and answer; None: see `joining.joined`.
        chat: Whether the text is a message to an instruct model.
    """

    question: str
    memory: str
    context: str
    id: str = ""
    join: str | None = None
    chat: bool = False

    @property
    def text(self) -> str:
        """The false sentence and the question, as CounterFact+ puts a sentence in front of a prompt."""
        return f"{joined(self.question, self.context, self.join)}. {self.question}"


@dataclass(frozen=True)
class ReadContext:
    """A conflict as the model reads it: the tokens of the text, those of the question alone, and the answers' first."""

    ids: tuple[int, ...]
    question: tuple[int, ...]
    memory: int
    context: int


@dataclass(frozen=True)
class HeadAttributions:
    """What each head adds to the logit difference, context over memory.

    Attributes:
        values: (n, L, H) in logits, float64; NaN in blocks without an attention.
        differences: (n,) the whole logit differences.
    """

    values: Tensor
    differences: Tensor

    @property
    def mean(self) -> Tensor:
        """Return the mean over conflicts, (L, H)."""
        return self.values.mean(0)

    def strongest(self, side: Side, count: int = 1) -> list[Head]:
        """Return the heads that speak most for the context, or for memory, on average; the strongest first.

        Blocks without an attention have none, so that there may be fewer than `count`.
        """
        mean = (self.mean if side == "context" else -self.mean).flatten()
        count = min(count, int((~mean.isnan()).sum()))
        order = mean.nan_to_num(-torch.inf).argsort(descending=True, stable=True)[:count].tolist()
        return [Head(*divmod(index, self.mean.shape[1])) for index in order]


@dataclass(frozen=True)
class Answer:
    """What a model says to a conflict.

    Attributes:
        says: "context", "memory" or "other".
        difference: The logit difference, context over memory.
    """

    says: str
    difference: float


def n_heads(architecture: Architecture, layer: int) -> int:
    """Return the query heads of a block's attention: the output projection has a slice of inputs for each.

    Raises:
        ArchitectureError: the configuration does not say how many, or the projection's inputs are no multiple of it.
    """
    count = getattr(parts.text_config(architecture.model), "num_attention_heads", None)
    found = architecture.attention_map(layer)
    if not isinstance(count, int) or found.shape[1] % count:
        raise ArchitectureError(
            f"{found.name} has {found.shape[1]} inputs, which are no slices of {count} heads each as wide as the others"
        )
    return count


def read_conflict(tokenizer: Tokenizer, conflict: FalseContext) -> ReadContext:
    """Return the tokens of a conflict.

    Raises:
        RequestError: an answer tokenises to nothing, or both answers begin with the same token.
    """
    read, alone = (as_read(tokenizer, text, chat=conflict.chat) for text in (conflict.text, conflict.question))
    join = conflict.join if read.join is None else read.join
    memory, context = (
        answer_ids(tokenizer, read.text, answer, join)[0] for answer in (conflict.memory, conflict.context)
    )
    if memory == context:
        raise RequestError(
            f"the answers {conflict.memory!r} and {conflict.context!r} begin with the same token, which is what counts",
            record=conflict.id or None,
            field="context",
        )
    return ReadContext(
        tuple(prompt_ids(tokenizer, read.text)), tuple(prompt_ids(tokenizer, alone.text)), memory, context
    )


@torch.no_grad()
def attribute_heads(
    model: Any, tokenizer: Tokenizer, conflicts: Sequence[FalseContext], *, progress: Progress = silent
) -> HeadAttributions:
    """Return what each head adds to the logit difference of context and memory, for each conflict.

    Args:
        model: A decoder of transformers.
        tokenizer: Its tokenizer.
        conflicts: At least one.
        progress: Is told how many are done.

    Raises:
        ArchitectureError: the model has no attention, norms stand behind its sums so that no part reaches the end as it
            is, or its sums have another form (block_sums.py).
        RequestError: as `read_conflict`.
    """
    architecture = describe(model)
    layers = [layer for layer in range(architecture.n_layers) if _attends(architecture, layer)]
    if not layers:
        raise ArchitectureError(f"{type(model).__name__} has no block with an attention")
    heads = {layer: n_heads(architecture, layer) for layer in layers}
    values = torch.full((len(conflicts), architecture.n_layers, max(heads.values())), torch.nan, dtype=torch.float64)
    differences = torch.zeros(len(conflicts), dtype=torch.float64)
    for place, conflict in enumerate(conflicts):
        read = read_conflict(tokenizer, conflict)
        ran = block_sums(architecture, read.ids, patterns=False, layers=layers)
        direction, differences[place] = _direction(architecture, ran.normed[-1], read)
        tail = freeze_tail(architecture.tail, ran.last[-1])
        for layer, block in zip(layers, ran.blocks, strict=True):
            if not torch.equal(block.stream, block.middle) and block.reads_middle:
                raise ArchitectureError(
                    f"{architecture.blocks_path}.{layer} has a norm behind its sums, so that no head has a direct way"
                )
            values[place, layer, : heads[layer]] = tail(head_outputs(block, heads[layer])) @ direction
        progress(place + 1, len(conflicts), "conflicts")
    return HeadAttributions(values, differences)


def head_outputs(block: BlockSums, heads: int) -> Tensor:
    """Return what each head adds to the stream at the last token, (H, d)."""
    given = block.heads[-1].reshape(heads, -1)  # (H, w)
    slices = block.out.reshape(block.out.shape[0], heads, -1)  # (d, H, w)
    return block.behind.at(-1)(torch.einsum("hw,dhw->hd", given, slices))


def _attends(architecture: Architecture, layer: int) -> bool:
    return parts.find_attention_out(architecture.block(layer), architecture.d_model) is not None


def _direction(architecture: Architecture, normed: Tensor, read: ReadContext) -> tuple[Tensor, float]:
    """Return the direction (d,) of the decoder's output along which the logit difference grows, and the difference."""
    with torch.enable_grad():
        hidden = normed.detach().clone().requires_grad_()
        logits = architecture.logits(hidden[None])[0]
        difference = logits[read.context] - logits[read.memory]
        (gradient,) = torch.autograd.grad(difference, hidden)
    return exact(gradient), float(difference.detach())


@torch.no_grad()
def answers(
    model: Any,
    tokenizer: Tokenizer,
    conflicts: Sequence[FalseContext],
    *,
    with_context: bool = True,
    batch_tokens: int = 8192,
) -> list[Answer]:
    """Ask the model, and say whether the likeliest next token is the first one of either answer.

    Args:
        model: A decoder, with its edits.
        tokenizer: Its tokenizer.
        conflicts: What is asked.
        with_context: Behind the false sentence; False: the questions alone.
        batch_tokens: Bound on the tokens that run at once.

    Raises:
        RequestError: as `read_conflict`.
    """
    architecture, pad = describe(model), pad_id(tokenizer)
    read = [read_conflict(tokenizer, conflict) for conflict in conflicts]
    rows = [each.ids if with_context else each.question for each in read]
    found: dict[int, Answer] = {}
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    waiting = iter(order)
    with evaluating(model), without_autocast():
        bound = limit_batch_tokens(batch_tokens, architecture.device)
        for group in batches_by_length([rows[place] for place in order], bound):
            batch = right_padded(group, pad).to(architecture.device)
            hidden = run_base(architecture, batch)
            last = batch.mask.sum(1) - 1
            logits = architecture.logits(hidden[torch.arange(len(group), device=hidden.device), last])
            for row in logits.double().cpu():
                place = next(waiting)
                found[place] = _answer(row, read[place])
    return [found[place] for place in range(len(rows))]


def _answer(logits: Tensor, read: ReadContext) -> Answer:
    said = int(logits.argmax())
    says = {read.context: "context", read.memory: "memory"}.get(said, "other")
    return Answer(says, float(logits[read.context] - logits[read.memory]))
