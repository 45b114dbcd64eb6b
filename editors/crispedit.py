"""CrispEdit: fine-tuning in the directions of the weights in which the loss on ordinary text hardly curves.

    G <- U_o ((U_o^T G U_i) * M) U_i^T,    then a step of Adam,    M_ij = 1 where s_i a_j is small

Ikram et al. 2026, "CrispEdit: Low-Curvature Projections for Scalable Non-Destructive LLM Editing". G is the gradient of
the new answers' loss. A = E[x x^T] = U_i diag(a) U_i^T and S = E[g g^T] = U_o diag(s) U_o^T are the two factors of the
curvature (core/solve/curvature.py), taken over text and over the edits that the model carries. The largest products
s_i a_j that together hold the share `energy_threshold` are left out.

The ledger keeps x and g of each edit at its answer tokens, so that an undone edit no longer counts.

With `curvature=input` the mask depends on a_j alone, and the projection is AlphaEdit's null space for the share
1 - `energy_threshold` (the paper's "AlphaEdit-FT", and Adam-NSCL).

Papers and code differ from each other and from this file:

- Their code projects gradients, and Adam then divides each element by its own scale. So the step is not in the
  directions that the projection has left. `project=step` projects what Adam gives, as the paper's constraint says.
- The share is 0.99 in their file and 0.8 in the commands that they list; this file has 0.99.
- Their loss is the mean over the answer tokens of a batch. Here it is the mean over requests, each a mean over its own.
- They add a token to pad with. This file pads without a trace.
- After each batch of a sequence they compute A and S again over text and all edits so far, on the edited model. Here
  each edit is measured once, right behind its training, and text on the untouched model. Their option to compute all
  again once a weight has moved by 25 % is off in their commands, and left out.
- One Adam goes through their sequence, and each edit here has its own.
- They train bfloat16 weights. This file trains 16-bit weights on a float32 master copy.

The update has full rank, as in LocFT: `patch_bytes` of the report says how much it is. A new decomposition of A and S
per edit of a sequence takes seconds at a width of 4096; `past_edits=false` keeps that of the text.

Legend: x_t (d_in,) input of a map at token t; g_t (d_out,) gradient of the loss at its output; W (d_out, d_in).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from errata.editors.core.config import check_positive
from errata.editors.core.dtypes import working_dtype
from errata.editors.core.edit import Solution
from errata.editors.core.errors import ConfigError
from errata.editors.core.families.text_curvature import CurvatureFactors, text_curvature
from errata.editors.core.families.trainables import Trainable
from errata.editors.core.forward.gradient_factors import AnsweredRow, gradient_factors
from errata.editors.core.ledger.entry import Entry
from errata.editors.core.model.activations import limit_batch_tokens
from errata.editors.core.model.architecture import LinearMap
from errata.editors.core.model.model_settings import read_model_settings
from errata.editors.core.model.texts import FACTBOOK, read_texts
from errata.editors.core.request import EditRequest
from errata.editors.core.solve.curvature import CurvatureProjector
from errata.editors.finetune import FTM, PUBLISHED_RATE, Bound, FineTuneConfig, MasterWeights


@dataclass(frozen=True, kw_only=True)
class CrispEditConfig(FineTuneConfig):
    """CrispEdit's fields. Defaults are those of the authors' file for Llama 3 8B."""

    lr: float | None = PUBLISHED_RATE
    """Learning rate of Adam; null: as FT-M's."""

    batch_size: int = 32
    """Requests of one edit that share a gradient step."""

    shuffle: bool = True
    """Whether the requests of an edit are shuffled before each pass."""

    energy_threshold: float = 0.99
    """Share of the sum of all curvatures that the directions left out hold; 0 leaves out none. The authors' commands
    have 0.8."""

    curvature: Literal["both", "input"] = "both"
    """Whether the curvature of a direction is s_i a_j, or a_j alone, as in AlphaEdit."""

    project: Literal["gradient", "step"] = "gradient"
    """What is projected: the gradient before Adam, as in the authors' code, or the whole change after each step."""

    past_edits: bool = True
    """Whether the edits that the model carries count in the curvature, beside the text."""

    mom2_dataset: str | None = None
    """Text for the curvature: a file, "name:config:split" of the Hub, or "factbook", the text that comes with errata;
    null: the text in the model's folder, else "factbook"."""

    mom2_n_samples: int = 100
    """Number of texts to read for it. The authors' file has 1,000, and their commands have 100."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("mom2_n_samples",))
        if not 0 <= self.energy_threshold < 1:
            raise ConfigError(f"energy_threshold: expected a share from 0 to below 1, got {self.energy_threshold}")


# CrispEdit's layers by the model's number of layers: Llama 3 8B.
CRISPEDIT_LAYERS: Mapping[int, tuple[int, ...]] = MappingProxyType({32: (19, 20, 21, 22, 23)})


class CrispEdit(FTM):
    """Fine-tuning projected onto directions of low curvature (Ikram et al. 2026)."""

    name = "crispedit"
    Config = CrispEditConfig
    config: CrispEditConfig

    def setup(self) -> None:
        super().setup()
        self._text: dict[str, CurvatureFactors] | None = None
        self._projectors: tuple[tuple[str, ...] | None, dict[str, CurvatureProjector]] = (None, {})

    def default_layers(self) -> Sequence[int]:
        """Return the authors' layers for models of the same depth, else those at the same height as in Llama 3 8B."""
        count = self.architecture.n_layers
        scaled = {min(count - 1, round(layer * count / 32)) for layer in CRISPEDIT_LAYERS[32]}
        return CRISPEDIT_LAYERS.get(count, tuple(sorted(scaled)))

    def shuffle_seed(self) -> int | None:
        return self.config.seed if self.config.shuffle else None

    def trainable(self) -> Trainable:
        return _ProjectedWeights(self.maps, self.config.rate, self.config.bound, self.projectors(), self.config.project)

    def _train(self, edits: Sequence[list[EditRequest]]) -> list[Solution]:
        free = {"free_share": fmean(each.free_share for each in self.projectors().values())}
        return [
            replace(
                solution,
                diagnostics=tuple({**report, **free} for report in solution.diagnostics),
                state=self._measured(solution),
            )
            for solution in super()._train(edits)
        ]

    # --- curvature --------------------------------------------------------------------------------------------------

    def projectors(self) -> dict[str, CurvatureProjector]:
        """Return the projection of each map, by the name of its weight, for the edits that the model carries."""
        entries = self._entries()
        ids = tuple(entry.id for entry in entries)
        if ids != self._projectors[0]:
            text, dtype = self._text_factors(), working_dtype(self.architecture.dtype)
            found = {}
            for linear_map in self.maps:
                factors = _with_edits(text[linear_map.name], linear_map.name, entries)
                S = factors.S if self.config.curvature == "both" else None
                projector = CurvatureProjector.low(factors.A, S, self.config.energy_threshold)
                found[linear_map.name] = projector.to(linear_map.weight.device, dtype)
            self._projectors = (ids, found)
        return self._projectors[1]

    def _text_factors(self) -> dict[str, CurvatureFactors]:
        """Return the factors of each map over the text, on the untouched model."""
        if self._text is None:
            source = self.config.mom2_dataset or read_model_settings(self.model).text or FACTBOOK
            with self.clock.one_off("moments"), self.ledger.untouched():
                found = text_curvature(
                    self.architecture,
                    self.tokenizer,
                    self.maps,
                    read_texts(source, max_texts=self.config.mom2_n_samples),
                    batch_tokens=limit_batch_tokens(self.config.batch_tokens, self.architecture.device),
                    progress=self.progress,
                )
            self._text = {linear_map.name: each for linear_map, each in zip(self.maps, found, strict=True)}
        return self._text

    def _entries(self) -> list[Entry]:
        """Return the edits of this method on the model that count."""
        if not self.config.past_edits:
            return []
        return [entry for entry in self.ledger.entries if entry.info.method == self.name and entry.state]

    def _measured(self, solution: Solution) -> dict[str, Tensor]:
        """Return x and g of each map at the answer tokens of an edit, on the model with this edit."""
        if not self.config.past_edits:
            return {}
        rows = [self.row(request) for request in solution.requests]
        with self.ledger.transaction():
            name = self._append_temporarily(solution)
            factors, _ = gradient_factors(
                self.architecture,
                [found.module for found in self.maps],
                [[AnsweredRow(row.ids, row.answer) for row in rows]],
                pad=self.pad,
                batch_tokens=limit_batch_tokens(self.config.batch_tokens, self.architecture.device),
                answers_only=True,
                summed=True,  # as on text
            )
            self.ledger.remove_many([name])
        state = {}
        for linear_map, each in zip(self.maps, factors, strict=True):
            state[f"x.{linear_map.name}"] = each.x
            state[f"g.{linear_map.name}"] = each.delta
        return state

    def joined_state(self, solutions: Sequence[Solution]) -> dict[str, Tensor]:
        """Return the rows of all solutions together."""
        names = dict.fromkeys(name for solution in solutions for name in solution.state)
        return {name: torch.cat([solution.state[name] for solution in solutions]) for name in names}


def _with_edits(factors: CurvatureFactors, name: str, entries: Sequence[Entry]) -> CurvatureFactors:
    """Return a map's factors over the text and over the tokens of some edits."""
    rows = [(entry.state[f"x.{name}"], entry.state[f"g.{name}"]) for entry in entries if f"x.{name}" in entry.state]
    if not rows:
        return factors
    return factors.with_rows(*(torch.cat([pair[i] for pair in rows]) for i in range(2)))


class _ProjectedWeights(MasterWeights):
    """Master copies of linear maps that only move in the directions of low curvature."""

    def __init__(
        self,
        maps: Sequence[LinearMap],
        rate: float | None,
        bound: Bound,
        projectors: Mapping[str, CurvatureProjector],
        what: Literal["gradient", "step"],
    ) -> None:
        super().__init__(maps, rate, bound)
        self.projectors, self.what = projectors, what

    def before_step(self) -> None:
        if self.what == "gradient":
            for name, W in self.master.items():
                assert W.grad is not None
                W.grad.copy_(self.projectors[name](W.grad))

    def project(self) -> None:
        if self.what == "step":
            for name, W in self.master.items():
                base = self.base[name].to(W)
                W.copy_(base + self.projectors[name](W - base))
        super().project()
