"""For authors of methods: the laws that every method keeps, and tiny models to try a method on.

    from errata.testing import laws

    def make(model, tokenizer):
        return MyMethod(model, tokenizer, {"layers": [1]})

    @pytest.mark.parametrize("trial", laws.trials(make), ids=str)
    def test_my_method_keeps_the_law(trial):
        trial()

Contents:
    laws: The laws as checks, for pytest (`laws.trials`) or without it (`laws.check_all`).
    check_all, trials, Trial: The same, from here.
    digest: SHA-256 of all that a model computes with, to tell whether anything changed.
    tiny_model, tiny_tokenizer, ARCHITECTURES: Random models of three layers, and a tokenizer for them.

The names are imported on first use (PEP 562).
"""

from __future__ import annotations

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from errata.testing import laws
    from errata.testing.laws import Trial, check_all, digest, trials
    from errata.testing.tiny_models import ARCHITECTURES, tiny_model, tiny_tokenizer

# module of this package -> the names that it gives
_HOME = MappingProxyType(
    {
        "laws": ("Trial", "check_all", "digest", "trials"),
        "tiny_models": ("ARCHITECTURES", "tiny_model", "tiny_tokenizer"),
    }
)

__all__ = (
    "ARCHITECTURES",
    "Trial",
    "check_all",
    "digest",
    "laws",
    "tiny_model",
    "tiny_tokenizer",
    "trials",
)


def __getattr__(name: str) -> object:
    if name == "laws":
        return import_module(f"{__name__}.laws")
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its names are {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
