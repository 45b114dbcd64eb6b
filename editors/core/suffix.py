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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from errata.editors.core.activations import hooked
from errata.editors.core.architecture import Architecture
from errata.editors.core.tokens import Batch, right_padded

# Where the vector is added: to the output of the MLP's down projection, or to the output of the whole block.
Site = Literal["mlp", "block"]


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
        return PrefixCache({i: (k[rows], v[rows]) for i, (k, v) in self._layers.items()})


@dataclass(frozen=True)
class Call:
    """The arguments, beside the hidden state, that the model gives to one block for the suffix."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def map(self, function: Callable[[Any], Any]) -> Call:
        """The same call with every leaf of its arguments sent through `function`."""
        return Call(_mapped(self.args, function), _mapped(self.kwargs, function))


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
    calls: tuple[Call, ...]
    hook: nn.Module | None  # the down projection whose output takes the vector, where it is not simply added to hidden

    @property
    def rows(self) -> int:
        return self.hidden.shape[0]

    def run(self, vectors: Tensor) -> Tensor:
        """Output (b, s, d) of the last block run, with `vectors` (b, d) added at the first position."""
        if self.hook is not None:
            with hooked(self.hook.register_forward_hook(_adder(vectors, self.hidden.shape))):
                return self._through_blocks(self.hidden)
        first = self.hidden[:, :1] + vectors.to(self.hidden.dtype)[:, None]
        return self._through_blocks(torch.cat([first, self.hidden[:, 1:]], dim=1))

    def select(self, rows: Tensor) -> Suffixes | None:
        """These rows only, or None where an argument of a block cannot be split by rows."""
        if not all(_splits(leaf, self.rows) for call in self.calls for leaf in _leaves((call.args, call.kwargs))):
            return None
        calls = tuple(call.map(lambda leaf: _selected(leaf, rows, self.rows)) for call in self.calls)
        return Suffixes(self.architecture, self.hidden[rows], self.initial[rows], self.blocks, calls, self.hook)

    def _through_blocks(self, hidden: Tensor) -> Tensor:
        for layer, call in zip(self.blocks, self.calls, strict=True):
            hidden = hidden_of(self.architecture.block(layer)(hidden, *call.args, **call.kwargs))
        return hidden


@torch.no_grad()
def prepare(
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
    batch = right_padded(rows, pad).to(architecture.device)
    start = torch.tensor(starts, device=architecture.device)
    cache, outputs = _clean_forward(architecture, batch, layer)
    columns = start[:, None] + torch.arange(length, device=start.device)  # (b, s)
    calls, inputs = _suffix_calls(architecture, batch, columns, cache, range(layer, last + 1))
    block_output, down_output = (_at(tensor, columns) for tensor in outputs)
    if site == "block":
        return Suffixes(architecture, block_output, block_output[:, 0], range(layer + 1, last + 1), calls[1:], None)
    if is_plain_residual(architecture, layer, inputs, calls[0], block_output):
        return Suffixes(architecture, block_output, down_output[:, 0], range(layer + 1, last + 1), calls[1:], None)
    down = architecture.down(layer)
    return Suffixes(architecture, inputs, down_output[:, 0], range(layer, last + 1), calls, down)


def _clean_forward(architecture: Architecture, batch: Batch, layer: int) -> tuple[Any, tuple[Tensor, Tensor]]:
    """One forward of whole rows: every layer's cache, and the outputs of the edited block and its down projection."""
    from transformers import DynamicCache

    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        # A copy: Falcon's blocks go on to add the attention's output into the MLP's.
        return lambda _module, _args, output: seen.update({name: hidden_of(output).clone()})

    cache = DynamicCache()
    block, down = architecture.block(layer), architecture.down(layer)
    with hooked(block.register_forward_hook(keep("block")), down.register_forward_hook(keep("down"))):
        architecture.base(
            input_ids=batch.ids,
            attention_mask=torch.ones_like(batch.mask),  # see run_base
            position_ids=batch.positions,
            past_key_values=cache,
            use_cache=True,
        )
    return cache, (seen["block"], seen["down"].reshape(*batch.ids.shape, -1))


def _suffix_calls(
    architecture: Architecture, batch: Batch, columns: Tensor, cache: Any, layers: range
) -> tuple[tuple[Call, ...], Tensor]:
    """How the model itself calls these blocks for the suffix behind a cached prefix, and the first one's input."""
    from transformers import DynamicCache

    # Prefixes end together, just before the suffix. They are padded here rather than run padded on the left: a padded
    # query would see nothing at all, which some attention kernels answer with NaN.
    start = columns[:, 0]
    places = torch.arange(int(start.max()), device=start.device) - (start.max() - start)[:, None]  # (b, P)
    real = places >= 0
    kept = [tuple(_prefix(states, places, real) for states in (layer.keys, layer.values)) for layer in cache.layers]
    fixed = PrefixCache({i: kept[i] for i in layers})
    prefix = DynamicCache()
    for i, (keys, values) in enumerate(kept):
        prefix.update(keys, values, i)
    calls: dict[int, Call] = {}
    inputs: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            args, kwargs, inputs[layer] = without_hidden(args, kwargs)
            calls[layer] = Call(args, kwargs).map(lambda leaf: fixed if leaf is prefix else leaf)

        return hook

    hooks = (architecture.block(i).register_forward_pre_hook(keep(i), with_kwargs=True) for i in layers)
    with hooked(*hooks):
        architecture.base(
            input_ids=batch.ids.gather(1, columns),
            attention_mask=torch.cat([real, torch.ones_like(columns, dtype=torch.bool)], dim=1).long(),
            position_ids=columns,
            past_key_values=prefix,
            use_cache=True,
        )
    return tuple(calls[i] for i in layers), inputs[layers[0]]


def _at(hidden: Tensor, columns: Tensor) -> Tensor:
    """Positions `columns` (b, s) of hidden states (b, length, d)."""
    return hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[-1]))


def _prefix(states: Tensor, places: Tensor, real: Tensor) -> Tensor:
    """Keys or values (b, heads, length, width) at `places` (b, P), zero where a place is not `real`."""
    index = places.clamp_min(0)[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
    return states.gather(2, index) * real[:, None, :, None]


def is_plain_residual(architecture: Architecture, layer: int, inputs: Tensor, call: Call, output: Tensor) -> bool:
    """Whether a vector added to the MLP's output comes out of the block as it is.

    It does in most decoders; not where a norm or a factor follows the MLP (Gemma 2 and 3, OLMo 2, Granite). Tried out
    rather than known: a vector as long as the output is added, and must arrive up to rounding.
    """
    down = architecture.down(layer)
    vectors = output[:, 0].flip(-1).roll(1, -1)
    with hooked(down.register_forward_hook(_adder(vectors, inputs.shape))):
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


def without_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
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
        return leaf[rows]
    return leaf
