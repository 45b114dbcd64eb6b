"""The rules of the house, read from the source itself. Every rule has a control: bad code that it must flag."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ("editors", "evaluate", "benchmarks", "hparams", "src/errata")
MAX_LINES = 450


class Source(NamedTuple):
    """One file: its path from the root, with forward slashes, and its text."""

    path: str
    text: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)


def library() -> list[Source]:
    found = []
    for folder in LIBRARY:
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT).as_posix()
            if folder != "src/errata" or path.parent == ROOT / folder:  # not through the links
                found.append(Source(relative, path.read_text(encoding="utf-8")))
    return found


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported from errata, functions' own imports included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def home(name: str) -> str | None:
    """The part of the house that an imported name or a file lives in."""
    parts = name.split(".")
    if parts[0] != "errata":
        return None
    if len(parts) > 1 and parts[1] in ("evaluate", "benchmarks", "hparams"):
        return parts[1]
    if len(parts) > 1 and parts[1] == "editors":
        return "core" if len(parts) > 2 and parts[2] == "core" else "editors"
    return "top"


MAY_IMPORT = {
    "core": {"core"},
    "editors": {"core", "editors"},
    "evaluate": {"core", "evaluate"},
    "benchmarks": {"core", "editors", "evaluate", "benchmarks", "hparams"},
    "hparams": set(),
    "top": {"core", "editors", "evaluate", "benchmarks", "hparams", "top"},
}


def imports_only_downward(source: Source) -> list[str]:
    where = source.path.removeprefix("src/").removeprefix("errata/").removesuffix(".py").replace("/", ".")
    floor = "top" if source.path.startswith("src/") else home(f"errata.{where}")
    assert floor is not None
    found = ((line, name, home(name)) for line, name in imports(source.tree))
    return [f"{line}: {floor} imports {name}" for line, name, to in found if to and to not in MAY_IMPORT[floor]]


# Within benchmarks/: what runs a model knows nothing of what is drawn from it, and a report runs nothing.
MAY_NOT_IMPORT = {
    "benchmarks/harness/": ("bench", "facts", "keeping", "reports", "training", "testbed", "speed"),
    "benchmarks/reports/": ("bench", "facts", "keeping", "models", "training", "testbed", "speed"),
    "benchmarks/originals/": ("bench", "facts", "keeping", "harness", "reports", "training", "testbed", "speed"),
    "benchmarks/training/": ("bench", "facts", "keeping", "testbed", "speed"),
    "benchmarks/testbed/": ("bench", "facts", "keeping", "harness", "reports", "training", "speed"),
}


def the_harness_runs_and_reports_only_read(source: Source) -> list[str]:
    forbidden = next((names for folder, names in MAY_NOT_IMPORT.items() if source.path.startswith(folder)), ())
    found = ((line, name, name.split(".")) for line, name in imports(source.tree))
    return [f"{line}: {name}" for line, name, parts in found if parts[1:2] == ["benchmarks"] and parts[2] in forbidden]


def imports_are_absolute_and_through_errata(source: Source) -> list[str]:
    relative = [f"{n.lineno}: relative" for n in ast.walk(source.tree) if isinstance(n, ast.ImportFrom) and n.level]
    folders = ("editors", "hparams", "benchmarks", "src")  # `evaluate` alone is Hugging Face's package
    return relative + [f"{line}: {name}" for line, name in imports(source.tree) if name.split(".")[0] in folders]


BANNED_MODULES = ("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "runpy")
BANNED_BUILTINS = ("eval", "exec", "compile", "__import__")
# All but torch's by their last parts, whatever stands before them; safetensors.torch has a `load` of its own.
BANNED_NAMES = re.compile(
    r"^torch\.(load|save|jit\.load|hub\.load)$|(^|\.)(yaml\.(full_|unsafe_)?load(_all)?|read_pickle|to_pickle"
    r"|os\.(system|popen|exec[lv]\w*|(posix_)?spawn\w*)|subprocess\.get(status)?output|runpy\.run_\w+)$"
)
BANNED_KEYWORDS = ("shell", "allow_pickle", "trust_remote_code")


def meanings(tree: ast.Module) -> dict[str, str]:
    """By name: what the imports of a file make of it."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def named(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that is imported, called or handed on by its name."""
    yield from imports(tree)
    known = meanings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            first, dot, rest = ast.unparse(node).partition(".")
            yield node.lineno, f"{known.get(first, first)}{dot}{rest}"


