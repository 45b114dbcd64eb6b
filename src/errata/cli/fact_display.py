"""Facts on the terminal: a plan, what was checked, and one fact in one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from errata.benchmarks.reports.counts import count_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from errata.benchmarks.facts.sync import CheckResult, SyncPlan
    from errata.editors.core.request import EditRequest

LABELS = MappingProxyType({"beneath": "superseded"})  # of the parts of a plan, where the name alone says too little
SHOWN = 20  # facts listed before the rest are only counted


def fact_line(request: EditRequest) -> Text:
    """Return a fact as one line."""
    from rich.text import Text

    return Text.assemble(" ".join(request.text.split()), " → ", (request.target, "bold"))


def show_plan(plan: SyncPlan, source: str | Path, console: Console) -> None:
    """Show how many facts a plan adds, changes, makes again and removes, and which."""
    from rich.text import Text

    counts = [
        f"{len(found)} {LABELS.get(name, name)}"
        for name in ("added", "changed", "again", "removed", "beneath", "unchanged")
        if (found := getattr(plan, name)) or name == "unchanged"
    ]
    console.print(Text(f"{source}: {', '.join(counts)}"))
    lines: list[tuple[str, str, Text]] = [("+", "green", fact_line(fact.request)) for fact in plan.added]
    for before, fact in plan.changed:
        was = before.target if before.text == fact.request.text else f"{before.text} → {before.target}"
        lines.append(("~", "yellow", Text.assemble(fact_line(fact.request), (f", was {was}", "dim"))))
    lines += [("=", "yellow", Text.assemble(fact_line(fact.request), (", made again", "dim"))) for fact in plan.again]
    lines += [("-", "red", fact_line(request)) for request in plan.removed]
    for sign, colour, text in lines[:SHOWN]:
        console.print(Text.assemble((f"  {sign} ", colour), text), soft_wrap=True)
    if len(lines) > SHOWN:
        console.print(Text(f"  and {len(lines) - SHOWN} more"))


def show_checked(checked: Sequence[CheckResult], console: Console) -> list[CheckResult]:
    """Show how many facts hold, which do not, and what became of the questions about them.

    Returns:
        The facts that do not hold, and those with a question that is not answered as it should be.
    """
    from rich.text import Text

    lost = [each for each in checked if not each.holds]
    share = f"{len(checked) - len(lost)} of {count_of(len(checked), 'fact')}"
    console.print(Text(f"{share} {'holds' if len(checked) == 1 else 'hold'}"))
    for each in sorted(lost, key=lambda one: not one.held)[:SHOWN]:
        word = ("lost", "bold red") if each.held else ("does not hold", "red")
        probability = (f" (p {each.probability:.3f})", "dim")
        console.print(Text.assemble("  ", word, "  ", fact_line(each.request), probability), soft_wrap=True)
    if len(lost) > SHOWN:
        console.print(Text(f"  and {len(lost) - SHOWN} more"))
    _show_questions([each for each in checked if each.paraphrases or each.unchanged], console)
    return [each for each in checked if not each.is_good]


def _show_questions(checked: Sequence[CheckResult], console: Console) -> None:
    """Show for each fact how many of its questions are answered as they should be, those with a failure first."""
    from rich.text import Text

    for each in sorted(checked, key=lambda one: one.is_good)[:SHOWN]:
        parts = ["holds" if each.holds else "does not hold"]
        if each.paraphrases:
            good = sum(asked.holds for asked in each.paraphrases)
            parts.append(f"{good} of {count_of(len(each.paraphrases), 'paraphrase')}")
        if each.unchanged:
            changed = sum(not asked.holds for asked in each.unchanged)
            parts.append(f"{changed} of {count_of(len(each.unchanged), 'neighbour')} changed")
        style = "green" if each.is_good else "red"
        console.print(Text.assemble("  ", fact_line(each.request), ": ", (", ".join(parts), style)), soft_wrap=True)
        for word, group in (("not answered", each.paraphrases), ("changed", each.unchanged)):
            for asked in group:
                if not asked.holds:
                    console.print(Text(f"    {word}: {' '.join(asked.probe.prompt.split())}"), soft_wrap=True)
    if len(checked) > SHOWN:
        console.print(Text(f"  and {len(checked) - SHOWN} more"))


def facts_in_one_line(requests: Sequence[EditRequest]) -> str:
    """Return the first three facts as plain text, and how many more there are."""
    shown = "; ".join(f"{' '.join(request.text.split())} → {request.target}" for request in requests[:3])
    return shown + (f" and {len(requests) - 3} more" if len(requests) > 3 else "")
