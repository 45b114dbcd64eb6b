"""MQuAKE: one to four edits that are made together, and questions over several hops that follow from them.

    loaded = read("MQuAKE-CF-3k-v2.json", prompts="chain_of_thought")

Three accuracies come out of it:

- reliability is edit-wise: the cloze of each edit, without examples.
- hops is instance-wise: the clozes of all facts of the new chain must hold.
- portability is the multi-hop accuracy: any of a case's three questions must be answered, behind examples.

Cases share edits: many edits on one model make a shared one once, and drop a case that contradicts another.

Reference: Zhong et al. 2023 (MQuAKE: Assessing Knowledge Editing in Language Models via Multi-Hop Questions), sections
3 and 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from errata.benchmarks.datasets.json_records import (
    BadFieldError,
    Loaded,
    RecordReader,
    convert,
    read_records,
    read_text,
)
from errata.editors.core.config import choose
from errata.editors.core.request import EditRequest
from errata.evaluate.probes import Case, FreeAnswer, Probe

Prompts = Literal["few_shot", "chain_of_thought", "bare"]
PROMPTS: tuple[Prompts, ...] = ("few_shot", "chain_of_thought", "bare")
# Examples of our own, about facts that MQuAKE does not edit. The authors' files go in their place by `examples`.
_FEW_SHOT = """\
Q: What is the capital of the country in which the Alhambra stands? A: Madrid
Q: Who wrote the novel on which the film Jaws is based? A: Peter Benchley
Q: On which continent is the country whose capital is Lima? A: South America
Q: In which country was the composer of The Magic Flute born? A: Austria
Q: What is the currency of the country in which Mount Fuji is? A: Japanese yen
Q: Which language is spoken in the city where the Little Mermaid statue sits? A: Danish
"""
_CHAIN_OF_THOUGHT = """\
Question: What is the capital of the country in which the Alhambra stands?
Thoughts: The Alhambra stands in Spain. The capital of Spain is Madrid.
Answer: Madrid

Question: Who wrote the novel on which the film Jaws is based?
Thoughts: The film Jaws is based on the novel Jaws. The novel Jaws was written by Peter Benchley.
Answer: Peter Benchley

Question: On which continent is the country whose capital is Lima?
Thoughts: Lima is the capital of Peru. Peru is on the continent of South America.
Answer: South America

Question: In which country was the composer of The Magic Flute born?
Thoughts: The composer of The Magic Flute is Wolfgang Amadeus Mozart. Mozart was born in Austria.
Answer: Austria
"""
# New tokens of a chain of thought with its answer.
_THOUGHTS = 100
# Fields of an edit that AKEW's files add.
_SILENT = ("orig", "case_id", "answer_extended", "new_answer_extended", "split", "generation_prompts")


def read(
    path: str | Path,
    *,
    needs_subject: bool = True,  # noqa: ARG001 - every edit of MQuAKE has one
    prompts: Prompts = "few_shot",
    examples: str | Path | None = None,
) -> Loaded:
    """Read a file of MQuAKE, or AKEW's with MQuAKE's records (JSON, plain or gzip, or a dataset of the Hub).

    Args:
        path: A list of records: `case_id`, `requested_rewrite` (a list of {prompt with `{}`, subject, target_new.str,
            target_true.str}), `questions`, `new_answer` with `new_answer_alias`, `answer`, and `new_single_hops`
            [{cloze, answer, answer_alias}].
        needs_subject: Has no effect.
        prompts: How the questions are asked. "few_shot": behind examples of questions and answers; "chain_of_thought":
            behind examples with thoughts, and the answer is what follows "Answer:"; "bare": as they stand.
        examples: A text file of examples in place of those of this package, as the authors' prompts/multihop-*.txt.

    Raises:
        DatasetError: the file is missing, damaged or no list of records.
        ConfigError: there is no such way to ask.
    """
    choose(prompts, PROMPTS, "dataset.options.prompts")
    shown = {"few_shot": _FEW_SHOT, "chain_of_thought": _CHAIN_OF_THOUGHT, "bare": ""}[prompts]
    if examples is not None:
        shown = read_text(examples, "text")
    loaded = convert(
        read_records(path),
        lambda record: to_case(record, prompts=prompts, examples=shown),
        id_field="case_id",
        silent=_SILENT,
    )
    return replace(loaded, shares_edits=True)


def to_case(record: RecordReader, *, prompts: Prompts = "few_shot", examples: str = _FEW_SHOT) -> Case:
    """Return one record as a case.

    Raises:
        BadFieldError: a field is absent or of the wrong type, or two edits contradict each other.
        RequestError: the fields do not make a request.
    """
    name = record.name("case_id")
    first, *further = requests = edits(record, name)
    probes = [Probe("rewrite", request.text, request.target, request.target_true) for request in requests]
    probes += [
        Probe("hop", hop.text("cloze"), hop.text("answer"), aliases=_aliases(hop, "answer_alias"), test="hops")
        for hop in record.items("new_single_hops")
    ]
    probes += multi_hop(record, prompts, examples)
    record.get("single_hops")
    return Case(name, first, tuple(probes), tuple(further))


def edits(record: RecordReader, name: str) -> list[EditRequest]:
    """Return the edits of a record, each once.

    Raises:
        BadFieldError: there is none, or two teach the same prompt different answers.
    """
    found: dict[str, EditRequest] = {}
    entries = record.items("requested_rewrite")
    for i, entry in enumerate(entries):
        request = EditRequest(
            entry.text("prompt"),
            entry.text("subject").strip(),
            entry.text("target_new.str"),
            entry.text("target_true.str"),
            id=name if len(entries) == 1 else f"{name}.{i}",
        )
        earlier = found.setdefault(request.text, request)
        if earlier.target != request.target:
            raise BadFieldError(
                entry.at("target_new.str"), f"contradicts another edit of the record: {earlier.target!r}"
            )
    if not found:
        raise BadFieldError("requested_rewrite", "expected at least one edit, got an empty list")
    return list(found.values())


def multi_hop(record: RecordReader, prompts: Prompts, examples: str) -> Iterator[Probe]:
    """Yield the questions of a record. It is enough to answer any of them."""
    answer, old = record.text("new_answer"), record.text("answer")
    aliases = _aliases(record, "new_answer_alias")
    record.get("answer_alias")
    for question in record.texts("questions"):
        prompt, free = _asked(question, prompts, examples)
        other = None if old == answer else old
        yield Probe(
            "portability", prompt, answer, other, aliases=aliases, group="Multi_hop", test="multi-hop", rule="any",
            free=free,
        )  # fmt: skip


def _asked(question: str, prompts: Prompts, examples: str) -> tuple[str, FreeAnswer]:
    """Return the prompt of a question, and how the text behind it is read."""
    if prompts == "bare":
        return question, FreeAnswer()
    if prompts == "few_shot":
        return f"{examples.rstrip()}\nQ: {question} A:", FreeAnswer(until="\n")
    prompt = f"{examples.rstrip()}\n\nQuestion: {question}\nThoughts:"
    return prompt, FreeAnswer(tokens=_THOUGHTS, after="Answer:", until="\n")


def _aliases(record: RecordReader, field: str) -> tuple[str, ...]:
    found = record.get(field) or []
    if not isinstance(found, list):
        raise BadFieldError(record.at(field), f"expected a list of other spellings, got {found!r}")
    return tuple(text for text in found if isinstance(text, str) and text.strip())
