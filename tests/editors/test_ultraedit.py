"""UltraEdit and StableEdit: their formulas on small numbers, their statistics over a ledger, and their warm-up."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from quick_editors import REQUESTS

from errata.editors.core.errors import ColdStatisticsWarning, ConfigError, DatasetError, NumericalError
from errata.editors.core.families.warm_up import requests_from_text
from errata.editors.core.ledger.patch import Dense, LowRank
from errata.editors.core.model.texts import FACTBOOK
from errata.editors.core.request import EditRequest
from errata.editors.core.solve.token_statistics import TokenStatistics, whitening
from errata.editors.ultraedit import StableEdit, UltraEdit, UltraEditConfig
from errata.testing.laws import digest, parts

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore::errata.editors.core.errors.ColdStatisticsWarning")


def rows(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def editor(make_tiny: Any, tiny_tokenizer: Any) -> UltraEdit:
    return UltraEdit(make_tiny("gpt2", dtype=torch.float64), tiny_tokenizer, {"layers": [0, 1], "lr": 1e-3})


def test_statistics_of_blocks_merge_to_those_of_all_in_any_grouping() -> None:
    z = rows(20, 6)
    whole = TokenStatistics.of(z, scatter=2)
    blocks = [TokenStatistics.of(part, scatter=2) for part in z.split([3, 1, 7, 9])]
    left = blocks[0].merged(blocks[1]).merged(blocks[2]).merged(blocks[3])
    right = blocks[0].merged(blocks[1].merged(blocks[2].merged(blocks[3])))
    for found in (left, right):
        assert found.count == 20
        torch.testing.assert_close(found.mean, z.mean(0))
        torch.testing.assert_close(found.squares, whole.squares)
        torch.testing.assert_close(found.deviation(0.0), z.std(0))
        torch.testing.assert_close(found.scatter, 19 * torch.cov(z[:, 4:].T))
    kept = whole.tensors("a", z[:, 4:]) | {"other": z}
    again = TokenStatistics.from_tensors(kept, "a")
    assert again is not None
    torch.testing.assert_close(again.scatter, whole.scatter)
    assert TokenStatistics.from_tensors(kept, "b") is None


def test_few_vectors_are_kept_in_place_of_their_scatter_matrix() -> None:
    z = rows(3, 9)
    kept = TokenStatistics.of(z, scatter=5).tensors("a", z[:, 4:])
    again = TokenStatistics.from_tensors(kept, "a")
    assert kept["a.rows"].shape == (3, 5)
    assert again is not None
    torch.testing.assert_close(again.scatter, TokenStatistics.of(z, scatter=5).scatter, rtol=1e-5, atol=1e-5)


def test_an_unbiased_spread_counts_a_block_too_much_and_a_single_vector_not_at_all() -> None:
    z = rows(4, 3)
    torch.testing.assert_close(TokenStatistics.of(z, unbiased=True).squares, 4 * z.var(0))
    assert TokenStatistics.of(z[:1], unbiased=True).squares.tolist() == [0, 0, 0]


def test_whitened_vectors_have_the_identity_as_covariance() -> None:
    z = rows(40, 7)
    found = TokenStatistics.of(z, scatter=7)
    W, share = whitening(found, 0.0, 1e-12)
    white = (z - found.mean) @ W
    torch.testing.assert_close(white.T @ white / (40 - 7 - 1), torch.eye(7, dtype=torch.float64))
    assert share == 0
    assert whitening(found, 0.0, 1e6)[1] == 1


@pytest.mark.parametrize("tokens", [3, 12])
def test_the_update_is_the_ridge_regression_whether_it_is_kept_as_factors_or_not(
    editor: UltraEdit, tokens: int
) -> None:
    X, V = rows(tokens, 10), rows(tokens, 5, 1)
    primal = torch.linalg.solve(X.T @ X + torch.eye(10, dtype=torch.float64), X.T @ V).T
    update = editor.update(X, V)
    assert isinstance(update, LowRank if tokens == 3 else Dense)
    torch.testing.assert_close(update.matrix(torch.float64, CPU), primal, rtol=1e-10, atol=1e-10)


def test_one_token_that_is_normalised_already_is_moved_against_its_gradient(editor: UltraEdit) -> None:
    editor.config = UltraEditConfig(lr=1.0)
    d_out, d_in = editor.maps[0].shape
    x, g = rows(1, d_in), rows(1, d_out, 1)
    (turn,) = editor.measure([REQUESTS[:1]])
    ones = torch.ones(d_in + d_out, dtype=torch.float64)
    plain = {(d_out, d_in): TokenStatistics(2, 0 * ones, ones)}
    turn = type(turn)(turn.requests, [x] * 2, [g] * 2, [1], turn.losses)
    values, _ = editor.values(turn, plain)
    D = editor.update(x, values[0]).matrix(torch.float64, CPU)
    square = float(x.square().sum())
    torch.testing.assert_close(D, -square / (square + 1) * g.T @ x, rtol=1e-9, atol=1e-12)


def test_values_do_not_depend_on_the_scale_of_the_inputs(editor: UltraEdit) -> None:
    (turn,) = editor.measure([REQUESTS])
    other = type(turn)(turn.requests, [7 * x for x in turn.x], turn.g, turn.sizes, turn.losses)
    for one, two in zip(
        editor.values(turn, editor.statistics(turn))[0], editor.values(other, editor.statistics(other))[0], strict=True
    ):
        torch.testing.assert_close(one, two)


def test_an_undo_leaves_the_statistics_of_the_other_edits(make_tiny: Any, tiny_tokenizer: Any) -> None:
    def editor() -> StableEdit:
        return StableEdit(make_tiny("gpt2"), tiny_tokenizer, {"layers": [0], "lr": 1e-3})

    gone, fresh = editor(), editor()
    first, second = gone.apply(REQUESTS[0]), gone.apply(REQUESTS[1])
    first.undo()
    assert gone.past_statistics()[gone.maps[0].shape].count == second.diagnostics[0]["tokens"]
    second.undo()
    assert digest(gone.model) == digest(fresh.model)
    assert gone.apply(REQUESTS[2]).id == fresh.apply(REQUESTS[2]).id


def test_statistics_are_whitened_once_there_are_more_tokens_than_dimensions(
    make_tiny: Any, tiny_tokenizer: Any
) -> None:
    model = make_tiny("gpt2", dtype=torch.float64)
    stable = StableEdit(model, tiny_tokenizer, {"layers": [0], "warm_up": 12})
    biased = UltraEdit(model, tiny_tokenizer, {"layers": [0], "warm_up": 12, "variance": "biased", "ridge": 10.0})
    few = {"layers": [0], "ridge": 10.0}
    width = stable.maps[0].shape[0]
    assert stable.compute(REQUESTS[0])[0].diagnostics[0]["statistics"] > width + 1
    one, other = stable.compute(REQUESTS[0])[0], biased.compute(REQUESTS[0])[0]
    first, second = (next(iter(parts(edit).values())) for edit in (one, other))
    assert not torch.allclose(first, second)
    one = StableEdit(model, tiny_tokenizer, few).compute(REQUESTS[0])[0]
    other = UltraEdit(model, tiny_tokenizer, {**few, "variance": "biased"}).compute(REQUESTS[0])[0]
    assert one.diagnostics[0]["statistics"] <= width + 1
    torch.testing.assert_close(parts(one), parts(other))


# --- the first edit, and the warm-up ----------------------------------------------------------------------------------


def test_a_first_edit_by_itself_is_warned_about_and_refused_with_one_token(editor: UltraEdit) -> None:
    with pytest.warns(ColdStatisticsWarning, match="warm_up"):
        editor.apply(REQUESTS[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error", ColdStatisticsWarning)
        editor.apply(REQUESTS[1])  # the first is there
        editor.rollback()
        editor.apply(REQUESTS)  # a batch has statistics of its own
    editor.rollback()
    editor.config = UltraEditConfig(layers=(0,))
    editor.setup()
    short = EditRequest("The capital of {} is", "Varland", "a", join="")
    assert len(editor.row(short).answer) == 1
    with pytest.raises(NumericalError, match="is its own mean"):
        editor.apply(short)


@pytest.fixture
def warm_file(tmp_path: Path) -> str:
    path = tmp_path / "warm.jsonl"
    lines = [
        json.dumps({"prompt": f"The river {name} flows through", "target": name[::-1]})
        for name in ["Abcd", "Efg", "Hij"]
    ]
    path.write_text("\n".join(lines))
    return str(path)


def test_a_warm_up_counts_its_statistics_and_leaves_nothing_on_the_model(
    make_tiny: Any, tiny_tokenizer: Any, warm_file: str
) -> None:
    model = make_tiny("gpt2")
    editor = UltraEdit(model, tiny_tokenizer, {"layers": [0], "lr": 1e-3, "warm_up": warm_file})
    before = digest(model)
    edit = editor.compute(REQUESTS[0])[0]
    assert edit.diagnostics[0]["statistics"] > edit.diagnostics[0]["tokens"]
    assert digest(model) == before
    edit.apply()
    assert set(edit.patch.updates) == {editor.maps[0].name}
    # The warm-up is measured on the untouched model, so that a later editor has the same.
    later = UltraEdit(model, tiny_tokenizer, editor.config)
    assert later.compute(REQUESTS[1])[0].id == editor.compute(REQUESTS[1])[0].id


def test_a_warm_up_by_its_number_is_cut_from_the_text_that_comes_with_errata(
    make_tiny: Any, tiny_tokenizer: Any
) -> None:
    (turn,) = UltraEdit(make_tiny("gpt2"), tiny_tokenizer, {"layers": [0], "warm_up": 3})._warm_up_turns()
    assert turn == requests_from_text(FACTBOOK, 3)
    texts = ["Every word of a{}b stands here now.", "The capital of Varland is Oslen.", "It lies far in the north."]
    assert [request.prompt for request in requests_from_text(texts, 1)] == ["The capital of Varland is"]


def test_the_edits_of_a_warm_up_that_stays_are_a_part_of_the_first_edit(
    make_tiny: Any, tiny_tokenizer: Any, warm_file: str
) -> None:
    model = make_tiny("gpt2", dtype=torch.float64)
    fields = {"layers": [0], "lr": 1e-3, "warm_up": warm_file, "warm_up_turn": 2}
    stays = UltraEdit(model, tiny_tokenizer, {**fields, "warm_up_stays": True})
    before = digest(model)
    first = stays.apply(REQUESTS[0])
    second = stays.apply(REQUESTS[1])
    alone = UltraEdit(model, tiny_tokenizer, fields).compute(REQUESTS[0])[0]
    assert first.patch.norms() != alone.patch.norms()
    assert second.diagnostics[0]["statistics"] == stays.past_statistics()[stays.maps[0].shape].count
    second.undo()
    first.undo()
    assert digest(model) == before
    # The same by hand: the warm-up's turns as edits of their own.
    plain = UltraEdit(model, tiny_tokenizer, {"layers": [0], "lr": 1e-3})
    for turn in stays._warm_up_turns():
        plain.apply(turn)
    wanted = plain.compute(REQUESTS[0])[0]
    whole = sum(next(iter(parts(edit).values())) for edit in (wanted,)) + sum(
        entry.patch.updates[plain.maps[0].name].matrix(torch.float64, CPU) for entry in model._errata_ledger.entries
    )
    torch.testing.assert_close(next(iter(parts(first).values())), whole)


def test_a_warm_up_that_cannot_be_had_is_refused(make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = make_tiny("gpt2")
    bad = tmp_path / "bad.json"
    for content, message in (("[]", "not empty"), ('[{"prompt": "x"}]', "`prompt` and `target`"), ("{", "JSON")):
        bad.write_text(content)
        with pytest.raises(DatasetError, match=message):
            UltraEdit(model, tiny_tokenizer, {"layers": [0], "warm_up": str(bad)}).apply(REQUESTS[0])
    for fields in ({"warm_up": 0}, {"warm_up_stays": True}, {"edit_modules": ["transformer.h.0.mlp.c_up"]}):
        with pytest.raises(ConfigError):
            UltraEdit(model, tiny_tokenizer, fields)


def test_maps_are_named_in_full_or_by_layer_and_projection(make_tiny: Any, tiny_tokenizer: Any) -> None:
    model = make_tiny("llama")
    names = ["model.layers.1.mlp.gate_proj", "model.layers.2.mlp.up_proj"]
    assert [found.name for found in UltraEdit(model, tiny_tokenizer, {"edit_modules": names}).maps] == [
        f"{name}.weight" for name in names
    ]
    both = UltraEdit(model, tiny_tokenizer, {"layers": [0], "projections": ["up_proj", "gate_proj"]})
    assert [found.name.split(".")[-2] for found in both.maps] == ["gate_proj", "up_proj"]
    assert [found.name.split(".")[2] for found in UltraEdit(model, tiny_tokenizer).maps] == ["0", "1"]
