"""Component attribution by regression (COAR): what each component of a model contributes to its answers.

    rows = [answered_row(tokenizer, "The capital of Gavaria is", "Praminster")]
    found = attribute(model, tokenizer, rows, "heads,neurons:8", keep_rates=(0.95, 0.8))
    found.weights        # (n, C) logits that an answer's margin gains where a component is kept
    found.checks         # how well they predict the margins under fresh masks

Components are ablated at random, many times, and a line is fitted to the margins. Nothing is written to the model.

Source: Shah, Ilyas and Madry 2024, "Decomposing and Editing Predictions by Modeling Model Computation" (COAR and
COAR-Edit); MadryLab/modelcomponents, which was read.

Shapes: m masks, C components, n rows (prompts with their answers, or texts).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.editors.core.errors import ConfigError, FewMasksWarning, RequestError
from errata.editors.core.forward.gradient_factors import AnsweredRow
from errata.editors.core.locating.ablated_margins import ablated_margins
from errata.editors.core.locating.components import Components, components_of
from errata.editors.core.model.architecture import describe
from errata.editors.core.model.reading import read_ids
from errata.editors.core.model.tokens import Tokenizer, pad_id, prompt_ids
from errata.editors.core.progress import Progress, silent
from errata.editors.core.solve.mask_regression import Fit, MaskFit, fitted

KEEP = 0.95
# With as many masks as components least squares alone follows their noise: see docs/attribution.md.
RIDGE = 0.3
# Components of a size that a CPU can afford on small models.
POOLED = "heads,neurons:64"
# Masks per component in the authors' runs: 100,000 for the 64,512 components of GPT-2 small.
MASKS_PER_COMPONENT = 1.55


@dataclass(frozen=True)
class MaskCheck:
    """How well an attribution predicts margins under masks that it was not fitted to.

    Attributes:
        keep: The probability by which a component stayed.
        correlations: (n,) Pearson's correlation of prediction and margin over the masks.
        predicted: (m, n) margins as predicted.
        measured: (m, n) margins as they are.
    """

    keep: float
    correlations: Tensor
    predicted: Tensor
    measured: Tensor


@dataclass(frozen=True)
class Attribution:
    """What components contribute to the margins of n rows, in logits.

    Attributes:
        components: The components.
        fit: The fitted lines: weights (n, C) and intercepts (n,).
        margins: (n,) margins of the whole model.
        least: (n,) smallest margins of a row's tokens: above 0, the whole answer is said.
        keep: The probability by which a component stayed.
        n_masks: Masks that the lines are fitted to.
        checks: Predictions under fresh masks, per keep rate.
    """

    components: Components
    fit: MaskFit
    margins: Tensor
    least: Tensor
    keep: float
    n_masks: int
    checks: tuple[MaskCheck, ...]

    @property
    def weights(self) -> Tensor:
        """What a row's margin gains where a component is kept, (n, C), in logits."""
        return self.fit.weights


def attribute(
    model: Any,
    tokenizer: Tokenizer,
    rows: Sequence[AnsweredRow],
    components: str | Components = POOLED,
    *,
    keep: float = KEEP,
    n_masks: int | None = None,
    fit: Fit = "least_squares",
    ridge: float = RIDGE,
    keep_rates: Sequence[float] = (),
    check_masks: int = 50,
    seed: int = 0,
    batch_tokens: int = 8192,
    progress: Progress = silent,
) -> Attribution:
    """Return what each component contributes to the margin of each row.

    Args:
        model: A decoder of transformers; edits that are applied to it stay.
        tokenizer: Its fast tokenizer.
        rows: What is asked; see `answered_row` and `text_row`.
        components: What is ablated: names of kinds, or what `components_of` gives for some layers.
        keep: The probability by which a component stays. The authors took 0.95, and 0.975 for single rows of GPT-2.
        n_masks: Random masks; None: about 1.55 per component, as in the authors' runs.
        fit: "least_squares" in closed form, or "saga", the published loop.
        ridge: Of least squares; see `least_squares`. The paper has none, which is 0.
        keep_rates: Keep rates at which the result is checked on fresh masks.
        check_masks: Fresh masks per keep rate.
        seed: Of the masks.
        batch_tokens: Bound on rows x length of a pass.
        progress: Is told how many ablations are done.

    With no more masks than components it gives a FewMasksWarning: the weights are then much of the masks' noise.

    Raises:
        ConfigError: A number is out of range, or there is no such kind of component.
        ArchitectureError: as `components_of`.
    """
    architecture = describe(model)
    if isinstance(components, str):
        components = components_of(architecture, components)
    count = default_masks(components) if n_masks is None else n_masks
    if count < 2 or ridge < 0 or (keep_rates and check_masks < 2):
        raise ConfigError(
            f"expected at least 2 masks and a ridge of 0 or more, got {count} masks, {check_masks} to check with, and "
            f"ridge={ridge}"
        )
    _check_masks(components, count, keep, keep_rates)
    drawn = torch.Generator().manual_seed(seed)
    masks = [
        drawn_masks(n, len(components), rate, drawn)
        for n, rate in ((count, keep), *((check_masks, rate) for rate in keep_rates))
    ]
    whole = torch.ones(1, len(components), dtype=torch.bool)
    seen = ablated_margins(
        architecture,
        components,
        rows,
        torch.cat([*masks, whole]),
        pad=pad_id(tokenizer),
        batch_tokens=batch_tokens,
        progress=progress,
    )
    parts = seen.mean.split([len(part) for part in (*masks, whole)])
    found = fitted(masks[0], parts[0], fit, ridge=ridge, seed=seed)
    checks = [
        checked(found, some, margins, rate)
        for some, margins, rate in zip(masks[1:], parts[1:-1], keep_rates, strict=True)
    ]
    return Attribution(components, found, parts[-1][0], seen.least[-1], keep, count, tuple(checks))


