"""MEND: a method whose trained network transforms the gradient of a fact into an edit.

    dL/dW = sum_t delta_t x_t^T,    (x~_t, delta~_t) = g(x_t, delta_t),    W' = W + alpha sum_t delta~_t x~_t^T

Mitchell et al. 2022, "Fast Model Editing at Scale", sections 3.1 and 3.2. One forward pass, and one backward pass down
to the lowest edited layer, give the gradient of the new answer's loss as factors, one pair per token. A small network g
and a rate alpha per weight transform them into the factors of the edit. There is no search at edit time. g and alpha
are trained on many edits, to minimise

    c_edit * L_e + c_loc * L_loc,    L_e = -log p'(new answer | other words),    L_loc = KL(p || p') on unrelated text

(equations 4a and 4b), where p' is the edited model. If the authors' code and the paper differ, this follows the code:
the update is added, so that training makes the rates negative, and a batch of requests is one gradient.

Legend: x (t, d_in) the inputs of a linear map at t tokens; delta (t, d_out) the gradients of its outputs; x~ and delta~
the factors after g; W (d_out, d_in).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.editors.core.config import check_layers, check_least, check_positive
from errata.editors.core.dtypes import working_dtype
from errata.editors.core.edit import Solution
from errata.editors.core.errors import ConfigError
from errata.editors.core.families.fine_tuning import prompt_and_answer
from errata.editors.core.families.hypernetwork import Hypernetwork
from errata.editors.core.families.learned_editor import TrainedConfig, TrainedEditor, TrainingExample
from errata.editors.core.families.map_choice import select_projections
from errata.editors.core.forward.functional_edit import EditedModel, Updates
from errata.editors.core.forward.gradient_factors import AnsweredRow, Factors, gradient_factors
from errata.editors.core.ledger.patch import LowRank, Patch
from errata.editors.core.model.activations import limit_batch_tokens
from errata.editors.core.model.tokens import pad_id
from errata.editors.core.request import EditRequest


@dataclass(frozen=True, kw_only=True)
class MENDConfig(TrainedConfig):
    """MEND's fields; defaults are those of the authors' files for GPT-2 XL and GPT-J.

    In place of the authors' `inner_params`, a list of parameter names, there are `layers` and `projections`.
    `transformer.h.47.mlp.c_fc.weight` is layer 47 and projection "c_fc".
    """

    layers: tuple[int, ...] | None = None
    """Layers to edit, counted from 0; null: the last three, as in the authors' files."""

    projections: tuple[str, ...] | None = None
    """The MLP's linear maps to edit, by the last part of their names; null: all of them."""

    n_hidden: int = 1
    """Number of hidden layers of g."""

    rank: int = 1920
    """Rank of the layers of g, at most their width."""

    combine: bool = True
    """Whether one network transforms x and delta side by side; false: one network for each."""

    shared: bool = True
    """Whether weights of one shape share a network, with a scale and an offset per weight; false: one per weight."""

    norm: bool = True
    """Whether x and delta are normalised by their mean and standard deviation in training."""

    edit_lr: float = 1e-4
    """Initial value of the rates alpha."""

    lr_lr: float = 1e-4
    """Learning rate of the rates alpha. (It has no effect in the authors' code, which trains them with `lr`.)"""

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
        check_positive(self, ("rank", "lr_lr", "batch_tokens"))
        check_least(self, {"n_hidden": 0, "cedit": 0, "cloc": 0})


