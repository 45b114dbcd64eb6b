"""Names that would act where they are shown: on a terminal, in a spreadsheet, in Markdown, LaTeX and HTML."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import latex_tables
import pytest
from rich.table import Table
from rich.text import Text

from errata.benchmarks.reports import escaping, paper
from errata.cli import main
from errata.cli.consoles import PlainConsole

DATA = Path(__file__).resolve().parent.parent / "data" / "before_rooms" / "single"
ESCAPES = "\x1b]0;title\x07\x1b[2Jname\x9b31m\u202e"


def shown(content: object) -> str:
    console = PlainConsole(file=(out := io.StringIO()), width=100)
    console.print(content)
    return out.getvalue()


def test_no_escape_of_a_text_reaches_the_terminal() -> None:
    table = Table()
    table.add_column(ESCAPES)
    table.add_row(Text(ESCAPES))
    for content in (ESCAPES, Text(ESCAPES), table):
        written = shown(content)
        assert "name" in written
        assert all(character == "\n" or character.isprintable() for character in written), repr(written)


def test_colours_and_layout_of_our_own_stay() -> None:
    console = PlainConsole(file=(out := io.StringIO()), force_terminal=True, color_system="standard", width=40)
    console.print(Text.assemble(("red", "red"), "\tplain\n"))
    assert "\x1b[31mred\x1b[0m" in out.getvalue()


@pytest.mark.parametrize("text", ["=HYPERLINK(1)", "+1", "-1", "@x", "\t=1", "\x1b=1", "\r=1"])
def test_a_formula_is_a_text(text: str) -> None:
    assert escaping.csv_cell(text).startswith("'")


def test_other_texts_stay() -> None:
    for text in ("gpt2-xl", "r_rome, 3 layers [1, 2]", "é 法国"):
        assert escaping.csv_cell(text) == escaping.markdown_text(text) == text


HOSTILE = '=HYPERLINK("http://evil","x")|<img src=x onerror=alert(1)>[a](http://evil)\x1b[2J\n# title'


def test_no_name_of_a_model_acts_in_a_report(tmp_path: Path) -> None:
    shutil.copytree(DATA, tmp_path / "runs")
    for path in (tmp_path / "runs").glob("*/results.json"):
        results = json.loads(path.read_text())
        results["names"]["model"] = HOSTILE
        path.write_text(json.dumps(results))
    console = PlainConsole(file=(out := io.StringIO()), width=200)
    assert main.run(["report", str(tmp_path / "runs")], console, console) == 0
    assert "\x1b" not in out.getvalue()
    folder = tmp_path / "runs" / "report"
    page, markdown, latex, table = (
        (folder / name).read_text(encoding="utf-8") for name in ("index.html", "table.md", "table.tex", "table.csv")
    )
    assert "<img src=x" not in page
    assert "<img" not in markdown
    assert "](http" not in markdown
    assert "\n# title" not in markdown
    assert "\x1b" not in markdown + latex + table
    assert latex_tables.problems(latex) == []
    assert ",=HYPERLINK" not in table
    assert '"=HYPERLINK' not in table


def test_titles_of_a_paper_s_table_are_escaped_and_its_rows_are_whole() -> None:
    table = paper.PaperTable(
        "m_1, single", "probability", "95", [("x_y & z", 3, 2)], ["50 % #1", "b"], [("r^2", [None] * 2)]
    )
    assert latex_tables.problems(paper.latex([table])) == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (r"a & b \\", "2 columns of 3"),
        (r"\multicolumn{3}{l}{x} & b \\", "4 columns of 3"),
        (r"a & b & c", "a row without an end"),
        (r"a & b_1 & c \\", "_ is not escaped"),
        (r"a & {b & c \\", "braces"),
        (r"a & $b & c \\", "dollar signs"),
        (r"a & \textfb{b} & c \\", "unknown command: textfb"),
        (r"\end{table}", "closed, but not open: table"),
    ],
)
def test_the_reader_of_latex_notices_what_is_wrong(line: str, said: str) -> None:
    tabular = [r"\begin{tabular}{lrr}", r"a\_1 & \textbf{b} & 5\,\% \\", r"\end{tabular}"]
    assert latex_tables.problems("\n".join(tabular)) == []
    assert said in " ".join(latex_tables.problems("\n".join([*tabular[:2], line, tabular[2]])))
