"""One edit at many strengths: what it achieves, and what it costs. One solve serves for all of them.

    dial = Dial(edit)
    with dial.at(0.5):                      # half of the edit is on the model, here alone
        ...
    points = turned(dial, text, cases)              # scores and loss on general text at nine strengths
    found = strongest(partial(rise_at, dial, text), cap=1e-4)    # the largest strength that costs less than this

The strength c multiplies what an edit adds to the weights: 0 is the untouched model, 1 the edit as it was made, -1 its
opposite. A codebook, a side memory or a text that is read before a question has no half. Such an edit has the strengths
0 and 1 alone, and says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

from errata.editors.core.algebra.patch_arithmetic import scaled
from errata.editors.core.edit import Edit
from errata.editors.core.errors import AlgebraError, ConfigError, NumericalError
from errata.evaluate import metrics
from errata.evaluate.general_text import GeneralText, LossRise
from errata.evaluate.probes import Case
from errata.evaluate.scoring import score
from errata.evaluate.strength_grid import NO_EDIT, STEPS, STRENGTHS

_COARSE = 4  # parts of the grid that are looked at from above, before one of them is halved


class Dial:
    """An edit that can be put on its model at any strength.

    Args:
        edit: Not on the model; None stands for an edit that was refused, which has no strength but 0.
    """

    def __init__(self, edit: Edit | None) -> None:
        self.edit = edit

    @cached_property
    def reason(self) -> str | None:
        """Why the edit has no strengths but 0 and 1; None where it has."""
        if self.edit is None:
            return NO_EDIT
        try:
            scaled(self.edit.patch, 0.5)
        except AlgebraError as error:
            return str(error)
        return None

    def has(self, strength: float) -> bool:
        """Return whether the edit can have this strength."""
        return strength == 0 or self.reason is None or (strength == 1 and self.edit is not None)

    def at(self, strength: float) -> AbstractContextManager[object]:
        """`with dial.at(0.5):` the model carries the edit at this strength inside, and not outside.

        Raises:
            AlgebraError: The edit cannot be scaled, or there is none.
            NumericalError: It is too large at this strength to be written.
        """
        if strength == 0:
            return nullcontext()
        if self.edit is None:
            raise AlgebraError("no edit was made, so that it has no strength but 0")
        return replace(self.edit, patch=scaled(self.edit.patch, strength), state={}).applied()


@dataclass(frozen=True)
class DialPoint:
    """What an edit does at one strength.

    Attributes:
        strength: It.
        rise: Of the loss on general text; None where the edit cannot have this strength, or was refused.
        summary: Scores over the cases, as `metrics.summarise` gives them.
        reason: Why there is nothing.
    """

    strength: float
    rise: LossRise | None
    summary: metrics.Summary
    reason: str | None = None


def turned(
    dial: Dial,
    text: GeneralText,
    cases: Sequence[Case],
    strengths: Sequence[float] = STRENGTHS,
    *,
    batch_tokens: int = 8192,
) -> list[DialPoint]:
    """Return what an edit achieves and costs at each strength.

    Args:
        dial: The edit.
        text: General text, read by the model without the edit.
        cases: Their probes are asked at every strength.
        strengths: In this order.
        batch_tokens: Tokens of one forward pass.
    """
    probes = [probe for case in cases for probe in case.probes]
    before = score(text.model, text.tokenizer, probes, batch_tokens=batch_tokens)
    points = []
    for strength in strengths:
        if not dial.has(strength):
            points.append(DialPoint(strength, None, {}, dial.reason))
            continue
        try:
            with dial.at(strength):
                rise = text.rise()
                scores = score(text.model, text.tokenizer, probes, batch_tokens=batch_tokens)
        except NumericalError as error:
            points.append(DialPoint(strength, None, {}, str(error)))
            continue
        now, then = iter(scores), iter(before)
        values = [
            metrics.case_values(
                metrics.outcomes(case, [next(now) for _ in case.probes], before=[next(then) for _ in case.probes])
            )
            for case in cases
        ]
        points.append(DialPoint(strength, rise, metrics.summarise(values)))
    return points


def rise_at(dial: Dial, text: GeneralText, strength: float) -> LossRise | None:
    """Return the rise of the loss on general text at a strength; None where the edit cannot have it."""
    if not dial.has(strength):
        return None
    try:
        with dial.at(strength):
            return text.rise()
    except NumericalError:
        return None


def strongest(
    measure: Callable[[float], LossRise | None], cap: float, *, steps: int = STEPS, margin: float = 0.0
) -> float:
    """Return the largest strength k / steps from 0 to 1 that is admitted to a league.

    Quarters are looked at from above, and what lies above the first that is admitted is halved. Where the loss grows
    with the strength, as along any small step, the result is the largest on the grid. Where it does not, it is a
    strength that is admitted, while the next one and all quarters above it are not. 0 is always admitted. A larger cap
    never gives a smaller strength.

    Args:
        measure: Returns the rise at a strength; None where the edit is refused there, which is not admitted.
        cap: By how much of itself the loss may rise.
        steps: Of the grid.
        margin: As of `LossRise.is_below`.

    Raises:
        ConfigError: The cap or the steps are not above 0.
    """
    if cap <= 0 or steps < 1:
        raise ConfigError(f"expected a cap and steps above 0, got {cap} and {steps}")

    def is_admitted(k: int) -> bool:
        if k == 0:
            return True
        found = measure(k / steps)
        return found is not None and found.is_below(cap, margin=margin)

    marks = sorted({k * steps // _COARSE for k in range(_COARSE + 1)}, reverse=True)
    low = next(k for k in marks if is_admitted(k))
    if low == steps:
        return 1.0
    high = min(k for k in marks if k > low)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_admitted(middle) else (low, middle)
    return low / steps
