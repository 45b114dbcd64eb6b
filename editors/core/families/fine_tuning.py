"""What fine-tuning methods share: gradient steps on something laid over a model's modules, until requests are answered.

A method says what is trained (`Trainable`) and where each request is read (`TrainingRow`). The model is never written:
modules are changed by hooks while the part of the model above the lowest of them is run (upper_blocks.py); what is
below runs once.

Independent requests are trained side by side, each with its own parameters and its own Adam, through the same forward
passes; one that is done leaves the batch. Requests of one edit share parameters and go by in batches of `batch_size`,
a step each, in the order given, as in the originals.

Shapes: k problems (edits), b rows of a piece, L longest row, m tokens read, d_in and d_out of a module.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from errata.editors.core.config import EditorConfig, check_layers, check_least, check_positive
from errata.editors.core.dtypes import working_dtype
from errata.editors.core.edit import Solution
from errata.editors.core.editor import Editor
from errata.editors.core.errors import ConfigError, NumericalError, RequestError
from errata.editors.core.forward import upper_blocks
from errata.editors.core.ledger.interrupts import safe_point
from errata.editors.core.ledger.patch import Patch
from errata.editors.core.model.activations import hooked
from errata.editors.core.model.architecture import Architecture
from errata.editors.core.model.batching import PROMPT_PADDING, pack_batches, solve_with_halving
from errata.editors.core.model.reading import read_ids
from errata.editors.core.model.tokens import Tokenizer, pad_id
from errata.editors.core.progress import Progress
from errata.editors.core.request import EditRequest


@dataclass(frozen=True, kw_only=True)
class TuningConfig(EditorConfig):
    """Fields of every fine-tuning method, named as in the authors' files (kmeng01/rome and zjunlp/EasyEdit)."""

    layers: tuple[int, ...] | None = None
    """Layers to train, counted from 0; null: the method's own rule."""

    num_steps: int = 25
    """Passes over the requests of an edit."""

    lr: float = 5e-4
    """Learning rate of Adam."""

    weight_decay: float = 0.0
    """Of Adam: this times what is trained is added to its gradient."""

    kl_factor: float = 0.0
    """The authors' files have this field and their code never reads it; only 0 is accepted."""

    batch_size: int = 128
    """Requests of one edit that share a gradient step."""

    stop_loss: float = 1e-2
    """No step is taken on a batch whose loss is below this, and none at all once the mean over a pass is; 1e-2 is a
    constant of the authors' code."""

    batch_tokens: int = 16384
    """Bound on the tokens that are run at a time; lower it where memory is short."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("num_steps", "lr", "batch_size", "batch_tokens"))
        check_least(self, {"weight_decay": 0, "stop_loss": 0})
        if self.kl_factor != 0:
            raise ConfigError(
                f"kl_factor: nothing reads it, here and in the authors' code; expected 0, got {self.kl_factor}"
            )


def prompt_and_answer(
    architecture: Architecture, tokenizer: Tokenizer, request: EditRequest
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids of a request's prompt and of its answer, of which the model reads all but the last.

    Raises:
        RequestError: the answer has no token of its own, or both together are too long for the model.
    """
    try:
        ids, answer = read_ids(tokenizer, request.text, request.target, chat=request.chat, join=request.join)
    except RequestError as error:
        raise error.of(request.id) from error
    length = len(ids) + len(answer) - 1
    architecture.check_length(length, f"{length} tokens with its answer", request.id)
    return tuple(ids), tuple(answer)


@dataclass(frozen=True)
class TrainingRow:
    """One tokenised request: read at `columns[t]`, the model shall say `answer[t]`."""

    name: str
    ids: tuple[int, ...]
    columns: tuple[int, ...]
    answer: tuple[int, ...]


class Trainable(ABC):
    """What is trained for one edit.

    Attributes:
        parameters: Leaves that ask for gradients, in the working dtype.
        beneath: Whether the hooks of edits that the model carries act on what is trained, as they do on weights; else
            it takes the place of what they give.
    """

    parameters: list[Tensor]
    beneath: ClassVar[bool] = True

    @abstractmethod
    def output(self, name: str, x: Tensor, y: Tensor, lengths: Sequence[int]) -> Tensor:
        """What module `name` gives as trained so far.

        Args:
            x: (b, L, d_in) its input.
            y: (b, L, d_out) its output in the untouched model.
            lengths: Tokens of each row; nothing looks at what is beyond.
        """

    @abstractmethod
    def patch(self) -> Patch:
        """What has been trained, as updates of the modules' weights."""

    def project(self) -> None:  # noqa: B027 - most may be anywhere
        """Called after every step, without gradients: put the parameters back where they are allowed to be."""


