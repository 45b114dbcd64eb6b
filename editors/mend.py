"""MEND: a network that has learned to turn the gradient of a fact into an edit.

    dL/dW = sum_t delta_t x_t^T,    (x~_t, delta~_t) = g(x_t, delta_t),    W' = W + alpha sum_t delta~_t x~_t^T

Mitchell et al. 2022, "Fast Model Editing at Scale", sections 3.1 and 3.2. The gradient of the new answer's loss comes
as factors, one pair a token, from one forward pass and one backward pass that ends at the lowest edited layer; a small
network g and a rate alpha of each weight turn them into the factors of the edit. Nothing is searched for at edit time.
g and alpha are trained on many edits, for

    c_edit * L_e + c_loc * L_loc,    L_e = -log p'(new answer | other words),    L_loc = KL(p || p') on unrelated text

(equations 4a and 4b), p' being the model as edited. Where the authors' code and the paper differ, this is the code: the
update is added, so that training makes the rates negative, and a batch of requests is one gradient.

Legend: x (t, d_in) a map's inputs at t tokens, delta (t, d_out) gradients of its outputs; x~, delta~ what g makes of
them; W (d_out, d_in).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
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
from errata.editors.core.forward.functional_edit import EditedModel, Updates
from errata.editors.core.forward.gradient_factors import AnsweredRow, Factors, gradient_factors
from errata.editors.core.ledger.patch import LowRank, Patch
from errata.editors.core.model.activations import limit_batch_tokens
from errata.editors.core.model.tokens import pad_id
from errata.editors.core.request import EditRequest


@dataclass(frozen=True, kw_only=True)
class MENDConfig(TrainedConfig):
    """MEND's fields; defaults are those of the authors' files for GPT-2 XL and GPT-J.

    Their `inner_params`, a list of parameter names, is `layers` times `projections` here:
    `transformer.h.47.mlp.c_fc.weight` is layer 47 and projection "c_fc".
    """

    layers: tuple[int, ...] | None = None
    """Layers to edit, counted from 0; null: the last three, as in the authors' files."""

    projections: tuple[str, ...] | None = None
    """Which of the MLP's linear maps, by the last part of their names; null: all of them."""

    n_hidden: int = 1
    """Hidden layers of g."""

    rank: int = 1920
    """Rank of the layers of g, at most their width."""

    combine: bool = True
    """One network over x and delta side by side; false: one for each."""

    shared: bool = True
    """One network for all weights of one shape, with a scale and an offset for each; false: one for each weight."""

    norm: bool = True
    """Whether x and delta are normalised by their mean and deviation in training."""

    edit_lr: float = 1e-4
    """The rates alpha before training."""

    lr_lr: float = 1e-4
    """Learning rate of the rates alpha. (In the authors' code it has no effect: `lr` moves them.)"""

    cedit: float = 0.1
    """Weight of the new answers in the training loss."""

    cloc: float = 1.0
    """Weight of the divergence on what shall stay."""

    batch_tokens: int = 16384
    """Bound on the tokens that are run at a time; lower it where memory is short."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.edit_lr == 0:
            raise ConfigError("edit_lr: expected another rate than 0, from which nothing could be learned")
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
        self.projections = _chosen(maps[self.layers[0]], self.config.projections)
        self.maps = [maps[layer][name] for layer in self.layers for name in self.projections]
        self.modules = [found.module for found in self.maps]
        self._batch_tokens = limit_batch_tokens(self.config.batch_tokens, self.architecture.device)

    def build(self, generator: torch.Generator) -> Hypernetwork:
        return Hypernetwork(
            [(found.weight.shape[1], found.weight.shape[0]) for found in self.maps],
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
        found = {name: getattr(self.config, name) for name in self.structural}
        return {**found, "layers": list(self.layers), "projections": list(self.projections)}

    # --- editing ----------------------------------------------------------------------------------------------------

    def solve(self, requests: Sequence[EditRequest]) -> list[Solution]:
        """All requests in the same passes, each with a gradient of its own."""
        return self._solve([[request] for request in requests])

    def solve_batch(self, requests: Sequence[EditRequest]) -> Solution:
        """One gradient, of the mean over the answer tokens of all requests, as in the authors' code. A network that
        was trained on batches of another size (`edit_bs`) has seen gradients of another scale."""
        return self._solve([requests])[0]

    def _solve(self, edits: Sequence[Sequence[EditRequest]]) -> list[Solution]:
        started = time.perf_counter()
        factors, losses = self.factors(edits)
        self.network.eval()
        with torch.no_grad():
            turned = self.turned(factors)
        shared = {
            "layers": list(self.layers),
            "checkpoint": self.checkpoint,
            "seconds": (time.perf_counter() - started) / sum(map(len, edits)),
        }
        solutions = []
        for e, requests in enumerate(edits):
            updates = []
            for f, (x, delta) in zip(factors, turned, strict=True):
                mine = (f.owner == e).to(x.device)  # the map may lie on another than the blocks' end
                updates.append(LowRank(delta[mine].T.contiguous(), x[mine].contiguous()))
            report = {"tokens": len(updates[0].V), **shared}
            patch = Patch({found.name: update for found, update in zip(self.maps, updates, strict=True)})
            solutions.append(Solution(tuple(requests), patch, tuple({"loss": loss, **report} for loss in losses[e])))
        return solutions

    def row(self, request: EditRequest) -> AnsweredRow:
        """The prompt and its new answer as ids.

        Raises:
            RequestError: the answer tokenises to nothing, or both are longer than the model's positions.
        """
        ids, answer = prompt_and_answer(self.architecture, self.tokenizer, request)
        return AnsweredRow((*ids, *answer[:-1]), answer)

    def factors(self, edits: Sequence[Sequence[EditRequest]]) -> tuple[list[Factors], list[list[float]]]:
        """The gradient of each edited weight for several edits, each of one or several requests, as factors; and the
        loss of each request."""
        return gradient_factors(
            self.architecture,
            self.modules,
            [[self.row(request) for request in edit] for edit in edits],
            pad=self.pad,
            batch_tokens=self._batch_tokens,
        )

    def turned(self, factors: Sequence[Factors]) -> list[tuple[Tensor, Tensor]]:
        """What the network, as it stands, makes of them: (alpha x~ (t, d_in), delta~ (t, d_out)) of each weight."""
        device = self.architecture.device
        return [self.network(i, f.x.to(device), f.delta.to(device)) for i, f in enumerate(factors)]

    # --- training ---------------------------------------------------------------------------------------------------

    def parameter_groups(self) -> list[dict[str, Any]]:
        rates = self.network.edit_lrs
        others = [parameter for parameter in self.network.parameters() if parameter is not rates]
        return [{"params": others, "lr": self.config.lr}, {"params": [rates], "lr": self.config.lr_lr}]

    def loss(self, edits: Sequence[Sequence[TrainingExample]]) -> tuple[Tensor, dict[str, float]]:
        """The mean over the edits of cedit * L_e + cloc * L_loc (equation 4): L_e a mean over the answer tokens of an
        edit's `asked` rows, L_loc over the tokens of its `kept` rows. Running statistics take these edits in first."""
        factors, _ = self.factors([[lesson.request for lesson in edit] for edit in edits])
        self.network.train()
        updates = [
            Updates.of(delta, x, f.owner, len(edits))
            for f, (x, delta) in zip(factors, self.turned(factors), strict=True)
        ]
        after = EditedModel(self.architecture, self.layers[0], self.modules, updates, self.pad, self._batch_tokens)
        asked = [(row, e) for e, edit in enumerate(edits) for lesson in edit for row in lesson.asked]
        kept = [(row, e) for e, edit in enumerate(edits) for lesson in edit for row in lesson.kept]
        edit_loss = after.answer_loss([row for row, _ in asked], torch.tensor([e for _, e in asked])).mean()
        locality_loss = after.divergence([row for row, _ in kept], torch.tensor([e for _, e in kept])).mean()
        total = self.config.cedit * edit_loss + self.config.cloc * locality_loss
        return total, {"edit": float(edit_loss.detach()), "locality": float(locality_loss.detach())}


def _chosen(there: Iterable[str], projections: Sequence[str] | None) -> tuple[str, ...]:
    """The projections to edit, in the order of the module tree.

    Raises:
        ConfigError: one that the MLPs do not have.
    """
    names = tuple(there)
    asked = names if projections is None else tuple(projections)
    if not asked or len(set(asked)) != len(asked) or not set(asked) <= set(names):
        raise ConfigError(f"projections: expected some of {', '.join(names)}, got {list(asked)}")
    return tuple(name for name in names if name in asked)
