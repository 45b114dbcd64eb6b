"""WISE: edits in a side copy of one MLP's down projection, and a router that sends rows to it (Wang et al. 2024).

    minimise  -1/T sum_t log p(o_t | context, prompt, o_1 ... o_t-1)  +  margins    over W' at the elements of a mask
    margins = [d_out - d_in + gamma]+ + [d_out - alpha]+ + [beta - d_in]+
    d = mean over tokens of || act(W' x) - act(W x) ||

("WISE: Rethinking the Knowledge Memory for Lifelong Model Editing of Large Language Models", NeurIPS 2024.) d_in is the
distance on the rows of the edit, d_out on an unrelated text; a margin is the mean of its positive values. Plain
gradient descent, one request after another, each on the copy as the last one left it. Shards, merges and routing:
core/side_memory/shards.py. The weights of the model stay as they are.

An edit can be undone in any order: the ledger has each edit's change at the mask, and the copies are the sums of the
edits that are left, in their order. Later edits were trained on a copy that had the undone one in it, and are not
trained again. A record takes 4 bytes per element of the mask and one bit per element of the map: 42 MB for a map of
11008 x 4096. `patch_bytes` of the report says how much it was.

Paper, code (EasyEdit) and this file differ:

- The code divides the first loss by T + 1, decays elements outside of the mask too, and takes the routing threshold
  from before the last step. A side copy that was not chosen still keeps out less distant memories. `as_released`
  repeats all four, and keeps a full matrix per edit. By default none of them happens.
- The code pads rows on the left and counts the padding in every distance. There is no padding here.
- One decision by `.item()` stands for a whole batch there. Here every row has its own.
- The unrelated text is the dataset's locality prompt there, which an edit in use does not have. Here it is a sentence
  of the model's text. With `contrast=subject`, d_in is that of the subject's tokens and d_out that of all others.
- The code draws each element of the mask by itself, so that its share is `mask_ratio` on average only; so does this
  file. A second shard has a mask of its own.
- Generation with a cache routes each new token by itself, as in the code. A prompt that is routed to the side copy may
  be continued by the model's own map.

- The code's least distance of an edit is the mean over its contexts. Here it is that of the prompt if this is less,
  so that one edit alone is always found by its own prompt.

Rate, bound and margins are lengths of the authors' models, and `meant_for` converts them. With u and v how many times
as long outputs and inputs are here, distances are divided by u, the bound is multiplied by u / v, and the rate by (u /
v)^2. That is gradient descent on the same loss in the other model's units. Where a norm stands between the MLP and the
hidden state, no copy before it moves the hidden state farther (see memoir.py). There D x, with D = W' - W, is added to
the norm's output (`added_at`), and lengths are converted from the bundled model's.

`distance` and `threshold` of the report say whether the edited prompt itself is routed to the copy: it is if the first
is not below the second.

Legend: o_t (T of them) tokens of the answer; x (d_in,) input of the map; W, W' (d_out, d_in); act the model's
activation.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from errata.editors.core.config import check_least, check_positive
from errata.editors.core.dtypes import working_dtype
from errata.editors.core.edit import Solution
from errata.editors.core.errors import ConfigError, DatasetError, LedgerError, NumericalError
from errata.editors.core.families.trainables import TrainingRow
from errata.editors.core.families.warm_up import first_sentences
from errata.editors.core.ledger.interrupts import safe_point
from errata.editors.core.ledger.patch import Patch
from errata.editors.core.model.model_settings import read_model_settings
from errata.editors.core.model.parts import text_config
from errata.editors.core.model.reading import as_read
from errata.editors.core.model.texts import FACTBOOK
from errata.editors.core.model.tokens import locate_subject
from errata.editors.core.request import EditRequest
from errata.editors.core.side_memory.shards import ShardPart, ShardRule, Shards, ShardUpdate, activated
from errata.editors.core.side_memory.side_editor import SideConfig, SideEditor, SideRows, check_loss, median_lengths
from errata.editors.core.side_memory.sparse_change import SparseChange

SENTENCES = 100  # of the model's text, from which the unrelated one is drawn
# Training ends where the loss is at most CLOSE and has changed by at most STILL: constants of the authors' code.
CLOSE, STILL = 2e-2, 1e-4
# Median lengths of the map's inputs and outputs in the last layer of the bundled model, where the authors' numbers
# were found to work, over the tokens of MEASURED sentences of its text.
LENGTHS, MEASURED = (10.3, 32.5), 20


@dataclass(frozen=True, kw_only=True)
class WISEConfig(SideConfig):
    """WISE's fields, named as in the authors' files. Defaults are theirs for Llama 2 7B."""

    TEXTS = ("unrelated_text",)
    ADDED = MappingProxyType({"meant_for": None})

    weight_decay: float = 1e-5
    """Weight decay of gradient descent, a constant of the authors' code."""

    mask_ratio: float = 0.2
    """Share of the map's elements that the edits of a shard may change."""

    alpha: float = 5.0
    """Distance above which an unrelated text costs."""

    beta: float = 20.0
    """Distance below which an edited row costs."""

    gamma: float = 10.0
    """How much farther an edited row must be than an unrelated text."""

    act_ratio: float = 0.88
    """A row is routed to a copy if it is at least as distant as this share of the least distant edit of the copy."""

    norm_constraint: float | None = 1.0
    """Largest change of any element of the map; null: no bound."""

    meant_for: tuple[float, float] | None = None
    """Median lengths of the map's inputs and outputs where `edit_lr`, `norm_constraint`, `alpha`, `beta` and `gamma`
    were chosen. They are converted to those of the model's own text. null: the bundled model's lengths where D x is
    added to a norm's output, and else nothing is converted."""

    save_freq: int = 500
    """Edits of a shard."""

    merge_freq: int = 1000
    """Edits whose shards are merged into one, a multiple of `save_freq`."""

    densities: float = 0.53
    """Share of a shard's elements that a merge keeps."""

    retrieve: bool = True
    """Whether a row may be routed to every memory (WISE-Retrieve), or all are merged into one (WISE-Merge)."""

    contrast: Literal["text", "subject"] = "text"
    """What edited rows are kept apart from: an unrelated text, or the tokens beside the subject."""

    unrelated_text: str | None = None
    """Text whose sentences are the unrelated ones: a file, "name:config:split" of the Hub, or "factbook"; null: the
    text in the model's folder, else "factbook"."""

    as_released: bool = False
    """Whether to repeat what the authors' code does beyond the paper; see the top of this file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("act_ratio", "norm_constraint", "save_freq", "merge_freq"))
        if self.meant_for is not None and not min(self.meant_for) > 0:
            raise ConfigError(f"meant_for: expected two lengths above 0, got {list(self.meant_for)}")
        check_least(self, dict.fromkeys(("weight_decay", "alpha", "beta", "gamma"), 0))
        for name, share in (("mask_ratio", self.mask_ratio), ("densities", self.densities)):
            if not 0 < share <= 1:
                raise ConfigError(f"{name}: expected a share above 0, at most 1, got {share}")
        if self.merge_freq % self.save_freq:
            raise ConfigError(f"merge_freq: expected a multiple of save_freq={self.save_freq}, got {self.merge_freq}")


class WISE(SideEditor):
    """Editing in a side memory with a router (Wang et al. 2024)."""

    name = "wise"
    writes_weights = False
    Config = WISEConfig
    config: WISEConfig
    # Qwen2.5 7B; Llama 2 7B and Mistral 7B.
    layer_of: ClassVar[Mapping[int, int]] = MappingProxyType({28: 23, 32: 27})
    depth: ClassVar[float] = 27 / 32

    def setup(self) -> None:
        super().setup()
        found = self.architecture.map_at(self.layer)
        if self.config.weight_decay and self.reads is None:
            self.architecture.check_writable([found])
        self.rule = ShardRule(
            self.config.save_freq,
            self.config.merge_freq,
            self.config.retrieve,
            self.config.densities,
            self.config.act_ratio,
            _activation_of(text_config(self.model)),
            side_bars=self.config.as_released,
        )
        self._sentences: list[str] | None = None
        self._units: tuple[float, float] | None = None

    @property
    def added_at(self) -> str | None:
        """The field of the configuration; the authors' code knows no norm."""
        return "module" if self.config.as_released and self.config.added_at is None else self.config.added_at

    @property
    def units(self) -> tuple[float, float]:
        """How many times as long the map's inputs and the site's outputs are here as where the settings were chosen."""
        given = self.config.meant_for or (LENGTHS if self.reads is not None else None)
        if given is None:
            return 1.0, 1.0
        if self._units is None:
            x, y = median_lengths(self, self.sentences[:MEASURED])
            if not (x > 0 and y > 0):
                raise NumericalError(
                    f"layer {self.layer}: expected inputs and outputs of a median length above 0, got {x:g} and {y:g}; "
                    "name another layer"
                )
            self._units = (x / given[0], y / given[1])
        return self._units

    def solve_one(self, request: EditRequest) -> Solution:
        started = time.perf_counter()
        shards = self.memory()
        opened = shards.open_shard if shards is not None else None
        number = opened.number if opened else shards.next_number if shards is not None else 0
        held = shards.delta(opened) if shards is not None and opened is not None else None
        mask = opened.changes[-1].mask if opened is not None else None
        if mask is None:  # a new shard, or one of full matrices
            mask = self.draw_mask(number)
        copy = SideCopy(self, request, mask, held)
        copy.train()
        change = SparseChange.of(copy.change, None if self.config.as_released else copy.mask)
        update = ShardUpdate((ShardPart(number, 1, copy.min_act, change),), self.rule, self.reads)
        least = min(copy.min_act, opened.min_act) if opened is not None else copy.min_act
        report = {
            "steps": len(copy.losses),
            "losses": copy.losses,
            "layers": [self.layer],
            "shard": number,
            "distance": copy.prompt_distance(),
            "threshold": self.config.act_ratio * least,
            "patch_bytes": sum(tensor.nbytes for tensor in update.tensors.values()),
            "seconds": time.perf_counter() - started,
        }
        return Solution((request,), Patch({}, {self.module_name: update}), (report,))

    def memory(self) -> Shards | None:
        """Return what the ledger's edits have stored beside the map."""
        found = self.ledger.folded(self.module_name)
        if found is not None and not isinstance(found, Shards):
            raise LedgerError(f"{self.module_name} carries an adapter of another kind; undo it first")
        return None if found is None else found.to(self.architecture.map_at(self.layer).weight.device)

    def draw_mask(self, shard: int) -> Tensor:
        """Return which elements (d_out, d_in) the edits of a shard may change."""
        return torch.rand(*self.shape, generator=self.drawn("mask", shard)) < self.config.mask_ratio

    @property
    def sentences(self) -> list[str]:
        """The first sentences of the model's text, which unrelated ones are drawn from."""
        if self._sentences is None:
            source = self.config.unrelated_text or read_model_settings(self.model).text or FACTBOOK
            self._sentences = [" ".join(words) for words in first_sentences(source, SENTENCES)]
        return self._sentences

    def unrelated(self, request: EditRequest) -> str:
        """Return a sentence that has nothing to do with the request.

        Raises:
            DatasetError: There is none.
        """
        subject = request.subject or request.text
        fitting = [sentence for sentence in self.sentences if subject not in sentence]
        if not fitting:
            raise DatasetError(f"unrelated_text has no sentence without {subject!r}")
        draw = self.drawn(request.text, request.target.strip())
        return fitting[int(torch.randint(len(fitting), (1,), generator=draw))]

    def training_rows(self, request: EditRequest) -> list[TrainingRow]:
        """Return the answered prompt in each context, then the unrelated text."""
        rows = [self.answered_row(request, prefix) for prefix in self.prefixes]
        return [*rows, self.plain_row(self.unrelated(request))]

    def subject_columns(self, request: EditRequest) -> list[Sequence[int]]:
        """Return the columns of the subject's tokens in each context.

        Raises:
            RequestError: The request has no subject, or no token holds it.
        """
        columns = []
        for prefix in self.prefixes:
            read = as_read(self.tokenizer, prefix + request.text, chat=request.chat)
            start, end = (at + read.start + len(prefix) for at in request.subject_span)
            found = locate_subject(self.tokenizer, read.text, (start, end))
            columns.append(range(found.first, found.last + 1))
        return columns


