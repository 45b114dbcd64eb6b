"""What an edit by GRACE depends on: seed, request, earlier edits, and those that are made with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grace_edits
import pytest
import torch
from everyday import triples
from grace_edits import ASKED, LONG, MODES, REQUESTS, answers, book_of, logits
from torch import Tensor

from errata.editors.core.model.tokens import answer_ids, prompt_ids
from errata.editors.core.request import EditRequest
from errata.editors.grace import GRACE


@pytest.fixture
def make(make_tiny: Any, tiny_tokenizer: Any) -> Callable[..., GRACE]:
    return grace_edits.maker(make_tiny, tiny_tokenizer)


def test_keys_are_copied_as_often_as_they_double_and_all_that_is_held_is_counted(make: Any) -> None:
    editor = make(n_iter=1, eps=1e-3)
    memories = []
    for i in range(20):
        asked = [EditRequest("The capital of {} is", f"Varland {2 * i + j}", "of") for j in range(2)]
        editor.apply(asked[0])
        editor.apply(asked)
        memories.append(book_of(editor).rows.memory)
    assert len(book_of(editor).slots) >= 40
    assert len({id(memory) for memory in memories}) <= 4
    states = editor.ledger._stacks[editor.module_name].states
    assert len({state.radii.data_ptr() for _, state in states}) == len(states) > 1
    radii, slack = (sum(getattr(state, name).nbytes for _, state in states) for name in ("radii", "slack"))
    factors = sum(tensor.nbytes for entry in editor.ledger.entries for _, tensor in entry.patch.tensors)
    keys = {memory.matrix.data_ptr(): memory.matrix.nbytes for memory in (state.rows.memory for _, state in states)}
    assert editor.ledger.nbytes() >= radii + slack + factors + sum(keys.values())


def test_a_cold_value_depends_on_seed_and_request_alone(make: Any) -> None:
    def start(editor: GRACE, request: EditRequest = REQUESTS[0]) -> Tensor:
        return editor.cold_start(request)

    fresh, used = make(), make()
    used.apply(REQUESTS[1:])
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert torch.equal(start(fresh), start(used))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(start(fresh), start(make(seed=1)))
    assert not torch.equal(start(fresh), start(fresh, REQUESTS[1]))
    assert 0 <= float(start(fresh).min()) < 0.1
    assert 0.9 < float(start(fresh).max()) < 1


def test_a_warm_value_begins_at_the_output_of_the_module(make: Any) -> None:
    editor = make(val_init="warm", n_iter=1)
    clean = logits(editor, ASKED[0])
    (edit,) = editor.compute(REQUESTS[0])
    ids = answer_ids(editor.tokenizer, "x", REQUESTS[0].target)
    with torch.no_grad():
        rows = torch.tensor([[*prompt_ids(editor.tokenizer, ASKED[0]), *ids[:-1]]])
        log_p = editor.model(input_ids=rows).logits[0, len(clean) - 1 :].log_softmax(-1)
    untouched = -float(log_p.gather(1, torch.tensor(ids)[:, None]).mean())
    assert edit.diagnostics[0]["losses"][0] == pytest.approx(untouched, rel=1e-9)


# Batches whose requests concern each other, with fields and the waves in which they are trained.
VARLAND = REQUESTS[0]
BEHIND = EditRequest("The capital of Varland is near and {} lies in", "São Verão", "in")
BATCHES: dict[str, tuple[list[EditRequest], dict[str, Any], list[int]]] = {
    "far from each other": ([*REQUESTS[:2], LONG], {}, [3]),
    # With this radius every prompt is near every other.
    "different answers near each other": ([*REQUESTS[:2], LONG], {"eps": 100.0}, [2, 1]),
    "one answer for prompts near each other": (
        [EditRequest(text, "Varland", "of") for text in ("The capital of {} is", "{} has its capital at", "In {}")],
        {"eps": 100.0},
        [1, 1, 1],
    ),
    "a prompt within another's": ([VARLAND, BEHIND, REQUESTS[1]], {}, [2, 1]),
    "a prompt within an earlier one": ([BEHIND, VARLAND], {}, [2]),
    "a prompt within another's and its answer": (
        [VARLAND, EditRequest("The {}", "capital", "of Varland is near")],
        {},
        [1, 1],
    ),
}
# Made before the batch. A row of it may pass this one's prompt; where it reaches far, the batch takes of its radius.
OLDER = EditRequest("The capital of {} is near", "Varland", "of", id="older")


@pytest.mark.parametrize(
    ("batch", "replacement", "model"), triples(tuple(BATCHES), tuple(MODES), ("untouched model", "edited model"))
)
def test_requests_made_together_are_what_they_are_one_after_another(
    make: Any, batch: str, replacement: str, model: str
) -> None:
    requests, fields, _ = BATCHES[batch]
    older = [OLDER] if model == "edited model" else []
    editor, other = (make(n_iter=8, replacement=replacement, **fields) for _ in range(2))
    for request in older:
        editor.apply(request)
        other.apply(request)
    edit = editor.apply(requests)
    apart = [other.apply(request) for request in requests]
    assert [report["rule"] for report in edit.diagnostics] == [one.diagnostics[0]["rule"] for one in apart]
    assert book_of(editor).tensors.keys() == book_of(other).tensors.keys()
    for name, tensor in book_of(editor).tensors.items():
        torch.testing.assert_close(tensor, book_of(other).tensors[name], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("batch", BATCHES)
def test_requests_that_need_nothing_of_each_other_are_trained_at_once(
    make: Any, monkeypatch: pytest.MonkeyPatch, batch: str
) -> None:
    requests, fields, trained = BATCHES[batch]
    seen: list[int] = []
    real = GRACE._train
    monkeypatch.setattr(GRACE, "_train", lambda self, asked: seen.append(len(asked)) or real(self, asked))
    make(n_iter=1, **fields).apply(requests)
    assert seen == trained


def test_a_value_trained_behind_another_s_key_is_another_value(make: Any) -> None:
    """The control: what a row meets on its way matters."""
    editor = make(n_iter=8)
    (alone,) = editor.compute(BEHIND)
    edit = editor.apply([VARLAND, BEHIND])
    values = [each.patch.adapters[editor.module_name].tensors["values"][-1] for each in (alone, edit)]
    assert float((values[0] - values[1]).norm() / values[0].norm()) > 1e-3


def test_a_second_prompt_with_the_same_answer_goes_on_from_the_first_one_s_value(make: Any) -> None:
    editor = make(eps=100.0, n_iter=1, edit_lr=1e-12)
    first = EditRequest("The capital of {} is", "Varland", "of")
    near = EditRequest("{} has its capital at", "Varland", "of")
    editor.apply(first)
    edit = editor.apply(near)
    assert edit.diagnostics[0]["rule"] == "keep"
    torch.testing.assert_close(
        edit.patch.adapters[editor.module_name].tensors["values"][0], editor.cold_start(first), rtol=0, atol=1e-9
    )
    assert len(book_of(editor).slots) == 1


def test_another_method_s_edit_is_in_effect_while_a_value_is_trained(make: Any) -> None:
    from errata.editors import ROME

    editor = make()
    rome = ROME(editor.model, editor.tokenizer, {"layers": [0], "mom2_adjustment": False, "v_num_grad_steps": 4})
    rome.apply(REQUESTS[1])
    editor.apply(REQUESTS[0])
    assert answers(editor, REQUESTS[0])
