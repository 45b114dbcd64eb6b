"""Plain words: docstrings, comments, messages and pages avoid the words in BANNED, and every name is the present one.

BANNED gives for each word what to write in its place. Strings of the code count too, since they are messages.
"""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from source_files import ROOT

UNIT = "edit|run|line|mark|file|row|case|prompt|batch|token|weight|model|method|layer|record|probe|fact|page|command"
AMOUNT = "seconds|milliseconds|minutes|bytes|tokens|rows|lines|steps|passes|facts|vectors|probes|cells|objects"
NUMBER = r"an?|one|two|three|four|five|ten|\d+"

BANNED = {
    r"shall": "will, must, or the plain present",
    r"who(m)?(so)?ever": "anyone who, or who exactly",
    r"nobody(?! doubts)": "no one",
    r"somebody": "someone, or who exactly",
    r"anybody": "anyone",
    r"the very": "the same, exactly, or nothing",
    r"(?<!each.)(?<!first.)(?<!last.)(?<!most.)(?<!all.)of which": "a sentence of its own",
    r"such that": "so that",
    r"whatever it (is|was|be)": "which one exactly",
    r"so(-| )many(-th)?": "n, or the number",
    r"foretold|foretells?": "predicted",
    r"hence|thereof|therein|wherein|thereby|hereby|upon|nought": "a word of today",
    r"all the same": "still",
    rf"({NUMBER}) (?!(of|with|in|to|for|and|as|method) )[a-z]+ an? ({UNIT})": "per: one line per run",
    rf"({AMOUNT}) an? ({UNIT})": "per: seconds per edit",
    r"in the (first|last|second) so": "the first n",
    r"take[sn]? (it|them|this|that|one|these|those) (back|off)": "undo, roll back, remove",
    r"put(s|ting)? (it|them|this|that|these|those) (on|back)": "apply, restore",
}
# Names that the code had before, and those that it has now.
FORMER = {
    r"solve_together": "solve_batch",
    r"Outward": "the functions of editors/core/loading.py",
    r"benchmarks[./](harness|originals|keeping|knowing|asking)": "benchmarks/runs, bench, convert, facts",
    r"core[./](laws|tiny|durable|lines|notes|drafts|walk|sums|fold|hooks|blocks|targets|statistics)\b": "its room",
    r"(?<![\w-])test_house\.py": "tests/house",
}


STRINGS = {tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}


def prose(path: str, text: str) -> Iterator[tuple[int, str]]:
    """Yield everything in a file that is written for people, with its line.

    Args:
        path: Says by its suffix what the file is.
        text: Of the file.
    """
    if path.endswith(".py"):
        block, start = "", 0
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                start = start if block else token.start[0]
                block += f"{token.string}\n"
            elif token.type not in (tokenize.NL, tokenize.NEWLINE):
                yield start, block
                block = ""
            if token.type in STRINGS and re.search(r"\s", token.string):  # a word alone is a value
                yield token.start[0], token.string
    elif path.endswith((".md", ".ipynb")):
        yield 1, text
    else:
        for number, line in enumerate(text.splitlines(), 1):
            if "#" in line:
                yield number, line[line.index("#") :]


def across_lines(pattern: str) -> re.Pattern[str]:
    """Return the pattern with every space standing for a line break too, also that of a comment."""
    return re.compile(rf"\b({pattern.replace(' ', SPACE)})\b", re.IGNORECASE)


SPACE = r"(?:[ \t]+|[ \t]*\n[ \t#]*)"
PATTERNS = [(across_lines(pattern), instead) for pattern, instead in BANNED.items()]
ANY = across_lines("|".join(BANNED))


def found(path: str, text: str) -> list[str]:
    """Return what a file says in banned words, as PATH:LINE: WORDS -> what to write in their place."""
    problems = []
    for start, said in prose(path, text):
        for pattern, instead in PATTERNS if ANY.search(said) else ():
            for match in pattern.finditer(said):
                line = start + said.count("\n", 0, match.start())
                problems.append(f"{path}:{line}: {' '.join(match[0].split())!r} -> {instead}")
    for pattern, instead in FORMER.items():
        for match in re.finditer(pattern, text):
            line = 1 + text.count("\n", 0, match.start())
            problems.append(f"{path}:{line}: {match[0]!r} -> {instead}")
    return problems


SUFFIXES = (".py", ".md", ".ipynb", ".yaml", ".yml", ".toml", ".sh", ".cff")
NAMES = ("Makefile", "run")


def files() -> list[Path]:
    """Return every file of the checkout that people write, but this one and the data that tests read."""
    skipped = {".git", ".venv", "build", "dist", "runs", "data", "node_modules", "site"}
    chosen = []
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        if path.is_file() and not any(p in skipped and parts[:2] != ("benchmarks", "runs") for p in parts[:-1]):
            is_linked = any((ROOT / parent).is_symlink() for parent in path.relative_to(ROOT).parents)
            if not is_linked and path != Path(__file__) and (path.suffix in SUFFIXES or path.name in NAMES):
                chosen.append(path)
    return chosen


def test_no_file_uses_a_banned_word_or_a_former_name() -> None:
    paths = files()
    assert len(paths) > 300
    problems = []
    for path in paths:
        name = path.relative_to(ROOT).as_posix()
        problems += found(name, path.read_text(encoding="utf-8"))
    assert not problems, "\n".join(problems)


# --- controls -------------------------------------------------------------------------------------------------------

FLAGGED = [
    ("x.py", '"""What shall be edited."""'),
    ("x.py", "# whoever reads this"),
    ("x.py", "raise ValueError(f'{name} is known to nobody')"),
    ("x.py", '"""The\nvery same."""'),
    ("x.py", "# the\n# weights of\n# which"),
    ("x.py", '"""One\n    of\n    which."""'),
    ("x.py", "# a line a run"),
    ("x.py", '"""Draws a mark an edit."""'),
    ("x.py", "# 12 rows a batch"),
    ("x.md", "Seconds an edit, and 256 edits a line."),
    ("x.md", "Of the texts the first so many."),
    ("x.md", "Such that it is **hence** foretold."),
    ("x.md", "Undone, it takes them back and puts it on."),
    ("x.md", "`editor.solve_together(requests)`"),
    ("x.py", "from errata.benchmarks.harness import store"),
    ("x.py", "class Ledger(Outward): ..."),
    ("x.yaml", "n: 1  # whatever it was"),
]


@pytest.mark.parametrize(("path", "text"), FLAGGED)
def test_a_banned_word_or_a_former_name_is_noticed(path: str, text: str) -> None:
    assert found(path, text)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("x.py", '"""Write one line per run, in seconds per edit."""\nfor place in range(3):\n    shall = place'),
        ("x.py", "results['foretold_disabling'] = marshall(every)"),
        ("x.py", "# half of a row, a part of a run"),
        ("x.yaml", "shall: 1  # a value"),
        ("x.md", "# A method\n\nA method is one file."),
    ],
)
def test_plain_english_and_code_are_left_alone(path: str, text: str) -> None:
    assert not found(path, text)


def test_the_line_of_a_word_is_told() -> None:
    assert found("x.py", 'import re\n\n"""One.\n\nNobody."""')[0].startswith("x.py:5: 'Nobody'")
