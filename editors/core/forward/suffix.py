"""Running only the part of a model that an edit at one position changes.

While a vector is added to the hidden state at one position of one layer, nothing before that position changes at any
layer, and nothing at or below that layer. So a row is run once, clean; what stays fixed is kept (the hidden state that
the vector is added to, keys and values of the prefix in the layers above); and each later forward runs only the layers
above on only the positions from there on. This holds for unmodified modules of transformers: each block is called with
the very arguments that the model itself gives it for the suffix, and a cache object that returns prefix + new and
stores nothing, through which autograd flows.

Shapes: b rows, s suffix length (equal within a bucket, so a suffix is never padded), P longest prefix, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from errata.editors.core.model.activations import hooked
from errata.editors.core.model.architecture import Architecture
from errata.editors.core.model.tokens import right_padded

# Where the vector is added: to the output of the MLP's down projection, or to the output of the whole block.
Site = Literal["mlp", "block"]


# Share of the rows' tokens that shared beginnings must save to be worth a pass of their own.
MIN_SAVED = 0.2


class PrefixCache:
    """Keys and values of a fixed prefix, in the form in which attention modules ask for a cache."""

    is_compileable = False

    def __init__(self, layers: dict[int, tuple[Tensor, Tensor]]) -> None:
        self._layers = layers

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The prefix followed by the new (b, heads, s, width); nothing is stored."""
        old_keys, old_values = self._layers[layer]
        return torch.cat([old_keys, keys], dim=-2), torch.cat([old_values, values], dim=-2)

    def get_seq_length(self, _layer: int = 0) -> int:
        return next(iter(self._layers.values()))[0].shape[-2]

    def select(self, rows: Tensor) -> PrefixCache:
        return PrefixCache({i: (k[rows.to(k.device)], v[rows.to(v.device)]) for i, (k, v) in self._layers.items()})


