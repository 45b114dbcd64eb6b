"""Values of earlier edits: a sequence that stays the one-shot edit, and LyapLock's queue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quick_editors import REQUESTS, build

import errata
from errata.editors.core.brakes.past_values import Queue, factored
from errata.editors.core.errors import ConfigError
from errata.testing.laws import digest

FAMILY = ("memit", "emmet", "alphaedit")
# One layer and the bare prompt: then no edit changes what another one reads.
ALONE: dict[str, Any] = {"layers": (1,), "context_templates": ("{}",)}


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def make(make_tiny: Any, tiny_tokenizer: Any) -> Any:
    """A function that returns an editor whose values are those of the untouched model, whatever else it carries."""

    def make_editor(method: str, **fields: Any) -> Any:
        editor: Any = build(method, make_tiny("gpt2", dtype=torch.float64), tiny_tokenizer, **ALONE, **fields)
        held = dict(zip(REQUESTS, editor._searched(REQUESTS), strict=True))
        editor._searched = lambda requests: [held[request] for request in requests]
        return editor

    return make_editor


def change(editor: Any) -> torch.Tensor:
    name = editor.architecture.weight_name(1)
    return (editor.architecture.model.get_parameter(name) - editor.ledger.base(name)).detach().clone()


@pytest.mark.parametrize("method", ["memit", "alphaedit"])
def test_a_sequence_writes_what_one_batch_writes_also_after_an_undo(make: Any, method: str) -> None:
    editor = make(method, past_values=True)
    one_of_all = editor.apply(REQUESTS)
    wanted = change(editor)
    one_of_all.undo()
    with editor.applied([REQUESTS[0], REQUESTS[2]]):
        wanted_without_second = change(editor)
    for request in REQUESTS:
        editor.apply(request)
    torch.testing.assert_close(change(editor), wanted, rtol=1e-9, atol=1e-9)
    editor.rollback()
    editor.apply(REQUESTS[0])
    second = editor.apply(REQUESTS[1])
    second.undo()
    editor.apply(REQUESTS[2])
    torch.testing.assert_close(change(editor), wanted_without_second, rtol=1e-9, atol=1e-9)
    editor.rollback()
    assert not bool(change(editor).any())


def test_past_keys_alone_keep_what_an_undone_edit_has_pushed_others_to(make: Any) -> None:
    """Here the first edit is undone: the second one's update still leans on it."""
    found = []
    for fields in ({"past_keys": True}, {"past_values": True}):
        editor = make("memit", **fields)
        with editor.applied(REQUESTS[1:]):
            wanted = change(editor)
        first = editor.apply(REQUESTS[0])
        editor.apply(REQUESTS[1])
        first.undo()
        editor.apply(REQUESTS[2])
        found.append(float((change(editor) - wanted).norm() / wanted.norm()))
    assert found[0] > 1e-3
    assert found[1] < 1e-9


def test_the_term_of_the_papers_alone_does_not_give_the_one_shot_edit() -> None:
    """It leaves out what pulls the sum of all changes to zero, and so lets the weights move on."""
    d, penalty = 8, 3.0
    k, K, V = numbers(d, 1), numbers(d, 1, seed=1), numbers(4, 2, seed=2)
    S = penalty * torch.eye(d, dtype=torch.float64)
    D = V[:, :1] @ k.T @ torch.linalg.inv(S + k @ k.T)
    both = torch.cat([k, K], dim=1)
    inverse = torch.linalg.inv(S + both @ both.T)
    one = V @ both.T @ inverse
    keys = D + (V[:, 1:] - D @ K) @ K.T @ inverse
    term = keys + (V[:, :1] - D @ k) @ k.T @ inverse
    torch.testing.assert_close(keys, one, rtol=1e-9, atol=1e-9)
    assert float((term - one).norm()) > 0.05 * float(one.norm())
    torch.testing.assert_close(term - D @ S @ inverse, one, rtol=1e-9, atol=1e-9)


def test_the_queue_grows_above_the_bound_and_never_falls_below_one() -> None:
    queue = Queue.first(2.0, 1.5)
    assert queue is not None
    assert queue.strength == 1.0
    assert queue.after(1.0).strength == 1.0
    longer = queue.after(6.0)
    assert longer.strength == pytest.approx(1 + (6 - 3) / 3)
    assert longer.after(0.0).strength == pytest.approx(1.0)
    assert Queue.first(0.0, 1.5) is None


@pytest.mark.parametrize("method", FAMILY)
def test_lyaplock_pulls_drift_back_and_an_unreachable_bound_leaves_the_queue_at_one(make: Any, method: str) -> None:
    drifts = []
    for alpha in (1e-3, 1e6):
        editor = make(method, lyaplock=alpha)
        for request in REQUESTS:
            edit = editor.apply(request)
            assert edit.diagnostics[0]["update_rank"][0] <= len(editor.ledger)
        assert (editor.strength(1) > 1) == (alpha < 1)
        drifts.append(float(change(editor).norm()))
    assert drifts[0] < drifts[1]


@pytest.mark.parametrize("method", FAMILY)
def test_such_edits_are_saved_and_undone_to_the_bit(
    make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path, method: str
) -> None:
    model, other = make_tiny("llama"), make_tiny("llama")
    editor = build(method, model, tiny_tokenizer, past_values=True, lyaplock=1.5, rect=0.5)
    before = digest(model)
    edits = [editor.apply(request) for request in REQUESTS[:2]]
    after = digest(model)
    errata.save_edits(model, tmp_path / "edits")
    errata.load_ledger(tmp_path / "edits", other)
    assert digest(other) == after
    for edit in edits:
        edit.undo()
    assert digest(model) == before


def test_what_cannot_be_combined_is_refused(make_tiny: Any, tiny_tokenizer: Any) -> None:
    for method, fields in (
        ("memit", {"past_keys": False, "past_values": True}),
        ("emmet", {"lyaplock": 2.0, "mom2_dtype": "float32"}),
        ("coachhook", {"past_values": True}),
        ("coachhook", {"lyaplock": 2.0}),
        ("memit", {"lyaplock": 0.0}),
    ):
        with pytest.raises(ConfigError):
            build(method, make_tiny("gpt2"), tiny_tokenizer, **fields)


def test_a_matrix_is_kept_as_factors_of_its_rank_and_whole_where_that_does_not_suffice() -> None:
    matrix = numbers(12, 3) @ numbers(3, 20, seed=1)
    assert factored(matrix, 3, 1e-10).U.shape == (12, 3)
    assert factored(matrix, 2, 1e-10).U.shape == (12, 4)
    for rank, whole in ((3, matrix), (1, matrix), (5, numbers(12, 20))):
        torch.testing.assert_close(factored(whole, rank, 1e-10).matrix(torch.float64, whole.device), whole)


@pytest.mark.parametrize("method", ["memit", "alphaedit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_a_plain_sequence_nothing_but_rounding_is_to_be_brought_back_and_updates_stay_small(
    make_tiny: Any, tiny_tokenizer: Any, method: str, dtype: torch.dtype
) -> None:
    editor: Any = build(method, make_tiny("gpt2", dtype=dtype), tiny_tokenizer, **ALONE, past_values=True)
    for request in REQUESTS:
        assert editor.apply(request).diagnostics[0]["update_rank"][0] == 1
    editor.ledger.remove_many([editor.ledger.entries[1].id])
    assert editor.apply(REQUESTS[1]).diagnostics[0]["update_rank"][0] == len(editor.ledger) == 3
