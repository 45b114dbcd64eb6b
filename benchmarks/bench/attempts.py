"""What a method reports of an edit that it makes or refuses, as records hold it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from errata.benchmarks.runs.json_values import encodable
from errata.editors.core import ranks
from errata.editors.core.edit import Edit
from errata.editors.core.errors import DisablingEditWarning, LedgerError, NumericalError, RanksDifferError, RequestError

# What one edit may end with: it is then recorded as refused, and the run goes on.
REFUSALS = (NumericalError, RequestError, LedgerError)


def check_ranks(outcome: Sequence[Edit] | Exception) -> None:
    """Compare what all ranks have made of the same cases: the bits of the edits, or the kind of the refusal.

    Raises:
        RanksDifferError: They differ, and so would all that the ranks do next.
    """
    made = type(outcome).__name__ if isinstance(outcome, Exception) else [edit.id for edit in outcome]
    first, *others = ranks.gather(made)
    if different := [str(number) for number, other in enumerate(others, 1) if other != first]:
        raise RanksDifferError(
            f"the processes of this run have made different edits: {', '.join(different)} not those of 0; give all of "
            "them the same hardware, versions and number of threads, or use one process"
        )


def passed_on(caught: Sequence[warnings.WarningMessage]) -> list[str]:
    """Return the messages of warnings that belong into records, and raise the other warnings again."""
    for warning in caught:
        if not issubclass(warning.category, DisablingEditWarning):
            warnings.warn(warning.message, warning.category, stacklevel=3)  # itself: it says its kind
    return [str(warning.message) for warning in caught if issubclass(warning.category, DisablingEditWarning)]


def plain_diagnostics(diagnostics: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """What the method reports of a request, seconds apart; of what JSON cannot hold, how Python writes it."""
    report = dict(diagnostics)
    seconds = {f"method_{name}": report.pop(name) for name in list(report) if "seconds" in name}
    return {name: _plain_value(value) for name, value in report.items()}, seconds


def case_diagnostics(reports: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, float]]:
    """What the method reports of a case: of several requests that of the first, and all of them as `each`."""
    first, *_ = plain = [plain_diagnostics(report) for report in reports]
    if len(plain) == 1:
        return first
    seconds = {name: sum(own.get(name, 0.0) for _, own in plain) for name in first[1]}
    return {**first[0], "each": [report for report, _ in plain]}, seconds


def _plain_value(value: Any) -> Any:
    try:
        return encodable(value)
    except TypeError:
        return repr(value)


def reason_of(error: Exception) -> str:
    """Why an edit was refused, in a record."""
    return f"{type(error).__name__}: {error}"