@dataclass(frozen=True)
class BlockCall:
    """The arguments, beside the hidden state, that the model gives to one block for the suffix."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def map(self, function: Callable[[Any], Any]) -> BlockCall:
        """The same call with every leaf of its arguments sent through `function`."""
        return BlockCall(_mapped(self.args, function), _mapped(self.kwargs, function))

    def select(self, rows: Tensor, count: int) -> BlockCall | None:
        """The call for these of `count` rows, or None where an argument cannot be split by rows."""
        if not all(_splits(leaf, count) for leaf in _leaves((self.args, self.kwargs))):
            return None
        return self.map(lambda leaf: _selected(leaf, rows, count))


@dataclass(frozen=True)
class Suffixes:
    """Rows of one suffix length, ready to be run again and again with a vector added at their first position.

    Attributes:
        hidden: (b, s, d) what enters the first block that is run (site "block" or a plain residual: the output of the
            edited block; else its input).
        initial: (b, d) the value at the site and position where the vector is added, in the untouched model.
    """

    architecture: Architecture
    hidden: Tensor
    initial: Tensor
    blocks: range
    calls: tuple[BlockCall, ...]
    hook: nn.Module | None  # the down projection whose output takes the vector, where it is not simply added to hidden

    @property
    def rows(self) -> int:
        return self.hidden.shape[0]

    def run(self, vectors: Tensor) -> Tensor:
        """Output (b, s, d) of the last block run, with `vectors` (b, d) added at the first position."""
        if self.hook is not None:
            # Beneath the hooks of edits that the model carries, as the weights are that will make it.
            with hooked(self.hook.register_forward_hook(_adder(vectors, self.hidden.shape), prepend=True)):
                return self._through_blocks(self.hidden)
        first = self.hidden[:, :1] + vectors.to(self.hidden.dtype)[:, None]
        return self._through_blocks(torch.cat([first, self.hidden[:, 1:]], dim=1))

    def select(self, rows: Tensor) -> Suffixes | None:
        """These rows only, or None where an argument of a block cannot be split by rows."""
        calls = [call.select(rows, self.rows) for call in self.calls]
        kept = tuple(call for call in calls if call is not None)
        if len(kept) < len(calls):
            return None
        return Suffixes(self.architecture, self.hidden[rows], self.initial[rows], self.blocks, kept, self.hook)

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
    layer: int,
    last: int,
    site: Site,
    pad: int,
) -> Suffixes:
    """Run rows of one suffix length once and keep what later forwards need.

    Args:
        rows: Token ids; `len(row) - start` must be the same for all.
        starts: Position in each row where the vector will be added.
        layer: The edited layer.
        last: The last layer to run.
        site: What the vector is added to.
        pad: Id to pad prefixes with.
    """
    (length,) = {len(row) - start for row, start in zip(rows, starts, strict=True)}
    clean = _clean_states(architecture, rows, starts, length, layer, pad)
    calls = _suffix_calls(architecture, rows, starts, clean, range(layer, last + 1))
    if site == "block":
        return Suffixes(architecture, clean.output, clean.output[:, 0], range(layer + 1, last + 1), calls[1:], None)
    if is_plain_residual(architecture, layer, clean.inputs, calls[0], clean.output):
        return Suffixes(architecture, clean.output, clean.down[:, 0], range(layer + 1, last + 1), calls[1:], None)
    down = architecture.down(layer)
    return Suffixes(architecture, clean.inputs, clean.down[:, 0], range(layer, last + 1), calls, down)


@dataclass(frozen=True)
class _Clean:
    """The untouched model on rows: at the edited layer, of the suffix; of every layer, keys and values of the prefix.

    Attributes:
        inputs, output, down: (b, s, d) input and output of the edited block, output of its down projection.
        prefix: (b, heads, P, width) keys and values by layer, prefixes ending together.
        form: What the block returned, as it returned it.
    """

    inputs: Tensor
    output: Tensor
    down: Tensor
    prefix: list[tuple[Tensor, Tensor]]
    form: Any


def _clean_states(
    architecture: Architecture, rows: Sequence[Sequence[int]], starts: Sequence[int], length: int, layer: int, pad: int
) -> _Clean:
    """One forward of what is left of the rows behind the beginnings that several of them share, which run once."""
    heads = shared_prefixes(rows, starts)
    cache, real = _heads_cache(architecture, rows, heads, pad)
    rest = right_padded([row[head:] for row, head in zip(rows, heads, strict=True)], pad).to(architecture.device)
    head, start = (torch.tensor(places, device=rest.ids.device) for places in (heads, starts))
    seen: dict[str, Any] = {}  # copies: Falcon's blocks go on to add the attention's output into the MLP's

    def entering(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["inputs"] = split_hidden(args, kwargs)[2].clone()

    def leaving(_module: nn.Module, _args: Any, output: Any) -> None:
        seen["form"], seen["output"] = output, hidden_of(output).clone()

    def keep_down(_module: nn.Module, _args: Any, output: Tensor) -> None:
        seen["down"] = output.clone()

    block, down = architecture.block(layer), architecture.down(layer)
    with hooked(
        block.register_forward_pre_hook(entering, with_kwargs=True),
        block.register_forward_hook(leaving),
        down.register_forward_hook(keep_down, prepend=True),
    ):
        architecture.base(
            input_ids=rest.ids,
            attention_mask=torch.cat([real.long(), torch.ones_like(rest.mask)], dim=1),  # see run_base
            position_ids=rest.positions + head[:, None],
            past_key_values=cache,
            use_cache=True,
        )
    columns = (start - head)[:, None] + torch.arange(length, device=start.device)  # (b, s) in the rest
    inputs, output, out_of_down = (
        _at(seen[name].reshape(*rest.ids.shape, -1), columns) for name in ("inputs", "output", "down")
    )
    # In the cache, heads end together and each rest follows: position p is at max(heads) - head + p.
    places, inside = _ending_together(start)
    places = places + (max(heads) - head)[:, None]
    prefix = [(_prefix(kept.keys, places, inside), _prefix(kept.values, places, inside)) for kept in cache.layers]
    return _Clean(inputs, output, out_of_down, prefix, seen["form"])


def shared_prefixes(rows: Sequence[Sequence[int]], starts: Sequence[int]) -> list[int]:
    """How many first tokens of each row to run once for all rows that share them: no more than its start, and none
    where too little would be saved. Contexts make rows of different requests begin alike."""
    order = sorted(range(len(rows)), key=lambda i: tuple(rows[i]))
    heads = [0] * len(rows)
    for i, j in pairwise(order):
        common = next((p for p, (a, b) in enumerate(zip(rows[i], rows[j], strict=False)) if a != b), len(rows[i]))
        heads[i], heads[j] = max(heads[i], min(common, starts[i])), max(heads[j], min(common, starts[j]))
    distinct = {tuple(row[:head]) for row, head in zip(rows, heads, strict=True)}
    saved = sum(heads) - sum(map(len, distinct))
    return heads if saved > MIN_SAVED * sum(map(len, rows)) else [0] * len(rows)


def _heads_cache(
    architecture: Architecture, rows: Sequence[Sequence[int]], heads: Sequence[int], pad: int
) -> tuple[Any, Tensor]:
    """A cache that holds each row's head, heads ending together, and which of its places are real (b, longest)."""
    from transformers import DynamicCache

    places, real = _ending_together(torch.tensor(heads, device=architecture.device))
    cache: Any = DynamicCache()
    if not max(heads):
        return cache, real
    distinct = sorted({tuple(row[:head]) for row, head in zip(rows, heads, strict=True) if head})
    number = {head: i for i, head in enumerate(distinct)}
    # A row without a head reads another's, none of which is real.
    index = torch.tensor([number.get(tuple(row[:head]), 0) for row, head in zip(rows, heads, strict=True)])
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
        mine = index.to(kept.keys.device)
        cache.update(_prefix(kept.keys[mine], places, real), _prefix(kept.values[mine], places, real), layer)
    return cache, real


