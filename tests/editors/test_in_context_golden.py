"""In-context editing against prompts and perplexities of the authors' code and of EasyEdit's."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from errata.editors import ICE
from errata.editors.core.contexts import asking
from errata.editors.core.contexts.context import Context, Fact, Retrieval
from errata.editors.core.contexts.demonstrations import drawn, read_demonstrations
from errata.editors.core.ledger.patch import Patch
from errata.evaluate.probes import Probe
from errata.evaluate.scoring import score

TOLERANCE = 1e-4  # relative error of a perplexity


@pytest.fixture(scope="module")
def prompts(golden_root: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    path = golden_root / "gpt2_tr" / "ike" / "prompts.json"
    return json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))


def _statement(record: dict[str, Any]) -> str:
    asked = record["requested_rewrite"]
    return f"{asked['prompt'].replace('{}', asked['subject'])} {asked['target_new']['str']}"


def test_demonstrations_are_drawn_and_ordered_as_by_the_authors(prompts: Any, tmp_path: Path) -> None:
    meta, _ = prompts
    path = tmp_path / "demonstrations.json"
    cleaned = [
        {**record, "paraphrase_prompts": meta["clean_paraphrases"][str(record["case_id"])]}
        for record in meta["demo_records"]
    ]
    path.write_text(json.dumps(cleaned))
    records = read_demonstrations(path)
    for count in (32, 4):
        draws = random.Random(42)  # one stream for all edits, as theirs
        for record, nearest, wanted in zip(
            meta["test_records"], meta[f"corpus_idx_{count}"], meta[f"prompts_{count}"], strict=True
        ):
            assert drawn([records[i - 2000] for i in nearest], _statement(record), draws) == wanted


def test_easyedit_takes_the_nearest_texts_of_all_records_the_nearest_first(prompts: Any, tmp_path: Path) -> None:
    meta, tensors = prompts
    given = meta["easyedit"]
    path = tmp_path / "records.json"
    path.write_text(json.dumps(given["train_records"]))
    texts = [text for record in read_demonstrations(path) for text in record.every]
    queries = [request["query"] for request in given["requests"]]
    assert texts + queries == given["sentences_in_order_of_embeddings"]
    unit = torch.nn.functional.normalize(tensors["easyedit.embeddings"], dim=-1)
    for request, row in zip(given["requests"], unit[len(texts) :] @ unit[: len(texts)].T, strict=True):
        order = row.argsort(descending=True).tolist()
        assert [texts[i] for i in order[:16]] == request["k16"]
        fact = Fact(f"{request['request']['prompt']} {request['request']['target_new']}")
        assert f"{asking.stated([fact], (), request['request']['prompt'])}\n\n" == request["query"]


def test_perplexities_behind_facts_and_demonstrations_are_theirs(
    golden_root: Path, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(asking, "ROOM", 0)  # theirs fill the positions
    meta, _ = prompts
    tokenizer = AutoTokenizer.from_pretrained(golden_root / "tokenizer")
    checked, found = 0, sorted(golden_root.glob("*/ike/scores_f32.json"))
    for path in found:
        model = AutoModelForCausalLM.from_pretrained(golden_root / "models" / path.parts[-3], dtype=torch.float32)
        editor = ICE(model, tokenizer)
        scores = json.loads(path.read_text())["records"]
        for record, shown, theirs in zip(meta["test_records"], meta["prompts_4"], scores, strict=True):
            for form in ("few", "none"):
                fact = Fact(_statement(record), tuple(shown) if form == "few" else ())
                patch = Patch({}, {editor.module_name: Context((fact,), Retrieval())})
                editor.ledger.append("context", patch)
                asked = [each for kind in ("rewrite", "paraphrase", "neighborhood") for each in theirs[form][kind]]
                probes = [Probe("rewrite", each["prompt"], *each["targets"]) for each in asked]
                for each, ours in zip(asked, score(model, tokenizer, probes), strict=True):
                    assert ours.nll_target is not None
                    assert ours.nll_other is not None
                    assert [math.exp(ours.nll_target), math.exp(ours.nll_other)] == pytest.approx(
                        each["ppl"], rel=TOLERANCE
                    ), (path, form, each["prompt"])
                    checked += 2
                editor.rollback()
    assert len(found) >= 2
    assert checked >= 200
