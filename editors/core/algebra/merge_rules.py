"""Merging several edits into one where they contradict each other: TIES, and the merges of mergekit.

    TIES        trim each edit; elect a sign per element; average what has this sign (Yadav et al. 2023, and
                prateeky2806/ties-merging)
    mergekit    sparsify each edit; weigh it; sum what has the elected sign, or everything
                (arcee-ai/mergekit, merge_methods/generalized_task_arithmetic.py and registry.py)

The two elect signs differently. TIES takes the sign of the sum, and where that is 0 the sign of the sum of all elected
signs. Where that is 0, too, as for an edit and its opposite, nothing is elected and the result is 0; the authors' code
then keeps the negative elements. mergekit counts a sum of 0 as plus. A zero agrees with neither sign.

Legend: deltas (n, ...) of n edits for one weight; weights (n,) of the edits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from errata.editors.core.algebra.mask_rules import (
    Below,
    BreadcrumbsMergekit,
    DareMergekit,
    Della,
    Magnitude,
    MaskRule,
    Norm,
    TiesTrim,
)

Deltas = Mapping[str, Tensor]  # by name of the weight, multiplied out
# Sums of weights below this divide by 1 instead, as in mergekit.
SMALL_SUM = 1e-8


@dataclass(frozen=True, kw_only=True)
class MergeRule(ABC):
    """How several edits become one, which is multiplied by `strength` (lambda) in the end."""

    name: ClassVar[str]
    strength: float = 1.0

    @property
    def mask(self) -> MaskRule | None:
        """Which elements of each edit stay; None: all."""
        return None

    @property
    def numbers(self) -> dict[str, Any]:
        """The rule's name and parameters, as values that JSON can hold."""
        return {"rule": self.name, **asdict(self)}

    def merged(
        self, edits: Sequence[Deltas], below: Mapping[str, Below], weights: Sequence[float]
    ) -> dict[str, Tensor]:
        """Return the merged updates by name; an edit that does not change a weight counts as 0 there.

        Args:
            edits: The updates of each edit.
            below: The weights below them, where the mask needs them.
            weights: Of the edits.
        """
        mixed = self.mixed(self.sparsified(edits, below), weights)
        return {name: self.strength * delta for name, delta in mixed.items()}

    @abstractmethod
    def mixed(self, edits: Sequence[Deltas], weights: Sequence[float]) -> dict[str, Tensor]:
        """Return what the sparsified edits become, before the strength."""

    def sparsified(self, edits: Sequence[Deltas], below: Mapping[str, Below]) -> list[Deltas]:
        """Return what the mask leaves of each edit; a mask that draws goes on drawing from edit to edit."""
        rule = self.mask
        if rule is None:
            return list(edits)
        generator = rule.generator()
        kept: list[Deltas] = []
        for deltas in edits:
            masks = rule.masks(deltas, below, generator)
            kept.append({k: delta * masks[k] * rule.gain(delta, masks[k]) for k, delta in deltas.items()})
        return kept


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(MergeRule):
    """The weighted sum, divided by the sum of the weights if `normalize`; mergekit's other merges are kinds of it."""

    name: ClassVar[str] = "mergekit_task_arithmetic"
    votes: ClassVar[Literal["none", "sum", "count"]] = "none"
    normalize: bool = False

    def mixed(self, edits: Sequence[Deltas], weights: Sequence[float]) -> dict[str, Tensor]:
        return {name: self._sum(stack, _of(weights, stack)) for name, stack in stacked(edits).items()}

    def _sum(self, deltas: Tensor, share: Tensor) -> Tensor:
        weighted = share * deltas
        if self.votes == "none":
            total, divisor = weighted.sum(0), share.sum(0)
            divisor = torch.where(divisor.abs() < SMALL_SUM, 1.0, divisor)
        else:
            elected = (weighted if self.votes == "sum" else weighted.sign()).sum(0)
            agrees = (weighted.sign() == torch.where(elected >= 0, 1.0, -1.0)).to(deltas.dtype)
            total, divisor = (weighted * agrees).sum(0), (share * agrees).sum(0)
            divisor = torch.where(divisor == 0, 1.0, divisor)
        return total / divisor if self.normalize else total


@dataclass(frozen=True, kw_only=True)
class Ties(MergeRule):
    """TIES: the average, per element, of the trimmed edits that have the elected sign there.

    Attributes:
        keep: Share of the elements of each edit, over all its weights together, that stay.
        average: mean, sum or max (the largest absolute value) of the elements with the elected sign.
    """

    name: ClassVar[str] = "ties"
    keep: float = 0.2
    average: Literal["mean", "sum", "max"] = "mean"

    @property
    def mask(self) -> MaskRule:
        return TiesTrim(keep=self.keep)

    def mixed(self, edits: Sequence[Deltas], weights: Sequence[float]) -> dict[str, Tensor]:
        stacks = {name: _of(weights, stack) * stack for name, stack in stacked(edits).items()}
        signs = elected_signs(stacks)
        return {name: self.agreed(stack, signs[name]) for name, stack in stacks.items()}

    def agreed(self, deltas: Tensor, sign: Tensor) -> Tensor:
        """Return the average of the deltas (n, ...) that have the elected sign; 0 where none has."""
        kept = deltas * ((deltas.sign() == sign) & (sign != 0))
        if self.average == "max":
            return kept.abs().amax(0) * sign
        total = kept.sum(0)
        return total if self.average == "sum" else total / (kept != 0).sum(0).clamp_min(1)


