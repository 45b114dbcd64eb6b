"""Signals other than Ctrl-C, handlers that users install, and exceptions that another thread raises in this one."""

from __future__ import annotations

import copy
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from interrupted_ledger import BETWEEN_THE_ENDS, OPERATIONS, change, ctrl_c, fire

from errata.editors.core.ledger import interrupts, ledger
from errata.editors.core.ledger.interrupts import deferred_interrupts, reversible, safe_point
from errata.editors.core.ledger.ledger import Ledger

WATCHED = (signal.SIGINT, signal.SIGALRM, signal.SIGTERM, signal.SIGUSR1)
Numbers = list[int]


@pytest.fixture(autouse=True)
def _handlers_come_back() -> Iterator[None]:
    before = [signal.getsignal(number) for number in WATCHED]
    yield
    after = [signal.getsignal(number) for number in WATCHED]
    for number, handler in zip(WATCHED, before, strict=True):
        signal.signal(number, handler)
    assert after == before


def time_out(*_: object) -> None:
    raise TimeoutError


@pytest.fixture
def alarm() -> Iterator[None]:
    """A handler of SIGALRM that raises, as time-outs have it."""
    before = signal.signal(signal.SIGALRM, time_out)
    yield
    assert signal.getsignal(signal.SIGALRM) is time_out
    signal.signal(signal.SIGALRM, before)


def ring() -> None:
    signal.raise_signal(signal.SIGALRM)


