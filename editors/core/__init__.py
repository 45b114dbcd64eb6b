"""What an author of a method builds on, in one place.

    from errata.editors.core import Editor, EditorConfig, EditRequest, LowRank, Patch, Solution

A method subclasses `Editor`, or the base class of its family: `LocateThenEdit` (one layer, values found by a search),
`MassEditor` (many facts over several layers), `Tuner` (fine-tuning), `TrainedEditor` (trained beforehand). It returns a
`Solution`, whose `Patch` holds a `LowRank` or `Dense` update per weight, or an `Adapter` per module.

docs/adding-a-method.md shows a whole method; `errata.testing.laws` holds it to what every method keeps.

Each name is imported on first use (PEP 562). Modules of this package import from each other, not from here.
"""

from __future__ import annotations

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from errata.editors.core.config import EditorConfig, check_layers, check_least, check_positive
    from errata.editors.core.dtypes import working_dtype
    from errata.editors.core.edit import Edit, Solution, combine
    from errata.editors.core.editor import Editor
    from errata.editors.core.errors import (
        ArchitectureError,
        CheckpointError,
        ConfigError,
        DamagedEditsError,
        DatasetError,
        DisablingEditWarning,
        DoubtfulEditWarning,
        ErrataError,
        ExportError,
        HubError,
        LedgerError,
        MergeError,
        NumericalError,
        OtherBaseError,
        OtherWriterError,
        OutOfMemoryError,
        RanksDifferError,
        RequestError,
        SharedKeyWarning,
        StatisticsError,
        StorageWarning,
    )
    from errata.editors.core.families.fine_tuning import Tuner
    from errata.editors.core.families.joint_training import TuningConfig
    from errata.editors.core.families.layer_choice import single_layer
    from errata.editors.core.families.learned_editor import TrainedConfig, TrainedEditor, TrainingExample
    from errata.editors.core.families.locate_config import LocateThenEditConfig
    from errata.editors.core.families.locate_then_edit import LocateThenEdit, name_request_in_errors
    from errata.editors.core.families.mass_editing import MassEditingConfig, MassEditor
    from errata.editors.core.families.trainables import Trainable, TrainingRow
    from errata.editors.core.families.value_search import Target
    from errata.editors.core.ledger.adapter import Adapter, Folded
    from errata.editors.core.ledger.entry import Entry
    from errata.editors.core.ledger.interrupts import safe_point
    from errata.editors.core.ledger.ledger import Ledger
    from errata.editors.core.ledger.patch import Dense, LowRank, Patch
    from errata.editors.core.model.activations import last_keys
    from errata.editors.core.model.architecture import Architecture
    from errata.editors.core.model.reading import read_ids
    from errata.editors.core.model.tokens import (
        LocatedSubject,
        Tokenizer,
        answer_ids,
        locate_subject,
        pad_id,
        prompt_ids,
    )
    from errata.editors.core.progress import Progress, silent
    from errata.editors.core.request import EditRequest
    from errata.editors.core.solve.solvers import (
        Factor,
        factorise,
        memit_adjoint,
        rank_one_values,
        small_adjoint,
        update_directions,
    )

# module of this package -> the names that it gives
_HOME = MappingProxyType(
    {
        "config": ("EditorConfig", "check_layers", "check_least", "check_positive"),
        "dtypes": ("working_dtype",),
        "edit": ("Edit", "Solution", "combine"),
        "editor": ("Editor",),
        "errors": (
            "ArchitectureError",
            "CheckpointError",
            "ConfigError",
            "DamagedEditsError",
            "DatasetError",
            "DisablingEditWarning",
            "DoubtfulEditWarning",
            "ErrataError",
            "ExportError",
            "HubError",
            "LedgerError",
            "MergeError",
            "NumericalError",
            "OtherBaseError",
            "OtherWriterError",
            "OutOfMemoryError",
            "RanksDifferError",
            "RequestError",
            "SharedKeyWarning",
            "StatisticsError",
            "StorageWarning",
        ),
        "families.fine_tuning": ("Tuner",),
        "families.joint_training": ("TuningConfig",),
        "families.trainables": ("Trainable", "TrainingRow"),
        "families.learned_editor": ("TrainedConfig", "TrainedEditor", "TrainingExample"),
        "families.layer_choice": ("single_layer",),
        "families.locate_config": ("LocateThenEditConfig",),
        "families.locate_then_edit": ("LocateThenEdit", "name_request_in_errors"),
        "families.mass_editing": ("MassEditingConfig", "MassEditor"),
        "families.value_search": ("Target",),
        "ledger.adapter": ("Adapter", "Folded"),
        "ledger.entry": ("Entry",),
        "ledger.interrupts": ("safe_point",),
        "ledger.ledger": ("Ledger",),
        "ledger.patch": ("Dense", "LowRank", "Patch"),
        "model.activations": ("last_keys",),
        "model.architecture": ("Architecture",),
        "model.reading": ("read_ids",),
        "model.tokens": ("LocatedSubject", "Tokenizer", "answer_ids", "locate_subject", "pad_id", "prompt_ids"),
        "progress": ("Progress", "silent"),
        "request": ("EditRequest",),
        "solve.solvers": (
            "Factor",
            "update_directions",
            "factorise",
            "memit_adjoint",
            "rank_one_values",
            "small_adjoint",
        ),
    }
)

__all__ = (
    "Adapter",
    "Architecture",
    "ArchitectureError",
    "CheckpointError",
    "ConfigError",
    "DamagedEditsError",
    "DatasetError",
    "Dense",
    "DisablingEditWarning",
    "DoubtfulEditWarning",
    "Edit",
    "EditRequest",
    "Editor",
    "EditorConfig",
    "Entry",
    "ErrataError",
    "ExportError",
    "Factor",
    "Folded",
    "HubError",
    "Ledger",
    "LedgerError",
    "LocateThenEdit",
    "LocateThenEditConfig",
    "LocatedSubject",
    "LowRank",
    "MassEditingConfig",
    "MassEditor",
    "MergeError",
    "NumericalError",
    "OtherBaseError",
    "OtherWriterError",
    "OutOfMemoryError",
    "Patch",
    "Progress",
    "RanksDifferError",
    "RequestError",
    "SharedKeyWarning",
    "Solution",
    "StatisticsError",
    "StorageWarning",
    "Target",
    "Tokenizer",
    "Trainable",
    "TrainedConfig",
    "TrainedEditor",
    "TrainingExample",
    "TrainingRow",
    "Tuner",
    "TuningConfig",
    "answer_ids",
    "check_layers",
    "check_least",
    "check_positive",
    "combine",
    "factorise",
    "last_keys",
    "locate_subject",
    "memit_adjoint",
    "name_request_in_errors",
    "pad_id",
    "prompt_ids",
    "rank_one_values",
    "read_ids",
    "safe_point",
    "silent",
    "single_layer",
    "small_adjoint",
    "update_directions",
    "working_dtype",
)


def __getattr__(name: str) -> object:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    from errata.editors.core.config import did_you_mean

    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{did_you_mean(name, __all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
