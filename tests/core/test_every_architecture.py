"""Every type of model that AutoModelForCausalLM knows runs as it does by itself, or is refused with a reason.

docs/architectures.md holds what is found here.
"""

from __future__ import annotations

import pytest
from every_architecture import BEGIN, END, PAGE, model_types, tried


def lines() -> dict[str, str]:
    """The lines of the page's table, by the type of the model."""
    table = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    return {line.split("|")[1].strip(): line for line in rows[1:]}


def test_the_page_names_every_type() -> None:
    assert list(lines()) == model_types()


@pytest.mark.slow
@pytest.mark.parametrize("model_type", model_types())
def test_a_type_is_read_as_it_computes_or_refused_and_the_page_says_which(model_type: str) -> None:
    assert tried(model_type).line == lines()[model_type]