# --- signals other than Ctrl-C ------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", list(OPERATIONS))
@pytest.mark.usefixtures("alarm")
def test_a_time_out_at_any_bytecode_leaves_the_model_as_before_or_as_after(
    make_tiny: Any, digest: Any, trials: Any, tried: Any, operation: str
) -> None:
    rounds = -(-trials(105, 5000) // len(OPERATIONS))
    landed, wrong = fire(make_tiny("gpt2", n_layers=1), digest, operation, rounds, strike=ring)
    tried(2, rounds, landed=len(landed), places=len(set(landed)), wrong=wrong)
    assert wrong == 0
    assert len(set(landed)) >= min(rounds, 10), "signals landed in too few places to prove anything"


@pytest.mark.usefixtures("alarm")
def test_the_control_that_defers_no_signal_is_caught(
    make_tiny: Any, digest: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupts, "SIGNALS", ())
    assert fire(make_tiny("gpt2", n_layers=1), digest, "applied", 60, strike=ring)[1] >= 5


@pytest.mark.usefixtures("alarm")
def test_several_signals_wait_and_all_are_delivered() -> None:
    got: Numbers = []
    signal.signal(signal.SIGUSR1, lambda number, _: got.append(number))
    try:
        with pytest.raises(TimeoutError) as caught, deferred_interrupts():
            ctrl_c()
            signal.raise_signal(signal.SIGUSR1)
            ring()
            assert got == []
        assert isinstance(caught.value.__context__, KeyboardInterrupt)
        assert got == [signal.SIGUSR1]
        with deferred_interrupts():
            ring()
            with pytest.raises(TimeoutError):
                safe_point()
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


# --- handlers that users install ----------------------------------------------------------------------------------


def test_a_handler_that_is_installed_inside_a_transaction_is_left_alone(make_tiny: Any) -> None:
    model, got = make_tiny("gpt2", n_layers=1), []
    book = Ledger.of(model)
    own = lambda number, _: got.append(number)  # noqa: E731
    before = signal.getsignal(signal.SIGINT)
    try:
        with book.transaction():
            signal.signal(signal.SIGINT, own)
            ctrl_c()
            assert got == [signal.SIGINT]
            book.append("a", change(0))
        assert signal.getsignal(signal.SIGINT) is own
        with reversible(lambda: None, lambda _: None):
            book.remove("a")
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_that_is_installed_for_a_new_signal_is_left_alone_and_waits_in_inner_blocks() -> None:
    got: Numbers = []
    own = lambda number, _: got.append(number)  # noqa: E731
    try:
        with deferred_interrupts():
            signal.signal(signal.SIGUSR1, own)
            with deferred_interrupts():
                signal.raise_signal(signal.SIGUSR1)
                assert got == []
        assert got == [signal.SIGUSR1]
        assert signal.getsignal(signal.SIGUSR1) is own
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_a_handler_that_wraps_ours_delivers_at_once_when_the_block_is_over() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: Numbers = []
    try:
        with deferred_interrupts():
            ours = signal.getsignal(signal.SIGINT)

            def wrapping(number: int, frame: Any) -> None:
                seen.append(number)
                ours(number, frame)  # type: ignore[operator]

            signal.signal(signal.SIGINT, wrapping)
        assert signal.getsignal(signal.SIGINT) is wrapping
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()
        signal.signal(signal.SIGINT, ours)  # as code does that puts back what it found
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()
        with pytest.raises(KeyboardInterrupt), deferred_interrupts():
            ctrl_c()
            seen.append(0)
        assert seen == [signal.SIGINT, 0]
    finally:
        signal.signal(signal.SIGINT, before)


# --- what no handler can delay ------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["append", "remove", "clear", "transaction", "failing transaction"])
def test_the_next_operation_rolls_back_what_an_exception_of_another_thread_left(
    make_tiny: Any, digest: Any, trials: Any, operation: str
) -> None:
    def repair(book: Ledger) -> None:
        book.remove_many([])

    rounds = -(-trials(100, 5000) // 5)
    # Raised by the tracer itself, as PyThreadState_SetAsyncExc raises at any bytecode: no signal, no handler.
    landed, wrong = fire(
        make_tiny("gpt2", n_layers=1),
        digest,
        operation,
        rounds,
        strike=time_out,
        files=BETWEEN_THE_ENDS,
        repair=repair,
    )
    assert wrong == 0
    assert len(set(landed)) >= min(rounds, 10)


@pytest.mark.parametrize("step", ["_restore_bytes", "_install_hooks"])
def test_a_transaction_whose_rollback_is_ended_twice_is_rolled_back_by_the_next_operation(
    make_tiny: Any, digest: Any, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    model = make_tiny("gpt2", dtype=torch.bfloat16, n_layers=1)
    book = Ledger.of(model)
    book.append("a", change(0))
    before = digest(model)
    with monkeypatch.context() as patched, pytest.raises(TimeoutError), book.transaction():
        book.append("b", change(1))
        patched.setattr(Ledger, step, time_out)
        raise ZeroDivisionError
    assert digest(copy.deepcopy(model)) != before
    book.append("c", change(2))
    assert [entry.id for entry in book.entries] == ["a", "c"]
    book.remove("c")
    assert digest(model) == before
    assert not book._savepoints


def test_a_rollback_that_is_ended_once_is_done_again_and_raises_what_ended_it(
    make_tiny: Any, digest: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny("gpt2", n_layers=1)
    book = Ledger.of(model)
    book.append("a", change(0))
    before, write, left = digest(model), ledger._write, [time_out]

    def write_after_a_time_out(*given: Any) -> None:
        if left:
            left.pop()()
        write(*given)

    with pytest.raises(TimeoutError), book.transaction():
        book.append("b", change(1))
        monkeypatch.setattr(ledger, "_write", write_after_a_time_out)
        raise ZeroDivisionError
    assert not left
    assert digest(model) == before
    assert [entry.id for entry in book.entries] == ["a"]
    assert not book._savepoints


def test_a_block_that_an_exception_of_another_thread_ended_at_its_edge_delays_nothing() -> None:
    ended = deferred_interrupts()
    ended.__enter__()
    with pytest.raises(TimeoutError):
        ctrl_c()  # still open: the signal waits
        time_out()
    del ended
    with pytest.raises(KeyboardInterrupt):
        ctrl_c()
    with pytest.raises(KeyboardInterrupt), deferred_interrupts():
        ctrl_c()
