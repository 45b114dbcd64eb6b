"""The ledger survives every failure with the model unchanged, notices strangers, and goes along with copies."""

from __future__ import annotations

import copy
import gc
import pickle
import signal
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from random_patches import DOWN, HALVES, Open, State, patch
from second_device import ELSEWHERE, elsewhere
from torch import nn

from errata.editors.core.errors import LedgerError
from errata.editors.core.ledger import arithmetic, weight_sums
from errata.editors.core.ledger import ledger as ledger_module
from errata.editors.core.ledger.ledger import Ledger


@pytest.fixture(autouse=True)
def _handler_comes_back() -> Iterator[None]:
    """`untouched()` is entered here and not left, which leaves its handler of Ctrl-C in place for later tests."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


# --- faults in the middle -----------------------------------------------------------------------------------------

# Every step of an operation that allocates, computes or writes.
STEPS = [
    (arithmetic, "start_sum"), (arithmetic, "add_update"), (arithmetic, "is_finite"), (arithmetic, "norm"),
    (arithmetic, "copy_update"), (arithmetic, "checksum"), (ledger_module, "_copy_bytes"), (ledger_module, "_write"),
    (ledger_module, "plan_extended"), (ledger_module, "plan_recomputed"),
]  # fmt: skip
FAULTS = {
    "out of memory": lambda: torch.OutOfMemoryError("CUDA out of memory (injected)"),
    "error": lambda: ZeroDivisionError("injected"),
    "interrupt": lambda: KeyboardInterrupt(),
}
OPERATIONS: dict[str, Callable[[Ledger], object]] = {
    "append": lambda ledger: ledger.append("new", patch(9)),
    "remove first": lambda ledger: ledger.remove("e0"),
    "remove all": lambda ledger: ledger.clear(),
    "restore": lambda ledger: ledger.restore(),
    "lay bare": lambda ledger: ledger.untouched().__enter__(),
}


class Injector:
    """Fails at the `at`-th call of a step, after the step has done its work where `late`."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, at: int, fault: Callable[[], BaseException], late: bool
    ) -> None:
        self.calls, self.landed, self.at, self.fault, self.late = 0, "", at, fault, late
        for module, name in STEPS:
            monkeypatch.setattr(module, name, self.wrapped(name, getattr(module, name)))

    def wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            fails = self.calls == self.at
            if fails and not self.late:
                self.landed = name
                raise self.fault()
            result = real(*args, **kwargs)
            if fails:
                self.landed = name
                raise self.fault()
            return result

        return step


def with_three_entries(ledger: Ledger) -> Ledger:
    ledger.spacing = weight_sums.Spacing(every=2, kept=1)
    for i in range(3):
        ledger.append(f"e{i}", patch(i))
    return ledger


