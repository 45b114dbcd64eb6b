"""The editing methods, one file each, by name.

A method is registered by one line in `_METHODS`; it is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from errata.editors.alphaedit import AlphaEdit
    from errata.editors.core.editor import Editor
    from errata.editors.emmet import EMMET
    from errata.editors.finetune import FTL, FTM
    from errata.editors.lora import LoRA
    from errata.editors.memit import MEMIT
    from errata.editors.mend import MEND
    from errata.editors.rome import CROME, ROME, RROME

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
        "lora": ("errata.editors.lora", "LoRA"),
        "mend": ("errata.editors.mend", "MEND"),
    }
)

METHODS = tuple(_METHODS)

__all__ = ["CROME", "EMMET", "FTL", "FTM", "MEMIT", "MEND", "METHODS", "ROME", "RROME", "AlphaEdit", "LoRA", "get"]


def get(name: str) -> type[Editor]:
    """The method of this name.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    from errata.editors.core.config import did_you_mean
    from errata.editors.core.errors import ConfigError

    if name not in _METHODS:
        raise ConfigError(f"unknown method {name!r}{did_you_mean(name, METHODS)}")
    module, attribute = _METHODS[name]
    return getattr(importlib.import_module(module), attribute)


def __getattr__(attribute: str) -> Any:
    """`from errata.editors import ROME`, imported only then."""
    for module, name in _METHODS.values():
        if name == attribute:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
