"""The errors that errata raises: one small tree, so that `except ErrataError` catches all of ours and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class ErrataError(Exception):
    """Base class of every error that errata raises on purpose."""


class RequestError(ErrataError, ValueError):
    """An edit request cannot be carried out as written.

    `record` names the request (its id, or its place in the batch) and `field` the offending field, where known.
    """

    def __init__(self, message: str, *, record: str | None = None, field: str | None = None) -> None:
        self.message, self.record, self.field = message, record, field
        where = ", ".join(part for part in (record and f"request {record}", field and f"field {field!r}") if part)
        super().__init__(f"{where}: {message}" if where else message)

    def of(self, record: str | None) -> RequestError:
        """Return the same error with the request named: code that finds a fault in a text may not know its request."""
        return RequestError(self.message, record=record, field=self.field)


class DatasetError(ErrataError, ValueError):
    """A dataset file, or one record of it, is not what its format says."""

    def __init__(
        self, message: str, *, path: str | Path | None = None, record: str | None = None, field: str | None = None
    ) -> None:
        self.path, self.record, self.field = path, record, field
        parts = (path and str(path), record and f"record {record}", field and f"field {field!r}")
        where = ", ".join(part for part in parts if part)
        super().__init__(f"{where}: {message}" if where else message)


class ConfigError(ErrataError, ValueError):
    """A configuration value is unknown, of the wrong type or out of range."""


class ArchitectureError(ErrataError):
    """A model's module tree is not one that errata can edit; the message says what was looked for."""


class NumericalError(ErrataError, ArithmeticError):
    """A computation gave NaN, inf or an exploded update; nothing was written to the model.

    `record` names the request, and `row` is its place among those that were solved at once, where known.
    """

    def __init__(self, message: str = "", *, record: str | None = None, row: int | None = None) -> None:
        self.message, self.record, self.row = message, record, row
        super().__init__(f"request {record}: {message}" if record else message)

    def of(self, record: str | None) -> NumericalError:
        """Return the same error with the request named: code that solves for many knows only their index."""
        return NumericalError(self.message, record=record, row=self.row)


class OutOfMemoryError(ErrataError, MemoryError):
    """Memory ran out even for the smallest piece of the work; the model is as before."""


class LedgerError(ErrataError, RuntimeError):
    """The ledger and the model disagree, or an edit was asked for that the ledger does not hold."""


class DamagedEditsError(LedgerError):
    """A folder of edits is there, but it is not what was written.

    `path` names the file, `record` the place of the edit in it and `id` the edit, where known.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | Path | None = None,
        record: int | None = None,
        id: str | None = None,  # noqa: A002
    ) -> None:
        self.path, self.record, self.id = path, record, id
        place = None if record is None else f"record {record}" + (f" ({id})" if id else "")
        where = ", ".join(part for part in (path and str(path), place) if part)
        super().__init__(f"{where}: {message}" if where else message)


class OtherBaseError(LedgerError):
    """Edits are of another model than the one that they were to be put on; `differences` says in what it differs."""

    def __init__(self, message: str, *, differences: Sequence[str] = ()) -> None:
        self.differences = tuple(differences)
        super().__init__(message)


class MergeError(LedgerError):
    """Edits cannot go into one ledger; `conflicts` says which."""

    def __init__(self, message: str, *, conflicts: Sequence[str] = ()) -> None:
        self.conflicts = tuple(conflicts)
        super().__init__(message)


class AlgebraError(ErrataError, ValueError):
    """Edits cannot be calculated with as asked: scaled, added, masked or merged."""


class ExportError(ErrataError, ValueError):
    """An edit cannot be written in the form asked for, or what was written is not what is expected."""


class OtherWriterError(ErrataError, RuntimeError):
    """A file is not as this process left it: another process writes to it, too."""


class RanksDifferError(ErrataError, RuntimeError):
    """Processes that carry out one run together have come to different edits."""


class HubError(ErrataError):
    """The Hugging Face Hub does not have what was asked for, cannot be reached, or refuses to be written."""


class StatisticsError(ErrataError):
    """Second moments cannot be had: no text, a damaged file, a wrong shape or too few tokens."""


class CheckpointError(ErrataError):
    """A trained editor cannot be had: none was trained, the file is damaged, or it was trained for another model."""


class StorageWarning(UserWarning):
    """A disk, file system or cache gives less than was asked of it; the work goes on."""


class DisablingEditWarning(UserWarning):
    """An edit is about to be written whose key says that it will break the model (see editors/rome.py)."""


class DoubtfulEditWarning(UserWarning):
    """An edit was computed that is unlikely to hold, or likely to damage the model (see core/doubts.py).

    Attributes:
        sign: The kind of doubt, by its name in core/doubts.py; empty for none of these.
    """

    def __init__(self, text: str = "", sign: str = "") -> None:
        super().__init__(text)
        self.sign = sign


class SharedKeyWarning(UserWarning):
    """Facts of one batch have the same key, so that they are unlikely to hold (see core/families/mass_editing.py)."""


class FewMasksWarning(UserWarning):
    """Components are ranked by no more random masks than there are components (see core/locating/attribution.py)."""


class ColdStatisticsWarning(UserWarning):
    """An edit is normalised by statistics of its own few tokens alone (see editors/ultraedit.py)."""
