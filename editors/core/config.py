"""Configurations as dataclasses, made from plain values (YAML, JSON, the command line) and checked on the way in."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal, InvalidOperation
from operator import attrgetter
from types import MappingProxyType, NoneType, UnionType
from typing import Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from errata.editors.core.errors import ConfigError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EditorConfig:
    """Fields that every method has."""

    # Fields that older versions did not have, each with the value under which the method does what it did then. Such a
    # field is left out of `to_dict`, so that runs of older versions keep their names. Those of base classes count, too.
    ADDED: ClassVar[Mapping[str, Any]] = MappingProxyType({"sparsify": None})

    # Fields that name a file, and those that name a text: a file or a dataset of the Hub. The bench keeps digests of
    # what they name, because other bytes make other edits.
    FILES: ClassVar[tuple[str, ...]] = ()
    TEXTS: ClassVar[tuple[str, ...]] = ()

    seed: int = 0
    """Of every random choice that the editor makes."""

    max_norm_ratio: float = 1e6
    """An update whose norm exceeds this many times its weight's is refused as a computation that has exploded. Left at
    1e6, it means the method's own limit: 100 for FT and LoRA, 1000 for the others. Other values are taken literally."""

    sparsify: str | None = None
    """Rule that says which elements of an update stay, such as ignore_top:0.08 or rect:0.8; null: all. Only for methods
    that write weights."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_finite(field.name, getattr(self, field.name))
        check_positive(self, ("max_norm_ratio",))

    @property
    def sparse_rule(self) -> str | None:
        """The rule that `sparsify`, or a shorter field of the method, asks for."""
        return self.sparsify

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, path: str = "") -> Self:
        """From plain values.

        Args:
            values: By field.
            path: What stands before a field's name where an error names it.

        Raises:
            ConfigError: an unknown field (with the nearest known one), a wrong type or a value out of range.
        """
        return build(cls, values, path)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON and YAML can hold; `from_dict` gives the configuration back."""
        values = dataclasses.asdict(self)
        added: dict[str, Any] = {}
        for kind in reversed(type(self).__mro__):
            added |= vars(kind).get("ADDED", {})
        unchanged = [name for name, value in added.items() if values[name] == value]
        return {name: value for name, value in values.items() if name not in unchanged}


# The limits that `max_norm_ratio` means by default. On the bundled testbed, the largest update of n = 40 single edits
# per method had this many times the norm of its weight: 15.6 (ROME), 4.8 (r-ROME), 1.3 (C-ROME), 1.1 (MEMIT), 1.4
# (EMMET), 0.65 (AlphaEdit), 0.28 (FT-M), 0.07 (FT-L, LoRA). Half of the prompts began with the subject, where ROME
# really disables models. Batches of 20 had up to 3.4 (MEMIT), 4.8 (EMMET), 1.9 (AlphaEdit), 0.35 (FT-M) and 0.17
# (LoRA). A batch of 10,000 may reach some 20 times that. So the limits leave a factor of 60 or more to each measured
# single edit. On SmolLM2-135M-Instruct, three edits each had up to 0.11 (ROME), 0.04 (FT-M) and 0.003 (FT-L).
NORM_LIMIT = 1000.0
_MOST_NAMES = 60  # that an error lists
NORM_LIMITS: Mapping[str, float] = MappingProxyType(
    dict.fromkeys(("ft_l", "ft_m", "lora", "locft", "crispedit"), 100.0)
)


def norm_limit(method: str, config: Mapping[str, Any]) -> float:
    """Return the largest accepted norm of an update of an edit, as a multiple of the norm of its weight.

    Args:
        method: Registered name of the method.
        config: Its configuration, also one that was read from a file.

    Raises:
        ConfigError: `max_norm_ratio` is not a number above 0.
    """
    value = config.get("max_norm_ratio")
    if value is None:  # the edit was not made by a method
        return EditorConfig.max_norm_ratio
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConfigError(f"max_norm_ratio: expected a number above 0, got {value!r}")
    return NORM_LIMITS.get(method, NORM_LIMIT) if value == EditorConfig.max_norm_ratio else float(value)


def check_least(config: Any, least: Mapping[str, float], path: str = "") -> None:
    """Refuse fields below their least value; None passes. A name may lead into fields of fields: "guard.ratio".

    Raises:
        ConfigError: names the field.
    """
    for name, limit in least.items():
        value = attrgetter(name)(config)
        if value is not None and not value >= limit:
            raise ConfigError(f"{path}{name}: expected at least {limit}, got {value}")


def check_positive(config: Any, names: Iterable[str]) -> None:
    """Refuse fields that are not above 0; None passes. Names as of `check_least`.

    Raises:
        ConfigError: names the field.
    """
    for name in names:
        value = attrgetter(name)(config)
        if value is not None and not value > 0:
            raise ConfigError(f"{name}: expected a number above 0, got {value}")


