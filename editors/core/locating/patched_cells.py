"""Run cells of heat maps: rows with values of another run written over at one token.

Writing at (token t, layer l) changes nothing before t and nothing below l. So the rows that are patched run once
(recorded_rows.py), and a cell runs its end again: from t on, behind the keys and values that are kept, and from the
first layer on that it writes to. All cells of one token go up together. At each layer those join that write there
first, and cells whose writes agree up to that layer are still one row.

Example: four blocks, one token, the states of layers 0 to 2 and a window of two MLPs around layer 1.

    block 3     run s0 s1 s2 m01     the end: four sets of rows
    block 2     run s0 s1    m01     s2 joins behind the block
    block 1     run s0       m01     s1 joins
    block 0     run          m01     s0 joins behind the block; m01 writes into it

Of the last block, only what it gives at the last token is computed (forward/last_tokens.py).

Models that cannot be split (whole_rows.py) run each cell as whole rows. It is slower, and gives the same.

Shapes: S rows, T tokens, s = T - t tokens of an end, n sets of rows, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from errata.editors.core.forward.block_calls import BlockCall, PrefixCache, hidden_of, select_rows
from errata.editors.core.forward.last_tokens import last_tokens_agree, only_last_tokens
from errata.editors.core.forward.suffix import suffix_calls
from errata.editors.core.forward.whole_rows import suffixes_agree
from errata.editors.core.ledger.adapter_hooks import looks_ahead
from errata.editors.core.locating.grids import Part, Write, Writes, until
from errata.editors.core.locating.recorded_rows import RecordedRows, modules_of
from errata.editors.core.model.activations import limit_batch_tokens, run_base
from errata.editors.core.model.architecture import Architecture
from errata.editors.core.model.own_forward import hooked
from errata.editors.core.model.tokens import Batch

# What is made of the logits (n, S, V) of n cells: (n, ...), so that no one keeps the logits of all cells.
Reading = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class CellSources:
    """The runs that cells are made of.

    Attributes:
        base: The rows that are patched.
        restored: Where a patch comes from: as many rows, or one for all.
        held: Where severed paths keep their values from; as many rows.
    """

    base: RecordedRows
    restored: RecordedRows
    held: RecordedRows

    def value(self, write: Write, token: int) -> Tensor:
        """Return what is written, (S, d) or (1, d)."""
        run = self.held if write.held else self.restored
        return run.outputs[write.part][write.layer][:, token]


def runs_ends(architecture: Architecture) -> bool:
    """Return whether the ends of rows can run behind what is kept of their beginnings.

    Without a dense MLP there is nothing to try it on, and rows run whole.
    """
    is_tried = bool(architecture.down_path)
    return is_tried and suffixes_agree(architecture) and not looks_ahead(architecture.model)


@torch.no_grad()
def read_cells(
    architecture: Architecture,
    sources: CellSources,
    token: int,
    cells: Sequence[Writes],
    reading: Reading,
    *,
    batch_tokens: int = 8192,
) -> Tensor:
    """Run the cells of one token and return what is read of each, (cells, ...).

    Args:
        architecture: The model.
        sources: The runs that the cells are made of. Ends run where `base` has kept keys and values.
        token: Where the cells write.
        cells: What each of them writes, not empty.
        reading: What is made of the logits of the next token.
        batch_tokens: Bound on the tokens that run at once.
    """
    distinct = list(dict.fromkeys(cells))
    run = _EndRuns if sources.base.prefix else _WholeRuns
    limit = limit_batch_tokens(batch_tokens, architecture.device)
    found = run(architecture, sources, token, limit).read(distinct, reading)
    number = {writes: i for i, writes in enumerate(distinct)}
    return found[torch.tensor([number[writes] for writes in cells], device=found.device)]


class _EndRuns:
    """Runs the ends of rows from one token on."""

    def __init__(self, architecture: Architecture, sources: CellSources, token: int, limit: int) -> None:
        self.architecture, self.sources, self.token = architecture, sources, token
        count, length = sources.base.rows.shape
        self.count, self.length = count, length - token
        # Sets of rows that run at once.
        self.together = max(1, limit // (count * self.length))
        prefix = [(keys[:, :, :token], values[:, :, :token]) for keys, values in sources.base.prefix]
        with sources.base.rows.embedded(architecture, start=token):
            self.calls = suffix_calls(
                architecture,
                sources.base.rows.ids.tolist(),
                [token] * count,
                prefix,
                sources.base.form,
                range(architecture.n_layers),
            )
        self.prefix = prefix
        self.narrows = self.length > 1 and last_tokens_agree(architecture)
        if self.together > 1 and any(self._call(layer, 2) is None for layer in range(architecture.n_layers)):
            self.together = 1  # an argument of a block cannot be repeated

    def read(self, cells: Sequence[Writes], reading: Reading) -> Tensor:
        ends = _Ends([], torch.empty(0))
        for layer in range(self.architecture.n_layers):
            ends = self._advanced(ends, cells, 2 * layer, self.sources.base.entering(layer))
            if ends.sets:
                ends = _Ends(ends.sets, self._through_block(layer, ends))
            ends = self._advanced(ends, cells, 2 * layer + 1, self.sources.base.outputs["state"][layer])
            self._write_states(layer, ends)
        return torch.cat(
            [
                reading(self.architecture.readout(hidden[:, :, -1].reshape(-1, hidden.shape[-1])).unflatten(0, size))
                for hidden in ends.hidden.split(self.together)
                for size in [(len(hidden), self.count)]
            ]
        )

    def _advanced(self, ends: _Ends, cells: Sequence[Writes], stage: int, untouched: Tensor) -> _Ends:
        """Return the sets of rows that differ once a stage has passed, each as the rows that it came from.

        Args:
            ends: The sets before that stage, which differ in what they have written.
            cells: All cells.
            stage: See `Write.stage`.
            untouched: (S, T, d) what stands there in rows without any write.
        """
        sets = [writes for writes in dict.fromkeys(until(cell, stage) for cell in cells) if writes]
        if sets == ends.sets:
            return ends
        place = {writes: i for i, writes in enumerate(ends.sets)}
        parents = [until(writes, stage - 1) for writes in sets]
        index = torch.tensor([place.get(parent, len(ends.sets)) for parent in parents], device=untouched.device)
        own = untouched[None, :, self.token :]
        return _Ends(sets, torch.cat([ends.hidden.to(own), own])[index] if ends.sets else own[index])

    def _through_block(self, layer: int, ends: _Ends) -> Tensor:
        """Return what a block makes of all sets of rows, (n, S, s, d)."""
        block, parts = self.architecture.block(layer), []
        for start in range(0, len(ends.sets), self.together):
            sets, hidden = ends.sets[start : start + self.together], ends.hidden[start : start + self.together]
            call = self._call(layer, len(sets))
            assert call is not None
            with self._written_inside(layer, sets), self._narrowed(layer, sets):
                output = hidden_of(block(hidden.flatten(0, 1).clone(), *call.args, **call.kwargs))
            parts.append(output.reshape(hidden.shape))
        return torch.cat(parts)

    def _call(self, layer: int, sets: int) -> BlockCall | None:
        """Return how the model calls a block for that number of sets; None if an argument cannot be repeated."""
        index = torch.arange(self.count, device=self.sources.base.rows.ids.device).repeat(sets)
        own = PrefixCache({layer: self.prefix[layer]})
        call = self.calls[layer].map(lambda leaf: own if isinstance(leaf, PrefixCache) else leaf)
        if sets == 1:
            return call
        selected = select_rows([call], index, self.count)
        return None if selected is None else selected[0]

    @contextmanager
    def _written_inside(self, layer: int, sets: Sequence[Writes]) -> Iterator[None]:
        """Write over what the MLP and the attention of a block give, at the first token of the end."""
        of_part: dict[Part, list[tuple[int, Write]]] = {}
        for place, writes in enumerate(sets):
            for write in writes:
                if write.layer == layer and write.part != "state":
                    of_part.setdefault(write.part, []).append((place, write))
        shape = (len(sets), self.count, self.length)
        handles = [
            modules_of(self.architecture, part, layer).register_forward_hook(self._writer(entries, shape))
            for part, entries in of_part.items()
        ]
        with hooked(*handles):
            yield

    def _narrowed(self, layer: int, sets: Sequence[Writes]) -> AbstractContextManager[None]:
        """Let the last block run for the last token alone, unless something is written inside it."""
        is_last = layer == self.architecture.n_layers - 1
        if not (is_last and self.narrows) or any(w.layer == layer and w.part != "state" for s in sets for w in s):
            return nullcontext()
        return only_last_tokens(self.architecture)

    def _writer(self, entries: Sequence[tuple[int, Write]], shape: tuple[int, int, int]) -> Callable[..., Tensor]:
        def write_over(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            changed = output.clone().reshape(*shape, -1)
            self._write(changed, entries)
            return changed.reshape(output.shape)

        return write_over

    def _write(self, hidden: Tensor, entries: Sequence[tuple[int, Write]]) -> None:
        """Write into hidden states (n, S, s, d), at the first token of each."""
        for held in (False, True):
            places = [place for place, write in entries if write.held == held]
            if places:
                write = next(write for _, write in entries if write.held == held)
                index = torch.tensor(places, device=hidden.device)
                hidden[index, :, 0] = self.sources.value(write, self.token).to(hidden)

    def _write_states(self, layer: int, ends: _Ends) -> None:
        wanted = Write(layer, "state")
        entries = [(place, wanted) for place, writes in enumerate(ends.sets) if wanted in writes]
        if entries:
            self._write(ends.hidden, entries)


@dataclass(frozen=True)
class _Ends:
    """Sets of rows on their way up.

    Attributes:
        sets: What each has written.
        hidden: (n, S, s, d) where they are.
    """

    sets: list[Writes]
    hidden: Tensor


class _WholeRuns:
    """Runs whole rows for each cell."""

    def __init__(self, architecture: Architecture, sources: CellSources, token: int, limit: int) -> None:
        self.architecture, self.sources, self.token = architecture, sources, token
        self.count, self.length = sources.base.rows.shape
        self.together = max(1, limit // (self.count * self.length))

    def read(self, cells: Sequence[Writes], reading: Reading) -> Tensor:
        parts = [cells[start : start + self.together] for start in range(0, len(cells), self.together)]
        return torch.cat([reading(self._logits(part)) for part in parts])

    def _logits(self, cells: Sequence[Writes]) -> Tensor:
        """Return the logits (n, S, V) of the next token."""
        rows = self.sources.base.rows
        index = torch.arange(self.count, device=rows.ids.device).repeat(len(cells))
        ids = rows.ids[index]
        batch = Batch(ids, torch.ones_like(ids), torch.arange(self.length, device=ids.device).expand_as(ids))
        by_module: dict[tuple[int, Part], list[tuple[int, Write]]] = {}
        for place, writes in enumerate(cells):
            for write in writes:
                by_module.setdefault((write.layer, write.part), []).append((place, write))
        with ExitStack() as stack:
            stack.enter_context(rows.embedded(self.architecture, rows=index))
            for (layer, part), entries in by_module.items():
                module = modules_of(self.architecture, part, layer)
                stack.enter_context(hooked(module.register_forward_hook(self._writer(entries, len(cells)))))
            hidden = run_base(self.architecture, batch)
        return self.architecture.logits(hidden[:, -1]).unflatten(0, (len(cells), self.count))

    def _writer(self, entries: Sequence[tuple[int, Write]], cells: int) -> Callable[..., Any]:
        def write_over(_module: nn.Module, _args: Any, output: Any) -> Any:
            states = hidden_of(output)
            changed = states.clone().reshape(cells, self.count, self.length, -1)
            for place, write in entries:
                changed[place, :, self.token] = self.sources.value(write, self.token).to(changed)
            changed = changed.reshape(states.shape)
            return type(output)((changed, *output[1:])) if isinstance(output, (tuple, list)) else changed

        return write_over
