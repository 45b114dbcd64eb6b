"""GRACE: a method that stores edits in a codebook beside a module, and changes no weights.

    v = argmin_v  -1/T sum_t log p(o_t | prompt, o_1 ... o_t-1)    with v in the place of a module's output

(Hartvigsen et al. 2023, "Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors", section 3.) The
key is the module's input at one token. If an input is near a key, the module returns the key's value (rules and radii:
core/codebook/codebook.py). The ledger holds key, value and answer of every edit. Undoing an edit leaves the codebook
that results from the other edits in their order.

Which token is the key (`key_token`):

    last_prompt    the last token of the prompt, as in the paper and in EasyEdit. The edit also changes the answer's
                   first token, so that it acts in `generate`.
    first_label    the first token of the answer, as in the authors' code. That code counts tokens without a label. If
                   padding and end of text are the same token, as in GPT-2, the end of the text has no label either, so
                   that the count is one too high. The edit acts only after the model has generated that token without
                   it. Use this to reproduce the authors' numbers.

Which positions a key replaces (`replacement`): see core/codebook/position_rule.py. The authors' files replace all
positions before the key, which with their key is the whole prompt. EasyEdit's files replace only the key's position.
This is the default here, as the only rule with the same result whether a row is run at once or in pieces.

Which module (`module`): the authors' files edit c_fc of GPT-2, which is "up" here. EasyEdit's edit down_proj of Llama
and fc_out of GPT-J, which is "down". Their other fields have no effect: no code reads dist_fn, val_reg and reg, and
val_train="adv" with its num_pert adds noise to all values except the first, which is the only one.

Where a norm stands between the MLP and the hidden state (Gemma 2 and 3, OLMo 2), it gives every output of the MLP about
the same length, so that no value before it moves the hidden state farther. On the testbed's model of Gemma 3's shape
that length is 13 beside a hidden state of 41 (layer 4). With a value of the up projection the answer stayed less likely
than not for 12 of 20 facts. There the value replaces the norm's output (`value_at`), and the key is the same as
elsewhere. The cold start and the rate are in units of the root mean square of what is replaced.

Which layer (`layers`): its input must depend on the context. If attention and MLP are parallel (GPT-NeoX, GPT-J, Phi),
the MLP of layer 0 reads the embeddings. A key there is a token, and the edit acts wherever this token is. errata tests
layer 0 for this, and warns.

A cold value is random, seeded by the configuration and the request. In the authors' code it depends on all numbers that
the process has drawn before.

Legend: o_t (T of them) tokens of the answer; k (d,) key; v (d_v,) value; d, d_v widths of the module.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from errata.editors.core.codebook.codebook import Codebook, Correction, Expansion, Record
from errata.editors.core.codebook.position_rule import Replacement
from errata.editors.core.codebook.training_order import GraceQuestion, TrainingJob, order_jobs, plan_jobs
from errata.editors.core.config import EditorConfig, check_layers, check_positive
from errata.editors.core.dtypes import working_dtype
from errata.editors.core.edit import Solution, combine
from errata.editors.core.editor import Editor
from errata.editors.core.errors import ConfigError, LedgerError, RequestError
from errata.editors.core.families.fine_tuning import prompt_and_answer
from errata.editors.core.families.joint_training import Training, TuningConfig
from errata.editors.core.families.trainables import Trainable, TrainingRow
from errata.editors.core.forward.norm_behind import norm_behind
from errata.editors.core.forward.whole_rows import can_run_ends
from errata.editors.core.ledger.patch import Patch
from errata.editors.core.model.activations import (
    StopForward,
    captured_inputs,
    run_base,
    run_until_captured,
    sees_context,
)
from errata.editors.core.model.batching import PROMPT_PADDING, pack_batches, solve_with_halving
from errata.editors.core.model.own_forward import hooked
from errata.editors.core.model.tokens import Batch, pad_id, right_padded
from errata.editors.core.request import EditRequest

logger = logging.getLogger(__name__)
# The layers in the authors' and EasyEdit's files, by their models' number of layers: GPT-2 XL, GPT-J, Llama 7B.
LAYER: Mapping[int, int] = MappingProxyType({48: 35, 28: 25, 32: 27})
# The authors' radius for GPT-2 XL.
PUBLISHED_RADIUS = 1.0
# The relative error of a query between batches of different shapes, by the model's precision.
ROUNDING: Mapping[torch.dtype, float] = MappingProxyType(
    {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
)


@dataclass(frozen=True, kw_only=True)
class GRACEConfig(EditorConfig):
    """GRACE's fields, named as in the authors' files. Defaults are theirs for GPT-2 XL, except `replacement` and the
    radius of null."""

    ADDED = MappingProxyType({"as_published": False, "eps_share": 0.25, "value_at": None})

    as_published: bool = False
    """Whether a radius of null is the authors' 1 for GPT-2 XL, and a `value_at` of null is "module"."""

    layers: tuple[int, ...] | None = None
    """The layer to edit as a list of one, counted from 0; null: the authors' for models of the same depth."""

    module: Literal["up", "down"] = "up"
    """Which projection of the layer's MLP to edit. Its input is the key."""

    value_at: Literal["module", "norm"] | None = None
    """What the value replaces: the output of that projection, or that of the norm between the MLP and the hidden
    state; null: the norm's where there is one, and else the projection's."""

    key_token: Literal["last_prompt", "first_label"] = "last_prompt"
    """The token whose input to the module is the key."""

    replacement: Replacement = "replace_last"
    """Which positions get the key's value if an input is near the key."""

    eps: float | None = None
    """Radius of a new key, in the unit of the module's input; null: `eps_share` times the norm of the key."""

    eps_share: float = 0.25
    """Radius of a new key as a share of its norm, if `eps` is null: by default that of the authors' 1 on keys of norm
    4. Larger ones reach more paraphrases and more neighbours: measure both."""

    eps_expand: Expansion = "coverage"
    """How a key's radius grows to include a query with the same answer."""

    val_init: Literal["cold", "warm"] = "cold"
    """Initial value: cold, random within [0, 1); warm, the output of the module."""

    n_iter: int = 100
    """Number of steps of Adam."""

    edit_lr: float = 1.0
    """Learning rate of Adam."""

    batch_tokens: int = 16384
    """Largest number of tokens in one forward pass; lower it if memory is short."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("eps", "eps_share", "n_iter", "edit_lr", "batch_tokens"))


class GRACE(Editor):
    """General retrieval adaptors for continual editing (Hartvigsen et al. 2023)."""

    name = "grace"
    writes_weights = False
    one_by_one = True
    Config = GRACEConfig
    config: GRACEConfig
    advice = MappingProxyType({"search": "give another layer, or more n_iter"})

    def setup(self) -> None:
        parts, count, up = self.architecture, self.architecture.n_layers, self.config.module == "up"
        chosen = (LAYER.get(count, min(count - 1, round(count * 35 / 48))),)
        layers = self.config.layers if self.config.layers is not None else chosen
        if len(check_layers(layers, count)) != 1:
            raise ConfigError(f"layers: expected one layer, got {list(layers)}; a codebook belongs to one module")
        self.layer = layers[0]
        found = parts.up(self.layer) if up else parts.map_at(self.layer)
        parts.check_trainable([found])
        self.module, self.module_name = found.module, found.name.removesuffix(".weight")
        self.width = found.shape[0]  # d_v
        self.site, self.reads = self.module, None
        if (norm := self._find_norm()) is not None:
            self.reads, (self.module_name, self.site), self.width = self.module_name, norm, parts.d_model
        if self.layer == 0 and not sees_context(parts, self.module):
            logger.warning(
                "layer 0 of this model: the input of %s depends only on the token, not on those before it, so that an "
                "edit acts in every text with its last token; choose a higher layer",
                self.module_name,
            )
        self.pad = pad_id(self.tokenizer)
        can_run_ends(parts, self.layer)  # the trial runs now, not in the first edit

    def _find_norm(self) -> tuple[str, nn.Module] | None:
        """Return the norm whose output the value replaces, with its name; None if it replaces the projection's.

        Raises:
            ConfigError: `value_at` asks for a norm, and there is none.
        """
        wanted = self.config.value_at
        if wanted == "module" or (wanted is None and self.config.as_published):
            return None
        norm = norm_behind(self.architecture, self.layer)
        if norm is None and wanted == "norm":
            raise ConfigError(
                f"value_at: expected a model with a norm between the MLP and the hidden state, got none in layer "
                f"{self.layer}; give value_at=module, or leave it out"
            )
        return norm

    def row(self, request: EditRequest) -> TrainingRow:
        """Return the prompt and its answer as a row, with the column at which each answer token is predicted."""
        prompt, answer = prompt_and_answer(self.architecture, self.tokenizer, request)
        # With `first_label` the key may be at the last token of the answer, which must then be in the row.
        read = answer if self.config.key_token == "first_label" else answer[:-1]
        columns = tuple(range(len(prompt) - 1, len(prompt) + len(answer) - 1))
        return TrainingRow(str(request.id), (*prompt, *read), columns, answer)

    def key_column(self, row: TrainingRow) -> int:
        """Return the column of the key."""
        return row.columns[0] + (self.config.key_token == "first_label")

    def replaced_columns(self, row: TrainingRow) -> range:
        """Return the columns whose output the value replaces in training, by the rule `replacement`.

        Raises:
            RequestError: The answer depends on none of them.
        """
        key = self.key_column(row)
        starts_at_key, stops_before = (
            self.config.replacement == "replace_last",
            self.config.replacement == "replace_prompt",
        )
        columns = range(key if starts_at_key else 0, key if stops_before else key + 1)
        if not columns or columns[0] > row.columns[-1]:
            raise RequestError(
                f"no token of the answer depends on what {self.config.replacement} replaces if the key is "
                f"{self.config.key_token}; choose another key_token or replacement",
                record=row.name,
            )
        return columns

    def solve(self, requests: Sequence[EditRequest]) -> list[Solution]:
        return self._train_or_halve(self._plan_jobs(requests, sequential=False))

    def solve_batch(self, requests: Sequence[EditRequest]) -> Solution:
        """Return one edit with the same result as the requests one after another.

        Requests that do not depend on each other are trained together.
        """
        jobs = self._plan_jobs(requests, sequential=True)
        solutions: dict[int, Solution] = {}
        for wave in order_jobs(jobs):
            solutions |= zip(wave, self._train_or_halve([jobs[index] for index in wave]), strict=True)
        return combine([solutions[index] for index in range(len(jobs))])

    def _plan_jobs(self, requests: Sequence[EditRequest], *, sequential: bool) -> list[TrainingJob]:
        rows = [self.row(request) for request in requests]
        columns = [self.replaced_columns(row) for row in rows]
        questions = [
            GraceQuestion(request, row, x, replaced, self._untrained_correction(row, x), y)
            for request, row, (x, y), replaced in zip(requests, rows, self._read_rows(rows), columns, strict=True)
        ]
        return plan_jobs(self._book(questions[0].correction), questions, sequential=sequential)

    def _book(self, like: Correction) -> Codebook:
        """Return the module's codebook on the device of `like`, or an empty one for corrections like it."""
        book = self.ledger.folded(self.module_name)
        if book is None:
            return Codebook.empty(like)
        if not isinstance(book, Codebook):
            raise LedgerError(f"{self.module_name} carries an adapter of another kind; undo it first")
        return book.to(like.keys.device)

    @torch.no_grad()
    def _read_rows(self, rows: Sequence[TrainingRow]) -> list[tuple[Tensor, Tensor | None]]:
        """Return the module's inputs at the tokens of each row, (L, d) per row, and beside them the outputs (L, d_v)
        of a norm that values replace, without what earlier edits make of them; None if they replace the module's."""
        found: dict[int, tuple[Tensor, Tensor | None]] = {}
        lengths = [len(row.ids) for row in rows]
        for indices in pack_batches(lengths, batch_tokens=self.config.batch_tokens, max_padding=PROMPT_PADDING):
            batch = right_padded([rows[index].ids for index in indices], self.pad).to(self.architecture.device)
            x, y = self._read_batch(batch)  # (b, L, d), (b, L, d_v)
            for i, index in enumerate(indices):
                found[index] = x[i, : lengths[index]], None if y is None else y[i, : lengths[index]]
        return [found[index] for index in range(len(rows))]

    def _read_batch(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        if self.reads is None:
            (x,) = run_until_captured(self.architecture, batch, [self.module])
            return x, None
        outputs: list[Tensor] = []

        def keep(_module: nn.Module, _args: Any, output: Tensor) -> None:
            outputs.append(output)
            raise StopForward

        # Before the codebook's hook, which would replace outputs near its keys.
        with (
            captured_inputs([self.module], stop=False) as seen,
            hooked(self.site.register_forward_hook(keep, prepend=True)),
            suppress(StopForward),
        ):
            run_base(self.architecture, batch)
        shape = (*batch.ids.shape, -1)
        return seen[0].reshape(shape), outputs[0].reshape(shape)

    def _untrained_correction(self, row: TrainingRow, x: Tensor) -> Correction:
        """Return the correction of a request with module inputs x (L, d), before its value is trained."""
        config, dtype = self.config, self.architecture.dtype
        key = x[self.key_column(row), None].to(working_dtype(dtype), copy=True)
        value = key.new_zeros(1, self.width)
        label, rounding = (row.answer,), ROUNDING[dtype]
        return Correction(
            key, value, label, self.radius(key), config.replacement, config.eps_expand, rounding, self.reads
        )

    def radius(self, key: Tensor) -> float:
        """Return the radius of a new key (1, d).

        Distances between inputs grow with the inputs, whose norm differs between models and layers. Behind the norm
        before an MLP it is nearly the same for all inputs of a layer: 12 and 11 on the testbed's models of GPT-2's and
        Gemma 3's shape, 4.2 on SmolLM2-135M-Instruct, and the median distance between two inputs of a text is 1.1 to
        1.3 times as much. The authors' 1 is a share of 0.24 there on SmolLM2.
        """
        if self.config.eps is not None:
            return self.config.eps
        return PUBLISHED_RADIUS if self.config.as_published else self.config.eps_share * float(key.norm())

    def _train_or_halve(self, jobs: list[TrainingJob]) -> list[Solution]:
        return solve_with_halving(
            [jobs], self._train, lambda job: f"request {job.question.request.id}: no memory to train it"
        )

    def _train(self, jobs: Sequence[TrainingJob]) -> list[Solution]:
        started = time.perf_counter()
        rows = [self._trained_row(job) for job in jobs]
        values = [Value(self, job, row.start) for job, row in zip(jobs, rows, strict=True)]
        settings = TuningConfig(
            num_steps=self.config.n_iter, lr=self.config.edit_lr, stop_loss=0.0, batch_tokens=self.config.batch_tokens
        )
        modules = {self.module_name: self.site}
        training = Training(self.architecture, modules, [[row] for row in rows], values, settings)
        training.run(self.layer, self.pad, self.progress)
        seconds = (time.perf_counter() - started) / len(jobs)
        return [
            Solution(
                (value.question.request,),
                value.patch(),
                ({**value.report(), **_training_report(losses), "seconds": seconds},),
            )
            for value, (losses,) in zip(values, training.losses, strict=True)
        ]

    def _trained_row(self, job: TrainingJob) -> TrainingRow:
        """Return the request's row, which runs from the first column on where training or the codebook changes it.

        A rule that reaches back to earlier positions of its row needs them all.
        """
        if self.config.replacement != "replace_last" or not can_run_ends(self.architecture, self.layer):
            return job.question.row
        row = job.question.row
        return replace(row, start=min(job.question.columns.start, row.columns[0], *job.other_columns))

    def cold_start(self, request: EditRequest) -> Tensor:
        """Return a random initial value (d_v,), seeded by the configuration and the request."""
        content = json.dumps([self.config.seed, request.text, request.target.strip()])
        seed = int.from_bytes(hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()[:8])
        value = torch.rand(self.width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return value.to(self.architecture.device, working_dtype(self.architecture.dtype))


def _training_report(losses: list[float]) -> dict[str, Any]:
    """Return the losses, with the last one as the sign of a search that failed (core/doubts.py)."""
    return {"losses": losses, "final": {"nll": losses[-1]}}


class Value(Trainable):
    """The value of one request in training. It replaces the module's output at some columns of the request's row.

    Args:
        editor: The editor, which determines the initial value.
        job: The request and its relation to the codebook. The value is trained inside the job's correction.
        start: The column at which the row begins to run.
    """

    before_edit_hooks = False

    def __init__(self, editor: GRACE, job: TrainingJob, start: int = 0) -> None:
        self.editor, self.job, self.question = editor, job, job.question
        self.unit = self._unit()
        self.rate = None if self.unit is None else editor.config.edit_lr * self.unit
        self.columns = range(job.question.columns.start - start, job.question.columns.stop - start)
        self.value = job.question.correction.values[0].detach().requires_grad_()
        self.parameters = [self.value]
        with torch.no_grad():
            self.value.copy_(self._start())
            self.elsewhere = torch.tensor(
                [column - start for column in job.other_columns], dtype=torch.int64, device=job.question.x.device
            )  # (c,)
            given = [self._other_output(column, record) for column, record in job.other_columns.items()]
            self.given = torch.stack(given) if given else self.value.new_empty(0, len(self.value))  # (c, d_v)

    def output(self, name: str, x: Tensor, y: Tensor, lengths: Sequence[int]) -> Tensor:  # noqa: ARG002
        y = y.index_copy(1, self.elsewhere, self.given[None].to(y)) if len(self.given) else y
        value = self.value.to(y.dtype).expand(1, len(self.columns), -1)
        return torch.cat([y[:, : self.columns.start], value, y[:, self.columns.stop :]], dim=1)

    def _start(self) -> Tensor:
        """Return the initial value (d_v,): that of an older key, if that key will also answer this query."""
        if self.job.origin is not None:
            correction, index = self.job.origin
            return correction.values[index]
        if self.editor.config.val_init == "warm":
            return self._module_output(self.editor.key_column(self.question.row))
        cold = self.editor.cold_start(self.question.request)
        return cold if self.unit is None else cold * self.unit

    def _unit(self) -> float | None:
        """Return the unit of a value behind a norm, the root mean square of what it replaces; None elsewhere."""
        if self.question.y is None:
            return None
        return float(self._module_output(self.editor.key_column(self.question.row)).square().mean().sqrt()) or 1.0

    def _other_output(self, column: int, record: Record | None) -> Tensor:
        """Return the output (d_v,) at another column of the row, as the codebook will replace it."""
        return self._module_output(column) if record is None else record[0].values[record[1]]

    def _module_output(self, column: int) -> Tensor:
        """Return the output (d_v,) of the module itself at a column."""
        if self.question.y is not None:
            return self.question.y[column]
        # For the whole row, since a single position would be rounded differently. `forward` and not a call of the
        # module, since a call would run the codebook's hook.
        return self.editor.module.forward(self.question.x[None])[0, column]

    def patch(self) -> Patch:
        """Return the correction of the codebook, with the trained value."""
        return Patch({}, {self.editor.module_name: self.question.correction})

    def report(self) -> dict[str, Any]:
        """Return diagnostics."""
        rule, _, distance = self.job.decision
        return {
            "steps": self.editor.config.n_iter,
            "rule": rule,
            "nearest_key": distance if distance < float("inf") else None,
            "key_norm": float(self.question.correction.keys.norm()),
            "update_norm": float(self.value.detach().norm()),
            "layer": self.editor.layer,
            **({} if self.editor.reads is None else {"value_at": "norm"}),
            **({"filled_in": {"eps": self.question.correction.eps}} if self.editor.config.eps is None else {}),
            "precision": str(self.editor.architecture.dtype).removeprefix("torch."),
        }
