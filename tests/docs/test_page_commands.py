"""Every command on a page of docs/ is run, or its words are understood where it speaks of a cluster, a GPU or a server.

Pages whose commands build on each other and on their Python are in test_pages.py; here are those whose commands run
one by one with smaller numbers, and the examples of `errata --help` and of the package's own text."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from published_records import KNOWEDIT
from rich.console import Console

import errata
from errata import editors
from errata.benchmarks.bench.compose import compose
from errata.benchmarks.datasets import world
from errata.benchmarks.speed.__main__ import main as measure_speed
from errata.benchmarks.speed.settings import SpeedConfig
from errata.cli import main, overrides
from errata.cli.commands import COMMANDS
from errata.cli.help import tour
from errata.editors.core.model.tokens import answer_ids, prompt_ids
from errata.playground import server

DOCS = Path(__file__).resolve().parents[2] / "docs"
# Pages whose commands another test runs, by the file that it is in.
ELSEWHERE = {
    "adding-a-dataset.md": "benchmarks/test_other_packages.py",
    "adding-a-method.md": "editors/test_adding_a_method.py",
    "benchmarks.md": "benchmarks/test_published_files.py",
    "calculating-with-edits.md": "docs/test_pages.py",
    "coming-from-easyedit.md": "docs/test_pages.py",
    "exporting.md": "docs/test_pages.py",
    "heads.md": "docs/test_pages.py",
    "information-flow.md": "docs/test_pages.py",
    "locating-facts.md": "docs/test_pages.py",
    "sharing.md": "docs/test_pages.py",
}
# What stands for the reader's own models, files and numbers.
SMALLER = {
    r"model=(gpt2-xl|path/or/id)": "model=world",
    r"dataset\.path=counterfact\.json": "dataset.path=data/counterfact.json",
    r"dataset\.path=FILE": "dataset.path=data/knowedit.json",
    r"tasks=arc_easy,lambada_openai": "tasks=world_facts",
    r"limit=\d+": "limit=4",
}
SCORES = ["generation.tokens=2", "generation.fluency_tokens=0", "collapse.known_facts=5", "collapse.n_texts=4"]
SCORES += ["dataset.probes=1"]
QUICK = {
    "bench": [*SCORES, "editor.v_num_grad_steps=3", "n_edits=1", "eval_every=1"],
    "train": ["steps=2", "held_out=3", "n_cases=12", "editor.accumulate_bs=2"],
}
SPEED = ["shape=tiny", "growth_shape=tiny", "requests=3", "steps=3", "batch=4", "earlier=10", "records=2", "texts=6"]
SPEED += ["keys=1500", "growth_to=12"]
NEEDS = {"ability": "lm_eval", "playground": "gradio"}
MOST_METHODS = 4  # a sweep of more is run with one method of each kind
MOST_RUNS = 2  # a sweep of more is run with one value of its last names, and two of its first
ONE_OF_EACH_KIND = ["rome", "grace", "mend"]
ON_ANOTHER_MACHINE = ("launcher=slurm", "device=cuda")


def commands(page: str) -> Iterator[list[str]]:
    """The commands of a page, as words; a line that ends with a backslash goes on."""
    for language, block in re.findall(r"```(\w*)\n(.*?)```", (DOCS / page).read_text("utf-8"), flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if not language and line.startswith(("errata ", "python -m errata")):
                yield shlex.split(line, comments=True)


# What a run draws of itself, and how pictures are rendered, tests/benchmarks/test_report.py proves.
pytestmark = pytest.mark.usefixtures("_nothing_drawn", "_nothing_rendered")


HERE = sorted(page.name for page in DOCS.glob("*.md") if page.name not in ELSEWHERE and list(commands(page.name)))


def put_the_readers_files(folder: Path, lines: list[list[str]], console: Console) -> None:
    """A folder of edits where a command reads it, a task of lm-eval's, and files of CounterFact's and KnowEdit's."""
    fact = {"prompt": "The capital of {} is", "subject": "Gavaria", "target": "Praminster"}
    (folder / "facts.yaml").write_text(yaml.safe_dump({"facts": [fact]}))
    if any("facts.edits" in words for words in lines):
        assert main.run(["apply", "facts.yaml", "model=world"], console, console) == 0
    (folder / "folder").mkdir()
    (folder / "folder" / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: " + str(folder / "mine.jsonl") + "\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: question\ndoc_to_choice: choices\n"
        "doc_to_target: 0\nmetric_list:\n  - metric: acc\n"
    )
    asked = [{"question": question, "choices": choices} for question, choices in world.questions()[:4]]
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, asked)))
    (folder / "data").mkdir()
    (folder / "data" / "counterfact.json").write_text(json.dumps(world.records("counterfact")[:3]))
    other = {**KNOWEDIT, "subject": "Quelm", "prompt": "The capital of Quelm is"}
    (folder / "data" / "knowedit.json").write_text(json.dumps([KNOWEDIT, other]))


