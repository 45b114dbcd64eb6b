"""What a fine-tuning method trains for an edit (`Trainable`), and the rows that it is trained on (`TrainingRow`).

Shapes: b rows, L longest row, m tokens read, d_in and d_out of a module.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from errata.editors.core.dtypes import working_dtype
from errata.editors.core.forward.upper_blocks import UpperBlocks
from errata.editors.core.forward.whole_rows import WholeForward
from errata.editors.core.ledger.patch import Patch


@dataclass(frozen=True)
class TrainingRow:
    """One tokenised request: at position `columns[t]`, the model is trained to predict `answer[t]`.

    Training changes nothing before column `start`, so that only the row's end runs in each pass. `contrast` is the row
    of an answer that this one is compared with.
    """

    name: str
    ids: tuple[int, ...]
    columns: tuple[int, ...]
    answer: tuple[int, ...]
    start: int = 0
    contrast: TrainingRow | None = None

    @property
    def runs(self) -> tuple[TrainingRow, ...]:
        """The row and its contrast, if it has one."""
        return (self,) if self.contrast is None else (self, self.contrast)


def answer_losses(upper: UpperBlocks | WholeForward, hidden: Tensor, rows: Sequence[TrainingRow]) -> Tensor:
    """Return the mean of -log p over the answer tokens of each row, (b,).

    Args:
        upper: The rows, as they were run.
        hidden: (b, L, d) what `upper.run` has given.
        rows: Where each row is read, and the tokens there.
    """
    reads = [
        (b, column - (upper.starts[b] if upper.starts else 0), token)
        for b, row in enumerate(rows)
        for column, token in zip(row.columns, row.answer, strict=True)
    ]
    owner, column, token = torch.tensor(reads, device=hidden.device).T  # (m,) each
    # A product of another shape rounds differently, and Adam amplifies the difference. So a single row is read at
    # every position, as in the authors' code, which gives the same bits. For several rows this would need too much
    # memory, and only the positions of the answers are read.
    readout = upper.readout
    logits = readout(hidden)[owner, column] if len(rows) == 1 else readout(hidden[owner, column])  # (m, V)
    log_p = torch.log_softmax(logits, dim=-1, dtype=working_dtype(logits.dtype))
    owner, token = owner.to(log_p.device), token.to(log_p.device)  # the head may lie on another than the blocks
    share = log_p.new_tensor([1 / len(row.answer) for row in rows]).index_select(0, owner)
    return log_p.new_zeros(len(rows)).index_add(0, owner, -log_p.gather(1, token[:, None]).squeeze(1) * share)


class Trainable(ABC):
    """What is trained for one edit.

    Attributes:
        parameters: Leaf tensors with gradients, in the working dtype.
        before_edit_hooks: Whether the hooks of earlier edits act after `output`, as they act after a change of weights.
            Else `output` replaces what they return.
        rate: Learning rate; None: that of the configuration.
        relative: Whether `follow` is to be called.
    """

    parameters: list[Tensor]
    before_edit_hooks: ClassVar[bool] = True
    rate: float | None = None
    relative: bool = False

    @abstractmethod
    def output(self, name: str, x: Tensor, y: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return the output of module `name` with the present parameters.

        Args:
            name: Name of the module.
            x: (b, L, d_in) the module's input.
            y: (b, L, d_out) the module's output without these parameters.
            lengths: Number of tokens of each row; positions behind them are padding.
        """

    @abstractmethod
    def patch(self) -> Patch:
        """Return the trained parameters as a patch."""

    def before_step(self) -> None:  # noqa: B027 - most methods leave gradients as they are
        """Change the parameters' gradients, which the next step will use."""

    def follow(self, reach: float) -> None:  # noqa: B027 - most methods are given their rate
        """Set the rate and constraints that follow from the first gradient.

        Args:
            reach: How far every parameter would have to move down its gradient to bring a linear loss to 0: the loss
                over the sum of the gradient's absolute values, L / ||g||_1.
        """

    def report(self) -> dict[str, Any]:
        """Return what `follow` has set, by the names of the fields."""
        return {}

    def project(self) -> None:  # noqa: B027 - most methods have no constraint
        """Move the parameters back into their allowed range. This is called after every step, without gradients."""
