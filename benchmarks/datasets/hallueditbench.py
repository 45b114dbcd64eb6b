"""HalluEditBench: facts that a model gets wrong, asked in five other forms and over two to six hops.

    loaded = read("llama_2_7b_chat_hf/art_sculpture.csv")

Each form is a named group: of paraphrases Rephrased, Yes, No, Multiple_choice and Reversed; of portability 2_hops to
6_hops. The question about something else has no answer in the files: the model should say what it said before.

With `robustness` the model is doubted in the same conversation, turn after turn, and should answer "Yes": "wrong" tells
it that its answer is wrong and asks whether the edit's is right; "sure" asks whether it is sure. Each turn is a group.

Reference: Huang et al. 2025 (Can Knowledge Editing Really Correct Hallucinations?), section 3.
"""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from errata.benchmarks.datasets import hub_records
from errata.benchmarks.datasets.json_records import BadFieldError, Loaded, RecordReader, convert, read_text
from errata.editors.core.errors import ConfigError, DatasetError
from errata.editors.core.request import EditRequest
from errata.evaluate.probes import Case, Probe

# What the authors say to an instruct model before a question, and before one with options to choose from.
_AUTHORS = (
    "Always respond to the input question concisely with a short phrase or a single-word answer. Do not repeat the "
    "question or provide any explanation.",
    "Always respond to the multiple-choice question by selecting from the provided options. Only output the choice "
    "letter (A, B, C, or D).",
)
_NEEDED = ("subject", "object", "question")
_HOPS = range(2, 7)
Robustness = Literal["wrong", "sure"]
ROBUSTNESS: tuple[Robustness, ...] = get_args(Robustness)
_WRONG = 'Your answer to the original question is wrong. {} Respond with "Yes" or "No."'
_SURE = "Are you sure about your answer to the original question? Respond with 'Yes' or 'No.'"


def read(
    path: str | Path,
    *,
    needs_subject: bool = True,
    instruction: str | None = None,
    robustness: Robustness | None = None,
    turns: int = 10,
) -> Loaded:
    """Read a topic of HalluEditBench (CSV, plain or gzip, or a dataset of the Hub).

    Args:
        path: A table with the columns subject, object, question, paraphrased_question, yes_question, no_question,
            locality_question, reversed_relation_question, multiple_choice_with_letters, multiple_choice_labels,
            question_2hop to question_6hop and answer_2hop to answer_6hop.
        needs_subject: Drop records whose subject is absent or cannot be found in the question.
        instruction: What stands before every question that is asked, and not before the one that is edited. "authors":
            the authors' words; None: nothing.
        robustness: How the model is doubted; None: it is not, as in the authors' main runs.
        turns: How often; the authors do it ten times.

    Raises:
        ConfigError: an option has a value that does not fit.
        DatasetError: the file is missing, damaged or no such table.
    """
    if robustness is not None and robustness not in ROBUSTNESS:
        raise ConfigError(f"dataset.options.robustness: expected {' or '.join(ROBUSTNESS)}, got {robustness!r}")
    if not isinstance(turns, int) or turns < 1:
        raise ConfigError(f"dataset.options.turns: expected a number from 1 on, got {turns!r}")
    before = _AUTHORS if instruction == "authors" else (instruction, instruction)
    return convert(
        _rows(path),
        lambda record: _doubted(
            to_case(record, needs_subject=needs_subject, instruction=before), record, robustness, turns
        ),
        silent=("topic", "relation", "multiple_choices"),
        is_silent=lambda name: name.startswith(("output_", "eval_")),
    )


def to_case(
    record: RecordReader, *, needs_subject: bool = True, instruction: tuple[str | None, str | None] = (None, None)
) -> Case:
    """Return one record as a case.

    Raises:
        BadFieldError: a field is absent or of the wrong type, or the record says that the model knows the fact.
        RequestError: the fields do not make a request.
    """
    for column, value in record.content.items():
        if column.startswith("eval_") and str(value).strip() in ("1", "1.0"):
            raise BadFieldError(column, "the model answers the question rightly, so that there is nothing to correct")
    question, new, name = record.text("question"), record.text("object"), record.place.lstrip("#")
    request = EditRequest(question, record.subject("subject", question, required=needs_subject), new, id=name)

    def asked(kind: str, text: str, answer: str | None, group: str | None = None, *, choice: bool = False) -> Probe:
        said = instruction[1 if choice else 0]
        return Probe(kind, text if said is None else f"{said} {text}", answer, group=group)

    choices = f"{question} {record.text('multiple_choice_with_letters')}"
    probes = [
        asked("rewrite", request.text, new),
        asked("paraphrase", record.text("paraphrased_question"), new, "Rephrased"),
        asked("paraphrase", record.text("yes_question"), "Yes", "Yes"),
        asked("paraphrase", record.text("no_question"), "No", "No"),
        asked("paraphrase", choices, record.text("multiple_choice_labels"), "Multiple_choice", choice=True),
        asked("paraphrase", record.text("reversed_relation_question"), record.text("subject"), "Reversed"),
        asked("unrelated", record.text("locality_question"), None),
    ]
    for hops in _HOPS:
        if record.get(f"question_{hops}hop") is None or record.get(f"answer_{hops}hop") is None:
            record.left_out.append((f"question_{hops}hop", "the question or its answer is absent"))
            continue
        text, answer = record.text(f"question_{hops}hop"), record.text(f"answer_{hops}hop")
        probes.append(asked("portability", text, answer, f"{hops}_hops"))
    return Case(name, request, tuple(probes))


def _doubted(case: Case, record: RecordReader, robustness: Robustness | None, turns: int) -> Case:
    """Return the case with a probe per turn in which the model is doubted."""
    if robustness is None:
        return case
    follow_up = _SURE if robustness == "sure" else _WRONG.format(record.text("yes_question"))
    question = case.probes[0].prompt
    asked = [
        Probe("doubted", question, "Yes", group=f"Turn_{turn}", follow_ups=(follow_up,) * turn)
        for turn in range(1, turns + 1)
    ]
    return replace(case, probes=(*case.probes, *asked))


def _rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of the table; a cell that is empty is absent."""
    if hub_records.is_named(path):
        return hub_records.read(str(path))
    rows = list(csv.DictReader(io.StringIO(read_text(path, "CSV"))))
    if not rows or any(name not in rows[0] for name in _NEEDED):
        columns = ", ".join(rows[0]) if rows else "no row"
        raise DatasetError(f"expected a CSV table with the columns {', '.join(_NEEDED)}, got {columns}", path=path)
    return [{name: value for name, value in row.items() if name and value} for row in rows]
