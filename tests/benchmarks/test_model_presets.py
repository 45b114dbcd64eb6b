"""hparams/model: every preset is a configuration of its methods, and the newer ones state where each value is from."""

from __future__ import annotations

from importlib.resources import files

import pytest

from errata import editors
from errata.benchmarks.bench.compose import HPARAMS, choices, compose

# Written before values had their origin beside them: their head says it.
EARLIER = ("custom", "gpt-j", "gpt2-xl", "llama-3-8b", "smollm2", "world")


@pytest.mark.parametrize("name", choices("model"))
def test_the_fields_of_a_preset_are_those_of_its_methods(name: str) -> None:
    overrides = ["model.name=x"] if name == "custom" else []
    model = compose("bench", [f"model={name}", *overrides])["model"]
    assert model["name"]
    for method, fields in model["editors"].items():
        editors.get(method).Config.from_dict({**fields}, path=f"{method}.")


@pytest.mark.parametrize("name", [name for name in choices("model") if name not in EARLIER])
def test_every_value_of_a_newer_preset_has_its_origin_in_a_comment(name: str) -> None:
    lines = (files(HPARAMS) / "model" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    values = [line for line in lines if line.startswith("    ") and ":" in line]
    assert [line for line in values if " # " not in line] == []
