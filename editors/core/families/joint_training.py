"""Training of several problems together: rows in forward passes that they share, and one Adam for all.

The loss of a row is the mean cross-entropy of its answer, or what an objective of canonical examples makes of it and of
the row of another answer.

Shapes: k problems (edits), b rows of a piece, L longest row, m tokens read, d_in and d_out of a module.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from errata.editors.core.config import EditorConfig, check_least, check_positive
from errata.editors.core.errors import ConfigError, NumericalError
from errata.editors.core.families.trainables import Trainable, TrainingRow, answer_losses
from errata.editors.core.forward.upper_blocks import UpperBlocks
from errata.editors.core.forward.whole_rows import WholeForward, rows_from_block
from errata.editors.core.ledger.interrupts import safe_point
from errata.editors.core.model.architecture import Architecture
from errata.editors.core.model.batching import PROMPT_PADDING, pack_batches
from errata.editors.core.model.own_forward import hooked
from errata.editors.core.progress import Progress

Objective = Literal["good", "bad", "good-v-bad", "balance"]
"""The losses of canonical examples (Hewitt et al. 2024, section 3)."""
PAIRED: tuple[Objective, ...] = ("good-v-bad", "balance")
NON_NEGATIVE: tuple[Objective, ...] = ("good", "balance")


@dataclass(frozen=True, kw_only=True)
class TuningConfig(EditorConfig):
    """Fields of every fine-tuning method, named as in the authors' files (kmeng01/rome and zjunlp/EasyEdit)."""

    ADDED = MappingProxyType({"objective": "good", "accumulate": "all"})

    layers: tuple[int, ...] | None = None
    """Layers to train, counted from 0; null: the method's rule."""

    num_steps: int = 25
    """Passes over the requests of an edit."""

    lr: float | None = 5e-4
    """Learning rate of Adam; null: the rule of what is trained."""

    weight_decay: float = 0.0
    """Weight decay of Adam: this times the trained parameters is added to their gradient."""

    kl_factor: float = 0.0
    """Only 0 is accepted. The authors' files have this field, but their code never reads it."""

    batch_size: int = 128
    """Requests of one edit that share a gradient step."""

    stop_loss: float = 1e-2
    """A batch whose loss is below this takes no step. Training ends once the mean loss of a pass is below it. 1e-2 is a
    constant of the authors' code."""

    batch_tokens: int = 16384
    """Largest number of tokens in one forward pass; lower it if memory is short."""

    objective: Objective = "good"
    """What is minimised, with CE the mean cross-entropy of an answer's tokens. good: CE of the new answer; bad: -CE, so
    that the answer becomes unlikely; good-v-bad: CE of the new answer less that of the true one; balance: the absolute
    value of this difference."""

    accumulate: Literal["all", "last"] = "all"
    """all: a step takes the mean gradient of its `batch_size` requests; last: it takes the last request's alone, as in
    the published loop for canonical examples, which clears the gradients at every request."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("num_steps", "lr", "batch_size", "batch_tokens"))
        check_least(self, {"weight_decay": 0, "stop_loss": 0})
        if self.objective not in NON_NEGATIVE and self.lr is None and not getattr(self, "as_published", False):
            raise ConfigError(
                f"objective={self.objective}: its loss falls below 0, where no rate follows from it; give lr"
            )
        if self.kl_factor != 0:
            raise ConfigError(
                f"kl_factor: expected 0, got {self.kl_factor}; neither errata nor the authors' code uses this field"
            )


@dataclass(frozen=True)
class _Piece:
    """Rows that run together. `members` are (problem, index of the row in it, row); rows of a problem are adjacent.
    With `per` 2, a member's row is followed by that of its contrast."""

    upper: UpperBlocks | WholeForward
    members: tuple[tuple[int, int, TrainingRow], ...]
    per: int = 1

    @property
    def rows(self) -> list[TrainingRow]:
        """The rows, as they run."""
        return [run for _, _, row in self.members for run in row.runs]

    def select(self, active: Sequence[bool]) -> _Piece | None:
        """Return the rows of active problems, or None; return the piece itself if its rows cannot be split."""
        keep = [i for i, (problem, _, _) in enumerate(self.members) if active[problem]]
        if len(keep) in (0, len(self.members)):
            return self if keep else None
        part = self.upper.select([self.per * i + j for i in keep for j in range(self.per)])
        return _Piece(part, tuple(self.members[i] for i in keep), self.per) if part is not None else self

    def runs(self) -> list[tuple[int, slice]]:
        """Return each problem with the slice of its rows."""
        slices, start = [], 0
        for problem, group in groupby(problem for problem, _, _ in self.members):
            stop = start + self.per * len(list(group))
            slices.append((problem, slice(start, stop)))
            start = stop
        return slices


