"""What the ledger does, and what it refuses by a typed error with the model unchanged."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from random_patches import DOWN, HALVES, OTHER, SQUARE, Open, State, low_rank, noise, patch
from torch import nn

from errata.editors.core.errors import LedgerError, NumericalError
from errata.editors.core.ledger import arithmetic, weight_sums
from errata.editors.core.ledger.entry import EditInfo
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import Dense, LowRank, Patch
from errata.editors.core.request import EditRequest

DTYPES = [torch.float32, torch.float64, *HALVES]


# --- what it does -------------------------------------------------------------------------------------------------


def test_entries_come_in_order_and_hold_their_own_copies(ledger: Ledger) -> None:
    request = EditRequest("The capital of {} is", "Varland", "Brast")
    given, config = patch(), {"loss": (1.5, 2), "who": "a"}
    first = ledger.append("a", given, EditInfo("rome", (request,), config, ({"steps": 3},)))
    second = ledger.append("b", patch(3))
    given.updates[DOWN].tensors[0].zero_()
    config["who"] = "b"
    assert ledger.entries == (first, second)
    assert [entry.order for entry in ledger.entries] == [0, 1]
    assert first.info == EditInfo("rome", (request,), {"loss": [1.5, 2], "who": "a"}, ({"steps": 3},))
    assert second.info == EditInfo()
    assert first.patch.updates[DOWN].norm() > 0
    assert "a" in ledger
    assert "c" not in ledger
    assert len(ledger) == 2
    ledger.remove("a")
    assert ledger.append("a", patch()).order == 2
    assert [entry.id for entry in ledger.entries] == ["b", "a"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv1d_weights_are_turned_even_where_they_are_square(make_tiny: Any, dtype: torch.dtype) -> None:
    model = make_tiny("gpt2", dtype=dtype, n_layers=2)
    block = model.transformer.h[0]
    before = {name: model.get_parameter(name).detach().clone() for name in (DOWN, SQUARE)}
    change = patch()
    Ledger.of(model).append("a", change)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    for name, module in ((DOWN, block.mlp.c_proj), (SQUARE, block.attn.c_proj)):
        delta = change.updates[name].matrix(working, torch.device("cpu"))
        assert torch.allclose(module.weight.to(working), (before[name].to(working) + delta.T).to(dtype).to(working))


def test_linear_weights_are_not_turned(make_tiny: Any) -> None:
    model = make_tiny("llama", n_layers=1)
    name = "model.layers.0.self_attn.o_proj.weight"
    before, delta = model.get_parameter(name).detach().clone(), noise(32, 32)
    Ledger.of(model).append("a", Patch({name: Dense(delta)}))
    assert torch.equal(model.get_parameter(name), before + delta)


def test_products_of_several_ranks_are_taken_in_double(ledger: Ledger) -> None:
    """Where ranks cancel, float32 would lose what is left of them."""
    before = ledger.base(DOWN).clone()
    U = torch.full((32, 3), 1.0)
    V = torch.stack([torch.full((128,), 3e7), torch.full((128,), 1.0), torch.full((128,), -3e7)])
    ledger.append("cancels", Patch({DOWN: LowRank(U, V)}), max_norm_ratio=1e9)
    after = ledger.model.get_parameter(DOWN).detach()
    assert torch.equal(after, before + 1.0)


def test_removing_many_is_removing_each(make_tiny: Any, digest: Any) -> None:
    one, other = make_tiny("gpt2", n_layers=2), make_tiny("gpt2", n_layers=2)
    for model in (one, other):
        for i in range(6):
            Ledger.of(model).append(f"e{i}", patch(i))
    Ledger.of(one).remove_many(["e4", "e0", "e3"])
    for name in ("e0", "e3", "e4"):
        Ledger.of(other).remove(name)
    assert digest(one) == digest(other)


def test_the_caller_settings_do_not_reach_the_bits(make_tiny: Any, digest: Any) -> None:
    def edited(context: Any) -> str:
        model = make_tiny("gpt2", n_layers=2)
        with context:
            Ledger.of(model).append("a", patch())
            Ledger.of(model).append("b", patch(1))
            Ledger.of(model).remove("a")
        return digest(model)

    plain = edited(torch.enable_grad())
    assert edited(torch.autocast("cpu", dtype=torch.bfloat16)) == plain
    assert edited(torch.inference_mode()) == plain


def test_an_entry_without_updates_changes_no_weight(ledger: Ledger, digest: Any) -> None:
    before = digest(ledger.model)
    ledger.append("adapter", Patch({}), EditInfo("grace"))
    assert digest(ledger.model) == before
    assert ledger.nbytes() == 0
    ledger.remove("adapter")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_is_factors_base_sum_and_bounded_snapshots_and_ends_with_the_last_entry(
    open_ledger: Open, dtype: torch.dtype
) -> None:
    ledger = open_ledger(dtype)
    ledger.spacing = weight_sums.Spacing(every=4, kept=2)
    weight = ledger.model.get_parameter(DOWN)
    factors = sum(tensor.nbytes for tensor in low_rank().tensors)
    summed = weight.numel() * arithmetic.FOLD_DTYPES[dtype].itemsize
    for i in range(40):
        ledger.append(f"e{i}", Patch({DOWN: low_rank(i)}))
        held = ledger.nbytes() - (i + 1) * factors - weight.nbytes
        assert 0 <= held <= (2 + (dtype in HALVES)) * summed
    ledger.clear()
    assert ledger.nbytes() == 0


def test_untouched_shows_the_base_and_then_the_same_edited_bytes(ledger: Ledger, digest: Any) -> None:
    base = digest(ledger.model)
    ledger.append("a", patch())
    edited = digest(ledger.model)
    with ledger.untouched():
        assert digest(ledger.model) == base
        with ledger.untouched():
            assert digest(ledger.model) == base
        assert digest(ledger.model) == base
    assert digest(ledger.model) == edited

    with pytest.raises(ZeroDivisionError), ledger.untouched(), torch.no_grad():
        ledger.model.get_parameter(DOWN).zero_()
        raise ZeroDivisionError
    assert digest(ledger.model) == edited
    ledger.clear()
    assert digest(ledger.model) == base


@pytest.mark.parametrize("operation", ["append", "remove", "transaction", "rebase", "restore"])
def test_the_ledger_refuses_to_change_inside_untouched(ledger: Ledger, operation: str, state: State) -> None:
    ledger.append("a", patch())
    edited = state(ledger)
    calls: dict[str, Callable[[], object]] = {
        "append": lambda: ledger.append("b", patch()),
        "remove": lambda: ledger.remove("a"),
        "transaction": lambda: ledger.transaction().__enter__(),
        "rebase": ledger.rebase,
        "restore": ledger.restore,
    }
    with ledger.untouched():
        bare = state(ledger)
        with pytest.raises(LedgerError, match="untouched"):
            calls[operation]()
        assert state(ledger) == bare
    assert state(ledger) == edited


def test_an_inner_transaction_fails_by_itself_and_an_outer_one_takes_all(ledger: Ledger, state: State) -> None:
    start = state(ledger)
    with pytest.raises(KeyError), ledger.transaction():
        entry = ledger.append("a", patch())
        middle = state(ledger)[:3]
        with pytest.raises(ZeroDivisionError), ledger.transaction():
            ledger.append("b", patch(1))
            ledger.remove("a")
            raise ZeroDivisionError
        assert state(ledger)[:3] == middle
        with ledger.transaction():
            ledger.append("c", patch(2))
        raise KeyError
    assert state(ledger) == start
    with ledger.transaction():
        again = ledger.append("a", patch())
    assert state(ledger) == (middle[0], (again,), again.order + 1, False, [])
    assert again.order == entry.order


def test_the_ledger_works_outside_the_main_thread(ledger: Ledger, state: State) -> None:
    before = state(ledger)[0]
    worker = threading.Thread(target=lambda: (ledger.append("a", patch()), ledger.clear(), ledger.append("b", patch())))
    worker.start()
    worker.join()
    assert [entry.id for entry in ledger.entries] == ["b"]
    ledger.clear()
    assert state(ledger)[0] == before


# --- what it refuses ----------------------------------------------------------------------------------------------


def refused(name: str) -> tuple[type[Exception], str, Callable[[Ledger], object]]:
    def update(value: Any, parameter: str = DOWN) -> Patch:
        return Patch({OTHER: low_rank(), parameter: value})

    tensor, not_a_number = EditInfo(config={"x": torch.zeros(1)}), EditInfo(diagnostics=({"x": float("nan")},))
    nan, inf = low_rank(), low_rank()
    nan.U[3, 1], inf.V[0, 5] = float("nan"), float("inf")
    append = {
        "unknown parameter": (LedgerError, "no parameter 'nope'", update(low_rank(), "nope")),
        "unknown module": (LedgerError, "no parameter 'no.pe'", update(low_rank(), "no.pe")),
        "turned shape": (LedgerError, r"\(32, 128\)", update(Dense(noise(128, 32)))),
        "vector": (LedgerError, r"\(32,\)", update(Dense(noise(32, 1)), "transformer.ln_f.weight")),
        "NaN": (NumericalError, DOWN, update(nan)),
        "inf": (NumericalError, DOWN, update(inf)),
        "exploded": (NumericalError, "times the weight", update(low_rank(scale=1e9))),
        "product overflows": (NumericalError, DOWN, update(LowRank(noise(32, 1) * 1e30, noise(1, 128) * 1e30))),
        "tied twice": (
            LedgerError,
            "tied",
            Patch({"lm_head.weight": Dense(noise(320, 32)), "transformer.wte.weight": Dense(noise(320, 32))}),
        ),
    }
    calls: dict[str, tuple[type[Exception], str, Callable[[Ledger], object]]] = {
        "taken id": (LedgerError, "already has an entry 'a'", lambda ledger: ledger.append("a", patch())),
        "empty id": (LedgerError, "non-empty", lambda ledger: ledger.append("", patch())),
        "info": (LedgerError, "JSON", lambda ledger: ledger.append("b", patch(), tensor)),
        "info NaN": (LedgerError, "JSON", lambda ledger: ledger.append("b", patch(), not_a_number)),
        "unknown id": (LedgerError, "'zz'", lambda ledger: ledger.remove_many(["a", "zz"])),
        "small ratio": (NumericalError, "norm", lambda ledger: ledger.append("b", patch(), max_norm_ratio=1e-3)),
    }
    for what, (error, match, bad) in append.items():
        calls[what] = (error, match, lambda ledger, bad=bad: ledger.append("b", bad))
    return calls[name]


@pytest.mark.parametrize(
    "what",
    [
        *("unknown parameter", "unknown module", "turned shape", "vector", "NaN", "inf", "exploded"),
        *("product overflows", "tied twice", "taken id", "empty id", "info", "info NaN", "unknown id", "small ratio"),
    ],
)
def test_what_cannot_be_is_refused_by_a_typed_error_and_the_model_unchanged(
    ledger: Ledger, state: State, what: str
) -> None:
    ledger.append("a", patch())
    before = state(ledger)
    error, match, call = refused(what)
    with pytest.raises(error, match=match):
        call(ledger)
    assert state(ledger) == before
    ledger.append("b", patch())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_overflow_of_a_16_bit_weight_is_refused_though_the_sum_is_finite(
    open_ledger: Open, state: State, dtype: torch.dtype
) -> None:
    ledger, largest = open_ledger(dtype), torch.finfo(dtype).max
    too_much, just_fits = torch.zeros(32, 128), torch.zeros(32, 128)
    just_fits[0, 0] = 0.9 * largest
    # More than half a unit above the largest, which rounds to inf, and still a float32.
    too_much[0, 0] = largest * (1 + 0.4 * torch.finfo(dtype).eps)
    assert torch.isfinite(too_much).all()
    before = state(ledger)
    with pytest.raises(NumericalError, match=str(dtype).removeprefix("torch.")):
        ledger.append("a", Patch({OTHER: low_rank(), DOWN: Dense(too_much)}), max_norm_ratio=float("inf"))
    assert state(ledger) == before
    ledger.append("a", Patch({DOWN: Dense(just_fits)}), max_norm_ratio=float("inf"))


def test_a_model_that_is_broken_already_is_said_to_be(ledger: Ledger) -> None:
    with torch.no_grad():
        ledger.model.get_parameter(DOWN)[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="before the edit"):
        ledger.append("a", patch())


@pytest.mark.parametrize("kind", ["meta", "integer", "inference"])
def test_weights_that_have_no_bytes_of_their_own_are_refused(kind: str) -> None:
    def make() -> nn.Module:
        if kind == "meta":
            return nn.Sequential(nn.Linear(4, 4, device="meta"))
        model = nn.Sequential(nn.Linear(4, 4))
        if kind == "integer":
            model[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
        return model

    with torch.inference_mode(kind == "inference"):
        model = make()
    with pytest.raises(LedgerError, match={"meta": "meta", "integer": "int8", "inference": "inference"}[kind]):
        Ledger.of(model).append("a", Patch({"0.weight": Dense(torch.ones(4, 4))}))
    assert len(Ledger.of(model)) == 0


# --- the checksum -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 7, 64, 1001])
def test_the_checksum_sees_every_element_and_not_how_it_is_stored(dtype: torch.dtype, size: int) -> None:
    tensor = noise(size).to(dtype)
    total = arithmetic.checksum(tensor)
    padded = torch.zeros(size + 3, dtype=dtype)
    padded[3:] = tensor
    assert arithmetic.checksum(padded[3:]) == total
    for place in range(size):
        other = tensor.clone()
        other[place] += 1
        assert arithmetic.checksum(other) != total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_checksum_sees_where_elements_stand_and_their_signs(dtype: torch.dtype) -> None:
    size = 2 * arithmetic.LINE  # elements; in each dtype, some changes cross the lines that are summed together
    tensor = noise(2 * size).to(dtype).view(-1, 64)
    permutations = {
        "two rows": lambda t: t[torch.tensor([1, 0, *range(2, len(t))])],
        "all rows": lambda t: t[torch.randperm(len(t), generator=torch.Generator().manual_seed(0))],
        "rows reversed": lambda t: t.flip(0),
        "columns": lambda t: t.roll(4, 1),
        "neighbours": lambda t: t.view(-1, 2).flip(1).view_as(t),
        "blocks": lambda t: t.roll(arithmetic.LINE // 64, 0),
        "all signs": lambda t: -t,
        "signs of one column": lambda t: torch.cat([t[:, :-1], -t[:, -1:]], 1),
    }
    sums = {name: arithmetic.checksum(change(tensor).contiguous()) for name, change in permutations.items()}
    sums["unchanged"] = arithmetic.checksum(tensor)
    assert len(set(sums.values())) == len(sums)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_other_code_permuted_are_noticed_before_an_undo(
    open_ledger: Callable[[torch.dtype], Ledger], dtype: torch.dtype
) -> None:
    book = open_ledger(dtype)
    book.append("a", patch())
    weight = book.model.get_parameter(DOWN)
    weight.data.copy_(weight.detach().roll(1, 0))  # leaves no trace in the version of the parameter's own tensor
    permuted = weight.detach().clone()
    with pytest.raises(LedgerError, match="other code has changed"):
        book.remove("a")
    assert torch.equal(weight, permuted)
