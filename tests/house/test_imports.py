"""Imports run downward only: FLOORS says which room stands on which floor, and no module or room is in a circle.

Every import counts: at the top of a file, inside a function, and a module's full name in a string, as registries have
it. Imports under `if TYPE_CHECKING:` do not run and do not count, but in an `__init__.py`, which makes them on request.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter

import pytest
from source_files import Source, imports, imports_when_run, library

# Lowest first. A room is a folder, or a file that stands by itself. It imports from lower floors and from itself.
FLOORS: tuple[tuple[str, ...], ...] = (
    (
        "hparams/",
        "editors/core/errors.py",
        "editors/core/progress.py",
        "editors/core/dtypes.py",
        "editors/core/config_docs.py",
        "editors/core/work_clock.py",
        "editors/core/rank_messages.py",
    ),
    (
        "editors/core/ranks.py",
        "editors/core/config.py",
        "editors/core/doubts.py",
        "editors/core/request.py",
        "editors/core/files/",
        "editors/core/solve/",
    ),
    ("editors/core/model/", "editors/core/extensions.py"),
    ("editors/core/ledger/",),
    ("editors/core/algebra/",),
    ("editors/core/forward/", "editors/core/moments/", "editors/core/storage/", "editors/core/brakes/"),
    ("editors/core/edit.py", "editors/core/locating/", "editors/core/interventions/"),
    ("editors/core/editor.py", "editors/core/loading.py", "editors/core/difference.py", "editors/core/head_scaling.py"),
    ("editors/core/families/",),
    ("editors/core/codebook/", "editors/core/contexts/", "editors/core/side_memory/", "editors/core/steering/"),
    ("editors/core/__init__.py",),
    ("src/errata/gguf_models.py", "src/errata/fetched_models.py"),
    ("editors/", "evaluate/", "src/errata/models.py"),
    ("benchmarks/testbed/",),
    ("benchmarks/datasets/", "benchmarks/ability/gu_tasks/"),
    ("benchmarks/ability/",),
    ("benchmarks/runs/",),
    ("benchmarks/reports/",),
    ("benchmarks/tracing/",),
    ("benchmarks/bench/",),
    ("benchmarks/training/", "benchmarks/facts/", "benchmarks/convert/", "benchmarks/tuning/"),
    ("benchmarks/__init__.py", "benchmarks/speed/"),
    ("src/errata/__init__.py", "src/errata/testing/"),
    ("src/errata/playground/",),
    ("src/errata/cli/",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# What a room leaves alone although it is lower: a report loads no model, and only bench runs a bench.
NEVER: Mapping[str, tuple[str, ...]] = {
    "benchmarks/runs/": ("benchmarks/testbed/",),
    "benchmarks/reports/": ("src/errata/models.py", "editors/", "benchmarks/testbed/"),
    "benchmarks/bench/": ("benchmarks/testbed/",),
    "benchmarks/convert/": (
        "benchmarks/testbed/",
        "benchmarks/runs/",
        "benchmarks/reports/",
        "benchmarks/bench/execution.py",
        "benchmarks/bench/protocols.py",
        "benchmarks/bench/sequences.py",
    ),
    "benchmarks/training/": ("benchmarks/testbed/", "benchmarks/bench/execution.py"),
}

# Names in strings that point upward, each with a reason.
BY_NAME = {
    # A record on the disk names its kind of adapter, which the ledger imports when it meets one.
    ("editors/core/ledger/adapter.py", "editors/core/codebook/codebook.py"),
    ("editors/core/ledger/adapter.py", "editors/core/contexts/context.py"),
    ("editors/core/ledger/adapter.py", "editors/core/side_memory/hook_layers.py"),
    ("editors/core/ledger/adapter.py", "editors/core/side_memory/key_masks.py"),
    ("editors/core/ledger/adapter.py", "editors/core/side_memory/shards.py"),
    ("editors/core/ledger/adapter.py", "editors/core/steering/affine.py"),
    # `errata.load("world")` finds the bundled weights beside the testbed's package, and runs none of its code.
    ("src/errata/models.py", "benchmarks/testbed/__init__.py"),
}

Edges = dict[str, dict[str, int]]  # path -> path that it imports -> line


def edges(sources: list[Source]) -> Edges:
    """Which file of the library imports which, with the line."""
    paths = {source.module: source.path for source in sources}
    found: Edges = {source.path: {} for source in sources}
    for source in sources:
        for line, name in imports_of(source):
            target = paths.get(name) or paths.get(name.rpartition(".")[0])
            if target is not None and target != source.path:
                found[source.path].setdefault(target, line)
        for line, name in strings(source.tree):
            if name in paths and paths[name] != source.path and (source.path, paths[name]) not in BY_NAME:
                found[source.path].setdefault(paths[name], line)
    return found


def imports_of(source: Source) -> Iterator[tuple[int, str]]:
    """What a file imports when it runs; of a face, also the names under TYPE_CHECKING, which it imports on request."""
    return (imports if source.path.endswith("__init__.py") else imports_when_run)(source.tree)


def strings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every string that may be a module's full name, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("errata."):
            yield node.lineno, node.value


def room(path: str) -> str:
    """The room of a file."""
    return path if path in FLOOR else f"{path.rpartition('/')[0]}/"


def upward(graph: Edges) -> list[str]:
    """Imports from the same or a higher floor, of another room."""
    return [
        f"{path}:{line} imports {target}"
        for path, targets in graph.items()
        for target, line in targets.items()
        if room(path) != room(target) and FLOOR[room(path)] <= FLOOR[room(target)]
    ]


def forbidden(graph: Edges) -> list[str]:
    """Imports that NEVER names."""
    return [
        f"{path}:{line} imports {target}"
        for path, targets in graph.items()
        for target, line in targets.items()
        if {room(target), target} & set(NEVER.get(room(path), ()))
    ]


def circle(graph: Mapping[str, Mapping[str, int]]) -> list[str]:
    """A circle of imports, first and last the same; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def rooms(graph: Edges) -> Edges:
    """Which room imports which."""
    found: Edges = {}
    for path, targets in graph.items():
        for target, line in targets.items():
            if room(path) != room(target):
                found.setdefault(room(path), {}).setdefault(room(target), line)
    return found


