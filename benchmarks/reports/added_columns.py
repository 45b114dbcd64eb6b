"""Columns that other packages add to reports, registered by entry points of `errata.report_columns`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from errata.benchmarks.reports.naming import Results
from errata.editors.core.errors import ConfigError, ErrataError
from errata.editors.core.extensions import ExtensionPoint

Value = float | str | None


@dataclass(frozen=True)
class ReportColumn:
    """One value per run, beside damage and speed in the terminal and on the page, and in the CSV.

    Attributes:
        name: Its column in the CSV; also the name of the entry point.
        title: How tables call it.
        meaning: What it means, in a sentence or two, for the page.
        value: Takes what results.json holds, and returns a number, a text, or None where the run has no such value.
    """

    name: str
    title: str
    meaning: str
    value: Callable[[Results], Value]


# Columns of the CSV that no other package can take.
_OURS = (
    *("group", "label", "editor", "model", "dataset", "protocol", "scoring", "metric", "mean", "low", "high", "n"),
    *(
        "seeds",
        "deviation",
        "not_finite",
        "before",
        "best",
        "tied_with_best",
        "edits",
        "refused",
        "disabling",
        "perplexity_ratio",
    ),
    *("known_facts_kept", "seconds_per_edit", "precision", "device", "perplexity_worst", "settings", "run"),
)
ADDED = ExtensionPoint(
    "errata.report_columns",
    "report column",
    "a ReportColumn",
    lambda loaded: isinstance(loaded, ReportColumn),
    own=_OURS,
    named_by="name",
)


def added_values(run: Results) -> Iterator[tuple[ReportColumn, Value]]:
    """Yield every added column with its value for a run.

    Raises:
        ConfigError: A column cannot be imported, fails, or returns something else than a number, a text or None.
    """
    for column in ADDED.load_others():
        try:
            value = column.value(run)
        except ErrataError:
            raise
        except Exception as error:  # whatever the code of another package raises
            said = f"{ADDED.described(column.name)}, failed on {run.get('folder', 'a run')}"
            raise ConfigError(f"{said}: {type(error).__name__}: {error}") from error
        if value is not None and (isinstance(value, bool) or not isinstance(value, float | int | str)):
            said = f"{ADDED.described(column.name)}, returned {type(value).__name__}"
            raise ConfigError(f"{said}; it must return a number, a text or None")
        yield column, value
