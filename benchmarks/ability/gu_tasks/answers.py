"""How far a text answers a record of Gu et al.'s tasks: functions of lm-eval's `process_results`.

Every record counts, those without an answer as well, which is their accuracy "over all". Their scripts differ here:

    open_qa        a mark of "found" is never taken back, so that later records are looked at in part
    entities       neighbouring entities are joined, an entity at the end of a sentence loses its last word, and of
                   Miscellaneous alone a sentence without one counts as missed
    summarization  the last 13 characters of every text are cut off, as if the end of text always stood there

Source: test-task-after-code/ of Gu et al.'s repository.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from errata.evaluate.answer_forms import squad_form

Doc = Mapping[str, Any]
Texts = Sequence[str]


def reasoning(doc: Doc, texts: Texts) -> dict[str, float]:
    """Return whether the number is in the text."""
    return {"acc": float(doc["number"].strip() in texts[0])}


def inference(doc: Doc, texts: Texts) -> dict[str, float]:
    """Return whether the text says true of an entailment, and false of the others."""
    return {"acc": float(("true" if doc["label"] == "entailment" else "false") in texts[0].lower())}


def open_qa(doc: Doc, texts: Texts) -> dict[str, float]:
    """Return whether some words in a row are one of the answers, in SQuAD's form."""
    said = squad_form(texts[0].rpartition("Answer:")[2]).split()
    answers = [squad_form(answer).split() for answer in doc["answers"]]
    return {"acc": float(any(_holds(said, answer) for answer in answers))}


def closed_qa(doc: Doc, texts: Texts) -> dict[str, float]:
    """Return whether the text says yes or no, as it should."""
    return {"acc": float(("yes" if doc["answer"] else "no") in texts[0].lower())}


def dialogue(doc: Doc, texts: Texts) -> dict[str, float]:
    """Return whether the text has the letter; "Chi", as in the prompt, is no answer."""
    return {"acc": float("Chi" not in texts[0] and doc["answers"] in texts[0])}


def summarization(doc: Doc, texts: Texts) -> dict[str, float]:
    """Return the mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L, without stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    return {"rouge": fmean(one.fmeasure for one in scorer.score(doc["summary"], texts[0]).values())}


def entities(doc: Doc, texts: Texts) -> dict[str, tuple[str, int, int]]:
    """Return the kind, how many of its entities the text has, and of how many; `mean_recall` sums them up."""
    return {"recall": (doc["kind"], sum(name in texts[0] for name in doc["entities"]), len(doc["entities"]))}


def sentiment(doc: Doc, texts: Texts) -> dict[str, float]:
    """Return whether the text says positive or negative, as it should."""
    return {"acc": float(("positive" if int(doc["label"]) == 1 else "negative") in texts[0].lower())}


def mean_recall(counts: Sequence[tuple[str, int, int]]) -> float:
    """Return the share of each kind's entities that were found, averaged over the kinds."""
    kinds = dict.fromkeys(kind for kind, _, _ in counts)
    return fmean(
        sum(found for other, found, _ in counts if other == kind) / sum(n for other, _, n in counts if other == kind)
        for kind in kinds
    )


def _holds(words: Sequence[str], wanted: Sequence[str]) -> bool:
    size = len(wanted)
    return size > 0 and any(list(words[i : i + size]) == list(wanted) for i in range(len(words) - size + 1))
