"""Fine-tuning methods on tiny models, with few and large steps, and requests for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from errata.editors import FTL
from errata.editors.core.request import EditRequest

REQUESTS = [
    EditRequest("The capital of {} is", "Varland", "Brast", id="one"),
    EditRequest("{} lies in", "São Verão", "Northern Tarvos", id="two"),
    EditRequest("The mother tongue of {} is", "Danielle Darrieux", "English, and nothing else", id="three"),
]
Make = Callable[..., Any]


def maker(make_tiny: Any, tokenizer: Any) -> Make:
    """Return `make(kind, architecture, **fields)`: an editor in float64."""

    def build(kind: Any, architecture: str = "gpt2", *, dtype: torch.dtype = torch.float64, **fields: Any) -> Any:
        bound = {"norm_constraint": 5e-4} if kind is FTL else {}
        settings = {"num_steps": 4, "lr": 0.01, "layers": (1,), **bound, **fields}
        return kind(make_tiny(architecture, dtype=dtype), tokenizer, kind.Config(**settings))

    return build
