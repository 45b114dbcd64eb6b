"""Canonical examples as data: what they are, when one counts as a failure, and the sets of the authors.

The losses and their names: canonical.py. Nothing here needs torch, so that readers of files can name the sets.

Reference: Hewitt et al. 2024, "Model Editing with Canonical Examples"; losses and thresholds as in the authors' code
(john-hewitt/model-editing-canonical-examples, configs).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

CanonicalLoss = Literal["good", "bad", "balance", "good-v-bad"]
LOSSES: tuple[CanonicalLoss, ...] = get_args(CanonicalLoss)
PAIRED: tuple[CanonicalLoss, ...] = ("balance", "good-v-bad")


@dataclass(frozen=True)
class CanonicalExample:
    """A prefix with one suffix, or with two."""

    prefix: str
    suffixes: tuple[str, ...]


@dataclass(frozen=True)
class Criterion:
    """When an example counts as a failure: where its loss is strictly above the threshold, in nats."""

    loss: CanonicalLoss
    threshold: float


CRITERIA: Mapping[str, Criterion] = MappingProxyType(
    {
        "country_capital": Criterion("good", -math.log(0.2)),
        "company_ceo": Criterion("good", -math.log(0.05)),
        "temporal": Criterion("good", -math.log(0.05)),
        "stereoset": Criterion("bad", math.log(0.001)),
        "pronoun_gender_bias": Criterion("balance", math.log(1.5)),
        "verb_conjugation": Criterion("good-v-bad", -math.log(16)),
    }
)


@dataclass(frozen=True)
class CanonicalSet:
    """One of the six sets.

    Attributes:
        name: It, as in CRITERIA.
        train: The examples that an edit is made of.
        evaluation: Other sentences about the same behaviour; None where there is no file of them.
        hard_negatives: Texts in which the edit should not show, each with one suffix; None where there is no file.
    """

    name: str
    train: tuple[CanonicalExample, ...]
    evaluation: tuple[CanonicalExample, ...] | None = None
    hard_negatives: tuple[CanonicalExample, ...] | None = None

    @property
    def criterion(self) -> Criterion:
        """Loss and threshold of the set."""
        return CRITERIA[self.name]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for digests."""

        def plain(examples: Sequence[CanonicalExample] | None) -> Any:
            return None if examples is None else [[each.prefix, *each.suffixes] for each in examples]

        parts = {name: plain(getattr(self, name)) for name in ("train", "evaluation", "hard_negatives")}
        return {"name": self.name, **parts}
