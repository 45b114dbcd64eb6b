"""Canonical examples: a few sentences show a behaviour, others test it, and hard negatives must stay as they are.

    criterion = CRITERIA["country_capital"]
    found = example_losses(model, tokenizer, examples, criterion.loss)
    failure_share(found, criterion.threshold)     # in how many examples the behaviour is missing

An example is a prefix with one suffix, or with two that are compared. CE is the cross-entropy of a suffix behind the
prefix, summed over its tokens, in nats:

    good         CE                    the suffix should be likely
    bad          -CE                   the suffix should be unlikely
    balance      |CE_1 - CE_2|         both should be as likely
    good-v-bad   CE_1 - CE_2           the first should be the likelier

Reference: Hewitt et al. 2024, "Model Editing with Canonical Examples"; losses and thresholds as in the authors' code
(john-hewitt/model-editing-canonical-examples, evaluate.py and configs). Their training takes the mean over the tokens
of a suffix, their evaluation the sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from errata.editors.core.errors import DatasetError
from errata.editors.core.model.tokens import Tokenizer, answer_ids
from errata.evaluate.canonical_sets import CanonicalExample, CanonicalLoss, CanonicalSet
from errata.evaluate.probes import Probe
from errata.evaluate.scoring import Model, score


@dataclass(frozen=True)
class SuffixLosses:
    """The cross-entropies of the suffixes of one example.

    Attributes:
        sums: Of each suffix, in nats.
        tokens: Of each suffix.
    """

    sums: tuple[float, ...]
    tokens: tuple[int, ...]

    def loss(self, kind: CanonicalLoss) -> float:
        """Return the loss of the example.

        Raises:
            DatasetError: The loss compares two suffixes, and there is one.
        """
        if kind == "good":
            return self.sums[0]
        if kind == "bad":
            return -self.sums[0]
        if len(self.sums) < 2:
            raise DatasetError(f"the loss {kind!r} compares two suffixes, and the example has one", field="suffix2")
        difference = self.sums[0] - self.sums[1]
        return abs(difference) if kind == "balance" else difference


def suffix_losses(
    model: Model, tokenizer: Tokenizer, examples: Sequence[CanonicalExample], *, batch_tokens: int = 8192
) -> list[SuffixLosses]:
    """Return the cross-entropies of the suffixes of every example.

    A suffix is read as it is written, with its leading blank, behind the prefix.

    Args:
        model: Any causal decoder of transformers.
        tokenizer: Its fast tokenizer.
        examples: With one suffix or two.
        batch_tokens: Tokens of a forward pass, padding included.

    Raises:
        RequestError: A prefix or a suffix has no tokens.
    """
    probes = [Probe("rewrite", e.prefix, e.suffixes[0], (*e.suffixes, None)[1], join="") for e in examples]
    found = []
    for example, scored in zip(examples, score(model, tokenizer, probes, batch_tokens=batch_tokens), strict=True):
        means = [mean for mean in (scored.nll_target, scored.nll_other) if mean is not None]
        counts = [len(answer_ids(tokenizer, example.prefix, suffix, "")) for suffix in example.suffixes]
        sums = tuple(mean * count for mean, count in zip(means, counts, strict=True))
        found.append(SuffixLosses(sums, tuple(counts)))
    return found


def example_losses(
    model: Model,
    tokenizer: Tokenizer,
    examples: Sequence[CanonicalExample],
    kind: CanonicalLoss,
    *,
    batch_tokens: int = 8192,
) -> list[float]:
    """Return the loss of every example, in nats. Errors are those of `suffix_losses` and `SuffixLosses.loss`."""
    return [each.loss(kind) for each in suffix_losses(model, tokenizer, examples, batch_tokens=batch_tokens)]


def failure_share(losses: Sequence[float], threshold: float) -> float:
    """Return the share of losses strictly above a threshold; one that is not a number is a failure."""
    return sum(not loss <= threshold for loss in losses) / len(losses)


def measured(examples: CanonicalSet, model: Model, tokenizer: Tokenizer, *, batch_tokens: int = 8192) -> dict[str, Any]:
    """Return what a model does on a set as it stands.

    Args:
        examples: The set.
        model: Any causal decoder of transformers.
        tokenizer: Its fast tokenizer.
        batch_tokens: Tokens of a forward pass, padding included.

    Returns:
        {"train": ..., "evaluation": ..., "hard_negatives": ...}, None where there is no file. Of the first two the
        share of failures, the mean loss and the number of examples; of hard negatives the mean cross-entropy per
        example and per token, in nats, and their number.
    """
    found: dict[str, Any] = {}
    for name in ("train", "evaluation"):
        part = getattr(examples, name)
        if part is None:
            found[name] = None
            continue
        losses = example_losses(model, tokenizer, part, examples.criterion.loss, batch_tokens=batch_tokens)
        share, mean = failure_share(losses, examples.criterion.threshold), math.fsum(losses) / len(losses)
        found[name] = {"failures": share, "loss": mean, "n": len(losses)}
    found["hard_negatives"] = None
    if examples.hard_negatives is not None:
        each = suffix_losses(model, tokenizer, examples.hard_negatives, batch_tokens=batch_tokens)
        total, tokens = math.fsum(one.sums[0] for one in each), sum(one.tokens[0] for one in each)
        found["hard_negatives"] = {"loss": total / len(each), "token_loss": total / tokens, "n": len(each)}
    return found
