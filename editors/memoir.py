"""MEMOIR: edits in one second weight beside a map, each in columns that the edited prompt chooses (Wang et al. 2025).

    minimise  -1/T sum_t log p(o_t | context, prompt, o_1 ... o_t-1)    over D,  with  y = W x + D (x * mask)

("MEMOIR: Lifelong Model Editing with Minimal Overwrite and Informed Retention for LLMs", NeurIPS 2025.) Plain gradient
descent with a bound on the norm of the gradient, one request after another, each on the D as the last one left it. The
mask is that of the bare prompt, whose key is read on the model without any edit of MEMOIR. Keys, masks and routing:
core/side_memory/key_masks.py.

The inputs x of the map do not change while D is trained. So a gradient is G^T (X * mask), and D is kept as factors: one
column per token of the training rows. No matrix of the map's size is made.

An edit can be undone in any order: the ledger has each edit's factors, key and mask. What is left is the sum of the
others in their order. Later edits were trained with the undone one in place, and are not trained again. A record takes
4 bytes per token of the training rows and per dimension of both sides of the map: 3 MB for 40 tokens and a map of 14336
x 4096. `patch_bytes` of the report says how much it was.

Where a norm stands between the MLP and the hidden state (Gemma 2 and 3, OLMo 2), it gives every output of the MLP about
the same length, so that no D before it moves the hidden state farther. In the last layer of the testbed's model of
Gemma 3's shape, 3 of 20 answers stayed less likely than not before the norm at any rate, and none behind it. There D x
is added to the norm's output (`added_at`), and the key is the same. Rate and bound count in units of ||y|| / ||x *
mask|| there, with y the norm's output at the end of the prompt.

No numbers of the authors' code stand beside this file. It differs from that code in three things:

- The authors' code knows where a prompt ends, and takes the key from the prompt alone, in generation too. A module does
  not know that. So the key is that of the row as it is seen: the prompt, and the answer where it is scored.
- With a cache, each generated token is a row of its own, and is routed by itself.
- Their defaults are 4096 of 14336 columns (Llama 3 8B); null takes the same share of the map's columns.

Legend: o_t (T of them) tokens of the answer; x (d_in,) input of the map; X (t, d_in) those of the training rows; G (t,
d_out) gradients at the map's output; W, D (d_out, d_in).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from errata.editors.core.config import check_positive
from errata.editors.core.dtypes import working_dtype
from errata.editors.core.edit import Solution
from errata.editors.core.errors import ConfigError, LedgerError
from errata.editors.core.families.warm_up import first_sentences
from errata.editors.core.ledger.interrupts import safe_point
from errata.editors.core.ledger.patch import LowRank, Patch
from errata.editors.core.model.activations import run_until_captured
from errata.editors.core.model.model_settings import read_model_settings
from errata.editors.core.model.texts import FACTBOOK
from errata.editors.core.model.tokens import prompt_ids, right_padded
from errata.editors.core.request import EditRequest
from errata.editors.core.side_memory.key_masks import KeyedMemory, KeyedUpdate, bits_of, key_of
from errata.editors.core.side_memory.side_editor import SideConfig, SideEditor, SideRows, check_loss

SENTENCES = 100  # of the background mean, as in the paper
# Training ends where the loss is at most CLOSE and has changed by at most STILL: constants of the authors' code.
CLOSE, STILL = 2e-2, 1e-4


@dataclass(frozen=True, kw_only=True)
class MEMOIRConfig(SideConfig):
    """MEMOIR's fields. Defaults are the authors' for Llama 3 8B."""

    TEXTS = ("background_text",)

    n_iter: int = 30
    """Steps per request."""

    clip: float | None = 1.0
    """Largest norm of a gradient; null: no bound."""

    top_k: int | None = None
    """Elements of a key, which are the columns that an edit uses; null: the authors' share of the map's columns."""

    threshold: float = 0.4
    """Least share of a key that a row must have in common with an edit."""

    background_text: str | None = None
    """Text of the background mean: a file, "name:config:split" of the Hub, or "factbook"; null: the text in the
    model's folder, else "factbook"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("clip", "top_k"))
        if not 0 < self.threshold <= 1:
            raise ConfigError(f"threshold: expected a share above 0, at most 1, got {self.threshold}")


