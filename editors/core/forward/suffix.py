"""Run only the part of a model that an edit at one position changes: the upper layers, from that position on.

A method such as ROME adds a vector to the hidden state at one position of one layer, and tries many vectors. The vector
changes nothing at earlier positions, and nothing in or below that layer. So a row runs once without the vector, and
what stays the same is kept: the hidden state that the vector is added to, and the keys and values of the earlier
positions. Each later forward runs only the layers above, only from that position on.

Example: two rows of five tokens, four blocks, the vector added at position 3 to the MLP output of block 1.

    position       0  1  2  3  4
    row 0          A  B  C  D  E
    row 1          A  B  C  F  G     both rows begin with A B C: their shared prefix runs once
                   -------
    block 3        k  k  k  R  R     k: keys and values are kept
    block 2        k  k  k  R  R     R: runs again for each vector
    block 1        k  k  k  H  H     H: the output is kept, the vector is added to it at position 3
    block 0        .  .  .  .  .     .: runs once, nothing is kept

    preparing      3 shared + 2 x 2 other positions through all blocks (10 positions without sharing)
    each vector    2 x 2 positions through blocks 2 and 3              (10 positions through 4 blocks otherwise)

Block 1 also runs once more on the suffix while preparing: `residual_gain` tries whether the block just adds what its
MLP gives, perhaps times a factor. Where it does not, block 1 runs again for each vector too, and so its keys and values
are kept as well.

Several layers can get a vector each, at the same position. Then the blocks run from the lowest of them on, and each
vector is added inside its block.

The modules of transformers run unmodified: each block gets the arguments that the model itself gives it for the suffix.
Its cache object returns the prefix followed by the new keys and values, and autograd flows through.

Rows of unequal suffix lengths are padded on the right: the last token is repeated, at its own position. No real token
looks ahead at the padding, and no one reads its states.

Shapes: b rows, s longest suffix, P longest prefix, d hidden size, L edited layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from errata.editors.core.forward.block_calls import (
    BlockCall,
    PrefixCache,
    hidden_of,
    select_rows,
    skip_blocks,
    split_hidden,
)
from errata.editors.core.forward.residual_gain import adder, residual_gain
from errata.editors.core.forward.upper_blocks import UpperBlocks
from errata.editors.core.model.architecture import Architecture
from errata.editors.core.model.own_forward import hooked
from errata.editors.core.model.tokens import right_padded

# Where the vector is added: to the output of the MLP's down projection, or of the whole block; or one to the output of
# the attention's output projection and another to that of the down projection ("sublayers").
Site = Literal["mlp", "block", "sublayers"]
# The edited layer, counted from 0; or several, ascending, which get a vector each. Their site is "mlp".
Edited = int | Sequence[int]


# Shared prefixes get a pass of their own only if that saves at least this share of the rows' tokens.
MIN_SAVED = 0.2


@dataclass(frozen=True)
class Suffixes:
    """Ends of rows, ready to be run again and again with a vector added at their first position.

    Attributes:
        hidden: (b, s, d) input of the first block that runs. For site "block" or a plain residual that is the output
            of the edited block, otherwise its input.
        initial: (b, d) the value at the site and position where the vector is added, in the untouched model; (b, L, d)
            of several layers, or (b, 2, d) of sublayers.
        blocks: The blocks that run, counted from 0.
        calls: How the model calls each of them.
        hooks: The down projections whose outputs get a vector each; none where one vector is simply added to `hidden`.
        gain: What the vector is multiplied by where it is added to `hidden`.
    """

    architecture: Architecture
    hidden: Tensor
    initial: Tensor
    blocks: range
    calls: tuple[BlockCall, ...]
    hooks: tuple[nn.Module, ...]
    gain: float = 1.0

    @property
    def rows(self) -> int:
        return self.hidden.shape[0]

    @property
    def length(self) -> int:
        """Positions of each row that run, s."""
        return self.hidden.shape[1]

    def run(self, vectors: Tensor) -> Tensor:
        """Return the output (b, s, d) of the last block, with `vectors` (b, d) added at the first position.

        For several layers, `vectors` are (b, L, d).
        """
        if self.hooks:
            # A vector stands for a change of the weights, so it comes before the hooks of edits on the model.
            each = zip(self.hooks, vectors.reshape(self.rows, len(self.hooks), -1).unbind(1), strict=True)
            adders = [hook.register_forward_hook(adder(v, self.hidden.shape), prepend=True) for hook, v in each]
            with hooked(*adders):
                return self._through_blocks(self.hidden)
        first = self.hidden[:, :1] + (self.gain * vectors).to(self.hidden.dtype)[:, None]
        return self._through_blocks(torch.cat([first, self.hidden[:, 1:]], dim=1))

    def readout(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of what `run` gives (..., d): apply the final norm and the head."""
        return self.architecture.readout(hidden)

    def select(self, rows: Sequence[int]) -> Suffixes | None:
        """Return these rows only, or None if an argument of a block cannot be split by rows."""
        index = torch.tensor(rows, device=self.hidden.device)
        kept = select_rows(self.calls, index, self.rows)
        if kept is None:
            return None
        hidden, initial = self.hidden[index], self.initial[index.to(self.initial.device)]
        return Suffixes(self.architecture, hidden, initial, self.blocks, kept, self.hooks, self.gain)

    def _through_blocks(self, hidden: Tensor) -> Tensor:
        for layer, call in zip(self.blocks, self.calls, strict=True):
            hidden = hidden_of(self.architecture.block(layer)(hidden, *call.args, **call.kwargs))
        return hidden


