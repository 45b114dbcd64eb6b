"""What every number of a report means, in a sentence or two. docs/results.md says it at length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from errata.editors.core.doubts import MEANINGS
from errata.evaluate import metrics

# Entries are (name, how it is shown, meaning).
Term = tuple[str, str, str]
SCORE: Term = (
    "score",
    "Score",
    "Harmonic mean of reliability, generalization and locality, and of distracting locality where it was "
    "asked: low where any of them is.",
)


def metric_terms() -> list[Term]:
    """Return the score and every metric that is shown, in the order of the columns."""
    return [SCORE, *((each.name, each.title, each.meaning) for each in metrics.declared() if each.is_shown)]


def metric_titles(measured: Iterable[str]) -> list[tuple[str, str]]:
    """Return name and title of the metrics that tables show, in the order of their columns.

    Args:
        measured: Names of metrics. A named group follows its metric in the order in which it is first named. A name
            that no installed package declares comes last, under its own name.
    """
    there = dict.fromkeys(measured)
    declared = [
        (name, f"{each.title}{_of_group(name)}")
        for each in metrics.declared()
        for name in there
        if each.is_shown and name.partition("/")[0] == each.name
    ]
    known = {each.name for each in metrics.declared()}
    others = [name for name in sorted(there) if name.partition("/")[0] not in known]
    return declared + [(name, name.replace("_", " ").capitalize()) for name in others]


def _of_group(name: str) -> str:
    """Return what follows a metric's title where it is over a named group of probes: ": Reasoning"."""
    group = name.partition("/")[2]
    return group and f": {group.replace('_', ' ')}"


def measured_titles(runs: Sequence[Mapping[str, Any]], scoring: str | None = None) -> list[tuple[str, str]]:
    """Return name and title of the metrics that any of the runs measured.

    Args:
        runs: As in results.json.
        scoring: Under this scoring alone; None: under any.
    """
    tables = (table for run in runs for name, table in run["summary"].items() if scoring in (None, name))
    return metric_titles(name for table in tables for name in table)


SCORINGS = (
    (
        "probability",
        "Probability comparison",
        "The wanted answer is more probable than its competitor, by mean log-probability per token. The model "
        "may say neither of them.",
    ),
    (
        "teacher_forced",
        "Teacher-forced tokens",
        "The share of the wanted answer's tokens that are the most probable ones after the prompt and the tokens "
        "before them. The zsRE papers call it accuracy; it is not an exact match.",
    ),
    (
        "generation",
        "Free generation",
        "Greedy decoding from the prompt alone, up to its natural stop, begins with the wanted answer. This is the "
        "strictest scoring.",
    ),
    (
        "generation_containment",
        "Free generation, anywhere",
        "The same text contains the wanted answer anywhere. This is kinder to a model that first says something else.",
    ),
    (
        "wild",
        "WILD, exact",
        "A free answer, cut off at the first stop string, is the wanted one and nothing else: lower case, without "
        "punctuation and articles. Neighbours that are unchanged have the same text as before.",
    ),
    (
        "wild_judged",
        "WILD, judged",
        "A judge finds the same text to give the wanted answer.",
    ),
    (
        "wild_f1",
        "WILD, F1 of words",
        "The F1 of the sets of words of the same text and of the wanted answer.",
    ),
    (
        "bleu",
        "BLEU",
        "BLEU of the free text against the wanted answer, over words.",
    ),
    (
        "rouge_l",
        "ROUGE-L, recall",
        "The share of the wanted answer's words that the free text has in the same order.",
    ),
    (
        "set_f1",
        "Set F1",
        "The F1 of two sets of tokens: the wanted answer's, and as many that the model writes behind the prompt. Order "
        "and repetition do not count. For locality the answer is what the untouched model writes.",
    ),
)
DAMAGE = (
    (
        "took",
        "Edits that took",
        "After the edit, the tokens of the new answer have at least even odds at the edited prompt, by mean "
        "log-probability. An edit that does not take may still pass by comparison of probabilities.",
    ),
    (
        "doubts",
        "Doubtful edits",
        "Edits by the signs in their reports that they will not hold or do damage, where there are any. An edit can "
        f"show several. {'; '.join(f'{name}: {meaning}' for name, meaning in MEANINGS.items())}.",
    ),
    (
        "perplexity",
        "Perplexity",
        "The perplexity of held-out text after the edit, over that before; over single edits, the geometric mean. "
        "An edit that more than doubles it, or loses more than half of the known facts, is called disabling.",
    ),
    (
        "retention",
        "Known facts kept",
        "The share of facts about other subjects that the untouched model knew and the edited model still answers.",
    ),
    (
        "drift",
        "Drift of neighbours",
        "How far the next token's distribution has moved after the neighbours' prompts (Kullback-Leibler, in nats).",
    ),
    (
        "memorization",
        "Memorization",
        "By how much the first token of the new answer becomes more probable at the edited prompt: log10 of P after "
        "over P before, so that 2 is a hundred times.",
    ),
    (
        "priming",
        "Priming",
        "The same at prompts where it should not: log10 of the mean of P after over P before, at prompts of other "
        "subjects, of other relations, and open ones. An edit that leaks nowhere has 0. Less is better.",
    ),
    (
        "fluency",
        "Fluency",
        "The weighted entropy of two- and three-word sequences in texts about the subject, in bits. It is low where "
        "the model repeats itself.",
    ),
    (
        "seconds",
        "Seconds per edit",
        "The time of the method alone, without evaluation and without what comes once for a model: contexts, second "
        "moments and their factors. CPU seconds are of all threads, and hardly depend on what else a machine does.",
    ),
)
# The scorings and their titles, in the order in which they are shown.
SCORING_TITLES = tuple((name, title) for name, title, _ in SCORINGS)
INTERVALS = (
    "Intervals are percentile bootstraps over cases. If all cases agree, as in 100.0 (100–100), there is nothing to "
    "resample: with n cases, the true share can still be about 3 / n away. The highest mean of a column is bold. "
    "A mean is underlined if it cannot be told from the best over the same cases: the interval of the paired "
    "difference contains zero, or its exact test (McNemar for shares of yes and no, flipped signs for other means) "
    "does not reject. A single case, or means whose intervals are apart over too few cases for a test, get no mark. "
    "The interval of a sequence is over its cases; another order of the edits would be another sequence. "
    "Runs that differ in their seed alone are one row: the mean over seeds, and the standard deviation between them."
)