def no_file_can_run_code(source: Source) -> list[str]:
    problems = [f"{line}: {name}" for line, name in imports(source.tree) if name.split(".")[0] in BANNED_MODULES]
    for line, name in named(source.tree):
        if name.removeprefix("builtins.") in BANNED_BUILTINS or BANNED_NAMES.search(name):
            problems.append(f"{line}: {name}")
    for call in (node for node in ast.walk(source.tree) if isinstance(node, ast.Call)):
        for keyword in call.keywords:
            literal = isinstance(keyword.value, ast.Constant) and bool(keyword.value.value)
            if keyword.arg in BANNED_KEYWORDS and literal:
                problems.append(f"{call.lineno}: {keyword.arg}={ast.unparse(keyword.value)}")
    return problems


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
    (imports_only_downward, "editors/core/ledger/ledger.py", "from errata.editors.rome import ROME"),
    (imports_only_downward, "editors/core/ledger/ledger.py", "from errata.editors import ROME"),
    (imports_only_downward, "editors/core/ledger/ledger.py", "def f():\n    from errata import evaluate"),
    (imports_only_downward, "editors/rome.py", "import errata.evaluate.scoring"),
    (imports_only_downward, "editors/rome.py", "from errata.benchmarks.datasets.world import cases"),
    (imports_only_downward, "evaluate/metrics.py", "from errata.editors.rome import ROME"),
    (imports_only_downward, "benchmarks/bench/run.py", "from errata.cli.main import main"),
    (imports_only_downward, "benchmarks/bench/run.py", "import errata"),
    (
        the_harness_runs_and_reports_only_read,
        "benchmarks/runs/run_folder.py",
        "from errata.benchmarks.reports import page",
    ),
    (the_harness_runs_and_reports_only_read, "benchmarks/reports/page.py", "from errata import models"),
    (imports_are_absolute_and_through_errata, "editors/rome.py", "from .core import ledger"),
    (imports_are_absolute_and_through_errata, "editors/rome.py", "from editors.core import ledger"),
    (no_file_can_run_code, "editors/rome.py", "import pickle"),
    (no_file_can_run_code, "editors/rome.py", "from joblib import load"),
    (no_file_can_run_code, "editors/rome.py", "import torch\ntorch.load('x')"),
    (no_file_can_run_code, "editors/rome.py", "from torch import load\nload('x')"),
    (no_file_can_run_code, "editors/rome.py", "from torch import load as read"),
    (no_file_can_run_code, "editors/rome.py", "import torch as t\nt.load('x')"),
    (no_file_can_run_code, "editors/rome.py", "import torch\nread = torch.load"),
    (no_file_can_run_code, "editors/rome.py", "import torch\ntorch.hub.load('x', 'y')"),
    (no_file_can_run_code, "editors/rome.py", "eval('1')"),
    (no_file_can_run_code, "editors/rome.py", "import builtins\nbuiltins.exec('1')"),
    (no_file_can_run_code, "editors/rome.py", "import builtins as b\nb.exec('1')"),
    (no_file_can_run_code, "editors/rome.py", "from builtins import exec as run"),
    (no_file_can_run_code, "editors/rome.py", "__import__('pickle')"),
    (no_file_can_run_code, "editors/rome.py", "yaml.load(text)"),
    (no_file_can_run_code, "editors/rome.py", "from yaml import load\nload(text)"),
    (no_file_can_run_code, "editors/rome.py", "import yaml\nyaml.full_load(text)"),
    (no_file_can_run_code, "editors/rome.py", "import pandas as pd\npd.read_pickle('x')"),
    (no_file_can_run_code, "editors/rome.py", "frame.to_pickle('x')"),
    (no_file_can_run_code, "editors/rome.py", "import os\nos.popen('ls')"),
    (no_file_can_run_code, "editors/rome.py", "from os import system"),
    (no_file_can_run_code, "editors/rome.py", "import os\nos.execvp('ls', ['ls'])"),
    (no_file_can_run_code, "editors/rome.py", "import runpy\nrunpy.run_path('x')"),
    (no_file_can_run_code, "editors/rome.py", "subprocess.run('ls', shell=True)"),
    (no_file_can_run_code, "editors/rome.py", "np.load('x', allow_pickle=True)"),
    (no_file_can_run_code, "editors/rome.py", "AutoModel.from_pretrained('x', trust_remote_code=True)"),
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
        'METHODS = {"a": 1}\n__all__ = ["x"]\n\ndef f(trust_remote_code: bool) -> None:\n'
        "    torch.nn.Linear(1, 1).eval()\n    load(trust_remote_code=trust_remote_code, shell=False)\n"
        "    from safetensors.torch import load as read\n    re.compile(read(model.exec(execute.eval)))\n"
    )
    assert [rule(Source("editors/rome.py", good)) for rule in RULES] == [[] for _ in RULES]


def test_evaluate_and_tests_are_no_regular_packages() -> None:
    # With an __init__.py, `import evaluate` from the repository root would find ours before Hugging Face's.
    assert not (ROOT / "evaluate" / "__init__.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_no_yaml_names_code() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / "hparams").rglob("*.yaml")}
    assert texts, "no YAML was read"
    assert not [str(path) for path, text in texts.items() if re.search(r"_target_|errata\.[a-z]+\.", text)]


# --- circles --------------------------------------------------------------------------------------------------------


def imported_when_read(sources: list[Source]) -> dict[str, set[str]]:
    """By module: those of the library that Python reads before it, its functions' own imports left out."""
    modules = {module_of(source.path): source.tree for source in sources}
    found = {}
    for module, tree in modules.items():
        read = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
        names = [name for _, name in imports(read)]
        found[module] = {n if n in modules else n.rpartition(".")[0] for n in names} & modules.keys() - {module}
    return found


def module_of(path: str) -> str:
    parts = path.removeprefix("src/errata/").removesuffix(".py").split("/")
    return ".".join(["errata", *(part for part in parts if part != "__init__")])


def test_no_module_is_read_in_a_circle() -> None:
    graph = imported_when_read(library())
    assert sum(map(len, graph.values())) > 300
    TopologicalSorter(graph).prepare()


def test_a_circle_is_noticed() -> None:
    sources = [
        Source("editors/core/ledger/weight_sums.py", "from errata.editors.core.ledger import patch"),
        Source("editors/core/ledger/patch.py", "import torch\nfrom errata.editors.core.ledger.weight_sums import Sum"),
    ]
    with pytest.raises(CycleError):
        TopologicalSorter(imported_when_read(sources)).prepare()
