"""Costs on paper are what torch counts in the code that they are about."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from torch.utils.flop_counter import FlopCounterMode

from errata.benchmarks.speed import cost
from errata.benchmarks.speed.cost import EditTokens, ModelCost
from errata.editors.core.families.search_rows import ON_CPU, PromptRow, SearchProblem
from errata.editors.core.families.value_search import Objective, find_targets
from errata.editors.core.model.activations import last_keys
from errata.editors.core.model.architecture import describe
from errata.editors.core.moments.collect import collect, plan_passes

CONFIG = hf.LlamaConfig(
    vocab_size=500,
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
PREFIX, SUFFIX, ANSWER, ROWS, LAYER = 6, 5, 2, 3, 1


@pytest.fixture(scope="module")
def parts() -> Any:
    return describe(hf.LlamaForCausalLM(CONFIG).eval())


def counted(work: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test_a_step_of_the_search_costs_what_the_formula_says(parts: Any) -> None:
    ids = tuple(range(3, 3 + PREFIX + SUFFIX))
    row = PromptRow(ids, PREFIX, ids[-ANSWER:])
    essence = PromptRow(ids[: PREFIX + 1], PREFIX)
    problem = SearchProblem("one", (row,) * ROWS, essence)

    def search(steps: int) -> None:
        objective = Objective(steps, 0.1, 0.5, 4.0, 0.06, stop_loss=0.0)
        find_targets(parts, [problem], objective, layer=LAYER, loss_layer=5, site="block", pad=0, pace=ON_CPU)

    search(1)  # a model is tried once
    step = counted(lambda: search(4)) - counted(lambda: search(3))
    # Padding: the essence row shares the bucket, and is as long as the others.
    tokens = EditTokens(0, (ROWS + 1) * SUFFIX, PREFIX + SUFFIX, ROWS * ANSWER + 1, 0, 0)
    assert step == pytest.approx(cost.search_step(ModelCost.of(CONFIG), tokens, LAYER), rel=0.05)


def test_keys_and_moments_cost_what_the_formulas_say(parts: Any) -> None:
    rows, model = [list(range(3 + i, 11 + i)) for i in range(8)], ModelCost.of(CONFIG)
    found = counted(lambda: last_keys(parts, rows, [0, LAYER], pad=0, batch_tokens=64))
    # The last down projection does not run: only its input is wanted.
    skipped = 2 * model.d * model.d_in * 64
    assert found + skipped == pytest.approx(cost.keys(model, EditTokens(64, 0, 8, 0, 0, 0), LAYER), rel=0.05)
    plan = plan_passes(rows, 64)
    found = counted(lambda: collect(parts, plan, [0, LAYER], pad=0, block_rows=64))
    # torch does not count products that are added in place, as those of x x^T are.
    products = 64 * 2 * model.d_in**2
    assert found + skipped + products == pytest.approx(cost.moments(model, 64, 8, LAYER, 2), rel=0.05)


def test_the_page_has_the_numbers_of_the_formulas() -> None:
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    tokens = EditTokens(prefix=89.2, suffix=27.3, seen=18.5, reads=7.9, asked=193.7, answers=29.5)
    small, large = ModelCost.of_shape("llama-3-8b"), ModelCost.of_shape("llama-3-70b")
    found: dict[str, list[float]] = {}
    for model, last in ((small, 8), (large, 14)):
        own = {
            "the search for 100,000 values": 1e5 * cost.search(model, tokens, last, steps=25),
            "keys": 1e5 * cost.keys(model, tokens, last),
            "second moments, once": cost.moments(model, 44e6, 128, last, layers=5),
            "every probe asked once": 1e5 * cost.evaluation(model, tokens),
            "MEMIT's solves in float64, batches of 1,000": cost.solves(model, 100_000, 1000, layers=5),
        }
        for name, operations in own.items():
            found.setdefault(name, []).append(operations / 1e18)
    for name, values in found.items():
        (row,) = re.findall(rf"^\| {name} \| ([\d.]+) \| ([\d.]+) \|", page, flags=re.MULTILINE)
        assert [float(cell) for cell in row] == pytest.approx(values, rel=0.02), name
    steps = [f"{cost.search_step(model, tokens, last) / 1e12:.3g}" for model, last in ((small, 8), (large, 14))]
    assert f"{steps[0]} and {steps[1]} TFLOP per edit" in page
    hours = 1e18 * found["the search for 100,000 values"][0] / 8 / 200e12 / 3600
    assert f"{hours:.2f} hours for the search on 8B" in page
    sizes = [round(1e5 * cost.factor_bytes(model, 5) / 1e9) for model in (small, large)]
    assert f"| {sizes[0]} GB | {sizes[1]} GB |" in page


def test_the_sizes_of_the_shapes_are_those_of_their_models() -> None:
    small, large = ModelCost.of_shape("llama-3-8b"), ModelCost.of_shape("llama-3-70b")
    assert [round(model.parameters / 1e9, 1) for model in (small, large)] == [8.0, 70.6]
    for model in (small, large):  # all weights of the blocks are linear maps, but for the norms
        blocks = model.layers * model.block / 2
        assert model.parameters - blocks - model.head == pytest.approx(0, abs=1e-4 * model.parameters)
    assert cost.factor_bytes(small, 5) == 4 * 5 * (4096 + 14336)
