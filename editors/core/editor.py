"""The interface of every method: requests in, an edit out; the edit can be applied, undone and applied again.

    editor = ROME(model, tokenizer)
    edit = editor.apply(request)             # the model is edited when this returns, and stays so
    edit.undo()                              # bit for bit as before, in any order with other edits
    with editor.applied(requests) as edit:   # edited inside, as before outside, whatever happens
        ...
    edits = editor.compute(requests)         # one independent edit per request; the model is not touched

A method subclasses `Editor`, names itself and its Config, and writes `solve`. It never writes to the model: the ledger
installs what it returns, in a transaction.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from errata.editors.core.algebra.mask_rules import MaskRule
from errata.editors.core.algebra.masking import masked_patch, weights_below
from errata.editors.core.algebra.rule_texts import rule_of_text
from errata.editors.core.config import EditorConfig, norm_limit
from errata.editors.core.config_docs import with_arguments
from errata.editors.core.doubts import warn_of_doubts
from errata.editors.core.edit import Edit, Solution, check_stateless, combine
from errata.editors.core.errors import AlgebraError, ArchitectureError, ConfigError, LedgerError, OutOfMemoryError
from errata.editors.core.ledger import arithmetic
from errata.editors.core.ledger.entry import EditInfo, find_weight
from errata.editors.core.ledger.interrupts import deferred_interrupts, reversible
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import Patch, merge
from errata.editors.core.model.activations import without_autocast
from errata.editors.core.model.architecture import describe
from errata.editors.core.model.compiled import uncompiled, without_compiled_forwards
from errata.editors.core.model.model_settings import read_model_settings
from errata.editors.core.model.own_forward import evaluating, frozen
from errata.editors.core.model.tokens import Tokenizer, check_tokenizer
from errata.editors.core.progress import Progress, silent
from errata.editors.core.request import EditRequest, check_batch
from errata.editors.core.work_clock import WorkClock


class Editor(ABC):
    """Base class of the methods. A method has a `name`, a `Config` and `solve`, and prepares itself in `setup`.

    Only a method that takes more arguments writes an `__init__`: it keeps them and calls the one here. The class
    docstring of a method documents its own arguments; those of its bases are added to it.

    Args:
        model: A decoder of transformers, in training or evaluation mode. Only edited weights are ever written.
        tokenizer: Its fast tokenizer.
        config: A mapping of the method's fields. A field that it leaves out has the value that errata.json in the
            model's folder gives it, else the papers' value; None: all of them. A `Config(...)` is used as it is, and
            errata.json is ignored.
        progress: Called as `progress(done, total, what)` during long work.

    Raises:
        ArchitectureError: the model cannot be edited.
        ConfigError: the configuration does not fit the method or the model.
    """

    name: ClassVar[str]
    Config: ClassVar[type[EditorConfig]]
    # Whether the method's own `solve_batch` gives the same result as the one here.
    one_by_one: ClassVar[bool] = False
    # Whether the method looks at the subject of a request; then a request without one is refused.
    needs_subject: ClassVar[bool] = False
    # Whether an edit changes weights. If not, there is nothing that `sparsify` could leave out.
    writes_weights: ClassVar[bool] = True
    # What to do about a sign of core/doubts.py, where the method knows better than its ADVICE.
    advice: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        config: EditorConfig | Mapping[str, Any] | None = None,
        *,
        progress: Progress = silent,
    ) -> None:
        check_tokenizer(tokenizer)
        model = uncompiled(model)
        self.model, self.tokenizer, self.progress = model, tokenizer, progress
        self.clock = WorkClock()
        self.architecture = describe(model)
        _check_loaded(model)
        self.ledger = Ledger.of(model)
        if config is None or isinstance(config, Mapping):
            config = self.Config.from_dict({**read_model_settings(model).editors.get(self.name, {}), **(config or {})})
        if not isinstance(config, self.Config):
            own = f"{type(self).__name__}.Config(...)"
            raise ConfigError(f"expected {own} or a mapping of its fields, got {type(config).__name__}")
        self.config = config
        self._rule = self.mask_rule(config)
        self.filled_in: dict[str, Any] = {}  # fields of `config` that `setup` has filled in for the model
        self.setup()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.__doc__ = with_arguments(cls)

    def setup(self) -> None:  # noqa: B027 - most methods have something to prepare, but not all
        """Prepare what the method needs: called at the end of construction, with model, ledger and config in place.

        Raises:
            ConfigError: the configuration does not fit the model.
        """

    @classmethod
    def mask_rule(cls, config: EditorConfig) -> MaskRule | None:
        """Return the rule by which a configuration leaves out elements of updates; None where it has none.

        Raises:
            ConfigError: There is no such rule, or the method writes no weights.
        """
        text = config.sparse_rule
        if text is None:
            return None
        if not cls.writes_weights:
            raise ConfigError(f"sparsify: expected null, because {cls.name} writes no weights; got {text!r}")
        try:
            return rule_of_text(text)
        except AlgebraError as error:
            raise ConfigError(f"sparsify: {error}") from None

    @abstractmethod
    def solve(self, requests: Sequence[EditRequest]) -> list[Solution]:
        """Solve each request by itself, on the model as it stands: one Solution per request, in order.

        Called with the model in evaluation mode, no parameter asking for gradients, and Ctrl-C deferred to safe points.
        """

    def patch_bytes(self) -> int | None:
        """Return the bytes of every patch, if they are known before it is made, as where updates are whole matrices."""
        return None

    def solve_batch(self, requests: Sequence[EditRequest]) -> Solution:
        """Solve all requests as one edit. Here: one after another, each on the model as edited so far, which is what
        methods that write one fact at a time do; a method that writes many at once says how.

        Raises:
            LedgerError: there are several, and a solution has a state; the model is as before.
        """
        return self._in_turn([[request] for request in requests], lambda batch: self.solve(batch)[0])

    def _in_turn(
        self,
        batches: Sequence[Sequence[EditRequest]],
        solve: Callable[[Sequence[EditRequest]], Solution],
        between: Callable[[], object] = lambda: None,
    ) -> Solution:
        """Solve batches one after another, each on the model as edited so far, as one solution. The model is as before.

        `between` is called behind every batch but the last, while the model carries the batches so far.

        Raises:
            LedgerError: there are several, and a solution has a state; the model is as before.
        """
        solutions: list[Solution] = []
        temporary: list[str] = []
        with self.ledger.transaction():
            for i, batch in enumerate(batches):
                solution = solve(batch)
                (solution,) = self._complete([solution])
                solutions.append(solution)
                if len(batches) > 1:
                    self.joined_state(solutions)  # refuses before more is computed
                if i < len(batches) - 1:
                    temporary.append(self._append_temporarily(solution))
                    between()
            self.ledger.remove_many(temporary)
        state = self.joined_state(solutions) if len(solutions) > 1 else solutions[0].state
        return replace(combine([replace(solution, state={}) for solution in solutions]), state=state)

    def _append_temporarily(self, solution: Solution) -> str:
        name = f"(being computed: {len(self.ledger.entries)})"
        info = EditInfo(self.name, solution.requests, self.config.to_dict(), solution.diagnostics)
        limit = norm_limit(self.name, self.config.to_dict())
        self.ledger.append(name, solution.patch, info, state=solution.state, max_norm_ratio=limit)
        return name

    def joined_state(self, solutions: Sequence[Solution]) -> Mapping[str, Tensor]:
        """Return the state of an edit that makes these solutions one after another. Here: none has a state.

        Raises:
            LedgerError: one has; a method whose states can be joined says how.
        """
        for solution in solutions:
            check_stateless(solution)
        return {}

    def compute(self, requests: EditRequest | Sequence[EditRequest]) -> list[Edit]:
        """Compute independent edits, one per request, in one batch on the model as it stands. Nothing is written.

        Raises:
            RequestError: a request cannot be carried out, or two contradict each other; names it.
            NumericalError: a request has no finite solution; names it.
            StatisticsError: second moments are needed and cannot be had.
        """
        batch = self._fit_batch(requests)
        with self._at_work():
            return [self._edit(solution) for solution in self._complete(self.solve(batch))]

    def compute_together(
        self, rounds: Sequence[Sequence[EditRequest]], between: Callable[[], object] = lambda: None
    ) -> Edit:
        """Compute one edit of all requests, on the model as it stands. Nothing is written.

        Args:
            rounds: The requests of a round are solved together, on the model as the rounds before have edited it. A
                later round may change what an earlier one has taught.
            between: Called behind every round but the last, while the model carries the rounds so far.

        Raises:
            LedgerError: there are several rounds, and the method has a state that cannot be combined.
            RequestError, NumericalError, StatisticsError: as `compute`.
        """
        batches = [self._fit_batch(requests) for requests in rounds]
        with self._at_work():
            return self._edit(*self._complete([self._in_turn(batches, self.solve_batch, between)]))

    def apply(self, requests: EditRequest | Sequence[EditRequest]) -> Edit:
        """Make one edit of the requests and write it to the model, which stays edited until the edit is undone.

        It raises what `compute` raises, and the model is then as before.

        Raises:
            LedgerError: the method has a closing step, and one is on the model.
        """
        self._check_not_closed()
        batch = self._fit_batch(requests)
        with self._at_work():
            return self._edit(*self._complete([self.solve_batch(batch)])).apply()

    @property
    def forgets(self) -> bool:
        """Whether its edits are to make the model stop giving the true answer, and not give the new one."""
        return False

    @property
    def closes(self) -> bool:
        """Whether the method may add something once a sequence of edits is done."""
        return False

    def closing(self, patches: Sequence[Patch]) -> Patch | None:  # noqa: ARG002
        """Return what the method adds once a sequence of edits is done; None, as here, where it adds nothing.

        Args:
            patches: What the edits of the sequence add, in order.
        """
        return None

    def closed(self, edit: Edit) -> Edit:
        """Return an edit with the method's closing step: what it is as a sequence of one."""
        last = self.closing([edit.patch])
        return edit if last is None else replace(edit, patch=merge([edit.patch, last]))

    def finish(self) -> Edit | None:
        """Make the method's closing step over all edits on the model, as an edit of its own; None where it has none.

        Undo it before the next edit, which the method finds on the model without it.

        Raises:
            LedgerError: a closing step is on the model already.
        """
        self._check_not_closed()
        last = self.closing([entry.patch for entry in self.ledger.entries if not entry.info.is_intervention])
        if last is None:
            return None
        return Edit(self.name, (), last, (), self.config.to_dict(), self.model).apply()

    def _check_not_closed(self) -> None:
        if not self.closes:
            return
        for entry in self.ledger.entries:
            if entry.info.is_closing_step:
                raise LedgerError(
                    f"the model carries {entry.id}, the closing step over the edits before it; undo it first, by "
                    f"undo() of what finish() returned or editor.ledger.remove({entry.id!r}), and make it again last"
                )

    def finished(self) -> reversible[Edit | None]:
        """`with editor.finished():` the method's closing step is made inside, and undone outside."""
        return reversible(self.finish, lambda edit: edit.undo() if edit is not None and edit.is_applied else None)

    def applied(self, requests: EditRequest | Sequence[EditRequest]) -> reversible[Edit]:
        """`with editor.applied(requests) as edit:` edited inside, as before outside, whatever happens."""
        return reversible(lambda: self.apply(requests), lambda edit: edit.undo() if edit.is_applied else None)

    def rollback(self) -> None:
        """Undo every edit on the model, also those of other editors: the base bytes are back."""
        self.ledger.clear()

    def _fit_batch(self, requests: EditRequest | Sequence[EditRequest]) -> list[EditRequest]:
        """Return the requests as a list, once they agree with each other and have what the method needs."""
        batch = check_batch(requests)
        if self.needs_subject:
            for request in batch:
                _ = request.given_subject  # raises where there is none
        return batch

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        with (
            deferred_interrupts(),
            evaluating(self.model),
            frozen(self.model),
            torch.inference_mode(False),
            without_autocast(),
            without_compiled_forwards(),
        ):
            self.clock.start()
            try:
                yield
            except torch.OutOfMemoryError as error:
                raise OutOfMemoryError(f"{self.name} ran out of memory; give fewer requests at a time") from error

    def _complete(self, solutions: Sequence[Solution]) -> Sequence[Solution]:
        """Give the reports what every method's have: the request, the precision, and how large the patch is: the
        Frobenius norm of all updates together, and the largest one's over its weight's as it stands (None where that
        is zero). What a method has said itself stays. Seconds are per request: of CPU time without costs that come
        once for a model, and of these by their names."""
        solutions = [self._sparsified(solution) for solution in solutions]
        lap, count = self.clock.lap(), sum(len(solution.requests) for solution in solutions)
        spent = {"cpu_seconds": lap.cpu_seconds, **{f"{name}_seconds": value for name, value in lap.one_off.items()}}
        norm_of = functools.cache(lambda name: arithmetic.norm(find_weight(self.model, name).parameter))
        for solution in solutions:
            shared: dict[str, Any] = {"precision": str(self.architecture.dtype).removeprefix("torch.")}
            if norms := {name: update.norm() for name, update in solution.patch.updates.items()}:
                ratio = max(norm / norm_of(name) if norm_of(name) else math.inf for name, norm in norms.items())
                shared["update_norm"] = math.hypot(*norms.values())
                shared["update_ratio"] = ratio if ratio < math.inf else None
            shared |= {name: seconds / count for name, seconds in spent.items()}
            if self.filled_in:
                shared["filled_in"] = self.filled_in
            for request, report in zip(solution.requests, solution.diagnostics, strict=True):
                report |= {"request": request.id, **shared, **report}
        warn_of_doubts([report for solution in solutions for report in solution.diagnostics], self.advice)
        return solutions

    def _sparsified(self, solution: Solution) -> Solution:
        """Return a solution with what the rule of the configuration leaves of its patch, once."""
        if self._rule is None or solution.is_sparse:
            return solution
        names = solution.patch.updates if self._rule.needs_weight else ()
        patch = masked_patch(solution.patch, self._rule, weights_below(self.ledger, names))
        return replace(solution, patch=patch, is_sparse=True)

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
