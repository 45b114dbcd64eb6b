"""Models under `torch.compile` and `torch.autocast`: edits reach the first, and do not feel the second."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from everyday import pairs
from quick_editors import METHODS, REQUESTS, build
from torch import Tensor

import errata
from errata.editors.core.editor import Editor
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.model.tokens import prompt_ids
from errata.testing.laws import digest


@pytest.fixture(autouse=True)
def _nothing_stays_compiled() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


# Of one length, so that only an edit or its undoing can ask for another compilation.
SAME_LENGTH = (
    errata.EditRequest("The capital of {} is", "Varland", "Brast"),
    errata.EditRequest("The capital of {} is", "Seattle", "English", "French"),
    errata.EditRequest("The twin city of {} is", "Danielle", "Northern Tarvos"),
)
FORMS = {"torch.compile(model)": lambda model: torch.compile(model, backend="eager"), "model.compile()": in_place}


@torch.no_grad()
def logits(model: Any, editor: Editor, request: errata.EditRequest) -> Tensor:
    return model(torch.tensor([prompt_ids(editor.tokenizer, request.text)])).logits


@pytest.mark.parametrize(("method", "form"), pairs(("grace", "rome"), tuple(FORMS)))
def test_edits_and_undo_reach_compiled_forwards(make_tiny: Any, tiny_tokenizer: Any, method: str, form: str) -> None:
    first, second, third = SAME_LENGTH
    assert len({len(prompt_ids(tiny_tokenizer, request.text)) for request in SAME_LENGTH}) == 1
    editor = build(method, make_tiny("gpt2", n_layers=2), tiny_tokenizer)
    twin = build(method, copy.deepcopy(editor.model), tiny_tokenizer)
    compiled = FORMS[form](editor.model)
    unedited = logits(compiled, editor, first)  # compiles it without any hook
    edits, wanted = [], []
    for request in (first, second):
        edits.append(editor.apply(request))
        wanted.append(twin.apply(request))
        assert edits[-1].id == wanted[-1].id, "the editor worked on something else than the uncompiled forward"
        for asked in SAME_LENGTH:
            assert torch.equal(logits(compiled, editor, asked), logits(twin.model, twin, asked))
    assert not torch.equal(logits(compiled, editor, first), unedited)
    with editor.ledger.untouched():
        assert torch.equal(logits(compiled, editor, first), unedited)
    for mine, theirs in zip(edits, wanted, strict=True):
        mine.undo()
        theirs.undo()
        for asked in SAME_LENGTH:
            assert torch.equal(logits(compiled, editor, asked), logits(twin.model, twin, asked))
    assert torch.equal(logits(compiled, editor, first), unedited)
    with editor.applied(third):
        assert not torch.equal(logits(compiled, editor, third), logits(twin.model, twin, third))


def test_what_compile_returns_has_the_ledger_of_its_model(make_tiny: Any, tiny_tokenizer: Any) -> None:
    model = make_tiny("gpt2")
    compiled: Any = torch.compile(model, backend="eager")
    editor = build("rome", compiled, tiny_tokenizer)
    edit = editor.apply(REQUESTS[0])
    assert editor.ledger is Ledger.of(compiled) is Ledger.of(model)
    assert all(name in dict(model.named_parameters()) for name in edit.patch.updates)
    errata.edit_of(compiled, edit.id).undo()
    assert len(Ledger.of(model)) == 0


@pytest.mark.parametrize("method", METHODS)
def test_autocast_around_a_method_changes_no_bit_of_its_edits(make_tiny: Any, tiny_tokenizer: Any, method: str) -> None:
    model = make_tiny("gpt2")
    outside, inside = (build(method, copy.deepcopy(model), tiny_tokenizer) for _ in range(2))
    wanted = [outside.compute(REQUESTS[0])[0].id, outside.apply(REQUESTS).id]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = [inside.compute(REQUESTS[0])[0].id, (edit := inside.apply(REQUESTS)).id]
        assert torch.is_autocast_enabled("cpu")
    assert got == wanted
    assert digest(inside.model) == digest(outside.model)
    assert edit.diagnostics[0]["precision"] == "float32"
    edit.undo()
