"""GRACE: edits kept in a codebook beside the model, of which no weight knows.

    v = argmin_v  -1/T sum_t log p(o_t | prompt, o_1 ... o_t-1)    with v in the place of a module's output

(Hartvigsen et al. 2023, "Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors", section 3.) The
key is the module's input at one token; where an input lies near a key, the module gives its value (rules and radii:
core/codebook/codebook.py). The ledger holds query, value and answer of every edit: undoing any of them leaves the
codebook that the others, replayed in order, give.

Which token is the key (`key_token`):

    last_prompt    the last of the prompt: the paper's, and EasyEdit's. The answer's first token is changed, too, so
                   that `generate` meets the edit.
    first_label    the first of the answer: the authors' code. It counts the tokens without a label; where padding and
                   end of text are one token, as in GPT-2, the text's end has none either, and it counts one too many.
                   The edit is met only once the model has said that token by itself. Good for repeating their numbers.

Which positions a key replaces (`replacement`): see core/codebook/position_rule.py. The authors' files replace what
stands before the key, which with theirs is the whole prompt; EasyEdit's the key's position alone. That is the default
here, as the only rule that gives the same whether a row is run at once or in pieces.

Which module: c_fc of GPT-2 in the authors' files, "up" here; down_proj and fc_out of Llama and GPT-J in EasyEdit's,
"down". Their other fields change nothing: no code reads dist_fn, val_reg and reg, and val_train="adv" with its num_pert
adds noise to all values but the first, which is the only one.

Which layer: one whose input has seen the context. Where attention and MLP stand side by side (GPT-NeoX, GPT-J, Phi),
the MLP of layer 0 reads the embeddings: a key there is a token, and is met wherever that token stands. Such a layer is
tried out, and named in a warning.

A cold value is drawn from a generator of the request's own, seeded by the configuration and by what is asked. In the
authors' code it is whatever the process's generator gives by then.

Legend: o_t (T of them) tokens of the answer; k (d,) key; v (d_v,) value; d, d_v widths of the module.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from errata.editors.core.codebook.codebook import Codebook, Correction, Expansion, Record
from errata.editors.core.codebook.position_rule import Replacement
from errata.editors.core.codebook.training_order import GraceQuestion, TrainingJob, order_jobs, plan_jobs
from errata.editors.core.config import EditorConfig, check_layers, check_positive
from errata.editors.core.dtypes import working_dtype
from errata.editors.core.edit import Solution, combine
from errata.editors.core.editor import Editor
from errata.editors.core.errors import ConfigError, LedgerError, RequestError
from errata.editors.core.families.fine_tuning import Trainable, Training, TrainingRow, TuningConfig, prompt_and_answer
from errata.editors.core.ledger.patch import Patch
from errata.editors.core.model.activations import run_until_captured, sees_context
from errata.editors.core.model.architecture import LinearMap
from errata.editors.core.model.batching import PROMPT_PADDING, pack_batches, solve_with_halving
from errata.editors.core.model.tokens import pad_id, right_padded
from errata.editors.core.request import EditRequest

logger = logging.getLogger(__name__)
# Layers of the originals' files, by the number of layers of their models: GPT-2 XL, GPT-J, Llama of 7B.
LAYER: Mapping[int, int] = MappingProxyType({48: 35, 28: 25, 32: 27})
# By how much of its length a query may differ between batches of different shapes, in the model's precision.
ROUNDING: Mapping[torch.dtype, float] = MappingProxyType(
    {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
)


@dataclass(frozen=True, kw_only=True)
class GRACEConfig(EditorConfig):
    """GRACE's fields, named as in the authors' files; defaults are theirs for GPT-2 XL, but for `replacement`."""

    layers: tuple[int, ...] | None = None
    """The layer to edit, a list of one, counted from 0; null: the originals' for models of their depth."""

    module: Literal["up", "down"] = "up"
    """Which projection of its MLP."""

    key_token: Literal["last_prompt", "first_label"] = "last_prompt"
    """The token whose input to the module is the key."""

    replacement: Replacement = "replace_last"
    """Which positions a key replaces where it is met."""

    eps: float = 1.0
    """Radius of a new key, in the unit of the module's input. What is near differs from model to model: measure it."""

    eps_expand: Expansion = "coverage"
    """How a key grows to take in a query with the same answer."""

    val_init: Literal["cold", "warm"] = "cold"
    """Where a value begins: cold, at random within [0, 1); warm, at what the module gives."""

    n_iter: int = 100
    """Steps of Adam."""

    edit_lr: float = 1.0
    """Learning rate of Adam."""

    batch_tokens: int = 16384
    """Bound on the tokens that are run at a time; lower it where memory is short."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("eps", "n_iter", "edit_lr", "batch_tokens"))


class GRACE(Editor):
    """General retrieval adaptors for continual editing (Hartvigsen et al. 2023)."""

    name = "grace"
    one_by_one = True
    Config = GRACEConfig
    config: GRACEConfig

    def setup(self) -> None:
        parts, count, up = self.architecture, self.architecture.n_layers, self.config.module == "up"
        layers = self.config.layers if self.config.layers is not None else (LAYER.get(count, round(count * 35 / 48)),)
        if len(check_layers(layers, count)) != 1:
            raise ConfigError(f"layers: expected one layer, got {list(layers)}; a codebook belongs to one module")
        self.layer = layers[0]
        found = parts.up(self.layer) if up else LinearMap(parts.weight_name(self.layer), parts.down(self.layer))
        self.module, self.module_name = found.module, found.name.removesuffix(".weight")
        self.width = len(found.weight)  # d_v
        if self.layer == 0 and not sees_context(parts, self.module):
            logger.warning(
                "layer 0 of this model: what %s is given depends on the token alone, not on those before it, so that "
                "an edit is met by every text with its last token; choose a higher layer",
                self.module_name,
            )
        self.pad = pad_id(self.tokenizer)

    def row(self, request: EditRequest) -> TrainingRow:
        """The prompt and its answer, and where each token of the answer is asked for."""
        prompt, answer = prompt_and_answer(self.architecture, self.tokenizer, request)
        read = answer if self.config.key_token == "first_label" else answer[:-1]
        columns = tuple(range(len(prompt) - 1, len(prompt) + len(answer) - 1))
        return TrainingRow(str(request.id), (*prompt, *read), columns, answer)

    def key_column(self, row: TrainingRow) -> int:
        """Where the key is read."""
        return row.columns[0] + (self.config.key_token == "first_label")

    def replaced(self, row: TrainingRow) -> range:
        """The columns that a value is trained in, those that `spread` replaces.

        Raises:
            RequestError: the answer depends on none of them.
        """
        at = self.key_column(row)
        starts_at_key, stops_before = (
            self.config.replacement == "replace_last",
            self.config.replacement == "replace_prompt",
        )
        columns = range(at if starts_at_key else 0, at if stops_before else at + 1)
        if not columns or columns[0] > row.columns[-1]:
            raise RequestError(
                f"no token of the answer depends on what {self.config.replacement} replaces where the key is "
                f"{self.config.key_token}",
                record=row.name,
            )
        return columns

    def solve(self, requests: Sequence[EditRequest]) -> list[Solution]:
        return self._solved(self._drafts(requests, sequential=False))

    def solve_batch(self, requests: Sequence[EditRequest]) -> Solution:
        """What the requests give one after another, those trained at once that need nothing of each other."""
        drafts = self._drafts(requests, sequential=True)
        solutions: dict[int, Solution] = {}
        for wave in order_jobs(drafts):
            solutions |= zip(wave, self._solved([drafts[place] for place in wave]), strict=True)
        return combine([solutions[place] for place in range(len(drafts))])

    def _drafts(self, requests: Sequence[EditRequest], *, sequential: bool) -> list[TrainingJob]:
        rows = [self.row(request) for request in requests]
        replaced = [self.replaced(row) for row in rows]
        given = zip(requests, rows, self._inputs(rows), replaced, strict=True)
        asked = [GraceQuestion(request, row, x, columns, self._blank(row, x)) for request, row, x, columns in given]
        return plan_jobs(self._book(asked[0].correction), asked, sequential=sequential)

    def _book(self, like: Correction) -> Codebook:
        """The module's codebook, or an empty one for such corrections, on their device."""
        book = self.ledger.folded(self.module_name)
        if book is None:
            return Codebook.empty(like)
        if not isinstance(book, Codebook):
            raise LedgerError(f"{self.module_name} carries an adapter of another kind; undo it first")
        return book.to(like.keys.device)

    @torch.no_grad()
    def _inputs(self, rows: Sequence[TrainingRow]) -> list[Tensor]:
        """(L, d) what the tokens of each row bring to the module."""
        found: dict[int, Tensor] = {}
        lengths = [len(row.ids) for row in rows]
        for places in pack_batches(lengths, batch_tokens=self.config.batch_tokens, max_padding=PROMPT_PADDING):
            batch = right_padded([rows[place].ids for place in places], self.pad).to(self.architecture.device)
            (x,) = run_until_captured(self.architecture, batch, [self.module])  # (b, L, d)
            found |= {place: x[i, : lengths[place]] for i, place in enumerate(places)}
        return [found[place] for place in range(len(rows))]

    def _blank(self, row: TrainingRow, x: Tensor) -> Correction:
        """The record of a request whose tokens bring x (L, d), its value not trained yet."""
        config, dtype = self.config, self.architecture.dtype
        key = x[self.key_column(row), None].to(working_dtype(dtype), copy=True)
        value = key.new_zeros(1, self.width)
        label, rounding = (row.answer,), ROUNDING[dtype]
        return Correction(key, value, label, config.eps, config.replacement, config.eps_expand, rounding)

    def _solved(self, drafts: list[TrainingJob]) -> list[Solution]:
        return solve_with_halving(
            [drafts], self._trained, lambda draft: f"request {draft.question.request.id}: no memory to train it"
        )

    def _trained(self, drafts: Sequence[TrainingJob]) -> list[Solution]:
        started = time.perf_counter()
        values = [Value(self, draft) for draft in drafts]
        settings = TuningConfig(
            num_steps=self.config.n_iter, lr=self.config.edit_lr, stop_loss=0.0, batch_tokens=self.config.batch_tokens
        )
        modules = {self.module_name: self.module}
        training = Training(self.architecture, modules, [[draft.question.row] for draft in drafts], values, settings)
        training.run(self.layer, self.pad, self.progress)
        seconds = (time.perf_counter() - started) / len(drafts)
        return [
            Solution((value.asked.request,), value.patch(), ({**value.report(), "losses": losses, "seconds": seconds},))
            for value, (losses,) in zip(values, training.losses, strict=True)
        ]

    def cold_start(self, request: EditRequest) -> Tensor:
        """(d_v,) a cold value of the request's own."""
        asked = json.dumps([self.config.seed, request.text, request.target.strip()])
        seed = int.from_bytes(hashlib.sha256(asked.encode("utf-8", "surrogatepass")).digest()[:8])
        drawn = torch.rand(self.width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return drawn.to(self.architecture.device, working_dtype(self.architecture.dtype))


class Value(Trainable):
    """The value of one request while it is trained, in the place of the module's output at some columns of its row.

    Args:
        editor: Says how a value begins.
        draft: The request, and what it finds of the codebook; the value is trained within its correction.
    """

    beneath = False

    def __init__(self, editor: GRACE, draft: TrainingJob) -> None:
        self.editor, self.draft, self.asked = editor, draft, draft.question
        self.columns = draft.question.columns
        self.value = draft.question.correction.values[0].detach().requires_grad_()
        self.parameters = [self.value]
        with torch.no_grad():
            self.value.copy_(self._start())
            self.elsewhere = torch.tensor(
                list(draft.other_columns), dtype=torch.int64, device=draft.question.x.device
            )  # (c,)
            given = [self._given(column, record) for column, record in draft.other_columns.items()]
            self.given = torch.stack(given) if given else self.value.new_empty(0, len(self.value))  # (c, d_v)

    def output(self, name: str, x: Tensor, y: Tensor, lengths: Sequence[int]) -> Tensor:  # noqa: ARG002
        y = y.index_copy(1, self.elsewhere, self.given[None].to(y)) if len(self.given) else y
        value = self.value.to(y.dtype).expand(1, len(self.columns), -1)
        return torch.cat([y[:, : self.columns.start], value, y[:, self.columns.stop :]], dim=1)

    def _start(self) -> Tensor:
        """(d_v,) where training begins: an older key's value, where that is to answer for this query, too."""
        if self.draft.origin is not None:
            correction, place = self.draft.origin
            return correction.values[place]
        if self.editor.config.val_init == "warm":
            return self._module(self.editor.key_column(self.asked.row))
        return self.editor.cold_start(self.asked.request)

    def _given(self, column: int, record: Record | None) -> Tensor:
        """(d_v,) the module's output at another column, as the codebook will give it."""
        return self._module(column) if record is None else record[0].values[record[1]]

    def _module(self, column: int) -> Tensor:
        """(d_v,) what the module itself gives, computed for the whole row: of one position alone it would round
        otherwise. Not called, or the codebook's hook would answer."""
        return self.editor.module.forward(self.asked.x[None])[0, column]

    def patch(self) -> Patch:
        """The correction that it makes of the codebook."""
        return Patch({}, {self.editor.module_name: self.asked.correction})

    def report(self) -> dict[str, Any]:
        """Diagnostics."""
        rule, _, distance = self.draft.decision
        return {
            "steps": self.editor.config.n_iter,
            "rule": rule,
            "nearest_key": distance if distance < float("inf") else None,
            "key_norm": float(self.asked.correction.keys.norm()),
            "update_norm": float(self.value.detach().norm()),
            "layer": self.editor.layer,
            "precision": str(self.editor.architecture.dtype).removeprefix("torch."),
        }
