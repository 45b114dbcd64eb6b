"""What holds for every method, as checks that any method can be held to, wherever it comes from.

    from errata.testing import laws

    def make(model, tokenizer):
        return MyMethod(model, tokenizer, {"layers": [1]})

    @pytest.mark.parametrize("trial", laws.trials(make), ids=str)
    def test_my_method_keeps_the_law(trial):
        trial()

Every law is tried on new random models of three layers (tiny_models.py), in seconds. What a law finds broken it says as
an AssertionError; `check_all(make)` does all without pytest.
"""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import product
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from errata.editors.core.config import EditorConfig
from errata.editors.core.edit import Edit, Solution
from errata.editors.core.editor import Editor
from errata.editors.core.errors import OutOfMemoryError
from errata.editors.core.files.digests import add_bytes
from errata.editors.core.forward.row_patches import UNTOUCHED, RowPatches, reason_alone
from errata.editors.core.ledger import adapter_hooks
from errata.editors.core.ledger import ledger as ledgers
from errata.editors.core.ledger.adapter_hooks import hook_tensors
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import LowRank, Patch
from errata.editors.core.loading import edit_of, load_edit, load_ledger, save_edits
from errata.editors.core.model.tokens import Tokenizer
from errata.editors.core.request import EditRequest
from errata.evaluate.generation import continuations, continue_edited
from errata.evaluate.probes import Probe
from errata.evaluate.scoring import score, score_edited
from errata.testing.tiny_models import ARCHITECTURES, tiny_model, tiny_tokenizer

Make = Callable[[nn.Module, Tokenizer], Editor]  # an editor of the method, on this model
New = Callable[[], Editor]  # an editor of the method on a model of its own, the same in every call
REQUESTS = (
    EditRequest("The capital of {} is", "Varland", "Brast"),
    EditRequest("The mother tongue of {} is", "Danielle Darrieux", "English", "French"),
    EditRequest("{} lies in", "São Verão", "Northern Tarvos"),
)


_CLOSE: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-8}


# --- the laws -------------------------------------------------------------------------------------------------------


def apply_edits_the_model_and_undo_in_any_order_restores_every_bit(new: New) -> None:
    editor = new()
    model = editor.model.train()
    model.requires_grad_(True)
    before, untouched = digest(model), flags(model)
    first = editor.apply(REQUESTS[0])
    only_first = digest(model)
    require(only_first != before, "an edit was applied and the model is what it was")
    second = editor.apply(REQUESTS[1:])
    first.undo()
    require(digest(model) not in (before, only_first), "the second edit went with the first")
    second.undo()
    require(digest(model) == before, "all edits are undone, and the model is not what it was")
    first.apply()
    require(digest(model) == only_first, "an edit that is applied again gives other bits")
    with editor.applied(REQUESTS[2]) as third:
        require(third.is_applied, "inside `applied` the edit is not applied")
        first.undo()
    require(digest(model) == before, "`applied` left something behind")
    require(flags(model) == untouched, "training flags, gradients or hooks are left behind")


def compute_touches_nothing_and_gives_each_request_the_edit_it_would_get_alone(new: New) -> None:
    editor = new()
    before = digest(editor.model)
    together = editor.compute(REQUESTS)
    require(digest(editor.model) == before, "`compute` has changed the model")
    asked = [edit.requests for edit in together]
    require(asked == [(request,) for request in REQUESTS], f"expected one edit per request, in order, got {asked}")
    for request, edit in zip(REQUESTS, together, strict=True):
        (alone,) = editor.compute(request)
        require(bool(parts(edit)), "an edit adds nothing")
        torch.testing.assert_close(parts(edit), parts(alone), rtol=1e-8, atol=1e-10)


def requests_applied_together_are_one_entry_and_one_by_one_where_the_method_writes_one_by_one(new: New) -> None:
    editor = new()
    edit = editor.apply(REQUESTS)
    together = contents(editor.model)
    require(len(editor.ledger) == 1, f"expected one entry in the ledger, got {len(editor.ledger)}")
    require(len(edit.diagnostics) == len(REQUESTS), "expected one report per request")
    if type(editor).solve_batch is not Editor.solve_batch and not editor.one_by_one:
        return
    edit.undo()
    for request in REQUESTS:
        editor.apply(request)
    torch.testing.assert_close(contents(editor.model), together, rtol=1e-10, atol=1e-12)


