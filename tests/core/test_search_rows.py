"""The search for values in few buckets: padded suffixes give what exact ones do, and a step costs what is said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from errata.benchmarks.speed.targets import CONTEXTS, objective, problems_like_counterfact
from errata.editors.core.families.search_rows import (
    ON_ACCELERATOR,
    ON_CPU,
    PromptRow,
    SearchPace,
    SearchProblem,
    padded_lengths,
)
from errata.editors.core.families.value_search import Objective, Target, _chunks, find_targets
from errata.editors.core.forward import whole_rows
from errata.editors.core.forward.block_calls import PrefixCache
from errata.editors.core.forward.suffix import prepare_suffixes
from errata.editors.core.model.architecture import describe

EXACT = replace(ON_CPU, pass_tokens=0)
# Each of them makes the host wait for the device, or sends it numbers for which the host waits.
WAITS = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "masked_select", "_unique2", "equal", "unique_dim")
HOST = ("tolist", "item", "tensor", "as_tensor", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy")


def test_rows_share_a_pass_as_long_as_padding_is_cheaper_than_another() -> None:
    lengths = [1, 1, 1, 2, 3, 3, 9]
    assert padded_lengths(lengths, 0) == lengths
    assert padded_lengths(lengths, 10**6) == [9] * 7
    # 7 cells and one pass for 1-3, padded; without padding 3 + 2 + 6 cells and two passes more.
    assert padded_lengths(lengths, 8) == [3, 3, 3, 3, 3, 3, 9]
    assert padded_lengths(lengths, 5) == [1, 1, 1, 3, 3, 3, 9]
    assert padded_lengths([4], 5) == [4]


@pytest.mark.parametrize("splits", [True, False])
def test_a_row_gives_the_same_alone_and_beside_longer_ones(
    make_tiny: Any, splits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at the end of the positions that the model has, where padding must not go on counting."""
    parts = describe(make_tiny("gpt2", dtype=torch.float64))
    monkeypatch.setattr(whole_rows, "suffixes_agree", lambda _: splits)
    count = parts.max_positions
    assert count is not None
    rows = [tuple(range(count)), (3, 4, 5, 6), (7, 8, 9), (9, 9, 9, 4, 5, 6, 3)]
    starts = [count - 1, 3, 0, 2]
    vectors = torch.randn(len(rows), parts.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options: dict[str, Any] = {"layer": 0, "last": 2, "site": "mlp", "pad": 0}
    with torch.no_grad():
        together = whole_rows.rows_at_one_position(parts, rows, starts, **options)
        assert together.length == 5
        for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
            alone = prepare_suffixes(parts, [row], [start], **options)
            found = together.run(vectors)[i, : len(row) - start]
            wanted = alone.run(vectors[i : i + 1])[0]
            torch.testing.assert_close(together.readout(found), alone.readout(wanted), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("site", ["mlp", "block"])
@pytest.mark.parametrize("pace", [ON_CPU, ON_ACCELERATOR, replace(ON_ACCELERATOR, shrink_at=0.9, read_every=3)])
def test_every_pace_finds_what_exact_lengths_and_a_read_per_step_find(
    make_tiny: Any, pace: SearchPace, site: Any
) -> None:
    parts = describe(make_tiny("gpt2", dtype=torch.float64))
    problems = problems_like_counterfact(7, 96, (0, 5, 9), seed=1)

    def search(pace: SearchPace, stop_loss: float) -> list[Target]:
        given = Objective(6, 0.3, 0.1, 3.0, 0.0625, stop_loss=stop_loss)
        return find_targets(parts, problems, given, layer=0, loss_layer=2, site=site, pad=0, keep_trace=True, pace=pace)

    losses = sorted(entry["loss"] for target in search(EXACT, 0.0) for entry in target.losses[:5])
    middle = len(losses) // 2
    stop_loss = sum(losses[middle - 1 : middle + 1]) / 2  # so that requests stop at different steps
    wanted, found = search(EXACT, stop_loss), search(pace, stop_loss)
    assert len({len(target.losses) for target in wanted}) > 2
    for ours, theirs in zip(found, wanted, strict=True):
        assert len(ours.losses) == len(theirs.losses)
        assert ours.trace is not None
        assert theirs.trace is not None
        torch.testing.assert_close(ours.trace, theirs.trace, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(ours.delta, theirs.delta, rtol=1e-6, atol=1e-9)


# --- what a step costs ------------------------------------------------------------------------------------------------


def test_a_chunk_holds_as_many_requests_as_the_head_may_read_for() -> None:
    row = PromptRow((3, 4, 5, 6), 1, (5, 6))
    problems = [SearchProblem(str(i), (row, row), PromptRow((3,), 0)) for i in range(5)]  # 5 reads each

    def sizes(most_reads: int) -> list[int]:
        return [len(chunk) for chunk in _chunks(problems, 1000, most_reads)]

    assert (sizes(25), sizes(10), sizes(9), sizes(1)) == ([5], [2, 2, 1], [1] * 5, [1] * 5)


class _Operators(TorchDispatchMode):
    """Counts calls of operators, those of the backward pass included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class _Host(TorchFunctionMode):
    """Counts what passes between tensors and the host. On a CPU no operator is called for that."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[getattr(func, "__name__", "")] += 1
        return func(*args, **(kwargs or {}))


def _per_step(run: Callable[[int], Any], steps: int) -> tuple[float, dict[str, float]]:
    """Return operator calls per step, and the calls that make host or device wait, as the cost of further steps."""
    counted = []
    for number in (steps, 2 * steps):
        with _Host() as host, _Operators() as operators:
            run(number)
        waits = Counter({name: operators.calls[name] for name in WAITS})
        waits.update({name: host.calls[name] for name in HOST})
        counted.append((sum(operators.calls.values()), waits))
    (few, before), (many, after) = counted
    return (many - few) / steps, {name: (n - before[name]) / steps for name, n in after.items() if n != before[name]}


def test_operators_of_a_step_do_not_grow_with_the_requests_and_the_host_reads_once_in_four_steps() -> None:
    """On 30 layers, in one bucket: about 5,500 calls a step, for 2 requests as for 32."""
    config = hf.LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=30,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    parts = describe(hf.LlamaForCausalLM(config).eval())
    counts = {}
    for n in (8, 32):
        problems = problems_like_counterfact(n, 300, CONTEXTS["memit"])
        assert len({row.suffix_length for problem in problems for row in problem.rows}) > 3

        def search(steps: int, problems: list[SearchProblem] = problems) -> list[Target]:
            given: dict[str, Any] = {"layer": 1, "loss_layer": 29, "site": "block", "pad": 0}
            return find_targets(parts, problems, objective(steps), **given, pace=ON_ACCELERATOR)

        search(1)  # a model is tried once
        counts[n], waits = _per_step(search, ON_ACCELERATOR.read_every)
        assert waits == {"tolist": 1 / ON_ACCELERATOR.read_every}
    assert counts[8] == counts[32] <= 6_000


def test_attention_reads_keys_and_values_from_one_tensor_that_is_made_once(make_tiny: Any) -> None:
    parts = describe(make_tiny("llama"))
    ready = prepare_suffixes(parts, [(3, 4, 5, 6)], [2], layer=0, last=2, site="block", pad=0)
    arguments = (*ready.calls[0].args, *ready.calls[0].kwargs.values())
    cache = next(argument for argument in arguments if isinstance(argument, PrefixCache))
    seen = []
    for _ in range(2):
        vectors = torch.ones(1, parts.d_model, requires_grad=True)
        ready.run(vectors).sum().backward()
        assert vectors.grad is not None
        kept = [tensor for pair in cache._room.values() for tensor in pair]
        assert not any(tensor.requires_grad for tensor in kept)
        seen.append([tensor.data_ptr() for tensor in kept])
    assert seen[0] == seen[1]
