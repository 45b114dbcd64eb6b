"""Taking a part of a dataset: some ids, a shuffled order, a limit, and no two edits of one prompt."""

from __future__ import annotations

import logging
import random
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from errata.benchmarks.datasets.json_records import Dropped, Loaded, read_json
from errata.editors.core.errors import ConfigError, DatasetError
from errata.evaluate.probes import Case

logger = logging.getLogger(__name__)

Ids = Collection[int | str] | str | Path


class OrderedIds(tuple[str, ...]):
    """Case ids whose order the cases take, as those of a published order."""

    __slots__ = ()


@dataclass(frozen=True)
class Selection:
    """Which cases to take.

    Attributes:
        limit: The largest number of cases.
        ids: Only these case ids, or those listed in a JSON file: a list, or an object with a list `known_case_ids`.
            The cases stay in the order of the file, unless the ids are `OrderedIds`.
        seed: Shuffle before the limit is applied; None keeps the order of the file.
    """

    limit: int | None = None
    ids: Ids | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and (isinstance(self.limit, bool) or self.limit < 1):
            raise ConfigError(f"expected limit to be a positive number of cases or null, got {self.limit!r}")


def select(loaded: Loaded, selection: Selection, *, path: str | Path | None = None) -> Loaded:
    """The cases asked for. An id that no case has is named among the dropped.

    Raises:
        DatasetError: no case is left, or the file of ids is not one.
    """
    if loaded.dropped:
        first = loaded.dropped[0]
        logger.warning(
            "%d of %d records dropped, the first is %s, field %r: %s",
            len(loaded.dropped), len(loaded.dropped) + len(loaded.cases), first.record, first.field, first.reason,
        )  # fmt: skip
    if loaded.left_out:
        first = loaded.left_out[0]
        logger.warning(
            "%d questions left out, the first of record %s, field %r: %s",
            len(loaded.left_out), first.record, first.field, first.reason,
        )  # fmt: skip
    if loaded.unread:
        fields = ", ".join(f"{name!r} ({count} records)" for name, count in sorted(loaded.unread.items()))
        logger.warning("nothing reads these fields of the file: %s", fields)
    cases, dropped = list(loaded.cases), list(loaded.dropped)
    if selection.ids is not None:
        wanted = dict.fromkeys(read_ids(selection.ids))
        cases = [case for case in cases if case.id in wanted]
        if isinstance(selection.ids, OrderedIds):
            places = {name: place for place, name in enumerate(wanted)}
            cases.sort(key=lambda case: places[case.id])
        known = {case.id for case in cases} | {entry.record for entry in dropped}
        dropped += [
            Dropped(name, "ids", "asked for by id, but not in the file") for name in wanted if name not in known
        ]
    if not cases:
        example = f"; the first was dropped because of {dropped[0].field!r}: {dropped[0].reason}" if dropped else ""
        raise DatasetError(f"no usable record is left of {len(loaded.cases) + len(loaded.dropped)}{example}", path=path)
    if selection.seed is not None:
        random.Random(selection.seed).shuffle(cases)
    return replace(loaded, cases=cases[: selection.limit], dropped=dropped)


def read_ids(ids: Ids) -> list[str]:
    """Case ids as texts, from a collection or from a JSON file.

    Raises:
        DatasetError: the file holds neither a list nor an object with a list `known_case_ids`.
    """
    if not isinstance(ids, str | Path):
        return [str(name) for name in ids]
    content = read_json(ids)
    names = content.get("known_case_ids") if isinstance(content, dict) else content
    if not isinstance(names, list) or not all(isinstance(name, int | str) for name in names):
        raise DatasetError("expected a list of case ids, or an object with such a list as `known_case_ids`", path=ids)
    return [str(name) for name in names]


def without_conflicts(loaded: Loaded, limit: int | None = None) -> Loaded:
    """Only the first of the cases that edit one and the same prompt, for runs that apply many edits to one model.

    Such edits repeat or contradict each other; the later ones are named among the dropped. Where cases share edits
    (`Loaded.shares_edits`), only those that contradict an earlier case are. At most `limit` cases are kept, and nothing
    is read beyond them.
    """
    first: dict[str, tuple[Case, str]] = {}
    kept: list[Case] = []
    dropped = list(loaded.dropped)
    for case in loaded.cases:
        if limit is not None and len(kept) == limit:
            break
        edits = {request.text: request.target.strip() for request in case.requests}
        earlier = (first[text] for text, target in edits.items() if _clashes(first.get(text), target, loaded))
        if (other := next(earlier, None)) is not None:
            dropped.append(Dropped(case.id, "prompt", f"edits the same prompt as record {other[0].id}"))
            continue
        kept.append(case)
        for text, target in edits.items():
            first.setdefault(text, (case, target))
    return replace(loaded, cases=kept, dropped=dropped)


def _clashes(earlier: tuple[Case, str] | None, target: str, loaded: Loaded) -> bool:
    return earlier is not None and not (loaded.shares_edits and earlier[1] == target)
