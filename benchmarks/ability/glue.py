"""The tasks on which AlphaEdit and its descendants report general ability, asked as their code asks them.

    scores = measure(model, tokenizer, ["glue_sst", "glue_rte"], folder, limit=100)
    scores["glue_rte"].value                 # weighted F1 of what the model writes; the papers' figure
    scores["glue_rte/words"].value           # weighted F1 of the likelier word
    scores["glue_rte/as_published"].value    # their reading of RTE, whose labels are reversed (docs/faults.md)

The folder holds a JSON file per task: sst.json, mrpc.json, cola.json, rte.json, nli.json, mmlu.json, each a list of
records with the fields of FIELDS. The authors' files are pickled, which errata does not open; their first ten records
are examples for few-shot prompts and are no tests here. No examples stand before a question, as in their runs.

Reference: Fang et al. 2025 (AlphaEdit), glue_eval of its repository.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from errata.editors.core.errors import ConfigError
from errata.editors.core.files.plain_files import read_json
from errata.evaluate.probes import Probe

PREFIX = "glue_"
EXAMPLES = 10  # the first records of each file
NO_CLASS = -1


@dataclass(frozen=True)
class ClassTask:
    """A task whose answer is one of a few words.

    Attributes:
        name: With PREFIX, as in `ability.tasks`; without it, the name of its file.
        prompt: With the fields of a record in braces.
        cue: What the answer follows: its last occurrence counts.
        words: {word that the model should write: class}. The first one that is in the text counts.
        tokens: New tokens of an answer.
        published: The words as the authors' code reads them, where that is another reading.
        ends: What has to follow the word in the text.
    """

    name: str
    prompt: str
    cue: str
    words: Mapping[str, int]
    tokens: int = 3
    published: Mapping[str, int] = field(default_factory=dict)
    ends: str = ""

    @property
    def file(self) -> str:
        """The name of its file."""
        return f"{self.name.removeprefix(PREFIX)}.json"

    def read(self, text: str, words: Mapping[str, int] | None = None) -> int:
        """Return the class that a text with its prompt gives; NO_CLASS for none of the words."""
        answer = text.rpartition(self.cue)[2].lower()
        given = self.words if words is None else words
        return next((label for word, label in given.items() if f"{word.lower()}{self.ends}" in answer), NO_CLASS)


_LETTERS = ("A", "B", "C", "D")
_PARAPHRASES = "Are the sentences paraphrases of each other.\nSentence 1: {sentence1}\nSentence 2: {sentence2}\nAnswer:"
_CHOICES = "Question: {question}\n(A) {A}\n(B) {B}\n(C) {C}\n(D) {D}\nAnswer:"
# GLUE's labels of RTE: 0 is entailment, so that the right word for 0 is "True".
_TRUE_FALSE = {"True": 0, "False": 1}
TASKS: Mapping[str, ClassTask] = MappingProxyType(
    {
        task.name: task
        for task in (
            ClassTask("glue_sst", "Review :{sentence}\nSentiment :", "Sentiment :", {"positive": 1, "negative": 0}),
            ClassTask("glue_mrpc", _PARAPHRASES, "Answer:", {"Yes": 1, "No": 0}),
            ClassTask(
                "glue_cola",
                "Is this sentence linguistically acceptable?\nSentence: {sentence}\nAnswer: ",
                "Answer:",
                {"Yes": 1, "No": 0},
                tokens=10,
            ),
            ClassTask(
                "glue_rte",
                "{sentence1}\nquestion: {sentence2} True or False?\nanswer:",
                "answer:",
                _TRUE_FALSE,
                published={"False": 0, "True": 1},  # in the order in which their code looks
            ),
            ClassTask(
                "glue_nli",
                "{sentence1} entails the {sentence2} True or False? Answer:",
                "Answer:",
                {"True": 1, "False": 0},
            ),
            ClassTask(
                "glue_mmlu", _CHOICES, "Answer:", dict(zip(_LETTERS, range(4), strict=True)), tokens=10, ends="\n"
            ),
        )
    }
)
# The fields of a record beside `label`: MMLU's has four `choices`, the others texts.
FIELDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "glue_sst": ("sentence",),
        "glue_mrpc": ("sentence1", "sentence2"),
        "glue_cola": ("sentence",),
        "glue_rte": ("sentence1", "sentence2"),
        "glue_nli": ("sentence1", "sentence2"),
        "glue_mmlu": ("question", "choices"),
    }
)


@dataclass(frozen=True)
class ClassQuestion:
    """A question with its right class."""

    prompt: str
    label: int


def questions(task: ClassTask, folder: Path, limit: int | None) -> list[ClassQuestion]:
    """Return the tests of a task: the records behind the first ten.

    Raises:
        ConfigError: There is no such file, or a record lacks a field.
    """
    path = folder / task.file
    try:
        records = read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{task.name}: {path} cannot be read as JSON: {error}") from error
    try:
        found = [_question(task, record) for record in records[EXAMPLES:]]
    except (KeyError, TypeError, ValueError) as error:
        fields = ", ".join((*FIELDS[task.name], "label"))
        raise ConfigError(f"{task.name}: expected a list of records with {fields} in {path}: {error!r}") from error
    if not found:
        raise ConfigError(f"{task.name}: {path} has no record behind its first {EXAMPLES}, which are examples")
    return found[:limit]


def _question(task: ClassTask, record: Mapping[str, Any]) -> ClassQuestion:
    values = {name: record[name] for name in FIELDS[task.name]}
    if "choices" in values:
        values |= dict(zip(_LETTERS, values["choices"], strict=True))
    prompt = task.prompt
    parts = prompt.split("{")  # filled by hand, since a sentence may hold braces
    filled = parts[0] + "".join(str(values[part.partition("}")[0]]) + part.partition("}")[2] for part in parts[1:])
    return ClassQuestion(filled, int(record["label"]))


@dataclass(frozen=True)
class ClassScore:
    """What a task gave: its metric, the value, over how many questions, and what guessing would give."""

    metric: str
    value: float
    n: int
    chance: float | None = None


def measure(
    model: Any, tokenizer: Any, tasks: Sequence[str], folder: Path, *, limit: int | None = None
) -> dict[str, ClassScore]:
    """Ask tasks of a model as it stands.

    Args:
        model, tokenizer: Of transformers.
        tasks: Names of TASKS.
        folder: With a JSON file for each.
        limit: The largest number of questions of a task; the authors ask 100.

    Returns:
        {task: score}, with "/words" for the likelier word and "/as_published" for the authors' reading of RTE. Only the
        first is a share that counts in a mean over tasks.
    """
    from errata.evaluate.generation import generate

    found: dict[str, ClassScore] = {}
    for name in tasks:
        task = TASKS[name]
        asked = questions(task, folder, limit)
        right = [question.label for question in asked]
        texts = generate(model, tokenizer, [question.prompt for question in asked], task.tokens)
        said = [question.prompt + text for question, text in zip(asked, texts, strict=True)]
        n = len(asked)
        guessed = 1 / len(task.words)
        found[name] = ClassScore("f1", weighted_f1(right, [task.read(text) for text in said]), n, guessed)
        words = likelier_words(model, tokenizer, task, asked)
        found[f"{name}/words"] = ClassScore("f1_of_words", weighted_f1(right, words), n, guessed)
        if task.published:
            read = [task.read(text, task.published) for text in said]
            found[f"{name}/as_published"] = ClassScore("f1_as_published", weighted_f1(right, read), n, guessed)
    return found


def likelier_words(model: Any, tokenizer: Any, task: ClassTask, asked: Sequence[ClassQuestion]) -> list[int]:
    """Return for each question the class whose word is the most probable one, by mean log-probability per token."""
    from errata.evaluate.scoring import score

    probes = [Probe("rewrite", question.prompt.rstrip(" "), word) for question in asked for word in task.words]
    found = [math.inf if one.nll_target is None else one.nll_target for one in score(model, tokenizer, probes)]
    labels, count = list(task.words.values()), len(task.words)
    each = [found[start : start + count] for start in range(0, len(found), count)]
    return [labels[losses.index(min(losses))] for losses in each]


def weighted_f1(right: Sequence[int], said: Sequence[int]) -> float:
    """Return the mean F1 of the classes, each weighted by how many right answers have it."""
    counts = Counter(right)
    total = 0.0
    for label, count in counts.items():
        hits = sum(r == s == label for r, s in zip(right, said, strict=True))
        given = sum(s == label for s in said)
        total += count * (2 * hits / (count + given))
    return total / len(right)
