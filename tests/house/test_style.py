"""Rules of style that a program can check. Every rule has a control: bad code that it must flag."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
from source_files import ROOT, Source, imports, library

MAX_LINES = 450


def imports_are_absolute_and_through_errata(source: Source) -> list[str]:
    relative = [f"{n.lineno}: relative" for n in ast.walk(source.tree) if isinstance(n, ast.ImportFrom) and n.level]
    folders = ("editors", "hparams", "benchmarks", "src")  # `evaluate` alone is Hugging Face's package
    return relative + [f"{line}: {name}" for line, name in imports(source.tree) if name.split(".")[0] in folders]


def library_does_not_print(source: Source) -> list[str]:
    calls = (node for node in ast.walk(source.tree) if isinstance(node, ast.Call))
    return [f"{node.lineno}: print" for node in calls if ast.unparse(node.func) in ("print", "sys.stdout.write")]


def files_are_short(source: Source) -> list[str]:
    lines = source.text.count("\n")
    return [f"{lines} lines"] if lines > MAX_LINES else []


def no_wildcards_and_no_grab_bags(source: Source) -> list[str]:
    stem = Path(source.path).stem
    problems = [f"a module called {stem}"] if stem in ("utils", "util", "helpers", "misc", "common") else []
    return problems + [f"{line}: {name}" for line, name in imports(source.tree) if name.endswith(".*")]


MUTABLE_CALLS = ("list", "dict", "set", "defaultdict", "OrderedDict", "Counter", "deque", "bytearray")
MUTABLE_NODES = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)


def no_state_at_module_level(source: Source) -> list[str]:
    """Mutable containers bound to lower-case names, `global` statements and caches on functions."""
    problems = [f"{n.lineno}: global" for n in ast.walk(source.tree) if isinstance(n, ast.Global)]
    for node in source.tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            call = isinstance(node.value, ast.Call) and ast.unparse(node.value.func).split(".")[-1] in MUTABLE_CALLS
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
            variable = [n for n in names if not n.strip("_").isupper() and not n.startswith("__")]
            if variable and (call or isinstance(node.value, MUTABLE_NODES)):
                problems.append(f"{node.lineno}: {', '.join(variable)}")
        if isinstance(node, ast.FunctionDef):
            names = [ast.unparse(d).split("(")[0].split(".")[-1] for d in node.decorator_list]
            problems += [f"{node.lineno}: cache on {node.name}" for name in names if name in ("cache", "lru_cache")]
    return problems


def nothing_runs_at_import(source: Source) -> list[str]:
    """Expression statements other than docstrings, and loops."""
    calls = (n for n in source.tree.body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call))
    loops = (n for n in source.tree.body if isinstance(n, (ast.For, ast.While, ast.With)))
    return [f"{node.lineno}: {ast.unparse(node)[:60]}" for node in (*calls, *loops)]


Rule = Callable[[Source], list[str]]
CONTROLS: list[tuple[Rule, str, str]] = [
    (imports_are_absolute_and_through_errata, "editors/rome.py", "from .core import ledger"),
    (imports_are_absolute_and_through_errata, "editors/rome.py", "from editors.core import ledger"),
    (library_does_not_print, "editors/rome.py", "def f():\n    print('hello')"),
    (files_are_short, "editors/rome.py", "x = 1\n" * (MAX_LINES + 1)),
    (no_wildcards_and_no_grab_bags, "editors/rome.py", "from errata.editors.core.model.tokens import *"),
    (no_wildcards_and_no_grab_bags, "editors/utils.py", "x = 1"),
    (no_state_at_module_level, "editors/rome.py", "cache = {}"),
    (no_state_at_module_level, "editors/rome.py", "_seen: set[str] = set()"),
    (no_state_at_module_level, "editors/rome.py", "rows = [f(x) for x in y]"),
    (no_state_at_module_level, "editors/rome.py", "def f():\n    global state\n    state = 1"),
    (no_state_at_module_level, "editors/rome.py", "import functools\n@functools.lru_cache(1)\ndef f(): ..."),
    (nothing_runs_at_import, "editors/rome.py", "import torch\ntorch.manual_seed(0)"),
    (nothing_runs_at_import, "editors/rome.py", "for i in range(3):\n    pass"),
]
RULES: list[Rule] = list(dict.fromkeys(rule for rule, _, _ in CONTROLS))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_library_keeps_the_rule(rule: Rule) -> None:
    sources = library()
    assert len(sources) > 10, f"only {len(sources)} files were read"
    problems = [f"{source.path}:{problem}" for source in sources for problem in rule(source)]
    assert not problems, "\n".join([f"{rule.__name__}:", *problems])


@pytest.mark.parametrize(("rule", "path", "text"), CONTROLS)
def test_the_rule_flags_its_control(rule: Rule, path: str, text: str) -> None:
    assert rule(Source(path, text)), f"{rule.__name__} did not flag {text!r} in {path}"


def test_rules_leave_good_code_alone() -> None:
    good = (
        '"""Doc."""\nimport torch\nfrom errata.editors.core.request import EditRequest\n'
        'METHODS = {"a": 1}\n__all__ = ["x"]\n\ndef f() -> None:\n    seen = {}\n    for i in seen:\n        f()\n'
    )
    assert [rule(Source("editors/rome.py", good)) for rule in RULES] == [[] for _ in RULES]


def test_evaluate_and_tests_are_no_regular_packages() -> None:
    # With an __init__.py, `import evaluate` from the repository root would find ours before Hugging Face's.
    assert not (ROOT / "evaluate" / "__init__.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()
