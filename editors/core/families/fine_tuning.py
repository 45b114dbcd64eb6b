"""Base classes of fine-tuning methods: gradient steps on parameters added to a model's modules, for some requests.

A method says what is trained (`Trainable`) and at which positions a request is predicted (`TrainingRow`). Training
never writes to the model. Hooks change the outputs of modules in each pass. A pass runs only the blocks from the lowest
changed module on (upper_blocks.py); the blocks below it run once.

Independent requests are trained together in the same forward passes and by one Adam, each with its own parameters. A
request that is done leaves the batch. The requests of one edit share parameters. They are trained in batches of
`batch_size` in the given order, one step per batch, as in the authors' code. A method may also shuffle them before
each pass.

Shapes: k problems (edits), b rows of a piece, L longest row, m tokens read, d_in and d_out of a module.
"""

from __future__ import annotations

import statistics
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from errata.editors.core.config import EditorConfig, check_layers
from errata.editors.core.edit import Solution
from errata.editors.core.editor import Editor
from errata.editors.core.errors import RequestError
from errata.editors.core.families.joint_training import PAIRED, Training, TuningConfig
from errata.editors.core.families.stepping_stones import Rewriter, rewritten
from errata.editors.core.families.trainables import Trainable, TrainingRow
from errata.editors.core.forward.whole_rows import blocks_chain
from errata.editors.core.model.architecture import Architecture
from errata.editors.core.model.batching import solve_with_halving
from errata.editors.core.model.reading import read_ids
from errata.editors.core.model.tokens import Tokenizer, pad_id
from errata.editors.core.progress import Progress, silent
from errata.editors.core.request import EditRequest

# Of how many requests of an edit the reach is measured.
REACHES = 8


def prompt_and_answer(
    architecture: Architecture, tokenizer: Tokenizer, request: EditRequest
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids of a request's prompt and of its answer.

    Raises:
        RequestError: The answer has no tokens, or both together are too long for the model.
    """
    try:
        ids, answer = read_ids(tokenizer, request.text, request.target, chat=request.chat, join=request.join)
    except RequestError as error:
        raise error.of(request.id) from error
    length = len(ids) + len(answer) - 1  # the last token of the answer is only predicted, never read
    architecture.check_length(length, f"{length} tokens with its answer", request.id)
    return tuple(ids), tuple(answer)


class Tuner(Editor):
    """Base class of the fine-tuning methods, which say what is trained, and where a request is read if not at its
    answer.

    Args:
        rewriter: Takes prompt and answer as one text, and returns the text to train on, which ends with the same answer
            (stepping_stones.py). None: the request as it is.
    """

    Config: ClassVar[type[TuningConfig]] = TuningConfig
    config: TuningConfig

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        config: EditorConfig | Mapping[str, Any] | None = None,
        *,
        rewriter: Rewriter | None = None,
        progress: Progress = silent,
    ) -> None:
        self.rewriter = rewriter
        super().__init__(model, tokenizer, config, progress=progress)

    def setup(self) -> None:
        layers = self.config.layers if self.config.layers is not None else self.default_layers()
        self.layers = check_layers(layers, self.architecture.n_layers)
        self.pad = pad_id(self.tokenizer)
        self.modules = self.trained_modules()
        blocks_chain(self.architecture)  # the trial runs now, not in the first edit

    @abstractmethod
    def default_layers(self) -> Sequence[int]:
        """Return the layers to train if the configuration names none."""

    @abstractmethod
    def trained_modules(self) -> dict[str, nn.Module]:
        """Return the linear maps that training changes, by full name."""

    @abstractmethod
    def trainable(self) -> Trainable:
        """Return what is trained for one edit, with its initial values."""

    def row(self, request: EditRequest) -> TrainingRow:
        """Return the request as a row: each answer token is predicted after the prompt and the answer tokens before it.

        Subclasses may choose other positions.
        """
        ids, answer = self.tokens(request)
        return TrainingRow(
            str(request.id), (*ids, *answer[:-1]), tuple(range(len(ids) - 1, len(ids) + len(answer) - 1)), answer
        )

    def tokens(self, request: EditRequest) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ids of the prompt and of the answer. Errors are those of `prompt_and_answer`."""
        return prompt_and_answer(self.architecture, self.tokenizer, request)

    def shuffle_seed(self) -> int | None:
        """Return the seed by which the requests of an edit are shuffled before each pass; None: they keep their order.

        Subclasses may shuffle.
        """
        return None

    def solve(self, requests: Sequence[EditRequest]) -> list[Solution]:
        return self._tune([[request] for request in requests])

    def solve_batch(self, requests: Sequence[EditRequest]) -> Solution:
        (solution,) = self._tune([list(requests)])
        return solution

    def _tune(self, edits: Sequence[list[EditRequest]]) -> list[Solution]:
        """Train the edits together, or in halves if memory runs out."""

        def advice(edit: list[EditRequest]) -> str:
            return f"{self.name}: no memory to train on request {edit[0].id}; lower batch_tokens, or train fewer layers"

        return solve_with_halving([edits], self._train, advice)

    def _train(self, edits: Sequence[list[EditRequest]]) -> list[Solution]:
        started = time.perf_counter()
        texts = [[rewritten(request, self.rewriter) for request in edit] for edit in edits]
        problems = [[self._training_row(text) for text in edit] for edit in texts]
        trainables = [self.trainable() for _ in edits]
        training = Training(
            self.architecture, self.modules, problems, trainables, self.config, shuffle_seed=self.shuffle_seed()
        )
        training.reaches = [
            self._reach(rows) if t.relative else None for rows, t in zip(problems, trainables, strict=True)
        ]
        training.run(min(self.layers), self.pad, self.progress)
        seconds = (time.perf_counter() - started) / sum(map(len, edits))
        return [
            Solution(tuple(edit), trainable.patch(), tuple(self._reports(losses, seconds, trainable.report(), read)))
            for edit, read, trainable, losses in zip(edits, texts, training.trainables, training.losses, strict=True)
        ]

    def _training_row(self, request: EditRequest) -> TrainingRow:
        """Return the request as a row, with that of its true answer where the two are compared."""
        row = self.row(request)
        if self.config.objective not in PAIRED:
            return row
        if request.target_true is None:
            raise RequestError(
                f"objective={self.config.objective} compares the new answer with the true one, and there is none",
                record=request.id,
                field="target_true",
            )
        return replace(row, contrast=self.row(replace(request, target=request.target_true, target_true=None)))

    def _reach(self, rows: Sequence[TrainingRow]) -> float | None:
        """Return the median reach of an edit's first requests, each by itself; None for one, whose training finds it.

        The gradients of many requests cancel each other in their mean, whose reach would grow with their number.
        """
        found = []
        for row in rows[:REACHES] if len(rows) > 1 else ():
            trial = Training(self.architecture, self.modules, [[row]], [self.trainable()], self.config, steps=1)
            trial.run(min(self.layers), self.pad, silent)
            found += [reach for reach in trial.reaches if reach is not None]
        return statistics.median(found) if found else None

    def _reports(
        self, losses: list[list[float]], seconds: float, ruled: dict[str, Any], texts: Sequence[EditRequest]
    ) -> Iterator[dict[str, Any]]:
        size = self.patch_bytes()
        shared = {"layers": list(self.layers), "seconds": seconds, **({"filled_in": ruled} if ruled else {})}
        shared |= {} if size is None else {"patch_bytes": size}
        for per_pass, text in zip(losses, texts, strict=True):
            read = {} if self.rewriter is None else {"rewritten": text.prompt}
            yield {"steps": len(per_pass), "losses": per_pass, **shared, **read}
