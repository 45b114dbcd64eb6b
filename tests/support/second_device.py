"""A second device for machines that have one: whole models run on it, and mixing it with the CPU is an error.

    with elsewhere():
        model.to(ELSEWHERE)
        model(ids)                       # RuntimeError: expected all tensors on one device
        model(ids.to(ELSEWHERE))         # the CPU's numbers
        spread_out(other_model)          # all blocks but the first there, as device_map spreads a large model

Its tensors say that they are on the "lazy" device, which every build of torch knows and no one uses, and hold a tensor
of the CPU, on which each operation is carried out. As on a GPU, tensors without dimensions and index tensors may come
from the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from errata.editors.core.ledger import arithmetic, entry
from errata.editors.core.model.architecture import PLAIN_DTYPES, LinearMap, describe

ELSEWHERE = torch.device("lazy")
_COPY = ("_to_copy", "to", "copy_")
_INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")


class _There(Tensor):
    """A tensor of the second device."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> _There:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=ELSEWHERE,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Operations(TorchDispatchMode):
    """Carries out what concerns the second device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """What never becomes an operation: numbers into tensors, and back."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and _is_there(kwargs.get("device")):
            del kwargs["device"]
            return func(*args, **kwargs).to(ELSEWHERE)
        if func is Tensor.new_tensor and isinstance(args[0], _There):
            return args[0].inner.new_tensor(*args[1:], **kwargs).to(ELSEWHERE)
        if func is Tensor.__getitem__ and isinstance(args[0], _There) and isinstance(args[1], tuple):
            args = (args[0], tuple(torch.tensor(part) if isinstance(part, list) else part for part in args[1]))
        if func is Tensor.__getitem__ and isinstance(args[0], _There) and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1]))
        if func is Tensor.tolist and isinstance(args[0], _There):
            return args[0].inner.tolist()
        if func is Tensor.data_ptr and isinstance(args[0], _There):
            return args[0].inner.data_ptr()
        return func(*args, **kwargs)


@contextmanager
def elsewhere() -> Iterator[None]:
    """Inside, tensors and models can go to ELSEWHERE and back."""
    plain = arithmetic.plain_arithmetic

    def without_autocast(device_type: str) -> Any:  # which knows real devices only
        return plain("cpu" if device_type == ELSEWHERE.type else device_type)

    def is_plain(parameter: Tensor) -> bool:
        return type(parameter.detach()) in (Tensor, _There)

    def map_is_plain(found: LinearMap) -> bool:
        weight: Any = found.module.weight
        return is_plain(weight) and weight.dtype in PLAIN_DTYPES

    with (
        mock.patch.object(arithmetic, "plain_arithmetic", without_autocast),
        mock.patch.object(entry, "_is_plain", is_plain),
        mock.patch.object(LinearMap, "is_plain", property(map_is_plain)),
        _Literals(),
        _Operations(),
    ):
        yield


def spread_out(model: Any, *, blocks: torch.device | str = ELSEWHERE) -> None:
    """Put all blocks but the first on one device, and on the other what is left: embeddings, final norm and head, which
    may be tied. What a block is given is moved to it, as accelerate does."""
    architecture = describe(model)
    others = torch.device("cpu") if torch.device(blocks) == ELSEWHERE else ELSEWHERE

    def moved(device: torch.device | str) -> Callable[[Any], Any]:
        return lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf

    def to_block(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        return tree_map(moved(blocks), args), tree_map(moved(blocks), kwargs)

    model.to(others)
    for block in list(architecture.blocks)[1:]:
        block.to(blocks)
        block.register_forward_pre_hook(to_block, with_kwargs=True)
    architecture.tail[0].register_forward_pre_hook(lambda _module, args: tree_map(moved(others), args))


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == ELSEWHERE.type


def _run(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.removeprefix("aten::")  # type: ignore[attr-defined]
    leaves = list(_leaves(args, kwargs))
    _check_one_device(name, args, leaves)
    there = {id(t.inner): t for t in leaves if isinstance(t, _There)}
    asked = next((value for value in (*args, kwargs.get("device")) if isinstance(value, torch.device)), None)
    stays = _is_there(asked) if asked is not None else bool(there)
    if not there and not stays:
        return func(*args, **kwargs)

    def inner(value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device("cpu")
        return value.inner if isinstance(value, _There) else value

    def outer(value: Any) -> Any:
        if not isinstance(value, Tensor) or not stays:
            return value
        return there[id(value)] if id(value) in there else _There(value)

    plain = {key: _each(inner, value) for key, value in kwargs.items()}
    result = func(*(_each(inner, value) for value in args), **plain)
    return args[0] if name == "copy_" else _each(outer, result)


def _leaves(args: Any, kwargs: dict[str, Any]) -> Iterator[Any]:
    """Yield the arguments of an operation, and what those that are lists hold: they hold no further lists."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, list | tuple):
            yield from value
        else:
            yield value


def _each(function: Callable[[Any], Any], value: Any) -> Any:
    return type(value)(map(function, value)) if isinstance(value, list | tuple) else function(value)


def _check_one_device(name: str, args: Any, leaves: list[Any]) -> None:
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    there = [t for t in tensors if isinstance(t, _There)]
    here = [t for t in tensors if not isinstance(t, _There) and t.ndim > 0 and t.numel() > 0]
    if not there or not here or name in _COPY or (name in _INDEXED and isinstance(args[0], _There)):
        return
    raise RuntimeError(f"expected all tensors of {name} on one device, got {len(here)} on the CPU, {len(there)} not")
