"""`errata report`: writes tables, pictures and one page about all finished runs in a folder."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from errata.cli.arguments import parse
from errata.cli.command import MEASURE, Command, Option
from errata.cli.exit_codes import DONE
from errata.cli.messages import say
from errata.editors.core.config import did_you_mean
from errata.editors.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

# As in errata.benchmarks.reports, whose import would take a second: paper.py and styles.py.
PUBLISHED = ("alphaedit", "wild", "knowedit", "wikibigedit", "ability")
STYLES = ("page", "paper", *PUBLISHED)
SCORINGS = (
    *("probability", "teacher_forced", "generation", "generation_containment"),
    *("wild", "wild_judged", "wild_f1", "bleu", "rouge_l", "set_f1"),
)


def run(arguments: Sequence[str], console: Console, errors: Console) -> int:  # noqa: ARG001
    """Write the report and show where it is."""
    from rich.text import Text

    given = parse(arguments, COMMAND)
    if len(given.words) != 1:
        raise ConfigError(
            f"expected a folder of runs, and perhaps out=FOLDER for the report, got {' '.join(arguments) or 'nothing'}"
        )

    from errata.benchmarks.reports.publish import publish, publish_paper, publish_styled

    out = Path(given.values["out"]) if "out" in given.values else None
    style, scoring = given.values.get("style", STYLES[0]), given.values.get("scoring")
    if style not in STYLES:
        raise ConfigError(f"style={style}: unknown style{did_you_mean(style, STYLES)}")
    if scoring is not None and style != "paper":
        raise ConfigError("scoring= needs style=paper; the page has every scoring, and a published style its own")
    if style != "page":
        root = Path(given.words[0])
        is_paper = style == "paper"
        files = (
            publish_paper(root, out, scoring=scoring or SCORINGS[0])
            if is_paper
            else publish_styled(root, out, style=style)
        )
        say(console, files[0].read_text(encoding="utf-8"))
        for path in files:
            console.print(Text.assemble(("table    ", "dim"), str(path)), soft_wrap=True)
        return DONE
    page, *others = publish(Path(given.words[0]), out, command=shlex.join(["errata", "report", *arguments]))
    console.print(Text.assemble(("page     ", "dim"), str(page)), soft_wrap=True)
    console.print(Text.assemble(("beside   ", "dim"), ", ".join(path.name for path in others)), soft_wrap=True)
    return DONE


COMMAND = Command(
    name="report",
    usage=(
        "DIR [out=FOLDER]",
        "DIR style=paper [scoring=probability]",
        "DIR style=alphaedit|wild|knowedit|wikibigedit|ability",
    ),
    summary="Write tables, pictures and one page about all finished runs in a folder.",
    group=MEASURE,
    run=run,
    options=(
        Option("out=FOLDER", "where the report goes; by default DIR/report"),
        Option(
            "style=NAME",
            "page (default), paper, or the columns of published tables, which are listed below",
            STYLES,
        ),
        Option("scoring=NAME", "with style=paper, the scoring of the table; by default probability", SCORINGS),
    ),
    notes=(
        "The report is index.html, one page that you can send to others. Beside it are the tables (Markdown, LaTeX,\n"
        "CSV, Parquet) and the pictures.",
        "With style=paper, methods are rows and columns are the metrics of each dataset, under one scoring.",
        "The other styles have the columns of published tables, in percent, with standard errors.\n"
        "  alphaedit    Eff, Gen, Spe, S, Flu, Consis, CP@60\n"
        "  wild         Rel, Gen, Loc, Cap, Time\n"
        "  knowedit     Edit Succ., Portability, Locality, Fluency\n"
        "  wikibigedit  Update, Rephrase, Persona, Multi-hop, Locality, per interval\n"
        "  ability      a column per task, a row per checkpoint",
    ),
    examples=(
        "errata report runs",
        "errata report runs style=paper scoring=generation",
        "errata report runs style=alphaedit",
    ),
)