# --- the library ----------------------------------------------------------------------------------------------------


def test_every_file_has_a_room_and_every_room_has_files() -> None:
    found = {room(source.path) for source in library()}
    assert found == set(FLOOR), "give the room a floor in FLOORS, or move the file"


def test_imports_run_downward_only() -> None:
    graph = edges(library())
    assert sum(map(len, graph.values())) > 400
    assert not (problems := upward(graph)), "\n".join(problems)


def test_rooms_leave_alone_what_they_never_import() -> None:
    assert not (problems := forbidden(edges(library()))), "\n".join(problems)


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert not (found := circle(edges(library()))), " -> ".join(found)


def test_no_rooms_import_each_other_in_a_circle() -> None:
    assert not (found := circle(rooms(edges(library())))), " -> ".join(found)


def test_every_exception_is_still_needed() -> None:
    modules = {source.path: source for source in library()}
    for path, target in BY_NAME:
        assert modules[target].module in {name for _, name in strings(modules[path].tree)}
    for named in (name for path, targets in NEVER.items() for name in (path, *targets)):
        assert named in FLOOR or named in modules


# --- controls -------------------------------------------------------------------------------------------------------

LEDGER, ROME, PATCH = "editors/core/ledger/ledger.py", "editors/rome.py", "editors/core/ledger/patch.py"
SCORING, RUN, PAGE = "evaluate/scoring.py", "benchmarks/bench/execution.py", "benchmarks/reports/page.py"
OTHERS = (LEDGER, ROME, PATCH, SCORING, RUN, PAGE, "editors/__init__.py", "src/errata/__init__.py")
MORE = ("src/errata/cli/main.py", "src/errata/models.py", "benchmarks/datasets/world.py", "editors/core/edit.py")


def graph_with(path: str, text: str) -> Edges:
    """The imports of a library of empty files in which one file holds this text."""
    return edges([Source(other, text if other == path else "") for other in (*OTHERS, *MORE)])


UPWARD = [
    (LEDGER, "from errata.editors.rome import ROME"),
    (LEDGER, "from errata.editors import ROME"),
    (LEDGER, "def f():\n    from errata.editors.core.edit import Edit"),
    (LEDGER, "def f():\n    from errata.evaluate import scoring"),
    (LEDGER, "def f():\n    from errata.benchmarks.bench import execution"),
    ("editors/__init__.py", "if TYPE_CHECKING:\n    from errata.evaluate import scoring"),
    (LEDGER, "import importlib\nimportlib.import_module('errata.editors.rome')"),
    (LEDGER, "if TYPE_CHECKING:\n    import torch\nelse:\n    from errata.editors.rome import ROME"),
    (ROME, "import errata.evaluate.scoring"),
    (ROME, "from errata.benchmarks.datasets.world import cases"),
    (SCORING, "from errata.editors.rome import ROME"),
    (SCORING, "from errata import models"),
    (RUN, "from errata.cli.main import main"),
    (RUN, "import errata"),
    (PAGE, "from errata.benchmarks.bench import execution"),
    ("benchmarks/datasets/world.py", "from errata.benchmarks.reports import page"),
]


@pytest.mark.parametrize(("path", "text"), UPWARD)
def test_an_import_upward_is_noticed(path: str, text: str) -> None:
    assert len(upward(graph_with(path, text))) == 1


@pytest.mark.parametrize("text", ["from errata import models", "def f():\n    from errata.editors.rome import ROME"])
def test_an_import_of_what_a_room_leaves_alone_is_noticed(text: str) -> None:
    graph = graph_with(PAGE, text)
    assert len(forbidden(graph)) == 1
    assert not upward(graph)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (ROME, "from errata.editors.core.ledger import patch, ledger"),
        (LEDGER, "from errata.editors.core.ledger.patch import Patch"),
        (LEDGER, "if TYPE_CHECKING:\n    from errata.editors.rome import ROME"),
        (RUN, "from errata import models\nfrom errata.evaluate import scoring"),
    ],
)
def test_imports_downward_and_for_types_are_left_alone(path: str, text: str) -> None:
    assert not upward(graph_with(path, text))


def test_a_circle_of_modules_is_noticed_where_only_a_function_closes_it() -> None:
    sources = [
        Source(LEDGER, "from errata.editors.core.ledger import patch"),
        Source(PATCH, "import torch\n\ndef f():\n    from errata.editors.core.ledger.ledger import Ledger"),
    ]
    assert set(circle(edges(sources))) == {LEDGER, PATCH}
    assert not upward(edges(sources))


def test_a_circle_of_rooms_without_a_circle_of_modules_is_noticed() -> None:
    sources = [
        Source(LEDGER, "from errata.editors.core.model import tokens"),
        Source("editors/core/model/tokens.py", ""),
        Source("editors/core/model/digests.py", "from errata.editors.core.ledger import patch"),
        Source(PATCH, ""),
    ]
    graph = edges(sources)
    assert not circle(graph)
    assert set(circle(rooms(graph))) == {"editors/core/ledger/", "editors/core/model/"}


def test_a_file_outside_every_room_has_no_floor() -> None:
    assert room("editors/core/helpers.py") not in FLOOR
    assert room("benchmarks/new/thing.py") not in FLOOR
