"""The figure of the first page: one model in four states, from the untouched base to an edit that is taken back.

`measure` edits the bundled model and records what it answers in each state; `picture` draws that record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from errata.benchmarks.reports.palette import BLUE, GREY, INK, MUTED, VERMILION
from errata.benchmarks.reports.panels import STYLE, saved

PROMPT = "The capital of {} is"
FACTS = (("Gavaria", "Praminster"), ("Mesmar", "Kesford"))
STATES = (
    ("untouched", ()),
    ("p1 applied", ("p1",)),
    ("p2 applied", ("p1", "p2")),
    ("p1 taken back", ("p2",)),
    ("p2 taken back", ()),
)
COLOURS = {"base": GREY, "p1": BLUE, "p2": VERMILION}
HEIGHTS = {"base": 1.5, "p1": 0.42, "p2": 0.42}


def measure() -> dict[str, Any]:
    """Apply two edits to the bundled model, undo the first, then the second, and ask both facts each time."""
    import errata
    from errata.editors import ROME
    from errata.evaluate.generation import generate

    model, tokenizer = errata.load("world", device="cpu")
    editor = ROME(model, tokenizer)
    prompts = [PROMPT.format(subject) for subject, _ in FACTS]
    before = {name: value.clone() for name, value in model.state_dict().items()}

    answers = [generate(model, tokenizer, prompts, 1)]
    edits = []
    for subject, target in FACTS:
        edits.append(editor.apply(errata.EditRequest(PROMPT, subject=subject, target=target)))
        answers.append(generate(model, tokenizer, prompts, 1))
    for edit in edits:
        edit.undo()
        answers.append(generate(model, tokenizer, prompts, 1))
    states = [
        {"title": title, "patches": list(patches), "answers": [answer.strip() for answer in told]}
        for (title, patches), told in zip(STATES, answers, strict=True)
    ]
    differing = sum(int((value != before[name]).sum()) for name, value in model.state_dict().items())
    return {
        "subjects": [subject for subject, _ in FACTS],
        "states": states,
        "weights_that_differ_at_the_end": differing,
    }


def picture(data: Mapping[str, Any]) -> bytes:
    """Draw a stack of blocks per state, with the model's answers below it, as PNG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    states: Sequence[Mapping[str, Any]] = data["states"][:4]
    with rc_context({**STYLE, "font.size": 10}):
        canvas = Figure(figsize=(7.0, 2.9), layout="constrained")
        axis = canvas.subplots()
        for column, state in enumerate(states):
            _stack(axis, column, state["patches"])
            axis.text(column, 2.55, state["title"], ha="center", fontweight="bold")
            for line, (subject, answer) in enumerate(zip(data["subjects"], state["answers"], strict=True)):
                is_edited = answer != states[0]["answers"][line]
                colour = (BLUE, VERMILION)[line] if is_edited else INK
                axis.text(column, -0.72 - 0.27 * line, f"{subject}: {answer}", ha="center", fontsize=8.5, color=colour)
            sum_of = " + ".join(["base", *state["patches"]])
            axis.text(column, -0.34, f"weights = {sum_of}", ha="center", fontsize=8.5, color=MUTED)
            if column:
                arrow = {"arrowstyle": "-|>", "color": MUTED, "shrinkA": 0, "shrinkB": 0}
                axis.annotate("", xy=(column - 0.4, 0.75), xytext=(column - 0.6, 0.75), arrowprops=arrow)
        axis.set_xlim(-0.55, len(states) - 0.45)
        axis.set_ylim(-1.1, 2.85)
        axis.axis("off")
        return saved(canvas)


def _stack(axis: Any, column: int, patches: Sequence[str]) -> None:
    """The base, and the patches of this state on top of it; a block never changes once it is there."""
    bottom = 0.0
    for name in ("base", *patches):
        height = HEIGHTS[name]
        axis.bar(column, height - 0.04, 0.62, bottom=bottom, color=COLOURS[name])
        ink = INK if name == "base" else "white"
        axis.text(column, bottom + height / 2 - 0.02, name, ha="center", va="center", color=ink, fontsize=9.5)
        bottom += height
