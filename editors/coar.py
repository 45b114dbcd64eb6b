"""COAR-Edit: an answer is made likelier, or forgotten, by ablating the components that work against it, or for it.

Shah, Ilyas and Madry 2024, "Decomposing and Editing Predictions by Modeling Model Computation". For each component of
the model, core/locating/attribution.py estimates what it contributes to the margin of an answer: its logit less the
highest other one, a mean over the answer's tokens. Of targets T and references R, which are other texts,

    z_c = (mean_T w_c - mean_R w_c) / sqrt(var_T w_c / n_T + var_R w_c / n_R)

The k components with the lowest z are set to zero to raise the margin, and those with the highest to lower it. The
number k is searched: they are ablated one after another, until every answer is said in full, or no longer is.

The edit is a patch of low rank, W <- W - W E E^T with one column of E per input unit of the components. It is undone,
saved and scaled like any other.

The method can only take something away from a model. It moves an answer between those that the model has in mind; it
writes no fact that the model has never seen.

Papers and code differ from this file:

- The released editor leaves k to the user. The notebooks ablate one component after another until the prediction is
  another one, as here; `max_components` is their bound.
- Their components of GPT-2 are all rows of its weights (`components=rows`), which takes some 100,000 masks. Here heads
  and groups of neurons are the default.
- Their regression has no penalty, and its loop stops early. Here a ridge has the same effect (`ridge=0` leaves it out).
- Their references are other examples of the task. Here they are the beginnings of general texts.
- Components whose columns are zero already, as behind an earlier edit, are left out of the order.

Legend: C components; W (d_out, d_in) weight of a map whose input units belong to components.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from errata.editors.core.config import EditorConfig, check_least, check_positive
from errata.editors.core.dtypes import working_dtype
from errata.editors.core.edit import Solution
from errata.editors.core.editor import Editor
from errata.editors.core.errors import ConfigError, RequestError
from errata.editors.core.forward.gradient_factors import AnsweredRow
from errata.editors.core.ledger.patch import LowRank, Patch, Update, compacted
from errata.editors.core.locating.ablated_margins import Margins, ablated_margins
from errata.editors.core.locating.attribution import (
    KEEP,
    RIDGE,
    answered_row,
    attribute,
    component_scores,
    default_masks,
    text_row,
)
from errata.editors.core.locating.components import Components, components_of
from errata.editors.core.model.model_settings import read_model_settings
from errata.editors.core.model.texts import FACTBOOK, read_texts
from errata.editors.core.model.tokens import pad_id
from errata.editors.core.request import EditRequest
from errata.editors.core.solve.mask_regression import FITS, Fit

# Numbers of ablated components that are tried in one pass.
_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class COARConfig(EditorConfig):
    """COAR-Edit's fields."""

    TEXTS = ("reference_texts",)

    components: str = "heads,neurons:16"
    """What is ablated: rows (each input unit of every map, as published), heads, neurons:N (N neighbouring neurons),
    attention, mlp; several with commas."""

    layers: tuple[int, ...] | None = None
    """Blocks whose components count; null: all."""

    keep: float = KEEP
    """Probability by which a component stays in a random mask. The authors have 0.975 for GPT-2."""

    n_masks: int | None = None
    """Random masks that the attributions are fitted to; null: 1.55 per component, as in the authors' runs."""

    fit: Fit = "least_squares"
    """How: in closed form, or saga, the published loop."""

    ridge: float = RIDGE
    """What least squares adds to the variance of each component's mask, as a share of it; 0: nothing, as published."""

    goal: Literal["say", "forget"] = "say"
    """say: the margin of the new answer rises; forget: that of the true answer falls, and the new one is not read."""

    max_components: int | None = None
    """The most components that an edit ablates; null: a tenth of them."""

    max_reference_drop: float | None = None
    """The search ends before the mean margin of the references falls by more logits than this; null: no bound, as
    published."""

    reference_texts: str | None = None
    """Texts that the attributions are compared with: a file, "name:config:split" of the Hub, or "factbook"; null: the
    text in the model's folder, else "factbook"."""

    n_references: int = 50
    """Number of texts."""

    reference_tokens: int = 24
    """Tokens of each that are read."""

    batch_tokens: int = 8192
    """Bound on rows x length of a pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("max_components", "batch_tokens", "max_reference_drop"))
        check_least(self, {"n_masks": 2, "n_references": 2, "reference_tokens": 2, "ridge": 0})
        if not 0 < self.keep < 1:
            raise ConfigError(f"keep: expected a rate above 0 and below 1, got {self.keep}")
        if self.fit not in FITS:
            raise ConfigError(f"fit: expected {' or '.join(FITS)}, got {self.fit!r}")


@dataclass(frozen=True)
class _Trial:
    """What the search for k has found.

    Attributes:
        k: Components to ablate.
        margins: Margins of the targets with 0, 1, ... of them ablated.
        reached: Whether every target is what was asked for.
        drop: By how much the mean margin of the references falls, in logits.
    """

    k: int
    margins: Margins
    reached: bool
    drop: float


class COAR(Editor):
    """Ablation of the components that an answer depends on, found by regression over random ablations (Shah et al.
    2024).

    Raises:
        ArchitectureError: a weight cannot be written, or heads cannot be told apart.
    """

    name = "coar"
    Config = COARConfig
    config: COARConfig

    def setup(self) -> None:
        self.components: Components = components_of(self.architecture, self.config.components, self.config.layers)
        self.architecture.check_writable(list(self.components.maps.values()))
        self.pad = pad_id(self.tokenizer)
        self.n_masks = self.config.n_masks or default_masks(self.components)
        self.most = min(self.config.max_components or max(1, len(self.components) // 10), len(self.components))
        filled = {"n_masks": self.n_masks, "max_components": self.most, "layers": self._layers()}
        self.filled_in = {name: value for name, value in filled.items() if getattr(self.config, name) is None}
        self._rows: list[AnsweredRow] | None = None
        self._references: tuple[tuple[str, ...] | None, Tensor] = (None, torch.empty(0))

    def _layers(self) -> list[int]:
        return sorted({component.layer for component in self.components.each})

    def solve(self, requests: Sequence[EditRequest]) -> list[Solution]:
        weights = self._weights([self._row(request) for request in requests], "targets")
        return [self._solution([request], own[None]) for request, own in zip(requests, weights, strict=True)]

    def solve_batch(self, requests: Sequence[EditRequest]) -> Solution:
        """Solve all requests as one set of targets: one order of the components, and one k."""
        return self._solution(requests, self._weights([self._row(request) for request in requests], "targets"))

    @property
    def forgets(self) -> bool:
        return self.config.goal == "forget"

    # --- attributions -----------------------------------------------------------------------------------------------

    def _row(self, request: EditRequest) -> AnsweredRow:
        """Return the row whose margin is to be moved.

        Raises:
            RequestError: The true answer is to be forgotten, and the request has none.
        """
        answer = request.target
        if self.forgets:
            if request.target_true is None:
                raise RequestError(
                    "is missing; goal=forget needs the answer that is to be forgotten: target_true=ANSWER",
                    record=request.id,
                    field="target_true",
                )
            answer = request.target_true
        return answered_row(self.tokenizer, request.text, answer, chat=request.chat, join=request.join)

    def _weights(self, rows: Sequence[AnsweredRow], whose: str) -> Tensor:
        """Return what each component contributes to each row on the model as it stands, (n, C)."""

        def said(done: int, total: int, what: str) -> None:
            self.progress(done, total, f"{what} of {whose}")

        found = attribute(
            self.model,
            self.tokenizer,
            rows,
            self.components,
            keep=self.config.keep,
            n_masks=self.n_masks,
            fit=self.config.fit,
            ridge=self.config.ridge,
            seed=self.config.seed,
            batch_tokens=self.config.batch_tokens,
            progress=said,
        )
        return found.weights

    def reference_rows(self) -> list[AnsweredRow]:
        """Return the beginnings of the texts that are compared with.

        Raises:
            ConfigError: Fewer than two texts have two tokens.
        """
        if self._rows is None:
            source = self.config.reference_texts or read_model_settings(self.model).text or FACTBOOK
            rows: list[AnsweredRow] = []
            for text in read_texts(source, max_texts=self.config.n_references):
                try:
                    rows.append(text_row(self.tokenizer, text, most_tokens=self.config.reference_tokens))
                except RequestError:  # a text of one token says nothing
                    continue
            if len(rows) < 2:
                raise ConfigError(f"reference_texts: expected two texts of at least two tokens in {source!r}")
            self._rows = rows
        return self._rows

    def _reference_weights(self) -> Tensor:
        """Return the attributions of the references, once for the edits that the model carries."""
        carried = tuple(entry.id for entry in self.ledger.entries)
        if carried != self._references[0]:
            # On an edited model they are measured again for every edit, and so are a part of its work.
            with self.clock.one_off("references") if not carried else nullcontext():
                self._references = (carried, self._weights(self.reference_rows(), "references"))
        return self._references[1]

    # --- the edit ---------------------------------------------------------------------------------------------------

    def _solution(self, requests: Sequence[EditRequest], weights: Tensor) -> Solution:
        scores = component_scores(weights, self._reference_weights())
        sign = -1 if self.forgets else 1
        dead = self.components.dead()
        order = [i for i in (sign * scores).argsort(stable=True).tolist() if not dead[i]][: self.most]
        trial = self._searched([self._row(request) for request in requests], order)
        chosen = order[: trial.k]
        reports: list[dict[str, Any]] = []
        for place in range(len(requests)):
            margins = trial.margins.mean[:, place]
            reports.append(
                {
                    "components": [self.components.each[i].name for i in chosen],
                    "scores": [float(scores[i]) for i in chosen],
                    "margin_before": float(margins[0]),
                    "margin_after": float(margins[trial.k]),
                    "least_margin_after": float(trial.margins.least[trial.k, place]),
                    "reached": trial.reached,
                    "reference_drop": trial.drop,
                }
            )
        return Solution(tuple(requests), self._patch(chosen), tuple(reports))

    def _searched(self, rows: Sequence[AnsweredRow], order: Sequence[int]) -> _Trial:
        """Ablate components in order, one more each time, and return the first number that does what is asked.

        Where none does, it is the number with the best mean margin, and 0 where the first component breaks the bound on
        the references already.

        Raises:
            ConfigError: No component is left that could be ablated.
        """
        if not order:
            raise ConfigError("components: every one of them is zero already, so that none is left to ablate")
        sign = -1 if self.forgets else 1
        parts, drops = [self._margins(rows, order, [0])], [torch.zeros(1, dtype=torch.float64)]
        for start in range(1, len(order) + 1, _AT_ONCE):
            counts = range(start, min(start + _AT_ONCE, len(order) + 1))
            parts.append(self._margins(rows, order, counts))
            drops.append(self._drops(order, counts))
            allowed = self._allowed(torch.cat(drops))
            # To be said, every token must lead; to be forgotten, one that does not lead is enough.
            least = torch.cat([part.least for part in parts])
            done = ((sign * least > 0).all(1) & allowed)[1:].nonzero()
            if len(done) or not bool(allowed[-1]):
                break
        margins = Margins(torch.cat([part.mean for part in parts]), torch.cat([part.least for part in parts]))
        found = torch.cat(drops)
        if len(done):
            k = 1 + int(done[0, 0])
        else:
            within = self._allowed(found)
            better = (sign * margins.mean.mean(1)).where(within, -torch.inf)
            k = 1 + int(better[1:].argmax()) if bool(within[1]) else 0
        drop = float(found[k]) if self.config.max_reference_drop else float(self._drops(order, [k], always=True)[0])
        return _Trial(k, margins, bool(len(done)), drop)

    def _allowed(self, drops: Tensor) -> Tensor:
        """Return whether the references have stayed within the bound, with 0, 1, ... components ablated."""
        bound = self.config.max_reference_drop
        within = torch.ones_like(drops, dtype=torch.bool) if bound is None else drops <= bound
        return within.cummin(0).values

    def _drops(self, order: Sequence[int], counts: Sequence[int], *, always: bool = False) -> Tensor:
        """Return by how much the references' mean margin falls per number of ablated components; 0 without a bound."""
        if self.config.max_reference_drop is None and not always:
            return torch.zeros(len(counts), dtype=torch.float64)
        margins = self._margins(self.reference_rows(), order, [0, *counts]).mean.mean(1)
        return margins[0] - margins[1:]

    def _margins(self, rows: Sequence[AnsweredRow], order: Sequence[int], counts: Sequence[int]) -> Margins:
        """Return the margins of rows with the first components of an order ablated, per number of them."""
        keep = torch.ones(len(counts), len(self.components), dtype=torch.bool)
        for place, count in enumerate(counts):
            keep[place, list(order[:count])] = False
        return ablated_margins(
            self.architecture, self.components, rows, keep, pad=self.pad, batch_tokens=self.config.batch_tokens
        )

    def _patch(self, chosen: Sequence[int]) -> Patch:
        """Return the patch that sets the columns of some components to zero; of none, it is one factor of zeros."""
        updates: dict[str, Update] = {}
        if not chosen:
            linear = next(iter(self.components.maps.values()))
            d_out, d_in = linear.shape
            U = torch.zeros(d_out, 1, dtype=working_dtype(linear.weight.dtype), device=linear.weight.device)
            return Patch({linear.name: LowRank(U, U.new_zeros(1, d_in))})
        for name, units in self.components.units(chosen).items():
            linear = self.components.maps[name]
            W = linear.weight
            columns = W[:, units.to(W.device)].to(working_dtype(W.dtype))
            V = torch.zeros(len(units), W.shape[1], dtype=columns.dtype, device=W.device)
            V[torch.arange(len(units)), units.to(W.device)] = 1.0
            updates[linear.name] = compacted(LowRank(-columns, V))
        return Patch(updates)