def understood(words: list[str]) -> str | None:
    """Check that the names and values of a command that is not run exist; return its method."""
    if words[0] == "python":
        SpeedConfig.parsed(words[3:])
        return None
    found = compose("bench", overrides.translated([word for word in words[2:] if word != "-m"], "bench"))
    assert found["editor"]["name"]
    return str(found["editor"]["name"])


def served(page: Any, port: int) -> SimpleNamespace:
    """In place of serving a page until Ctrl-C."""
    assert page is not None
    return SimpleNamespace(url=f"http://{server.HOST}:{port}/", wait=lambda: None)


def methods(words: list[str]) -> list[str]:
    """The methods that a command names; none where it takes those of its defaults or of its experiment."""
    return next((word.partition("=")[2].split(",") for word in words if word.startswith("editor=")), [])


def fewer_methods(words: list[str]) -> list[str]:
    """A long sweep with one method of each kind, one of them trained; the names of all are understood."""
    if len(methods(words)) <= MOST_METHODS:
        return words
    for method in methods(words):
        alone = {"editor": f"editor={method}"}
        one = [alone.get(word.partition("=")[0], word.split(",")[0]) for word in words]
        assert understood(one) == method
    kept = [method for method in methods(words) if method in ONE_OF_EACH_KIND]
    assert kept == ONE_OF_EACH_KIND
    return [f"editor={','.join(kept)}" if word.startswith("editor=") else word for word in words]


def fewer_runs(words: list[str]) -> list[str]:
    """A long sweep with the last values of its names: two of its first, else one. That the others are understood is
    checked."""
    swept = {place: word for place, word in enumerate(words) if "-m" in words and re.match(r"[\w.]+=[^\[]*,", word)}
    first = [word.split(",")[0] if place in swept else word for place, word in enumerate(words)]
    while math.prod(word.count(",") + 1 for word in swept.values()) > MOST_RUNS:
        place, word = swept.popitem()
        name, _, values = word.partition("=")
        most = 1 if swept else MOST_RUNS
        others, kept = values.split(",")[:-most], values.split(",")[-most:]
        for other in others:
            understood([*first[:place], f"{name}={other}", *first[place + 1 :]])
        words = [*words[:place], f"{name}={','.join(kept)}", *words[place + 1 :]]
    return words


def carried_out(words: list[str], console: Console) -> int:
    if words[0] == "python":
        if not words[3:]:  # all phases, which tests/benchmarks/test_speed.py measures by the same command
            console.print(SpeedConfig.parsed([]))
            return 0
        asked = [word for word in words[3:] if not word.startswith(("shape=", "requests="))]
        return measure_speed(asked if "--help" in asked else [*SPEED, *asked], console)
    words = fewer_runs(fewer_methods(words))
    fields = [{field.name for field in dataclasses.fields(editors.get(name).Config)} for name in methods(words)]
    quick = [
        word
        for word in QUICK.get(words[1], [])
        if not word.startswith("editor.") or all(word[len("editor.") :].split("=")[0] in names for names in fields)
    ]
    if any(word.startswith("ability.tasks=") for word in words):
        quick.append("ability.limit=4")
    names = {word.partition("=")[0] for word in quick}
    smaller = [word for word in words[1:] if word.partition("=")[0] not in names]
    for pattern, value in SMALLER.items():
        smaller = [re.sub(f"^{pattern}$", value, word) for word in smaller]
    return main.run([*smaller, *quick], console, console)


