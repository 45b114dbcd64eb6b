"""The page on promises names tests that there are, and has a row for each promise."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PAGE = TESTS.parent / "docs" / "promises.md"


def parts() -> tuple[str, str]:
    """The promises, and their figures."""
    promises, figures = PAGE.read_text(encoding="utf-8").split("## Last full figures")
    return promises, figures


def rows() -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in parts()[0].splitlines() if re.match(r"\| \d+ \|", line)]


def test_every_promise_has_a_row_with_its_tests_and_numbers() -> None:
    assert [row[0] for row in rows()] == [str(number) for number in range(1, 18)]
    assert all(len(row) == 5 and all(row) for row in rows())


def test_every_test_that_the_page_names_exists_where_it_says() -> None:
    named = 0
    for row in rows():
        for file, tests in re.findall(r"`((?:\w+/)?test_\w+\.py)`: ((?:`\w+`(?:, )?)+)", row[2]):
            source = (TESTS / file).read_text(encoding="utf-8")
            for name in re.findall(r"`(\w+)`", tests):
                assert f"def {name}(" in source, (file, name)
                named += 1
    assert named > 25


def test_every_promise_has_its_last_full_figure_or_says_that_there_is_none() -> None:
    told = [int(number) for number in re.findall(r"^\| (\d+) \| \S", parts()[1], flags=re.MULTILINE)]
    assert sorted(set(told)) == list(range(1, 18))
