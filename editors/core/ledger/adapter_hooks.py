"""The forward hooks through which a ledger's adapters act: one a module, gone with the module's last record."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from errata.editors.core.errors import LedgerError
from errata.editors.core.ledger.adapter import Adapter, Folded

# One state of a module's records is kept every so many of them, and so many of these, the newest.
EVERY, KEPT = 32, 3


class Hook:
    """Calls what the records of its module make together. Copied and pickled with its model, it goes on doing so."""

    def __init__(self, folded: Folded) -> None:
        self.folded = folded
        self.asleep = False
        self.handle: RemovableHandle | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self.asleep:
            return None
        self.folded = self.folded.to(output.device)  # the model may have moved since
        return self.folded(module, args, output)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        twin = memo[id(self)] = Hook(self.folded)
        twin.asleep, twin.handle = self.asleep, copy.deepcopy(self.handle, memo)
        return twin

    def attach(self, module: nn.Module) -> None:
        """Hang on the module, unless there already: somebody may have removed all hooks, or replaced the module."""
        if self not in module._forward_hooks.values():
            self.handle = module.register_forward_hook(self)

    def detach(self) -> None:
        if self.handle is not None:
            self.handle.remove()


@dataclass(frozen=True)
class Stack:
    """What the records of one module make together, and what the first so many of them did, now and then, so that
    undoing a late one among thousands replays few.

    Attributes:
        states: (records in it, what they make), the one in force last.
    """

    states: tuple[tuple[int, Folded], ...]

    @property
    def top(self) -> Folded:
        """What is in force."""
        return self.states[-1][1]

    def extended(self, records: Sequence[Adapter]) -> Stack:
        """With more records on top."""
        states = list(self.states)
        count, folded = states[-1]
        end = count + len(records)
        stops = [*[stop for stop in range(0, end, EVERY) if stop > count][-KEPT:], end]
        for start, stop in pairwise([count, *stops]):
            folded = folded.extended(records[start - count : stop - count])
            states.append((stop, folded))
        return Stack((*[state for state in states[:-2] if state[0] % EVERY == 0][-KEPT:], *states[-2:]))

    def cut(self, count: int) -> Stack | None:
        """As far as it goes without the records behind the first `count`; None where no state is that old."""
        states = tuple(state for state in self.states if state[0] <= count)
        return Stack(states) if states else None


Stacks = Mapping[str, Stack]  # by module name


def extended(held: Stacks, entries: Iterable[Mapping[str, Adapter]]) -> dict[str, Stack]:
    """The modules' states with more entries' records. Nothing is installed here.

    Raises:
        LedgerError: a module carries records of another kind, or such as these cannot go with.
    """
    more = _by_module(entries)
    return dict(held) | {name: _stacked(name, held.get(name), records) for name, records in more.items()}


def repeated(held: Stacks, entries: Mapping[str, Mapping[str, Adapter]], gone: Set[str]) -> dict[str, Stack]:
    """The modules' states without some entries. Nothing is installed here.

    Args:
        entries: The records of all entries, by id, in order.
        gone: Ids of those to leave out.
    """
    kept = _by_module(adapters for id_, adapters in entries.items() if id_ not in gone)
    fresh = {name: stack for name, stack in held.items() if name in kept}
    for name in {name for id_ in gone for name in entries[id_]} & kept.keys():
        concerned = [id_ for id_, adapters in entries.items() if name in adapters]
        unchanged = next(place for place, id_ in enumerate(concerned) if id_ in gone)
        below = held[name].cut(unchanged)
        fresh[name] = _stacked(name, below, kept[name][below.states[-1][0] if below else 0 :])
    return fresh


def _by_module(entries: Iterable[Mapping[str, Adapter]]) -> dict[str, list[Adapter]]:
    found: dict[str, list[Adapter]] = {}
    for adapters in entries:
        for name, adapter in adapters.items():
            found.setdefault(name, []).append(adapter)
    return found


def _stacked(name: str, stack: Stack | None, records: Sequence[Adapter]) -> Stack:
    if not records:
        assert stack is not None
        return stack
    for record in records:
        if (kind := stack.top.kind if stack else records[0].kind) != record.kind:
            raise LedgerError(f"{name} carries records of {kind}; one of {record.kind} cannot go on top of them")
    if stack is None:
        stack, records = Stack(((1, type(records[0]).folded(records[:1])),)), records[1:]
    return stack.extended(records) if records else stack


def install(model: nn.Module, hooks: dict[str, Hook], wanted: Stacks, *, asleep: bool = False) -> None:
    """Make the model's hooks those of `wanted`, by module name; `hooks`, what the ledger has on it, follows.

    Raises:
        LedgerError: a module is gone.
    """
    for name in hooks.keys() - wanted.keys():
        hooks.pop(name).detach()
    for name, stack in wanted.items():
        hook = hooks.setdefault(name, Hook(stack.top))
        hook.folded, hook.asleep = stack.top, asleep
        hook.attach(find_module(model, name)[1])


def at_work(module: nn.Module) -> list[Hook]:
    """The hooks of a ledger that act on what the module gives."""
    return [hook for hook in module._forward_hooks.values() if isinstance(hook, Hook) and not hook.asleep]


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What the model computes with beside its state_dict: the tensors that hooks at work read, by module and name."""
    for name, module in model.named_modules():
        for hook in at_work(module):
            yield from ((f"{name}:{part}", tensor) for part, tensor in hook.folded.tensors.items())


def looks_ahead(model: nn.Module) -> bool:
    """Whether an edit on the model lets tokens of a row depend on those behind them (`Folded.looks_ahead`)."""
    return any(hook.folded.looks_ahead for module in model.modules() for hook in at_work(module))


def find_module(model: nn.Module, name: str) -> tuple[str, nn.Module]:
    """The module of that name, and the first of its names.

    Raises:
        LedgerError: there is none.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise LedgerError(f"the model has no module {name!r}: {error}") from error
    return next(first for first, other in model.named_modules() if other is module), module
