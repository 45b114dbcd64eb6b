"""Demonstrations for in-context editing: how a new fact changes some answers, and leaves others as they were.

Three kinds, each two lines, "New Fact: p o" and "Prompt: q a":

    copy     q is p, and a is o: the fact itself
    update   q asks for the fact in other words, and a is o
    retain   q is about another subject, and a is its own answer

Zheng et al. 2023, "Can We Edit Factual Knowledge by In-Context Learning?", take the k most similar records of a
training file and draw the kind of each. EasyEdit takes the k most similar of all such texts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errata.editors.core.contexts.asking import FACT, QUESTION
from errata.editors.core.errors import DatasetError
from errata.editors.core.files.plain_files import read_json_list

COPY, UPDATE, RETAIN = range(3)
# The authors' list of kinds: 4 copy, 12 update, 16 retain. It is shuffled for each edit.
KINDS = (2, 1, 2, 0, 1, 2, 2, 0, 2, 2, 1, 0, 2, 1, 2, 0, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2)


@dataclass(frozen=True)
class DemonstrationRecord:
    """A fact to make demonstrations of.

    Attributes:
        prompt: With the subject in it.
        answer: The new answer.
        paraphrases: Prompts that ask for the same.
        others: Prompts about other subjects, each with its answer.
    """

    prompt: str
    answer: str
    paraphrases: tuple[str, ...]
    others: tuple[tuple[str, str], ...]

    def text(self, prompt: str, answer: str) -> str:
        """Return the demonstration that asks this prompt."""
        return demonstration(f"{self.prompt} {self.answer}", f"{prompt} {answer}")

    @property
    def copied(self) -> str:
        """The demonstration of the kind copy."""
        return self.text(self.prompt, self.answer)

    @property
    def every(self) -> tuple[str, ...]:
        """One demonstration per kind, by the first paraphrase and the first other prompt, as EasyEdit has them."""
        others = (*((prompt, self.answer) for prompt in self.paraphrases[:1]), *self.others[:1])
        return (self.copied, *(self.text(prompt, answer) for prompt, answer in others))


def demonstration(statement: str, question: str) -> str:
    """Return a fact and a question with its answer, as one text."""
    return f"{FACT.format(statement)}{QUESTION.format(question)}\n\n"


def drawn(records: Sequence[DemonstrationRecord], statement: str, draws: random.Random) -> list[str]:
    """Return demonstrations as in the authors' code, the most similar one last, and then the fact itself.

    Args:
        records: The records, the most similar one first.
        statement: The fact to edit.
        draws: Draws the kinds, and a paraphrase or another prompt of each record.
    """
    kinds = list(KINDS)
    draws.shuffle(kinds)
    found = []
    for i, record in enumerate(records):
        kind = kinds[i % len(kinds)]
        if kind == UPDATE and record.paraphrases:
            found.append(record.text(draws.choice(record.paraphrases), record.answer))
        elif kind == RETAIN and record.others:
            found.append(record.text(*draws.choice(record.others)))
        else:
            found.append(record.copied)
    return [*reversed(found), demonstration(statement, statement)]


def read_demonstrations(path: str | Path) -> list[DemonstrationRecord]:
    """Return the records of a JSON file, or of a file with one JSON object per line.

    A record has the form of CounterFact (`requested_rewrite`, `paraphrase_prompts`, `neighborhood_prompts`), or that of
    EasyEdit (`prompt`, `target_new`, `rephrase_prompt`, `locality_prompt`, `locality_ground_truth`).

    Raises:
        DatasetError: The file is missing or empty, or a record has neither form. It names the record.
    """
    file = Path(path)
    try:
        records = read_json_list(file)
    except (OSError, ValueError) as error:
        raise DatasetError(f"expected a JSON list of demonstrations: {error}", path=file) from error
    return [_record(record, index, file) for index, record in enumerate(records)]


def _record(record: Any, index: int, path: Path) -> DemonstrationRecord:
    try:
        if "requested_rewrite" in record:
            asked = record["requested_rewrite"]
            truth = asked["target_true"]["str"]
            return DemonstrationRecord(
                asked["prompt"].replace("{}", asked["subject"]),
                asked["target_new"]["str"],
                tuple(record["paraphrase_prompts"]),
                tuple((prompt, truth) for prompt in record["neighborhood_prompts"]),
            )
        return DemonstrationRecord(
            record["prompt"],
            record["target_new"],
            (record["rephrase_prompt"],) if "rephrase_prompt" in record else (),
            ((record["locality_prompt"], record["locality_ground_truth"]),) if "locality_prompt" in record else (),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"expected a record of CounterFact or EasyEdit: {type(error).__name__} {error}",
            path=path,
            record=f"#{index}",
        ) from error


def made_up(count: int) -> list[DemonstrationRecord]:
    """Return records about made-up people and places, for use where there is no training file."""
    draws = random.Random("errata demonstrations")
    relations = (
        ("{} was born in", ("{} comes from", "The birthplace of {} is"), ("Madrid", "Oslo", "Cairo", "Lima")),
        ("The mother tongue of {} is", ("{} grew up speaking", "{} speaks"), ("French", "Danish", "Arabic", "Korean")),
        ("{} works as a", ("By profession, {} is a", "{} earns a living as a"), ("nurse", "poet", "judge", "pilot")),
        (
            "{} plays the",
            ("{} is a master of the", "The instrument of {} is the"),
            ("piano", "flute", "cello", "drums"),
        ),
    )
    syllables = ("bel", "cor", "dan", "fen", "lor", "mar", "nor", "qui", "sul", "tav", "ver", "zan")

    def name() -> str:
        return " ".join("".join(draws.sample(syllables, 2)).capitalize() for _ in range(2))

    records = []
    for i in range(count):
        prompt, paraphrases, answers = relations[i % len(relations)]
        new, old = draws.sample(answers, 2)
        subject = name()
        records.append(
            DemonstrationRecord(
                prompt.format(subject),
                new,
                tuple(each.format(subject) for each in paraphrases),
                tuple((prompt.format(name()), old) for _ in range(3)),
            )
        )
    return records