class MEMOIR(SideEditor):
    """Editing in a second weight with masks as keys (Wang et al. 2025)."""

    name = "memoir"
    writes_weights = False
    Config = MEMOIRConfig
    config: MEMOIRConfig
    layer_of: ClassVar[Mapping[int, int]] = MappingProxyType({32: 27})  # Llama 3 8B
    depth: ClassVar[float] = 27 / 32

    def setup(self) -> None:
        super().setup()
        width = self.shape[1]
        self.top_k = self.config.top_k or max(1, round(width * 4096 / 14336))
        if self.top_k > width:
            raise ConfigError(f"top_k: expected at most the {width} columns of the map, got {self.top_k}")
        if self.config.top_k is None:
            self.filled_in = {"top_k": self.top_k}
        self._background: Tensor | None = None

    def solve_one(self, request: EditRequest) -> Solution:
        started = time.perf_counter()
        memory = self.memory()
        rows = SideRows(self, [self.answered_row(request, prefix) for prefix in self.prefixes])
        background = self.background().to(rows.x.device)
        prompt = rows.x[0, : rows.rows[0].columns[0] + 1].to(background.dtype)
        key = key_of(prompt.mean(0, keepdim=True), background, self.top_k)
        order = self.permutation().to(key.device)
        mask = torch.zeros_like(key).index_copy(1, order, key)
        residual = Residual(self, request, rows, mask, memory)
        residual.train()
        update = KeyedUpdate(
            residual.factors(),
            bits_of(key),
            bits_of(mask),
            background,
            self.top_k,
            self.config.threshold,
            self.reads,
        )
        report = {
            "steps": len(residual.losses),
            "losses": residual.losses,
            "layers": [self.layer],
            "update_norm": update.norm(),
            "patch_bytes": sum(tensor.nbytes for tensor in update.tensors.values()),
            "seconds": time.perf_counter() - started,
        }
        return Solution((request,), Patch({}, {self.module_name: update}), (report,))

    def memory(self) -> KeyedMemory | None:
        """Return what the ledger's edits have stored beside the map."""
        found = self.ledger.folded(self.module_name)
        if found is not None and not isinstance(found, KeyedMemory):
            raise LedgerError(f"{self.module_name} carries an adapter of another kind; undo it first")
        return found

    def permutation(self) -> Tensor:
        """Return the column that each element of a key stands for, (d_in,)."""
        return torch.randperm(self.shape[1], generator=self.drawn("columns"))

    @torch.no_grad()
    def background(self) -> Tensor:
        """Return the mean over texts of the map's mean input on the untouched model, (d_in,)."""
        if self._background is None:
            source = self.config.background_text or read_model_settings(self.model).text or FACTBOOK
            texts = [" ".join(words) for words in first_sentences(source, SENTENCES)]
            means = []
            with self.clock.one_off("background"), self.ledger.untouched():
                for text in texts:
                    safe_point()
                    batch = right_padded([prompt_ids(self.tokenizer, text)], self.pad).to(self.architecture.device)
                    (x,) = run_until_captured(self.architecture, batch, [self.module])
                    means.append(x[0].to(working_dtype(x.dtype)).mean(0))
            self._background = torch.stack(means).mean(0)
        return self._background


class Residual:
    """What one request adds to D, in training.

    Args:
        editor: The configuration and the map.
        request: What it learns.
        rows: The training rows.
        mask: (1, d_in) the columns that it uses.
        memory: What earlier edits have added.
    """

    def __init__(
        self, editor: MEMOIR, request: EditRequest, rows: SideRows, mask: Tensor, memory: KeyedMemory | None
    ) -> None:
        self.config, self.request, self.rows = editor.config, request, rows
        masked = rows.x * mask[:, None]
        self.real = rows.real.bool()
        dtype = working_dtype(rows.x.dtype)
        self.inputs = masked[self.real].to(dtype)  # (t, d_in)
        self.gram = self.inputs @ self.inputs.T  # (t, t)
        self.unit = 1.0 if editor.reads is None else _gain(rows, masked)
        self.held = rows.base.new_zeros(rows.base.shape, dtype=dtype)
        if memory is not None:
            self.held = memory.to(rows.x.device).change(masked).to(dtype)
        self.U = self.inputs.new_zeros(len(self.inputs), rows.base.shape[-1])  # (t, d_out)
        self.losses: list[float] = []

    def train(self) -> None:
        """Take the steps.

        Raises:
            NumericalError: A loss is NaN or inf.
        """
        for step in range(1, self.config.n_iter + 1):
            safe_point()
            last = self.losses[-2:]
            if len(last) == 2 and last[1] <= CLOSE and abs(last[1] - last[0]) <= STILL:
                break
            added = self.held.clone()
            added[self.real] += self.gram @ self.U
            added.requires_grad_()
            with torch.enable_grad():
                loss = self.rows.run(lambda _x, base, added=added: base + added.to(base.dtype)).mean()
                (slope,) = torch.autograd.grad(loss, added)
            check_loss(self.request, float(loss.detach()), step)
            self.losses.append(float(loss.detach()))
            self._step(slope[self.real])

    def _step(self, slope: Tensor) -> None:
        """Take a step along G^T X, given G (t, d_out)."""
        size = 1.0
        if self.config.clip is not None:
            norm = ((slope @ slope.T) * self.gram).sum().clamp_min(0).sqrt() * self.unit
            size = float(self.config.clip / norm.clamp_min(self.config.clip))
        self.U -= self.config.edit_lr * size * self.unit**2 * slope

    def factors(self) -> LowRank:
        """Return what was added to D."""
        return LowRank(self.U.T.contiguous(), self.inputs)


def _gain(rows: SideRows, masked: Tensor) -> float:
    """Return how long the site's output is beside the masked input (b, L, d_in), at the end of the bare prompt."""
    at = rows.rows[0].columns[0]
    given, found = float(masked[0, at].norm()), float(rows.base[0, at].norm())
    return found / given if given and found else 1.0
