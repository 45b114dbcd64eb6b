"""Measure edits of behaviour: what they do to open-ended continuations, beside what they cost and what baselines do.

    study = BehaviourStudy(model, tokenizer, held_out, drift)
    point = study.measure(steering.edit(2.0), strength=2.0)
    point.share, point.effect, point.positive, point.negative, point.drift
    chance = study.random(steering, 2.0, seeds=range(5))    # the same with random directions of the same lengths
    study.prompted("Use formal language.")                  # and without an edit

Each contrast is a prompt with a continuation that shows the behaviour (positive) and one that does not (negative), of
equal style. No text is drawn and nothing judges: the model's own likelihoods of both continuations count.

    delta = mean log p per token of the positive - that of the negative

    share       contrasts with delta > 0
    effect      (mean delta - mean delta of the untouched model) / its standard deviation over contrasts: behaviours on
                one scale
    positive    change of the positive's log p per token against the untouched model; `negative` likewise. An edit that
                lowers both is only breaking the model, which their difference does not show
    drift       rise of the loss and KL on general text

Source: Pres et al. 2024, "Towards Reliable Evaluation of Behavior Steering Interventions in LLMs" (its abstract), asks
for contexts like those of use, for likelihoods, for a scale that compares behaviours, and for baselines. How each of
these is computed here is our own reading.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from errata.editors.core.edit import Edit
from errata.editors.core.errors import ConfigError
from errata.editors.core.ledger.patch import Patch
from errata.editors.core.model.tokens import Tokenizer, prompt_ids
from errata.editors.core.progress import Progress, silent
from errata.editors.core.steering.affine import Affine
from errata.editors.core.steering.contrast import Contrast
from errata.editors.core.steering.positions import EVERYWHERE
from errata.editors.core.steering.steering import Steering
from errata.evaluate.intervals import Interval, bootstrap, student
from errata.evaluate.probes import Probe
from errata.evaluate.scoring import Model, score
from errata.evaluate.text_drift import MovedText, TextDrift


@dataclass(frozen=True)
class BehaviourPoint:
    """What a model does at one strength of an edit, over n contrasts.

    Attributes:
        strength: Of the edit; None for a baseline without one.
        share: Share of contrasts whose positive continuation is the more probable one.
        delta: Mean of log p(positive) - log p(negative), nats per token.
        effect: Change of the mean delta, in standard deviations of the untouched model's delta, with its interval.
        positive: Change of log p of the positive continuation, nats per token, with its interval.
        negative: The same of the negative continuation.
        drift: The cost on general text; None where it was not measured.
    """

    strength: float | None
    share: float
    delta: float
    effect: Interval
    positive: Interval
    negative: Interval
    drift: MovedText | None = None

    @property
    def is_breaking(self) -> bool:
        """Whether both continuations have become less probable, so that a gain of delta is a loss of both."""
        return self.positive.high < 0 and self.negative.high < 0

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "is_breaking": self.is_breaking}


@dataclass(frozen=True)
class RandomBaseline:
    """What edits with random directions do that are as long as those of an edit, over k directions that were drawn.

    Intervals are over directions (Student's), and not over contrasts: another direction may do something else.

    Attributes:
        strength: Of the edits; None of a kind without one.
        seeds: Of the directions.
        points: What each of them does.
        share: Mean over directions of `BehaviourPoint.share`.
        effect, positive, negative: As of `BehaviourPoint`, means over directions.
        rise, kl: Of the cost on general text, means over directions; None where it was not measured.
    """

    strength: float | None
    seeds: tuple[int, ...]
    points: tuple[BehaviourPoint, ...]

    @property
    def share(self) -> float:
        return statistics.fmean(point.share for point in self.points)

    @property
    def effect(self) -> Interval:
        return student([point.effect.mean for point in self.points])

    @property
    def positive(self) -> Interval:
        return student([point.positive.mean for point in self.points])

    @property
    def negative(self) -> Interval:
        return student([point.negative.mean for point in self.points])

    @property
    def rise(self) -> Interval | None:
        found = [point.drift.rise.value for point in self.points if point.drift is not None]
        return student(found) if found else None

    @property
    def kl(self) -> Interval | None:
        found = [point.drift.kl for point in self.points if point.drift is not None]
        return student(found) if found else None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, without those of single directions."""
        intervals = {name: getattr(self, name) for name in ("effect", "positive", "negative", "rise", "kl")}
        plain = {name: None if found is None else found.as_dict() for name, found in intervals.items()}
        return {"strength": self.strength, "seeds": list(self.seeds), "share": self.share, **plain}


class BehaviourStudy:
    """A contrast set that the untouched model has scored, to be scored again with edits.

    Args:
        model: Any causal decoder of transformers; the edits that it carries now count as untouched.
        tokenizer: Its fast tokenizer.
        contrasts: Two or more with a prompt, other than those that the edits were learnt from.
        drift: General text; None: the cost is not measured.
        batch_tokens: Bound on the tokens of a batch.

    Attributes:
        untouched: The model without the edits: its share and delta, and changes of 0.

    Raises:
        ConfigError: There are fewer contrasts, or one has no prompt.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        contrasts: Sequence[Contrast],
        drift: TextDrift | None = None,
        *,
        batch_tokens: int = 8192,
    ) -> None:
        if len(contrasts) < 2 or not all(each.prompt for each in contrasts):
            raise ConfigError(
                f"expected two or more contrasts with a prompt to measure a behaviour on, got {len(contrasts)}; a "
                "continuation by itself has no context"
            )
        self.model, self.tokenizer, self.contrasts, self.drift = model, tokenizer, tuple(contrasts), drift
        self.batch_tokens = batch_tokens
        self._before = self._likelihoods(self.contrasts)
        deltas = [a - b for a, b in self._before]
        self._spread = statistics.stdev(deltas)
        if not self._spread > 0:
            raise ConfigError("all contrasts have the same difference of log p, so that effects have no scale")
        self.untouched = self._point(0.0, self._before, None)

    def measure(self, edit: Edit, strength: float | None = None) -> BehaviourPoint:
        """Return what an edit does, which is applied meanwhile.

        The continuations are scored as the edit acts in one pass per token that is read. The cost of an edit that acts
        at the last token of each pass is measured as if the text was written token by token: at every token of it.

        Args:
            edit: Not applied.
            strength: What to note as its strength.
        """
        with edit.applied():
            after = self._likelihoods(self.contrasts)
        drift = None
        if self.drift is not None:
            with as_written(edit).applied():
                drift = self.drift.measure()
        return self._point(strength, after, drift)

    def random(
        self,
        steering: Steering,
        strength: float | None = None,
        *,
        seeds: Iterable[int] = range(5),
        progress: Progress = silent,
    ) -> RandomBaseline:
        """Return what edits with random directions do: the baseline that any edit of this size meets.

        Args:
            steering: Of any kind; its directions give the lengths.
            strength: Of the edits; None: the kind's own.
            seeds: A direction is drawn with each.
            progress: Called after every direction.

        Raises:
            ConfigError: There are no seeds, or the kind has no strength and one is given.
        """
        drawn = tuple(seeds)
        if not drawn:
            raise ConfigError("expected at least one seed to draw a random direction with, got none")
        own, points = steering.default_strength if strength is None else strength, []
        for count, seed in enumerate(drawn, 1):
            points.append(self.measure(steering.random(seed).edit(strength), own))
            progress(count, len(drawn), "random directions")
        return RandomBaseline(own, drawn, tuple(points))

    def prompted(self, instruction: str) -> BehaviourPoint:
        """Return what an instruction does: the baseline that needs no edit.

        It stands in front of every prompt, and for the cost in front of every text; where the model does not take such
        long rows, the cost is not measured.
        """
        asked = [replace(each, prompt=f"{instruction} {each.prompt}") for each in self.contrasts]
        after = self._likelihoods(asked)
        before, drift = prompt_ids(self.tokenizer, instruction), None
        if self.drift is not None and self.drift.takes(before):
            drift = self.drift.measure(before)
        return self._point(None, after, drift)

    def _likelihoods(self, contrasts: Sequence[Contrast]) -> list[tuple[float, float]]:
        """Return the mean log-probability per token of each contrast's two continuations."""
        probes = [Probe("rewrite", c.prompt, c.positive, c.negative, join=c.join, chat=c.chat) for c in contrasts]
        found = score(self.model, self.tokenizer, probes, batch_tokens=self.batch_tokens)
        return [(-(each.nll_target or 0.0), -(each.nll_other or 0.0)) for each in found]

    def _point(
        self, strength: float | None, after: Sequence[tuple[float, float]], drift: MovedText | None
    ) -> BehaviourPoint:
        deltas = [a - b for a, b in after]
        changes = [[now[i] - then[i] for now, then in zip(after, self._before, strict=True)] for i in (0, 1)]
        shifts = [(a - b) / self._spread for a, b in zip(*changes, strict=True)]
        return BehaviourPoint(
            strength,
            sum(delta > 0 for delta in deltas) / len(deltas),
            statistics.fmean(deltas),
            bootstrap(shifts),
            bootstrap(changes[0]),
            bootstrap(changes[1]),
            drift,
        )


def as_written(edit: Edit) -> Edit:
    """Return the edit as it acts on a text that is written token by token: at every token where it acts at the last."""
    adapters = {}
    for name, record in edit.patch.adapters.items():
        if isinstance(record, Affine) and any(change.where.place == "last" for change in record.changes):
            changes = [
                replace(change, where=EVERYWHERE) if change.where.place == "last" else change
                for change in record.changes
            ]
            record = replace(record, changes=tuple(changes))
        adapters[name] = record
    return replace(edit, patch=Patch(edit.patch.updates, adapters))
