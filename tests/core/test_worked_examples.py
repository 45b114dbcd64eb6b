"""The pictures in the module docstrings of suffix, layerwise, codebook and training_order show what the code does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from errata.editors.core.codebook import training_order
from errata.editors.core.codebook.codebook import Codebook, Correction
from errata.editors.core.families.trainables import TrainingRow
from errata.editors.core.forward.layerwise import LayerWalk
from errata.editors.core.forward.suffix import PrefixCache, prepare_suffixes, shared_prefixes
from errata.editors.core.ledger.patch import LowRank
from errata.editors.core.model.architecture import Architecture, describe
from errata.editors.core.model.own_forward import hooked
from errata.editors.core.request import EditRequest

A, B, C, D, E, F, G = range(1, 8)


def positions_run(parts: Architecture, run: Callable[[], Any]) -> list[int]:
    """Positions that each block's MLP computes during `run`: a block that is skipped or left before it counts 0."""
    counts = [0] * parts.n_layers

    def count(layer: int) -> Any:
        def hook(_module: nn.Module, args: Any, _output: Any) -> None:
            counts[layer] += args[0].shape[:-1].numel()

        return hook

    downs = [parts.down(layer) for layer in range(parts.n_layers)]
    with hooked(*(down.register_forward_hook(count(layer)) for layer, down in enumerate(downs))):
        run()
    return counts


def test_the_example_of_suffix_runs_and_keeps_what_its_picture_says(make_tiny: Any) -> None:
    parts = describe(make_tiny("gpt2", n_layers=4))
    rows, starts = [(A, B, C, D, E), (A, B, C, F, G)], [3, 3]
    assert shared_prefixes(rows, starts) == [3, 3]
    ready: list[Any] = []
    options: dict[str, Any] = {"layer": 1, "last": 3, "site": "mlp", "pad": 0}
    prepared = positions_run(parts, lambda: ready.append(prepare_suffixes(parts, rows, starts, **options)))
    assert prepared == [3 + 4, 3 + 4 + 4, 3 + 4, 3 + 4], "block 1 runs its suffix again, to try the residual"
    (suffixes,) = ready
    assert suffixes.hidden.shape == (2, 2, parts.d_model)
    assert suffixes.blocks == range(2, 4)
    arguments = (*suffixes.calls[0].args, *suffixes.calls[0].kwargs.values())
    cache = next(argument for argument in arguments if isinstance(argument, PrefixCache))
    kept = {layer: keys.shape[-2] for layer, (keys, _) in cache._layers.items()}
    assert kept == {1: 3, 2: 3, 3: 3}
    vectors = torch.randn(2, parts.d_model, generator=torch.Generator().manual_seed(0))
    assert positions_run(parts, lambda: suffixes.run(vectors)) == [0, 0, 4, 4]


def test_the_example_of_layerwise_runs_what_its_picture_says(make_tiny: Any) -> None:
    parts = describe(make_tiny("gpt2", n_layers=4))
    rows = [(A, B, C, D, E), (F, G, C, D, E)]
    walks: list[LayerWalk] = []
    entered = [0] * parts.n_layers

    def enter(layer: int) -> Any:
        def hook(_module: nn.Module, args: Any) -> None:
            entered[layer] += args[0].shape[:-1].numel()

        return hook

    downs = [parts.down(layer) for layer in range(parts.n_layers)]
    with hooked(*(down.register_forward_pre_hook(enter(layer)) for layer, down in enumerate(downs))):
        first = positions_run(parts, lambda: walks.append(LayerWalk(parts, rows, (1, 2), pad=0, watched=(0,))))
        assert first == [10 + 5, 10 + 5 + 5, 5 + 5, 0], (
            "beside the picture, row 0 is tried: once through, block 1 twice"
        )
        (walk,) = walks
        update = LowRank(torch.ones(parts.d_model, 1), torch.ones(1, parts.d_mlp))
        entered[:] = [0] * parts.n_layers
        second = positions_run(parts, lambda: walk.advance(update))
    assert second == [0, 0, 5, 0], "row 0 runs through block 2"
    assert entered == [0, 0, 10, 0], "row 1 runs up to its down projection"
    assert (walk.keys.shape, walk.hidden.shape) == ((2, parts.d_mlp), (1, parts.d_model))


def correction(query: float, value: float, replacement: Any = "replace_last") -> Correction:
    keys, values = torch.tensor([[float(query)]]), torch.tensor([[float(value)]])
    return Correction(keys, values, ((1,),), 0.5, replacement, "coverage", 0.0)


def test_the_example_of_codebook_replaces_the_positions_that_its_picture_says() -> None:
    x = torch.tensor([[0.0, 1, 2, 3, 4], [9, 8, 7.25, 6, 5]])[..., None]
    module, (a, b) = nn.Linear(1, 1), (100.0, 200.0)
    own = module(x).detach()
    pictures = {"replace_last": "..a.. ..b..", "replace_all": "aaa.. bbb..", "replace_prompt": "aa... bb..."}
    for replacement, picture in pictures.items():
        book = Correction.folded([correction(2, a, replacement), correction(7, b, replacement)])
        assert book.keys.tolist() == [[2], [7]]
        assert book.lookup(x.reshape(-1, 1)).tolist() == [-1, -1, 0, -1, -1, -1, -1, 1, -1, -1]
        output = book(module, (x,), own)
        assert output is not None
        for row, marks in enumerate(picture.split()):
            for position, mark in enumerate(marks):
                expected = {"a": a, "b": b, ".": float(own[row, position])}[mark]
                assert float(output[row, position]) == expected, (replacement, row, position)


def question(inputs: list[float], column: int) -> training_order.GraceQuestion:
    request = EditRequest("The capital of {} is", "Varland", "Brast")
    x = torch.tensor(inputs, dtype=torch.float32)[:, None]
    row = TrainingRow("0", (A, B, C, D, E), (column,), (F,))
    return training_order.GraceQuestion(request, row, x, range(column, column + 1), correction(inputs[column], 0.0))


def test_the_example_of_training_order_makes_the_waves_that_its_picture_says() -> None:
    questions = [question([0, 1, 2, 3, 4], 2), question([2, 5, 6, 7, 8], 3)]
    empty = Codebook.empty(questions[0].correction)
    jobs = training_order.plan_jobs(empty, questions, sequential=True)
    assert [job.decision.rule for job in jobs] == ["new", "new"]
    assert [list(job.other_columns) for job in jobs] == [[], [0]]
    assert jobs[1].needs == [questions[0].correction]
    assert training_order.order_jobs(jobs) == [[0], [1]]
    assert training_order.order_jobs(training_order.plan_jobs(empty, questions, sequential=False)) == [[0, 1]]
    apart = [questions[0], question([9, 5, 6, 7, 8], 3)]
    assert training_order.order_jobs(training_order.plan_jobs(empty, apart, sequential=True)) == [[0, 1]]
