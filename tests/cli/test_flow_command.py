"""`errata flow`: the shares of one prompt, its route, its files, and what it refuses."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typed_commands import run

from errata.cli import main
from errata.editors.core.errors import ConfigError, RequestError

PROMPT = "prompt=Q: Which city is the capital of Gavaria? A:"


pytestmark = pytest.mark.usefixtures("world_loaded_once")


def typed(*words: str) -> str:
    return run("flow", "model=world", *words)


def test_the_route_of_a_fact_leads_to_its_subject(tmp_path: Path) -> None:
    shown = typed(PROMPT, f"out={tmp_path}")
    assert "'Brulminster'" in shown
    assert "Gavaria" in next(line for line in shown.splitlines() if line.split()[:1] == ["3"])
    record = json.loads((tmp_path / "flow.json").read_text())
    subject = record["tokens"].index(" Gavaria")
    assert [f"I2_{subject}", "A3_11"] in [edge[:2] for edge in record["route"]]
    assert sum(record["token_shares"]) == pytest.approx(1, abs=1e-5)
    assert (tmp_path / "flow.png").read_bytes().startswith(b"\x89PNG")


def test_thresholds_norm_and_token_can_be_chosen() -> None:
    plain, other = (
        json.loads(typed(PROMPT, "--json", *more))
        for more in ((), ("threshold=0.3", "least=0.02", "norm=2", "token=8"))
    )
    slot = json.loads(typed(PROMPT.replace("Gavaria", "{}"), "subject=Gavaria", "--json"))
    assert slot == plain
    assert (plain["token"], other["token"], other["threshold"]) == (11, 8, 0.3)
    assert len(other["route"]) < len(plain["route"])
    heads = [part for layer in other["layers"] for row in layer["attention"] for part in row]
    assert min(part for part in heads if part) > 0.02


def test_a_state_whose_shares_are_all_dropped_has_no_attention() -> None:
    lines = [line.split() for line in typed(PROMPT, "least=0.99").splitlines()]
    layers = [words for words in lines if len(words) >= 3 and words[0] in "012345" and words[1][:2] in ("0.", "1.")]
    assert [words[1] for words in layers] == ["0.000"] * 6


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "expected model=MODEL prompt=TEXT"),
        ((PROMPT, "threshold=2"), "threshold: expected a share"),
        ((PROMPT, "least=x"), "least: expected a share"),
        ((PROMPT, "norm=3"), "norm: expected 1 or 2"),
        ((PROMPT, "token=last"), "token: expected a number"),
        ((PROMPT, "token=99"), "token: expected less than 12"),
        ((PROMPT, "tresh=1"), "threshold"),
        (("word", PROMPT), "expected name=value"),
        ((PROMPT, "subjct=x"), "did you mean 'subject'"),
    ],
)
def test_what_is_missing_or_wrong_is_refused(words: tuple[str, ...], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        main.run(["flow", "model=world", *words], Console(file=io.StringIO()), Console(file=io.StringIO()))


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match="field 'prompt': expected text of at least one token"):
        typed("prompt=")