class Tuner(Editor):
    """Base class of the fine-tuning methods, which say what is trained, and where a request is read if not at its
    answer."""

    Config: ClassVar[type[TuningConfig]] = TuningConfig
    config: TuningConfig

    def setup(self) -> None:
        layers = self.config.layers if self.config.layers is not None else self.default_layers()
        self.layers = check_layers(layers, self.architecture.n_layers)
        self.pad = pad_id(self.tokenizer)
        self.modules = self.trained_modules()

    @abstractmethod
    def default_layers(self) -> Sequence[int]:
        """Layers to train where the configuration names none."""

    @abstractmethod
    def trained_modules(self) -> dict[str, nn.Module]:
        """The linear maps that are changed, by full name."""

    @abstractmethod
    def trainable(self) -> Trainable:
        """What is trained for one edit, before the first step."""

    def row(self, request: EditRequest) -> TrainingRow:
        """Where the request is read: each token of its answer at the place before it, behind the true ones so far."""
        ids, answer = self.tokens(request)
        return TrainingRow(
            str(request.id), (*ids, *answer[:-1]), tuple(range(len(ids) - 1, len(ids) + len(answer) - 1)), answer
        )

    def tokens(self, request: EditRequest) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of the prompt and of the answer; errors as `prompt_and_answer`."""
        return prompt_and_answer(self.architecture, self.tokenizer, request)

    def solve(self, requests: Sequence[EditRequest]) -> list[Solution]:
        return self._tuned([[request] for request in requests])

    def solve_batch(self, requests: Sequence[EditRequest]) -> Solution:
        (solution,) = self._tuned([list(requests)])
        return solution

    def _tuned(self, edits: Sequence[list[EditRequest]]) -> list[Solution]:
        def advice(edit: list[EditRequest]) -> str:
            return f"{self.name}: no memory to train on request {edit[0].id}; lower batch_tokens, or train fewer layers"

        return solve_with_halving([edits], self._trained, advice)

    def _trained(self, edits: Sequence[list[EditRequest]]) -> list[Solution]:
        started = time.perf_counter()
        problems = [[self.row(request) for request in edit] for edit in edits]
        training = Training(self.architecture, self.modules, problems, [self.trainable() for _ in edits], self.config)
        training.run(min(self.layers), self.pad, self.progress)
        seconds = (time.perf_counter() - started) / sum(map(len, edits))
        return [
            Solution(tuple(edit), trainable.patch(), tuple(self._reports(losses, seconds)))
            for edit, trainable, losses in zip(edits, training.trainables, training.losses, strict=True)
        ]

    def _reports(self, losses: list[list[float]], seconds: float) -> Iterator[dict[str, Any]]:
        for mine in losses:
            yield {"steps": len(mine), "losses": mine, "layers": list(self.layers), "seconds": seconds}


@dataclass(frozen=True)
class _Piece:
    """Rows that run together. `members` are (problem, place of the row in it, row), rows of one problem adjacent."""

    upper: upper_blocks.UpperBlocks
    members: tuple[tuple[int, int, TrainingRow], ...]

    def select(self, active: Sequence[bool]) -> _Piece | None:
        """Only the rows whose problem is active; the piece itself where its rows cannot be split."""
        keep = [i for i, (problem, _, _) in enumerate(self.members) if active[problem]]
        if len(keep) in (0, len(self.members)):
            return self if keep else None
        part = self.upper.select(keep)
        return _Piece(part, tuple(self.members[i] for i in keep)) if part is not None else self

    def runs(self) -> list[tuple[int, slice]]:
        """Which rows belong to which problem."""
        found, start = [], 0
        for problem, group in groupby(problem for problem, _, _ in self.members):
            stop = start + len(list(group))
            found.append((problem, slice(start, stop)))
            start = stop
        return found


class Training:
    """k problems trained side by side.

    Args:
        modules: What the trainables change, by name.
        problems: The rows of each.
        trainables: What is trained for each.

    Attributes:
        losses: Of each problem, of each of its rows, the loss at each pass.
    """

    def __init__(
        self,
        architecture: Architecture,
        modules: Mapping[str, nn.Module],
        problems: Sequence[Sequence[TrainingRow]],
        trainables: Sequence[Trainable],
        config: TuningConfig,
    ) -> None:
        self.architecture, self.modules, self.problems, self.config = architecture, modules, problems, config
        self.trainables = trainables
        self.optimizers = [
            torch.optim.Adam(t.parameters, config.lr, weight_decay=config.weight_decay) for t in trainables
        ]
        self.losses: list[list[list[float]]] = [[[] for _ in rows] for rows in problems]
        self.active = [True] * len(problems)

    def run(self, first: int, pad: int, progress: Progress) -> None:
        """Train.

        Args:
            first: The lowest layer that changes.
            pad: Id to pad with.

        Raises:
            NumericalError: a loss is NaN or inf; names the request and the pass.
        """
        batches = [self._pieces(members, first, pad) for members in self._batches()]
        steps = self.config.num_steps
        for step in range(1, steps + 1):
            progress(step, steps, f"training on {sum(map(len, self.problems))} requests")
            for batch in batches:
                safe_point()
                self._step(batch, step)
            still = [on and self._mean_of_pass(i) >= self.config.stop_loss for i, on in enumerate(self.active)]
            if still != self.active:
                self.active = still
                batches = [[part for piece in batch if (part := piece.select(still))] for batch in batches]
            if not any(still):
                break

    def _batches(self) -> Iterator[list[tuple[int, int, TrainingRow]]]:
        """What shares a gradient step: of each problem, its next `batch_size` rows."""
        size = self.config.batch_size
        for start in range(0, max(map(len, self.problems)), size):
            yield [
                (i, place, row)
                for i, rows in enumerate(self.problems)
                for place, row in enumerate(rows[start : start + size], start)
            ]

    def _pieces(self, members: list[tuple[int, int, TrainingRow]], first: int, pad: int) -> list[_Piece]:
        lengths = [len(row.ids) for _, _, row in members]
        groups = pack_batches(lengths, batch_tokens=self.config.batch_tokens, max_padding=PROMPT_PADDING)
        pieces = []
        for group in groups:
            chosen = tuple(members[i] for i in sorted(group))
            rows = [row.ids for _, _, row in chosen]
            pieces.append(
                _Piece(upper_blocks.prepare_upper_blocks(self.architecture, rows, first=first, pad=pad), chosen)
            )
        return pieces

    def _step(self, batch: Sequence[_Piece], step: int) -> None:
        """One step of every active problem on the mean loss of its rows in the batch. One synchronisation."""
        members = [member for piece in batch for member in piece.members]
        count = [sum(problem == i for problem, _, _ in members) for i in range(len(self.problems))]
        found = []
        with torch.enable_grad():
            for piece in batch:
                losses = self._row_losses(piece)  # (b,)
                share = [1 / count[problem] for problem, _, _ in piece.members]
                (losses @ losses.new_tensor(share)).backward()
                found.append(losses.detach())
        total = [0.0] * len(self.problems)
        for (i, place, row), loss in zip(members, torch.cat(found).tolist() if found else [], strict=True):
            if not self.active[i]:
                continue
            if not abs(loss) < float("inf"):
                raise NumericalError(
                    f"request {row.name}: the loss is {loss} at pass {step} of its training; lower lr, or load the "
                    "model in float32"
                )
            self.losses[i][place].append(loss)
            total[i] += loss / count[i]
        for i, (trainable, optimizer) in enumerate(zip(self.trainables, self.optimizers, strict=True)):
            if self.active[i] and count[i] and total[i] >= self.config.stop_loss:
                optimizer.step()
                with torch.no_grad():
                    trainable.project()
            optimizer.zero_grad()

    def _row_losses(self, piece: _Piece) -> Tensor:
        """Mean of -log p over the tokens of each row's answer, (b,)."""
        rows = [row for _, _, row in piece.members]
        with self._changed(piece):
            hidden = piece.upper.run()  # (b, L, d)
        reads = [
            (b, column, token)
            for b, row in enumerate(rows)
            for column, token in zip(row.columns, row.answer, strict=True)
        ]
        owner, column, token = torch.tensor(reads, device=hidden.device).T  # (m,) each
        # A product of another shape rounds otherwise, and Adam makes much of it. One row is read at every position, as
        # the methods' authors do, and repeats their very bits; of several only what is asked fits into memory.
        readout = self.architecture.readout
        logits = readout(hidden)[owner, column] if len(rows) == 1 else readout(hidden[owner, column])  # (m, V)
        log_p = torch.log_softmax(logits, dim=-1, dtype=working_dtype(logits.dtype))
        owner, token = owner.to(log_p.device), token.to(log_p.device)  # the head may lie on another than the blocks
        share = log_p.new_tensor([1 / len(row.answer) for row in rows]).index_select(0, owner)
        return log_p.new_zeros(len(rows)).index_add(0, owner, -log_p.gather(1, token[:, None]).squeeze(1) * share)

    @contextmanager
    def _changed(self, piece: _Piece) -> Iterator[None]:
        """The modules as trained so far, each row through what is trained for its own problem."""
        runs, lengths = piece.runs(), piece.upper.lengths

        def hook(name: str) -> Any:
            def change(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                # OPT flattens rows and positions into one dimension before its MLP.
                x, y = (tensor.reshape(len(lengths), -1, tensor.shape[-1]) for tensor in (args[0], output))
                parts = [self.trainables[i].output(name, x[at], y[at], lengths[at]) for i, at in runs]
                return torch.cat(parts).to(output.dtype).reshape(output.shape)

            return change

        beneath = self.trainables[0].beneath
        hooks = (m.register_forward_hook(hook(name), prepend=beneath) for name, m in self.modules.items())
        with hooked(*hooks):
            yield

    def _mean_of_pass(self, problem: int) -> float:
        rows = self.losses[problem]
        return sum(losses[-1] for losses in rows) / len(rows)
