"""MEMOIR's keys and routes by hand, and its factors beside a matrix that is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quick_editors import REQUESTS, build
from torch import nn

from errata.editors.core.errors import LedgerError
from errata.editors.core.ledger.patch import LowRank
from errata.editors.core.model.activations import run_until_captured
from errata.editors.core.model.tokens import prompt_ids, right_padded
from errata.editors.core.side_memory.key_masks import NONE, KeyedUpdate, bits_of, key_of
from errata.editors.core.side_memory.side_editor import SideRows


def _record(key: list[int], mask: list[int], value: float = 1.0, threshold: float = 0.5) -> KeyedUpdate:
    keys, masks = torch.zeros(1, 5, dtype=torch.bool), torch.zeros(1, 5, dtype=torch.bool)
    keys[0, key], masks[0, mask] = True, True
    V = torch.zeros(1, 5)
    V[0, mask] = value
    return KeyedUpdate(LowRank(torch.ones(2, 1), V), bits_of(keys), bits_of(masks), torch.zeros(5), 2, threshold)


def test_a_row_gets_the_columns_of_the_edit_whose_key_it_shares_most_of() -> None:
    memory = KeyedUpdate.folded([_record([0, 3], [1, 2]), _record([1, 4], [2, 4], 10.0)])
    x = torch.zeros(5, 1, 5)
    for row, largest in enumerate([(0, 3), (0, 1), (2, 4), (2, 3), (2, 2)]):
        x[row, 0, list(largest)] = 2.0
        x[row, 0, 2] += 1.0  # smaller than those, but where a mask looks
    x[4, 0, 0] = 1.5
    assert memory.route(x).tolist() == [0, 0, 1, 0, 0]
    apart = KeyedUpdate.folded([_record([0, 3], [1, 2], threshold=0.6), _record([1, 4], [2, 4], threshold=0.6)])
    assert apart.route(x).tolist() == [0, NONE, NONE, NONE, NONE]
    module = nn.Linear(5, 2, bias=False)
    y = module(x)
    found = apart(module, (x,), y)
    assert found is not None
    assert torch.equal(found[1:], y[1:])
    # Of row 0 the first edit's columns 1 and 2 are read. The second edit also wrote to column 2.
    torch.testing.assert_close(found[0, 0], y[0, 0] + 1.0 * (1.0 + 1.0))


def test_records_survive_their_parts_and_others_settings_are_refused() -> None:
    record = KeyedUpdate.joined([_record([0, 3], [1, 2]), _record([1, 4], [2, 4])])
    again = KeyedUpdate.from_parts(record.tensors, record.numbers)
    assert again.keys.shape == (2, 1)
    assert again.numbers == record.numbers
    with pytest.raises(LedgerError, match="expected the top_k, threshold"):
        KeyedUpdate.folded([record, _record([0, 3], [1, 2], threshold=0.9)])
    with pytest.raises(LedgerError, match="parts of an edit of MEMOIR"):
        KeyedUpdate.from_parts({**record.tensors, "keys": torch.zeros(2, 3, dtype=torch.uint8)}, record.numbers)


def test_factors_are_what_gradient_descent_on_the_matrix_gives(make_tiny: Any, tiny_tokenizer: Any) -> None:
    editor: Any = build("memoir", make_tiny("llama", dtype=torch.float64), tiny_tokenizer, edit_lr=0.5, clip=0.1)
    edit = editor.apply(REQUESTS[0])
    memory = editor.memory()
    mask = memory._masks[0]
    assert int(mask.sum()) == editor.top_k == edit.diagnostics[0]["filled_in"]["top_k"]
    ours = memory.record.factors.matrix(torch.float64, torch.device("cpu"))
    edit.undo()
    D = torch.zeros(editor.shape, dtype=torch.float64, requires_grad=True)
    with editor._at_work():
        rows = SideRows(editor, [editor.answered_row(REQUESTS[0], prefix) for prefix in editor.prefixes])
        for _ in range(editor.config.n_iter):
            with torch.enable_grad():
                loss = rows.run(lambda x, base, D=D: base + (x * mask) @ D.T).mean()
                (slope,) = torch.autograd.grad(loss, D)
            with torch.no_grad():
                D -= 0.5 * slope * min(1.0, 0.1 / float(slope.norm()))
    torch.testing.assert_close(ours, D.detach(), rtol=1e-8, atol=1e-10)
    assert not ours[:, ~mask].any()


def test_the_prompt_itself_has_its_own_key(make_tiny: Any, tiny_tokenizer: Any) -> None:
    editor: Any = build("memoir", make_tiny("gpt2"), tiny_tokenizer)
    for request in REQUESTS:
        editor.apply(request)
    batch = right_padded([prompt_ids(tiny_tokenizer, REQUESTS[0].text)], 0)
    (x,) = run_until_captured(editor.architecture, batch, [editor.module])
    assert editor.memory().route(x).tolist() == [0]
    again = key_of(x.mean(1), editor.background(), editor.top_k)
    assert torch.equal(again[0], editor.memory()._keys[0])