def _suffix_calls(
    architecture: Architecture, rows: Sequence[Sequence[int]], starts: Sequence[int], clean: _Clean, layers: range
) -> tuple[BlockCall, ...]:
    """How the model itself calls these blocks for the suffix behind a cached prefix. No block runs for that."""
    from transformers import DynamicCache

    # Prefixes are padded here rather than run padded on the left: a padded query would see nothing at all, which some
    # attention kernels answer with NaN.
    fixed = PrefixCache({i: clean.prefix[i] for i in layers})
    prefix = DynamicCache()
    for i, (keys, values) in enumerate(clean.prefix):
        prefix.update(keys, values, i)
    calls: dict[int, BlockCall] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            args, kwargs, _ = split_hidden(args, kwargs)
            calls[layer] = BlockCall(args, kwargs).map(lambda leaf: fixed if leaf is prefix else leaf)

        return hook

    start = torch.tensor(starts, device=architecture.device)
    ids = torch.tensor([row[begin:] for row, begin in zip(rows, starts, strict=True)], device=start.device)
    _, real = _ending_together(start)
    hooks = (architecture.block(i).register_forward_pre_hook(keep(i), with_kwargs=True) for i in layers)
    with hooked(*hooks), skip_blocks(list(architecture.blocks), [clean.form]):
        architecture.base(
            input_ids=ids,
            attention_mask=torch.cat([real, torch.ones_like(ids, dtype=torch.bool)], dim=1).long(),
            position_ids=start[:, None] + torch.arange(ids.shape[1], device=start.device),
            past_key_values=prefix,
            use_cache=True,
        )
    return tuple(calls[i] for i in layers)