class SideCopy:
    """The side copy of one request in training.

    Args:
        editor: The configuration and the map.
        request: What the copy learns.
        mask: (d_out, d_in) the elements that may change.
        held: (d_out, d_in) what the shard's earlier edits have changed; None: nothing.

    Attributes:
        copy: (d_out, d_in) W', which is trained.
        losses: The loss of each step.
        min_act: Mean distance of the edited rows at the end.
    """

    def __init__(self, editor: WISE, request: EditRequest, mask: Tensor, held: Tensor | None) -> None:
        self.editor, self.config, self.request = editor, editor.config, request
        self.rows = SideRows(editor, editor.training_rows(request))
        self.count = len(self.rows.read)
        weight = editor.architecture.map_at(editor.layer).weight
        self.weight = weight.detach().to(working_dtype(weight.dtype))
        if editor.reads is not None:  # behind the norm there is no map yet
            self.weight = torch.zeros_like(self.weight)
        given, found = editor.units
        self.length, self.gain = found, found / given
        self.mask = mask.to(weight.device)
        self.held = torch.zeros_like(self.weight) if held is None else held.to(self.weight)
        self.copy = (self.weight + self.held).requires_grad_()
        self.own = activated(self.rows.base, editor.rule.activation)
        self.subject: Tensor | None = None
        if self.config.contrast == "subject":
            self.subject = torch.zeros_like(self.rows.real[: self.count])
            for row, columns in zip(self.subject, editor.subject_columns(request), strict=True):
                row[list(columns)] = 1
        self.losses: list[float] = []
        self.min_act = 0.0

    def train(self) -> None:
        """Take the steps.

        Raises:
            NumericalError: A loss is NaN or inf.
        """
        for step in range(1, self.config.n_iter + 1):
            safe_point()
            with torch.enable_grad():
                loss, distances = self._loss()
                (slope,) = torch.autograd.grad(loss, self.copy)
            self.min_act = float(self.rows.row_means(distances)[: self.count].mean())
            last = self.losses[-2:]
            if len(last) == 2 and last[1] <= CLOSE and abs(last[1] - last[0]) <= STILL:
                break
            check_loss(self.request, float(loss.detach()), step)
            self.losses.append(float(loss.detach()))
            with torch.no_grad():
                self._step(slope)
        if not self.config.as_released:
            means = self.rows.row_means(self._distances())[: self.count]
            self.min_act = min(float(means.mean()), float(means[0]), self.prompt_distance())

    @property
    def change(self) -> Tensor:
        """What this request changes, (d_out, d_in)."""
        return self.copy.detach() - self.weight - self.held

    def prompt_distance(self) -> float:
        """Return the distance of the prompt without its answer."""
        end = self.rows.read[0].columns[0] + 1
        return float(self._distances()[0, :end].mean())

    def _loss(self) -> tuple[Tensor, Tensor]:
        kept: list[Tensor] = []

        def changed(x: Tensor, base: Tensor) -> Tensor:
            kept.append(self.output(x, base))
            return kept[-1]

        nll = self.rows.run(changed)  # (b,)
        if self.config.as_released:
            counts = nll.new_tensor([len(row.answer) for row in self.rows.read])
            nll = nll * counts / (counts + 1)
        distances = (activated(kept[-1], self.editor.rule.activation) - self.own).norm(dim=-1)  # (b, L)
        margins = self.margins(distances)
        return nll.mean() + margins.to(nll.device), distances.detach()

    def margins(self, distances: Tensor) -> Tensor:
        """Return what the distances (b, L) of tokens cost."""
        config, distances = self.config, distances / self.length
        edited = distances[: self.count]
        if self.subject is None:
            means = self.rows.row_means(distances)
            inside, outside = means[: self.count], means[self.count :]
        else:
            beside = self.rows.real[: self.count] - self.subject
            inside, outside = ((edited * share).sum(1) / share.sum(1) for share in (self.subject, beside))
        # As in the authors' code, every distance outside meets every distance inside.
        return (
            _positive_mean(outside[:, None] - inside + config.gamma)
            + _positive_mean(outside - config.alpha)
            + _positive_mean(config.beta - inside)
        )

    def output(self, x: Tensor, base: Tensor) -> Tensor:
        """Return the copy's output (..., d_out), from the map's input and output."""
        return base + linear(x, (self.copy - self.weight).to(x.dtype))

    def _distances(self) -> Tensor:
        y = self.output(self.rows.x, self.rows.base).detach()
        return (activated(y, self.editor.rule.activation) - self.own).norm(dim=-1)

    def _step(self, slope: Tensor) -> None:
        slope, decay = slope * self.gain**2, self.config.weight_decay * self.copy
        if self.config.as_released:
            self.copy -= self.config.edit_lr * (slope * self.mask + decay)
        else:
            self.copy -= self.config.edit_lr * (slope + decay) * self.mask
        if self.config.norm_constraint is not None:
            bound = self.config.norm_constraint * self.gain
            self.copy.clamp_(self.weight - bound, self.weight + bound)


def _positive_mean(values: Tensor) -> Tensor:
    """Return the mean of the positive values, 0 if there are none."""
    positive = values > 0
    return torch.where(positive, values, 0).sum() / positive.sum().clamp_min(1)


def _activation_of(config: object) -> str:
    """Return the name of a model's activation; "linear" if its configuration names none."""
    names = ("hidden_act", "activation_function", "hidden_activation", "hidden_activation_fn")
    found = (getattr(config, name, None) for name in names)
    return next((name for name in found if isinstance(name, str)), "linear")
