"""The laws that methods are held to notice a method that breaks them: for each law, methods that do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from everyday import of_laws
from quick_editors import METHODS

from errata.editors.core.config import EditorConfig
from errata.editors.core.edit import Solution, combine
from errata.editors.core.editor import Editor
from errata.editors.core.errors import LedgerError
from errata.editors.core.ledger.adapter import Adapter, Folded
from errata.editors.core.ledger.patch import LowRank, Patch
from errata.editors.core.model.activations import last_keys
from errata.editors.core.model.tokens import prompt_ids
from errata.editors.core.request import EditRequest
from errata.testing import laws
from errata.testing.tiny_models import ARCHITECTURES


class Sound(Editor):
    """A method that keeps every law: a nudge along the key of the prompt's end."""

    name = "sound"
    Config = EditorConfig

    def solve(self, requests: Sequence[EditRequest]) -> list[Solution]:
        rows = [prompt_ids(self.tokenizer, request.text) for request in requests]
        keys = last_keys(self.architecture, rows, [1], pad=0)[1]
        return [self.solution(request, key) for request, key in zip(requests, keys, strict=True)]

    def solution(self, request: EditRequest, key: torch.Tensor, size: float = 0.1) -> Solution:
        dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
        value = torch.full((self.architecture.d_model, 1), size, dtype=dtype)
        patch = Patch({self.architecture.weight_name(1): LowRank(value, key.to(dtype)[None])})
        return Solution((request,), patch, ({},))


class DoesNothing(Sound):
    def solution(self, request: EditRequest, key: torch.Tensor, size: float = 0.0) -> Solution:
        return super().solution(request, key, size)


class WritesItself(Sound):
    def solve(self, requests: Sequence[EditRequest]) -> list[Solution]:
        self.architecture.weight(1).add_(0.01)
        return super().solve(requests)


class LeansOnTheOthers(Sound):
    def solve(self, requests: Sequence[EditRequest]) -> list[Solution]:
        return [self.solution(s.requests[0], torch.ones(128).double() * len(requests)) for s in super().solve(requests)]


class MergesWrongly(Sound):
    def solve_batch(self, requests: Sequence[EditRequest]) -> Solution:
        for solution in self.solve(requests[1:]):
            self.ledger.append(f"stray {solution.requests[0].id}", solution.patch)
        return self.solve(requests[:1])[0]


class SaysOneByOne(Sound):
    """And goes another way with several."""

    one_by_one = True

    def solve_batch(self, requests: Sequence[EditRequest]) -> Solution:
        keys = len(requests) * torch.ones(len(requests), 128).double()
        return combine([self.solution(request, key) for request, key in zip(requests, keys, strict=True)])


class Unseeded(Sound):
    def solution(self, request: EditRequest, key: torch.Tensor, size: float = 0.1) -> Solution:
        return super().solution(request, torch.randn_like(key.float()).to(key), size)


class LeavesAHook(Sound):
    def solve(self, requests: Sequence[EditRequest]) -> list[Solution]:
        self.architecture.down(0).register_forward_hook(lambda _module, _args, output: output)
        return super().solve(requests)


class ForgetsTheLedger(Sound):
    """Its rollback is its own, and knows nothing of other methods."""

    def rollback(self) -> None:
        for entry in self.ledger.entries:
            if entry.info.method == self.name:
                self.ledger.remove(entry.id)


@dataclass(frozen=True, kw_only=True)
class LossyConfig(EditorConfig):
    pairs: Any = ((1, 2),)


class Lossy(Sound):
    Config = LossyConfig


class WritesForAMoment(Sound):
    """Restores what it writes, unless something happens in between."""

    def solve(self, requests: Sequence[EditRequest]) -> list[Solution]:
        weight = self.architecture.weight(0)
        old = weight.clone()
        weight.mul_(0.5)
        solutions = super().solve(requests)
        weight.copy_(old)
        return solutions


class RemembersByItself(Sound):
    """Each edit is larger than the one before, as the editor counts them."""

    made = 0

    def apply(self, requests: Any) -> Any:
        self.made += 1
        return super().apply(requests)

    def solution(self, request: EditRequest, key: torch.Tensor, size: float = 0.1) -> Solution:
        return super().solution(request, key, size * self.made)


class SwallowsCtrlC(Sound):
    def apply(self, requests: Any) -> Any:
        with suppress(KeyboardInterrupt):
            return super().apply(requests)


class Remembers(Sound):
    """And does not say what several edits at once remember."""

    def solution(self, request: EditRequest, key: torch.Tensor, size: float = 0.1) -> Solution:
        found = super().solution(request, key, size)
        return Solution(found.requests, found.patch, found.diagnostics, {"key": key})