@dataclass(frozen=True, kw_only=True)
class MergekitTies(TaskArithmetic):
    """mergekit's TIES: the largest of each weight stay, and the sum is divided by the weights that agree."""

    name: ClassVar[str] = "mergekit_ties"
    votes: ClassVar[Literal["none", "sum", "count"]] = "sum"
    density: float = 0.2
    normalize: bool = True
    rescale: Norm | None = None

    @property
    def mask(self) -> MaskRule:
        return Magnitude(keep=self.density, rescale=self.rescale)


@dataclass(frozen=True, kw_only=True)
class MergekitTiesCount(MergekitTies):
    """mergekit's TIES with one vote per edit, whatever the size of its change."""

    name: ClassVar[str] = "mergekit_ties_count"
    votes: ClassVar[Literal["none", "sum", "count"]] = "count"


@dataclass(frozen=True, kw_only=True)
class MergekitBreadcrumbs(TaskArithmetic):
    """mergekit's Breadcrumbs: neither the largest nor the smallest of each weight stay."""

    name: ClassVar[str] = "mergekit_breadcrumbs"
    density: float = 0.9
    gamma: float = 0.01
    rescale: Norm | None = None
    as_published: bool = False

    @property
    def mask(self) -> MaskRule:
        return BreadcrumbsMergekit(
            density=self.density, gamma=self.gamma, rescale=self.rescale, as_published=self.as_published
        )


@dataclass(frozen=True, kw_only=True)
class MergekitBreadcrumbsTies(MergekitBreadcrumbs):
    """mergekit's Breadcrumbs with elected signs."""

    name: ClassVar[str] = "mergekit_breadcrumbs_ties"
    votes: ClassVar[Literal["none", "sum", "count"]] = "sum"


@dataclass(frozen=True, kw_only=True)
class MergekitDareLinear(TaskArithmetic):
    """mergekit's DARE: elements stay by chance, and the norm of each edit is restored."""

    name: ClassVar[str] = "mergekit_dare_linear"
    density: float = 0.5
    rescale: Norm | None = "l1"
    seed: int = 0

    @property
    def mask(self) -> MaskRule:
        return DareMergekit(density=self.density, rescale=self.rescale, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class MergekitDareTies(MergekitDareLinear):
    """mergekit's DARE with elected signs."""

    name: ClassVar[str] = "mergekit_dare_ties"
    votes: ClassVar[Literal["none", "sum", "count"]] = "sum"


@dataclass(frozen=True, kw_only=True)
class MergekitDella(TaskArithmetic):
    """mergekit's DELLA: larger elements are likelier to stay; signs are elected, and the sum is normalised."""

    name: ClassVar[str] = "mergekit_della"
    votes: ClassVar[Literal["none", "sum", "count"]] = "sum"
    density: float = 0.5
    epsilon: float = 0.15
    normalize: bool = True
    rescale: Norm | None = "l1"
    seed: int = 0

    @property
    def mask(self) -> MaskRule:
        return Della(density=self.density, epsilon=self.epsilon, rescale=self.rescale, seed=self.seed)


MERGES: tuple[type[MergeRule], ...] = (
    TaskArithmetic,
    Ties,
    MergekitTies,
    MergekitTiesCount,
    MergekitBreadcrumbs,
    MergekitBreadcrumbsTies,
    MergekitDareLinear,
    MergekitDareTies,
    MergekitDella,
)


def stacked(edits: Sequence[Deltas]) -> dict[str, Tensor]:
    """Return the deltas (n, ...) of all edits for each weight that one of them changes."""
    first = {name: delta for deltas in reversed(edits) for name, delta in deltas.items()}
    return {
        name: torch.stack([deltas.get(name, torch.zeros_like(like)) for deltas in edits])
        for name, like in first.items()
    }


def elected_signs(stacks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return TIES' elected sign (...) per element, by name: of the sum, or of the sum of all signs where it is 0."""
    signs = {name: stack.sum(0).sign() for name, stack in stacks.items()}
    majority = torch.stack([sign.sum() for sign in signs.values()]).sum().sign() if signs else torch.zeros(())
    return {name: torch.where(sign == 0, majority.to(sign), sign) for name, sign in signs.items()}


def _of(weights: Sequence[float], stack: Tensor) -> Tensor:
    return torch.tensor(weights, dtype=stack.dtype, device=stack.device).view(-1, *[1] * (stack.ndim - 1))
