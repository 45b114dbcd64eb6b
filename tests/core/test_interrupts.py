"""Ctrl-C at any moment leaves the model as before or as after. ERRATA_TRIALS sets how many signals must land.

Two ways of choosing the moment: a tracer that raises a real SIGINT at a chosen bytecode of the ledger's own code, so
that no moment is too short to be hit, and a thread that raises one after a random while.
"""

from __future__ import annotations

import copy
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from interrupted_ledger import (
    OPERATIONS,
    OURS,
    Range,
    apply_and_undo,
    change,
    ctrl_c,
    fail_inside,
    fire,
    look_untouched,
)

from errata.editors.core.ledger import interrupts
from errata.editors.core.ledger.interrupts import deferred_interrupts, reversible, safe_point
from errata.editors.core.ledger.ledger import Ledger


@pytest.fixture(autouse=True)
def _handler_comes_back() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before


# --- the blocks by themselves -------------------------------------------------------------------------------------


def test_an_interrupt_waits_for_the_end_of_the_outermost_block() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), deferred_interrupts():
        with deferred_interrupts():
            ctrl_c()
            reached.append("inner")
        reached.append("outer")
    assert reached == ["inner", "outer"]


def test_an_interrupt_is_raised_at_a_safe_point_and_only_once() -> None:
    reached = []
    with deferred_interrupts():
        safe_point()
        ctrl_c()
        reached.append("after the signal")
        with pytest.raises(KeyboardInterrupt):
            safe_point()
        safe_point()
    assert reached


def test_a_safe_point_outside_any_block_does_nothing() -> None:
    safe_point()


def test_an_error_of_the_block_stays_visible_behind_the_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, deferred_interrupts():
        ctrl_c()
        raise ZeroDivisionError
    assert isinstance(caught.value.__context__, ZeroDivisionError)


def test_the_users_own_handler_gets_the_signal_afterwards() -> None:
    got: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: got.append(number))
    try:
        with deferred_interrupts():
            ctrl_c()
            assert got == []
        assert got == [signal.SIGINT]
        undone: list[int] = []
        with reversible(ctrl_c, lambda _: undone.append(1)):
            assert got == [signal.SIGINT] * 2
            ctrl_c()
            assert got == [signal.SIGINT] * 3
            assert undone == []
        assert undone == [1]
    finally:
        signal.signal(signal.SIGINT, before)


def test_where_sigint_is_ignored_nothing_is_installed() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with deferred_interrupts(), reversible(lambda: 1, lambda _: None) as value:
            assert value == 1
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            ctrl_c()
            safe_point()
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_defer_nothing_and_fail_at_nothing() -> None:
    done = []

    def work() -> None:
        with deferred_interrupts(), reversible(lambda: 1, lambda value: done.append(value)):
            safe_point()
            done.append(0)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [0, 1]


def test_in_a_reversible_block_an_interrupt_is_prompt_and_undone() -> None:
    log: list[str] = []
    with pytest.raises(KeyboardInterrupt), reversible(lambda: log.append("do"), lambda _: log.append("undo")):
        ctrl_c()
        log.append("not reached")
    assert log == ["do", "undo"]


def test_an_interrupt_while_doing_keeps_the_block_from_running() -> None:
    log: list[str] = []

    def do() -> None:
        ctrl_c()
        log.append("do")

    with pytest.raises(KeyboardInterrupt), reversible(do, lambda _: log.append("undo")):
        log.append("not reached")
    assert log == ["do", "undo"]


def test_undoing_passes_safe_points_without_stopping() -> None:
    log: list[str] = []

    def undo(_: None) -> None:
        ctrl_c()
        safe_point()
        log.append("undo")

    with pytest.raises(KeyboardInterrupt), reversible(lambda: None, undo):
        log.append("block")
    assert log == ["block", "undo"]


