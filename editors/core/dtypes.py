"""The precision that a computation runs in, given the precision of the weights."""

from __future__ import annotations

import torch


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of values, losses and factors for weights of `dtype`.

    It is float64 for float64 weights and float32 for all others, so that half precision is worked on in float32.
    """
    return dtype if dtype == torch.float64 else torch.float32