class MEND(TrainedEditor):
    """Model editor networks with gradient decomposition (Mitchell et al. 2022)."""

    name = "mend"
    Config = MENDConfig
    config: MENDConfig
    network: Hypernetwork
    structural = ("layers", "projections", "n_hidden", "rank", "combine", "shared", "norm")

    # --- the network ------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        count = self.architecture.n_layers
        layers = self.config.layers if self.config.layers is not None else tuple(range(max(0, count - 3), count))
        self.layers = check_layers(layers, count)
        self.pad = pad_id(self.tokenizer)
        maps = {layer: self.architecture.mlp_maps(layer) for layer in self.layers}
        self.projections = select_projections(maps[self.layers[0]], self.config.projections)
        self.maps = [maps[layer][name] for layer in self.layers for name in self.projections]
        self.architecture.check_writable(self.maps)
        self.architecture.check_trainable(self.maps)
        self.modules = [linear_map.module for linear_map in self.maps]
        self._batch_tokens = limit_batch_tokens(self.config.batch_tokens, self.architecture.device)

    def build(self, generator: torch.Generator) -> Hypernetwork:
        return Hypernetwork(
            [(linear_map.shape[1], linear_map.shape[0]) for linear_map in self.maps],
            n_hidden=self.config.n_hidden,
            rank=self.config.rank,
            combine=self.config.combine,
            shared=self.config.shared,
            norm=self.config.norm,
            edit_lr=self.config.edit_lr,
            dtype=working_dtype(self.architecture.dtype),
            generator=generator,
        )

    def structure(self) -> dict[str, Any]:
        fields = {name: getattr(self.config, name) for name in self.structural}
        return {**fields, "layers": list(self.layers), "projections": list(self.projections)}

    # --- editing ----------------------------------------------------------------------------------------------------

    def solve(self, requests: Sequence[EditRequest]) -> list[Solution]:
        """Solve all requests in the same passes, each by its own gradient."""
        return self._solve([[request] for request in requests])

    def solve_batch(self, requests: Sequence[EditRequest]) -> Solution:
        """Solve all requests by one gradient, of the mean loss over their answer tokens, as in the authors' code.

        A network that was trained on batches of another size (`edit_bs`) has seen gradients of another scale.
        """
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
            updates = []
            for f, (x, delta) in zip(factors, transformed, strict=True):
                tokens = (f.owner == e).to(x.device)  # the map may be on another device than the last block
                updates.append(LowRank(delta[tokens].T.contiguous(), x[tokens].contiguous()))
            report = {"tokens": len(updates[0].V), **shared}
            patch = Patch({linear_map.name: update for linear_map, update in zip(self.maps, updates, strict=True)})
            solutions.append(Solution(tuple(requests), patch, tuple({"loss": loss, **report} for loss in losses[e])))
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

    def transform(self, factors: Sequence[Factors]) -> list[tuple[Tensor, Tensor]]:
        """Return the factors after the network: (alpha x~ (t, d_in), delta~ (t, d_out)) for each weight."""
        device = self.architecture.device
        return [self.network(i, f.x.to(device), f.delta.to(device)) for i, f in enumerate(factors)]

    # --- training ---------------------------------------------------------------------------------------------------

    def parameter_groups(self) -> list[dict[str, Any]]:
        # The rates alpha have their own learning rate.
        rates = self.network.edit_lrs
        others = [parameter for parameter in self.network.parameters() if parameter is not rates]
        return [{"params": others, "lr": self.config.lr}, {"params": [rates], "lr": self.config.lr_lr}]

    def loss(self, edits: Sequence[Sequence[TrainingExample]]) -> tuple[Tensor, dict[str, float]]:
        """Return the mean over the edits of cedit * L_e + cloc * L_loc (equation 4), and both terms by name.

        L_e is the mean over the answer tokens of an edit's `answer_rows`. L_loc is the mean over the tokens of its
        `locality_rows`. The running statistics of the network include these edits.
        """
        factors, _ = self.factors([[example.request for example in edit] for edit in edits])
        self.network.train()
        updates = [
            Updates.of(delta, x, f.owner, len(edits))
            for f, (x, delta) in zip(factors, self.transform(factors), strict=True)
        ]
        after = EditedModel(self.architecture, self.layers[0], self.modules, updates, self.pad, self._batch_tokens)
        answers = [(row, e) for e, edit in enumerate(edits) for example in edit for row in example.answer_rows]
        locality = [(row, e) for e, edit in enumerate(edits) for example in edit for row in example.locality_rows]
        edit_loss = after.answer_loss([row for row, _ in answers], torch.tensor([e for _, e in answers])).mean()
        locality_loss = after.divergence([row for row, _ in locality], torch.tensor([e for _, e in locality])).mean()
        total = self.config.cedit * edit_loss + self.config.cloc * locality_loss
        return total, {"edit": float(edit_loss.detach()), "locality": float(locality_loss.detach())}
