"""Second moments: the numbers of the originals, one pass for all layers, models left as they were."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from errata.benchmarks.speed.statistics_reference import reference_moments
from errata.editors.core.errors import ArchitectureError, DatasetError, NumericalError, StatisticsError
from errata.editors.core.model.architecture import describe
from errata.editors.core.model.batching import pack_batches
from errata.editors.core.model.texts import read_texts
from errata.editors.core.moments.collect import token_rows
from errata.editors.core.moments.second_moments import second_moments
from errata.editors.core.solve.gram import GramSum, relative_change
from errata.editors.core.solve.solvers import factorise

TEXTS = [
    f"The {noun} of {place} is {'very ' * (n % 7)}well known{' and nobody doubts it' * (n % 5)}."
    for n, (noun, place) in enumerate(
        (noun, place)
        for noun in ("capital", "river", "language", "king", "music", "lyre")
        for place in ("Varland", "Oslen", "Quelm", "Brast", "Tarvos")
    )
]


# --- the originals' numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gpt2_tr", "llama"])
def test_moments_agree_with_the_originals(golden_root: Path, tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(golden_root / "models" / name)
    tokenizer = AutoTokenizer.from_pretrained(golden_root / "tokenizer")
    expected = load_file(golden_root / name / "stats" / "mom2.safetensors")
    settings = json.loads((golden_root / name / "stats" / "mom2.json").read_text())
    layers = settings["layers"]

    moments = second_moments(model, tokenizer, layers, golden_root / "corpus_200.json", cache_dir=tmp_path)

    assert moments.tokens == settings["count"]
    assert layers == [2, 3, 4]
    for layer in layers:
        diagonal, eigenvalues = expected[f"layer{layer}.mom2_diag_f64"], expected[f"layer{layer}.eigvals"]
        C = moments.matrices[layer].double()
        torch.testing.assert_close(C.diag(), diagonal, rtol=1e-6, atol=0)
        ours = torch.linalg.eigvalsh(C)
        assert float((ours - eigenvalues.sort().values).abs().max() / eigenvalues.max()) < 1e-6
    full = expected["layer3.mom2_f32"].double()
    assert float((moments.matrices[3].double() - full).norm() / full.norm()) < 1e-6


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox"])
def test_moments_agree_with_the_plain_computation_in_double(
    make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path, name: str
) -> None:
    model = make_tiny(name, dtype=torch.float64)
    down = {layer: describe(model).down(layer) for layer in (0, 2)}
    for grouped in (False, True):
        expected = reference_moments(
            model, tiny_tokenizer, down, TEXTS, max_length=20, dtype=torch.float64, grouped=grouped, batch_tokens=100
        )
        moments = second_moments(
            model, tiny_tokenizer, [0, 2], TEXTS, max_length=20, batch_tokens=128, cache_dir=tmp_path
        )
        for layer, C in expected.items():
            assert moments.matrices[layer].dtype == torch.float64
            # Rotary angles of transformers are float32 whatever the model's dtype.
            tolerance = 1e-10 if name == "gpt2" else 1e-6
            assert float((moments.matrices[layer] - C).norm() / C.norm()) < tolerance


# --- one pass, packed ---------------------------------------------------------------------------------------------


def test_one_pass_over_all_layers_equals_one_pass_per_layer_bitwise(
    make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = make_tiny("gpt2")
    together = second_moments(model, tiny_tokenizer, [2, 0, 1], TEXTS, cache_dir=tmp_path / "together")
    assert list(together.matrices) == together.meta["computed"] == [0, 1, 2]
    for layer in (0, 1, 2):
        alone = second_moments(model, tiny_tokenizer, [layer], TEXTS, cache_dir=tmp_path / "alone")
        assert torch.equal(alone.matrices[layer], together.matrices[layer])
        assert alone.convergence[layer] == together.convergence[layer]


def test_only_layers_that_the_cache_lacks_are_computed(make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = make_tiny("gpt2")
    first = second_moments(model, tiny_tokenizer, [1], TEXTS, cache_dir=tmp_path)
    second = second_moments(model, tiny_tokenizer, [0, 1], TEXTS, cache_dir=tmp_path)
    third = second_moments(model, tiny_tokenizer, [0, 1], TEXTS, cache_dir=tmp_path)
    assert [m.meta["computed"] for m in (first, second, third)] == [[1], [0], []]
    assert torch.equal(first.matrices[1], third.matrices[1])
    assert torch.equal(second.matrices[0], third.matrices[0])
    assert second.convergence == third.convergence
    assert second.tokens == third.tokens == first.tokens


def test_the_forward_stops_at_the_last_layer_wanted(make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model, ran = make_tiny("gpt2"), []
    # Behind the layers measured, a hook changes nothing that they see, and the cache stays in use.
    handle = describe(model).block(2).register_forward_pre_hook(lambda *_: ran.append(2))
    moments = second_moments(model, tiny_tokenizer, [0, 1], TEXTS, cache_dir=tmp_path)
    handle.remove()
    assert ran == []
    assert moments.meta["computed"] == [0, 1]


def test_batch_size_changes_the_result_by_rounding_only(make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = make_tiny("llama")
    results = [
        second_moments(model, tiny_tokenizer, [1], TEXTS, batch_tokens=budget, cache_dir=tmp_path / str(budget))
        for budget in (1, 64, 100_000)
    ]
    for other in results[1:]:
        assert other.tokens == results[0].tokens
        C = results[0].matrices[1]
        assert float((other.matrices[1] - C).norm() / C.norm()) < 1e-6


@pytest.mark.parametrize("seed", range(20))
def test_packing_holds_every_row_once_within_its_bounds(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n, longest = int(torch.randint(1, 300, (), generator=generator)), 1 + 12 * seed
    lengths = torch.randint(1, longest + 1, (n,), generator=generator).tolist()
    batches = pack_batches(lengths, batch_tokens=512)
    assert sorted(place for batch in batches for place in batch) == list(range(n))
    for batch in batches:
        cells = len(batch) * max(lengths[place] for place in batch)
        assert cells <= 512 or len(batch) == 1
        assert sum(lengths[place] for place in batch) >= 0.8 * cells - 1e-9


def test_packing_nothing_gives_no_batch() -> None:
    assert pack_batches([], batch_tokens=8) == []


def test_texts_in_one_batch_do_not_see_each_other(make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model, pair = make_tiny("gpt2", dtype=torch.float64), ["The capital of Varland", "The musician of Oslen plays"]
    alone = [second_moments(model, tiny_tokenizer, [2], [text], cache_dir=tmp_path) for text in pair]
    both = second_moments(model, tiny_tokenizer, [2], pair * 2, cache_dir=tmp_path)
    expected = sum(m.tokens * m.matrices[2] for m in alone) / sum(m.tokens for m in alone)
    torch.testing.assert_close(both.matrices[2], expected, rtol=1e-10, atol=1e-12)


# --- the sum itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 255, 256, 300, 600])
def test_panels_give_the_whole_product_exactly_symmetric(d: int) -> None:
    X = torch.randn(70, d, dtype=torch.float64, generator=torch.Generator().manual_seed(d))
    total = GramSum(d, dtype=torch.float64, device="cpu", block_rows=25)
    for part in X.split(20):
        total.add(part)
    C = total.mean(torch.float64)
    assert torch.equal(C, C.T)
    torch.testing.assert_close(C, X.T @ X / 70, rtol=1e-12, atol=1e-12)


def test_long_sums_keep_their_digits() -> None:
    """A plain float32 sum of this many blocks loses digits; sums in double of blocks in float32 do not."""
    X = torch.rand(64, 8, generator=torch.Generator().manual_seed(0)) + 1
    total, naive = GramSum(8, dtype=torch.float32, device="cpu", block_rows=64), torch.zeros(8, 8)
    for _ in range(4000):
        total.add(X)
        naive += X.T @ X
    exact = X.double().T @ X.double() / 64
    error = (total.mean(torch.float64) - exact).norm() / exact.norm()
    control = (naive.double() / (64 * 4000) - exact).norm() / exact.norm()
    assert error < 1e-6 < control


def test_relative_change_is_the_frobenius_distance_of_the_means() -> None:
    X = torch.randn(90, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    total = GramSum(300, dtype=torch.float64, device="cpu")
    total.add(X[:40])
    total.flush()
    half = [panel.clone() for panel in total.totals]
    total.add(X[40:])
    total.flush()
    A, B = X[:40].T @ X[:40] / 40, X.T @ X / 90
    assert relative_change(half, 40, total.totals, 90) == pytest.approx(float((A - B).norm() / B.norm()), rel=1e-10)


def test_vectors_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected X \(t, 4\)"):
        GramSum(4, dtype=torch.float32, device="cpu").add(torch.zeros(2, 5))


# --- convergence and conditioning ---------------------------------------------------------------------------------


def test_convergence_compares_the_first_half_of_the_texts_with_all(
    make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = make_tiny("gpt2", dtype=torch.float64)
    half = second_moments(model, tiny_tokenizer, [1], TEXTS[:15], cache_dir=tmp_path).matrices[1]
    everything = second_moments(model, tiny_tokenizer, [1], TEXTS, cache_dir=tmp_path)
    C = everything.matrices[1]
    assert everything.convergence[1] == pytest.approx(float((half - C).norm() / C.norm()), rel=1e-5)
    one = second_moments(model, tiny_tokenizer, [1], TEXTS[:1], cache_dir=tmp_path)
    assert math.isnan(one.convergence[1])


def test_too_few_tokens_are_warned_about_and_give_no_inverse(
    make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_tiny("gpt2")
    with caplog.at_level(logging.WARNING):
        few = second_moments(model, tiny_tokenizer, [1], TEXTS[:2], cache_dir=tmp_path)
    assert few.tokens < 128
    assert "rank deficient: they have no inverse; use more text" in caplog.text
    assert f"({few.tokens / 128:.2g} tokens per dimension)" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        rough = second_moments(model, tiny_tokenizer, [1], TEXTS[:1] * 20, cache_dir=tmp_path)
    assert 128 < rough.tokens < 1280
    assert "are a rough estimate" in caplog.text
    rows = torch.randn(500, 128, generator=torch.Generator().manual_seed(0))
    assert factorise(rows.T @ rows / 500)
    rows[:, 5] = 0  # a neuron that never fires
    for C in (few.matrices[1], rows.T @ rows / 500):
        with pytest.raises(StatisticsError, match="singular"):
            factorise(C)


# --- models and tokenizers ----------------------------------------------------------------------------------------


def test_training_flags_and_weights_are_left_as_they_were(make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = make_tiny("gpt2")
    expected = second_moments(model, tiny_tokenizer, [1], TEXTS, cache_dir=tmp_path / "a").matrices[1]
    model.train()
    describe(model).block(0).eval()
    flags = [module.training for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = second_moments(model, tiny_tokenizer, [1], TEXTS, cache_dir=tmp_path / "b")
    assert [module.training for module in model.modules()] == flags
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(moments.matrices[1], expected)
    assert not moments.matrices[1].requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_bfloat16_model_gives_float32_moments(make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    exact = second_moments(make_tiny("gpt2"), tiny_tokenizer, [1], TEXTS, cache_dir=tmp_path).matrices[1]
    low = second_moments(make_tiny("gpt2", dtype=torch.bfloat16), tiny_tokenizer, [1], TEXTS, cache_dir=tmp_path)
    assert low.meta["computed"] == [1]
    assert low.matrices[1].dtype == torch.float32
    assert float((low.matrices[1] - exact).norm() / exact.norm()) < 0.05


def test_a_begin_of_text_token_counts_and_an_end_token_is_not_added(
    make_tiny: Any, tiny_tokenizer: Any, tiny_tokenizer_bos: Any, tmp_path: Path
) -> None:
    model = make_tiny("llama")
    without = second_moments(model, tiny_tokenizer, [1], TEXTS, cache_dir=tmp_path)
    having = second_moments(model, tiny_tokenizer_bos, [1], TEXTS, cache_dir=tmp_path)
    assert having.tokens == without.tokens + len(TEXTS)
    rows = token_rows(tiny_tokenizer_bos, TEXTS, 256)
    assert rows == tiny_tokenizer_bos(TEXTS)["input_ids"]


def test_real_models_of_both_families_are_measured(models_root: Path, data_root: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("cf-gpt2", "cf-llama"):
        model = AutoModelForCausalLM.from_pretrained(models_root / name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(models_root / name)
        texts = read_texts(data_root / "me_ppl.json.gz", max_texts=12)
        moments = second_moments(model, tokenizer, [1, 2], texts, cache_dir=tmp_path)
        assert moments.tokens == sum(min(256, len(tokenizer(text)["input_ids"])) for text in texts)
        down = {layer: describe(model).down(layer) for layer in (1, 2)}
        expected = reference_moments(model, tokenizer, down, texts, max_length=256, dtype=torch.float32)
        for layer, C in expected.items():
            assert float((moments.matrices[layer] - C).norm() / C.norm()) < 1e-5


def test_tokenising_leaves_no_setting_on_the_tokenizer(tiny_tokenizer: Any) -> None:
    before = tiny_tokenizer.backend_tokenizer.to_str()
    rows = token_rows(tiny_tokenizer, TEXTS, 5)
    assert all(len(row) == 5 for row in rows)
    assert tiny_tokenizer.backend_tokenizer.to_str() == before


def test_texts_are_cut_to_what_the_model_holds(make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    moments = second_moments(
        make_tiny("gpt2"), tiny_tokenizer, [0], ["word " * 2000], max_length=10_000, cache_dir=tmp_path
    )
    assert moments.tokens == moments.meta["max_length"] == 256


def test_a_model_that_gives_nan_is_refused_and_nothing_is_kept(
    make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = make_tiny("gpt2")
    with torch.no_grad():
        next(model.parameters())[:] = math.nan
    with pytest.raises(NumericalError, match="layer 1"):
        second_moments(model, tiny_tokenizer, [1], TEXTS, cache_dir=tmp_path)
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    ("layers", "options", "error", "message"),
    [
        ([], {}, StatisticsError, "at least one layer"),
        ([7], {}, ArchitectureError, "from 0 to 2, got 7"),
        ([0], {"max_length": 0}, StatisticsError, "max_length"),
        ([0], {"texts": []}, DatasetError, "at least one text"),
        ([0], {"texts": None}, DatasetError, "got NoneType"),
    ],
)
def test_bad_input_gets_a_typed_error(
    make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path, layers: list[int], options: dict[str, Any],
    error: type[Exception], message: str,
) -> None:  # fmt: skip
    options = {"texts": TEXTS, "cache_dir": tmp_path} | options
    with pytest.raises(error, match=message):
        second_moments(make_tiny("gpt2"), tiny_tokenizer, layers, **options)


def test_progress_ends_at_the_number_of_tokens(make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    moments = second_moments(
        make_tiny("gpt2"), tiny_tokenizer, [0, 2], TEXTS, batch_tokens=64, cache_dir=tmp_path,
        progress=lambda done, total, what: calls.append((done, total, what)),
    )  # fmt: skip
    assert len(calls) > 3
    assert [done for done, _, _ in calls] == sorted(done for done, _, _ in calls)
    assert calls[-1] == (moments.tokens, moments.tokens, "second moments of layers 0, 2")