def test_what_could_not_be_done_is_not_undone() -> None:
    with pytest.raises(ZeroDivisionError), reversible(lambda: 1 // 0, lambda _: pytest.fail("undone")):
        pytest.fail("entered")


def test_nested_blocks_undo_from_the_inside_out() -> None:
    log: list[str] = []
    with (
        pytest.raises(KeyboardInterrupt),
        reversible(lambda: None, lambda _: log.append("outer")),
        reversible(lambda: None, lambda _: log.append("inner")),
    ):
        with deferred_interrupts():
            ctrl_c()
            log.append("held")
        log.append("not reached")
    assert log == ["held", "inner", "outer"]


# --- the ledger under fire ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", list(OPERATIONS))
def test_an_interrupt_at_any_bytecode_leaves_the_model_as_before_or_as_after(
    make_tiny: Any, digest: Any, trials: Any, tried: Any, operation: str
) -> None:
    rounds = -(-trials(210, 5000) // len(OPERATIONS))
    dtype = random.Random(operation).choice((torch.float32, torch.bfloat16, torch.float16))
    landed, wrong = fire(make_tiny("gpt2", dtype=dtype, n_layers=1), digest, operation, rounds)
    tried(2, rounds, landed=len(landed), places=len(set(landed)), wrong=wrong)
    assert wrong == 0
    assert len(landed) == rounds
    assert len(set(landed)) >= min(rounds, 10), "signals landed in too few places to prove anything"


def test_the_control_without_deferring_is_caught(make_tiny: Any, digest: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of these two alone, as a transaction takes itself back whatever is raised in it: without deferring only its very
    # ends can be hit, and an operation that is one transaction comes out right nearly always.
    monkeypatch.setattr(interrupts._Block, "open", lambda _: None)
    wrong = {}
    for operation in ("untouched", "applied"):
        landed, wrong[operation] = fire(make_tiny("gpt2", n_layers=1), digest, operation, 60)
        assert len(landed) == 60
    assert wrong["untouched"] >= 5, wrong
    assert wrong["applied"] >= 5, wrong


def _round(book: Ledger) -> Iterator[None]:
    """Steps that end where they began, [e0, e1]; yields where the model may be left."""
    yield
    book.append("new", change(7))
    yield
    book.remove("e0")
    yield
    look_untouched(book)
    fail_inside(book, "newer")
    apply_and_undo(book, "newer")
    book.clear()
    yield
    for i in range(2):
        book.append(f"e{i}", change(i))
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_interrupt_after_a_random_while_leaves_the_model_between_two_steps(
    make_tiny: Any, digest: Any, trials: Any, dtype: torch.dtype
) -> None:
    wanted, draw = -(-trials(100, 5000) // 2), random.Random(0)
    model = make_tiny("gpt2", dtype=dtype, n_layers=1)
    target = Range(model, digest, "append")
    whole = copy.deepcopy(model)
    target.states = [target.state(whole) for _ in _round(Ledger.of(whole))]
    assert target.states[0] == target.states[-1]
    landed: list[str] = []
    attempts = 0
    while len(landed) < wanted and attempts < 10 * wanted:
        attempts += 1
        shot = copy.deepcopy(model)
        place = shot_while(lambda shot=shot: all(True for _ in _round(Ledger.of(shot))), draw.uniform(0, 0.02))
        landed += [place] if place else []
        assert target.is_right(shot), place
    assert len(landed) >= wanted, f"only {len(landed)} of {attempts} signals landed in the ledger"
    assert len(set(landed)) >= min(wanted, 5), f"signals landed in too few places: {set(landed)}"


def shot_while(operate: Callable[[], object], delay: float) -> str:
    """Repeat an operation until SIGINT, which a thread raises after `delay` seconds, comes out of it.

    Returns: the innermost of our functions in which the main thread was then; empty if it was in none.
    """
    main, place = threading.get_ident(), []

    def shoot() -> None:
        time.sleep(delay)
        frame: FrameType | None = sys._current_frames()[main]
        while frame is not None and frame.f_code.co_filename not in OURS:
            frame = frame.f_back
        place.append(frame.f_code.co_qualname if frame is not None else "")
        ctrl_c()

    thread = threading.Thread(target=shoot)
    with pytest.raises(KeyboardInterrupt):
        thread.start()
        while True:
            operate()
    thread.join()
    return place[0]
