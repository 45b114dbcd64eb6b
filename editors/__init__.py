"""The registry of editing methods, by name. Each method is one file of this folder.

A method of this package is registered by a line in `_METHODS`. A method of another package is registered by an entry
point of the group `errata.methods` in that package's pyproject.toml (docs/adding-a-method.md):

    [project.entry-points."errata.methods"]
    my_method = "my_package.my_method:MyMethod"

A method is imported when it is first used.
"""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from errata.editors.core.extensions import ExtensionPoint

if TYPE_CHECKING:
    from errata.editors.alphaedit import AlphaEdit
    from errata.editors.anyedit import AnyEdit
    from errata.editors.coachhook import CoachHooK
    from errata.editors.coar import COAR
    from errata.editors.core.editor import Editor
    from errata.editors.crispedit import CrispEdit
    from errata.editors.emmet import EMMET
    from errata.editors.finetune import FTL, FTM, LocFT
    from errata.editors.grace import GRACE
    from errata.editors.in_context import ICE, IKE, SCR
    from errata.editors.lora import LoRA
    from errata.editors.malmen import MALMEN
    from errata.editors.memit import MEMIT
    from errata.editors.memoir import MEMOIR
    from errata.editors.mend import MEND
    from errata.editors.mint import MINT
    from errata.editors.pmet import PMET
    from errata.editors.rledit import RLEdit
    from errata.editors.rome import CROME, ROME, RROME
    from errata.editors.ultraedit import StableEdit, UltraEdit
    from errata.editors.wise import WISE

    METHODS: tuple[str, ...]

# registered name -> (module, class)
_METHODS = MappingProxyType(
    {
        "rome": ("errata.editors.rome", "ROME"),
        "r_rome": ("errata.editors.rome", "RROME"),
        "c_rome": ("errata.editors.rome", "CROME"),
        "memit": ("errata.editors.memit", "MEMIT"),
        "emmet": ("errata.editors.emmet", "EMMET"),
        "alphaedit": ("errata.editors.alphaedit", "AlphaEdit"),
        "ft_l": ("errata.editors.finetune", "FTL"),
        "ft_m": ("errata.editors.finetune", "FTM"),
        "locft": ("errata.editors.finetune", "LocFT"),
        "lora": ("errata.editors.lora", "LoRA"),
        "mend": ("errata.editors.mend", "MEND"),
        "grace": ("errata.editors.grace", "GRACE"),
        "ice": ("errata.editors.in_context", "ICE"),
        "ike": ("errata.editors.in_context", "IKE"),
        "scr": ("errata.editors.in_context", "SCR"),
        "ultraedit": ("errata.editors.ultraedit", "UltraEdit"),
        "stableedit": ("errata.editors.ultraedit", "StableEdit"),
        "wise": ("errata.editors.wise", "WISE"),
        "pmet": ("errata.editors.pmet", "PMET"),
        "anyedit": ("errata.editors.anyedit", "AnyEdit"),
        "coachhook": ("errata.editors.coachhook", "CoachHooK"),
        "memoir": ("errata.editors.memoir", "MEMOIR"),
        "malmen": ("errata.editors.malmen", "MALMEN"),
        "rledit": ("errata.editors.rledit", "RLEdit"),
        "crispedit": ("errata.editors.crispedit", "CrispEdit"),
        "coar": ("errata.editors.coar", "COAR"),
        "mint": ("errata.editors.mint", "MINT"),
    }
)

GROUP = "errata.methods"

__all__ = [
    "COAR",
    "CROME",
    "EMMET",
    "FTL",
    "FTM",
    "GRACE",
    "ICE",
    "IKE",
    "MALMEN",
    "MEMIT",
    "MEMOIR",
    "MEND",
    "METHODS",
    "MINT",
    "PMET",
    "ROME",
    "RROME",
    "SCR",
    "WISE",
    "AlphaEdit",
    "AnyEdit",
    "CoachHooK",
    "CrispEdit",
    "LoRA",
    "LocFT",
    "RLEdit",
    "StableEdit",
    "UltraEdit",
    "get",
    "home",
    "subject_free",
]


def get(name: str) -> type[Editor]:
    """Return the class of the method with this name.

    Raises:
        ConfigError: There is no such method (it names the nearest), or the other package's method cannot be imported.
    """
    if name in _METHODS:
        module, attribute = _METHODS[name]
        return getattr(importlib.import_module(module), attribute)
    return ADDED.load(name)


def home(name: str) -> tuple[str, str] | None:
    """Return the module and the class of a method of this package; None for another package's."""
    return _METHODS.get(name)


def subject_free() -> tuple[str, ...]:
    """Return the names of the methods that take requests without a subject, of those that can be imported."""
    from errata.editors.core.errors import ConfigError

    found = []
    for name in ADDED.names():
        try:
            if not get(name).needs_subject:
                found.append(name)
        except ConfigError:
            continue
    return tuple(sorted(found))


def _is_editor(loaded: Any) -> bool:
    from errata.editors.core.editor import Editor

    return isinstance(loaded, type) and issubclass(loaded, Editor)


# The methods of other packages, which cannot replace those of this one.
ADDED = ExtensionPoint(GROUP, "method", "a subclass of Editor", _is_editor, own=tuple(_METHODS), named_by="name")


def __getattr__(attribute: str) -> Any:
    """Import a method's class on first use, as in `from errata.editors import ROME`; METHODS is every name."""
    if attribute == "METHODS":
        return ADDED.names()
    for module, name in _METHODS.values():
        if name == attribute:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
