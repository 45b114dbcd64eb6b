"""Beginnings that rows share are run once, and nothing that comes of a row depends on the rows beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from errata.editors.core.forward.layerwise import LayerWalk
from errata.editors.core.forward.suffix import prepare_suffixes, shared_prefixes
from errata.editors.core.model.architecture import describe

CONTEXT = tuple(range(10, 20))
OTHER = tuple(range(30, 37))


def test_heads_are_what_rows_have_in_common_up_to_their_starts() -> None:
    rows = [(*CONTEXT, 1, 2), (*CONTEXT, 3, 4), (*OTHER, 1, 2), (*OTHER, 1, 5), (1, 2), (1, 2)]
    starts = [10, 10, 7, 6, 0, 1]
    assert shared_prefixes(rows, starts) == [10, 10, 7, 6, 0, 1]


def test_rows_with_little_in_common_have_no_heads() -> None:
    assert shared_prefixes([(1, 2, 3, 4, 5, 6), (1, 3, 4, 5, 6, 7)], [4, 4]) == [0, 0]
    assert shared_prefixes([(*CONTEXT, 1, 2)], [10]) == [0]


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "neox"])
def test_a_row_gives_the_same_alone_and_among_rows_that_begin_alike(make_tiny: Any, architecture: str) -> None:
    parts = describe(make_tiny(architecture, dtype=torch.float64))
    rows = [(*CONTEXT, 1, 2, 3), (*CONTEXT, 4, 5, 2, 3), (*OTHER, 6, 7, 9), (*OTHER, 6, 5, 5), (8, 9, 9)]
    starts = [len(row) - 2 for row in rows]
    assert max(shared_prefixes(rows, starts)) == len(CONTEXT)
    vectors = torch.randn(len(rows), parts.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options: dict[str, Any] = {"layer": 0, "last": 2, "site": "mlp", "pad": 0}
    with torch.no_grad():
        together = prepare_suffixes(parts, rows, starts, **options)
        found = together.run(vectors)
        for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
            alone = prepare_suffixes(parts, [row], [start], **options)
            # Llama computes its norms in float32, whatever the weights are in.
            torch.testing.assert_close(together.initial[i : i + 1], alone.initial, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found[i : i + 1], alone.run(vectors[i : i + 1]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "neox"])
def test_a_walk_leaves_no_trace_on_the_model_and_gives_hidden_states_of_watched_rows_only(
    make_tiny: Any, architecture: str
) -> None:
    parts = describe(make_tiny(architecture))
    rows = [(1, 2, 3), (*CONTEXT, 1, 2, 3), (4, 5), (*CONTEXT, 4, 5)]
    before = [{name: dict(module.__dict__) for name, module in parts.model.named_modules()}]
    walk = LayerWalk(parts, rows, (0, 1), pad=0, watched=(0, 2))
    every = LayerWalk(parts, rows, (0, 1), pad=0, watched=range(len(rows)))
    torch.testing.assert_close(walk.keys, every.keys)
    torch.testing.assert_close(walk.hidden, every.hidden[[0, 2]])
    for name, module in parts.model.named_modules():
        assert module.__dict__.keys() == before[0][name].keys(), name
        assert not module._forward_hooks, name
        assert not module._forward_pre_hooks, name
