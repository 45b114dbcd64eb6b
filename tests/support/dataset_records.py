"""Records in the schemas of CounterFact, zsRE and EasyEdit, and files of such records."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

COUNTERFACT: dict[str, Any] = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "The capital of {} is",
        "subject": "Varland",
        "relation_id": "P36",
        "target_new": {"str": "Brast"},
        "target_true": {"str": "Oslen"},
    },
    "paraphrase_prompts": ["Varland is governed from"],
    "neighborhood_prompts": ["The capital of Tarvos {0} is", "The seat of the Moren duchy is"],
    "attribute_prompts": ["The capital of Quelm is"],
    "generation_prompts": ["Varland's largest city is"],
}
ZSRE: dict[str, Any] = {
    "subject": "Varland",
    "src": "What is the capital of Varland?",
    "pred": "Oslen",
    "rephrase": "Which city governs Varland?",
    "alt": "Brast",
    "answers": ["Oslen", "Oslen City"],
    "loc": "nq question: who plays the lyre",
    "loc_ans": "Ilda Moren",
    "cond": "Oslen >> Brast || What is the capital of Varland?",
}
EASYEDIT: dict[str, Any] = {
    "prompt": "The capital of Varland is",
    "subject": "Varland",
    "target_new": "Brast",
    "ground_truth": "Oslen",
    "rephrase_prompt": "Varland is governed from",
    "locality_prompt": "The capital of Tarvos is",
    "locality_ground_truth": "Oslen",
}


def written(tmp_path: Path, content: Any, name: str = "data.json") -> Path:
    """Write a value as a JSON file and return its path."""
    path = tmp_path / name
    path.write_text(json.dumps(content))
    return path


def changed(record: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of the record with the field at `path` set, or removed where the value is Ellipsis."""
    record = copy.deepcopy(record)
    *parents, last = path.split(".")
    place = record
    for parent in parents:
        place = place[parent]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return record
