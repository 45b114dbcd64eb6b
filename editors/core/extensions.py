"""Named things that other packages add by entry points: methods, datasets, metrics, probe kinds, protocols and more.

A package registers a thing in its pyproject.toml, under the group of an extension point:

    [project.entry-points."errata.datasets"]
    my_dataset = "my_package.my_module:read"

The names are read from what is installed. The package itself is imported when its thing is first asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.editors.core.config import did_you_mean
from errata.editors.core.errors import ConfigError, ErrataError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


@dataclass(frozen=True)
class ExtensionPoint:
    """One kind of thing that other packages can add.

    Attributes:
        group: The group of the entry points.
        what: How errors call one such thing, as "dataset".
        expected: What must be registered, as "a subclass of Editor".
        fits: Whether a thing is one, for what was imported.
        own: The names of this package. No other package can take them.
        named_by: The attribute that holds a thing's own name, which must be that of its entry point; None: it has none.
        error: The error that is raised.
    """

    group: str
    what: str
    expected: str
    fits: Callable[[Any], bool]
    own: Collection[str] = ()
    named_by: str | None = None
    error: type[ErrataError] = ConfigError
    _read: dict[tuple[object, ...], list[EntryPoint]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def others(self) -> tuple[str, ...]:
        """Return the names that other packages add, in the order of the alphabet."""
        return tuple(sorted({point.name for point in self._points()} - set(self.own)))

    def names(self) -> tuple[str, ...]:
        """Return every name, those of this package first."""
        return (*self.own, *self.others())

    def load(self, name: str) -> Any:
        """Return what another package registered under this name.

        Raises:
            error: No package registered it (with the nearest name), two packages did, it cannot be imported, or it is
                not what it has to be. The message names the package.
        """
        found = [point for point in self._points() if point.name == name and name not in self.own]
        if not found:
            raise self.error(f"unknown {self.what} {name!r}{did_you_mean(name, self.names())}")
        if len(found) > 1:
            packages = " and ".join(sorted(map(_package, found)))
            raise self.error(f"the {self.what} {name!r} is registered twice, by {packages}; uninstall one of them")
        loaded = self._import(found[0])
        if not self.fits(loaded):
            raise self.error(f"{self._said(found[0])}, is not {self.expected} but {loaded!r}; register {self.expected}")
        if self.named_by is not None and (own_name := getattr(loaded, self.named_by, None)) != name:
            raise self.error(f"{self._said(found[0])}, has the {self.named_by} {own_name!r}; give both the same name")
        return loaded

    def load_others(self) -> list[Any]:
        """Return everything that other packages registered, in the order of `others`; errors as `load`."""
        return [self.load(name) for name in self.others()]

    def described(self, name: str) -> str:
        """Return how errors call what another package registered under this name."""
        return next((self._said(point) for point in self._points() if point.name == name), f"the {self.what} {name!r}")

    def _points(self) -> list[EntryPoint]:
        """Return the entry points. Reading them takes milliseconds, so they are read again only after an installation.

        An installation changes a folder of `sys.path`.
        """
        from importlib.metadata import entry_points

        state = tuple((folder, _changed(folder)) for folder in sys.path)
        if state not in self._read:
            self._read.clear()
            self._read[state] = list(entry_points(group=self.group))
        return self._read[state]

    def _import(self, point: EntryPoint) -> Any:
        try:
            return point.load()
        except Exception as error:  # whatever the module of another package raises while it is imported
            raise self.error(f"{self._said(point)}, cannot be imported: {error}") from error

    def _said(self, point: EntryPoint) -> str:
        return f"the {self.what} {point.name!r} of the package {_package(point)}, registered as {point.value!r}"


def added_packages() -> dict[str, str]:
    """Return the version of every package that adds something to errata, by package."""
    from importlib.metadata import distributions

    found: dict[str, str] = {}
    for package in distributions():
        if any(point.group.startswith("errata.") for point in package.entry_points):
            found.setdefault(package.name, package.version)
    return found


def _changed(folder: str) -> int | None:
    """Return when a folder was last changed, in nanoseconds; None where there is none."""
    try:
        return Path(folder).stat().st_mtime_ns
    except OSError:
        return None


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "without a name"
