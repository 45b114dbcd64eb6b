"""Rows of one length that run once, with everything kept that cells read: what blocks, MLPs and attentions give.

Shapes: S rows, T tokens, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from errata.editors.core.errors import ArchitectureError
from errata.editors.core.forward.block_calls import hidden_of, split_hidden
from errata.editors.core.locating.grids import Part
from errata.editors.core.model.architecture import Architecture
from errata.editors.core.model.own_forward import hooked


@dataclass(frozen=True)
class TracedRows:
    """Token ids of rows of one length, perhaps with other embeddings at some tokens.

    Attributes:
        ids: (S, T).
        first: The first token that has another embedding.
        embeddings: (S, n, d) embeddings of the tokens from `first` on; None: those of the ids.
    """

    ids: Tensor
    first: int = 0
    embeddings: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Return rows and tokens."""
        return self.ids.shape[0], self.ids.shape[1]

    @contextmanager
    def embedded(self, architecture: Architecture, *, start: int = 0, rows: Tensor | None = None) -> Iterator[None]:
        """Let the model read these embeddings inside the `with`.

        Args:
            architecture: The model.
            start: The token at which the rows that run begin.
            rows: Which of the rows run, perhaps repeated; None: all.
        """
        if self.embeddings is None:
            yield
            return
        values = self.embeddings if rows is None else self.embeddings[rows]
        end = self.first + values.shape[1]

        def replace(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
            low, high = max(self.first, start), min(end, start + output.shape[1])
            if high <= low:
                return None
            changed = output.clone()
            changed[:, low - start : high - start] = values[:, low - self.first : high - self.first].to(output)
            return changed

        module = architecture.model.get_input_embeddings()  # type: ignore[operator]
        with hooked(module.register_forward_hook(replace)):
            yield


@dataclass(frozen=True)
class RecordedRows:
    """What rows compute, ready to be written into other rows, or to be patched.

    Attributes:
        rows: The rows.
        entry: (S, T, d) input of the first block.
        outputs: (S, T, d) what each block, MLP or attention gives, by part and layer.
        prefix: Keys and values (S, heads, T, width) of each layer; empty where the model keeps none.
        form: What a block returns.
        logits: (S, V) of the next token.
    """

    rows: TracedRows
    entry: Tensor
    outputs: Mapping[Part, Sequence[Tensor]]
    prefix: Sequence[tuple[Tensor, Tensor]]
    form: Any
    logits: Tensor

    def entering(self, layer: int) -> Tensor:
        """Return what enters a block, (S, T, d)."""
        return self.entry if layer == 0 else self.outputs["state"][layer - 1]


def modules_of(architecture: Architecture, part: Part, layer: int) -> nn.Module:
    """Return the module whose output is what a part of a block gives.

    Of an MLP and an attention it is the last linear map. Where a norm follows it, the norm reads the value that is
    written there, so that the block gets the same as if the norm's output were written.

    Raises:
        ArchitectureError: the block has no such part.
    """
    find = {"state": architecture.block, "mlp": architecture.down, "attention": architecture.attention_out}[part]
    try:
        return find(layer)
    except ArchitectureError as error:
        raise ArchitectureError(f"{error}; states can be traced in every block (grids=state)") from error


@torch.no_grad()
def record(architecture: Architecture, rows: TracedRows, parts: Sequence[Part], *, keep_prefix: bool) -> RecordedRows:
    """Run rows once and keep what cells read.

    Args:
        architecture: The model.
        rows: The rows.
        parts: What is kept of each block beside its output.
        keep_prefix: Keep keys and values, so that ends of the rows can run again.

    Raises:
        ArchitectureError: a block has no such part.
    """
    from transformers import DynamicCache

    n_layers, shape = architecture.n_layers, rows.shape
    kept: tuple[Part, ...] = ("state", *parts)
    seen: dict[Part, list[Tensor]] = {part: [] for part in kept}
    entry: list[Tensor] = []
    form: list[Any] = []

    def entering(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entry.append(split_hidden(args, kwargs)[2].clone())  # Falcon's blocks add to it in place

    def keeping(part: Part) -> Callable[..., None]:
        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            if part == "state":
                form[:] = [output]
            seen[part].append(hidden_of(output).clone().reshape(*shape, -1))  # OPT flattens rows and positions

        return keep

    # All are found before the first gets a hook: a block without such a part must leave none behind.
    modules: list[tuple[Part, nn.Module]] = [
        (part, modules_of(architecture, part, layer)) for part in kept for layer in range(n_layers)
    ]
    handles = [architecture.block(0).register_forward_pre_hook(entering, with_kwargs=True)]
    handles += [module.register_forward_hook(keeping(part)) for part, module in modules]
    cache: Any = DynamicCache() if keep_prefix else None
    ids = rows.ids
    with hooked(*handles), rows.embedded(architecture):
        hidden = architecture.base(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=torch.arange(shape[1], device=ids.device).expand(shape),
            past_key_values=cache,
            use_cache=keep_prefix,
        ).last_hidden_state
    prefix = [(layer.keys, layer.values) for layer in cache.layers] if keep_prefix else []
    return RecordedRows(rows, entry[0], seen, prefix, form[0], architecture.logits(hidden[:, -1]))
