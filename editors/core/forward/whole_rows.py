"""Choose how rows run again and again: only the part that an edit changes, or whole rows where a model cannot be split.

A decoder can be split where its blocks hand over one hidden state, where a norm of the usual kind follows them, and
where a prefix is remembered by keys and values alone. Linear attention, state-space layers, keys shared by several
blocks and several residual streams are none of that. Nothing is looked up by name: the first rows of a model are tried
both ways, once. Where the results differ, rows run from their first token to the final norm each time. That is slower,
and right.

Shapes: b rows, L longest row, s suffix length, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from errata.editors.core.forward import suffix
from errata.editors.core.forward.block_calls import skip_blocks
from errata.editors.core.forward.suffix import Suffixes, prepare_suffixes, prepare_upper_ends
from errata.editors.core.forward.upper_blocks import UpperBlocks, prepare_upper_blocks
from errata.editors.core.ledger.adapter_hooks import looks_ahead, reads_layout
from errata.editors.core.model.activations import run_base
from errata.editors.core.model.architecture import Architecture
from errata.editors.core.model.own_forward import MISFIT, differ, evaluating, hooked, trial_rows
from errata.editors.core.model.tokens import Batch, right_padded

# Where the model keeps what its trials have shown.
TRIALS = "_errata_trials"


@dataclass(frozen=True)
class WholeRows:
    """Rows that run whole, with a vector added at one position of each; used as `Suffixes` are.

    Attributes:
        ids: Token ids of each row.
        starts: Where each row gets its vector.
        initial: (b, d) the value there in the untouched model; (b, layers, d) of several layers.
        layer: The edited layer, or several.
        last: The last layer to run.
        site: What the vector is added to.
        pad: Id to pad with.
    """

    architecture: Architecture
    ids: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    initial: Tensor
    layer: suffix.Edited
    last: int
    site: suffix.Site
    pad: int

    @property
    def rows(self) -> int:
        return len(self.ids)

    @property
    def length(self) -> int:
        """Positions of each row that `run` returns, s."""
        return max(len(row) - start for row, start in zip(self.ids, self.starts, strict=True))

    def run(self, vectors: Tensor) -> Tensor:
        """Return the decoder's output (b, s, d) from each row's start on, with `vectors` (b, d) added there.

        For several layers, `vectors` are (b, layers, d). Behind the end of a row, its last position is repeated.
        """
        output, _ = _run(self, vectors)
        columns = self._columns.to(output.device)
        return output.gather(1, columns[..., None].expand(-1, -1, output.shape[-1]))

    @cached_property
    def _batch(self) -> Batch:
        return right_padded(self.ids, self.pad).to(self.architecture.device)

    @cached_property
    def _begins(self) -> Tensor:
        return torch.tensor(self.starts, device=self._batch.ids.device)

    @cached_property
    def _columns(self) -> Tensor:
        """The positions (b, s) that `run` returns."""
        ends = torch.tensor(list(map(len, self.ids)), device=self._begins.device)
        return suffix.positions_from(self._begins, ends, self.length)

    def readout(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of what `run` gives (..., d), which has passed the final norm already."""
        return self.architecture.logits(hidden)

    def select(self, rows: Sequence[int]) -> WholeRows:
        """Return these rows only."""
        ids, starts = tuple(self.ids[i] for i in rows), tuple(self.starts[i] for i in rows)
        initial = self.initial[torch.tensor(rows, device=self.initial.device)]
        return WholeRows(self.architecture, ids, starts, initial, self.layer, self.last, self.site, self.pad)


