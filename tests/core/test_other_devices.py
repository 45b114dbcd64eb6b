"""Edits and what keeps them when the model is on another device, or in another precision, than it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from second_device import ELSEWHERE, elsewhere
from torch import Tensor

from errata.editors.core.codebook.codebook import Codebook
from errata.editors.core.ledger.adapter_hooks import Hook
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import LowRank, Patch
from errata.editors.core.loading import export_lora
from errata.editors.core.model.architecture import describe
from errata.editors.core.model.tokens import answer_ids, prompt_ids
from errata.editors.core.request import EditRequest
from errata.editors.core.storage.journal import Journal
from errata.editors.core.storage.lora_export import WEIGHTS
from errata.editors.grace import GRACE
from errata.testing.laws import digest

FIRST = EditRequest("The capital of {} is", "Varland", "of", id="first")
SECOND = EditRequest("The mother tongue of {} is", "Danielle Darrieux", "is", id="second")
CORRECTED = EditRequest("The capital of {} is", "Varland", "the", id="corrected")
FAR = "Who plays the lyre in Quelm?"
FIELDS: dict[str, Any] = {"layers": [1], "n_iter": 40, "edit_lr": 0.5, "eps": 0.2}


@pytest.fixture(
    params=[
        pytest.param("elsewhere", id="elsewhere"),
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
    ]
)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A second device: one that is made up (elsewhere.py), and a GPU where there is one."""
    if request.param == "cuda":
        yield torch.device("cuda")
        return
    with elsewhere():
        yield ELSEWHERE


@pytest.fixture
def make(make_tiny: Any, tiny_tokenizer: Any) -> Callable[..., GRACE]:
    def make(dtype: torch.dtype = torch.float32, **fields: Any) -> GRACE:
        return GRACE(make_tiny("gpt2", dtype=dtype), tiny_tokenizer, {**FIELDS, **fields})

    return make


def again(editor: GRACE) -> GRACE:
    """An editor of the model as it is now."""
    return GRACE(editor.model, editor.tokenizer, editor.config)


def logits(editor: GRACE, text: str) -> Tensor:
    """Behind the last token, on the CPU."""
    model: Any = editor.model
    ids = torch.tensor([prompt_ids(editor.tokenizer, text)]).to(next(model.parameters()).device)
    with torch.no_grad():
        return model(input_ids=ids).logits[0, -1].cpu()


def answers(editor: GRACE, request: EditRequest) -> bool:
    """Whether the answer, of one token, is the model's first choice."""
    (wanted,) = answer_ids(editor.tokenizer, "x", request.target)
    return int(logits(editor, request.text).argmax()) == wanted


def book_of(editor: GRACE) -> Codebook:
    book = editor.ledger.folded(editor.module_name)
    assert isinstance(book, Codebook)
    return book


def book_at_work(editor: GRACE) -> Codebook:
    """The one that the module's hook calls."""
    (hook,) = (hook for hook in editor.module._forward_hooks.values() if isinstance(hook, Hook))
    assert isinstance(hook.folded, Codebook)
    return hook.folded


def test_the_made_up_device_refuses_to_be_mixed_with_the_cpu() -> None:
    here = torch.arange(3.0)
    with elsewhere():
        there = here.to(ELSEWHERE)
        assert there.device == (there + there).device == ELSEWHERE
        assert (2 * there).cpu().tolist() == [0, 2, 4]
        assert torch.tensor([1.0], device=ELSEWHERE).tolist() == there.new_tensor([1.0]).tolist() == [1]
        there[1:].add_(1)
        assert there[torch.tensor([1, 2])].tolist() == [2, 3]
        for mixed in (lambda: there + here, lambda: torch.stack([here, there]), lambda: here[there.long()]):
            with pytest.raises(RuntimeError, match="on one device"):
                mixed()


# --- exports ------------------------------------------------------------------------------------------------------


