"""The base class of methods that train a second weight beside one linear map: which map, which rows, and the pass.

    y = W x + D x    at the rows that are trained on, with D (d_out, d_in) the only thing that is trained

W is the map's weight as it stands. What earlier edits of the method add to the map is in D from the start, so that the
pass here replaces what they do.

Legend: b rows, L longest row; x (b, L, d_in) the map's input; y (b, L, d_out) its output.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from errata.editors.core.config import EditorConfig, check_layers, check_positive
from errata.editors.core.dtypes import working_dtype
from errata.editors.core.edit import Solution
from errata.editors.core.editor import Editor
from errata.editors.core.errors import ArchitectureError, ConfigError, NumericalError, RequestError
from errata.editors.core.families import context_templates as contexts
from errata.editors.core.families.trainables import TrainingRow, answer_losses
from errata.editors.core.forward.norm_behind import norm_behind
from errata.editors.core.forward.whole_rows import rows_from_block
from errata.editors.core.ledger.interrupts import safe_point
from errata.editors.core.model.activations import StopForward, captured_inputs, run_base
from errata.editors.core.model.architecture import Architecture
from errata.editors.core.model.own_forward import evaluating, hooked, trial_rows
from errata.editors.core.model.reading import read_ids
from errata.editors.core.model.tokens import pad_id, prompt_ids, right_padded
from errata.editors.core.request import EditRequest


@dataclass(frozen=True, kw_only=True)
class SideConfig(EditorConfig):
    """Fields of methods that train a second weight beside one linear map."""

    ADDED = MappingProxyType({"added_at": None})

    layers: tuple[int, ...] | None = None
    """The layer to edit as a list of one, counted from 0; null: the method's rule."""

    edit_lr: float = 1.0
    """Learning rate of gradient descent."""

    n_iter: int = 70
    """Steps per request."""

    context_templates: tuple[str, ...] | None = None
    """Contexts to put before the prompt. Each ends in `{}`, where the prompt goes, and the first is the bare `{}`.
    null: the model writes them itself, by `context_template_length_params`."""

    context_template_length_params: tuple[tuple[int, int], ...] = ((5, 5), (10, 5))
    """(length in tokens, how many) of the contexts that the model writes."""

    added_at: Literal["module", "norm"] | None = None
    """What D x is added to: the map's output, or that of the norm between the MLP and the hidden state; null: the
    norm's where there is one, and else the map's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("edit_lr", "n_iter"))
        if self.context_templates is not None:
            contexts.check_templates(self.context_templates)


class SideEditor(Editor):
    """Base class of the family, whose methods solve one request after another."""

    Config: ClassVar[type[SideConfig]] = SideConfig
    config: SideConfig
    # The authors' layer by the model's number of layers, and a share of the depth for other models.
    layer_of: ClassVar[Mapping[int, int]] = MappingProxyType({})
    depth: ClassVar[float] = 1.0

    def setup(self) -> None:
        parts, count = self.architecture, self.architecture.n_layers
        chosen = (self.layer_of.get(count, min(count - 1, round(count * self.depth))),)
        layers = self.config.layers if self.config.layers is not None else chosen
        if len(check_layers(layers, count)) != 1:
            raise ConfigError(f"layers: expected one layer, got {list(layers)}; the memory belongs to one module")
        self.layer = layers[0]
        found = parts.map_at(self.layer)
        parts.check_trainable([found])
        self.module, self.module_name, self.shape = found.module, found.name.removesuffix(".weight"), found.shape
        self.site: nn.Module = self.module  # whose output is changed
        self.reads: str | None = None  # the map's name, if that is not the map itself
        if (norm := self._find_norm()) is not None:
            self.reads, (self.module_name, self.site) = self.module_name, norm
        refuse_flat_rows(parts, self.layer, self.name)
        self.pad = pad_id(self.tokenizer)
        self._prefixes: tuple[str, ...] | None = None

    def _find_norm(self) -> tuple[str, nn.Module] | None:
        """Return the norm whose output is added to, with its name; None if it is the map's.

        Raises:
            ConfigError: `added_at` asks for a norm, and there is none.
        """
        if self.added_at == "module":
            return None
        norm = norm_behind(self.architecture, self.layer)
        if norm is None and self.added_at == "norm":
            raise ConfigError(
                f"added_at: expected a model with a norm between the MLP and the hidden state, got none in layer "
                f"{self.layer}; give added_at=module, or leave it out"
            )
        return norm

    @property
    def added_at(self) -> str | None:
        """The field of the configuration, unless the method knows better."""
        return self.config.added_at

    def solve(self, requests: Sequence[EditRequest]) -> list[Solution]:
        solutions = []
        for i, request in enumerate(requests):
            self.progress(i, len(requests), "training beside the map")
            solutions.append(self.solve_one(request))
        return solutions

    @abstractmethod
    def solve_one(self, request: EditRequest) -> Solution:
        """Solve one request on the model as it stands."""

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The texts before the prompt in each context, as the untouched model writes them; the first is ""."""
        if self._prefixes is None:
            self._prefixes = contexts.editor_prefixes(
                self, self.config.context_templates, self.config.context_template_length_params
            )
        return self._prefixes

    def answered_row(self, request: EditRequest, prefix: str = "") -> TrainingRow:
        """Return the prompt behind a context and its answer, whose tokens are predicted.

        Raises:
            RequestError: The answer has no tokens, or both together are too long for the model.
        """
        text = prefix + request.text
        try:
            ids, answer = read_ids(self.tokenizer, text, request.target, chat=request.chat, join=request.join)
        except RequestError as error:
            raise error.of(request.id) from error
        length = len(ids) + len(answer) - 1
        self.architecture.check_length(length, f"{length} tokens with its answer", request.id)
        columns = tuple(range(len(ids) - 1, length))
        return TrainingRow(str(request.id), (*ids, *answer[:-1]), columns, tuple(answer))

    def plain_row(self, text: str) -> TrainingRow:
        """Return a text as a row that is run and not read."""
        return TrainingRow("", tuple(prompt_ids(self.tokenizer, text)), (), ())

    def drawn(self, *content: object) -> torch.Generator:
        """Return a generator on the CPU, seeded by the configuration and by plain values that say what for."""
        text = json.dumps([self.config.seed, *content])
        seed = int.from_bytes(sha256(text.encode("utf-8", "surrogatepass")).digest()[:8])
        return torch.Generator().manual_seed(seed & (2**63 - 1))


