"""Pruning and quantisation, as functions of tensors and on models: undone exactly, and put back by `project`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from errata.editors import ROME
from errata.editors.core.errors import ConfigError, DatasetError, LedgerError, NumericalError
from errata.editors.core.interventions import registry
from errata.editors.core.interventions.compressions import (
    GPTQ,
    TEXT,
    InputCompression,
    RoundToNearest,
    SparseGPT,
    Wanda,
)
from errata.editors.core.interventions.intervention import Intervention, Step, maps_of
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import LowRank, Patch
from errata.editors.core.model.architecture import Architecture, describe
from errata.editors.core.solve.pruning import magnitude_mask, sparsegpt, wanda_mask
from errata.editors.core.solve.quantising import gptq, grid_of
from errata.testing import digest, tiny_models

ROWS = {TEXT: [[(7 * i + j * j) % 60 for j in range(12)] for i in range(6)]}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny(architecture: str, dtype: torch.dtype = torch.float32) -> Any:
    return tiny_models.tiny_model(architecture, 60, dtype=dtype)


# --- functions of tensors -----------------------------------------------------------------------------------------


def test_wanda_on_a_matrix_that_was_computed_by_hand() -> None:
    X = torch.tensor([[1.0, 2, 3, 0], [1, -2, 1, 1]])
    W = torch.tensor([[1.0, -1, 0.5, 4], [0.1, 0.2, -0.3, 0.4]])
    mask = wanda_mask(W, X.square().sum(0), 0.5)
    # Scores: 1.414, 2.828, 1.581, 4 and 0.141, 0.566, 0.949, 0.4.
    assert mask.tolist() == [[True, False, True, False], [True, False, False, True]]
    assert torch.equal(wanda_mask(W, 9 * X.square().sum(0), 0.5), mask)
    assert not wanda_mask(W, X.square().sum(0), 0.0).any()


@pytest.mark.parametrize("sparsity", [0.25, 0.5])
def test_how_many_elements_each_rule_prunes(sparsity: float) -> None:
    W, X = drawn(6, 20), drawn(40, 20, seed=1)
    assert wanda_mask(W, X.square().sum(0), sparsity).sum(1).tolist() == [int(20 * sparsity)] * 6
    assert int(magnitude_mask(W, sparsity).sum()) == int(120 * sparsity) + 1
    assert int((sparsegpt(W, X.T @ X, sparsity, block=8) == 0).sum()) == sum(
        int(6 * n * sparsity) + 1 for n in (8, 8, 4)
    )


def test_sparsegpt_of_uncorrelated_inputs_is_magnitude_pruning_of_each_block() -> None:
    W = drawn(4, 12)
    expected = torch.cat([part.masked_fill(magnitude_mask(part, 0.5), 0) for part in W.split(6, dim=1)], dim=1)
    assert torch.allclose(sparsegpt(W, torch.eye(12), 0.5, damp=0, block=6), expected)
    assert torch.equal(sparsegpt(W, torch.eye(12), 0.0), W)


@pytest.mark.parametrize("points", ["symmetric", "asymmetric", "awq"])
def test_rounding_twice_is_rounding_once(points: Any) -> None:
    grid = grid_of(drawn(5, 20), 4, 8, points)
    once = grid.nearest(drawn(5, 20))
    assert torch.allclose(grid.nearest(once), once, atol=1e-7)
    assert grid.scale.shape == (5, 3)


def test_gptq_disturbs_the_output_less_than_rounding() -> None:
    W, X = drawn(8, 24), drawn(200, 24, seed=2) @ drawn(24, 24, seed=3)
    found, grid = gptq(W, X.T @ X, 3, 8, by_activation=True)
    plain = grid_of(W, 3, 8).nearest(W)
    assert ((found - W) @ X.T).norm() < 0.8 * ((plain - W) @ X.T).norm()
    assert torch.allclose(grid.nearest(found), found, atol=1e-6)


# --- on models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "rtn", "gptq", "awq"])
def test_a_compression_changes_the_blocks_alone_and_is_undone_exactly(name: str) -> None:
    model = tiny("llama")
    before, logits = digest(model), model(torch.tensor([[1, 2, 3]])).logits
    head = model.get_output_embeddings().weight.clone()
    applied = registry.get(name, "compress")().apply_rows(model, ROWS)
    assert set(applied.names) == {found.name for found in maps_of(describe(model))}
    assert all(kept.holds(found.weight) for found in maps_of(describe(model)) if (kept := applied.kept[found.name]))
    assert not torch.equal(model(torch.tensor([[1, 2, 3]])).logits, logits)
    assert torch.equal(model.get_output_embeddings().weight, head)
    assert applied.average_bits() < 13
    applied.undo()
    assert digest(model) == before
    assert not applied.is_applied
    with pytest.raises(LedgerError, match="nothing to undo"):
        applied.undo()


def test_later_blocks_see_what_compressed_blocks_give() -> None:
    model = tiny("llama")
    Wanda({"sparsity": 0.5}).apply_rows(model, ROWS)
    name = "model.layers.2.mlp.down_proj.weight"
    pruned = model.get_parameter(name).detach() == 0
    other = tiny("llama")
    seen: list[torch.Tensor] = []
    lower = Ledger.of(model).base  # the weights of block 2 before they were pruned
    for own, found in zip(other.parameters(), model.named_parameters(), strict=True):
        own.data.copy_(lower(found[0]) if ".layers.2." in found[0] else found[1])
    hook = other.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
        lambda _module, args: seen.append(args[0].detach().flatten(0, 1))
    )
    other(torch.tensor(ROWS[TEXT]))
    hook.remove()
    assert torch.equal(wanda_mask(lower(name), seen[0].square().sum(0), 0.5), pruned)


@pytest.mark.parametrize(("name", "fields"), [("wanda", {}), ("rtn", {"group": 8})])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_an_edit_writes_into_a_compressed_model_can_be_put_back(
    name: str, fields: dict[str, Any], dtype: torch.dtype
) -> None:
    model = tiny("gpt2", dtype)
    before = digest(model)
    applied = registry.get(name)(fields).apply_rows(model, ROWS)
    compressed, weight = digest(model), describe(model).weight_name(1)
    Ledger.of(model).append("edit", Patch({weight: LowRank(drawn(32, 1), drawn(1, 128))}))
    assert not applied.kept[weight].holds(describe(model).weight(1).float())
    again = applied.project()
    assert again.names == (weight,)
    if name == "wanda":
        zeros = describe(model).weight(1) == 0
        assert bool((zeros | ~applied.kept[weight].mask).all())  # type: ignore[attr-defined]
    again.undo()
    Ledger.of(model).remove("edit")
    assert digest(model) == compressed
    applied.undo()
    assert digest(model) == before


def test_an_edited_weight_of_16_bits_is_pruned_to_zero() -> None:
    model = tiny("llama", torch.bfloat16)
    name = describe(model).weight_name(1)
    Ledger.of(model).append("edit", Patch({name: LowRank(0.01 * drawn(32, 1), drawn(1, 80))}))
    applied = Wanda({"sparsity": 0.5}).apply_rows(model, ROWS)
    weight = describe(model).weight(1)
    assert bool((weight[applied.kept[name].mask] == 0).all())  # type: ignore[attr-defined]
    assert int((weight == 0).sum()) == 32 * 40


def test_a_failure_leaves_the_model_as_it_was() -> None:
    class Failing(SparseGPT):
        def compressed(self, weight: torch.Tensor, inputs: torch.Tensor) -> Any:
            if weight.shape[0] == 80:
                raise torch.linalg.LinAlgError("not positive definite")  # pyright: ignore[reportPrivateImportUsage]
            return super().compressed(weight, inputs)

    model = tiny("llama")
    before = digest(model)
    with pytest.raises(NumericalError, match=r"sparsegpt: not positive.*damping"):
        Failing().apply_rows(model, ROWS)
    assert digest(model) == before
    assert not Ledger.of(model).entries


def test_texts_are_joined_and_cut_into_rows(tiny_tokenizer: Any) -> None:
    model = tiny_models.tiny_model("gpt2", len(tiny_tokenizer))
    rows = Wanda({"n_rows": 2, "row_tokens": 16}).read(model, tiny_tokenizer)[TEXT]
    assert [len(row) for row in rows] == [16, 16]
    with pytest.raises(DatasetError, match="expected a file of texts"):
        Wanda({"text": "gone.txt"}).read(model, tiny_tokenizer)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (Wanda, {"sparsity": 1.0}, "sparsity: expected a share"),
        (Wanda, {"sparsitty": 0.5}, "did you mean 'sparsity'"),
        (RoundToNearest, {"bits": 9}, "bits: expected 2 to 8"),
        (GPTQ, {"group": 0}, "group: expected at least 1"),
        (GPTQ, {"points": "even"}, "points: expected one of"),
    ],
)
def test_wrong_fields_are_refused(kind: type[Intervention], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(fields)


def test_torchao_agrees_with_the_symmetric_grid() -> None:
    pytest.importorskip("torchao")
    model = tiny("gpt2")
    before = digest(model)
    weight = describe(model).weight(1).clone()
    applied = registry.get("torchao", "compress")({"group": 32}).apply_rows(model, {})
    found = describe(model).weight(1)
    close = (found - grid_of(weight, 4, 32).nearest(weight)).abs() < 1e-6
    assert float(close.double().mean()) > 0.98  # an element between two points may fall on either
    assert all(kept.holds(one.weight) for one in maps_of(describe(model)) if (kept := applied.kept[one.name]))
    applied.undo()
    assert digest(model) == before
    with pytest.raises(ConfigError, match="expected a divisor of 32 columns"):
        registry.get("torchao")({"group": 7}).apply_rows(model, {})


def test_torchao_is_named_where_it_is_missing() -> None:
    if importlib.util.find_spec("torchao") is not None:
        pytest.skip("torchao is installed")
    with pytest.raises(ConfigError, match=r"pip install -e '.\[torchao\]'"):
        registry.get("torchao")()


def test_names_are_found_and_others_suggest_the_nearest() -> None:
    assert registry.get("wanda", "compress") is Wanda
    with pytest.raises(ConfigError, match="did you mean 'wanda'"):
        registry.get("wandas", "compress")
    with pytest.raises(ConfigError, match="wanda does not unlearn, it does compress"):
        registry.get("wanda", "unlearn")


class Halved(InputCompression):
    """What another package may register: every weight is halved."""

    name = "halved"

    def statistics(self, *_: Any) -> Any: ...

    def compressed(self, *_: Any) -> Any: ...

    def steps(self, architecture: Architecture, rows: Mapping[str, Any], progress: Any) -> Iterator[Step]:
        progress(len(rows), 1, "halving")
        yield Step({found.name: found.weight / 2 for found in maps_of(architecture)})


def test_a_package_registers_an_intervention(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    point = EntryPoint("halved", f"{__name__}:Halved", registry.ADDED.group)
    monkeypatch.setattr(type(registry.ADDED), "_points", lambda _self: [point])
    monkeypatch.setattr(type(registry.ADDED), "_import", lambda _self, _point: Halved)
    assert "halved" in registry.names("compress")
    model = tiny("gpt2")
    weight = describe(model).weight(0).clone()
    applied = registry.get("halved", "compress")().apply_rows(model, ROWS)
    assert torch.equal(describe(model).weight(0), weight / 2)
    with pytest.raises(LedgerError, match="fixes no weights"):
        applied.project()


def test_a_closing_step_leaves_interventions_out(tiny_tokenizer: Any) -> None:
    model = tiny_models.tiny_model("gpt2", len(tiny_tokenizer))
    editor = ROME(model, tiny_tokenizer, {"layers": [1], "mom2_adjustment": False, "prune": "log"})
    given: list[int] = []
    editor.closing = lambda patches: given.append(len(patches))  # type: ignore[method-assign, assignment]
    registry.get("rtn")().apply_rows(model, {})
    info = Ledger.of(model).entries[0].info
    assert info.is_intervention
    assert not replace(info, config={"seed": 0}).is_intervention
    editor.finish()
    assert given == [0]