@torch.no_grad()
def prepare_suffixes(
    architecture: Architecture,
    rows: Sequence[Sequence[int]],
    starts: Sequence[int],
    *,
    layer: Edited,
    last: int,
    site: Site,
    pad: int,
) -> Suffixes:
    """Run rows once, and keep what later forwards need.

    Args:
        architecture: The model.
        rows: Token ids.
        starts: Position in each row where the vector will be added.
        layer: The edited layer, or several.
        last: The last layer to run.
        site: What the vector is added to.
        pad: Id to pad prefixes with.
    """
    length = max(len(row) - start for row, start in zip(rows, starts, strict=True))
    layers = (layer,) if isinstance(layer, int) else tuple(layer)
    first, above = layers[0], range(layers[0] + 1, last + 1)
    hooks = vector_modules(architecture, layer, site)
    clean = _clean_states(architecture, rows, starts, length, first, hooks, pad)
    calls = suffix_calls(architecture, rows, starts, clean.prefix, clean.form, range(first, last + 1))
    if site == "block":
        return Suffixes(architecture, clean.output, clean.output[:, 0], above, calls[1:], ())
    initial = torch.stack([down[:, 0].to(clean.inputs.device) for down in clean.downs], dim=1)  # (b, L, d)
    if not isinstance(layer, int) or site == "sublayers":
        return Suffixes(architecture, clean.inputs, initial, range(first, last + 1), calls, hooks)
    gain = residual_gain(architecture, layer, clean.inputs, calls[0], clean.output)
    if gain is not None:
        return Suffixes(architecture, clean.output, initial[:, 0], above, calls[1:], (), gain)
    return Suffixes(architecture, clean.inputs, initial[:, 0], range(first, last + 1), calls, hooks)


def vector_modules(architecture: Architecture, layer: Edited, site: Site) -> tuple[nn.Module, ...]:
    """Return the maps whose outputs get a vector each, in the order in which they run."""
    if site == "sublayers":
        assert isinstance(layer, int)  # two vectors at each of several layers are not needed
        return architecture.attention_out(layer), architecture.down(layer)
    return tuple(architecture.down(one) for one in ((layer,) if isinstance(layer, int) else layer))


@torch.no_grad()
def prepare_upper_ends(
    architecture: Architecture, rows: Sequence[Sequence[int]], starts: Sequence[int], *, first: int, pad: int
) -> UpperBlocks:
    """Run rows once up to their starts, and their ends up to block `first`, which is trained at these positions alone.

    Args:
        architecture: The model.
        rows: Token ids.
        starts: The first column of each row where block `first` changes.
        first: The lowest block that will change.
        pad: Id to pad prefixes with.
    """
    length = max(len(row) - start for row, start in zip(rows, starts, strict=True))
    clean = _clean_states(architecture, rows, starts, length, first, (), pad)
    calls = suffix_calls(architecture, rows, starts, clean.prefix, clean.form, range(first, architecture.n_layers))
    lengths = tuple(len(row) - start for row, start in zip(rows, starts, strict=True))
    return UpperBlocks(architecture, first, clean.inputs, calls, lengths, tuple(starts))