def go_to(folder: Path, lines: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder; where a method is trained, also with a cache of its own. It holds the second moments that other
    tests have computed, and no trained method yet."""
    monkeypatch.chdir(folder)
    if any(words[1] == "train" for words in lines):
        shared, own = Path(os.environ["ERRATA_CACHE"]), folder / "cache"
        own.mkdir()
        for pattern in ("*.json", "*.safetensors"):  # an entry's tensors are there before its JSON
            for path in shared.glob(pattern):
                with suppress(FileNotFoundError):  # what another process has replaced meanwhile
                    os.link(path, own / path.name)
        monkeypatch.setenv("ERRATA_CACHE", str(own))


# Five to ten seconds each. The sweep of the testbed's page also runs whole in the slow test of test_readme.py.
SLOW = ("results-on-the-testbed.md", "results.md", "experiments.md")


@pytest.mark.parametrize("page", [pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW)) for page in HERE])
def test_the_commands_of_the_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_to(tmp_path, list(commands(page)), monkeypatch)
    out = io.StringIO()
    console = Console(file=out, width=160)
    for command, package in NEEDS.items():
        if any(words[1] == command for words in commands(page)):
            pytest.importorskip(package, reason=f"errata {command} needs {package}, which is not installed")
    monkeypatch.setattr(server, "serve", served)
    put_the_readers_files(tmp_path, list(commands(page)), console)
    for words in commands(page):
        if any(name in word for name in ON_ANOTHER_MACHINE for word in words):
            understood([word.replace("editor=rome,memit,alphaedit", "editor=rome") for word in words])
            continue
        out.seek(0)
        out.truncate()
        assert carried_out(words, console) == 0, (words, out.getvalue())
        assert out.getvalue().strip()
    runs = errata.load_results(tmp_path) if list(tmp_path.rglob("results.json")) else []
    assert len(runs) >= sum(words[1] == "bench" and "launcher=slurm" not in words for words in commands(page))


def test_the_commands_of_the_help_run_and_their_edit_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "MOST_RUNS", 4)  # a later command compares two runs of the sweep
    lines = [shlex.split(line) for line in tour(COMMANDS)]
    go_to(tmp_path, lines, monkeypatch)
    console = Console(file=io.StringIO(), width=160)
    put_the_readers_files(tmp_path, lines, console)
    assert len(lines) > 5
    for words in lines:
        out = io.StringIO()
        assert carried_out(words, Console(file=out, width=160)) == 0, (words, out.getvalue())
        assert "did not take" not in out.getvalue(), words


def test_the_edit_of_the_package_s_own_text_takes() -> None:
    *lines, last = [line.strip() for line in str(errata.__doc__).splitlines() if line.startswith("    ")]
    there: dict[str, Any] = {}
    exec("\n".join(lines), there)
    tokenizer, request = there["tokenizer"], there["request"]
    ids = prompt_ids(tokenizer, f"{request.text} {request.target}")
    answer = answer_ids(tokenizer, "x", request.target)
    with torch.no_grad():
        said = there["model"](torch.tensor([ids])).logits[0].argmax(-1)[-len(answer) - 1 : -1].tolist()
    assert said == answer
    exec(last, there)


def test_every_page_with_commands_is_run_by_a_test() -> None:
    pages = {page.name for page in DOCS.glob("*.md") if list(commands(page.name))}
    assert pages == {*HERE, *ELSEWHERE}
    for page, test in ELSEWHERE.items():
        assert page in (Path(__file__).resolve().parents[1] / test).read_text(encoding="utf-8"), page