@pytest.mark.parametrize("operation", list(OPERATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_a_fault_at_any_step_leaves_model_and_entries_as_before(
    open_ledger: Open, state: State, dtype: torch.dtype, operation: str
) -> None:
    ledger = with_three_entries(open_ledger(dtype))
    before, landed, at = state(ledger), [], 0
    while True:
        at += 1
        fault = list(FAULTS.values())[at % len(FAULTS)]
        with pytest.MonkeyPatch.context() as monkeypatch:
            injector = Injector(monkeypatch, at, fault, late=at % 2 == 0)
            try:
                OPERATIONS[operation](ledger)
            except (torch.OutOfMemoryError, ZeroDivisionError, KeyboardInterrupt) as error:
                assert type(error) is type(fault())
        if not injector.landed:
            break  # the operation has fewer steps than that, and went through
        landed.append(injector.landed)
        assert state(ledger) == before, f"{injector.landed}, call {at}"
    assert len(landed) == at - 1
    assert landed.count("_write") == 3
    assert state(ledger)[0] != before[0] or operation == "restore"


def test_a_write_that_fails_twice_is_said_and_can_be_restored(open_ledger: Open, state: State) -> None:
    ledger = with_three_entries(open_ledger(torch.float32))
    before = state(ledger)
    with pytest.MonkeyPatch.context() as monkeypatch:
        real, calls = ledger_module._write, []

        def broken(parameter: nn.Parameter, weights: torch.Tensor) -> None:
            calls.append(parameter)
            if len(calls) > 2:
                raise RuntimeError("device lost (injected)")
            real(parameter, weights)

        monkeypatch.setattr(ledger_module, "_write", broken)
        with pytest.raises(LedgerError, match=r"could not restore .*restore\(\)"):
            ledger.append("new", patch(9))
    assert state(ledger)[1:] == before[1:]
    with pytest.raises(LedgerError, match="other code has changed"):
        ledger.append("new", patch(9))
    ledger.restore()
    assert state(ledger) == before


# --- strangers ----------------------------------------------------------------------------------------------------


def _optimise(model: Any) -> None:
    optimiser = torch.optim.SGD([model.get_parameter(DOWN)], lr=0.1)
    model.get_parameter(DOWN).grad = torch.ones_like(model.get_parameter(DOWN))
    optimiser.step()


def _through_data(model: Any) -> None:
    model.get_parameter(DOWN).data.add_(1.0)  # leaves no trace in the version


def _load(model: Any) -> None:
    model.load_state_dict({name: tensor + 1 for name, tensor in model.state_dict().items()})


def _replace(model: Any) -> None:
    model.transformer.h[0].mlp.c_proj.weight = nn.Parameter(torch.zeros(128, 32))


STRANGERS = {"optimiser": _optimise, "data": _through_data, "load_state_dict": _load, "new parameter": _replace}


@pytest.mark.parametrize("stranger", list(STRANGERS))
@pytest.mark.parametrize("operation", ["append", "remove"])
def test_a_change_by_somebody_else_is_noticed_and_can_be_overwritten_or_accepted(
    ledger: Ledger, digest: Any, state: State, stranger: str, operation: str
) -> None:
    ledger.append("a", patch())
    edited = state(ledger)
    STRANGERS[stranger](ledger.model)
    changed = state(ledger)
    assert changed != edited
    with pytest.raises(LedgerError, match=r"other code has changed \S*h\.\S+ since the last edit.*rebase\(\)"):
        ledger.append("b", patch(1)) if operation == "append" else ledger.remove("a")
    assert state(ledger) == changed
    if stranger != "load_state_dict":  # which changed weights that the ledger knows nothing of
        ledger.restore()
        assert state(ledger) == edited
        STRANGERS[stranger](ledger.model)
    changed = digest(ledger.model)
    ledger.rebase()
    assert (len(ledger), ledger.nbytes()) == (0, 0)
    assert digest(ledger.model) == changed
    ledger.append("b", patch(1))
    ledger.clear()
    assert digest(ledger.model) == changed


def test_a_change_of_dtype_is_refused_until_it_is_taken_back_or_accepted(ledger: Ledger, state: State) -> None:
    ledger.append("a", patch())
    edited = state(ledger)
    ledger.model.to(torch.float64)
    before = state(ledger)
    for operation in (lambda: ledger.append("b", patch()), ledger.clear, ledger.restore):
        with pytest.raises(LedgerError, match=r"float32.*float64"):
            operation()
    assert state(ledger) == before
    ledger.model.to(torch.float32)  # float64 holds every float32, so that these are the same values
    ledger.append("b", patch(1))
    ledger.remove("b")
    assert state(ledger)[:2] == edited[:2]
    ledger.model.half()
    ledger.rebase()
    ledger.append("c", patch())


def test_bytes_rewritten_as_they_were_are_no_change(ledger: Ledger, state: State) -> None:
    ledger.append("a", patch())
    ledger.model.load_state_dict({name: tensor.clone() for name, tensor in ledger.model.state_dict().items()})
    before = state(ledger)[0]
    ledger.append("b", patch(1))
    ledger.remove("b")
    assert state(ledger)[0] == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_a_moved_model_takes_its_ledger_along(make_tiny: Any, digest: Any, dtype: torch.dtype) -> None:
    moved, native = (make_tiny("gpt2", dtype=dtype, n_layers=2) for _ in range(2))
    base = digest(moved)
    for i in range(3):
        Ledger.of(moved).append(f"e{i}", patch(i))
    moved.to("cuda")
    Ledger.of(moved).remove("e1")
    native.to("cuda")
    for i in (0, 2):
        Ledger.of(native).append(f"e{i}", patch(i))
    assert digest(moved) == digest(native)
    moved.to("cpu")
    Ledger.of(moved).clear()
    assert digest(moved) == base


def test_a_model_that_moved_gets_back_what_its_device_gives_when_it_was_laid_bare(
    make_tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second device rounds otherwise: what is summed there ends one unit higher."""
    real = arithmetic.add_update

    def add_update(state: torch.Tensor, update: Any, *, transposed: bool) -> None:
        real(state, update, transposed=transposed)
        if state.device == ELSEWHERE:
            state.copy_(state.cpu().nextafter(torch.tensor(torch.inf)))

    with elsewhere():
        monkeypatch.setattr(arithmetic, "add_update", add_update)
        model = make_tiny("gpt2", n_layers=2)
        ledger, weight = Ledger.of(model), model.get_parameter(DOWN)
        base = weight.detach().clone()
        ledger.append("a", patch())
        there = weight.detach().clone().nextafter(torch.tensor(torch.inf))
        model.to(ELSEWHERE)
        with ledger.untouched():
            assert torch.equal(model.get_parameter(DOWN).cpu(), base)
        assert torch.equal(model.get_parameter(DOWN).cpu(), there)
        ledger.append("b", patch(1))
        ledger.clear()
        assert torch.equal(model.get_parameter(DOWN).cpu(), base)


# --- copies and ends ----------------------------------------------------------------------------------------------


def test_two_models_never_meet(make_tiny: Any, digest: Any) -> None:
    one, other = make_tiny("gpt2", n_layers=2), make_tiny("gpt2", n_layers=2)
    before = digest(other)
    Ledger.of(one).append("a", patch())
    assert digest(other) == before
    assert Ledger.of(one) is Ledger.of(one)
    assert Ledger.of(other) is not Ledger.of(one)
    assert len(Ledger.of(other)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_a_deep_copy_has_its_own_consistent_ledger(make_tiny: Any, digest: Any, dtype: torch.dtype) -> None:
    model = make_tiny("gpt2", dtype=dtype, n_layers=2)
    base = digest(model)
    for i in range(3):
        Ledger.of(model).append(f"e{i}", patch(i))
    edited = digest(model)
    twin = copy.deepcopy(model)
    assert Ledger.of(twin).model is twin
    assert Ledger.of(twin).entries == Ledger.of(model).entries
    Ledger.of(twin).remove("e1")
    assert digest(model) == edited
    Ledger.of(model).remove("e1")
    assert digest(twin) == digest(model) != edited
    Ledger.of(model).clear()
    assert len(Ledger.of(twin)) == 2
    Ledger.of(twin).clear()
    assert digest(twin) == digest(model) == base


def test_a_deep_copy_of_an_untouched_view_is_a_model_without_entries(ledger: Ledger, digest: Any) -> None:
    ledger.append("a", patch())
    with ledger.untouched():
        twin = copy.deepcopy(ledger.model)
        bare = digest(twin)
    Ledger.of(twin).append("a", patch())
    assert digest(twin) == digest(ledger.model)
    Ledger.of(twin).clear()
    assert digest(twin) == bare


def test_a_holder_of_ledger_and_model_can_be_copied_in_either_order(ledger: Ledger) -> None:
    ledger.append("a", patch())
    for holder in ({"l": ledger, "m": ledger.model}, {"m": ledger.model, "l": ledger}):
        twin: Any = copy.deepcopy(holder)
        assert twin["l"] is Ledger.of(twin["m"])
        assert twin["l"] is not ledger
        assert twin["l"].model is twin["m"]


def test_the_ledger_is_in_no_state_dict_file_or_pickle(ledger: Ledger, tmp_path: Path) -> None:
    names = list(ledger.model.state_dict())
    ledger.append("a", patch())
    assert list(ledger.model.state_dict()) == names
    model: Any = ledger.model
    model.save_pretrained(tmp_path)
    assert all(b"errata" not in path.read_bytes() for path in tmp_path.iterdir())
    twin = pickle.loads(pickle.dumps(ledger.model))
    assert len(Ledger.of(twin)) == 0
    assert torch.equal(twin.get_parameter(DOWN), ledger.model.get_parameter(DOWN))


def test_the_ledger_does_not_keep_its_model_alive(make_tiny: Any) -> None:
    model = make_tiny("gpt2", n_layers=2)
    ledger = Ledger.of(model)
    ledger.append("a", patch())
    with ledger.untouched():
        pass
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    with pytest.raises(LedgerError, match="no longer exists"):
        ledger.remove("a")
