"""Rules by name and as text, as they are typed and as files keep them.

rule_of("ignore_top", share=0.08)          rule_of_text("breadcrumbs:remove=0.1:keep=0.2")
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from errata.editors.core.algebra.mask_rules import RULES, MaskRule
from errata.editors.core.algebra.merge_rules import MERGES, MergeRule
from errata.editors.core.config import build, choose
from errata.editors.core.errors import AlgebraError, ConfigError

Kind = TypeVar("Kind")
_WORDS: Mapping[str, bool | None] = {"true": True, "false": False, "null": None, "none": None}


def rule_of(name: str, **numbers: Any) -> MaskRule:
    """Return a rule by its name and parameters.

    Raises:
        AlgebraError: There is no such rule or parameter (it names the nearest), or a share is not from 0 to 1.
    """
    return named({kind.name: kind for kind in RULES}, "mask", name, numbers)


def rule_of_text(text: str) -> MaskRule:
    """Return a rule from a text such as `rect:0.8`, `ignore_top` or `breadcrumbs:remove=0.1:keep=0.2`.

    Values without a name are the rule's parameters in their order.

    Raises:
        AlgebraError: As `rule_of`; or there are too many values, or one parameter is given twice.
    """
    return named_by_text({kind.name: kind for kind in RULES}, "mask", text)


def merge_rule_of(rule: str, **numbers: Any) -> MergeRule:
    """Return a rule for merges by its name and parameters. Errors as of `rule_of`."""
    return named({kind.name: kind for kind in MERGES}, "merge", rule, numbers)


def merge_rule_of_text(text: str) -> MergeRule:
    """Return a rule for merges from a text such as `ties:0.2`. Errors as of `rule_of_text`."""
    return named_by_text({kind.name: kind for kind in MERGES}, "merge", text)


def text_of(rule: MaskRule) -> str:
    """Return the text that `rule_of_text` reads: the name, and the parameters that differ from their defaults."""
    changed = {f.name: getattr(rule, f.name) for f in fields(rule) if getattr(rule, f.name) != f.default}
    return ":".join([rule.name, *(f"{name}={_written(value)}" for name, value in changed.items())])


def named(kinds: Mapping[str, type[Kind]], what: str, name: str, numbers: Mapping[str, Any]) -> Kind:
    """Return an object of the kind with this name, made from plain values.

    Raises:
        AlgebraError: There is no such kind or field (it names the nearest), or a value does not fit.
    """
    try:
        return build(kinds[choose(name, kinds, what)], numbers, f"{name}: ")
    except ConfigError as error:
        raise AlgebraError(str(error)) from None


def named_by_text(kinds: Mapping[str, type[Kind]], what: str, text: str) -> Kind:
    """Return what `named` does, from a text NAME:VALUE:FIELD=VALUE. Errors as of `rule_of_text`."""
    name, *given = text.split(":")
    order = _order(kinds[name]) if name in kinds else []
    numbers: dict[str, Any] = {}
    for index, value in enumerate(given):
        key, equals, rest = value.partition("=")
        if not equals:
            if name in kinds and index >= len(order):
                raise AlgebraError(f"{what} {text!r}: {name} takes {', '.join(order)}, and no more")
            key, rest = order[index] if name in kinds else value, value
        if key in numbers:
            raise AlgebraError(f"{what} {text!r}: {key} is given twice")
        numbers[key] = _plain(rest)
    return named(kinds, what, name, numbers)


def _order(kind: type[Any]) -> list[str]:
    """Return the names of a rule's parameters, its own before those that it shares with others."""
    here = {field.name for field in fields(kind)}
    said = (name for each in kind.__mro__ for name in vars(each).get("__annotations__", ()))
    return [name for name in dict.fromkeys(said) if name in here]


def _plain(text: str) -> Any:
    """Return the value that a text writes: a number, true, false, null, or the text itself."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _written(value: Any) -> str:
    return next((word for word, meaning in _WORDS.items() if value is meaning), str(value))
