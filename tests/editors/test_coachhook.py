"""CoachHooK's hook layers by hand, and its edits beside MEMIT's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from quick_editors import REQUESTS, build
from torch import Tensor, nn

from errata.editors.core.errors import ConfigError, LedgerError
from errata.editors.core.ledger.patch import LowRank
from errata.editors.core.model.tokens import prompt_ids
from errata.editors.core.side_memory.hook_layers import HookLayer, HookUpdate, z_scores

NORMS = torch.tensor([[0.1, 0.2, 0.1, 3.0, 0.2]], dtype=torch.float64)


def test_z_of_one_token_is_bounded_by_the_length_of_its_row_and_moved_by_padding() -> None:
    assert float(z_scores(NORMS, "row")[0, 3]) == pytest.approx(1.787, abs=1e-3)
    padded = torch.cat([NORMS, torch.full((1, 4), 0.5, dtype=torch.float64)], dim=1)
    assert float(z_scores(padded, "row")[0, 3]) == pytest.approx(2.615, abs=1e-3)
    for t, largest in ((3, 1.155), (6, 2.041), (7, 2.268), (20, 4.249)):
        alone = torch.zeros(1, t, dtype=torch.float64)
        alone[0, 1] = 1.0
        assert (
            float(z_scores(alone, "row").max())
            == pytest.approx(largest, abs=1e-3)
            == pytest.approx((t - 1) / math.sqrt(t), abs=1e-3)
        )
    assert z_scores(NORMS[:, :1], "row").isnan().all()
    assert z_scores(torch.ones(1, 4), "row").isnan().all()


def test_with_prefix_later_tokens_do_not_count() -> None:
    z = z_scores(NORMS, "prefix")
    assert torch.equal(z[:, 1:], z_scores(torch.cat([NORMS, 9 * NORMS], dim=1), "prefix")[:, 1:5])
    torch.testing.assert_close(z[:, -1], z_scores(NORMS, "row")[:, -1])
    assert z[0, 0].isnan()


def _layer(alpha: float, scale: float = 1.0) -> HookUpdate:
    return HookUpdate(LowRank(scale * torch.ones(2, 1), torch.tensor([[1.0, 0.0, 0.0]])), alpha, "row")


def test_tokens_in_scope_take_the_copy_and_others_keep_their_bits() -> None:
    module = nn.Linear(3, 2, bias=False)
    x = torch.zeros(1, 4, 3)
    x[0, :, 0] = torch.tensor([0.1, 0.1, 5.0, 0.2])
    y: Tensor = module(x)
    folded = HookUpdate.folded([_layer(2.2), _layer(1.4, 2.0)])
    found = folded(module, (x,), y)
    assert found is not None
    assert folded.alpha == 1.4
    torch.testing.assert_close(found[0, 2], y[0, 2] + 15.0)
    assert torch.equal(found[0, [0, 1, 3]], y[0, [0, 1, 3]])
    assert folded(module, (x[:, :1],), y[:, :1]) is None
    assert torch.equal(HookUpdate.folded([_layer(2.2)]).act(x, y), y)
    with pytest.raises(LedgerError, match="statistics=row"):
        folded.extended([HookUpdate(_layer(1.0).factors, 1.0, "prefix")])


def test_where_every_token_is_in_scope_an_edit_is_memits(make_tiny: Any, tiny_tokenizer: Any) -> None:
    requests = REQUESTS[:2]
    ids = torch.tensor([prompt_ids(tiny_tokenizer, requests[0].text)])
    found = []
    for method, fields in (("memit", {}), ("coachhook", {"alpha": -1e9})):
        model = make_tiny("gpt2", dtype=torch.float64)
        build(method, model, tiny_tokenizer, **fields).apply(requests)
        found.append(model(ids).logits)
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-8)


def test_alpha_falls_to_what_the_prompts_reach_and_the_report_has_the_share_in_scope(
    make_tiny: Any, tiny_tokenizer: Any
) -> None:
    editor: Any = build("coachhook", make_tiny("gpt2"), tiny_tokenizer, alpha=2.2)
    (report,) = editor.apply(REQUESTS[0]).diagnostics
    t = report["row_tokens"]
    assert all(alpha <= min(2.2, (t - 1) / math.sqrt(t)) + 1e-6 for alpha in report["alpha"])
    assert 0 <= report["in_scope"] <= 1
    held = editor._held(0)
    assert isinstance(held, HookLayer)
    assert held.alpha == report["alpha"][0]
    with pytest.raises(ConfigError, match="no weight is written"):
        build("coachhook", make_tiny("gpt2"), tiny_tokenizer, rect=0.4)
