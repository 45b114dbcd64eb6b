"""CrispEdit's projection by hand, AlphaEdit and FT-M as its special cases, and its curvature from autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quick_editors import REQUESTS, build
from torch import Tensor

from errata.editors.core.errors import ConfigError, StatisticsError, StorageWarning
from errata.editors.core.families.text_curvature import text_curvature
from errata.editors.core.files.tensor_cache import TensorCache, UnwritableCacheError
from errata.editors.core.model.architecture import describe
from errata.editors.core.solve.curvature import CurvatureProjector
from errata.editors.core.solve.null_space import Projector, dense_adjoint

F64: Any = {"dtype": torch.float64}


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _moments() -> tuple[Tensor, Tensor]:
    x, g = _random(40, 8) * torch.arange(1, 9), _random(40, 5, seed=1) * torch.arange(1, 6)
    return x.T @ x / 40, g.T @ g / 40


def test_the_largest_curvatures_that_hold_the_share_are_left_out() -> None:
    A, S = torch.diag(torch.tensor([1.0, 2.0, 10.0])), torch.diag(torch.tensor([3.0, 1.0]))
    # Products: 30, 10, 6, 3, 2, 1; the first two hold 40 of 52, and the third completes 0.8.
    project = CurvatureProjector.low(A, S, 0.8)
    kept = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]], **F64)
    torch.testing.assert_close(project(torch.ones(2, 3, **F64)), kept)
    assert project.free_share == 0.5
    with pytest.raises(StatisticsError, match="no direction of low curvature is left"):
        CurvatureProjector.low(torch.eye(3), torch.eye(2), 0.5)


@pytest.mark.parametrize("A", [torch.zeros(3, 3), torch.eye(3)])
def test_where_nothing_curves_nothing_is_left_out(A: torch.Tensor) -> None:
    G = torch.randn(2, 3, dtype=torch.float64)
    torch.testing.assert_close(CurvatureProjector.low(A, torch.zeros(2, 2), 0.99)(G), G)


def test_the_projection_is_one() -> None:
    project = CurvatureProjector.low(*_moments(), energy=0.9)
    G, H = _random(5, 8), _random(5, 8, seed=1)
    once = project(G)
    assert 0 < float(once.norm()) < float(G.norm())
    torch.testing.assert_close(project(once), once)
    torch.testing.assert_close((once * H).sum(), (G * project(H)).sum())
    torch.testing.assert_close(CurvatureProjector.low(*_moments(), energy=0)(G), G)


def test_with_the_curvature_of_inputs_alone_it_is_alphaedit() -> None:
    A, _ = _moments()
    project = CurvatureProjector.low(A, None, 0.9)
    P = Projector.null_space(A, threshold=0, energy=0.1).matrix()
    torch.testing.assert_close(project(_random(5, 8)), _random(5, 8) @ P)
    # Projected gradient descent on AlphaEdit's least squares ends at AlphaEdit's update.
    K, R, ridge = _random(8, 2, seed=2), _random(5, 2, seed=3), 0.5
    D = torch.zeros(5, 8, **F64)
    for _ in range(400):
        D -= 0.05 * project((D @ K - R) @ K.T + ridge * D)
    torch.testing.assert_close(D, R @ dense_adjoint(P, K, 2, ridge).T)


def test_without_a_share_it_is_ft_m(make_tiny: Any, tiny_tokenizer: Any) -> None:
    plain: Any = build("ft_m", make_tiny("gpt2", **F64), tiny_tokenizer, lr=5e-4)
    crisp: Any = build("crispedit", plain.model, tiny_tokenizer, energy_threshold=0.0, shuffle=False)
    (wanted,), (found,) = plain.compute(REQUESTS[0]), crisp.compute(REQUESTS[0])
    for name, update in wanted.patch.updates.items():
        torch.testing.assert_close(found.patch.updates[name].tensors, update.tensors, rtol=1e-6, atol=1e-9)


def test_projected_steps_stay_in_the_null_space(make_tiny: Any, tiny_tokenizer: Any) -> None:
    editor: Any = build(
        "crispedit", make_tiny("llama", **F64), tiny_tokenizer, curvature="input", project="step", past_edits=False
    )
    (edit,) = editor.compute(REQUESTS[0])
    assert edit.diagnostics[0]["losses"][-1] < edit.diagnostics[0]["losses"][0]
    assert not edit.state
    for name, update in edit.patch.updates.items():
        A = editor._text_factors()[name].A
        P = Projector.null_space(A, threshold=0, energy=0.01).matrix()
        (D,) = update.tensors
        torch.testing.assert_close(D @ P, D, rtol=1e-9, atol=1e-12)


def test_curvature_is_that_of_the_summed_loss_of_all_next_tokens(
    make_tiny: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path))
    editor: Any = build("crispedit", make_tiny("gpt2", **F64), tiny_tokenizer, layers=(1,))
    (linear_map,) = editor.maps
    texts = ["The capital of Varland is Brast.", "São Verão lies in Northern Tarvos, says the map."]
    (found,) = text_curvature(editor.architecture, tiny_tokenizer, editor.maps, texts, batch_tokens=64)
    A, S, count = 0, 0, 0
    for text in texts:
        ids = torch.tensor([tiny_tokenizer(text)["input_ids"]])
        seen: list[Tensor] = []
        hook = linear_map.module.register_forward_hook(
            lambda _m, args, out, seen=seen: seen.extend((args[0], out.requires_grad_()))
        )
        log_p = editor.model(ids).logits.log_softmax(-1)[0, :-1]
        hook.remove()
        loss = -log_p.gather(1, ids[0, 1:, None]).sum()
        (g,) = torch.autograd.grad(loss, seen[1])
        x, g = seen[0][0, :-1].detach(), g[0, :-1]
        A, S, count = A + x.T @ x, S + g.T @ g, count + len(x)
    assert found.tokens == count
    torch.testing.assert_close(found.A, A / count)
    torch.testing.assert_close(found.S, S / count)
    (again,) = text_curvature(editor.architecture, tiny_tokenizer, editor.maps, texts, batch_tokens=64)
    assert torch.equal(again.A, found.A)
    assert [path.name[:10] for path in tmp_path.glob("*.json")] == ["curvature-"]


def test_gradients_of_float16_do_not_vanish_in_large_batches(
    make_tiny: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path))
    models = [make_tiny("gpt2", dtype=dtype) for dtype in (torch.float32, torch.float16)]
    for model in models:
        model.lm_head.weight.data.mul_(0.05)  # gradients as small as those of a large model
    texts = [f"{i} São Verão lies in Northern Tarvos, says the map of {i * i} roads." for i in range(60)]
    full, half = (
        text_curvature(describe(model), tiny_tokenizer, [describe(model).map_at(0)], texts, batch_tokens=4096)[0]
        for model in models
    )
    assert float((half.S - full.S).norm() / full.S.norm()) < 0.01


def test_curvature_that_cannot_be_kept_is_computed_once(
    make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))
    architecture = describe(make_tiny("gpt2"))
    passes: list[int] = []

    def refuse(*_: Any) -> None:
        raise UnwritableCacheError("the disk is full")

    monkeypatch.setattr(TensorCache, "store", refuse)
    with pytest.warns(StorageWarning, match="computed and not kept: the disk is full"):
        text_curvature(
            architecture,
            tiny_tokenizer,
            [architecture.map_at(0)],
            ["Varland is big."],
            batch_tokens=64,
            progress=lambda done, total, what: passes.append(done),  # noqa: ARG005
        )
    assert len(passes) == 1


def test_edits_count_while_they_are_on_the_model(make_tiny: Any, tiny_tokenizer: Any) -> None:
    editor: Any = build("crispedit", make_tiny("gpt2"), tiny_tokenizer)
    before = editor.projectors()
    edit = editor.apply(REQUESTS[:2])
    name = editor.maps[0].name
    assert edit.state[f"x.{name}"].shape == (edit.state[f"g.{name}"].shape[0], editor.maps[0].shape[1])
    with_edit = editor.projectors()[name]
    assert not torch.equal(with_edit.inputs, before[name].inputs)
    edit.undo()
    assert torch.equal(editor.projectors()[name].inputs, before[name].inputs)


def test_a_share_outside_its_range_is_refused() -> None:
    from errata.editors.crispedit import CrispEditConfig

    with pytest.raises(ConfigError, match="energy_threshold: expected a share from 0 to below 1"):
        CrispEditConfig(energy_threshold=1.0)
