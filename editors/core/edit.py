"""What a method makes: a Solution, and the Edit that it becomes, which can be applied, undone, saved and exported.

edit = editor.apply(request)     # the model is edited when this returns
edit.undo()                      # bit for bit as before, in any order with other edits
edit.save("darrieux")            # errata.load_edit("darrieux", model) applies it again
edit.export_lora("adapter")      # PeftModel.from_pretrained(model, "adapter") gives the edited model
half = 0.5 * edit                # an edit, too; so are -edit and edit + other (core/algebra)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from errata.editors.core.algebra.derivation import (
    added_entries,
    ancestors,
    described,
    masked_entry,
    merged_entries,
    scaled_entry,
)
from errata.editors.core.algebra.mask_rules import MaskRule
from errata.editors.core.algebra.masking import weights_below
from errata.editors.core.algebra.merge_rules import MergeRule
from errata.editors.core.algebra.rule_texts import merge_rule_of, rule_of
from errata.editors.core.config import norm_limit
from errata.editors.core.errors import AlgebraError, LedgerError
from errata.editors.core.ledger.entry import EditInfo, Entry, edit_id, make_entry
from errata.editors.core.ledger.interrupts import reversible
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import Patch, merge
from errata.editors.core.model.tokens import Tokenizer
from errata.editors.core.request import EditRequest
from errata.editors.core.storage.edit_folder import Edits
from errata.editors.core.storage.lora_export import LoraExport, write_lora
from errata.editors.core.storage.merged_export import write_merged


@dataclass(frozen=True)
class Solution:
    """What a method found for one request, or for several together.

    Attributes:
        requests: What it answers.
        patch: What it adds to the model.
        diagnostics: One report per request, of values that JSON can hold.
        state: Tensors that the method finds in the ledger while the edit is applied.
        is_sparse: Whether the rule of `sparsify` has been applied to the patch.
    """

    requests: tuple[EditRequest, ...]
    patch: Patch
    diagnostics: tuple[dict[str, Any], ...]
    state: Mapping[str, Tensor] = field(default_factory=dict)
    is_sparse: bool = False


def combine(solutions: Sequence[Solution]) -> Solution:
    """Return one solution that adds what all of these add, one after another.

    Raises:
        LedgerError: one of several has a state; only the method knows how to combine states.
    """
    if len(solutions) == 1:
        return solutions[0]
    for solution in solutions:
        check_stateless(solution)
    return Solution(
        tuple(request for solution in solutions for request in solution.requests),
        merge([solution.patch for solution in solutions]),
        tuple(report for solution in solutions for report in solution.diagnostics),
        is_sparse=all(solution.is_sparse for solution in solutions),
    )


def check_stateless(solution: Solution) -> None:
    """Refuse a solution with a state, which cannot be combined with others.

    Raises:
        LedgerError: it has one; names the request.
    """
    if solution.state:
        raise LedgerError(
            f"request {solution.requests[0].id} has a state ({', '.join(solution.state)}), and what several states are "
            "together is for the method to say: apply the requests one by one, or write the method's solve_batch"
        )


@dataclass(eq=False)
class Edit:
    """One correction, or several made together: what was asked, what it adds to the model, and how it was found.

    Edits can be calculated with: `0.5 * edit`, `edit / 2`, `-edit`, `a + b`, `a - b` and `sum(edits)` are edits, which
    are not applied. Edits of adapters (GRACE, contexts) can be added, but not scaled: AlgebraError.

    Attributes:
        method: Registered name of the method.
        requests: What was asked.
        patch: Updates by parameter name, (d_out, d_in), and adapters by module name.
        diagnostics: One report per request: losses, norms, steps, seconds and whatever else the method reports.
        config: The method's configuration, plain values.
        state: Tensors that the method finds in the ledger while the edit is applied.
        derived: How it was calculated from other edits (algebra/derivation.py); empty where the method has found it.
        id: Digest of method, requests and patch; names the edit in the ledger.
    """

    # NumPy's numbers leave `number * edit` to the edit.
    __array_ufunc__: ClassVar[None] = None

    method: str
    requests: tuple[EditRequest, ...]
    patch: Patch
    diagnostics: tuple[dict[str, Any], ...]
    config: dict[str, Any]
    model: nn.Module = field(repr=False)
    state: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    derived: Mapping[str, Any] = field(default_factory=dict, repr=False)
    id: str = field(init=False)

    def __post_init__(self) -> None:
        self.id = edit_id(self.method or ("derived" if self.derived else ""), self.requests, self.patch)

    def __repr__(self) -> str:
        norm = sum(value**2 for value in self.patch.norms().values()) ** 0.5
        facts = ", ".join(f"{r.text!r} -> {r.target!r}" for r in self.requests[:2])
        more = f" and {len(self.requests) - 2} more" if len(self.requests) > 2 else ""
        state = "applied" if self.is_applied else "not applied"
        formula = f"{described(self.derived)}, " if self.derived else ""
        return f"Edit({self.id}, {formula}{facts}{more}, norm {norm:.3g}, {state})"

    @classmethod
    def of(cls, entry: Entry, model: nn.Module) -> Edit:
        """Return the edit that an entry of a ledger holds."""
        info = entry.info
        config, derived = dict(info.config), dict(info.derived)
        edit = cls(info.method, info.requests, entry.patch, info.diagnostics, config, model, entry.state, derived)
        edit.id = entry.id
        return edit

    # --- calculating ------------------------------------------------------------------------------------------------

    def __mul__(self, factor: object) -> Edit:
        if not isinstance(factor, Real):
            return NotImplemented
        return self._calculated(scaled_entry(self._as_found(), float(factor)))

    def __truediv__(self, divisor: object) -> Edit:
        if not isinstance(divisor, Real):
            return NotImplemented
        if divisor == 0:
            raise AlgebraError(f"the edit {self.id} cannot be divided by 0")
        return self * (1 / float(divisor))

    def __neg__(self) -> Edit:
        return self * -1

    def __add__(self, other: object) -> Edit:
        if not isinstance(other, Edit):
            # `sum(edits)` begins with 0. An array is compared with 0 element by element, and so is not compared.
            return self if isinstance(other, Real) and other == 0 else NotImplemented
        if other.model is not self.model:
            raise AlgebraError(f"{self.id} and {other.id} are edits of two models; load both edits onto one of them")
        return self._calculated(added_entries([self._as_found(), other._as_found()]))

    def __sub__(self, other: object) -> Edit:
        return self + -other if isinstance(other, Edit) else NotImplemented

    __rmul__, __radd__ = __mul__, __add__

    def masked(self, rule: str | MaskRule, **numbers: Any) -> Edit:
        """Return the edit with a part of its elements set to 0: `edit.masked("ignore_top", share=0.08)`.

        Args:
            rule: Name of a rule (algebra/mask_rules.py lists them), or a rule.
            numbers: The rule's parameters.

        Returns:
            An edit that is not applied. A rule that compares with the weight sees it without this edit, the edits that
            it was calculated from and those after them; as it stands where the model carries none of these.

        Raises:
            AlgebraError: There is no such rule or parameter, or the edit has adapters.
        """
        made = rule_of(rule, **numbers) if isinstance(rule, str) else rule
        ids = {self.id} | ancestors(self.derived)
        below = weights_below(Ledger.of(self.model), self.patch.updates, ids) if made.needs_weight else {}
        return self._calculated(masked_entry(self._as_found(), made, below))

    def _as_found(self) -> Entry:
        """Return the edit as an entry without copies: what functions of the algebra take."""
        return Entry(self.id, self.patch, self.info, 0, self.state)

    def _calculated(self, entry: Entry) -> Edit:
        return self if entry.patch is self.patch else Edit.of(entry, self.model)

    # --- onto the model ---------------------------------------------------------------------------------------------

    @property
    def info(self) -> EditInfo:
        """What the edit answers and how it was found, as the ledger keeps it."""
        return EditInfo(self.method, self.requests, self.config, self.diagnostics, self.derived)

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
            raise LedgerError(f"the edit {self.id} is applied already; undo() restores the weights")
        ratio = norm_limit(self.method, self.config)
        Ledger.of(self.model).append(self.id, self.patch, self.info, state=self.state, max_norm_ratio=ratio)
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
        entry, ledger = self.entry(), Ledger.of(self.model)
        return Edits.of(ledger, [entry], tokenizer=tokenizer, notes={self.id: notes or {}}).write(folder)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, revision: str | None = None) -> str:
        """Make a repository of the Hub hold this edit alone. Arguments and errors as of `hub.push`."""
        edits = Edits.of(Ledger.of(self.model), [self.entry()])
        return edits.push_to_hub(repo_id, private=private, revision=revision)

    def entry(self) -> Entry:
        """Return a copy of the edit as an entry of its model's ledger, checked against the model."""
        return make_entry(self.model, self.id, self.patch, self.info, 0, self.state)