@dataclass(frozen=True)
class WritingAdapter(Adapter):
    """It says that it acts on each row alone, and writes to its module, where all rows read it."""

    kind = "writing"
    acts_by_row = True
    share: torch.Tensor

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        return {"share": self.share}

    @property
    def numbers(self) -> Mapping[str, Any]:
        return {}

    @classmethod
    def from_parts(cls, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> WritingAdapter:
        return cls(*tensors.values(), **numbers)

    @classmethod
    def joined(cls, adapters: Sequence[WritingAdapter]) -> WritingAdapter:
        return adapters[-1]

    @classmethod
    def folded(cls, adapters: Sequence[WritingAdapter]) -> FoldedWriting:
        return FoldedWriting(adapters[-1].share)

    def check(self, module: torch.nn.Module) -> None:
        assert isinstance(module, torch.nn.Module)


@dataclass(frozen=True)
class FoldedWriting(Folded):
    kind = WritingAdapter.kind
    share: torch.Tensor

    def __call__(self, module: torch.nn.Module, _args: tuple[Any, ...], output: torch.Tensor, /) -> torch.Tensor:
        module.get_parameter("bias").data.add_(self.share)
        return output

    def extended(self, adapters: Sequence[Any]) -> FoldedWriting:
        return FoldedWriting(adapters[-1].share)

    def to(self, device: torch.device) -> FoldedWriting:
        return FoldedWriting(self.share.to(device))

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        return {"share": self.share}


class WritesWhereOthersRead(Sound):
    def solve(self, requests: Sequence[EditRequest]) -> list[Solution]:
        patch = Patch({}, {self.architecture.weight_name(1).removesuffix(".weight"): WritingAdapter(torch.ones(1))})
        return [Solution((request,), patch, ({},)) for request in requests]


BROKEN: list[tuple[type[Editor], Callable[[laws.New], None], str]] = [
    (DoesNothing, laws.apply_edits_the_model_and_undo_in_any_order_restores_every_bit, "the model is what it was"),
    (LeavesAHook, laws.apply_edits_the_model_and_undo_in_any_order_restores_every_bit, "hooks are left behind"),
    (WritesItself, laws.compute_touches_nothing_and_gives_each_request_the_edit_it_would_get_alone, "has changed"),
    (LeansOnTheOthers, laws.compute_touches_nothing_and_gives_each_request_the_edit_it_would_get_alone, "not close"),
    (
        MergesWrongly,
        laws.requests_applied_together_are_one_entry_and_one_by_one_where_the_method_writes_one_by_one,
        "expected one entry",
    ),
    (
        SaysOneByOne,
        laws.requests_applied_together_are_one_entry_and_one_by_one_where_the_method_writes_one_by_one,
        "not close",
    ),
    (LeavesAHook, laws.only_the_parameters_and_modules_of_the_patch_change, "hooked are"),
    (DoesNothing, laws.only_the_parameters_and_modules_of_the_patch_change, "changed are set"),
    (Unseeded, laws.the_same_seed_gives_the_same_bits, "gave different bits"),
    (ForgetsTheLedger, laws.editors_of_two_methods_share_a_ledger_and_undo_in_any_order, "left something behind"),
    (Lossy, laws.a_configuration_survives_json, "another configuration"),
    (
        RemembersByItself,
        laws.saved_edits_give_the_same_bits_elsewhere_and_the_method_goes_on_from_them,
        "the next edit is another",
    ),
    (WritesForAMoment, laws.a_fault_at_any_moment_leaves_the_model_as_before, "before the forward pass of a block"),
    (SwallowsCtrlC, laws.a_fault_at_any_moment_leaves_the_model_as_before, "nothing was raised"),
    (LeavesAHook, laws.a_fault_at_any_moment_leaves_the_model_as_before, "hooks are left behind"),
    (WritesWhereOthersRead, laws.edits_answer_beside_each_other_as_each_does_alone, "the model has changed"),
]


@pytest.mark.parametrize("trial", laws.trials(Sound), ids=str)
def test_a_sound_method_keeps_the_law(trial: laws.Trial) -> None:
    trial()


@pytest.mark.parametrize(("kind", "law", "said"), BROKEN, ids=lambda part: getattr(part, "__name__", None))
def test_a_method_that_breaks_the_law_is_found_out(kind: type[Editor], law: Any, said: str) -> None:
    (first, *_) = [trial for trial in laws.trials(kind) if trial.law is law]
    with pytest.raises(AssertionError, match=said):
        first()


def test_every_law_has_a_method_that_breaks_it() -> None:
    assert {law for _, law, _ in BROKEN} == {law for law, _ in laws.LAWS}


def test_every_day_each_method_meets_each_law_and_block_form_and_each_law_meets_each_of_its_models() -> None:
    """The slow trials are the others: together they are all."""
    everyday: list[tuple[str, laws.Trial]] = []
    for number, method in enumerate(METHODS):
        found = of_laws(number, Sound)
        assert [trial for trial, _ in found] == laws.trials(Sound)
        everyday += [(method, trial) for trial, is_everyday in found if is_everyday]
    assert {(method, trial.law) for method, trial in everyday} == {(m, law) for m in METHODS for law, _ in laws.LAWS}
    assert {(m, trial.architecture) for m, trial in everyday} == {(m, form) for m in METHODS for form in ARCHITECTURES}
    assert {trial for _, trial in everyday} == set(laws.trials(Sound))
    assert len(everyday) < 0.75 * len(METHODS) * len(laws.trials(Sound))


def test_all_laws_are_checked_at_once_and_the_broken_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[laws.Trial] = []
    with monkeypatch.context() as patched:
        patched.setattr(laws.Trial, "__call__", lambda trial: held.append(trial))
        laws.check_all(Sound)
    assert held == laws.trials(Sound)
    with pytest.raises(AssertionError, match=r"a_configuration_survives_json-gpt2-float32: .* another conf"):
        laws.check_all(Lossy)


@pytest.fixture(autouse=True)
def _no_stray_handlers() -> Iterator[None]:
    import signal

    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before, "a SIGINT handler was left behind"


def test_what_a_method_remembers_is_never_dropped_in_silence(make_tiny: Any, tiny_tokenizer: Any) -> None:
    editor = Remembers(make_tiny("gpt2"), tiny_tokenizer)
    before = laws.digest(editor.model)
    with pytest.raises(LedgerError, match=r"has a state \(key\).* write the method's solve_batch"):
        editor.apply(laws.REQUESTS)
    assert laws.digest(editor.model) == before
    with pytest.raises(LedgerError, match="has a state"):
        combine(editor.solve(laws.REQUESTS))
    editor.apply(laws.REQUESTS[0])
    assert list(editor.ledger.entries[0].state) == ["key"]
