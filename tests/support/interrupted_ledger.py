"""Operations of a ledger that are interrupted at a chosen bytecode, and whether the model is then as it must be."""

from __future__ import annotations

import contextlib
import copy
import random
import signal
import sys
from collections.abc import Callable, Collection
from types import FrameType
from typing import Any

import torch

from errata.editors.core.codebook import codebook
from errata.editors.core.codebook.codebook import Correction
from errata.editors.core.errors import LedgerError
from errata.editors.core.ledger import (
    adapter_hooks,
    arithmetic,
    entry,
    interrupts,
    ledger,
    patch,
    savepoint,
    weight_sums,
)
from errata.editors.core.ledger.interrupts import reversible, safe_point
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import Dense, LowRank, Patch

BETWEEN_THE_ENDS = {
    module.__file__ for module in (codebook, entry, arithmetic, adapter_hooks, ledger, patch, savepoint, weight_sums)
}
OURS = BETWEEN_THE_ENDS | {interrupts.__file__}
DOWN, SQUARE = "transformer.h.0.mlp.c_proj.weight", "transformer.h.0.attn.c_proj.weight"
UP = "transformer.h.0.mlp.c_fc"


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def change(seed: int) -> Patch:
    """Of weights and of a codebook; the keys of different seeds are near each other."""
    low_rank = LowRank(noise(32, 2, seed=seed), noise(2, 128, seed=seed))
    key, value = noise(1, 32, seed=seed), noise(1, 128, seed=seed)
    record = Correction(key, value, ((seed,),), 9.0, "replace_last", "coverage", 1e-5)
    return Patch({DOWN: low_rank, SQUARE: Dense(noise(32, 32, seed=seed))}, {UP: record})


def append_and_remove(book: Ledger) -> None:
    with book.transaction():
        book.append("new", change(7))
        safe_point()
        book.remove("e0")


def fail_inside(book: Ledger, name: str = "new") -> None:
    with contextlib.suppress(ZeroDivisionError), book.transaction():
        book.append(name, change(7))
        raise ZeroDivisionError


def look_untouched(book: Ledger) -> None:
    with book.untouched():
        len(book)


def apply_and_undo(book: Ledger, name: str = "new") -> None:
    with reversible(lambda: book.append(name, change(7)), lambda new: book.remove(new.id)), book.untouched():
        len(book)


OPERATIONS: dict[str, Callable[[Ledger], object]] = {
    "append": lambda book: book.append("new", change(7)),
    "remove": lambda book: book.remove("e0"),
    "clear": lambda book: book.clear(),
    "transaction": append_and_remove,
    "failing transaction": fail_inside,
    "untouched": look_untouched,
    "applied": apply_and_undo,
}
State = tuple[str, tuple[str, ...], bool, int]


class Range:
    """Runs one operation on copies of one edited model, and knows how it looks before and after it."""

    def __init__(self, model: Any, digest: Callable[[Any], str], operation: str) -> None:
        self.model, self.digest, self.operation = model, digest, OPERATIONS[operation]
        book = Ledger.of(model)
        book.spacing = weight_sums.Spacing(every=1, kept=1)  # every update is a safe point
        for i in range(2):
            book.append(f"e{i}", change(i))
        self.states = [self.state(model)]
        target = copy.deepcopy(model)
        self.operate(target)
        self.states.append(self.state(target))
        Ledger.of(target).clear()
        self.base = digest(target)

    def operate(self, model: Any) -> None:
        self.operation(Ledger.of(model))

    def state(self, model: Any) -> State:
        book = Ledger.of(model)
        return self.digest(model), tuple(e.id for e in book.entries), book._is_untouched, len(book._savepoints)

    def is_right(self, model: Any) -> bool:
        """As before or as after, and still a ledger that gives the base back."""
        if self.state(model) not in self.states:
            return False
        Ledger.of(model).clear()
        return self.digest(model) == self.base


class AtBytecode:
    """A tracer that strikes at the `moments`-th bytecodes executed in our own files, and says where."""

    def __init__(
        self, *moments: int, strike: Callable[[], object] = ctrl_c, files: Collection[str | None] = OURS
    ) -> None:
        self.moments, self.count, self.strike, self.files = set(moments), 0, strike, files
        self.landed: list[str] = []

    def __call__(self, frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename not in self.files:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.count += 1
            if self.count in self.moments:
                self.landed.append(frame.f_code.co_qualname)
                self.strike()
        return self

    def run(self, operate: Callable[[], object]) -> BaseException | None:
        """What came out of the operation."""
        former = sys.gettrace()
        try:
            sys.settrace(self)
            operate()
        except (KeyboardInterrupt, TimeoutError, LedgerError) as raised:
            return raised
        finally:
            sys.settrace(former)
        return None


def fire(
    model: Any,
    digest: Any,
    operation: str,
    rounds: int,
    *,
    strike: Callable[[], object] = ctrl_c,
    files: Collection[str | None] = OURS,
    repair: Callable[[Ledger], object] = lambda _: None,
) -> tuple[list[str], int]:
    """`rounds` runs, each interrupted at a random bytecode, and some of them again a little later.

    Args:
        strike: Interrupts.
        files: The files with the bytecodes.
        repair: Is done before a run is judged.
    """
    target = Range(model, digest, operation)
    counter = AtBytecode(files=files)
    whole = copy.deepcopy(model)
    counter.run(lambda: target.operate(whole))
    draw, landed, wrong = random.Random(operation), [], 0
    for _ in range(rounds):
        moment = draw.randint(1, counter.count)
        tracer = AtBytecode(moment, moment + draw.choice((0, 1, 5, 200)), strike=strike, files=files)
        shot = copy.deepcopy(model)
        raised = tracer.run(lambda shot=shot: target.operate(shot))
        assert raised is not None, f"the signal of {tracer.landed} was lost"
        landed += tracer.landed[:1]
        repair(Ledger.of(shot))
        wrong += isinstance(raised, LedgerError) or not target.is_right(shot)
    return landed, wrong