def only_the_parameters_and_modules_of_the_patch_change(new: New) -> None:
    editor = new()
    before, hooked_before = contents(editor.model), hooked(editor.model)
    edit = editor.apply(REQUESTS[0])
    changed = {name for name, p in editor.model.named_parameters() if not torch.equal(p, before[name])}
    require(changed == set(edit.patch.updates), f"changed are {changed}, in the patch {set(edit.patch.updates)}")
    new_hooks = hooked(editor.model) - hooked_before
    require(new_hooks == set(edit.patch.adapters), f"hooked are {new_hooks}, in the patch {set(edit.patch.adapters)}")
    require(bool(changed or new_hooks), "nothing changed")


def the_same_seed_gives_the_same_bits(new: New) -> None:
    digests = set()
    for _ in range(2):
        torch.manual_seed(torch.seed())
        editor = new()
        editor.apply(REQUESTS)
        digests.add(digest(editor.model))
    require(len(digests) == 1, "two editors with one seed gave different bits; seed what is random from config.seed")


def editors_of_two_methods_share_a_ledger_and_undo_in_any_order(new: New) -> None:
    editor = new()
    other = _Nudge(editor.model, editor.tokenizer)
    before = digest(editor.model)
    mine, theirs = editor.apply(REQUESTS[0]), other.apply(REQUESTS[1])
    require(len(Ledger.of(editor.model)) == 2, "expected two entries in the model's ledger")
    mine.undo()
    theirs.undo()
    require(digest(editor.model) == before, "two edits were undone, and the model is not what it was")
    mine.apply()
    theirs.apply()
    editor.rollback()
    require(digest(editor.model) == before, "`rollback` left something behind")


def a_configuration_survives_json(new: New) -> None:
    editor = new()
    plain = json.loads(json.dumps(editor.config.to_dict(), allow_nan=False))
    require(type(editor.config).from_dict(plain) == editor.config, f"{plain} gives another configuration")
    require("seed" in plain, "expected a Config that is an EditorConfig, with its seed")


def saved_edits_give_the_same_bits_elsewhere_and_the_method_goes_on_from_them(new: New) -> None:
    editor, together, one_by_one = new(), new(), new()
    untouched = digest(together.model)
    edits = [editor.apply(request) for request in REQUESTS[:2]]
    with TemporaryDirectory() as folder:
        save_edits(editor.model, f"{folder}/edits")
        load_ledger(f"{folder}/edits", together.model)
        for edit in edits:
            load_edit(edit.save(f"{folder}/{edit.id}"), one_by_one.model)
    saved = digest(editor.model)
    here = editor.apply(REQUESTS[2])
    for other in (together, one_by_one):
        require(digest(other.model) == saved, "what was loaded gives other bits than what was saved")
        there = other.apply(REQUESTS[2])
        require(
            here.id == there.id,
            "the next edit is another where the ones before were loaded; what it needs of them belongs into "
            "Solution.state",
        )
        require(digest(other.model) == digest(editor.model), "the next edit gives other bits")
        edit_of(other.model, other.ledger.entries[0].id).undo()
        other.rollback()
        require(digest(other.model) == untouched, "what was loaded is undone, and the model is not what it was")


def a_fault_at_any_moment_leaves_the_model_as_before(new: New) -> None:
    editor = new()
    kept = editor.compute(REQUESTS[0])[0].apply()
    before, untouched = digest(editor.model), flags(editor.model)
    solved: list[Solution] = []
    for moment, (place, reached) in MOMENTS.items():
        for fault, after in product(FAULTS, (False, True)):
            where = f"{fault} {'after' if after else 'before'} {moment}"
            act, expected = FAULTS[fault]
            raised = False
            # What comes behind the method's solution takes it as it is, solved once.
            with _solved_once(editor, solved) if moment in BEHIND_THE_SOLUTION else nullcontext():
                owner, attribute = place(editor)
                with faulty(owner, attribute, act, after=after) as landed:
                    try:
                        editor.apply(REQUESTS[1])
                    except expected:
                        raised = True
            require(bool(landed) or not reached(kept.patch), f"{where}: it was never reached")
            require(raised or not landed, f"{where}: nothing was raised")
            added = [entry.id for entry in editor.ledger.entries if entry.id != kept.id]
            # Ctrl-C may also be honoured after the write: then the edit is complete, and the only one that is new.
            whole = not landed or (fault == "ctrl-c" and len(added) == 1)
            require(not added or whole, f"{where}: an edit was written")
            editor.ledger.remove_many(added)
            require(digest(editor.model) == before, f"{where}: the model is not what it was")
            require(flags(editor.model) == untouched, f"{where}: flags, gradients or hooks are left behind")