def _run(rows: WholeRows, vectors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the decoder's output (b, L, d), and what stood at the site before the vectors were added.

    That is (b, d), or (b, layers, d) of several layers.
    """
    parts = rows.architecture
    batch, at = rows._batch, rows._begins
    several = rows.site == "sublayers" or not isinstance(rows.layer, int)
    found: list[Tensor] = []
    form: list[Any] = []

    def add(states: Tensor) -> Tensor:
        flat = states.reshape(*batch.ids.shape, -1)  # OPT flattens rows and positions into one dimension
        here = (torch.arange(len(at), device=flat.device), at.to(flat.device))
        found.append(flat[here])
        if vectors is None:
            return states
        # Layers run in ascending order, so that each finds its own vector.
        own = vectors[:, len(found) - 1] if several else vectors
        return flat.index_put(here, found[-1] + own.to(flat)).reshape(states.shape)

    def at_down(_module: Any, _args: Any, output: Tensor) -> Tensor:
        return add(output)

    def at_block(_module: Any, _args: Any, output: Any) -> Any:
        return (add(output[0]), *output[1:]) if isinstance(output, (tuple, list)) else add(output)

    if rows.site == "block":
        assert isinstance(rows.layer, int)
        edited = [parts.block(rows.layer).register_forward_hook(at_block)]
    else:
        maps = suffix.vector_modules(parts, rows.layer, rows.site)
        edited = [each.register_forward_hook(at_down, prepend=True) for each in maps]
    ends = parts.block(rows.last).register_forward_hook(lambda _module, _args, output: form.append(output))
    with hooked(*edited, ends), skip_blocks(list(parts.blocks)[rows.last + 1 :], form):
        output = run_base(parts, batch)
    if not several:
        return output, found[0]
    return output, torch.stack([states.to(found[0].device) for states in found], dim=1)


@dataclass(frozen=True)
class WholeForward:
    """Rows that run from their tokens to the final norm; used as `UpperBlocks` are."""

    architecture: Architecture
    batch: Batch
    lengths: tuple[int, ...]
    starts: tuple[int, ...] = ()  # rows always begin at their first column

    def run(self) -> Tensor:
        """Return the decoder's output (b, L, d), with the modules as they are now."""
        return run_base(self.architecture, self.batch)

    def normed(self, hidden: Tensor) -> Tensor:
        """Return what `run` gives: it has passed the final norm already."""
        return hidden

    def readout(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of what `run` gives (..., d)."""
        return self.architecture.logits(hidden)

    def select(self, rows: Sequence[int]) -> WholeForward:
        """Return these rows only."""
        index = torch.tensor(rows, device=self.batch.ids.device)
        batch = Batch(*(getattr(self.batch, name)[index] for name in ("ids", "mask", "positions")))
        return WholeForward(self.architecture, batch, tuple(self.lengths[row] for row in rows))


@torch.no_grad()
def rows_at_one_position(
    architecture: Architecture,
    rows: Sequence[Sequence[int]],
    starts: Sequence[int],
    *,
    layer: suffix.Edited,
    last: int,
    site: suffix.Site,
    pad: int,
) -> Suffixes | WholeRows:
    """Prepare rows to run with vectors added at their starts; arguments as `prepare_suffixes`.

    On a model with an edit that looks at whole rows (`Folded.looks_ahead`), rows run whole.
    """
    if suffixes_agree(architecture) and not looks_ahead(architecture.model):
        return prepare_suffixes(architecture, rows, starts, layer=layer, last=last, site=site, pad=pad)
    return _whole_rows(architecture, rows, starts, layer=layer, last=last, site=site, pad=pad)


def _whole_rows(
    architecture: Architecture,
    rows: Sequence[Sequence[int]],
    starts: Sequence[int],
    *,
    layer: suffix.Edited,
    last: int,
    site: suffix.Site,
    pad: int,
) -> WholeRows:
    ids = tuple(map(tuple, rows))
    empty = torch.empty(0, device=architecture.device)
    plain = WholeRows(architecture, ids, tuple(starts), empty, layer, last, site, pad)
    _, initial = _run(plain, None)
    return WholeRows(architecture, ids, tuple(starts), initial, layer, last, site, pad)


@torch.no_grad()
def rows_from_block(
    architecture: Architecture,
    rows: Sequence[Sequence[int]],
    *,
    first: int,
    pad: int,
    starts: Sequence[int] | None = None,
) -> UpperBlocks | WholeForward:
    """Prepare rows to run while modules of block `first` and above change; arguments as `prepare_upper_blocks`.

    Args:
        starts: The first column of each row where anything changes, if `can_run_ends`.
    """
    if starts is not None and any(starts):
        return prepare_upper_ends(architecture, rows, starts, first=first, pad=pad)
    if blocks_chain(architecture):
        return prepare_upper_blocks(architecture, rows, first=first, pad=pad)
    return WholeForward(architecture, right_padded(rows, pad).to(architecture.device), tuple(map(len, rows)))


def can_run_ends(architecture: Architecture, layer: int) -> bool:
    """Return whether rows can run from the position on that a change of this layer's MLP begins at."""
    return (
        architecture.down_paths[layer] is not None
        and suffixes_agree(architecture)
        and not looks_ahead(architecture.model)
    )


def blocks_chain(architecture: Architecture) -> bool:
    """Return whether the blocks, run one after another with the calls that the model makes, give its output."""

    def trial() -> bool:
        ids = trial_rows(architecture.model, 3)
        rows = [ids[0], ids[1][:2]]
        upper = prepare_upper_blocks(architecture, rows, first=0, pad=ids[0][0])
        ours, own = (
            upper.normed(upper.run()),
            run_base(architecture, right_padded(rows, ids[0][0]).to(upper.hidden.device)),
        )
        return ours.shape == own.shape and not differ(ours, own)

    return not reads_layout(architecture.model) and tried_once(architecture, "blocks", trial)


def suffixes_agree(architecture: Architecture) -> bool:
    """Return whether the end of a row, run behind a cached prefix, gives what the whole row gives."""

    def trial() -> bool:
        layer = next(i for i, path in enumerate(architecture.down_paths) if path is not None)
        ids = trial_rows(architecture.model, 5)
        rows, starts = [ids[0], ids[1][:4]], [3, 2]
        given: Any = {"layer": layer, "last": architecture.n_layers - 1, "site": "mlp", "pad": ids[0][0]}
        whole = _whole_rows(architecture, rows, starts, **given)
        part = prepare_suffixes(architecture, rows, starts, **given)
        vectors = whole.initial.flip(-1)
        ours, own = part.readout(part.run(vectors)), whole.readout(whole.run(vectors))
        return ours.shape == own.shape and not differ(ours, own) and not differ(part.initial, whole.initial)

    return not reads_layout(architecture.model) and tried_once(architecture, "suffixes", trial)


def tried_once(architecture: Architecture, name: str, trial: Callable[[], bool]) -> bool:
    """Return what a trial says, which runs once for a model object as it is built."""
    parts = [architecture.base, architecture.head, *architecture.blocks]
    key = (name, *map(id, parts))
    kept: dict[Any, bool] = architecture.model.__dict__.setdefault(TRIALS, {})
    if key not in kept:
        with torch.no_grad(), evaluating(architecture.model):
            try:
                kept[key] = trial()
            except torch.OutOfMemoryError:
                raise
            except MISFIT:
                kept[key] = False
    return kept[key]
