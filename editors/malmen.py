"""MALMEN: a trained network says what the output at each answer token should change by, and a ridge regression does it.

    (x~_t, g~_t) = network(x_t, g_t),    v_t = -eta (x_t . x~_t) g~_t,    W' = W + V^T (X X^T + exp(lambda) I)^-1 X

Tan et al. 2024, "Massive Editing for Large Language Models via Meta Learning", section 4. x and g are the inputs and
the gradients at the tokens that predict the new answers. The update is the one that comes nearest to the changes v_t
that a step along each token's own transformed gradient makes. So tokens that contradict each other do not cancel, as
they do in a sum of gradients. The network, the rates eta and the ridges exp(lambda) of the maps are trained on many
edits of many requests ([training](training.md)).

Papers and code differ from each other and from this file:

- Their loss is a mean over the answer tokens of a mini-batch of 32 requests. So a gradient depends on how many requests
  share it, and a single edit is of another scale than those in training. Here `mini_batch` is 1, and each request has
  the loss of its own answer.
- They solve d_in equations in float32, and never have a graph through the solution. Here the system has as many
  equations as there are tokens, or as inputs if these are fewer, in float64; the gradients are the same.
- Their normaliser also counts the tokens of the edits that it is tested on. Here an edit leaves it as it was trained.
  It multiplies the unbiased variance of a mini-batch by its size, which makes the spread too large; here it is exact.
- Their training loss is a sum over mini-batches of means. Here it is one mean over all answer tokens of the edit.
- They edit the last six layers of GPT-J, and their file has turns of 512 requests of zsRE.
- `lr`, `edit_lr`, `cloc` and `grad_clip` are their `meta_lr`, `lr`, `loc_coef` and `max_grad_norm`; `edit_bs` is their
  `n_edits`. Rates and ridges are trained with `lr`, too.

Legend: x_t (d_in,) input of a map at token t; g_t (d_out,) gradient of the loss at its output; X (t, d_in); V (t,
d_out); W (d_out, d_in); eta, lambda a number per map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.editors.core.config import check_positive
from errata.editors.core.dtypes import working_dtype
from errata.editors.core.errors import ConfigError
from errata.editors.core.families.gradient_editor import GradientEditor, GradientEditorConfig
from errata.editors.core.families.hypernetwork import RidgeHypernetwork
from errata.editors.core.forward.gradient_factors import Factors, gradient_factors
from errata.editors.core.ledger.patch import LowRank, Update, compacted
from errata.editors.core.request import EditRequest
from errata.editors.core.solve.solvers import ridge_rows


@dataclass(frozen=True, kw_only=True)
class MALMENConfig(GradientEditorConfig):
    """MALMEN's fields. Defaults are those of the authors' files, besides `mini_batch`."""

    n_blocks: int = 2
    """Number of layers of the network."""

    mini_batch: int = 1
    """Requests whose loss is one mean over all their answer tokens. The authors' file for zsRE has 32."""

    lr: float = 1e-5
    """Learning rate of Adam in training."""

    edit_lr: float = 1e-6
    """Initial value of the rates eta."""

    accumulate_bs: int = 1
    """Number of edits that a training step averages over."""

    edit_bs: int = 512
    """Number of requests per edit in training."""

    grad_clip: float = 1.0
    """Largest norm of a training step's gradient, which is scaled down to it."""

    cedit: float = 1.0
    """Weight of the new answers in the training loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("n_blocks", "mini_batch"))
        if self.edit_lr < 0:
            raise ConfigError(f"edit_lr: expected a rate above 0, got {self.edit_lr}; the update already has a minus")


class MALMEN(GradientEditor):
    """Massive language model editing network (Tan et al. 2024)."""

    name = "malmen"
    Config = MALMENConfig
    config: MALMENConfig
    network: RidgeHypernetwork
    structural = ("layers", "projections", "n_blocks", "rank", "combine", "mini_batch")

    def default_layers(self) -> tuple[int, ...]:
        """Return the last six, as in the authors' file for GPT-J, but at most half of the layers."""
        count = self.architecture.n_layers
        return tuple(range(count - max(1, min(6, count // 2)), count))

    def default_projections(self) -> tuple[str, ...]:
        """Return the down projection, as in the authors' file for GPT-J."""
        return (self.architecture.down_path.rpartition(".")[-1],)

    def build(self, generator: torch.Generator) -> RidgeHypernetwork:
        return RidgeHypernetwork(
            [(linear_map.shape[1], linear_map.shape[0]) for linear_map in self.maps],
            n_hidden=self.config.n_blocks - 1,
            rank=self.config.rank,
            combine=self.config.combine,
            edit_lr=self.config.edit_lr,
            dtype=working_dtype(self.architecture.dtype),
            generator=generator,
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.network.parameters()), "lr": self.config.lr}]

    def factors(self, edits: Sequence[Sequence[EditRequest]]) -> tuple[list[Factors], list[list[float]]]:
        """Return the inputs and gradients at the answer tokens of several edits, and the losses by edit and request."""
        size = self.config.mini_batch
        batches = [edit[start : start + size] for edit in edits for start in range(0, len(edit), size)]
        owner = torch.tensor([e for e, edit in enumerate(edits) for _ in range(0, len(edit), size)])
        found, losses = gradient_factors(
            self.architecture,
            self.modules,
            [[self.row(request) for request in batch] for batch in batches],
            pad=self.pad,
            batch_tokens=self._batch_tokens,
            answers_only=True,
        )
        flat = iter([loss for batch in losses for loss in batch])
        by_edit = [Factors(f.x, f.delta, owner.to(f.owner.device)[f.owner]) for f in found]
        return by_edit, [[next(flat) for _ in edit] for edit in edits]

    def transform(self, factors: Sequence[Factors]) -> list[tuple[Tensor, Tensor]]:
        """Return (X X^T + exp(lambda) I)^-1 X (t, d_in) and V (t, d_out) of each weight, edit by edit."""
        device, found = self.architecture.device, []
        for i, f in enumerate(factors):
            x, g, owner = f.x.to(device), f.delta.to(device), f.owner.to(device)
            rated, new_g = self.network(i, x, g)  # eta x~, g~
            V = -(x.to(rated.dtype) * rated).sum(dim=1, keepdim=True) * new_g
            ridge = self.network.log_ridges[i].double().exp()
            rows = [ridge_rows(part.double(), ridge) for part in x.split(owner.bincount().tolist())]
            found.append((torch.cat(rows).to(V.dtype), V))
        return found

    def update(self, factors: LowRank) -> Update:
        return compacted(factors)
