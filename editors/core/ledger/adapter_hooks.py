"""The forward hooks through which a ledger's adapters act: one per module, removed with the module's last adapter.

Adapters that read the inputs of another module (`Folded.reads`) have a second hook there, which hands them over.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from errata.editors.core.errors import ArchitectureError, LedgerError
from errata.editors.core.ledger.adapter import Adapter, Folded
from errata.editors.core.ledger.row_layout import RowLayout
from errata.editors.core.model.compiled import forget_compiled_forwards

# A state of a module's records is kept after every EVERY records; of these states the newest KEPT stay.
EVERY, KEPT = 32, 3


class Listener:
    """Keeps what one module is given until the hook of another module takes it, in the same forward pass.

    Args:
        reads_layout: Keep the layout of the rows that the module, a decoder, is called for, in place of its arguments.
    """

    def __init__(self, *, reads_layout: bool = False) -> None:
        self.handle: RemovableHandle | None = None
        self.reads_layout = reads_layout
        self._args: tuple[Any, ...] | None = None
        self._untraced: Any = torch.compiler.disable(self._keep)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        # Models that older versions pickled call it without the keywords, which it did not read then.
        self._untraced(args, keywords or {})

    def _keep(self, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self._args = (RowLayout.of(args, keywords),) if self.reads_layout else args

    def take(self) -> tuple[Any, ...]:
        """Return the arguments of the module's last call, once.

        Raises:
            LedgerError: The module has not run since.
        """
        args, self._args = self._args, None
        if args is None:
            raise LedgerError("an edit reads the inputs of a module that has not run before the one that it changes")
        return args

    def __deepcopy__(self, memo: dict[int, Any]) -> Listener:
        twin = memo[id(self)] = Listener(reads_layout=self.reads_layout)
        twin.handle = copy.deepcopy(self.handle, memo)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {"handle": self.handle, "reads_layout": self.reads_layout, "_args": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Pickles of older versions have no `reads_layout`.
        self.__dict__.update({"reads_layout": False, **state}, _args=None, _untraced=torch.compiler.disable(self._keep))

    def attach(self, module: nn.Module) -> bool:
        """Register with the module that is read, as `Hook.attach` does with the one that is changed."""
        if self in module._forward_pre_hooks.values():
            return False
        self.detach()  # the adapters may have read another module before
        self.handle = RemovableHandle(module._forward_pre_hooks, extra_dict=module._forward_pre_hooks_with_kwargs)
        module._forward_pre_hooks_with_kwargs[self.handle.id] = True
        module._forward_pre_hooks[self.handle.id] = self
        return True

    def forget(self) -> None:
        """Drop what it has kept."""
        self._args = None

    def detach(self) -> None:
        """Remove the hook from its module, and forget what it has kept."""
        self.forget()
        if self.handle is not None:
            self.handle.remove()


class Hook:
    """The forward hook of a module: it applies all adapters of the module. Copies and pickles of the model keep it."""

    def __init__(self, folded: Folded) -> None:
        self.folded = folded
        self.disabled = False
        self.handle: RemovableHandle | None = None
        self.listener: Listener | None = None
        # `torch.compile` must not trace it: a trace would keep the adapters of the time when it was made.
        self._untraced: Any = torch.compiler.disable(self._apply)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self._untraced(module, args, output)

    def _apply(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.disabled:
            if self.listener is not None:
                self.listener.forget()  # what is kept would hold the memory of a whole pass
            return None
        given = self.listener.take() if self.listener is not None else args
        # Some blocks give their hidden states as the first of several things.
        states = output[0] if isinstance(output, tuple) else output
        self.folded = self.folded.to(states.device)  # the model may have moved since
        found = self.folded(module, given, states)
        return (found, *output[1:]) if isinstance(output, tuple) and found is not None else found

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        twin = memo[id(self)] = Hook(self.folded)
        twin.disabled, twin.handle = self.disabled, copy.deepcopy(self.handle, memo)
        twin.listener = copy.deepcopy(self.listener, memo)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_untraced"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Pickles of older versions have no listener.
        self.__dict__.update({"listener": None, **state}, _untraced=torch.compiler.disable(self._apply))

    def attach(self, module: nn.Module, read: nn.Module | None = None) -> bool:
        """Register with the module, unless registered: other code may have removed all hooks or replaced the module.

        Args:
            module: The module whose output the adapters change.
            read: The module whose inputs they read, if it is another one.

        Returns:
            Whether a hook was not registered before.
        """
        is_new = False
        if read is not None:
            self.listener = self.listener or Listener(reads_layout=self.folded.reads_layout)
            is_new = self.listener.attach(read)
        elif self.listener is not None:  # the records that read another module are gone
            self.listener.detach()
            self.listener, is_new = None, True
        if self in module._forward_hooks.values():
            return is_new
        # As `register_forward_hook` does it, but the handle comes first: an exception in between leaves no hook that
        # `detach` cannot remove.
        self.handle = RemovableHandle(module._forward_hooks)
        module._forward_hooks[self.handle.id] = self
        return True

    def detach(self) -> None:
        """Remove the hook from its module, and its listener from the other."""
        if self.handle is not None:
            self.handle.remove()
        if self.listener is not None:
            self.listener.detach()


@dataclass(frozen=True)
class Stack:
    """What the records of one module do together, with some earlier states.

    Undoing a late record among thousands starts from an earlier state, and folds few records again.

    Attributes:
        states: (number of records, what they do together), oldest first; the last one is in force.
    """

    states: tuple[tuple[int, Folded], ...]

    @property
    def top(self) -> Folded:
        """The state in force: what all records do together."""
        return self.states[-1][1]

    def extended(self, records: Sequence[Adapter]) -> Stack:
        """Return the stack with more records after the present ones."""
        states = list(self.states)
        count, folded = states[-1]
        end = count + len(records)
        # Stop only at those multiples of EVERY whose state will be kept, and at the end.
        stops = [*[stop for stop in range(0, end, EVERY) if stop > count][-KEPT:], end]
        for start, stop in pairwise([count, *stops]):
            folded = folded.extended(records[start - count : stop - count])
            states.append((stop, folded))
        return Stack((*[state for state in states[:-2] if state[0] % EVERY == 0][-KEPT:], *states[-2:]))

    def cut(self, count: int) -> Stack | None:
        """Return the stack with only the states of at most `count` records; None if there is no such state."""
        states = tuple(state for state in self.states if state[0] <= count)
        return Stack(states) if states else None


Stacks = Mapping[str, Stack]  # by module name


def stacks_with(held: Stacks, entries: Iterable[Mapping[str, Adapter]]) -> dict[str, Stack]:
    """Return the modules' stacks with the records of more entries. Nothing is installed here.

    Raises:
        LedgerError: A module carries records of another kind, or records that these cannot be combined with.
    """
    more = _by_module(entries)
    return dict(held) | {name: _stacked(name, held.get(name), records) for name, records in more.items()}


def stacks_without(held: Stacks, entries: Mapping[str, Mapping[str, Adapter]], gone: Set[str]) -> dict[str, Stack]:
    """Return the modules' stacks without the records of some entries. Nothing is installed here.

    Args:
        held: The stacks of all entries.
        entries: The records of all entries, by id, in order.
        gone: Ids of the entries to leave out.
    """
    kept = _by_module(adapters for id_, adapters in entries.items() if id_ not in gone)
    stacks = {name: stack for name, stack in held.items() if name in kept}
    for name in {name for id_ in gone for name in entries[id_]} & kept.keys():
        concerned = [id_ for id_, adapters in entries.items() if name in adapters]
        # The records before the first removed one are unchanged: start from their newest state.
        unchanged = next(index for index, id_ in enumerate(concerned) if id_ in gone)
        below = held[name].cut(unchanged)
        stacks[name] = _stacked(name, below, kept[name][below.states[-1][0] if below else 0 :])
    return stacks


def _by_module(entries: Iterable[Mapping[str, Adapter]]) -> dict[str, list[Adapter]]:
    records: dict[str, list[Adapter]] = {}
    for adapters in entries:
        for name, adapter in adapters.items():
            records.setdefault(name, []).append(adapter)
    return records


def _stacked(name: str, stack: Stack | None, records: Sequence[Adapter]) -> Stack:
    if not records:
        assert stack is not None
        return stack
    for record in records:
        if (kind := stack.top.kind if stack else records[0].kind) != record.kind:
            raise LedgerError(
                f"{name}: expected an adapter of kind {kind}, like those that it carries, got {record.kind}; undo "
                "those first"
            )
    if stack is None:
        stack, records = Stack(((1, type(records[0]).folded(records[:1])),)), records[1:]
    return stack.extended(records) if records else stack


def install(model: nn.Module, hooks: dict[str, Hook], wanted: Stacks, *, disabled: bool = False) -> None:
    """Make the model's hooks those of `wanted`.

    Args:
        model: The model.
        hooks: The ledger's hooks on the model, by module name; updated here.
        wanted: The stacks to install, by module name.
        disabled: Install the hooks so that they do nothing.

    Raises:
        LedgerError: A module no longer exists.
    """
    gone = hooks.keys() - wanted.keys()
    for name in gone:
        hooks[name].detach()
        del hooks[name]
    are_new = []
    for name, stack in wanted.items():
        if name not in hooks:
            hooks[name] = Hook(stack.top)
        hooks[name].folded, hooks[name].disabled = stack.top, disabled
        reads = stack.top.reads
        read = None if reads is None else find_module(model, reads)[1]
        are_new.append(hooks[name].attach(find_module(model, name)[1], read))
    if gone or any(are_new):
        forget_compiled_forwards()


def active_hooks(module: nn.Module) -> list[Hook]:
    """Return the ledger's hooks that act on the module's output, without disabled ones."""
    return [hook for hook in module._forward_hooks.values() if isinstance(hook, Hook) and not hook.disabled]


def hook_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that active hooks read, which are not in the state_dict, as ("MODULE:NAME", tensor)."""
    for name, module in model.named_modules():
        for hook in active_hooks(module):
            yield from ((f"{name}:{part}", tensor) for part, tensor in hook.folded.tensors.items())