@dataclass(frozen=True)
class _Clean:
    """What the untouched model computes: the edited blocks on the suffix, and the prefix in every layer.

    Attributes:
        inputs, output: (b, s, d) input and output of the lowest edited block.
        downs: (b, s, d) output of each map whose output may get a vector.
        prefix: Keys and values (b, heads, P, width) of each layer, aligned at the end of the prefixes.
        form: The block's return value, so that a skipped block can return the same form.
    """

    inputs: Tensor
    output: Tensor
    downs: tuple[Tensor, ...]
    prefix: list[tuple[Tensor, Tensor]]
    form: Any


def _clean_states(
    architecture: Architecture,
    rows: Sequence[Sequence[int]],
    starts: Sequence[int],
    length: int,
    first: int,
    maps: Sequence[nn.Module],
    pad: int,
) -> _Clean:
    """Run shared prefixes once, then one forward of what is left of each row."""
    shared = shared_prefixes(rows, starts)
    cache, real = _shared_prefix_cache(architecture, rows, shared, pad)
    rest = right_padded([row[n:] for row, n in zip(rows, shared, strict=True)], pad).to(architecture.device)
    lengths = [len(row) for row in rows]
    offset, start, end = (torch.tensor(numbers, device=rest.ids.device) for numbers in (shared, starts, lengths))
    # Copies, because Falcon's blocks add the attention's output into the MLP's output in place.
    seen: dict[str, Any] = {}

    def entering(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["inputs"] = split_hidden(args, kwargs)[2].clone()

    def leaving(_module: nn.Module, _args: Any, output: Any) -> None:
        seen["form"], seen["output"] = output, hidden_of(output).clone()

    def keep_output(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            seen[f"map {index}"] = output.clone()

        return hook

    block = architecture.block(first)
    with hooked(
        block.register_forward_pre_hook(entering, with_kwargs=True),
        block.register_forward_hook(leaving),
        *(each.register_forward_hook(keep_output(i), prepend=True) for i, each in enumerate(maps)),
    ):
        architecture.base(
            input_ids=rest.ids,
            attention_mask=torch.cat([real.long(), torch.ones_like(rest.mask)], dim=1),  # see run_base
            position_ids=rest.positions + offset[:, None],
            past_key_values=cache,
            use_cache=True,
        )
    columns = positions_from(start, end, length) - offset[:, None]  # (b, s) in `rest`
    inputs, output, *downs = (
        _at(seen[name].reshape(*rest.ids.shape, -1), columns)
        for name in ("inputs", "output", *(f"map {i}" for i in range(len(maps))))
    )
    # The cache aligns shared prefixes at their end, and each rest follows: position p is in column
    # max(shared) - shared[row] + p.
    index, inside = _right_aligned(start)
    index = index + (max(shared) - offset)[:, None]
    prefix = [(_prefix(kept.keys, index, inside), _prefix(kept.values, index, inside)) for kept in cache.layers]
    return _Clean(inputs, output, tuple(downs), prefix, seen["form"])


def shared_prefixes(rows: Sequence[Sequence[int]], starts: Sequence[int]) -> list[int]:
    """Return how many first tokens of each row to run once for all rows that share them.

    Rows of different requests begin alike when they use the same context. A shared prefix ends at the row's start at
    the latest. All are 0 if sharing would save too few tokens (MIN_SAVED).
    """
    # Sorted, the rows that share the most stand side by side, so comparing neighbours finds it.
    order = sorted(range(len(rows)), key=lambda i: tuple(rows[i]))
    shared = [0] * len(rows)
    for i, j in pairwise(order):
        common = next((p for p, (a, b) in enumerate(zip(rows[i], rows[j], strict=False)) if a != b), len(rows[i]))
        shared[i], shared[j] = max(shared[i], min(common, starts[i])), max(shared[j], min(common, starts[j]))
    distinct = {tuple(row[:n]) for row, n in zip(rows, shared, strict=True)}
    saved = sum(shared) - sum(map(len, distinct))
    return shared if saved > MIN_SAVED * sum(map(len, rows)) else [0] * len(rows)


def _shared_prefix_cache(
    architecture: Architecture, rows: Sequence[Sequence[int]], shared: Sequence[int], pad: int
) -> tuple[Any, Tensor]:
    """Return a cache of each row's shared prefix, aligned at the end, and a mask (b, longest) of its real columns."""
    from transformers import DynamicCache

    positions, real = _right_aligned(torch.tensor(shared, device=architecture.device))
    cache: Any = DynamicCache()
    if not max(shared):
        return cache, real
    distinct = sorted({tuple(row[:n]) for row, n in zip(rows, shared, strict=True) if n})
    number = {prefix: i for i, prefix in enumerate(distinct)}
    # A row without a shared prefix gets the first one, with every column masked.
    index = torch.tensor([number.get(tuple(row[:n]), 0) for row, n in zip(rows, shared, strict=True)])
    batch = right_padded(distinct, pad).to(architecture.device)
    once: Any = DynamicCache()
    architecture.base(
        input_ids=batch.ids,
        attention_mask=torch.ones_like(batch.mask),  # see run_base
        position_ids=batch.positions,
        past_key_values=once,
        use_cache=True,
    )
    for layer, kept in enumerate(once.layers):
        of_row = index.to(kept.keys.device)
        keys, values = (_prefix(states[of_row], positions, real) for states in (kept.keys, kept.values))
        cache.update(keys, values, layer)
    return cache, real


def suffix_calls(
    architecture: Architecture,
    rows: Sequence[Sequence[int]],
    starts: Sequence[int],
    prefix_states: Sequence[tuple[Tensor, Tensor]],
    form: Any,
    layers: range,
) -> tuple[BlockCall, ...]:
    """Record how the model calls these blocks for the suffix behind a cached prefix. No block runs for that.

    Args:
        architecture: The model.
        rows: Token ids.
        starts: Where the suffix of each row begins.
        prefix_states: Keys and values (b, heads, P, width) of each layer, aligned at the end of the prefixes.
        form: What a block returns, so that a skipped block can return the same form.
        layers: The blocks.
    """
    from transformers import DynamicCache

    # Prefixes are padded in the cache, not run with padding on the left: a padded query would see no key at all, and
    # some attention kernels return NaN for that.
    fixed = PrefixCache({i: prefix_states[i] for i in layers})
    prefix = DynamicCache()
    for i, (keys, values) in enumerate(prefix_states):
        prefix.update(keys, values, i)
    calls: dict[int, BlockCall] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            args, kwargs, _ = split_hidden(args, kwargs)
            calls[layer] = BlockCall(args, kwargs).map(lambda leaf: fixed if leaf is prefix else leaf)

        return hook

    start, end = (torch.tensor(numbers, device=architecture.device) for numbers in (starts, list(map(len, rows))))
    length = max(len(row) - begin for row, begin in zip(rows, starts, strict=True))
    ends = [list(row[begin:]) for row, begin in zip(rows, starts, strict=True)]
    ids = torch.tensor([row + row[-1:] * (length - len(row)) for row in ends], device=start.device)
    _, real = _right_aligned(start)
    hooks = (architecture.block(i).register_forward_pre_hook(keep(i), with_kwargs=True) for i in layers)
    with hooked(*hooks), skip_blocks(list(architecture.blocks), [form]):
        architecture.base(
            input_ids=ids,
            attention_mask=torch.cat([real, torch.ones_like(ids, dtype=torch.bool)], dim=1).long(),
            position_ids=positions_from(start, end, length),
            past_key_values=prefix,
            use_cache=True,
        )
    return tuple(calls[i] for i in layers)


def positions_from(start: Tensor, end: Tensor, length: int) -> Tensor:
    """Return the positions (b, length) of each row from its start on; behind its end, the last one again."""
    following = start[:, None] + torch.arange(length, device=start.device)
    return torch.minimum(following, end[:, None] - 1)


def _right_aligned(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions (b, longest) of prefixes aligned on the right, negative for padding; and a mask of the real
    ones."""
    longest = int(lengths.max())
    positions = torch.arange(longest, device=lengths.device) - (longest - lengths)[:, None]
    return positions, positions >= 0


def _at(hidden: Tensor, columns: Tensor) -> Tensor:
    """Return the positions `columns` (b, s) of hidden states (b, length, d)."""
    return hidden.gather(1, columns.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1]))


def _prefix(states: Tensor, positions: Tensor, real: Tensor) -> Tensor:
    """Return keys or values (b, heads, length, width) at `positions` (b, P), zero where a position is not `real`."""
    positions, real = positions.to(states.device), real.to(states.device)
    index = positions.clamp_min(0)[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
    return states.gather(2, index) * real[:, None, :, None]
