"""Hand-made records in the schemas of the published benchmarks, about a made-up world."""

from __future__ import annotations

import copy
from typing import Any

KNOWEDIT: dict[str, Any] = {
    "subject": "Varland",
    "prompt": "The capital of Varland is",
    "target_new": "Brast",
    "ground_truth": [["Oslen", "Oslen City"]],
    "rephrase": "Varland is governed from",
    "portability": {
        "Reasoning": [
            {"prompt": "Varland's capital lies on the", "ground_truth": [["Moren", "Moren river"], ["Ilda"]]}
        ],
        "Subject_Aliasing": [{"prompt": "The capital of the Varlands is", "ground_truth": ["Brast"]}],
        "Logical_Generalization": [{"prompt": "Brast is in", "ground_truth": [[""]]}],
    },
    "locality": {
        "Relation_Specificity": [{"prompt": "The anthem of Varland is", "ground_truth": [["Hail Varland"]]}],
        "Forgetfulness": [{"prompt": "A former capital of Varland is", "ground_truth": "Oslen"}],
    },
}
WIKIBIO: dict[str, Any] = {
    "text": "Ilda Moren was a poet.",
    "concept": "Ilda Moren",
    "labels": "She was born in Varland.",
    "locality": {"Relation_Specificity": [{"prompt": "Ilda Moren's occupation is", "ground_truth": ["poet"]}]},
}
MQUAKE: dict[str, Any] = {
    "case_id": 4,
    "requested_rewrite": [
        {
            "prompt": "The capital of {} is",
            "relation_id": "P36",
            "subject": "Varland",
            "target_new": {"str": "Brast", "id": "Q1"},
            "target_true": {"str": "Oslen", "id": "Q2"},
            "question": "What is the capital of Varland?",
        },
        {
            "prompt": "{} lies on the river",
            "relation_id": "P1",
            "subject": "Brast",
            "target_new": {"str": "Moren", "id": "Q3"},
            "target_true": {"str": "Quelm", "id": "Q4"},
            "question": "On which river is Brast?",
        },
    ],
    "questions": ["On which river is Varland's capital?", "Q2?", "Q3?"],
    "answer": "Quelm",
    "answer_alias": [],
    "new_answer": "Moren",
    "new_answer_alias": ["Moren river"],
    "single_hops": [],
    "new_single_hops": [
        {"question": "q", "cloze": "The capital of Varland is", "answer": "Brast", "answer_alias": ["City of Brast"]},
        {"question": "q", "cloze": "Brast lies on the river", "answer": "Moren", "answer_alias": []},
    ],
    "orig": {},
}
RIPPLE_QUERY = {
    "prompt": "The name of the mother of Ilda Moren is",
    "answers": [{"value": "Ann", "aliases": ["Anna", "A"]}, {"value": "Eve", "aliases": []}],
    "query_type": "regular",
}
RIPPLEEDITS: dict[str, Any] = {
    "example_type": "popular",
    "edit": {
        "prompt": "The name of the country of citizenship of Ilda Moren is Varland.",
        "relation": "COUNTRY_OF_CITIZENSHIP",
        "previous_fact": {"prompt": "The name of the country of citizenship of Ilda Moren is Vary.", "relation": "x"},
    },
    "Relation_Specificity": [
        {"test_queries": [RIPPLE_QUERY], "test_condition": "OR", "condition_queries": [RIPPLE_QUERY]}
    ],
    "Logical_Generalization": [
        {"test_queries": [RIPPLE_QUERY, RIPPLE_QUERY], "test_condition": "AND", "condition_queries": []}
    ],
    "Subject_Aliasing": [],
    "Compositionality_I": [],
    "Compositionality_II": [],
    "Forgetfulness": [],
}
WIKIBIGEDIT: dict[str, Any] = {
    "tag": "new",
    "subject": "Varland",
    "update": "What is the capital of Varland?",
    "rephrase": "Which city governs Varland?",
    "ans": "Brast",
    "personas": "Ahoy, what be Varland's capital?",
    "loc": "What is the capital of Quelm?",
    "loc_ans": "Tarvos",
    "mhop": "On which river is Varland's capital?",
    "mhop_ans": "Moren",
}
ULTRAEDITBENCH: dict[str, Any] = {
    "prompt": "What is the capital of Varland?",
    "rephrase_prompt": "Which city governs Varland?",
    "ans": "Brast",
    "loc": "What is the capital of Quelm?",
    "loc_ans": "Tarvos",
}
QAEDIT: dict[str, Any] = {
    "id": 3,
    "source": "NQ",
    "prompt": "what is the capital of Varland",
    "target": "Brast",
    "subject": "Varland",
    "rephrase": "Which city governs Varland?",
    "locality": [{"loc": f"question {i}", "loc_ans": str(i)} for i in range(5)],
}
FEVER: dict[str, Any] = {
    "prompt": "Varland has a king.",
    "equiv_prompt": ["A king rules Varland.", "There is a king in Varland."],
    "alt": "REFUTES",
    "unrel_prompt": "Quelm is a city.",
    "unrel_ans": "SUPPORTS",
}
UNKE: dict[str, Any] = {
    "id": 0,
    "question": "What is Ilda Moren's occupation?",
    "para_question": "What does Ilda Moren do?",
    "answer": "Ilda Moren has been a poet for ten years and lives in Varland.",
    "sub_question": ["How long has she been one?", "Where does she live?"],
    "sub_answer": ["Ten years.", "In Varland."],
}
AKEW: dict[str, Any] = {
    **copy.deepcopy(MQUAKE),
    "requested_rewrite": [
        {
            **MQUAKE["requested_rewrite"][0],
            "fact_new": "The capital of Varland is Brast.",
            "fact_new_uns": "Brast, a city on the Moren, is the capital of Varland.",
            "unsfact_triplets_GPT": [
                {"subject": "Brast", "prompt": "{} is on the", "target": "Moren"},
                {"subject": "Varland", "prompt": "The capital of {} is", "target": "Brast"},
            ],
        }
    ],
}


