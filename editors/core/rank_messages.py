"""What the processes of one run send each other, as bytes: JSON for plain values and records, safetensors for tensors.

    unpacked(packed([Target(v0, delta), {"nll": 0.1}, NumericalError("no number")]))      # the same again

Nothing is pickled. What arrives can become a plain value, a tensor of the CPU, an error, or a dataclass, and only of a
class that this process has loaded.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import safetensors.torch
from torch import Tensor

_HEAD = 8  # bytes of the length of the JSON part, which stands before the tensors
# What the first entry of a JSON list says about the rest.
_LIST, _TUPLE, _DICT, _TENSOR, _RECORD, _ERROR = "list", "tuple", "dict", "tensor", "record", "error"


def packed(value: Any) -> bytes:
    """Return a value as bytes.

    Raises:
        TypeError: It holds something that is neither plain nor a tensor, a dataclass or an error.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_plain(value, tensors)).encode()
    return len(tree).to_bytes(_HEAD, "little") + tree + safetensors.torch.save(tensors)


def unpacked(message: bytes) -> Any:
    """Return the value that `packed` was given.

    Raises:
        TypeError: It names a class that this process has not loaded, or that is no dataclass and no error.
    """
    start = _HEAD + int.from_bytes(message[:_HEAD], "little")
    return _value(json.loads(message[_HEAD:start]), safetensors.torch.load(message[start:]))


def _plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return a value as JSON, and put its tensors into `tensors`."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()  # safetensors refuses tensors that share memory
        return [_TENSOR, name]
    if isinstance(value, list | tuple):
        return [_LIST if isinstance(value, list) else _TUPLE, *(_plain(item, tensors) for item in value)]
    if isinstance(value, Mapping):
        return [_DICT, *([_plain(key, tensors), _plain(item, tensors)] for key, item in value.items())]
    if isinstance(value, Exception):
        about = {name: item for name, item in vars(value).items() if isinstance(item, str | int | float | None)}
        # Behind `__reduce__` stands what the class is made with, such as the path of an OSError, which `args` has not.
        words = [item if type(item) in (int, str) else str(item) for item in value.__reduce__()[1]]
        return [_ERROR, *_name(type(value)), words, about]
    if is_dataclass(value) and not isinstance(value, type):
        own = {each.name: _plain(getattr(value, each.name), tensors) for each in fields(value)}
        return [_RECORD, *_name(type(value)), own]
    raise TypeError(f"expected plain values, tensors, dataclasses or errors to send to other processes, got {value!r}")


def _value(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(tree, list):
        return tree
    kind, *rest = tree
    if kind == _TENSOR:
        return tensors[rest[0]]
    if kind in (_LIST, _TUPLE):
        items = [_value(item, tensors) for item in rest]
        return items if kind == _LIST else tuple(items)
    if kind == _DICT:
        return {_value(key, tensors): _value(item, tensors) for key, item in rest}
    cls = _loaded(rest[0], rest[1])
    if kind == _RECORD and is_dataclass(cls):
        return cls(**{name: _value(item, tensors) for name, item in rest[2].items()})
    if kind == _ERROR and issubclass(cls, Exception):
        error = cls.__new__(cls, *rest[2])  # `__init__` would put the record in front of the message again
        vars(error).update(rest[3])
        return error
    raise TypeError(f"expected a dataclass or an error, got {rest[0]}.{rest[1]}")


def _name(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


def _loaded(module: str, name: str) -> type:
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type):
        raise TypeError(f"expected a class that is loaded here, got {module}.{name}")
    return found
