"""How a model calls its blocks: the arguments of a call, recorded so that a block can run again without the model.

The modules of transformers run unmodified: each block gets the arguments that the model itself gives it. Its cache
object returns a fixed prefix followed by the new keys and values, and autograd flows through.

Shapes: b rows, s positions, P longest prefix, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class PrefixCache:
    """Keys and values of a fixed prefix, behind the cache interface that attention modules use.

    Each layer gets room for prefix and suffix at its first call. Later calls write the suffix there and copy nothing
    else. So a forward must have had its backward before the next forward begins.
    """

    is_compileable = False

    def __init__(self, layers: dict[int, tuple[Tensor, Tensor]]) -> None:
        self._layers = layers
        self._room: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return the prefix followed by the new keys and values (b, heads, s, width), through which gradients flow."""
        if layer not in self._room:
            old_keys, old_values = self._layers[layer]
            room = _with_room(old_keys, keys), _with_room(old_values, values)
            length = old_keys.shape[-2]
            self._room[layer] = room
            self._layers[layer] = room[0][..., :length, :], room[1][..., :length, :]
        full_keys, full_values = self._room[layer]
        # Aliases, because what is written into becomes a part of this forward's graph.
        return _Written.apply(full_keys.detach(), keys), _Written.apply(full_values.detach(), values)

    def get_seq_length(self, _layer: int = 0) -> int:
        return next(iter(self._layers.values()))[0].shape[-2]

    def select(self, rows: Tensor) -> PrefixCache:
        return PrefixCache({i: (k[rows.to(k.device)], v[rows.to(v.device)]) for i, (k, v) in self._layers.items()})


class _Written(torch.autograd.Function):
    """Writes the suffix (b, heads, s, width) at the end of `full` (b, heads, P + s, width), in place."""

    @staticmethod
    def forward(ctx: Any, full: Tensor, suffix: Tensor) -> Tensor:
        ctx.length = suffix.shape[-2]
        full[..., -ctx.length :, :].copy_(suffix)
        ctx.mark_dirty(full)
        return full

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0][..., -ctx.length :, :]


def _with_room(prefix: Tensor, suffix: Tensor) -> Tensor:
    """Return a tensor that begins with the prefix and has room for the suffix behind it."""
    length = prefix.shape[-2]
    full = prefix.new_empty(*prefix.shape[:-2], length + suffix.shape[-2], prefix.shape[-1])
    full[..., :length, :] = prefix
    return full


@dataclass(frozen=True)
class BlockCall:
    """The arguments that the model gives to one block for the suffix, without the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def map(self, function: Callable[[Any], Any]) -> BlockCall:
        """Return the call with `function` applied to every leaf of its arguments."""
        return BlockCall(_mapped(self.args, function), _mapped(self.kwargs, function))


def select_rows(calls: Sequence[BlockCall], rows: Tensor, count: int) -> tuple[BlockCall, ...] | None:
    """Return the calls for some of their `count` rows, or None if an argument cannot be split by rows.

    What several calls share, such as a mask or the cache, is split once and shared again.
    """
    if not all(_splits(leaf, count) for call in calls for leaf in _leaves((call.args, call.kwargs))):
        return None
    done: dict[int, Any] = {}

    def selected(leaf: Any) -> Any:
        if id(leaf) not in done:
            done[id(leaf)] = _selected(leaf, rows, count)
        return done[id(leaf)]

    return tuple(call.map(selected) for call in calls)


@contextmanager
def skip_blocks(blocks: Sequence[nn.Module], form: Sequence[Any]) -> Iterator[None]:
    """Replace the forward of `blocks`, inside the `with`, by one that returns its hidden state unchanged.

    Args:
        blocks: The blocks to skip.
        form: Its first item is a block's return value, whose form (tensor or tuple) skipped blocks copy. The list may
            be filled later, but before the first skipped block is called.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = split_hidden(args, kwargs)[2]
        return type(form[0])((hidden, *form[0][1:])) if isinstance(form[0], (tuple, list)) else hidden

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


def hidden_of(output: Any) -> Tensor:
    """Return the hidden state of a block's output: some blocks return it alone, others as the first item of a tuple."""
    return output[0] if isinstance(output, (tuple, list)) else output


def split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """Split a block's arguments into (args, kwargs) without the hidden state, and the hidden state."""
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
