"""The list of commands as Markdown, for the documentation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from errata.cli.command import GROUPS, Command

# The list stands between these lines of a page.
BEGIN, END = "<!-- commands -->", "<!-- /commands -->"


def table(commands: Sequence[Command]) -> str:
    """Return a table of all commands, with one row per command."""
    rows = ["| command | what it does |", "|---|---|"]
    for group in GROUPS:
        rows += [f"| `errata {each.name}` | {each.summary} |" for each in commands if each.group == group]
    return "\n".join(rows) + "\n"


def reference(commands: Sequence[Command]) -> str:
    """Return the table, and for each command a section with its usage, notes, options and exit codes."""
    sections = (line for group in GROUPS for each in commands if each.group == group for line in _section(each))
    return table(commands) + "\n".join(["", *sections]) + "\n"


def filled_in(page: str, text: str) -> str:
    """Return a page with a text between its two marks.

    Raises:
        ValueError: The page does not have the two marks.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{text}{END}{after}"


def _section(command: Command) -> Iterator[str]:
    yield from (f"## errata {command.name}", "", command.summary, "")
    yield from (f"- `{f'errata {command.name} {form}'.rstrip()}`" for form in command.usage)
    for note in command.notes:
        yield from ("", *(line.strip() for line in note.splitlines()))
    rows = [(option.usage, option.help) for option in (*command.options, *command.overrides)]
    if rows:
        yield from ("", "| option | what it does |", "|---|---|")
        yield from (f"| `{_cell(left)}` | {_cell(right)} |" for left, right in rows)
    if command.exit_codes:
        yield from ("", "| exit code | meaning |", "|---:|---|")
        yield from (f"| {code} | {_cell(meaning)} |" for code, meaning in command.exit_codes)
    yield ""


def _cell(text: str) -> str:
    """Return a text that cannot end its cell of the table."""
    return text.replace("|", "\\|")
