"""What the source of a method's class says, read without an import: importing it loads torch, which takes seconds.

The first sentence of `errata methods` is the first paragraph of the class's docstring, and `needs_subject` is what the
class or the nearest of its bases says. Only modules of this package are read.
"""

from __future__ import annotations

import ast
import inspect
from importlib.util import find_spec
from pathlib import Path


class ClassSources:
    """The classes of modules by name; each module is parsed once."""

    def __init__(self) -> None:
        self._modules: dict[str, ast.Module] = {}

    def summary(self, module: str, name: str) -> str:
        """Return the first paragraph of the docstring of a class, in one line; its name where it has none."""
        text = ast.get_docstring(self._class(module, name)) or name
        return " ".join(inspect.cleandoc(text).partition("\n\n")[0].split())

    def needs_subject(self, module: str, name: str) -> bool:
        """Return whether the methods of a class edit at the subject of a request."""
        return bool(self._attribute(module, name, "needs_subject"))

    def _attribute(self, module: str, name: str, attribute: str) -> object:
        """Return the value of an attribute of a class, from its own body or from a base; None where none has it."""
        found = self._class(module, name)
        for entry in found.body:
            targets = entry.targets if isinstance(entry, ast.Assign) else [getattr(entry, "target", None)]
            if attribute in (getattr(target, "id", None) for target in targets):
                value = getattr(entry, "value", None)
                if value is not None:  # a bare annotation has none
                    return ast.literal_eval(value)
        for base in found.bases:
            home = self._home(module, getattr(base, "id", ""))
            if home is not None and (value := self._attribute(*home, attribute)) is not None:
                return value
        return None

    def _home(self, module: str, name: str) -> tuple[str, str] | None:
        """Return the module and the name of a class that another module uses; None where it is not of this package."""
        for entry in self._parsed(module).body:
            if isinstance(entry, ast.ClassDef) and entry.name == name:
                return module, name
            if isinstance(entry, ast.ImportFrom) and (entry.module or "").startswith("errata."):
                for alias in entry.names:
                    if (alias.asname or alias.name) == name:
                        return str(entry.module), alias.name
        return None

    def _class(self, module: str, name: str) -> ast.ClassDef:
        classes = (entry for entry in self._parsed(module).body if isinstance(entry, ast.ClassDef))
        return next(entry for entry in classes if entry.name == name)

    def _parsed(self, module: str) -> ast.Module:
        if module not in self._modules:
            spec = find_spec(module)
            assert spec is not None
            assert spec.origin is not None
            self._modules[module] = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        return self._modules[module]
