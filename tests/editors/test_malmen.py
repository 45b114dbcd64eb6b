"""MALMEN's regression and its gradients by hand, its network beside UltraEdit's normaliser, and RLEdit's sequences."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quick_editors import REQUESTS, build
from safetensors.torch import load_file
from torch import Tensor

from errata.editors.core.errors import ConfigError, NumericalError
from errata.editors.core.families.learned_editor import TrainingExample
from errata.editors.core.forward.functional_edit import KeptRow
from errata.editors.core.forward.gradient_factors import AnsweredRow, Factors
from errata.editors.core.ledger.entry import EditInfo
from errata.editors.core.model.own_forward import evaluating, frozen
from errata.editors.core.solve.solvers import ridge_rows
from errata.editors.malmen import MALMEN, MALMENConfig
from errata.testing.laws import digest

Make = Callable[..., Any]


@pytest.fixture
def make(make_tiny: Any, tiny_tokenizer: Any) -> Make:
    def made(method: str, **fields: Any) -> Any:
        editor: Any = build(method, make_tiny("gpt2", dtype=torch.float64), tiny_tokenizer, **fields)
        generator = torch.Generator().manual_seed(0)
        for parameter in editor.network.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
        return editor

    return made


def _lesson(editor: MALMEN, i: int) -> TrainingExample:
    row, kept = editor.row(REQUESTS[i]), editor.row(REQUESTS[i - 1]).ids
    return TrainingExample(
        REQUESTS[i], (row, AnsweredRow((5, *row.ids), row.answer)), (KeptRow(kept), KeptRow(kept[:4], 2))
    )


def _gradients(editor: MALMEN) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in editor.network.named_parameters() if p.grad is not None}
    editor.network.zero_grad()
    return found


@pytest.mark.parametrize("tokens", [3, 12])
def test_the_regression_and_its_gradients_are_those_of_the_dense_solve(tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    X, V, M = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((tokens, 8), (tokens, 5), (8, 5))
    )
    V.requires_grad_()
    lam = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    D = (V.T @ ridge_rows(X, lam.exp())).T  # (d_in, d_out), as in the authors' code
    system = X.T @ X + lam.detach().exp() * torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(D, torch.linalg.solve(system, X.T @ V))
    by_V, by_lam = torch.autograd.grad((D * M).sum(), (V, lam))
    T = torch.linalg.solve(system, M)
    torch.testing.assert_close(by_V, X @ T)
    torch.testing.assert_close(by_lam, -lam.detach().exp() * (T * D.detach()).sum())


def test_a_regression_without_a_ridge_is_refused_where_it_is_singular() -> None:
    with pytest.raises(NumericalError, match="singular at a ridge of 0"):
        ridge_rows(torch.zeros(2, 4, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64))


def test_an_untrained_network_is_ultraedits_normaliser(golden_root: Path) -> None:
    """V of the authors' UltraEdit is -lr ||x^||^2 g^, and that of a new MALMEN -eta (x . x^) g^."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = next(golden_root.glob("gpt2_tr/ultraedit/*down34*_f64.json"))
    meta, gold = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    model = AutoModelForCausalLM.from_pretrained(golden_root / "models" / "gpt2_tr").double()
    rate = meta["hparams"]["lr"]
    editor = MALMEN(
        model,
        AutoTokenizer.from_pretrained(golden_root / "tokenizer"),
        {"layers": [3, 4], "edit_lr": rate},
        trained=False,
    )
    (transform,) = editor.network.transforms
    norms: Any = transform.norms
    mean, squares = gold["turn0.norm256x64.mean"], gold["turn0.norm256x64.var"]
    for norm, m, s in zip(norms, mean.split([256, 64]), squares.split([256, 64]), strict=True):
        norm.count.copy_(gold["turn0.norm256x64.n"].squeeze())
        norm.mean.copy_(m)
        norm.squares.copy_(s)
    editor.network.eval()
    deviation = gold["turn0.norm256x64.std"][:256]
    for i in range(2):
        x, g = gold[f"turn0.map{i}.x"], gold[f"turn0.map{i}.g"]
        found = editor.transform([Factors(x, g, torch.zeros(len(x), dtype=torch.long))] * (i + 1))
        rows, V = (each.detach() for each in found[i])
        x_hat = (x - mean[:256]) / deviation
        ours = V * (x_hat.square().sum(1) / (x * x_hat).sum(1))[:, None]
        torch.testing.assert_close(ours, gold[f"turn0.map{i}.V"], rtol=1e-7, atol=1e-14)
        if (D := gold.get(f"turn0.map{i}.D")) is not None:  # the regression is the same one
            torch.testing.assert_close(rows.T @ gold[f"turn0.map{i}.V"], D, rtol=1e-7, atol=1e-14)


def test_an_edit_is_the_regression_of_its_own_tokens(make: Make) -> None:
    editor = make("malmen")
    together, alone = editor.compute(REQUESTS), editor.compute(REQUESTS[1])
    for name, update in alone[0].patch.updates.items():
        for mine, theirs in zip(update.tensors, together[1].patch.updates[name].tensors, strict=True):
            torch.testing.assert_close(mine, theirs)
    with editor._at_work():
        factors, losses = editor.factors([REQUESTS])
    assert [len(each) for each in losses] == [3]
    assert sum(map(len, [editor.row(request).answer for request in REQUESTS])) == len(factors[0].x)


def test_a_sequence_has_the_gradients_of_its_turns_on_the_model_as_it_stands(make: Make) -> None:
    editor = make("rledit", time_decay=0.5, back_depth=2, grad_clip=1e9)
    turns = [[_lesson(editor, 0), _lesson(editor, 1)], [_lesson(editor, 2)]]
    before = digest(editor.model)
    with evaluating(editor.model), frozen(editor.model):
        statistics = {name: tensor.clone() for name, tensor in editor.network.state_dict().items()}
        parts = editor.backward(turns, 2)
        found = _gradients(editor)
        assert digest(editor.model) == before
        assert not editor.ledger.entries
        editor.network.load_state_dict(statistics)
        updates = editor._updates(turns[:1])
        first, own = editor.losses_after(updates, turns[:1])
        first.backward()
        editor.ledger.append("turn", editor._patch(updates), EditInfo("rledit"))
        again = editor._updates(turns[1:])
        second, last = editor.losses_after(again, turns[1:])
        earlier, _ = editor.losses_after(again, turns[:1])
        (second + 0.5 * earlier).backward()
    for name, gradient in _gradients(editor).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-12)
    assert parts["edit"] == pytest.approx((own["edit"] + last["edit"]) / 2)
    editor.rollback()


def test_a_sequence_that_fails_leaves_the_model_as_before(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = make("rledit")
    before, turn, count = digest(editor.model), editor._turn, []

    def failing(window: Any) -> Any:
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        return turn(window)

    monkeypatch.setattr(editor, "_turn", failing)
    with evaluating(editor.model), frozen(editor.model), pytest.raises(KeyboardInterrupt):
        editor.backward([[_lesson(editor, 0)], [_lesson(editor, 1)]], 2)
    assert digest(editor.model) == before
    assert not editor.ledger.entries


def test_fields_outside_their_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="edit_lr: expected a rate above 0"):
        MALMENConfig(edit_lr=-1e-3)
