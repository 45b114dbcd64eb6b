"""The interventions by name: those of errata, and those that other packages register under `errata.interventions`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from errata.editors.core.config import did_you_mean
from errata.editors.core.errors import ConfigError
from errata.editors.core.extensions import ExtensionPoint

if TYPE_CHECKING:
    from errata.editors.core.interventions.intervention import Intervention, Kind

_COMPRESSIONS = "errata.editors.core.interventions.compressions"
_UNLEARNINGS = "errata.editors.core.interventions.unlearning"
# {kind: {name: (module, class)}}, so that their names are known before torch is imported.
OWN: Mapping[str, Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "compress": {
            "magnitude": (_COMPRESSIONS, "MagnitudePruning"),
            "wanda": (_COMPRESSIONS, "Wanda"),
            "sparsegpt": (_COMPRESSIONS, "SparseGPT"),
            "rtn": (_COMPRESSIONS, "RoundToNearest"),
            "gptq": (_COMPRESSIONS, "GPTQ"),
            "awq": ("errata.editors.core.interventions.awq", "AWQ"),
            "torchao": ("errata.editors.core.interventions.torchao_backend", "TorchAO"),
        },
        "unlearn": {
            "rmu": (_UNLEARNINGS, "RMU"),
            "ga": (_UNLEARNINGS, "GradientAscent"),
            "gd": (_UNLEARNINGS, "GradientDifference"),
        },
    }
)


def _is_intervention(loaded: Any) -> bool:
    from errata.editors.core.interventions.intervention import Intervention

    return isinstance(loaded, type) and issubclass(loaded, Intervention)


ADDED = ExtensionPoint(
    "errata.interventions",
    "intervention",
    "a subclass of Intervention",
    _is_intervention,
    own=tuple(name for kind in OWN.values() for name in kind),
    named_by="name",
)


def names(kind: Kind) -> tuple[str, ...]:
    """Return the names of errata's own interventions of a kind, and of all that other packages add."""
    return (*OWN[kind], *ADDED.others())


def get(name: str, kind: Kind | None = None) -> type[Intervention]:
    """Return the class of an intervention.

    Args:
        name: Its name.
        kind: What it must be; None: either.

    Raises:
        ConfigError: There is no such intervention (it names the nearest), it is of another kind, or another package's
            cannot be imported.
    """
    module, attribute = next((own[name] for own in OWN.values() if name in own), (None, ""))
    found = ADDED.load(name) if module is None else getattr(import_module(module), attribute)
    if kind is not None and found.kind != kind:
        raise ConfigError(f"{name} does not {kind}, it does {found.kind}{did_you_mean(name, names(kind))}")
    return found
