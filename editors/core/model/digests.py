"""Tensors as bytes, wherever a digest is taken of them."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor


def add_bytes(digest: Any, tensor: Tensor) -> None:
    """Let a digest of hashlib take in the elements of a tensor, in their order and as they lie on the CPU."""
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    add_bytes(digest, tensor)
    return digest.hexdigest()
