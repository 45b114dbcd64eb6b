"""Whether the files of a run are those of its own cases: a file of another run may have been laid into its folder.

Each line also carries the key of its run (run_folder.py). These checks are for what has no key, as older versions wrote
it, and for what another process wrote at the same time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from errata.benchmarks.bench.baseline import Baseline
from errata.editors.core.errors import OtherWriterError
from errata.evaluate.probes import Case


def own_records(cases: Sequence[Case]) -> Callable[[Mapping[str, Any]], str | None]:
    """Return a function that is given each record in order, and says why one is not of these cases, or None."""
    requests = {case.id: case.asked() for case in cases}
    seen: set[str] = set()

    def fault(record: Mapping[str, Any]) -> str | None:
        case, request = record.get("case"), record.get("request")
        if not isinstance(case, str) or case not in requests:
            return f"is of the case {case!r}, which the run does not have"
        if case in seen:
            return f"is the second one of the case {case!r}"
        first, others = requests[case]["request"], requests[case].get("further", [])
        is_first = isinstance(request, Mapping) and request.items() <= first.items()
        if not is_first or record.get("further", []) != others:
            return f"is not of what the run asks in the case {case!r}"
        seen.add(case)
        return None

    return fault


def check_complete(
    path: Path, records: Sequence[Mapping[str, Any]], cases: Sequence[Case], *, may_end_early: bool
) -> None:
    """Refuse to finish a run whose records are not one per case.

    Args:
        path: The file of the records.
        records: What it holds.
        cases: The cases of the run, in their order.
        may_end_early: Whether the guard may have ended the run, so that records of the last cases may be missing.

    Raises:
        OtherWriterError: it says how many there are.
    """
    found, expected = Counter(record["case"] for record in records), Counter(case.id for case in cases)
    is_beginning = may_end_early and found == Counter(case.id for case in cases[: len(records)])
    if found != expected and not is_beginning:
        raise OtherWriterError(
            f"{path} holds {len(records)} records of {len(found)} cases, expected one for each of {len(cases)}: "
            "another process may have written to it; the same command makes what is missing"
        )


def baseline_fault(cases: Sequence[Case], value: Any) -> str | None:
    """Return why a value is not what the untouched model says to these cases, or None."""
    try:
        observed = Baseline(**value).observed
        missing = next((case for case in cases if len(observed[case.id]) != len(case.probes)), None)
    except (KeyError, TypeError) as error:
        return f"is not what the untouched model says to the cases of this run: {error!r}"
    return None if missing is None else f"does not have an answer to each probe of the case {missing.id!r}"
