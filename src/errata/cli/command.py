"""The record of a command. Its help, its completion and the list of commands in the documentation are made from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# Groups of the overview, in its order.
MEASURE, FILES, TOOLS = "Edit and measure", "Facts and edits as files", "Tools"
GROUPS = (MEASURE, FILES, TOOLS)
Run = Callable[[Sequence[str], "Console", "Console"], int]


@dataclass(frozen=True)
class Option:
    """Something that can follow a command.

    Attributes:
        usage: How it is typed: "out=FOLDER", "--json", or several spellings, as in "-m, --multirun".
        help: What it does, in one line.
        choices: The values that can follow its `=`, where they are known.
    """

    usage: str
    help: str
    choices: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        """Return the flags as they are typed, or the name with its `=`."""
        spellings = self.usage.split(", ")
        return tuple(text if text.startswith("-") else f"{text.partition('=')[0]}=" for text in spellings)


@dataclass(frozen=True)
class Command:
    """What can be typed after `errata`.

    Attributes:
        name: The word that chooses it.
        usage: What follows the name, one entry per form of the command.
        summary: One sentence.
        group: Its heading in the overview, one of `GROUPS`.
        run: Carries it out with the arguments after its name, the console for results and the console for everything
            else. It returns the exit code.
        options: What it takes besides the overrides of Hydra.
        overrides: Overrides of Hydra that its help explains.
        config: The YAML in hparams/ whose values its overrides change; None where Hydra has no part in it.
        notes: Paragraphs that its help shows below the usage.
        examples: Complete command lines.
        exit_codes: Codes with a special meaning for it.
        choices: Returns the words, other than files, that can follow it.
        as_overrides: Returns typed values as overrides of `config`, where the command has names of its own for them.
            The second argument is whether they are a sweep.
        needs_arguments: Whether it shows its help where no argument is given.
        resumes: Whether the same command continues what Ctrl-C has stopped.
    """

    name: str
    usage: tuple[str, ...]
    summary: str
    group: str
    run: Run
    options: tuple[Option, ...] = ()
    overrides: tuple[Option, ...] = ()
    config: str | None = None
    notes: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    exit_codes: tuple[tuple[int, str], ...] = ()
    choices: Callable[[], Iterable[str]] = tuple
    as_overrides: Callable[[Sequence[str], bool], Sequence[str]] = lambda given, _sweep: given
    needs_arguments: bool = False
    resumes: bool = False

    @property
    def flags(self) -> tuple[str, ...]:
        """Return the options that begin with a dash."""
        return tuple(word for option in self.options for word in option.words if word.startswith("-"))

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the options that take a value, without the `=`."""
        return tuple(word[:-1] for option in self.options for word in option.words if word.endswith("="))


# Options that several commands share.
AS_JSON = Option("--json", "print JSON instead of a table")
SHOW_CONFIGURATION = Option("--cfg", "print the configuration that would be used, and do nothing")
MODEL = Option("model=MODEL", "the model, as for `errata edit`")
CHAT = Option("chat=true", "ask in the model's chat template", ("true", "false"))
DATASET_FILE = Option("dataset.path=FILE", "read the dataset from a file")
HALF = Option("dataset.split=dev", "only one half of the testbed's cases", ("dev", "test"))
METHOD_FIELD = Option("editor.FIELD=VALUE", "set a field of the method; `errata methods rome` lists ROME's")