class Training:
    """Training of k problems together.

    Args:
        architecture: The model.
        modules: The modules that the trainables change, by name.
        problems: The rows of each problem.
        trainables: What is trained for each problem.
        config: Steps, learning rate and batches.
        shuffle_seed: Seed of the order of each problem's rows, which every pass shuffles further; None: they keep
            their order.
        steps: Passes, if not those of the configuration.

    Attributes:
        losses: losses[problem][row][pass].
        reaches: What each trainable's `follow` is given; None: the reach of its first step, once it is taken.
    """

    def __init__(
        self,
        architecture: Architecture,
        modules: Mapping[str, nn.Module],
        problems: Sequence[Sequence[TrainingRow]],
        trainables: Sequence[Trainable],
        config: TuningConfig,
        *,
        shuffle_seed: int | None = None,
        steps: int | None = None,
    ) -> None:
        self.architecture, self.modules, self.problems, self.config = architecture, modules, problems, config
        self.trainables, self.steps = trainables, config.num_steps if steps is None else steps
        # One Adam for all: it counts the steps of each tensor by itself, and skips tensors without a gradient.
        groups = [{"params": t.parameters, "lr": t.rate or config.lr or 0.0} for t in trainables]
        rates = {group["lr"] for group in groups}
        # One rate for all, which a single group takes faster.
        if len(rates) == 1 and not any(trainable.relative for trainable in trainables):
            groups = [{"params": [p for t in trainables for p in t.parameters], "lr": groups[0]["lr"]}]
        self.optimizer = torch.optim.Adam(groups, weight_decay=config.weight_decay)
        # A loss that is not bounded below has no end to come close to.
        self._stop_loss = config.stop_loss if config.objective in NON_NEGATIVE else -math.inf
        self.reaches: list[float | None] = [None] * len(problems)
        self._followed = [not trainable.relative for trainable in trainables]
        self.losses: list[list[list[float]]] = [[[] for _ in rows] for rows in problems]
        self._last_pass = [[0] * len(rows) for rows in problems]  # with `accumulate` last not every pass has every row
        self.active = [True] * len(problems)
        self._orders = [list(range(len(rows))) for rows in problems]
        self._draws = None if shuffle_seed is None else [random.Random(shuffle_seed) for _ in problems]

    def run(self, first: int, pad: int, progress: Progress) -> None:
        """Train all problems.

        Args:
            first: The lowest layer that changes.
            pad: Id to pad with.
            progress: Called before each pass.

        Raises:
            NumericalError: A loss is NaN or inf; it names the request and the pass.
        """
        # Batches that are shuffled are prepared one by one, so that memory holds one of them.
        kept = [] if self._draws else [self._pieces(members, first, pad) for members in self._batches()]
        for step in range(1, self.steps + 1):
            progress(step, self.steps, f"training on {sum(map(len, self.problems))} requests")
            for batch in kept or self._shuffled(first, pad):
                safe_point()
                self._step(batch, step)
            active = [on and self._mean_of_pass(i, step) >= self._stop_loss for i, on in enumerate(self.active)]
            if active != self.active:
                self.active = active
                kept = [[part for piece in batch if (part := piece.select(active))] for batch in kept]
            if not any(active):
                break

    def _shuffled(self, first: int, pad: int) -> Iterator[list[_Piece]]:
        """Shuffle the rows of every active problem, and yield the batches of one pass."""
        assert self._draws is not None
        for order, draws, active in zip(self._orders, self._draws, self.active, strict=True):
            if active:
                draws.shuffle(order)
        for members in self._batches():
            yield self._pieces(members, first, pad)

    def _batches(self) -> Iterator[list[tuple[int, int, TrainingRow]]]:
        """Yield the rows of each gradient step: the next `batch_size` rows of every active problem."""
        size = self.config.batch_size
        for start in range(0, max(map(len, self.problems)), size):
            members = [
                (i, index, self.problems[i][index])
                for i, order in enumerate(self._orders)
                if self.active[i]
                for index in order[start : start + size][0 if self.config.accumulate == "all" else -1 :]
            ]
            if members:
                yield members

    def _pieces(self, members: list[tuple[int, int, TrainingRow]], first: int, pad: int) -> list[_Piece]:
        """Split a batch into pieces of similar length that fit into memory."""
        per = 1 if members[0][2].contrast is None else 2
        lengths = [per * max(len(run.ids) - run.start for run in row.runs) for _, _, row in members]
        groups = pack_batches(lengths, batch_tokens=self.config.batch_tokens, max_padding=PROMPT_PADDING)
        pieces = []
        for group in groups:
            chosen = tuple(members[i] for i in sorted(group))
            runs = [run for _, _, row in chosen for run in row.runs]
            rows, starts = [run.ids for run in runs], [run.start for run in runs]
            upper = rows_from_block(self.architecture, rows, first=first, pad=pad, starts=starts)
            pieces.append(_Piece(upper, chosen, per))
        return pieces

    def _step(self, batch: Sequence[_Piece], step: int) -> None:
        """Take one step of every active problem on the mean loss of its rows in the batch."""
        members = [member for piece in batch for member in piece.members]
        count = [sum(problem == i for problem, _, _ in members) for i in range(len(self.problems))]
        row_losses = []
        with torch.enable_grad():
            for piece in batch:
                losses = self._row_losses(piece)  # (b,)
                share = [1 / count[problem] for problem, _, _ in piece.members]
                (losses @ losses.new_tensor(share)).backward()
                row_losses.append(losses.detach())
        total = [0.0] * len(self.problems)
        # `tolist` is the step's only synchronisation with the device.
        for (i, index, row), loss in zip(members, torch.cat(row_losses).tolist() if row_losses else [], strict=True):
            if not self.active[i]:
                continue
            if not abs(loss) < float("inf"):
                raise NumericalError(
                    f"request {row.name}: the loss is {loss} at pass {step} of its training; lower lr, or load the "
                    "model in float32"
                )
            self.losses[i][index].append(loss)
            self._last_pass[i][index] = step
            total[i] += loss / count[i]
        steps = [
            on and n > 0 and loss >= self._stop_loss for on, n, loss in zip(self.active, count, total, strict=True)
        ]
        with torch.no_grad():
            for i, (trainable, taken) in enumerate(zip(self.trainables, steps, strict=True)):
                if taken:
                    trainable.before_step()
                    self._follow(i, total[i])
                else:
                    for parameter in trainable.parameters:
                        parameter.grad = None
            if any(steps):
                self.optimizer.step()
            for trainable, taken in zip(self.trainables, steps, strict=True):
                if taken:
                    trainable.project()
        self.optimizer.zero_grad()

    def _follow(self, problem: int, loss: float) -> None:
        """Let the rate of a problem follow its reach, at its first step."""
        if self._followed[problem]:
            return
        trainable = self.trainables[problem]
        if self.reaches[problem] is None:
            size = sum(float(p.grad.abs().sum()) for p in trainable.parameters if p.grad is not None)
            self.reaches[problem] = loss / size if size else 0.0
        trainable.follow(self.reaches[problem] or 0.0)
        if trainable.rate is not None:
            self.optimizer.param_groups[problem]["lr"] = trainable.rate
        self._followed[problem] = True

    def _row_losses(self, piece: _Piece) -> Tensor:
        """Return the loss of each member, (b,)."""
        with self._apply_trained(piece):
            hidden = piece.upper.run()  # (b, L, d), or (2 b, L, d) with contrasts
        losses = answer_losses(piece.upper, hidden, piece.rows)
        objective = self.config.objective
        if objective in PAIRED:
            difference = losses[0::2] - losses[1::2]
            return difference.abs() if objective == "balance" else difference
        return -losses if objective == "bad" else losses

    @contextmanager
    def _apply_trained(self, piece: _Piece) -> Iterator[None]:
        """Context manager inside which the modules return the trained outputs, each row those of its problem."""
        runs, lengths = piece.runs(), piece.upper.lengths

        def hook(name: str) -> Any:
            def change(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                # OPT flattens rows and positions into one dimension before its MLP.
                x, y = (tensor.reshape(len(lengths), -1, tensor.shape[-1]) for tensor in (args[0], output))
                parts = [self.trainables[i].output(name, x[at], y[at], lengths[at]) for i, at in runs]
                return torch.cat(parts).to(output.dtype).reshape(output.shape)

            return change

        before_edit_hooks = self.trainables[0].before_edit_hooks
        hooks = (m.register_forward_hook(hook(name), prepend=before_edit_hooks) for name, m in self.modules.items())
        with hooked(*hooks):
            yield

    def _mean_of_pass(self, problem: int, step: int) -> float:
        rows = zip(self.losses[problem], self._last_pass[problem], strict=True)
        found = [losses[-1] for losses, last in rows if last == step]
        return sum(found) / len(found)
