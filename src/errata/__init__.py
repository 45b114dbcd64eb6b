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
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from errata.benchmarks.runs.record_table import load_records
    from errata.benchmarks.runs.results import load_results
    from errata.editors.core.difference import difference
    from errata.editors.core.edit import Edit, merge_edits
    from errata.editors.core.editor import Editor
    from errata.editors.core.errors import ConfigError, ErrataError, NumericalError, RequestError
    from errata.editors.core.ledger.ledger import Ledger
    from errata.editors.core.loading import (
        edit_of,
        export_lora,
        export_merged,
        load_edit,
        load_ledger,
        push_to_hub,
        save_edits,
    )
    from errata.editors.core.request import EditRequest
    from errata.editors.core.steering.contrast import read_contrasts
    from errata.editors.core.steering.learning import learn_steering, steer
    from errata.editors.core.storage.edit_folder import Edits
    from errata.evaluate.probes import Case, Probe
    from errata.models import load

    __version__: str

# A checkout without symbolic links, as git makes it on Windows, has small text files in place of src/errata/editors
# and the other three links. The folders themselves lie at the root of the checkout.
if not Path(__path__[0], "editors").is_dir():
    __path__.append(str(Path(__path__[0]).parents[1]))

_HOME = (
    ("load", "errata.models"),
    ("load_results", "errata.benchmarks.runs.results"),
    ("load_records", "errata.benchmarks.runs.record_table"),
    ("EditRequest", "errata.editors.core.request"),
    ("Editor", "errata.editors.core.editor"),
    ("Edit", "errata.editors.core.edit"),
    ("difference", "errata.editors.core.difference"),
    ("merge_edits", "errata.editors.core.edit"),
    ("Edits", "errata.editors.core.storage.edit_folder"),
    ("load_edit", "errata.editors.core.loading"),
    ("load_ledger", "errata.editors.core.loading"),
    ("edit_of", "errata.editors.core.loading"),
    ("save_edits", "errata.editors.core.loading"),
    ("push_to_hub", "errata.editors.core.loading"),
    ("export_lora", "errata.editors.core.loading"),
    ("export_merged", "errata.editors.core.loading"),
    ("steer", "errata.editors.core.steering.learning"),
    ("learn_steering", "errata.editors.core.steering.learning"),
    ("read_contrasts", "errata.editors.core.steering.contrast"),
    ("Ledger", "errata.editors.core.ledger.ledger"),
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
    "difference",
    "edit_of",
    "export_lora",
    "export_merged",
    "learn_steering",
    "load",
    "load_edit",
    "load_ledger",
    "load_records",
    "load_results",
    "merge_edits",
    "push_to_hub",
    "read_contrasts",
    "save_edits",
    "steer",
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
