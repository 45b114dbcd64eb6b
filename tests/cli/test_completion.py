"""Completion in real shells: the keys that are typed, and the line that the shell makes of them."""

from __future__ import annotations

import io
import os
import pty
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from errata import editors
from errata.benchmarks.bench.compose import choices
from errata.cli import completion, edit, main, overrides
from errata.cli.commands import COMMANDS
from errata.cli.shells import SHELLS
from errata.editors.core.errors import ConfigError

SECONDS = 300.0  # for a shell to answer, on a machine that is busy with other things
# The keys, with TAB as \t, and the arguments that the command then gets.
TYPED = {
    "ben\tn_ed\t5": "bench n_edits=5",
    "bench editor=r_r\t": "bench editor=r_rome",
    "bench editor=rome,alph\t": "bench editor=rome,alphaedit",
    "bench -m protocol=seq\tn_ed\t3": "bench -m protocol=sequential n_edits=3",
    "bench dataset.sp\td\t": "bench dataset.split=dev",
    "bench experiment=testbed/so\t": "bench experiment=testbed/soak",
    "edit editor.fact_tok\tlas\t": "edit editor.fact_token=last",
    "bench dataset.path=fac\t": "bench dataset.path=facts.json",
    "methods alph\t": "methods alphaedit",
    "play\tpor\t1": "playground port=1",
    "status --j\t": "status --json",
    "convert hp\t": "convert hparams",
    "bench editor=nothing\t": "bench editor=nothing",
}


def script(shell: str) -> str:
    out = io.StringIO()
    assert main.run(["completion", shell], Console(file=out, width=80), Console(file=out)) == 0
    return out.getvalue()


@contextmanager
def terminal(arguments: list[str], folder: Path, environment: dict[str, str]) -> Iterator[int]:
    """Run a shell at its own terminal, and yield the other end of that terminal."""
    ours, theirs = pty.openpty()
    shell = subprocess.Popen(
        arguments,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=folder,
        env=os.environ | {"TERM": "dumb", "HISTFILE": "", "INPUTRC": os.devnull} | environment,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield ours
    finally:
        shell.kill()
        shell.wait()
        os.close(ours)


def until(end: int, pattern: str) -> str:
    """Read what the shell writes until the pattern is in it, and return the pattern's group."""
    text, last = "", time.monotonic() + SECONDS
    while not (found := re.search(pattern, text)):
        assert time.monotonic() < last, text
        text += os.read(end, 4096).decode(errors="replace")
    return found[1]


def typed_at(end: int, keys: str) -> str:
    """Type a line and return the arguments that the command gets. A shell keeps reading while it completes."""
    os.write(end, f"errata {keys}\n".encode())
    return until(end, r"GOT\[([^\]]*)\]").strip()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "facts.json").touch()
    return tmp_path


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes(folder: Path) -> None:
    start = script("bash") + "errata() { echo \"GOT[$*]\"; }\nPS1='READY> '\n"
    (folder / "rc").write_text(start, encoding="utf-8")
    with terminal(["bash", "--noprofile", "--rcfile", str(folder / "rc"), "-i"], folder, {}) as end:
        until(end, "(READY> )")
        assert {keys: typed_at(end, keys) for keys in TYPED} == TYPED


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh")
def test_zsh_completes(folder: Path) -> None:
    start = "autoload -Uz compinit\ncompinit -u -D\n" + script("zsh")
    start += "errata() { print -r -- \"GOT[$*]\"; }\nPS1='READY> '\nunsetopt beep\n"
    (folder / ".zshrc").write_text(start, encoding="utf-8")
    with terminal(["zsh", "-i"], folder, {"ZDOTDIR": str(folder)}) as end:
        until(end, "(READY> )")
        assert {keys: typed_at(end, keys) for keys in TYPED} == TYPED


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish")
def test_fish_completes(folder: Path) -> None:
    (folder / "errata.fish").write_text(script("fish"), encoding="utf-8")
    once = {keys[:-1]: line for keys, line in TYPED.items() if keys.find("\t") == len(keys) - 1}
    assert len(once) > 6
    for typed, line in once.items():
        asked = f"source errata.fish; complete -C 'errata {typed}'"
        environment = os.environ | {"HOME": str(folder)}
        found = subprocess.run(["fish", "-c", asked], cwd=folder, env=environment, capture_output=True, text=True)
        words = [word.split("\t")[0] for word in found.stdout.splitlines()]
        assert words == ([line.split()[-1]] if line != typed else []), typed


def test_every_command_is_completed_and_has_its_names_or_takes_files() -> None:
    words = completion.words_of(COMMANDS)
    assert set(words.commands) == {command.name for command in COMMANDS}
    assert set(words.names) <= set(words.commands)
    assert set(words.names["methods"]) == {*editors.METHODS, "--help"}
    assert set(words.values["editor"]) == set(editors.METHODS)
    for group in ("dataset", "protocol", "experiment"):
        assert set(words.values[group]) == set(choices(group))


@pytest.mark.parametrize(
    ("command", "yaml"), [(command.name, command.config) for command in COMMANDS if command.config is not None]
)
def test_every_name_of_an_override_that_is_completed_is_accepted(command: str, yaml: str) -> None:
    words, not_hydras = completion.words_of(COMMANDS), (*edit.TEXT_NAMES, "force", "trust_remote_code")
    names = [name for name in words.names[command] if name.endswith("=") and name[:-1] not in not_hydras]
    assert len(names) > 10
    typed = [f"{name}{words.values.get(name[:-1], ('null',))[0]}" for name in names]
    assert len(overrides.translated(typed, yaml)) == len(names)


def test_words_with_a_meaning_for_a_shell_are_left_out() -> None:
    assert completion._plain(["rome", "$(reboot)", "it's", "a b", "rome", "dataset.path="]) == ("rome", "dataset.path=")


@pytest.mark.parametrize("arguments", [[], ["tcsh"], ["bash", "zsh"]])
def test_the_error_for_another_shell_names_the_known_ones(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"expected a shell.*(zsh|did you mean)"):
        main.run(["completion", *arguments], Console(), Console())
    assert set(SHELLS) == {"bash", "zsh", "fish"}


def test_every_option_of_apply_is_offered() -> None:
    names = set(completion.words_of(COMMANDS).names["apply"])
    assert {"out=", "force=", "batch_size=", "device=", "trust_remote_code=", "model=", "editor=", "editor."} <= names
    assert {"editor.v_lr=", "model.revision=", "--dry-run", "--empty", "--help"} <= names
    assert "--cfg" not in names
