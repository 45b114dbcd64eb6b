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

    from errata.benchmarks.facts.asking import CheckResult, QuestionResult, WrittenTexts
    from errata.benchmarks.facts.sync import SyncPlan
    from errata.editors.core.request import EditRequest

LABELS = MappingProxyType({"beneath": "superseded"})  # of the parts of a plan, where the name alone says too little
TEXT = 48  # characters of a text that the model writes
ANSWERED_OTHERWISE = "a fact or paraphrase does not hold, a prompt that must stay is answered in other words"
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
    _show_questions([each for each in checked if each.paraphrases or each.unchanged or each.texts], console)
    return [each for each in checked if not each.is_good]


def _show_questions(checked: Sequence[CheckResult], console: Console) -> None:
    """Show for each fact how many of its questions are answered as they should be, those with a failure first, and what
    the model writes."""
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
        if each.texts is not None:
            console.print(Text.assemble("    ", _written(each.texts)), soft_wrap=True)
        for word, group in (("not answered: ", each.paraphrases), ("changed: ", each.unchanged)):
            for asked in group:
                if not asked.holds or group is each.paraphrases:
                    _show_question(asked, "" if asked.holds else word, console)
    if len(checked) > SHOWN:
        console.print(Text(f"  and {len(checked) - SHOWN} more"))


def _show_question(asked: QuestionResult, word: str, console: Console) -> None:
    from rich.text import Text

    # Without an answer in the file nothing tells a new fact from the old one in other words.
    note = " (any other wording counts)" if not asked.holds and asked.probe.target is None else ""
    line = Text.assemble(f"    {word}{' '.join(asked.probe.prompt.split())}", (note, "dim"))
    if asked.texts is not None:
        line = Text.assemble(line, "; ", _written(asked.texts))
    if word or asked.texts is not None:
        console.print(line, soft_wrap=True)


def _written(texts: WrittenTexts) -> Text:
    """Return what the model writes before and now, in one line."""
    from rich.text import Text

    before = [] if texts.before is None else [("before: ", "dim"), f"{_cut(texts.before)}, "]
    return Text.assemble(*before, ("now: ", "dim"), _cut(texts.now))


def _cut(text: str) -> str:
    """Return a text in one line, cut to TEXT characters."""
    line = " ".join(text.split()) or "(nothing)"
    return line if len(line) <= TEXT else f"{line[: TEXT - 3].rstrip()}..."


def facts_in_one_line(requests: Sequence[EditRequest]) -> str:
    """Return the first three facts as plain text, and how many more there are."""
    shown = "; ".join(f"{' '.join(request.text.split())} → {request.target}" for request in requests[:3])
    return shown + (f" and {len(requests) - 3} more" if len(requests) > 3 else "")
