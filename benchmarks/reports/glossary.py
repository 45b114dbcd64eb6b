"""What every number of a report means, in a sentence or two. docs/results.md says it at length."""

from __future__ import annotations

# Name, how it is shown, meaning.
METRICS = (
    (
        "score",
        "Score",
        "Harmonic mean of reliability, generalization and locality, and of distracting locality where it was "
        "asked: low where any of them is.",
    ),
    (
        "reliability",
        "Reliability",
        "The edited prompt is answered with the new answer. The papers' efficacy.",
    ),
    (
        "generalization",
        "Generalization",
        "So are other wordings of the same question. The papers' paraphrase success.",
    ),
    (
        "locality",
        "Locality",
        "Questions about other subjects keep their true answers: in CounterFact those with the same true answer, "
        "in zsRE an unrelated one. The papers' specificity, or neighbourhood success.",
    ),
    (
        "distracting_locality",
        "Distracting locality",
        "The same, asked behind a sentence that states the edit, as in CounterFact+.",
    ),
    (
        "portability",
        "Portability",
        "What follows from the new answer is answered, one step of reasoning away.",
    ),
)
SCORINGS = (
    (
        "probability",
        "Probability comparison",
        "The wanted answer is likelier than its competitor, by mean log-probability a token. It can be so "
        "while the model would say neither.",
    ),
    (
        "teacher_forced",
        "Teacher-forced tokens",
        "The share of the wanted answer's tokens that are the likeliest behind the prompt and the tokens "
        "before them. What the zsRE papers call accuracy; it is no exact match.",
    ),
    (
        "generation",
        "Free generation",
        "Greedy decoding from the prompt alone, up to its natural stop, begins with the wanted answer. The "
        "strictest of the three.",
    ),
    (
        "generation_containment",
        "Free generation, anywhere",
        "The same text holds the wanted answer anywhere: kinder to a model that first says something else.",
    ),
)
DAMAGE = (
    (
        "perplexity",
        "Perplexity",
        "Of held-out text, edited over untouched; over single edits the geometric mean. An edit that more "
        "than doubles it, or loses more than half of the known facts, is called disabling.",
    ),
    (
        "retention",
        "Known facts kept",
        "Share of the facts of other subjects that the untouched model knew and still answers.",
    ),
    (
        "drift",
        "Drift of neighbours",
        "How far the next token's distribution has moved behind the neighbours' prompts (Kullback-Leibler, in nats).",
    ),
    (
        "fluency",
        "Fluency",
        "Weighted entropy of the two- and three-word sequences in texts about the subject, in bits: low where "
        "the model repeats itself.",
    ),
    (
        "seconds",
        "Seconds per edit",
        "Time of the method alone, evaluation left out, second moments too once they are cached.",
    ),
)
INTERVALS = (
    "Intervals are percentile bootstraps over cases. Where all cases agree, as in 100.0 (100–100), there is nothing to "
    "resample: with n cases, the true share can still lie about 3 / n from it. The highest mean of a column is bold. "
    "Underlined are those that cannot be told from it over the same cases: the interval of the paired difference holds "
    "zero, or its exact test (McNemar for shares of yes and no, flipped signs for other means) does not reject. "
    "Of a sequence of edits the interval is over its cases; another order of the edits would be another sequence."
)