def test_edits_made_on_two_devices_are_exported_as_one_adapter(
    make_tiny: Any, device: torch.device, tmp_path: Path
) -> None:
    """One was made where the model is, and the other where it was before."""
    model = make_tiny("gpt2")
    name, drawn = describe(model).weight_name(1), torch.Generator().manual_seed(0)
    d_out, d_in = describe(model).weight(1).shape
    updates = [LowRank(torch.randn(d_out, 1, generator=drawn), torch.randn(1, d_in, generator=drawn)) for _ in range(2)]
    for i, update in enumerate(updates):
        Ledger.of(model).append(str(i), Patch({name: update}))
    export_lora(model, tmp_path / "here")
    Ledger.of(model).clear()
    Ledger.of(model).append("0", Patch({name: updates[0]}))
    Ledger.of(model).append("1", Patch({name: LowRank(updates[1].U.to(device), updates[1].V.to(device))}))
    export_lora(model, tmp_path / "there")
    here, there = (load_file(tmp_path / place / WEIGHTS) for place in ("here", "there"))
    torch.testing.assert_close(there, here)


# --- GRACE --------------------------------------------------------------------------------------------------------


def test_a_codebook_follows_its_model_and_grows_there(make: Any, device: torch.device) -> None:
    editor = make()
    base, far = digest(editor.model), logits(editor, FAR)
    first = editor.apply(FIRST)
    said = logits(editor, FIRST.text)
    editor.model.to(device)
    torch.testing.assert_close(logits(editor, FIRST.text), said, rtol=1e-4, atol=1e-4)
    assert {tensor.device.type for tensor in book_at_work(editor).tensors.values()} == {device.type}
    moved = again(editor)
    corrected, second = moved.apply(CORRECTED), moved.apply(SECOND)
    assert corrected.diagnostics[0]["rule"] == "revise"
    assert {tensor.device.type for tensor in book_of(moved).tensors.values()} == {device.type}
    assert answers(moved, CORRECTED)
    assert answers(moved, SECOND)
    torch.testing.assert_close(logits(moved, FAR), far, rtol=1e-4, atol=1e-4)
    corrected.undo()
    assert answers(moved, FIRST)
    assert answers(moved, SECOND)
    moved.model.to("cpu")
    assert answers(moved, SECOND)
    first.undo()
    second.undo()
    assert digest(moved.model) == base


def test_a_journal_written_on_the_cpu_goes_on_elsewhere(make: Any, device: torch.device, tmp_path: Path) -> None:
    editor = make()
    edits = [editor.apply(request) for request in (FIRST, SECOND)]
    journal = Journal.open(tmp_path / "edits", {"name": "tiny"})
    for entry in editor.ledger.entries:
        journal.append(entry, {}, editor.ledger)
    resumed = make()
    resumed.model.to(device)
    records = list(Journal(tmp_path / "edits").records())
    Ledger.of(resumed.model).extend([record.entry for record in records if record.entry])
    resumed = again(resumed)
    corrected = resumed.apply(CORRECTED)  # before any forward pass
    assert corrected.diagnostics[0]["rule"] == "revise"
    assert answers(resumed, CORRECTED)
    assert answers(resumed, SECOND)
    # Undoing the oldest makes the codebook anew, of a record from the file and one from here.
    resumed.ledger.remove(edits[0].id)
    assert answers(resumed, CORRECTED)
    assert answers(resumed, SECOND)
    corrected.undo()
    assert answers(resumed, SECOND)


PRECISE = (torch.float32, torch.float64)


@pytest.mark.parametrize("now", [*PRECISE, torch.bfloat16], ids=str)
@pytest.mark.parametrize("then", [*PRECISE, torch.bfloat16], ids=str)
def test_a_codebook_goes_on_when_the_model_is_turned_into_another_dtype(
    make: Any, then: torch.dtype, now: torch.dtype
) -> None:
    """Between float32 and float64 a prompt that is corrected once more is also known to be the same, although its query
    is not what it was. In bfloat16 the weights are other weights."""
    editor = make(then)
    editor.apply(FIRST)
    editor.model.to(now)
    assert answers(editor, FIRST)
    turned = again(editor)
    corrected = turned.apply(CORRECTED)
    assert answers(turned, CORRECTED)
    if {then, now} <= {*PRECISE}:
        assert corrected.diagnostics[0]["rule"] == "revise"
        assert len(book_of(turned).slots) == 1
    turned.apply(SECOND)
    assert answers(turned, SECOND)
    assert answers(turned, CORRECTED)
