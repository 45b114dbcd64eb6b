"""AWQ on tiny models, against a search that sets the weights of a copy and runs it, in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from errata.editors.core.interventions import registry
from errata.editors.core.interventions.awq import AWQ
from errata.editors.core.interventions.compressions import TEXT
from errata.editors.core.model.architecture import describe
from errata.editors.core.solve.activation_scales import LEVELS, RATIOS, cut
from errata.editors.core.solve.quantising import grid_of
from errata.testing import digest, tiny_models

ROWS = {TEXT: [[(7 * i + j * j) % 60 for j in range(12)] for i in range(4)]}
IDS = torch.tensor(ROWS[TEXT])
BITS, GROUP = 3, 16


def outlying(dtype: torch.dtype = torch.float64) -> Any:
    """Return a model a few of whose channels are large, as those of real models are."""
    model: Any = tiny_models.tiny_model("llama", 60, dtype=dtype)
    for block in model.model.layers:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight.data[::9] *= 12
    return model


def rounded(weight: Tensor) -> Tensor:
    """Round as AWQ's code does: between the extremes of each group, with a whole zero point."""
    parts = []
    for part in weight.split(GROUP, dim=1):
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        scale = (high - low).clamp(min=1e-5) / (2**BITS - 1)
        zero = (-(low / scale).round()).clamp(0, 2**BITS - 1)
        parts.append(((part / scale).round() + zero).clamp(0, 2**BITS - 1).sub(zero) * scale)
    return torch.cat(parts, dim=1)


@torch.no_grad()
def searched(module: torch.nn.Module, names: tuple[str, ...], x: Tensor, call: dict[str, Any]) -> dict[str, Tensor]:
    """Return the rounded maps of a module by trying every ratio on a copy of it."""

    def output(own: torch.nn.Module) -> Tensor:
        found = own(**call) if call else own(x)
        return found[0] if isinstance(found, tuple) else found

    size, before = x.reshape(-1, x.shape[-1]).abs().mean(0), output(module)
    best: tuple[float, dict[str, Tensor]] = (torch.inf, {})
    for step in range(20):
        scales = size ** (step / 20)
        scales = scales / (scales.max() * scales.min()).sqrt()
        tried, weights = copy.deepcopy(module), {}
        for name in names:
            own = tried.get_submodule(name)
            weights[name] = rounded(own.weight * scales) / scales  # type: ignore[operator]
            own.weight.copy_(weights[name])  # type: ignore[operator]
        error = float((output(tried) - before).square().mean())
        best = min(best, (error, weights), key=lambda one: one[0])
    return best[1]


def seen(model: Any, module: torch.nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what a module is called with."""
    found: list[Any] = []
    hook = module.register_forward_pre_hook(lambda _m, args, kwargs: found.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(IDS, use_cache=False)
    hook.remove()
    return found[0]


def test_scales_are_those_of_a_search_by_hand_and_beat_rounding() -> None:
    model, untouched = outlying(), outlying()
    before = digest(model)
    applied = AWQ({"bits": BITS, "group": GROUP, "cuts": False}).apply_rows(model, ROWS)
    for layer in (1,):  # its inputs are those of the model that is not quantised
        block, found = untouched.model.layers[layer], model.model.layers[layer]
        attention, mlp = block.self_attn, block.mlp
        call = seen(untouched, attention)[1]
        maps = ("q_proj", "k_proj", "v_proj")
        expected = searched(attention, maps, call["hidden_states"], call)
        (x,) = seen(untouched, mlp)[0]
        expected |= searched(mlp, ("gate_proj", "up_proj"), x, {})
        (x,) = seen(untouched, mlp.down_proj)[0]
        expected["down_proj"] = searched(mlp.down_proj, ("",), x, {})[""]
        for name, weight in expected.items():
            own = found.self_attn if name in maps else found.mlp
            torch.testing.assert_close(own.get_submodule(name).weight.detach(), weight, rtol=1e-9, atol=1e-12)
        # Grouped queries: nothing could hold the scales of the attention's output projection.
        torch.testing.assert_close(
            found.self_attn.o_proj.weight.detach(), rounded(attention.o_proj.weight.detach()), rtol=1e-9, atol=1e-12
        )
    assert all(kept.holds(one.weight) for one in _maps(model) if (kept := applied.kept[one.name]))
    plain = outlying()
    registry.get("rtn")({"bits": BITS, "group": GROUP, "points": "awq"}).apply_rows(plain, {})
    assert off(model, untouched) < 0.8 * off(plain, untouched)
    applied.undo()
    assert digest(model) == before


@torch.no_grad()
def off(model: Any, untouched: Any) -> float:
    """Return how far the outputs of the first block are off, in the mean of squares."""
    one, other = (own(IDS, output_hidden_states=True).hidden_states[1] for own in (model, untouched))
    return float((one - other).square().mean())


def _maps(model: Any) -> list[Any]:
    from errata.editors.core.interventions.intervention import maps_of

    return maps_of(describe(model))


def test_cuts_are_those_of_a_search_by_hand() -> None:
    drawn = torch.Generator().manual_seed(0)
    W = torch.randn(5, 20, generator=drawn, dtype=torch.float64)
    X = torch.randn(30, 20, generator=drawn, dtype=torch.float64) * torch.linspace(0.1, 3, 20)
    found = cut(W, X.T @ X, BITS, GROUP, "awq")
    for row in range(5):
        for columns in (slice(0, 16), slice(16, 20)):
            part, x = W[row : row + 1, columns], X[:, columns]
            tried = [part.clamp(-level * part.abs().max(), level * part.abs().max()) for level in LEVELS]
            errors = [float(((rounded(one) - part) @ x.T).square().mean()) for one in tried]
            best = tried[min(range(len(tried)), key=errors.__getitem__)]
            assert torch.equal(found[row : row + 1, columns], best)
    assert not torch.equal(found, W)
    assert len(RATIOS) == 20
    assert grid_of(found, BITS, GROUP, "awq").scale.shape == (5, 2)


@pytest.mark.parametrize("fields", [{}, {"by_weights": True}, {"cuts": False, "points": "symmetric"}])
def test_fused_maps_of_other_architectures_are_compressed(fields: dict[str, Any]) -> None:
    model = tiny_models.tiny_model("gpt2", 60)
    before = digest(model)
    applied = AWQ({"group": GROUP, **fields}).apply_rows(model, ROWS)
    assert set(applied.names) == {one.name for one in _maps(model)}
    assert all(applied.kept[one.name].holds(one.weight) for one in _maps(model))
    applied.undo()
    assert digest(model) == before
