"""Long work shows its progress where there is no terminal for a bar."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import pytest
from rich.console import Console

from errata.cli import main, progress_bars
from errata.cli.messages import shown_warnings
from errata.editors.core.errors import DoubtfulEditWarning


def test_without_a_terminal_a_bench_says_how_many_edits_and_then_a_tenth_or_thirty_seconds_at_a_time() -> None:
    said: list[str] = []
    seconds = [0.0]
    lines = progress_bars.PlainProgress(said.append, clock=lambda: seconds[0])
    lines(0, 40, "edits")
    for done in range(1, 13):
        lines(1, 25, "values of 4 requests")
        lines(done, 40, "edits")
    assert said == ["edits: 0 of 40, 0:00:00", *(f"edits: {done} of 40, 0:00:00" for done in (4, 8, 12))]
    seconds[0] = 29.0
    lines(13, 40, "edits")
    lines(3, 25, "values of 4 requests")
    assert len(said) == 4
    seconds[0] = 31.0
    lines(4, 25, "values of 4 requests")
    lines(14, 40, "edits")
    assert said[4:] == ["values of 4 requests: 4 of 25, 0:00:31"]
    seconds[0] = 3700.0
    lines(15, 40, "edits")
    lines(40, 40, "edits")
    lines(40, 40, "edits")
    assert said[5:] == ["edits: 15 of 40, 1:01:40", "edits: 40 of 40, 1:01:40"]


@pytest.mark.parametrize("protocol", ["single", "sequential"])
def test_a_bench_into_a_file_shows_that_it_goes_on(tmp_path: Path, protocol: str) -> None:
    quick = ["generation.tokens=0", "generation.fluency_tokens=0", "collapse.n_texts=0", "collapse.known_facts=0"]
    out, errors = Console(file=io.StringIO()), Console(file=io.StringIO(), force_terminal=False)
    line = ["bench", "editor=ft_m", f"protocol={protocol}", "n_edits=2", f"out={tmp_path}", *quick]
    assert main.run(line, out, errors) == 0
    assert isinstance(errors.file, io.StringIO)
    lines = [line for line in errors.file.getvalue().splitlines() if line.startswith("edits: ")]
    assert [line.rpartition(",")[0] for line in (lines[0], lines[-1])] == ["edits: 0 of 2", "edits: 2 of 2"]


def test_doubtful_edits_are_shown_once_for_each_kind_and_counted() -> None:
    out = io.StringIO()
    with shown_warnings(Console(file=out, width=300)):
        for number in range(3):
            warnings.warn(DoubtfulEditWarning(f"request {number}: it is far", "distance"), stacklevel=1)
        warnings.warn(DoubtfulEditWarning("request 9: it is large", "size"), stacklevel=1)
    first, large, count = out.getvalue().splitlines()
    assert "request 0: it is far" in first
    assert "request 9: it is large" in large
    assert "3 warnings that the updates ended farther from the value than they began" in count
