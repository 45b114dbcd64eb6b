"""The records of the commands: help, completion and the pages of the documentation follow from them."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typed_commands import run

from errata import editors
from errata.cli import command_table, overrides
from errata.cli.arguments import parse
from errata.cli.command import GROUPS, Command, Option
from errata.cli.commands import COMMANDS, find
from errata.cli.help import TOUR, overview, tour, usage
from errata.cli.method_sources import ClassSources
from errata.editors.core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
NAMES = [command.name for command in COMMANDS]


# --- records ----------------------------------------------------------------------------------------------------------


def test_every_command_has_a_file_of_its_own_with_its_record() -> None:
    assert len(set(NAMES)) == len(NAMES)
    files = [inspect.getsourcefile(inspect.unwrap(getattr(command.run, "func", command.run))) for command in COMMANDS]
    stems = [Path(str(file)).stem for file in files]
    assert stems == ["list_edits" if name == "list" else name for name in NAMES]


@pytest.mark.parametrize("command", COMMANDS, ids=NAMES)
def test_a_record_says_in_one_sentence_and_in_short_lines_what_a_command_takes(command: Command) -> None:
    assert command.group in GROUPS
    assert command.summary[0].isupper()
    assert command.summary.endswith(".")
    assert ". " not in command.summary
    assert command.usage
    lines = list(usage(command))
    assert all("\n" not in line for line in lines if line not in command.notes)
    assert max(len(line) for text in lines for line in text.splitlines()) <= 120
    words = [word for option in command.options for word in option.words]
    assert len(set(words)) == len(words)


@pytest.mark.parametrize("command", COMMANDS, ids=NAMES)
def test_the_examples_of_a_command_use_names_that_it_takes(command: Command) -> None:
    assert command.examples or command.name == "completion"
    for line in command.examples:
        errata, name, *arguments = shlex.split(line)
        assert (errata, name) == ("errata", command.name)
        if command.config is None:
            fields = [word.partition("=")[0] for word in arguments if word.startswith("editor.")]
            assert not fields or command.name == "playground"  # the one command that takes a method's fields itself
            given = parse(arguments, command, also=fields)
            assert given.words or given.values or command.name in TOOLS
        else:
            given = [word for word in arguments if "=" in word and word.partition("=")[0] not in command.names]
            sweep = "-m" in arguments
            overrides.translated(command.as_overrides(given, sweep), command.config, sweep=sweep)


TOOLS = ("methods", "playground")  # commands that need no argument


def test_the_overview_lists_every_command_once_below_its_group() -> None:
    text = overview(COMMANDS)
    positions = [text.index(f"\n{group}:\n") for group in GROUPS]
    assert positions == sorted(positions)
    for command in COMMANDS:
        lines = [line for line in text.splitlines() if line.split()[:2] == ["errata", command.name]]
        assert sum(line.endswith(command.summary) for line in lines) == 1
    assert set(TOUR) <= set(NAMES)
    assert all(f"  {line}\n" in text for line in tour(COMMANDS))


def test_help_of_a_command_can_be_asked_for_in_three_ways() -> None:
    assert run("merge", "--help") == run("merge", "-h") == run("help", "merge") == run("merge")


def test_help_shows_the_values_that_the_overrides_beside_it_give() -> None:
    assert re.search(r"^n_edits: 7\b", run("bench", "n_edits=7", "--help"), flags=re.MULTILINE)
    assert "  name: memit\n" in run("apply", "facts.yaml", "editor=memit", "out=x", "--help")
    with pytest.raises(ConfigError, match="did you mean 'n_edits'"):
        run("bench", "n_edit=7", "--help")


# --- arguments --------------------------------------------------------------------------------------------------------

COPY = Command(
    name="copy",
    usage=("FILE",),
    summary="Copy.",
    group=GROUPS[0],
    run=lambda *_: 0,
    options=(Option("out=FILE", "where"), Option("-f, --force", "always"), Option("--dry", "never")),
)


def test_arguments_are_sorted_into_words_values_and_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1").touch()
    found = parse(["a", "out=b=c", "-f", "x/y=z", "lr=1"], COPY)
    assert found.words == ("a", "x/y=z", "lr=1")
    assert found.values == {"out": "b=c"}
    assert found.flags == {"-f"}
    with pytest.raises(ConfigError, match="unknown name 'ot'; did you mean 'out'"):
        parse(["ot=b"], COPY)
    with pytest.raises(ConfigError, match="unknown option '--wet'; there are -f, --force and --dry"):
        parse(["--wet"], COPY)


def test_a_command_without_values_takes_every_word_as_a_path() -> None:
    assert parse(["a=b"], find("list")).words == ("a=b",)


# --- what is imported -------------------------------------------------------------------------------------------------


WITHOUT_TORCH = (
    "--help",
    "--version",
    "bench --help",
    "edit editor=memit --help",
    "apply --help",
    "train --cfg",
    "export --help",
    "playground --help",
    "methods",
    "nothing",
    "bench n_edit=3",
    "bench editor=rme",
    "merge a",
    "list no/such/folder",
)
# One new interpreter answers all of them; after each it says whether it has imported torch.
ASKED = """
import contextlib, io, json, sys
from errata.cli.main import main
for line in sys.argv[1:]:
    out, err, sys.argv = io.StringIO(), io.StringIO(), ["errata", *line.split()]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        main()
    print(json.dumps([line, "torch" in sys.modules, out.getvalue(), err.getvalue()]))
"""


def test_help_lists_and_complaints_about_words_import_no_torch() -> None:
    asked = subprocess.run([sys.executable, "-c", ASKED, *WITHOUT_TORCH], capture_output=True, text=True, check=False)
    assert asked.returncode == 0, asked.stderr
    answers = [json.loads(line) for line in asked.stdout.splitlines()]
    assert [line for line, *_ in answers] == list(WITHOUT_TORCH)
    for line, has_torch, out, err in answers:
        assert not has_torch, line
        assert out or err.startswith("errata: "), line


def test_methods_are_listed_from_their_sources_as_their_classes_say() -> None:
    sources = ClassSources()
    for name in editors.METHODS:
        method, home = editors.get(name), editors.home(name)
        assert home is not None
        assert sources.needs_subject(*home) == method.needs_subject, name
        assert sources.summary(*home) == " ".join(str(inspect.getdoc(method)).split("\n\n")[0].split()), name
    assert {sources.needs_subject(*home) for name in editors.METHODS if (home := editors.home(name))} == {True, False}


# --- the documentation ------------------------------------------------------------------------------------------------


def test_the_page_of_commands_is_what_the_records_say() -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    written = command_table.filled_in(page, command_table.reference(COMMANDS))
    assert page == written, "run: python tests/support/write_commands_page.py"


def test_a_list_of_commands_in_the_readme_is_what_the_records_say() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    if command_table.BEGIN in readme:
        assert readme == command_table.filled_in(readme, command_table.table(COMMANDS))
    with pytest.raises(ValueError, match="has no <!-- commands -->"):
        command_table.filled_in("a page", "")
