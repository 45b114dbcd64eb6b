"""LocFT: FT-M in its order, shuffled passes, and an end of text that is learnt."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tuners import REQUESTS, Make, maker

from errata.editors import FTM, LocFT
from errata.editors.core.errors import ConfigError
from errata.editors.core.families import fine_tuning


@pytest.fixture
def make(make_tiny: Any, tiny_tokenizer: Any) -> Make:
    return maker(make_tiny, tiny_tokenizer)


def test_locft_in_order_and_without_an_end_is_ft_m_to_the_last_bit(make: Make) -> None:
    plain = {"shuffle": False, "append_eos": False}
    for requests, fields in ((REQUESTS, plain), (REQUESTS[:1], {"append_eos": False})):
        ours, theirs = make(LocFT, **fields).apply(requests), make(FTM).apply(requests)
        for name, update in theirs.patch.updates.items():
            assert torch.equal(ours.patch.updates[name].delta, update.delta)
    assert ours.diagnostics[0]["patch_bytes"] == theirs.patch.updates[name].delta.nbytes


def test_locft_shuffles_each_pass_by_its_seed_and_visits_every_request_once(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    pieces = fine_tuning.Training._pieces

    def watched(self: Any, members: Any, first: int, pad: int) -> Any:
        seen.append([index for _, index, _ in members])
        return pieces(self, members, first, pad)

    monkeypatch.setattr(fine_tuning.Training, "_pieces", watched)
    make(LocFT, num_steps=6, batch_size=2, seed=1).apply(REQUESTS)
    passes = [[*seen[start], *seen[start + 1]] for start in range(0, 12, 2)]
    assert all(sorted(order) == [0, 1, 2] for order in passes)
    assert len({tuple(order) for order in passes}) > 1
    once, seen = list(seen), []
    make(LocFT, num_steps=6, batch_size=2, seed=1).apply(REQUESTS)
    assert seen == once


def test_locft_learns_to_stop_behind_the_answer(make: Make) -> None:
    request = REQUESTS[0]
    end = make(LocFT).tokenizer.eos_token_id
    for append_eos in (True, False):
        editor = make(LocFT, append_eos=append_eos, num_steps=40, lr=0.05)
        editor.apply(request)
        row = editor.row(request)
        answer = row.answer if append_eos else (*row.answer, end)
        ids = torch.tensor([[*row.ids, row.answer[-1]]]) if not append_eos else torch.tensor([row.ids])
        said = editor.model(ids).logits[0, -len(answer) :].argmax(-1).tolist()
        assert (said[-1] == end) == append_eos
        assert said[:-1] == list(answer[:-1])


def test_locft_trains_a_whole_block_and_needs_an_end_of_text(make: Make) -> None:
    editor = make(LocFT, module="block", num_steps=2)
    edit = editor.apply(REQUESTS)
    assert len(edit.patch.updates) == len(editor.architecture.linears(1)) > 2
    endless = copy.deepcopy(editor.tokenizer)
    endless.eos_token = None
    with pytest.raises(ConfigError, match="append_eos"):
        LocFT(editor.model, endless)