class SideRows:
    """Rows that run again and again while what stands beside a map changes. They run once up to its block.

    Args:
        editor: What is edited.
        rows: The rows. Those without an answer come last.

    Attributes:
        x: (b, L, d_in) the map's input.
        base: (b, L, d_out) the output of the editor's site, by default the map, without any edit of the method.
        real: (b, L) 1 at tokens, 0 at padding.
    """

    def __init__(self, editor: SideEditor, rows: Sequence[TrainingRow]) -> None:
        self.module, self.site, self.rows = editor.module, editor.site, rows
        self.read = [row for row in rows if row.answer]
        self.upper = rows_from_block(editor.architecture, [row.ids for row in rows], first=editor.layer, pad=editor.pad)
        found: list[Tensor] = []
        with torch.no_grad():
            self.run(lambda x, base: found.extend((x, base)) or base)
        self.x, self.base = found
        columns = torch.arange(self.x.shape[1], device=self.x.device)
        lengths = torch.tensor([len(row.ids) for row in rows], device=self.x.device)
        self.real = (columns < lengths[:, None]).to(self.x.dtype)

    def run(self, output: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return the losses of the rows with an answer, (b,): the mean of -log p over its tokens.

        Args:
            output: Returns the site's output from the map's input x and from its output without any edit of the method.
        """
        given: list[Tensor] = []

        def keep(_module: nn.Module, args: tuple[Any, ...]) -> None:
            given[:] = [args[0]]

        def replaced(module: nn.Module, args: tuple[Any, ...], _output: Tensor) -> Tensor:
            return output(given[0], module.forward(args[0]))

        with hooked(self.module.register_forward_pre_hook(keep), self.site.register_forward_hook(replaced)):
            hidden = self.upper.run()
        return answer_losses(self.upper, hidden[: len(self.read)], self.read)

    def row_means(self, values: Tensor, where: Tensor | None = None) -> Tensor:
        """Return the mean of values (b, L) over the tokens of each row, or over those where `where` (b, L) is 1."""
        share = self.real if where is None else where
        return (values * share).sum(1) / share.sum(1)


@torch.no_grad()
def median_lengths(editor: SideEditor, texts: Sequence[str]) -> tuple[float, float]:
    """Return how long the map's inputs are and how long the outputs of the editor's site, on the untouched model.

    Both are medians over the tokens of all texts, so that a first token of great length does not count.
    """
    found: list[tuple[Tensor, Tensor]] = []

    def keep(_module: nn.Module, _args: Any, output: Tensor) -> None:
        found.append((seen[0], output))
        raise StopForward

    with editor.clock.one_off("lengths"), editor.ledger.untouched():
        for text in texts:
            safe_point()
            batch = right_padded([prompt_ids(editor.tokenizer, text)], editor.pad).to(editor.architecture.device)
            with (
                captured_inputs([editor.module], stop=False) as seen,
                hooked(editor.site.register_forward_hook(keep)),
                suppress(StopForward),
            ):
                run_base(editor.architecture, batch)
    x, y = (torch.cat([pair[i][0].to(working_dtype(pair[i].dtype)).norm(dim=-1) for pair in found]) for i in (0, 1))
    return float(x.median()), float(y.median())


def refuse_flat_rows(architecture: Architecture, layer: int, method: str) -> None:
    """Refuse a down projection that does not see which tokens belong to one row.

    Raises:
        ArchitectureError: It is given rows and tokens as one dimension.
    """
    if any(parameter.is_meta for parameter in architecture.base.parameters()):
        return
    ids = torch.tensor(trial_rows(architecture.model, 2), device=architecture.device)
    down = architecture.down(layer)
    with evaluating(architecture.model), torch.no_grad(), captured_inputs([down], stop=False) as seen:
        architecture.base(input_ids=ids, use_cache=False)
    if seen[0].ndim != 3:
        raise ArchitectureError(
            f"{method} looks at whole rows, and {architecture.weight_name(layer)} of this model is given rows and "
            f"tokens as one dimension, {tuple(seen[0].shape)}; edit it with another method"
        )


def check_loss(request: EditRequest, loss: float, step: int) -> None:
    """Refuse a loss that is NaN or inf.

    Raises:
        NumericalError: It is; names the request and the step.
    """
    if not abs(loss) < float("inf"):
        raise NumericalError(
            f"request {request.id}: the loss is {loss} at step {step} of its training; lower edit_lr, or load the "
            "model in float32"
        )
