"""No file can run code: nothing that unpickles, evaluates or trusts what it reads. Controls must be flagged."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
from source_files import ROOT, imports, library

BANNED_MODULES = ("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "runpy")
BANNED_BUILTINS = ("eval", "exec", "compile", "__import__")
# All but torch's by their last parts, whatever stands before them; safetensors.torch has a `load` of its own.
BANNED_NAMES = re.compile(
    r"^torch\.(load|save|jit\.load|hub\.load|distributed\.\w+_object(_list)?)$|(^|\.)(yaml\.(full_|unsafe_)?load(_all)?|read_pickle|to_pickle"
    r"|os\.(system|popen|exec[lv]\w*|(posix_)?spawn\w*)|subprocess\.get(status)?output|runpy\.run_\w+)$"
)
BANNED_KEYWORDS = ("shell", "allow_pickle", "trust_remote_code")


def meanings(tree: ast.Module) -> dict[str, str]:
    """Return, by name in a file, the full name that its imports give it."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def named(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and full name of everything that is imported, called or passed on by its name."""
    yield from imports(tree)
    known = meanings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            first, dot, rest = ast.unparse(node).partition(".")
            yield node.lineno, f"{known.get(first, first)}{dot}{rest}"


def runs_code(tree: ast.Module) -> list[str]:
    """Everything in a file that could run code from another file."""
    problems = [f"{line}: {name}" for line, name in imports(tree) if name.split(".")[0] in BANNED_MODULES]
    for line, name in named(tree):
        if name.removeprefix("builtins.") in BANNED_BUILTINS or BANNED_NAMES.search(name):
            problems.append(f"{line}: {name}")
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        for keyword in call.keywords:
            literal = isinstance(keyword.value, ast.Constant) and bool(keyword.value.value)
            if keyword.arg in BANNED_KEYWORDS and literal:
                problems.append(f"{call.lineno}: {keyword.arg}={ast.unparse(keyword.value)}")
    return problems


def test_no_file_of_the_library_can_run_code() -> None:
    sources = library()
    assert len(sources) > 100
    assert not [f"{source.path}:{problem}" for source in sources for problem in runs_code(source.tree)]


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from joblib import load",
        "import torch\ntorch.load('x')",
        "from torch import load\nload('x')",
        "from torch import load as read",
        "import torch as t\nt.load('x')",
        "import torch\nread = torch.load",
        "import torch\ntorch.hub.load('x', 'y')",
        "eval('1')",
        "import builtins\nbuiltins.exec('1')",
        "import builtins as b\nb.exec('1')",
        "from builtins import exec as run",
        "__import__('pickle')",
        "yaml.load(text)",
        "from yaml import load\nload(text)",
        "import yaml\nyaml.full_load(text)",
        "import pandas as pd\npd.read_pickle('x')",
        "frame.to_pickle('x')",
        "import os\nos.popen('ls')",
        "from os import system",
        "import os\nos.execvp('ls', ['ls'])",
        "import runpy\nrunpy.run_path('x')",
        "subprocess.run('ls', shell=True)",
        "np.load('x', allow_pickle=True)",
        "from torch import distributed as group\ngroup.all_gather_object(found, value)",
        "import torch\ntorch.distributed.broadcast_object_list(found)",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
    ],
)
def test_code_that_runs_other_code_is_noticed(text: str) -> None:
    assert runs_code(ast.parse(text))


def test_code_that_only_looks_alike_is_left_alone() -> None:
    good = (
        "torch.nn.Linear(1, 1).eval()\nload(trust_remote_code=trust_remote_code, shell=False)\n"
        "from safetensors.torch import load as read\nre.compile(read(model.exec(execute.eval)))\n"
    )
    assert not runs_code(ast.parse(good))


def test_no_yaml_names_code() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / "hparams").rglob("*.yaml")}
    assert texts, "no YAML was read"
    assert not [str(path) for path, text in texts.items() if re.search(r"_target_|errata\.[a-z]+\.", text)]