def build(kind: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """A dataclass from a mapping, nested ones included; lists become tuples where the field says so.

    Raises:
        ConfigError: an unknown or missing field, a value of another type; names the field.
    """
    hints = get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise ConfigError(f"unknown field {path}{name}{did_you_mean(str(name), fields)}")
    for name, entry in fields.items():
        if name not in values and entry.default is entry.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{path}{name} is missing")
    return kind(**{name: _coerce(hints[name], value, f"{path}{name}") for name, value in values.items()})


def check_layers(layers: Sequence[int], count: int) -> tuple[int, ...]:
    """The layers, once they are ascending layers of a model that has `count` of them.

    Raises:
        ConfigError: they are not.
    """
    if not layers or sorted(set(layers)) != list(layers) or not all(0 <= layer < count for layer in layers):
        raise ConfigError(f"layers: expected ascending layers from 0 to {count - 1}, got {list(layers)}")
    return tuple(layers)


def did_you_mean(name: str, known: Iterable[Any]) -> str:
    """Return `; did you mean 'x'?`, or what there is where nothing is near: the first names of a long list."""
    names = sorted(map(str, known))
    near = nearest(name, names)
    if near:
        return f"; did you mean {near!r}?"
    if len(names) > _MOST_NAMES:
        return f"; there are {len(names):,}: {', '.join(names[:_MOST_NAMES])}, ..."
    return f"; there are {', '.join(names)}"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that was probably meant, or None where none is near.

    Near is a name with at most one slip for every three letters: a letter too many, one too few, another one, or two
    in the wrong order. Case does not count. A name that goes on where this one ends is near too. Of names in groups
    (`dataset.path`), only what differs counts.
    """
    group, dot, _ = name.rpartition(".")
    typed = name.removeprefix(group + dot).lower()
    found: list[tuple[int, int, str]] = []
    for candidate in known:
        tail = candidate.removeprefix(group + dot).lower()
        allowed = min(max(1, len(typed) // 3), len(typed) - 1)
        if abs(len(tail) - len(typed)) <= allowed and (slips := _slips(typed, tail)) <= allowed:
            found.append((0, slips, candidate))
        elif len(typed) > 1 and tail.startswith(typed):
            found.append((1, len(tail), candidate))
    return min(found)[-1] if found else None


def _slips(typed: str, known: str) -> int:
    """Return the edit distance of two words, in which two letters in the wrong order are one slip."""
    before, row = [], list(range(len(known) + 1))
    for i, letter in enumerate(typed):
        further = [i + 1]
        for j, other in enumerate(known):
            cost = min(row[j] + (letter != other), row[j + 1] + 1, further[j] + 1)
            if i and j and letter == known[j - 1] and typed[i - 1] == other:
                cost = min(cost, before[j - 1] + 1)
            further.append(cost)
        before, row = row, further
    return row[-1]


def choose(name: str, choices: Iterable[str], what: str) -> str:
    """`name`, once it is one of the choices.

    Raises:
        ConfigError: it is not; says which there are and which is closest.
    """
    known = sorted(choices)
    if name not in known:
        raise ConfigError(f"unknown {what} {name!r}{did_you_mean(name, known)}")
    return name


def _check_finite(name: str, value: Any) -> None:
    """Refuse NaN and inf, which JSON cannot hold and no method can work with; also inside of lists."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name}: expected a finite number, got {value}")
    if isinstance(value, list | tuple):
        for place, each in enumerate(value):
            _check_finite(f"{name}[{place}]", each)


def _coerce(hint: Any, value: Any, path: str) -> Any:
    """`value` as the type `hint`, where it is one already or differs only in how plain formats write it."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        return _coerce_union(args, value, path)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{path}: expected one of {', '.join(map(repr, args))}, got {value!r}")
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}: expected a group of fields, got {value!r}")
        return build(hint, value, f"{path}.")
    if origin is tuple:
        return _coerce_tuple(args, value, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain: Any = origin or hint
    if not isinstance(value, plain) or (isinstance(value, bool) and plain is not bool):
        raise ConfigError(f"{path}: expected {_name(hint)}, got {value!r}{_as_share(hint, value)}")
    return value


def _as_share(hint: Any, value: Any) -> str:
    """Return advice for a share that is written in percent, which YAML and the command line take for a text."""
    if hint is not float or not isinstance(value, str) or not value.endswith("%"):
        return ""
    try:
        share = Decimal(value[:-1].strip()) / 100
    except InvalidOperation:
        return ""
    return f"; give the share, {share:f}" if share.is_finite() else ""


def _coerce_tuple(args: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        if args[1:] == (Ellipsis,):
            with suppress(ConfigError):  # what is no single value either is refused as no list, below
                return (_coerce(args[0], value, path),)  # `layers=3` for `layers=[3]`
        raise ConfigError(f"{path}: expected a list, got {value!r}{_as_share(args[0], value)}")
    hints = [args[0]] * len(value) if args[1:] == (Ellipsis,) else list(args)
    if len(hints) != len(value):
        raise ConfigError(f"{path}: expected {len(hints)} values, got {len(value)}")
    return tuple(_coerce(hint, v, f"{path}[{i}]") for i, (hint, v) in enumerate(zip(hints, value, strict=True)))


def _coerce_union(args: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and NoneType in args:
        return None
    kinds = [arg for arg in args if arg is not NoneType]
    for kind in kinds[:-1]:
        try:
            return _coerce(kind, value, path)
        except ConfigError:
            continue
    if len(kinds) == 1:
        return _coerce(kinds[0], value, path)
    try:
        return _coerce(kinds[-1], value, path)
    except ConfigError:
        expected = " or ".join(map(_name, args))
        raise ConfigError(f"{path}: expected {expected}, got {value!r}") from None


def _name(hint: Any) -> str:
    if hint is NoneType:
        return "null"
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if get_origin(hint) is tuple:
        return "a list"
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