def edits_answer_beside_each_other_as_each_does_alone(new: New) -> None:
    editor = new()
    before, edits = digest(editor.model), editor.compute(REQUESTS)
    if any(reason_alone(editor.model, edit.patch) is not None for edit in edits):
        return  # the bench then asks them one by one, and says so
    prompts = [request.text for request in REQUESTS]
    probes = [Probe("neighborhood", request.text, request.target, request.target_true) for request in REQUESTS]
    patches = RowPatches(editor.model, [edit.patch for edit in edits])
    owners = (*range(len(edits)), UNTOUCHED)
    scores = score_edited(patches, editor.tokenizer, [(owner, probes) for owner in owners], next_token=True)
    asked = [(owner, prompt) for owner in owners for prompt in prompts]
    texts = iter(continue_edited(patches, editor.tokenizer, asked, 4))
    require(digest(editor.model) == before, "edits were asked beside each other, and the model has changed")
    for owner, found in zip(owners, scores, strict=True):
        with edits[owner].applied() if owner != UNTOUCHED else nullcontext():
            alone = score(editor.model, editor.tokenizer, probes, next_token=True)
            written = continuations(editor.model, editor.tokenizer, prompts, 4)
        torch.testing.assert_close([s.nll_target for s in found], [s.nll_target for s in alone], **_CLOSE)
        torch.testing.assert_close([s.logprobs for s in found], [s.logprobs for s in alone], **_CLOSE)
        choices = [s.target_choice for s in found], [s.target_choice for s in alone]
        require(choices[0] == choices[1], f"edit {owner} chooses {choices[0]} beside others, and {choices[1]} alone")
        said = [next(texts).ids for _ in prompts], [one.ids for one in written]
        require(said[0] == said[1], f"edit {owner} writes {said[0]} beside others, and {said[1]} alone")


# --- which law is tried on what -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One law of one method on one model; call it."""

    law: Callable[[New], None]
    make: Make
    architecture: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.law.__name__}-{self.architecture}-{str(self.dtype).removeprefix('torch.')}"

    def __call__(self) -> None:
        """Try the law.

        Raises:
            AssertionError: it is broken; says how.
        """
        tokenizer = tiny_tokenizer()
        self.law(lambda: self.make(tiny_model(self.architecture, len(tokenizer), dtype=self.dtype), tokenizer))


_ONE = (("gpt2", torch.float32),)
_PRECISE = (("gpt2", torch.float64),)
_EVERY_PRECISE = tuple((name, torch.float64) for name in ARCHITECTURES)
_COARSE = tuple((name, torch.bfloat16) for name in ARCHITECTURES)
_MANY = tuple((name, torch.float32) for name in ARCHITECTURES) + _COARSE
LAWS = (
    (apply_edits_the_model_and_undo_in_any_order_restores_every_bit, _MANY),
    (compute_touches_nothing_and_gives_each_request_the_edit_it_would_get_alone, _PRECISE),
    (requests_applied_together_are_one_entry_and_one_by_one_where_the_method_writes_one_by_one, _PRECISE),
    (only_the_parameters_and_modules_of_the_patch_change, _ONE),
    (the_same_seed_gives_the_same_bits, _ONE),
    (editors_of_two_methods_share_a_ledger_and_undo_in_any_order, _ONE),
    (a_configuration_survives_json, _ONE),
    (saved_edits_give_the_same_bits_elsewhere_and_the_method_goes_on_from_them, _ONE + _COARSE[1:]),
    (a_fault_at_any_moment_leaves_the_model_as_before, _ONE),
    (edits_answer_beside_each_other_as_each_does_alone, _EVERY_PRECISE),
)


def trials(make: Make) -> list[Trial]:
    """Every law on every model that it is tried on.

    Args:
        make: Makes an editor of the method on the model that it is given, with fields that suit a model of three
            layers and width 32.
    """
    return [Trial(law, make, architecture, dtype) for law, models in LAWS for architecture, dtype in models]


def check_all(make: Make) -> None:
    """Hold a method to every law.

    Raises:
        AssertionError: one is broken; says which and how.
    """
    for trial in trials(make):
        try:
            trial()
        except AssertionError as error:
            raise AssertionError(f"{trial}: {error}") from error


# --- what they look at ----------------------------------------------------------------------------------------------


def require(holds: bool, message: str) -> None:
    """Raise AssertionError with the message unless it holds."""
    if not holds:
        raise AssertionError(message)


