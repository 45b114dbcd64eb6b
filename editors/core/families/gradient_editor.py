"""Base class of methods whose trained network turns the gradients of new answers into an update: MEND, MALMEN, RLEdit.

    x_t, delta_t of the new answers (gradient_factors.py)  ->  W' = W + sum_t c_t r_t^T

One forward pass, and one backward pass down to the lowest edited layer, give the gradient as factors, one pair per
token. A method says in `transform` which column c_t and which row r_t a token contributes to the update of each map.
Training minimises, over many edits,

    cedit * L_e + cloc * L_loc,    L_e = -log p'(new answer | other words),    L_loc = KL(p || p') on unrelated text

where p' is the edited model (Mitchell et al. 2022, "Fast Model Editing at Scale", equations 4a and 4b).

Shapes: t tokens; x (t, d_in) inputs of a map; delta (t, d_out) gradients of its outputs.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.editors.core.config import check_layers, check_least, check_positive
from errata.editors.core.edit import Solution
from errata.editors.core.errors import ConfigError
from errata.editors.core.families.fine_tuning import prompt_and_answer
from errata.editors.core.families.hypernetwork import Hypernetwork
from errata.editors.core.families.learned_editor import TrainedConfig, TrainedEditor, TrainingExample
from errata.editors.core.families.map_choice import select_projections
from errata.editors.core.forward.functional_edit import EditedModel, Updates
from errata.editors.core.forward.gradient_factors import AnsweredRow, Factors, gradient_factors
from errata.editors.core.ledger.patch import LowRank, Patch, Update
from errata.editors.core.model.activations import limit_batch_tokens
from errata.editors.core.model.tokens import pad_id
from errata.editors.core.request import EditRequest


@dataclass(frozen=True, kw_only=True)
class GradientEditorConfig(TrainedConfig):
    """Fields of every method of the family, named as in MEND's files. Defaults are MEND's.

    In place of the authors' lists of parameter names there are `layers` and `projections`.
    `transformer.h.47.mlp.c_fc.weight` is layer 47 and projection "c_fc".
    """

    layers: tuple[int, ...] | None = None
    """Layers to edit, counted from 0; null: the method's rule."""

    projections: tuple[str, ...] | None = None
    """The MLP's linear maps to edit, by the last part of their names; null: the method's rule."""

    rank: int = 1920
    """Rank of the layers of the network, at most their width."""

    combine: bool = True
    """Whether one network transforms x and delta side by side; false: one network for each."""

    edit_lr: float = 1e-4
    """Initial value of the rates. Each edited map has its own."""

    cedit: float = 0.1
    """Weight of the new answers in the training loss."""

    cloc: float = 1.0
    """Weight of the KL divergence on unrelated text in the training loss."""

    batch_tokens: int = 16384
    """Largest number of tokens in one forward pass; lower it if memory is short."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.edit_lr == 0:
            raise ConfigError("edit_lr: expected a rate other than 0, got 0; with it no gradient reaches the network")
        check_positive(self, ("rank", "batch_tokens"))
        check_least(self, {"cedit": 0, "cloc": 0})


class GradientEditor(TrainedEditor):
    """Base class of the family. A method writes `build`, `transform`, `default_layers` and `parameter_groups`."""

    Config = GradientEditorConfig
    config: GradientEditorConfig
    network: Hypernetwork

    # --- the network ------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        count = self.architecture.n_layers
        layers = self.config.layers if self.config.layers is not None else self.default_layers()
        self.layers = check_layers(layers, count)
        self.pad = pad_id(self.tokenizer)
        maps = {layer: self.architecture.mlp_maps(layer) for layer in self.layers}
        chosen = self.config.projections if self.config.projections is not None else self.default_projections()
        self.projections = select_projections(maps[self.layers[0]], chosen)
        self.maps = [maps[layer][name] for layer in self.layers for name in self.projections]
        self.architecture.check_writable(self.maps)
        self.architecture.check_trainable(self.maps)
        self.modules = [linear_map.module for linear_map in self.maps]
        self._batch_tokens = limit_batch_tokens(self.config.batch_tokens, self.architecture.device)

    @abstractmethod
    def default_layers(self) -> tuple[int, ...]:
        """Return the layers to edit if the configuration names none."""

    def default_projections(self) -> tuple[str, ...] | None:
        """Return the maps of an MLP to edit if the configuration names none; None: all of them."""
        return None

    def structure(self) -> dict[str, Any]:
        fields = {name: getattr(self.config, name) for name in self.structural}
        return {**fields, "layers": list(self.layers), "projections": list(self.projections)}

    # --- editing ----------------------------------------------------------------------------------------------------

    def solve(self, requests: Sequence[EditRequest]) -> list[Solution]:
        """Solve all requests in the same passes, each by its own gradient."""
        return self._solve([[request] for request in requests])

    def solve_batch(self, requests: Sequence[EditRequest]) -> Solution:
        """Solve all requests as one edit."""
        return self._solve([requests])[0]

    def _solve(self, edits: Sequence[Sequence[EditRequest]]) -> list[Solution]:
        started = time.perf_counter()
        factors, losses = self.factors(edits)
        self.network.eval()
        with torch.no_grad():
            transformed = self.transform(factors)
        shared = {
            "layers": list(self.layers),
            "checkpoint": self.checkpoint,
            "seconds": (time.perf_counter() - started) / sum(map(len, edits)),
        }
        solutions = []
        for e, requests in enumerate(edits):
            updates, tokens = {}, 0
            for linear_map, f, (rows, columns) in zip(self.maps, factors, transformed, strict=True):
                mine = (f.owner == e).to(rows.device)  # the map may be on another device than the last block
                tokens = tokens or int(mine.sum())
                updates[linear_map.name] = self.update(LowRank(columns[mine].T.contiguous(), rows[mine].contiguous()))
            report = {"tokens": tokens, **shared}
            reports = tuple({"loss": loss, **report} for loss in losses[e])
            solutions.append(Solution(tuple(requests), Patch(updates), reports))
        return solutions

    def row(self, request: EditRequest) -> AnsweredRow:
        """Return the prompt and its new answer as ids.

        Raises:
            RequestError: The answer has no tokens, or both together are too long for the model.
        """
        ids, answer = prompt_and_answer(self.architecture, self.tokenizer, request)
        return AnsweredRow((*ids, *answer[:-1]), answer)

    def factors(self, edits: Sequence[Sequence[EditRequest]]) -> tuple[list[Factors], list[list[float]]]:
        """Return the gradients of several edits, each of one or several requests.

        Returns:
            The factors of the gradient of each edited weight, and the losses by edit and request.
        """
        return gradient_factors(
            self.architecture,
            self.modules,
            [[self.row(request) for request in edit] for edit in edits],
            pad=self.pad,
            batch_tokens=self._batch_tokens,
        )

    def update(self, factors: LowRank) -> Update:
        """Return the update that these factors are, in the form that the edit keeps."""
        return factors

    @abstractmethod
    def transform(self, factors: Sequence[Factors]) -> list[tuple[Tensor, Tensor]]:
        """Return what each token contributes to the update of each weight: rows (t, d_in) and columns (t, d_out)."""

    # --- training ---------------------------------------------------------------------------------------------------

    def loss(self, edits: Sequence[Sequence[TrainingExample]]) -> tuple[Tensor, dict[str, float]]:
        """Return the mean over the edits of cedit * L_e + cloc * L_loc, and both terms by name.

        L_e is the mean over the answer tokens of an edit's `answer_rows`. L_loc is the mean over the tokens of its
        `locality_rows`. The running statistics of the network include these edits.
        """
        updates = self._updates(edits)
        return self.losses_after(updates, edits)

    def _updates(self, edits: Sequence[Sequence[TrainingExample]]) -> list[Updates]:
        """Return the updates of each weight by these edits, in the graph of the network."""
        factors, _ = self.factors([[example.request for example in edit] for edit in edits])
        self.network.train()
        return [
            Updates.of(columns, rows, f.owner, len(edits))
            for f, (rows, columns) in zip(factors, self.transform(factors), strict=True)
        ]

    def losses_after(
        self, updates: Sequence[Updates], edits: Sequence[Sequence[TrainingExample]]
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the mean loss of edits whose updates are given, and its terms by name."""
        after = EditedModel(self.architecture, self.layers[0], self.modules, updates, self.pad, self._batch_tokens)
        answers = [(row, e) for e, edit in enumerate(edits) for example in edit for row in example.answer_rows]
        locality = [(row, e) for e, edit in enumerate(edits) for example in edit for row in example.locality_rows]
        edit_loss = after.answer_loss([row for row, _ in answers], torch.tensor([e for _, e in answers])).mean()
        locality_loss = after.divergence([row for row, _ in locality], torch.tensor([e for _, e in locality])).mean()
        total = self.config.cedit * edit_loss + self.config.cloc * locality_loss
        return total, {"edit": float(edit_loss.detach()), "locality": float(locality_loss.detach())}
