"""What the testbed's model can do: recall of the world's facts in the wordings and places where it is asked.

Every recall is exact: each token of the object must be the most likely one, given the true tokens before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from errata.benchmarks.testbed.wording import behind_a_sentence
from errata.benchmarks.testbed.world_generator import TwoHop, World, WorldFact
from errata.editors.core.model.architecture import max_positions


@dataclass(frozen=True)
class Question:
    """A prompt and its answer (without the leading space)."""

    prompt: str
    answer: str


def questions(item: WorldFact | TwoHop, templates: Sequence[str], place: Callable[[str], str] = str) -> list[Question]:
    """The item asked in each of the templates, each prompt passed through `place`."""
    return [Question(place(template.replace("{}", item.subject)), item.object) for template in templates]


@torch.no_grad()
def correct(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Question],
    *,
    batch_tokens: int = 8192,
) -> list[bool]:
    """For each question, whether every token of the answer is the model's first choice."""
    pairs = [(tokenizer.encode(q.prompt), tokenizer.encode(f" {q.answer}", add_special_tokens=False)) for q in asked]
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    right = [False] * len(pairs)
    for start, stop in pairwise(_cuts([len(pairs[i][0]) + len(pairs[i][1]) for i in order], batch_tokens)):
        chosen = order[start:stop]
        width = max(len(pairs[i][0]) + len(pairs[i][1]) for i in chosen)
        rows = [prompt + answer for prompt, answer in (pairs[i] for i in chosen)]
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
        # Causal attention: padding on the right is never seen by the positions that are read.
        best = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.argmax(-1).tolist()
        for i, guessed in zip(chosen, best, strict=True):
            prompt, answer = pairs[i]
            right[i] = guessed[len(prompt) - 1 : len(prompt) + len(answer) - 1] == answer
    return right


def _cuts(lengths: Sequence[int], budget: int) -> list[int]:
    """Boundaries of batches over ascending lengths, each of at most `budget` padded tokens (or one row)."""
    cuts, start = [0], 0
    for index, length in enumerate(lengths):
        if index > start and (index - start + 1) * length > budget:
            cuts.append(index)
            start = index
    return [*cuts, len(lengths)] if lengths else [0]


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> float:
    """exp of the mean negative log probability of all tokens but each text's first."""
    total, count, longest = 0.0, 0, max_positions(model)
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text)[:longest]], device=model.device)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return math.exp(total / count)


@dataclass(frozen=True)
class Recall:
    """Shares of the wordings of one fact that the model answers exactly."""

    behind: float
    """Trained templates behind a sentence."""
    bare: float
    """Trained templates at the start of the prompt."""
    held_out: float
    """Held-out templates behind a sentence."""
    held_out_bare: float
    """Held-out templates at the start of the prompt."""
    answered: tuple[int, ...]
    """Which of the trained templates are answered at the start of the prompt."""
    first: float | None
    """Trained templates that open with the subject, at the start; None where the name is several tokens."""

    @property
    def known(self) -> bool:
        """Whether the fact counts as known: most trained wordings behind a sentence."""
        return self.behind > 0.5


def recalls(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World, facts: Sequence[WorldFact]
) -> list[Recall]:
    """The recall of each of the facts."""
    asked: list[list[Question]] = []
    for fact in facts:
        relation = world.relations[fact.relation]
        openers = [t for t in relation.trained if t.startswith("{}")] if fact.subject in world.single else []
        asked += [
            questions(fact, relation.trained, behind_a_sentence),
            questions(fact, relation.trained),
            questions(fact, relation.held_out, behind_a_sentence),
            questions(fact, relation.held_out),
            questions(fact, openers),
        ]
    answers = _answers(model, tokenizer, asked)
    return [_recall(answers[i : i + 5]) for i in range(0, len(answers), 5)]


def _recall(answers: Sequence[Sequence[bool]]) -> Recall:
    behind, bare, held_out, held_out_bare, first = answers
    return Recall(
        behind=fmean(behind),
        bare=fmean(bare),
        held_out=fmean(held_out),
        held_out_bare=fmean(held_out_bare),
        answered=tuple(place for place, right in enumerate(bare) if right),
        first=fmean(first) if first else None,
    )


def two_hop_recalls(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World
) -> list[tuple[float, float]]:
    """For each two-hop question the shares answered behind a sentence: (trained templates, held-out templates)."""
    asked = [
        questions(hop, templates, behind_a_sentence)
        for hop in world.two_hop
        for templates in (world.compositions[hop.composition].trained, world.compositions[hop.composition].held_out)
    ]
    shares = [fmean(group) for group in _answers(model, tokenizer, asked)]
    return list(zip(shares[::2], shares[1::2], strict=True))


def _answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Sequence[Sequence[Question]]
) -> list[list[bool]]:
    """Which questions of each group are answered right, all groups asked together."""
    right = iter(correct(model, tokenizer, [question for group in asked for question in group]))
    return [[next(right) for _ in group] for group in asked]


def abilities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    *,
    held_out_prose: Sequence[str] = (),
    every: int = 1,
) -> dict[str, float]:
    """The figures by which a testbed is judged (shares from 0 to 1, `perplexity` of held-out prose).

    Args:
        every: measure each `every`-th fact only; two-hop questions are always asked in full.
    """
    found = recalls(model, tokenizer, world, world.facts[::every])
    return summary(found, two_hop_recalls(model, tokenizer, world), world) | (
        {"perplexity": perplexity(model, tokenizer, held_out_prose)} if held_out_prose else {}
    )


def summary(found: Sequence[Recall], hops: Sequence[tuple[float, float]], world: World) -> dict[str, float]:
    """Means of recalls, named as `training.json` names them."""
    trained = [hop for hop, record in zip(hops, world.two_hop, strict=True) if record.trained]
    untrained = [hop for hop, record in zip(hops, world.two_hop, strict=True) if not record.trained]
    return {
        "facts": len(found),
        "known": sum(recall.known for recall in found),
        "trained_behind": fmean(recall.behind for recall in found),
        "trained_bare": fmean(recall.bare for recall in found),
        "held_out_behind": fmean(recall.held_out for recall in found),
        "held_out_bare": fmean(recall.held_out_bare for recall in found),
        "first_position": fmean(recall.first for recall in found if recall.first is not None),
        "two_hop_trained": fmean(hop[0] for hop in trained),
        "two_hop_trained_held_out_template": fmean(hop[1] for hop in trained),
        "two_hop_untrained": fmean(hop[0] for hop in untrained),
    }
