"""Two processes share the work of one run, with the results of one process; a rank that was killed goes on."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from forked_ranks import in_ranks
from moment_texts import TEXTS

from errata.editors import MEMIT
from errata.editors.core import ranks
from errata.editors.core.errors import NumericalError, RequestError
from errata.editors.core.families.value_search import Target
from errata.editors.core.model.architecture import describe
from errata.editors.core.moments.second_moments import Moments, second_moments
from errata.editors.core.rank_messages import packed, unpacked
from errata.editors.core.request import EditRequest

REQUESTS = [
    EditRequest("The capital of {} is", subject=place, target=target)
    for place, target in (("Varland", "Oslen"), ("Quelm", "Brast"), ("the land of Tarvos", "Oslen"))
]


def test_work_is_shared_out_and_comes_back_in_order(tmp_path: Path) -> None:
    def work(number: int) -> Any:
        taken: list[int] = []

        def squares(items: Any) -> list[int]:
            taken.extend(items)
            return [item * item for item in items]

        found = ranks.share_out(range(5), squares)
        assert ranks.share_out([], squares) == []
        assert ranks.from_first(number) == 0

        def fails(items: Any) -> list[int]:
            if 1 in items:
                raise NumericalError("no number")
            return list(items)

        with pytest.raises(NumericalError, match="no number"):
            ranks.share_out(range(5), fails)
        return found, taken

    assert in_ranks(tmp_path / "two", work) == [([0, 1, 4, 9, 16], [0, 2, 4]), ([0, 1, 4, 9, 16], [1, 3])]
    assert (ranks.rank(), ranks.count(), ranks.share_out([2], list)) == (0, 1, [2])


def test_what_ranks_send_each_other_arrives_as_it_was() -> None:
    target = Target(torch.arange(3.0), torch.tensor([0.1, -2.0], dtype=torch.bfloat16), [{"nll": 0.1, "kl": math.inf}])
    value = [(1, None, True, "Ünï"), {"a": [target], 2: {"b": ()}}, 0.1, torch.zeros(0, 4)]
    plain, records, number, empty = unpacked(packed(value))
    assert (plain, number, empty.shape) == ((1, None, True, "Ünï"), 0.1, (0, 4))
    assert records[2] == {"b": ()}
    (again,) = records["a"]
    assert again.losses == target.losses
    for name in ("initial", "delta"):
        assert torch.equal(getattr(again, name), getattr(target, name))
        assert getattr(again, name).dtype == getattr(target, name).dtype
    shared = torch.ones(2, 2)
    assert all(torch.equal(one, shared.T) for one in unpacked(packed([shared.T, shared])))


@pytest.mark.parametrize(
    "error",
    [
        NumericalError("no number", record="r1", row=2),
        RequestError("no slot", record="r1", field="prompt"),
        FileNotFoundError(2, "no such file", "x"),
        ValueError("bad"),
    ],
)
def test_errors_arrive_with_what_they_name(error: Any) -> None:
    again = unpacked(packed(error))
    assert (type(again), str(again)) == (type(error), str(error))
    assert vars(again) == vars(error)


def test_nothing_but_plain_values_records_and_errors_is_sent_or_made() -> None:
    with pytest.raises(TypeError, match="plain values"):
        packed(object())
    for forged in ('["record", "os", "system", {}]', '["error", "builtins", "dict", [], {}]'):
        tree = forged.encode()
        with pytest.raises(TypeError, match="expected a"):
            unpacked(len(tree).to_bytes(8, "little") + tree + safetensors.torch.save({}))


def test_moments_of_two_ranks_are_those_of_one_also_when_one_was_killed(
    make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = make_tiny("gpt2")

    def moments(cache: Path, kill: int = 0) -> tuple[Moments, int]:
        batches = 0

        def progress(done: int, total: int, what: str) -> None:  # noqa: ARG001
            nonlocal batches
            batches += 1
            if batches == kill:
                os.kill(os.getpid(), signal.SIGKILL)

        options: dict[str, Any] = {"batch_tokens": 64, "block_rows": 50, "save_seconds": 0, "progress": progress}
        return second_moments(model, tiny_tokenizer, [0, 1], TEXTS, cache_dir=cache, **options), batches

    (alone, all_batches), cache = moments(tmp_path / "alone"), tmp_path / "shared"
    codes = in_ranks(tmp_path / "killed", lambda number: moments(cache, kill=4 * number))
    assert codes[1] == -signal.SIGKILL
    assert isinstance(codes[0], int)  # it has no moments without the other
    found = in_ranks(tmp_path / "again", lambda number: moments(cache))  # noqa: ARG005
    assert sum(batches for _, batches in found) < all_batches, "what was saved was not computed again"
    for shared, _ in found:
        assert shared.tokens == alone.tokens
        assert shared.meta == alone.meta
        for layer, C in alone.matrices.items():
            assert torch.equal(shared.matrices[layer], found[0][0].matrices[layer])
            torch.testing.assert_close(shared.matrices[layer], C, rtol=1e-5, atol=1e-7)
            assert shared.convergence[layer] == pytest.approx(alone.convergence[layer], rel=1e-4)
    read, batches = moments(cache)
    assert (batches, read.meta["computed"]) == (0, [])


def test_values_of_two_ranks_are_those_of_one(make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = make_tiny("gpt2", dtype=torch.float64)
    config = {"layers": [0, 1], "v_num_grad_steps": 5, "context_templates": ["{}", "So {}"]}
    width = describe(model).map_at(0).shape[1]
    moments = {layer: torch.eye(width, dtype=torch.float64) for layer in (0, 1)}

    def patch(_: int) -> dict[str, Any]:
        edit = MEMIT(model, tiny_tokenizer, config, moments=moments).compute_together([REQUESTS])
        return {name: update.matrix(torch.float64, torch.device("cpu")) for name, update in edit.patch.updates.items()}

    alone, both = patch(0), in_ranks(tmp_path / "two", patch)
    for shared in both:
        assert list(shared) == list(alone)
        for name, update in alone.items():
            torch.testing.assert_close(shared[name], update, rtol=1e-8, atol=1e-12)
