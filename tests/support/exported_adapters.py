"""Adapters that PEFT opens without a complaint, and the weights of models."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@contextmanager
def complaints_are_errors() -> Iterator[None]:
    """PEFT only warns of an adapter that does not fit."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


def opened(model: Any, folder: Path) -> Any:
    """Open an adapter on a model with PEFT."""
    import peft

    with complaints_are_errors():
        return peft.PeftModel.from_pretrained(model, str(folder)).eval()
