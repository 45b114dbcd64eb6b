"""RLEdit: MALMEN's network, trained on sequences of edits that stay on the model.

    L_i = sum_k decay^k (cedit * L_e(i - k) + cloc * L_loc(i - k)),    k = 0 ... back_depth - 1

Li et al. 2025, "Reinforced Lifelong Editing for Language Models". A training step is a sequence of `accumulate_bs`
turns of `edit_bs` requests each. Turn i is an edit of MALMEN's form on the model that the turns before have left, and
stays on it. Its loss also asks for the answers of the last turns, and for what these should have left alone, so that
the network learns to edit a model that has been edited. The gradients of all turns are added, and Adam takes one step
at the end of the sequence. Editing is that of MALMEN (malmen.py, with its legend and its differences): one turn per
edit, and earlier edits stay.

L_e and L_loc are as in MALMEN; the reference of L_loc is the model before turn i, with the earlier turns.

Papers and code differ from each other and from this file:

- The paper's loss has a penalty on the norm of the update. In their code it is a constant for the network, and has no
  effect; it is left out.
- Their gradient of L_loc passes through the weights without the turn, since the code takes the update back before its
  backward pass. Here it passes through the edited weights.
- They clip the sum of the gradients to a norm of 1 after each turn, and so does this file.
- They train for one sequence of 400 turns, so that Adam takes a single step. Here the number of sequences is that of
  the schedule ([training](training.md)).
- They edit gate and up projections, in layers 22 to 30 of Llama 3 8B. Without a preset this file takes MALMEN's rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from errata.editors.core.config import check_least, check_positive
from errata.editors.core.errors import ConfigError
from errata.editors.core.families.learned_editor import TrainingExample
from errata.editors.core.forward.functional_edit import Updates
from errata.editors.core.ledger.entry import EditInfo
from errata.editors.core.ledger.patch import LowRank, Patch
from errata.editors.malmen import MALMEN, MALMENConfig


@dataclass(frozen=True, kw_only=True)
class RLEditConfig(MALMENConfig):
    """RLEdit's fields. Defaults are those of the authors' files, besides `mini_batch` and `accumulate_bs`."""

    n_blocks: int = 4
    """Number of layers of the network."""

    rank: int = 1024
    """Rank of the layers of the network, at most their width."""

    cloc: float = 0.6
    """Weight of the KL divergence on unrelated text in the training loss."""

    accumulate_bs: int = 20
    """Number of turns of a sequence, which is one training step. The authors have 400."""

    edit_bs: int = 100
    """Number of requests per turn in training."""

    time_decay: float = 0.95
    """What a turn's loss counts, relative to that of the turn behind it."""

    back_depth: int = 10
    """Number of last turns whose losses count."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("time_decay",))
        check_least(self, {"back_depth": 1})
        if self.time_decay > 1:
            raise ConfigError(f"time_decay: expected at most 1, got {self.time_decay}")


class RLEdit(MALMEN):
    """Reinforced lifelong editing: MALMEN trained on sequences (Li et al. 2025)."""

    name = "rledit"
    Config = RLEditConfig
    config: RLEditConfig

    def backward(self, edits: Sequence[Sequence[TrainingExample]], at_once: int) -> dict[str, float]:  # noqa: ARG002
        """Add the gradients of a sequence, whose turns are the edits, to those of the parameters.

        The passes of one turn are in memory at a time, whatever `at_once` says.
        """
        losses: dict[str, float] = {}
        with self.ledger.transaction():
            temporary: list[str] = []
            for i in range(len(edits)):
                window = edits[max(0, i + 1 - self.config.back_depth) : i + 1]
                updates, parts = self._turn(window)
                torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.grad_clip)
                for name, value in parts.items():
                    losses[name] = losses.get(name, 0.0) + value / len(edits)
                temporary.append(f"(in training: turn {i})")
                self.ledger.append(temporary[-1], self._patch(updates), EditInfo(self.name))
            self.ledger.remove_many(temporary)
        return losses

    def _turn(self, window: Sequence[Sequence[TrainingExample]]) -> tuple[list[Updates], dict[str, float]]:
        """Add the gradient of the last turn's loss, and return its updates and the parts of its own loss."""
        graph = self._updates([window[-1]])
        # Each earlier turn's loss has a backward pass of its own, down to the updates: memory holds one at a time.
        leaves = [Updates(each.U.detach().requires_grad_(), each.V.detach().requires_grad_()) for each in graph]
        own: dict[str, float] = {}
        for k, turn in enumerate(reversed(window)):
            loss, parts = self.losses_after(leaves, [turn])
            (loss * self.config.time_decay**k).backward()
            own = own or parts
        ends = [end for each in graph for end in (each.U, each.V)]
        torch.autograd.backward(ends, [leaf.grad for each in leaves for leaf in (each.U, each.V)])
        return leaves, own

    def _patch(self, updates: Sequence[Updates]) -> Patch:
        factors = [LowRank(each.U[0].detach(), each.V[0].detach()) for each in updates]
        return Patch({found.name: self.update(each) for found, each in zip(self.maps, factors, strict=True)})
