"""The forward hooks through which a ledger's adapters act: one a module, gone with the module's last record."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from errata.editors.core.adapter import Adapter, Folded
from errata.editors.core.errors import LedgerError


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


def extended(held: Mapping[str, Folded], entries: Iterable[Mapping[str, Adapter]]) -> dict[str, Folded]:
    """The modules' states with more entries' records. Nothing is installed here.

    Raises:
        LedgerError: a module carries records of another kind, or such as these cannot go with.
    """
    found = dict(held)
    for adapters in entries:
        found |= {name: _with(name, found.get(name), adapter) for name, adapter in adapters.items()}
    return found


def repeated(
    held: Mapping[str, Folded], names: Iterable[str], kept: Iterable[Mapping[str, Adapter]]
) -> dict[str, Folded]:
    """The modules' states with those of `names` made anew from the records of `kept` entries, in this order."""
    changed, entries = set(names), list(kept)
    fresh = {name: folded for name, folded in held.items() if name not in changed}
    for name in changed:
        if records := [adapters[name] for adapters in entries if name in adapters]:
            fresh[name] = type(records[0]).folded(records)
    return fresh


def put(model: nn.Module, hooks: dict[str, Hook], wanted: Mapping[str, Folded], *, asleep: bool = False) -> None:
    """Make the model's hooks those of `wanted`, by module name; `hooks`, what the ledger has on it, follows.

    Raises:
        LedgerError: a module is gone.
    """
    for name in hooks.keys() - wanted.keys():
        hooks.pop(name).detach()
    for name, folded in wanted.items():
        hook = hooks.setdefault(name, Hook(folded))
        hook.folded, hook.asleep = folded, asleep
        hook.attach(find_module(model, name)[1])


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What the model computes with beside its state_dict: the tensors that hooks at work read, by module and name."""
    for name, module in model.named_modules():
        for hook in module._forward_hooks.values():
            if isinstance(hook, Hook) and not hook.asleep:
                yield from ((f"{name}:{part}", tensor) for part, tensor in hook.folded.tensors.items())


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


def _with(name: str, folded: Folded | None, adapter: Adapter) -> Folded:
    if folded is None:
        return type(adapter).folded([adapter])
    if folded.kind != adapter.kind:
        raise LedgerError(f"{name} carries records of {folded.kind}; one of {adapter.kind} cannot go on top of them")
    device = next(iter(adapter.tensors.values())).device if adapter.tensors else torch.device("cpu")
    return folded.to(device).extended(adapter)
