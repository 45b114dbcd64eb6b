"""SHA-256 digests of tensors and of plain values, the same on every machine."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor


def add_bytes(digest: Any, tensor: Tensor) -> None:
    """Feed the elements of a tensor to a digest of hashlib, in their order and as they lie on the CPU."""
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def tensor_digest(tensor: Tensor) -> str:
    """Return the SHA-256 of dtype, shape and bytes, in hex."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    add_bytes(digest, tensor)
    return digest.hexdigest()


def json_digest(content: Any) -> str:
    """Return the SHA-256 of plain values as JSON with sorted keys, in hex; other objects count by their `str`."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
