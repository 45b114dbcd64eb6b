"""errata: correct single facts in a language model, undo any correction exactly, and measure what it cost.

    import errata
    from errata.editors import ROME

    model, tokenizer = errata.load("world")
    request = errata.EditRequest("The capital of {} is", subject="Gavaria", target="Praminster")
    edit = ROME(model, tokenizer).apply(request)
    edit.undo()

The names below are the public ones. They are imported on first use (PEP 562), so that `import errata` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from errata.benchmarks.harness.store import load_results as load_results
    from errata.benchmarks.models import load as load
    from errata.editors.core.editor import Edit as Edit
    from errata.editors.core.editor import Editor as Editor
    from errata.editors.core.edits import Edits as Edits
    from errata.editors.core.edits import load_edit as load_edit
    from errata.editors.core.edits import load_ledger as load_ledger
    from errata.editors.core.errors import ConfigError as ConfigError
    from errata.editors.core.errors import ErrataError as ErrataError
    from errata.editors.core.errors import NumericalError as NumericalError
    from errata.editors.core.errors import RequestError as RequestError
    from errata.editors.core.ledger import Ledger as Ledger
    from errata.editors.core.request import EditRequest as EditRequest
    from errata.evaluate.probes import Case as Case
    from errata.evaluate.probes import Probe as Probe

    __version__: str

_HOME = (
    ("load", "errata.benchmarks.models"),
    ("load_results", "errata.benchmarks.harness.store"),
    ("EditRequest", "errata.editors.core.request"),
    ("Editor", "errata.editors.core.editor"),
    ("Edit", "errata.editors.core.editor"),
    ("Edits", "errata.editors.core.edits"),
    ("load_edit", "errata.editors.core.edits"),
    ("load_ledger", "errata.editors.core.edits"),
    ("Ledger", "errata.editors.core.ledger"),
    ("Case", "errata.evaluate.probes"),
    ("Probe", "errata.evaluate.probes"),
    ("ErrataError", "errata.editors.core.errors"),
    ("RequestError", "errata.editors.core.errors"),
    ("ConfigError", "errata.editors.core.errors"),
    ("NumericalError", "errata.editors.core.errors"),
)

__all__ = (
    "Case",
    "ConfigError",
    "Edit",
    "EditRequest",
    "Editor",
    "Edits",
    "ErrataError",
    "Ledger",
    "NumericalError",
    "Probe",
    "RequestError",
    "__version__",
    "load",
    "load_edit",
    "load_ledger",
    "load_results",
)


def __getattr__(name: str) -> object:
    if name == "__version__":
        return import_module("importlib.metadata").version("errata")
    for public, module in _HOME:
        if name == public:
            return getattr(import_module(module), name)
    known = ", ".join(__all__)
    raise AttributeError(f"module 'errata' has no attribute {name!r}; its public names are {known}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
