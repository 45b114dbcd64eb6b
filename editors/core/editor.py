"""The interface of every method: requests in, an edit out; the edit can be applied, undone and applied again.

    editor = ROME(model, tokenizer)
    edit = editor.apply(request)             # the model is edited when this returns, and stays so
    edit.undo()                              # bit for bit as before, in any order with other edits
    with editor.applied(requests) as edit:   # edited inside, as before outside, whatever happens
        ...
    edits = editor.compute(requests)         # one independent edit a request; the model is not touched

A method subclasses `Editor`, names itself and its Config, and writes `solve`. It never writes to the model: what it
returns is installed by the ledger, in a transaction.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from errata.editors.core.config import EditorConfig
from errata.editors.core.errors import ArchitectureError, ConfigError, LedgerError, OutOfMemoryError
from errata.editors.core.ledger import arithmetic
from errata.editors.core.ledger.entry import Entry, find_weight, make_entry
from errata.editors.core.ledger.interrupts import deferred_interrupts, reversible
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import Patch, merge
from errata.editors.core.model.activations import evaluating, frozen
from errata.editors.core.model.architecture import describe
from errata.editors.core.model.digests import add_bytes
from errata.editors.core.model.model_settings import read_model_settings
from errata.editors.core.model.tokens import Tokenizer, check_tokenizer
from errata.editors.core.progress import Progress, silent
from errata.editors.core.request import EditRequest, check_batch
from errata.editors.core.storage.lora_export import LoraExport, write_lora
from errata.editors.core.storage.merged_export import write_merged


@dataclass(frozen=True)
class Solution:
    """What a method found: the patch, a JSON-able report on each request that it answers, and tensors that it wants to
    find in the ledger as long as the edit is there."""

    requests: tuple[EditRequest, ...]
    patch: Patch
    diagnostics: tuple[dict[str, Any], ...]
    state: Mapping[str, Tensor] = field(default_factory=dict)


def combine(solutions: Sequence[Solution]) -> Solution:
    """One solution that adds what all of these add, one after another.

    Raises:
        LedgerError: one of several has a state: what to remember of all together, the method alone can say.
    """
    if len(solutions) == 1:
        return solutions[0]
    for solution in solutions:
        _check_stateless(solution)
    return Solution(
        tuple(request for solution in solutions for request in solution.requests),
        merge([solution.patch for solution in solutions]),
        tuple(report for solution in solutions for report in solution.diagnostics),
    )


@dataclass(eq=False)
class Edit:
    """One correction, or several made together: what was asked, what it adds to the model, and how it was found.

    Attributes:
        method: Registered name of the method.
        requests: What was asked.
        patch: Updates by parameter name, (d_out, d_in), and adapters by module name.
        diagnostics: One report a request: losses, norms, steps, seconds and what else the method has to say.
        config: The method's configuration, plain values.
        state: Tensors that the method finds in the ledger as long as the edit is applied.
        id: Digest of method, requests and patch; names the edit in the ledger.
    """

    method: str
    requests: tuple[EditRequest, ...]
    patch: Patch
    diagnostics: tuple[dict[str, Any], ...]
    config: dict[str, Any]
    model: nn.Module = field(repr=False)
    state: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    id: str = field(init=False)

    def __post_init__(self) -> None:
        self.id = f"{self.method}-{_digest(self.requests, self.patch)}"

    def __repr__(self) -> str:
        norm = sum(value**2 for value in self.patch.norms().values()) ** 0.5
        facts = ", ".join(f"{r.text!r} -> {r.target!r}" for r in self.requests[:2])
        more = f" and {len(self.requests) - 2} more" if len(self.requests) > 2 else ""
        state = "applied" if self.is_applied else "not applied"
        return f"Edit({self.id}, {facts}{more}, norm {norm:.3g}, {state})"

    @classmethod
    def of(cls, entry: Entry, model: nn.Module) -> Edit:
        """The edit that an entry of a ledger holds.

        Raises:
            LedgerError: what it says of its requests, method, reports or configuration is none of these.
        """
        method, config = entry.meta.get("method", ""), entry.meta.get("config", {})
        reports = entry.meta.get("diagnostics", ())
        if not isinstance(method, str):
            raise LedgerError(f"expected the method of {entry.id} by its name, got {method!r}")
        if not isinstance(config, Mapping):
            raise LedgerError(f"expected the configuration of {entry.id} by its fields, got {config!r}")
        if not isinstance(reports, list | tuple) or not all(isinstance(report, Mapping) for report in reports):
            raise LedgerError(f"expected the diagnostics of {entry.id} as a list of reports, got {reports!r}")
        edit = cls(method, entry.requests, entry.patch, tuple(reports), dict(config), model, entry.state)
        edit.id = entry.id
        return edit

    @property
    def is_applied(self) -> bool:
        """Whether the model carries this edit now."""
        return self.id in Ledger.of(self.model)

    def apply(self) -> Edit:
        """Write the edit to the model, on top of those that it carries.

        Raises:
            LedgerError: it is applied already.
            NumericalError: its numbers are not fit to be written; the model is as before.
        """
        if self.is_applied:
            raise LedgerError(f"the edit {self.id} is applied already; undo() takes it back")
        ratio = float(self.config.get("max_norm_ratio", EditorConfig.max_norm_ratio))
        Ledger.of(self.model).append(self.id, self.patch, self._meta(), state=self.state, max_norm_ratio=ratio)
        return self

    def undo(self) -> None:
        """Take the edit back: the weights are, bit for bit, as if it had never been applied.

        Raises:
            LedgerError: the model does not carry it.
        """
        if not self.is_applied:
            raise LedgerError(f"the edit {self.id} is not applied, so there is nothing to undo")
        Ledger.of(self.model).remove(self.id)

    def applied(self) -> reversible[Edit]:
        """`with edit.applied():` edited inside, as before outside, whatever happens; Ctrl-C included."""
        return reversible(self.apply, lambda edit: edit.undo() if edit.is_applied else None)

    def export_lora(self, folder: str | Path, *, rank: int | None = None) -> LoraExport:
        """Write this edit alone, applied or not, as a LoRA adapter: `PeftModel.from_pretrained(model, folder)` gives
        the edited model. Needs no PEFT. What it holds and what vLLM makes of it: lora_export.py.

        Args:
            folder: A new folder, or an empty one.
            rank: Cut updates of more than this down to it; the errors are in what is returned. None: keep them whole,
                or refuse above 512.

        Raises:
            ExportError: no adapter can hold the edit, or the folder is there already; nothing is written.
        """
        return write_lora(self.model, [self.entry()], folder, rank=rank)

    def export_merged(self, folder: str | Path, tokenizer: Tokenizer | None = None) -> Path:
        """Write the model with this edit alone, applied or not, as `save_pretrained` does; the tokenizer too, if given.

        Raises:
            ExportError: the edit is no change of weights, or the folder is there already; nothing is written.
        """
        return write_merged(self.model, [self.entry()], folder, tokenizer)

    def save(
        self, folder: str | Path, *, tokenizer: Tokenizer | None = None, notes: Mapping[str, Any] | None = None
    ) -> Path:
        """Write this edit alone, applied or not, into a folder, which `errata.load_edit` puts on the same model.

        Args:
            folder: A new folder, or an empty one.
            tokenizer: If given, loading can tell whether it is another.
            notes: What else to write down of it, such as scores. Values that JSON holds.

        Raises:
            ExportError: the folder is there already; nothing is written.
        """
        from errata.editors.core.storage.edit_folder import Edits

        entry, ledger = self.entry(), Ledger.of(self.model)
        return Edits.of(ledger, [entry], tokenizer=tokenizer, notes={self.id: notes or {}}).write(folder)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, revision: str | None = None) -> str:
        """Make a repository of the Hub hold this edit alone. Arguments and errors as of `hub.push`."""
        from errata.editors.core.storage.edit_folder import Edits

        edits = Edits.of(Ledger.of(self.model), [self.entry()])
        return edits.push_to_hub(repo_id, private=private, revision=revision)

    def entry(self) -> Entry:
        """The edit as a ledger of its model takes it: checked, and copied."""
        return make_entry(self.model, self.id, self.patch, self._meta(), 0, self.state)

    def _meta(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "requests": [vars(request) for request in self.requests],
            "config": self.config,
            "diagnostics": list(self.diagnostics),
        }


class Editor(ABC):
    """Base class of the methods.

    Args:
        model: A decoder of transformers, in any state of training; only edited weights are ever written.
        tokenizer: Its fast tokenizer.
        config: The method's Config, as `ROME.Config(layers=(3,))`, a mapping of its fields, or None: the papers'
            values, with what the model folder's errata.json says of this method laid over them.
        progress: Called as `progress(done, total, what)` while long work goes on.

    Raises:
        ArchitectureError: not a model that can be edited.
        ConfigError: a configuration that does not fit the method or the model.
    """

    name: ClassVar[str]
    Config: ClassVar[type[EditorConfig]]
    # Whether a `solve_batch` of the method's own gives what the one here does.
    one_by_one: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        config: EditorConfig | Mapping[str, Any] | None = None,
        *,
        progress: Progress = silent,
    ) -> None:
        check_tokenizer(tokenizer)
        self.model, self.tokenizer, self.progress = model, tokenizer, progress
        self.architecture = describe(model)
        _check_loaded(model)
        self.ledger = Ledger.of(model)
        if config is None:
            config = read_model_settings(model).editors.get(self.name, {})
        if isinstance(config, Mapping):
            config = self.Config.from_dict(config)
        if not isinstance(config, self.Config):
            own = f"{type(self).__name__}.Config(...)"
            raise ConfigError(f"expected {own} or a mapping of its fields, got {type(config).__name__}")
        self.config = config

    @abstractmethod
    def solve(self, requests: Sequence[EditRequest]) -> list[Solution]:
        """Solve each request by itself, on the model as it stands: one Solution a request, in order.

        Called with the model in evaluation mode, no parameter asking for gradients, and Ctrl-C deferred to safe points.
        """

    def solve_batch(self, requests: Sequence[EditRequest]) -> Solution:
        """Solve all requests as one edit. Here: one after another, each on the model as edited so far, which is what
        methods that write one fact at a time do; a method that writes many at once says how.

        Raises:
            LedgerError: there are several, and a solution has a state; the model is as before.
        """
        solutions: list[Solution] = []
        with self.ledger.transaction():
            for i, request in enumerate(requests):
                (solution,) = self.solve([request])
                self._complete([solution])
                solutions.append(solution)
                if len(requests) > 1:
                    _check_stateless(solution)
                if i < len(requests) - 1:
                    self.ledger.append(_temporary(i), solution.patch, max_norm_ratio=self.config.max_norm_ratio)
            self.ledger.remove_many(_temporary(i) for i in range(len(requests) - 1))
        return combine(solutions)

    def compute(self, requests: EditRequest | Sequence[EditRequest]) -> list[Edit]:
        """Independent edits, one a request, computed as one batch on the model as it stands. Nothing is written.

        Raises:
            RequestError: a request cannot be carried out, or two contradict each other; names it.
            NumericalError: a request has no finite solution; names it.
            StatisticsError: second moments are needed and cannot be had.
        """
        batch = check_batch(requests)
        with self._at_work():
            return [self._edit(solution) for solution in self._complete(self.solve(batch))]

    def apply(self, requests: EditRequest | Sequence[EditRequest]) -> Edit:
        """Make one edit of the requests and write it to the model, which stays edited until the edit is undone.

        Raises:
            As `compute`; the model is then as before.
        """
        batch = check_batch(requests)
        with self._at_work():
            return self._edit(*self._complete([self.solve_batch(batch)])).apply()

    def applied(self, requests: EditRequest | Sequence[EditRequest]) -> reversible[Edit]:
        """`with editor.applied(requests) as edit:` edited inside, as before outside, whatever happens."""
        return reversible(lambda: self.apply(requests), lambda edit: edit.undo() if edit.is_applied else None)

    def rollback(self) -> None:
        """Undo every edit on the model, whoever made it: the base bytes are back."""
        self.ledger.clear()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        with deferred_interrupts(), evaluating(self.model), frozen(self.model), torch.inference_mode(False):
            try:
                yield
            except torch.OutOfMemoryError as error:
                raise OutOfMemoryError(f"{self.name} ran out of memory; give fewer requests at a time") from error

    def _complete(self, solutions: Sequence[Solution]) -> Sequence[Solution]:
        """Give the reports what every method's have: the request, the precision, and how large the patch is: the
        Frobenius norm of all updates together, and the largest one's over its weight's as it stands (None where that
        is zero). What a method has said itself stays."""
        norm_of = functools.cache(lambda name: arithmetic.norm(find_weight(self.model, name).parameter))
        for solution in solutions:
            shared: dict[str, Any] = {"precision": str(self.architecture.dtype).removeprefix("torch.")}
            if norms := {name: update.norm() for name, update in solution.patch.updates.items()}:
                ratio = max(norm / norm_of(name) if norm_of(name) else math.inf for name, norm in norms.items())
                shared["update_norm"] = math.hypot(*norms.values())
                shared["update_ratio"] = ratio if ratio < math.inf else None
            for request, report in zip(solution.requests, solution.diagnostics, strict=True):
                report |= {"request": request.id, **shared, **report}
        return solutions

    def _edit(self, solution: Solution) -> Edit:
        return Edit(
            self.name,
            solution.requests,
            solution.patch,
            solution.diagnostics,
            self.config.to_dict(),
            self.model,
            solution.state,
        )


def _check_loaded(model: nn.Module) -> None:
    absent = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if absent is not None:
        raise ArchitectureError(
            f"{absent} is on the meta device and has no bytes: the model is offloaded, or was never loaded; load it "
            "whole (no offloading in its device_map)"
        )


def _check_stateless(solution: Solution) -> None:
    if solution.state:
        raise LedgerError(
            f"request {solution.requests[0].id} has a state ({', '.join(solution.state)}), and what several states are "
            "together is for the method to say: apply the requests one by one, or write the method's solve_batch"
        )


def _temporary(place: int) -> str:
    return f"(being computed: {place})"


def _digest(requests: Sequence[EditRequest], patch: Patch) -> str:
    total = hashlib.sha256(json.dumps([vars(request) for request in requests]).encode("utf-8", "surrogatepass"))
    for name, adapter in patch.adapters.items():
        total.update(json.dumps([name, adapter.kind, dict(adapter.numbers)]).encode())
    for name, tensor in patch.tensors:
        total.update(name.encode())
        add_bytes(total, tensor)
    return total.hexdigest()[:16]
