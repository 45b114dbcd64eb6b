"""`errata trace`: one fact, the facts of a dataset, and what it refuses."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from errata.benchmarks.reports import panels
from errata.benchmarks.tracing import heat_maps
from errata.cli import main
from errata.editors.core.errors import ConfigError, ErrataError, RequestError

PROMPT = "prompt=Q: Which city is the capital of {}? A:"


pytestmark = pytest.mark.usefixtures("world_loaded_once")


def typed(*words: str) -> str:
    out = io.StringIO()  # notes go elsewhere, beside which JSON is whole
    console = Console(file=out, width=160)
    assert main.run(["trace", "model=world", *words], console, Console(file=io.StringIO())) == 0
    return out.getvalue()


@pytest.mark.usefixtures("_nothing_rendered")
def test_one_fact_is_traced_with_a_donor_of_the_dataset(tmp_path: Path) -> None:
    shown = typed(PROMPT, "subject=Gavaria", "dataset=world", f"out={tmp_path}")
    assert "'Brulminster'" in shown
    row = next(line.split() for line in shown.splitlines() if line.startswith(" Gavaria*"))
    assert float(row[1]) > 0.9  # the state of the subject brings the answer back
    written = json.loads((tmp_path / "trace.json").read_text())
    assert written["settings"]["corruption"] == "swap"
    assert len(written["grids"]["state"]["kl"]) == len(written["tokens"])
    assert (tmp_path / "trace.png").read_bytes()


@pytest.mark.usefixtures("_nothing_rendered")
def test_the_facts_of_a_dataset_are_averaged_with_intervals(tmp_path: Path) -> None:
    words = ("dataset=world", "dataset.split=dev", "n_facts=3", "grids=state")
    shown = typed(*words, f"out={tmp_path}")
    assert "3 facts traced" in shown
    assert [line for line in shown.splitlines() if line.startswith("last subject")]
    facts = [json.loads(line) for line in (tmp_path / "facts.jsonl").read_text().splitlines()]
    summary = json.loads((tmp_path / "trace.json").read_text())
    assert len(facts) == summary["counts"]["traced"] == 3
    last = summary["effects"]["state"]["logit_difference"]["last"]
    assert last["mean"][-1] == pytest.approx(1)
    assert all(low <= mean <= high for low, mean, high in zip(last["low"], last["mean"], last["high"], strict=True))
    assert json.loads(typed(*words, "--json"))["effects"].keys() == {"state"}


def test_the_preset_of_rome_is_noise_windows_and_probabilities() -> None:
    shown = json.loads(typed(PROMPT, "subject=Gavaria", "preset=rome", "grids=mlp", "samples=2", "--json"))
    assert shown["corruption"].startswith("noise s3")
    assert shown["settings"] | {"corruption": "s3", "window": 10, "metric": "probability"} == shown["settings"]
    assert set(shown["grids"]) == {"mlp, window 10"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "expected model=MODEL, and prompt"),
        ((PROMPT,), "subject= is missing"),
        ((PROMPT, "subject=Gavaria"), "give donor=SUBJECT"),
        ((PROMPT.replace("{}", "France"), "subject=Gavaria", "donor=Xyz"), "holds neither"),
        ((PROMPT, "subject=Gavaria", "donor=a b c d e"), "must differ in the subject's tokens alone"),
        ((PROMPT, "subject=Gavaria", "preset=rom"), "did you mean 'rome'"),
        ((PROMPT, "subject=Gavaria", "corruption=s3", "donor=X"), "noise needs none"),
        ((PROMPT, "subject=Gavaria", "corruption=x3"), "unknown rule of noise 'x3'"),
        ((PROMPT, "subject=Gavaria", "donor=X", "grids=stat"), "did you mean 'state'"),
        (("dataset=world", "donor=X"), "donor= goes with prompt="),
        ((PROMPT, "subject=Gavaria", "donor=X", "n_facts=3"), "n_facts= goes with dataset="),
        (("dataset=world", "samples=3"), "goes with noise"),
        ((PROMPT, "subject=Gavaria", "corruption=s3", "window=40"), "window: expected at most 6, the layers of"),
        ((PROMPT, "subject=Gavaria", "corruption=0.1%"), "write 0.001"),
        ((PROMPT.replace("{}", "Gavaria"), "subject=Gavarria", "corruption=s3"), "did you mean 'Gavaria'?"),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], told: str) -> None:
    with pytest.raises((ConfigError, RequestError)) as error:
        typed(*words)
    assert told in str(error.value)
    assert isinstance(error.value, ErrataError)


def test_what_may_be_a_mistake_is_told_and_traced() -> None:
    errors = io.StringIO()
    words = ["model=world", PROMPT, "subject=Gavarria", "dataset=world", "preset=rome", "grids=mlp", "samples=1"]
    assert main.run(["trace", *words], Console(file=io.StringIO()), Console(file=errors, width=160)) == 0
    assert "no subject 'Gavarria', which is traced as it is; did you mean 'Gavaria'?" in errors.getvalue()
    assert "windows of 10 layers are wider than the model, which has 6; window=N" in errors.getvalue()


def test_facts_that_cannot_be_traced_are_counted(tmp_path: Path) -> None:
    def record(number: int, prompt: str, subject: str, answer: str) -> dict[str, Any]:
        rewrite = {"prompt": prompt, "subject": subject, "target_true": {"str": answer}, "target_new": {"str": "Xyz"}}
        return {
            "case_id": number,
            "requested_rewrite": rewrite,
            "paraphrase_prompts": ["x"],
            "neighborhood_prompts": ["y"],
        }

    question = "Q: Which city is the capital of {}? A:"
    path = tmp_path / "counterfact.json"
    path.write_text(
        json.dumps([record(1, question, "Gavaria", "Nonsense"), record(2, question, "Drailmune", "Jistquay")])
    )
    with pytest.raises(ConfigError) as error:
        typed("dataset=counterfact", f"dataset.path={path}")
    assert "1 answered otherwise" in str(error.value)
    assert "1 no donor found" in str(error.value)


def test_dollar_signs_in_tokens_and_answers_are_drawn_as_they_are() -> None:
    drawn = heat_maps._panels({"state": [[0.1, 0.2]], "mlp": [[0.1, -0.8]]}, ["$\\x$"], "nats")
    assert panels.png(drawn, title="denoising: a$\\frac$").startswith(b"\x89PNG")
    assert [panel.draw.keywords["most"] for panel in drawn] == [0.8, 0.8]  # one scale of colours
