"""Edits that are no change of weights: what the ledger does with adapters, by a kind made for the test."""

from __future__ import annotations

import copy
import pickle
import random
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
import torch
from torch import Tensor, nn

from errata.editors.core.errors import ExportError, LedgerError, NumericalError
from errata.editors.core.ledger import adapter_hooks, patch
from errata.editors.core.ledger import ledger as ledger_module
from errata.editors.core.ledger.adapter import Adapter, Folded, adapter_kind
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import Dense, Patch
from errata.editors.core.loading import export_lora, export_merged

UP, ATTENTION = "transformer.h.0.mlp.c_fc", "transformer.h.1.attn.c_attn"
WIDTHS = {UP: 128, ATTENTION: 96}
DOWN = "transformer.h.0.mlp.c_proj.weight"
State = Callable[[Ledger], tuple[Any, ...]]


@dataclass(frozen=True)
class Drift(Adapter):
    """output -> factor * output + shift: what several do depends on their order."""

    shift: Tensor
    factor: float

    kind: ClassVar[str] = "drift"

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return {"shift": self.shift}

    @property
    def numbers(self) -> Mapping[str, Any]:
        return {"factor": self.factor}

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> Self:
        return cls(tensors["shift"], numbers["factor"])

    @classmethod
    def joined(cls, adapters: Sequence[Self]) -> Self:
        together = cls.folded(adapters)
        return cls(together.shift, together.factor)

    @classmethod
    def folded(cls, adapters: Sequence[Self]) -> Drifts:
        return Drifts(adapters[0].shift, adapters[0].factor).extended(adapters[1:])

    def check(self, module: nn.Module) -> None:
        if module.nf != len(self.shift):
            raise LedgerError(f"expected {module.nf} features, got {len(self.shift)}")