@contextmanager
def skip_blocks(blocks: Sequence[nn.Module], form: Sequence[Any]) -> Iterator[None]:
    """Inside, `blocks` do not run: they hand on the hidden state that they are called with, in the form of `form[0]`,
    what a block of the model returned, which must be there once the first of them is called."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = split_hidden(args, kwargs)[2]
        return (hidden, *form[0][1:]) if isinstance(form[0], tuple) else hidden

    before = [(block, block.__dict__.get("forward")) for block in blocks]
    try:
        for block in blocks:
            block.forward = forward  # type: ignore[method-assign]
        yield
    finally:
        for block, own in before:
            if own is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = own  # type: ignore[method-assign]


def _ending_together(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Positions (b, longest) of prefixes of these lengths set flush right, negative where there is none; and where
    there is one."""
    longest = int(lengths.max())
    places = torch.arange(longest, device=lengths.device) - (longest - lengths)[:, None]
    return places, places >= 0


def _at(hidden: Tensor, columns: Tensor) -> Tensor:
    """Positions `columns` (b, s) of hidden states (b, length, d)."""
    return hidden.gather(1, columns.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1]))


def _prefix(states: Tensor, places: Tensor, real: Tensor) -> Tensor:
    """Keys or values (b, heads, length, width) at `places` (b, P), zero where a place is not `real`."""
    places, real = places.to(states.device), real.to(states.device)
    index = places.clamp_min(0)[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
    return states.gather(2, index) * real[:, None, :, None]


def is_plain_residual(architecture: Architecture, layer: int, inputs: Tensor, call: BlockCall, output: Tensor) -> bool:
    """Whether a vector added to the MLP's output comes out of the block as it is.

    It does in most decoders; not where a norm or a factor follows the MLP (Gemma 2 and 3, OLMo 2, Granite), or an edit
    that the model carries takes the place of its output. Tried out rather than known: a vector as long as the output is
    added, and must arrive up to rounding.
    """
    down = architecture.down(layer)
    vectors = output[:, 0].flip(-1).roll(1, -1)
    with hooked(down.register_forward_hook(_adder(vectors, inputs.shape), prepend=True)):
        moved = hidden_of(architecture.block(layer)(inputs, *call.args, **call.kwargs))
    error = (moved[:, 0] - output[:, 0] - vectors).double().norm()
    return bool(error <= 32 * torch.finfo(output.dtype).eps * vectors.double().norm())


def _adder(vectors: Tensor, shape: torch.Size) -> Callable[..., Tensor]:
    """A forward hook that adds `vectors` (b, d) to a down projection's output at the first of s positions."""

    def add(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        rows = output.reshape(shape[0], shape[1], -1)
        first = rows[:, :1] + vectors.to(output.dtype)[:, None]
        return torch.cat([first, rows[:, 1:]], dim=1).reshape(output.shape)

    return add


def hidden_of(output: Any) -> Tensor:
    """A block's hidden state, which some blocks return alone and others first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    if args:
        return args[1:], kwargs, args[0]
    rest = dict(kwargs)
    return args, rest, rest.pop("hidden_states")


def _mapped(tree: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(tree, dict):
        return {key: _mapped(value, function) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)(_mapped(value, function) for value in tree)
    return function(tree)


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in _leaves(value)]
    if isinstance(tree, (tuple, list)):
        return [leaf for value in tree for leaf in _leaves(value)]
    return [tree]


def _splits(leaf: Any, rows: int) -> bool:
    return not isinstance(leaf, Tensor) or leaf.ndim < 2 or leaf.shape[0] in (1, rows)


def _selected(leaf: Any, rows: Tensor, count: int) -> Any:
    if isinstance(leaf, PrefixCache):
        return leaf.select(rows)
    if isinstance(leaf, Tensor) and leaf.ndim >= 2 and leaf.shape[0] == count and count > 1:
        return leaf[rows.to(leaf.device)]
    return leaf