def looks_ahead(model: nn.Module) -> bool:
    """Return whether an edit on the model makes outputs depend on later tokens of a row (`Folded.looks_ahead`)."""
    return any(hook.folded.looks_ahead for module in model.modules() for hook in active_hooks(module))


def reads_layout(model: nn.Module) -> bool:
    """Return whether an edit on the model acts at some positions of a row, which only the decoder is told.

    Then blocks cannot run by themselves.
    """
    return any(
        hook.folded.reads is not None and hook.folded.reads_layout
        for module in model.modules()
        for hook in active_hooks(module)
    )


def check_trains_on_whole_texts(model: nn.Module, name: str) -> None:
    """Refuse a training that reads whole texts in one pass where an edit acts at the tokens that end a pass.

    Args:
        model: The model.
        name: What is to be trained, for the message.

    Raises:
        ArchitectureError: An edit acts at the last token of each pass, or at the first ones of a prompt.
    """
    if reads_layout(model) and looks_ahead(model):
        raise ArchitectureError(
            f"the model carries an edit of behaviour that acts at the last token of each pass, or at a prompt, and "
            f"{name} reads whole texts in one pass, in which other tokens are the last; undo that edit, train, and "
            "apply it again"
        )


def find_module(model: nn.Module, name: str) -> tuple[str, nn.Module]:
    """Return the first of a module's names, and the module.

    Raises:
        LedgerError: The model has no module of this name.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise LedgerError(f"the model has no module {name!r}: {error}") from error
    return next(first for first, other in model.named_modules() if other is module), module