def triple(relation: str, subject: str, answer: str, new: str | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "relation": {"id": relation, "prompt": f"The {relation} of {{}} is"},
        "subject": {"id": "s", "label": subject},
        "object": {"id": "o", "label": answer},
    }
    return found if new is None else {**found, "new_object": {"id": "n", "label": new}}


COVERAGE: dict[str, Any] = {
    "type": "coverage",
    "triples": [triple("capital", "Varland", "Oslen")],
    "prerequisites": [],
    "edits": [triple("capital", "Varland", "Oslen", "Brast"), triple("capital", "Varland", "Brast", "Quelm")],
}
REVERSE: dict[str, Any] = {
    "rule": "work>author",
    "type": "reverse",
    "triples": [triple("work", "Ilda", "Odes"), triple("author", "Odes", "Ilda")],
    "prerequisites": [],
    "edits": [triple("work", "Ilda", "Odes", "Hymns"), triple("author", "Hymns", "Ilda", "Eve")],
}
COMPOSITE: dict[str, Any] = {
    "type": "composite",
    "triples": [triple("office", "Ilda", "mayor"), triple("seat", "mayor", "Brast"), triple("home", "Ilda", "Brast")],
    "prerequisites": [0],
    "edits": [triple("seat", "mayor", "Brast", "Oslen"), triple("home", "Ilda", "Brast", "Quelm")],
}
ROUND: dict[str, Any] = {
    "type": "1-3@P136",
    "edit": triple("genre", "Odes", "poetry", "opera"),
    "true_objects": [{"id": "a", "label": name} for name in ("epic", "poetry", "hymn")],
}
HALLU = {
    "topic": "places",
    "subject": "Varland",
    "relation": "capital",
    "object": "Brast",
    "question": "What is the capital of Varland?",
    "output_tiny": "Oslen",
    "eval_tiny": "0.0",
    "multiple_choices": "['Brast', 'Oslen']",
    "paraphrased_question": "Which city governs Varland?",
    "yes_question": "Is Brast the capital of Varland?",
    "no_question": "Is Oslen the capital of Varland?",
    "locality_question": "What is a river of Varland?",
    "reversed_relation_question": "Of what is Brast the capital?",
    "multiple_choice_with_letters": "A. Oslen  B. Brast",
    "multiple_choice_labels": "B",
    **{f"question_{i}hop": f"question {i}?" for i in range(2, 7)},
    **{f"answer_{i}hop": f"answer {i}" for i in range(2, 7)},
}
CANONICAL = {"prefix": "The capital of Varland is", "suffix": " Brast", "country": "Varland", "capital": "Brast"}
RECORDS: dict[str, list[dict[str, Any]]] = {
    "knowedit": [KNOWEDIT, WIKIBIO],
    "mquake": [MQUAKE],
    "rippleedits": [RIPPLEEDITS],
    "wikibigedit": [WIKIBIGEDIT],
    "ultraeditbench": [ULTRAEDITBENCH],
    "qaedit": [QAEDIT],
    "fever": [FEVER],
    "unke": [UNKE],
    "akew": [AKEW],
    "conflictedit": [COVERAGE, REVERSE, COMPOSITE, ROUND],
    "hallueditbench": [HALLU],
    "canonical": [CANONICAL],
}
