"""Texts that are rewritten before a method trains on them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tuners import REQUESTS

from errata.editors import FTL, FTM, LocFT
from errata.editors.core.errors import RequestError
from errata.editors.core.request import EditRequest

FIELDS = {"num_steps": 2, "lr": 0.01, "layers": (1,)}
REQUEST = REQUESTS[0]


def update(kind: Any, model: Any, tokenizer: Any, request: EditRequest, rewriter: Any = None) -> torch.Tensor:
    (edit,) = kind(model, tokenizer, kind.Config(**FIELDS), rewriter=rewriter).compute([request])
    (found,) = edit.patch.updates.values()
    return found.delta


@pytest.mark.parametrize("kind", [FTL, FTM, LocFT])
def test_training_reads_the_rewritten_text_and_the_edit_is_of_the_request(
    kind: Any, make_tiny: Any, tiny_tokenizer: Any
) -> None:
    model, rewriter = make_tiny("gpt2"), "It is by the Ost. {}".format
    led_up_to = dataclasses.replace(REQUEST, prompt="It is by the Ost. The capital of {} is")
    own, rewritten = (update(kind, model, tiny_tokenizer, REQUEST, each) for each in (str, rewriter))
    assert torch.equal(own, update(kind, model, tiny_tokenizer, REQUEST))
    assert torch.equal(rewritten, update(kind, model, tiny_tokenizer, led_up_to))
    assert not torch.equal(own, rewritten)
    edit = kind(model, tiny_tokenizer, kind.Config(**FIELDS), rewriter=rewriter).apply(REQUEST)
    assert edit.requests == (REQUEST,)
    assert edit.diagnostics[0]["rewritten"] == "It is by the Ost. The capital of Varland is"
    edit.undo()
    assert "rewritten" not in kind(model, tiny_tokenizer, kind.Config(**FIELDS)).compute([REQUEST])[0].diagnostics[0]


@pytest.mark.parametrize("text", ["It is Oslen", "Brast", "", None])
def test_a_text_that_does_not_end_with_the_answer_is_refused(text: Any, make_tiny: Any, tiny_tokenizer: Any) -> None:
    editor = FTM(make_tiny("gpt2"), tiny_tokenizer, FIELDS, rewriter=lambda _: text)
    with pytest.raises(RequestError, match=r"one.*ends with the answer 'Brast'"):
        editor.compute([REQUEST])


def test_a_message_of_a_chat_is_not_rewritten(make_tiny: Any, tiny_tokenizer: Any) -> None:
    editor = FTM(make_tiny("gpt2"), tiny_tokenizer, FIELDS, rewriter=str)
    with pytest.raises(RequestError, match="chat"):
        editor.compute([dataclasses.replace(REQUEST, chat=True)])