def digest(model: nn.Module) -> str:
    """SHA-256 of the bytes of every parameter and buffer, tied and non-persistent ones too, and of all that hooks of
    edits read, by name."""
    total = hashlib.sha256()
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(), *hook_tensors(model)]
    for name, tensor in named:
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        add_bytes(total, tensor)
    return total.hexdigest()


def flags(model: nn.Module) -> tuple[Any, ...]:
    """What an edit must not leave a trace in, besides the bytes."""
    return (
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [parameter.grad is None for parameter in model.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
    )


def parts(edit: Edit) -> dict[str, Tensor]:
    """What an edit adds, in forms that can be compared: multiplied out, and the tensors of its adapters."""
    updates = {name: u.matrix(torch.float64, torch.device("cpu")) for name, u in edit.patch.updates.items()}
    return updates | {f"{m}:{n}": t for m, adapter in edit.patch.adapters.items() for n, t in adapter.tensors.items()}


def contents(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter, and of all that hooks of edits read."""
    named = (*model.named_parameters(), *hook_tensors(model))
    return {name: tensor.detach().clone() for name, tensor in named}


def hooked(model: nn.Module) -> set[str]:
    """Names of the modules that have a forward hook."""
    return {name for name, module in model.named_modules() if module._forward_hooks}


# --- faults ---------------------------------------------------------------------------------------------------------


def _raise(error: BaseException) -> Callable[[], None]:
    def fault() -> None:
        raise error

    return fault


def _interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


# name -> (what happens, what is raised of it)
FAULTS: dict[str, tuple[Callable[[], None], tuple[type[BaseException], ...]]] = {
    "exception": (_raise(RuntimeError("injected")), (RuntimeError,)),
    "memory": (_raise(torch.OutOfMemoryError("injected")), (torch.OutOfMemoryError, OutOfMemoryError)),
    "ctrl-c": (_interrupt, (KeyboardInterrupt,)),
}
# name -> where faults strike, before or after it, given the editor; and whether an edit with this patch comes there
MOMENTS: dict[str, tuple[Callable[[Editor], tuple[Any, str]], Callable[[Patch], bool]]] = {
    "the forward pass of a block": (lambda editor: (type(editor.architecture.block(0)), "forward"), lambda _: False),
    "the method's solution": (lambda editor: (type(editor), "solve_batch"), lambda _: True),
    "the ledger's plan": (lambda _: (ledgers, "plan_extended"), lambda patch: bool(patch.updates)),
    "the ledger's installation": (lambda _: (Ledger, "_write_sums"), lambda _: True),
    "a write": (lambda _: (ledgers, "_write"), lambda patch: bool(patch.updates)),
    "the plan of the hooks": (lambda _: (adapter_hooks, "stacks_with"), lambda _: True),
    "the hanging of the hooks": (lambda _: (adapter_hooks, "install"), lambda _: True),
}
BEHIND_THE_SOLUTION = tuple(MOMENTS)[2:]


@contextmanager
def faulty(owner: Any, name: str, fault: Callable[[], None], *, after: bool) -> Iterator[list[int]]:
    """Inside, the function `owner.name` calls `fault` once, before or after its own work; yields a list that is no
    longer empty once it has."""
    original, landed = getattr(owner, name), []

    def struck(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs) if after else None
        if not landed:
            landed.append(1)
            fault()
        return result if after else original(*args, **kwargs)

    with mock.patch.object(owner, name, struck):
        yield landed


@contextmanager
def _solved_once(editor: Editor, solved: list[Solution]) -> Iterator[None]:
    """Inside, the editor's solution of a batch is the one in the list, where the first puts it."""
    original = type(editor).solve_batch

    def solve(self: Editor, requests: Sequence[EditRequest]) -> Solution:
        if not solved:
            solved.append(original(self, requests))
        return solved[0]

    with mock.patch.object(type(editor), "solve_batch", solve):
        yield


class _Nudge(Editor):
    """Another package's method: a random update of rank one."""

    name = "nudge"
    Config = EditorConfig

    def solve(self, requests: Sequence[EditRequest]) -> list[Solution]:
        drawn = torch.Generator().manual_seed(self.config.seed)
        d_out, d_in = self.architecture.weight(0).shape
        update = LowRank(torch.randn(d_out, 1, generator=drawn), torch.randn(1, d_in, generator=drawn))
        patch = Patch({self.architecture.weight_name(0): update})
        return [Solution((request,), patch, ({},)) for request in requests]