def merge_edits(
    edits: Sequence[Edit], rule: str | MergeRule = "ties", *, weights: Sequence[float] | None = None, **numbers: Any
) -> Edit:
    """Merge several edits of one model into one, by a rule for where they contradict each other.

    `sum(edits)` merges without a rule, and keeps factors.

    Args:
        edits: The edits, applied or not.
        rule: Name of a rule (algebra/merge_rules.py has them: ties, mergekit_ties, mergekit_dare_ties, ...), or a rule.
        weights: Of the edits; None: 1 each.
        numbers: The rule's parameters: `errata.merge_edits(edits, "ties", keep=0.2)`.

    Returns:
        An edit that is not applied, with a dense update per weight.

    Raises:
        AlgebraError: There are no edits, or they are of several models or have adapters; there is no such rule or
            parameter.
    """
    made = merge_rule_of(rule, **numbers) if isinstance(rule, str) else rule
    if not edits or any(edit.model is not edits[0].model for edit in edits):
        raise AlgebraError(f"expected edits of one model to merge, got {len(edits)} of several models or none")
    names = {name for edit in edits for name in edit.patch.updates}
    ids = {edit.id for edit in edits}.union(*(ancestors(edit.derived) for edit in edits))
    needs_weight = made.mask is not None and made.mask.needs_weight
    below = weights_below(Ledger.of(edits[0].model), sorted(names), ids) if needs_weight else {}
    return Edit.of(merged_entries([edit._as_found() for edit in edits], made, below, weights), edits[0].model)