@dataclass(frozen=True)
class Drifts(Folded):
    shift: Tensor
    factor: float

    kind: ClassVar[str] = "drift"

    def __call__(self, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self.factor * output + self.shift

    def extended(self, adapters: Sequence[Drift]) -> Drifts:
        shift, factor = self.shift, self.factor
        for adapter in adapters:
            shift, factor = adapter.factor * shift + adapter.shift, factor * adapter.factor
        return Drifts(shift, factor)

    def to(self, device: torch.device) -> Drifts:
        return self if self.shift.device == device else Drifts(self.shift.to(device), self.factor)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return {"shift": self.shift, "factor": torch.tensor(self.factor)}


class Other(Drift):
    kind: ClassVar[str] = "other"


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drift(seed: int, *modules: str) -> dict[str, Adapter]:
    return {name: Drift(noise(WIDTHS[name], seed=seed), 1 + seed / 8) for name in modules}


def mixed(seed: int) -> Patch:
    """Weights and two modules at once."""
    return Patch({DOWN: Dense(noise(32, 128, seed=seed))}, drift(seed, UP, ATTENTION))


def answers(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits


def counts(model: Any) -> list[int]:
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


@pytest.fixture(autouse=True)
def _handler_comes_back() -> Iterator[None]:
    """`untouched()` is entered here and not left, which leaves its handler of Ctrl-C in place for later tests."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


# --- what it does -------------------------------------------------------------------------------------------------


def test_an_adapter_acts_by_one_hook_a_module_and_leaves_no_trace_when_it_is_gone(ledger: Ledger) -> None:
    model = ledger.model
    before, hooked, names = answers(model), counts(model), list(model.state_dict())
    outputs: list[Tensor] = []
    probe = model.get_submodule(UP).register_forward_hook(lambda *call: outputs.append(call[2]))
    answers(model)
    plain = outputs.pop()
    probe.remove()
    ledger.append("a", Patch({}, drift(1, UP)))
    ledger.append("b", Patch({}, drift(2, UP)))
    assert sum(counts(model)) == sum(hooked) + 1
    assert list(model.state_dict()) == names
    probe = model.get_submodule(UP).register_forward_hook(lambda *call: outputs.append(call[2]))
    assert not torch.equal(answers(model), before)
    probe.remove()
    a, b = drift(1, UP)[UP], drift(2, UP)[UP]
    assert isinstance(a, Drift) and isinstance(b, Drift)
    torch.testing.assert_close(outputs[0], b.factor * (a.factor * plain + a.shift) + b.shift)
    ledger.remove("a")
    ledger.remove("b")
    assert torch.equal(answers(model), before)
    assert counts(model) == hooked
    assert ledger.nbytes() == 0


def test_the_ledger_holds_its_own_copy_and_counts_it(ledger: Ledger, digest: Any) -> None:
    given = drift(1, UP)
    entry = ledger.append("a", Patch({}, given))
    once = digest(ledger.model)
    given[UP].tensors["shift"].zero_()
    assert digest(ledger.model) == once
    assert entry.patch.adapters[UP].norm() > 0
    assert ledger.nbytes() >= 128 * 4
    assert "1 modules" in repr(ledger)


def test_one_patch_joins_the_records_of_a_module_in_their_order(ledger: Ledger) -> None:
    first, second = mixed(1), mixed(2)
    ledger.append("a", first)
    ledger.append("b", second)
    apart = answers(ledger.model)
    ledger.clear()
    ledger.append("both", patch.merge([first, second]))
    torch.testing.assert_close(answers(ledger.model), apart)


def test_norms_and_digests_see_adapters(make_tiny: Any) -> None:
    from errata.editors.core.edit import Edit

    model = make_tiny("gpt2", n_layers=2)
    found = mixed(1)
    assert set(found.norms()) == {DOWN, UP, ATTENTION}
    factors = (1.0, 1.0, 2.0)
    ids = [
        Edit("x", (), Patch({}, {UP: Drift(noise(128, seed=seed), factor)}), (), {}, model).id
        for seed, factor in zip((1, 2, 1), factors, strict=True)
    ]
    assert len(set(ids)) == 3


def test_untouched_puts_hooks_to_sleep_and_keeps_their_place_among_others(ledger: Ledger) -> None:
    model = ledger.model
    before = answers(model)
    ledger.append("a", mixed(1))
    seen: list[Tensor] = []
    other = model.get_submodule(UP).register_forward_hook(lambda *call: seen.append(call[2]))
    edited = answers(model)
    with ledger.untouched():
        assert torch.equal(answers(model), before)
        with ledger.untouched():
            assert torch.equal(answers(model), before)
        assert torch.equal(answers(model), before)
    assert torch.equal(answers(model), edited)
    assert torch.equal(seen[0], seen[-1])
    other.remove()


@pytest.mark.parametrize("block", ["transaction", "untouched"])
def test_weights_are_put_back_though_a_module_with_a_hook_is_gone(ledger: Ledger, block: str) -> None:
    ledger.append("w", mixed(1))
    edited = ledger.model.get_parameter(DOWN).detach().clone()
    kept = ledger.model.get_submodule(ATTENTION.rpartition(".")[0])
    with pytest.raises(LedgerError, match=r"restore hooks: .*no module.*restore\(\)"), getattr(ledger, block)():
        if block == "transaction":
            ledger.remove("w")
        assert not torch.equal(ledger.model.get_parameter(DOWN), edited)
        del kept.c_attn
        raise ZeroDivisionError
    assert torch.equal(ledger.model.get_parameter(DOWN), edited)
    assert [entry.id for entry in ledger.entries] == ["w"]


def test_rebase_makes_hooks_part_of_the_base_and_restore_hangs_up_what_somebody_took_off(ledger: Ledger) -> None:
    model = ledger.model
    ledger.append("a", mixed(1))
    edited = answers(model)
    model.get_submodule(UP)._forward_hooks.clear()
    assert not torch.equal(answers(model), edited)
    ledger.restore()
    assert torch.equal(answers(model), edited)
    ledger.rebase()
    assert (len(ledger), ledger.nbytes()) == (0, 0)
    assert torch.equal(answers(model), edited)
    ledger.append("b", mixed(2))
    assert not torch.equal(answers(model), edited)
    with ledger.untouched():
        assert torch.equal(answers(model), edited)
    ledger.clear()
    assert torch.equal(answers(model), edited)


# --- any order, any failure ---------------------------------------------------------------------------------------


def test_any_sequence_leaves_what_the_remaining_records_replayed_give(make_tiny: Any, digest: Any, trials: Any) -> None:
    undone = 0
    for seed in range(trials(15, 1000)):
        draw = random.Random(seed)
        model, fresh = make_tiny("gpt2", n_layers=2), make_tiny("gpt2", n_layers=2)
        ledger, base, remaining = Ledger.of(model), digest(model), {}
        for step in range(12):
            if remaining and draw.random() < 0.45:
                gone = draw.sample(list(remaining), draw.randint(1, len(remaining)))
                ledger.remove_many(gone)
                remaining = {name: found for name, found in remaining.items() if name not in gone}
                undone += 1
            elif draw.random() < 0.3:
                with pytest.raises(ZeroDivisionError), ledger.transaction():
                    ledger.append("lost", mixed(draw.randint(0, 99)))
                    ledger.remove_many(["lost", *list(remaining)[:1]])
                    raise ZeroDivisionError
            else:
                modules = draw.sample([UP, ATTENTION], draw.randint(1, 2))
                remaining[f"e{step}"] = Patch({}, drift(draw.randint(0, 99), *modules))
                ledger.append(f"e{step}", remaining[f"e{step}"])
            other = Ledger.of(fresh)
            other.clear()
            for name, found in remaining.items():
                other.append(name, found)
            assert digest(model) == digest(fresh)
            assert counts(model) == counts(fresh)
        ledger.clear()
        assert digest(model) == base
    assert undone > 10


STEPS = [
    (adapter_hooks, "stacks_with"), (adapter_hooks, "stacks_without"), (adapter_hooks, "install"),
    (adapter_hooks.Hook, "attach"),
    (adapter_hooks.Hook, "detach"), (Adapter, "copy"), (Drift, "folded"), (Drifts, "extended"),
    (ledger_module, "_write"),
]  # fmt: skip
OPERATIONS: dict[str, Callable[[Ledger], object]] = {
    "append": lambda ledger: ledger.append("new", mixed(9)),
    "append elsewhere": lambda ledger: ledger.append("new", Patch({}, drift(9, ATTENTION))),
    "remove first": lambda ledger: ledger.remove("e0"),
    "remove all": lambda ledger: ledger.clear(),
    "restore": lambda ledger: ledger.restore(),
    "lay bare": lambda ledger: ledger.untouched().__enter__(),
}


@pytest.mark.parametrize("fault", [torch.OutOfMemoryError, ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_fault_at_any_step_leaves_model_hooks_and_entries_as_before(
    open_ledger: Any, state: State, operation: str, fault: type[BaseException]
) -> None:
    ledger = open_ledger(torch.float32)
    for i in range(3):
        ledger.append(f"e{i}", Patch({DOWN: Dense(noise(32, 128, seed=i))}, drift(i, UP)))
    before, hooked, at, landed = state(ledger), counts(ledger.model), 0, []
    while True:
        at += 1
        calls: list[str] = []
        with pytest.MonkeyPatch.context() as monkeypatch:
            for owner, name in STEPS:
                _fail_at(monkeypatch, owner, name, calls, at, fault)
            try:
                OPERATIONS[operation](ledger)
            except fault:
                landed.append(calls[at - 1])
        if len(calls) < at:
            break
        assert state(ledger) == before, (landed[-1], at)
        assert counts(ledger.model) == hooked, (landed[-1], at)
    assert "install" in landed
    assert state(ledger) != before or operation == "restore"


def _fail_at(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: list[str], at: int, fault: type[BaseException]
) -> None:
    """Fail at the `at`-th call of any step, every second time after the step has done its work."""
    real = owner.__dict__[name]
    bound = real.__func__ if isinstance(real, classmethod) else real

    def step(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        fails = len(calls) == at
        if fails and at % 2:
            raise fault("injected")
        result = bound(*args, **kwargs)
        if fails:
            raise fault("injected")
        return result

    monkeypatch.setattr(owner, name, classmethod(step) if isinstance(real, classmethod) else step)


def test_an_inner_transaction_fails_by_itself_and_an_outer_one_takes_all(ledger: Ledger, state: State) -> None:
    start, hooked = state(ledger), counts(ledger.model)
    with pytest.raises(KeyError), ledger.transaction():
        ledger.append("a", mixed(1))
        middle = state(ledger)[:2]
        with pytest.raises(ZeroDivisionError), ledger.transaction():
            ledger.append("b", mixed(2))
            ledger.remove("a")
            raise ZeroDivisionError
        assert state(ledger)[:2] == middle
        raise KeyError
    assert state(ledger) == start
    assert counts(ledger.model) == hooked


# --- copies -------------------------------------------------------------------------------------------------------


def test_a_deep_copy_has_hooks_of_its_own(make_tiny: Any, digest: Any) -> None:
    model = make_tiny("gpt2", n_layers=2)
    base, hooked = digest(model), counts(model)
    for i in range(3):
        Ledger.of(model).append(f"e{i}", mixed(i))
    edited = digest(model)
    twin = copy.deepcopy(model)
    assert digest(twin) == edited
    assert torch.equal(answers(twin), answers(model))
    Ledger.of(twin).remove("e1")
    assert digest(model) == edited
    Ledger.of(model).remove("e1")
    assert digest(twin) == digest(model) != edited
    Ledger.of(model).clear()
    assert digest(model) == base
    assert digest(twin) != base
    Ledger.of(twin).clear()
    assert digest(twin) == base
    assert counts(twin) == counts(model) == hooked


def test_a_deep_copy_of_an_untouched_view_has_no_hooks(ledger: Ledger, digest: Any) -> None:
    before, hooked = digest(ledger.model), counts(ledger.model)
    ledger.append("a", mixed(1))
    with ledger.untouched():
        twin = copy.deepcopy(ledger.model)
    assert counts(twin) == hooked
    assert digest(twin) == before
    Ledger.of(twin).append("a", mixed(1))
    assert digest(twin) == digest(ledger.model)
    Ledger.of(twin).clear()
    assert digest(ledger.model) != before


def test_a_pickled_model_answers_as_before_and_has_that_for_its_base(ledger: Ledger) -> None:
    ledger.append("a", mixed(1))
    edited = answers(ledger.model)
    twin = pickle.loads(pickle.dumps(ledger.model))
    assert torch.equal(answers(twin), edited)
    assert len(Ledger.of(twin)) == 0
    Ledger.of(twin).append("b", mixed(2))
    Ledger.of(twin).clear()
    assert torch.equal(answers(twin), edited)


# --- what is refused ----------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[type[Exception], str, dict[str, Adapter]]] = {
    "unknown module": (LedgerError, "no module 'nope'", {"nope": Drift(noise(128, seed=0), 1.0)}),
    "shape": (LedgerError, "expected 128 features, got 96", {UP: Drift(noise(96, seed=0), 1.0)}),
    "NaN": (NumericalError, UP, {UP: Drift(torch.full((128,), float("nan")), 1.0)}),
    "another kind": (
        LedgerError,
        "expected an adapter of kind drift.* got other;",
        {UP: Other(noise(128, seed=0), 1.0)},
    ),
    "numbers": (LedgerError, "JSON", {UP: Drift(noise(128, seed=0), float("inf"))}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_record_that_does_not_fit_is_refused_and_nothing_changes(ledger: Ledger, state: State, what: str) -> None:
    error, match, adapters = REFUSED[what]
    ledger.append("a", mixed(1))
    before = state(ledger)
    with pytest.raises(error, match=match):
        ledger.append("b", Patch({DOWN: Dense(noise(32, 128, seed=3))}, adapters))
    assert state(ledger) == before


def test_what_is_no_change_of_weights_is_not_exported_as_one(ledger: Ledger, tmp_path: Path) -> None:
    ledger.append("a", mixed(1))
    for export in (export_lora, export_merged):
        with pytest.raises(ExportError, match="a is no change of weights alone"):
            export(ledger.model, tmp_path / "folder")
    assert not list(tmp_path.iterdir())


def test_an_unknown_kind_is_said() -> None:
    with pytest.raises(LedgerError, match="unknown kind of adapter 'graze'"):
        adapter_kind("graze")
