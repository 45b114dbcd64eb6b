"""GRACE on tiny models: requests that it can learn there, and what its model says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from errata.editors.core.codebook.codebook import Codebook
from errata.editors.core.model.tokens import answer_ids, prompt_ids
from errata.editors.core.request import EditRequest
from errata.editors.grace import GRACE
from errata.evaluate.generation import continuations

MODES = ("replace_last", "replace_all", "replace_prompt")
# Of one token each: a random model of this width learns no more from one value. The last has several.
REQUESTS = (
    EditRequest("The capital of {} is", "Varland", "of"),
    EditRequest("The mother tongue of {} is", "Danielle Darrieux", "is"),
    EditRequest("{} lies in", "São Verão", "in"),
)
LONG = EditRequest("{} lies in", "São Verão", "Northern Tarvos")
FIELDS: dict[str, Any] = {"layers": [1], "n_iter": 40, "edit_lr": 0.5, "eps": 0.2}
ASKED = [request.text for request in REQUESTS]
FAR = "Who plays the lyre in Quelm?"


def maker(make_tiny: Callable[..., Any], tokenizer: Any) -> Callable[..., GRACE]:
    """Return a function that makes an editor on a new tiny model."""

    def make(architecture: str = "gpt2", dtype: torch.dtype = torch.float64, **fields: Any) -> GRACE:
        return GRACE(make_tiny(architecture, dtype=dtype), tokenizer, {**FIELDS, **fields})

    return make


def book_of(editor: GRACE) -> Codebook:
    book = editor.ledger.folded(editor.module_name)
    assert isinstance(book, Codebook)
    return book


def logits(editor: GRACE, text: str) -> Tensor:
    """Behind every token of a text, (length, V)."""
    with torch.no_grad():
        return editor.model(input_ids=torch.tensor([prompt_ids(editor.tokenizer, text)])).logits[0]


def answers(editor: GRACE, request: EditRequest) -> bool:
    """Whether the model says the request's answer, token for token, by itself."""
    (said,) = continuations(editor.model, editor.tokenizer, [request.text], 8)
    wanted = answer_ids(editor.tokenizer, "x", request.target)
    return list(said.ids[: len(wanted)]) == wanted
