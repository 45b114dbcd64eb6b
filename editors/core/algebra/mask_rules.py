"""Rules that say which elements of an update stay; the others become 0.

| rule | what stays | source |
|---|---|---|
| `ignore_top` | all but the largest share | Sun et al. 2025 (arXiv 2504.09522) |
| `magnitude` | the largest share | TIES, mergekit `magnitude`, Breadcrumbs' repository |
| `ties` | the largest share over all weights of an edit together, and all ties | prateeky2806/ties-merging |
| `breadcrumbs` | per row: without the largest, the largest of the rest | rezazzr/breadcrumbs |
| `breadcrumbs_mergekit` | per weight: without the largest, the largest of the rest | mergekit `magnitude_outliers` |
| `rect` | all but the share that changes the weight least, relative to it | JasonForJoy/Model-Editing-Hurt |
| `rect_alphaedit` | the share that changes the weight most, relative to it | jianghoucheng/AlphaEdit |
| `dare` | each element by chance; the rest is divided by the share that stays | yule-BUAA/MergeLM |
| `dare_magnitude` | the largest share, divided likewise | yule-BUAA/MergeLM |
| `dare_mergekit` | each element by chance; the norm is restored | mergekit `random` |
| `della` | each element by chance, larger ones more often; the norm is restored | mergekit `della_magprune` |

Sizes are absolute values. Of N elements, a share p is int(p N). Where sizes are equal, the element with the lower index
counts as the larger one. Rules draw with the seed that they have, so that the same rule makes the same mask again.

A rule per row takes the rows of the tensor as the model stores it, as its authors do: the inputs of one output unit,
but in Conv1D (GPT-2) the outputs of one input unit.

Shapes: updates and weights are (d_out, d_in), or (d,) for the differences of vectors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from errata.editors.core.errors import AlgebraError

Per = Literal["tensor", "row"]
Norm = Literal["l1", "l2"]

SHARES = ("share", "keep", "remove", "drop", "density", "gamma")
# Norms below this are not restored, as in mergekit.
SMALL_NORM = 1e-7


@dataclass(frozen=True)
class Below:
    """The weight below an update: what a rule may compare the update with.

    Attributes:
        weight: (d_out, d_in), without the edit and without those after it.
        transposed: Whether the model stores it as (d_in, d_out).
    """

    weight: Tensor
    transposed: bool


@dataclass(frozen=True, kw_only=True)
class MaskRule(ABC):
    """Which elements of an update stay. A rule says so by `stays`; the rest is for rules that differ."""

    name: ClassVar[str]
    # Whether masking twice is masking once. Rules that remove the largest find others the second time.
    is_idempotent: ClassVar[bool] = True
    # Whether sizes are relative to the weight below.
    is_relative: ClassVar[bool] = False
    # Whether `stays` gives probabilities to go, as the authors draw them, in place of those to stay.
    draws_gone: ClassVar[bool] = False
    # Whether the rule must see all weights of an edit at once.
    is_joint: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in SHARES and not 0 <= value <= 1:
                raise AlgebraError(f"{self.name}: expected {field.name} as a share from 0 to 1, got {value}")

    @property
    def lines(self) -> Per:
        """What the shares are of: the whole tensor, or each of its rows as the model stores them."""
        return "tensor"

    @property
    def needs_weight(self) -> bool:
        """Whether the rule must know the weight below, or how the model stores it."""
        return self.is_relative or self.lines == "row"

    @property
    def numbers(self) -> dict[str, Any]:
        """The rule's name and parameters, as values that JSON can hold."""
        return {"rule": self.name, **asdict(self)}

    def generator(self) -> torch.Generator:
        """Return what a rule that draws begins to draw from, on the CPU."""
        return torch.Generator().manual_seed(getattr(self, "seed", 0))

    @abstractmethod
    def stays(self, size: Tensor) -> Tensor:
        """Return which elements stay, or with which probabilities, of each row of sizes (..., elements)."""

    def size(self, delta: Tensor, below: Below | None) -> Tensor:  # noqa: ARG002
        """Return the size of each element of an update. Here: its absolute value."""
        return delta.abs()

    def gain(self, delta: Tensor, mask: Tensor) -> float:  # noqa: ARG002
        """Return the factor by which what stays is multiplied. Here: 1."""
        return 1.0

    def masks(
        self, deltas: Mapping[str, Tensor], below: Mapping[str, Below], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Return which elements of each update stay, by name.

        Args:
            deltas: All updates of an edit, multiplied out.
            below: The weights below them; empty where the rule needs none.
            generator: For a rule that draws, on the CPU; None: one with the rule's seed.

        Raises:
            AlgebraError: The rule needs weights that are not given.
        """
        if self.needs_weight and not deltas.keys() <= below.keys():
            raise AlgebraError(
                f"the rule {self.name} needs the weight below an update, which only the model has; load the model, or "
                "use a rule that looks at the update alone (ignore_top, magnitude)"
            )
        generator = self.generator() if generator is None else generator
        return {name: self._mask(delta, below.get(name), generator) for name, delta in deltas.items()}

    def _mask(self, delta: Tensor, below: Below | None, generator: torch.Generator) -> Tensor:
        size = self.size(delta, below)
        if self.lines == "tensor":
            kept = drawn(self.stays(size.reshape(-1)), generator).view(size.shape)
        elif below is not None and below.transposed and size.ndim == 2:
            kept = drawn(self.stays(size.T.contiguous()), generator).T
        else:
            kept = drawn(self.stays(size), generator)
        return ~kept if self.draws_gone else kept


@dataclass(frozen=True, kw_only=True)
class _Restored(MaskRule):
    """A rule after which the l1 or l2 norm is restored, unless `rescale` is null."""

    rescale: Norm | None = None

    def gain(self, delta: Tensor, mask: Tensor) -> float:
        if self.rescale is None:
            return 1.0
        order = 1 if self.rescale == "l1" else 2
        before, after = (float(torch.linalg.vector_norm(x.double(), order)) for x in (delta, delta * mask))
        return 1.0 if before < SMALL_NORM or after < SMALL_NORM else before / after


@dataclass(frozen=True, kw_only=True)
class _Divided(MaskRule):
    """A rule after which the rest is divided by the share that stays, unless `rescale` is false."""

    drop: float
    rescale: bool = True

    def gain(self, delta: Tensor, mask: Tensor) -> float:  # noqa: ARG002
        return 1 / (1 - self.drop) if self.rescale and self.drop < 1 else 1.0


@dataclass(frozen=True, kw_only=True)
class IgnoreTop(MaskRule):
    """All but the largest stay."""

    name = "ignore_top"
    is_idempotent = False
    share: float = 0.08
    per: Per = "tensor"

    @property
    def lines(self) -> Per:
        return self.per

    def stays(self, size: Tensor) -> Tensor:
        return ~largest(size, int(self.share * size.shape[-1]))


@dataclass(frozen=True, kw_only=True)
class Magnitude(_Restored):
    """The largest stay."""

    name = "magnitude"
    keep: float = 0.2
    rescale: Norm | None = None
    per: Per = "tensor"

    @property
    def lines(self) -> Per:
        return self.per

    def stays(self, size: Tensor) -> Tensor:
        return largest(size, int(self.keep * size.shape[-1]))


@dataclass(frozen=True, kw_only=True)
class TiesTrim(MaskRule):
    """The largest of all weights of the edit together stay: those at least as large as the (N - int(N keep))-th
    smallest, so that one more than int(N keep) stays, and all that are equal to it."""

    name = "ties"
    is_joint = True
    keep: float = 0.2

    def stays(self, size: Tensor) -> Tensor:
        count = size.numel() - int(size.numel() * self.keep)
        # The authors' code fails where everything is to stay.
        return size >= size.reshape(-1).kthvalue(count).values if count else torch.ones_like(size, dtype=torch.bool)

    def masks(
        self,
        deltas: Mapping[str, Tensor],
        below: Mapping[str, Below],  # noqa: ARG002
        generator: torch.Generator | None = None,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Return which elements of each update stay. Arguments as of `MaskRule.masks`."""
        if not deltas:
            return {}
        kept = self.stays(torch.cat([delta.abs().reshape(-1) for delta in deltas.values()]))
        parts = kept.split([delta.numel() for delta in deltas.values()])
        return {name: part.view(delta.shape) for (name, delta), part in zip(deltas.items(), parts, strict=True)}


@dataclass(frozen=True, kw_only=True)
class Breadcrumbs(MaskRule):
    """Per row, the largest go, then the largest of the rest stay; `first="keep"` goes the other way round."""

    name = "breadcrumbs"
    is_idempotent = False
    remove: float = 0.1
    keep: float = 0.2
    first: Literal["remove", "keep"] = "remove"

    @property
    def lines(self) -> Per:
        return "row"

    def stays(self, size: Tensor) -> Tensor:
        gone, kept = (int(share * size.shape[-1]) for share in (self.remove, self.keep))
        return largest(size, kept if self.first == "keep" else gone + kept) & ~largest(size, gone)


@dataclass(frozen=True, kw_only=True)
class BreadcrumbsMergekit(_Restored):
    """Of the whole tensor, the share gamma of the largest goes, then the largest stay up to the density.

    `as_published` repeats mergekit where int(gamma N) is 0: it then masks everything.
    """

    name = "breadcrumbs_mergekit"
    is_idempotent = False
    density: float = 0.9
    gamma: float = 0.01
    rescale: Norm | None = None
    as_published: bool = False

    def stays(self, size: Tensor) -> Tensor:
        kept, top = int(self.density * size.numel()), int(self.gamma * size.numel())
        top = min(top, size.numel() - kept)  # else too few would be left
        if top == 0 and self.as_published and self.density < 1:
            return torch.zeros_like(size, dtype=torch.bool)
        return largest(size, top + kept) & ~largest(size, top)


@dataclass(frozen=True, kw_only=True)
class Rect(MaskRule):
    """RECT: what changes the weight least, relative to it, goes: the smallest |delta / W|."""

    name = "rect"
    is_relative = True
    share: float = 0.8

    def size(self, delta: Tensor, below: Below | None) -> Tensor:
        assert below is not None
        # No change of a weight of 0 counts as none; any other change of it is the largest.
        return (delta.double() / below.weight.double()).abs().nan_to_num(nan=0.0, posinf=float("inf"))

    def stays(self, size: Tensor) -> Tensor:
        return largest(size, size.numel() - int(self.share * size.numel()))


@dataclass(frozen=True, kw_only=True)
class RectAlphaEdit(MaskRule):
    """RECT as in AlphaEdit's code (`editor.rect`): |delta / (W + 1e-8)| is at least the int((1 - keep) N)-th smallest,
    so that one more than the share stays. (Fang et al. 2025; Gu et al.'s own repository has the rule `rect`.)"""

    name = "rect_alphaedit"
    is_relative = True
    keep: float = 0.4

    def size(self, delta: Tensor, below: Below | None) -> Tensor:
        assert below is not None
        return (delta.double() / (below.weight.double() + 1e-8)).abs()

    def stays(self, size: Tensor) -> Tensor:
        dropped = int((1 - self.keep) * size.numel())
        return size >= size.kthvalue(dropped).values if dropped else torch.ones_like(size, dtype=torch.bool)


@dataclass(frozen=True, kw_only=True)
class Dare(_Divided):
    """Each element goes with the probability `drop`."""

    name = "dare"
    is_idempotent = False
    draws_gone = True
    drop: float = 0.9
    seed: int = 0

    def stays(self, size: Tensor) -> Tensor:
        return torch.full_like(size, self.drop, dtype=torch.float32)


@dataclass(frozen=True, kw_only=True)
class DareMagnitude(_Divided):
    """All larger than the int(drop N)-th smallest stay."""

    name = "dare_magnitude"
    is_idempotent = False
    drop: float = 0.8

    def stays(self, size: Tensor) -> Tensor:
        count = int(self.drop * size.numel())
        return size > size.kthvalue(count).values if count else torch.ones_like(size, dtype=torch.bool)


@dataclass(frozen=True, kw_only=True)
class DareMergekit(_Restored):
    """Each element stays with the probability `density`."""

    name = "dare_mergekit"
    is_idempotent = False
    density: float = 0.5
    rescale: Norm | None = "l1"
    seed: int = 0

    def stays(self, size: Tensor) -> Tensor:
        return torch.full_like(size, self.density, dtype=torch.float32)


@dataclass(frozen=True, kw_only=True)
class Della(_Restored):
    """Each element stays with a probability from density - epsilon to density + epsilon, by its rank in its row."""

    name = "della"
    is_idempotent = False
    density: float = 0.5
    epsilon: float = 0.15
    rescale: Norm | None = "l1"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.density - abs(self.epsilon) <= self.density + abs(self.epsilon) < 1:
            raise AlgebraError(
                f"della: expected density plus and minus epsilon above 0 and below 1, got {self.density} and "
                f"{self.epsilon}"
            )

    @property
    def lines(self) -> Per:
        return "row"

    def stays(self, size: Tensor) -> Tensor:
        ranks = size.argsort(dim=-1, stable=True).argsort(dim=-1).to(torch.float32)
        return (self.density - self.epsilon) + ranks / max(1, size.shape[-1] - 1) * 2 * self.epsilon


RULES: tuple[type[MaskRule], ...] = (
    IgnoreTop,
    Magnitude,
    TiesTrim,
    Breadcrumbs,
    BreadcrumbsMergekit,
    Rect,
    RectAlphaEdit,
    Dare,
    DareMagnitude,
    DareMergekit,
    Della,
)


def largest(size: Tensor, count: int) -> Tensor:
    """Return which `count` elements of each row of sizes are the largest; of equal ones the first."""
    count = min(count, size.shape[-1])
    if count == 0 or size.numel() == 0:
        return torch.zeros_like(size, dtype=torch.bool)
    threshold = size.kthvalue(size.shape[-1] - count + 1, dim=-1, keepdim=True).values
    above, equal = size > threshold, size == threshold
    return above | (equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


def drawn(stays: Tensor, generator: torch.Generator) -> Tensor:
    """Return a mask as it is, and probabilities as independent draws.

    These are made on the CPU in float32, so that every device and precision gets the same ones.
    """
    if not stays.is_floating_point():
        return stays
    return torch.bernoulli(stays.cpu(), generator=generator).bool().to(stays.device)
