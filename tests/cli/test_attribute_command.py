"""`errata attribute`: one answer, the facts of a dataset, its files, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typed_commands import run

from errata.benchmarks.tracing import attribution_panels
from errata.editors.core.errors import ConfigError

PROMPT = "prompt=Q: Which city is the capital of {}? A:"


pytestmark = pytest.mark.usefixtures("world_loaded_once")


def typed(*words: str) -> str:
    return run("attribute", "model=world", *words)


def test_one_answer_is_attributed_and_drawn(tmp_path: Path) -> None:
    words = ("subject=Gavaria", "components=attention,mlp", "masks=40", "keep=0.8", "checks=0.8", "check_masks=12")
    shown = typed(PROMPT, *words, f"out={tmp_path}")
    assert "? A: -> Brul" in shown  # what the model says, its first token
    assert "12 components, 40 masks that keep 0.8" in shown
    written = json.loads((tmp_path / "attribution.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "components.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines[:2]] == ["0.attention", "0.mlp"]
    assert written["sums"]["mlp"][0] == pytest.approx(lines[1]["weights"][0], rel=1e-5)
    assert written["for"][0]["mean"] > 0
    assert written["for"][0]["low"] is None
    assert (tmp_path / "attribution.png").read_bytes().startswith(b"\x89PNG")
    whole = typed(PROMPT, *words[:3], "answer=Brulminster", "checks=")
    assert "? A: -> Brulminster" in whole
    assert "correlation" not in whole


def test_the_facts_of_a_dataset_have_intervals(tmp_path: Path) -> None:
    words = ("dataset=world", "n_facts=3", "components=heads", "layers=3,4", "checks=0.8", "top=2")
    found = json.loads(typed(*words, "--json"))
    assert [fact["least"] > 0 for fact in found["facts"]] == [True] * 3
    assert found["layers"] == [3, 4]
    assert all(entry["low"] <= entry["mean"] <= entry["high"] for entry in found["for"])
    assert len(attribution_panels.attribution_panels(found)) == 3
    shown = typed(*words)
    assert "3 facts that the model knows" in shown
    assert "its mean and 95 % interval over facts" in shown
    rewrite = {"prompt": "{} is", "subject": "Gavaria", "target_new": {"str": "b"}, "target_true": {"str": "c"}}
    record = {"case_id": 0, "requested_rewrite": rewrite, "paraphrase_prompts": ["x"], "neighborhood_prompts": ["y"]}
    (tmp_path / "facts.json").write_text(json.dumps([record]))
    with pytest.raises(ConfigError, match="gives none of 1 true answers"):
        typed("dataset=counterfact", f"dataset.path={tmp_path / 'facts.json'}")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "either prompt"),
        ((PROMPT, "dataset=world"), "either prompt"),
        (("dataset=world", "answer=x"), "answer= goes with prompt="),
        ((PROMPT, "n_facts=3"), "n_facts= goes with dataset="),
        ((PROMPT, "subject=Gavaria", "components=head"), "did you mean 'heads'"),
        ((PROMPT, "subject=Gavaria", "fit=lasso"), "fit: expected"),
        ((PROMPT, "subject=Gavaria", "keep=1"), "keep: expected a keep rate"),
        ((PROMPT, "subject=Gavaria", "checks=0.9,x"), "checks: expected a number"),
        ((PROMPT, "subject=Gavaria", "layers=9"), "layers: expected some of 0 to 5"),
        (("dataset=world", "dataset.split=both"), "dev or test"),
        (("Gavaria",), "expected name=value"),
    ],
)
def test_what_is_refused(words: tuple[str, ...], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        typed(*words)