def _check_masks(components: Components, count: int, keep: float, keep_rates: Sequence[float]) -> None:
    """Refuse keep rates that are none, and warn of too few masks."""
    for name, rate in (("keep", keep), *(("checks", rate) for rate in keep_rates)):
        if not 0 < rate < 1:
            raise ConfigError(f"{name}: expected a keep rate above 0 and below 1, got {rate}")
    if count <= len(components):
        warnings.warn(
            f"{count} masks cannot tell {len(components)} components apart: weights and ranks hold much of the "
            f"masks' noise. Take more than {len(components)} masks (by default {default_masks(components)}), or "
            "fewer components",
            FewMasksWarning,
            stacklevel=3,
        )


def default_masks(components: Components) -> int:
    """Return how many masks the authors would take, in proportion to the components."""
    return max(2, round(MASKS_PER_COMPONENT * len(components)))


def drawn_masks(count: int, components: int, keep: float, drawn: torch.Generator) -> Tensor:
    """Return random masks (count, components) whose entries are true with the probability `keep`."""
    return torch.rand(count, components, generator=drawn) < keep


def checked(fit: MaskFit, masks: Tensor, margins: Tensor, keep: float) -> MaskCheck:
    """Return how well lines predict the margins (m, n) under masks (m, C)."""
    predicted = fit.predicted(masks)
    return MaskCheck(keep, correlations(predicted, margins), predicted, margins)


def correlations(first: Tensor, second: Tensor) -> Tensor:
    """Return Pearson's correlation of each column of two matrices (m, n), (n,); 0 where one does not vary."""
    a, b = (each.double() - each.double().mean(0) for each in (first, second))
    scale = a.norm(dim=0) * b.norm(dim=0)
    return torch.where(scale > 0, (a * b).sum(0) / scale.clamp_min(torch.finfo(scale.dtype).tiny), 0.0)


def component_scores(targets: Tensor, references: Tensor) -> Tensor:
    """Return the z statistic of each component, (C,): how much more it contributes to the targets than elsewhere.

        z = (mean_T w - mean_R w) / sqrt(var_T w / n_T + var_R w / n_R),   population variances

    It is 0 where a component has the same weight everywhere.

    Args:
        targets: (n_T, C) weights of the rows to be changed.
        references: (n_R, C) weights of other rows.
    """
    T, R = targets.double(), references.double()
    difference = T.mean(0) - R.mean(0)
    spread = (T.var(0, correction=0) / len(T) + R.var(0, correction=0) / len(R)).sqrt()
    return torch.where(difference == 0, 0.0, difference / spread)


def answered_row(
    tokenizer: Tokenizer, prompt: str, answer: str, *, chat: bool = False, join: str | None = None
) -> AnsweredRow:
    """Return a prompt with its answer, whose tokens are asked about; arguments and errors as `read_ids`."""
    ids, answer_tokens = read_ids(tokenizer, prompt, answer, chat=chat, join=join)
    return AnsweredRow((*ids, *answer_tokens[:-1]), tuple(answer_tokens))


def text_row(tokenizer: Tokenizer, text: str, *, most_tokens: int | None = None) -> AnsweredRow:
    """Return a text, each of whose tokens behind the first is asked about.

    Args:
        tokenizer: The tokenizer.
        text: The text.
        most_tokens: Only this many of its tokens are read; None: all.

    Raises:
        RequestError: It has fewer than two tokens.
    """
    ids = prompt_ids(tokenizer, text)[:most_tokens]
    if len(ids) < 2:
        raise RequestError(f"expected a text of at least two tokens, got {text[:60]!r}", field="text")
    return AnsweredRow(tuple(ids[:-1]), tuple(ids[1:]))
