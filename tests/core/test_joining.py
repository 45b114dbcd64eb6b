"""Prompt and answer are one text, written as its language writes it."""

from __future__ import annotations

import pytest

from errata.editors.core.model.joining import joined, separator

WRITTEN = [
    ("The capital of France is", "Paris", "The capital of France is Paris"),
    ("Q: Who wrote it? A:", "Ann", "Q: Who wrote it? A: Ann"),
    ("Who wrote it?", '"Ann"', 'Who wrote it? "Ann"'),
    ("Столица Франции —", "Париж", "Столица Франции — Париж"),
    ("عاصمة فرنسا هي", "باريس", "عاصمة فرنسا هي باريس"),
    ("프랑스의 수도는", "파리", "프랑스의 수도는 파리"),
    ("फ़्रांस की राजधानी", "पेरिस", "फ़्रांस की राजधानी पेरिस"),
    ("法国的首都是", "马德里", "法国的首都是马德里"),
    ("法国的首都是：", "Madrid", "法国的首都是：Madrid"),
    ("フランスの首都は", "マドリード", "フランスの首都はマドリード"),
    ("เมืองหลวงของฝรั่งเศสคือ", "ปารีส", "เมืองหลวงของฝรั่งเศสคือปารีส"),
    ("pd.read_", "csv", "pd.read_csv"),
    ("pd.read_csv(", "'a.csv'", "pd.read_csv('a.csv'"),
    ('She said: "', "Yes", 'She said: "Yes'),
    ("She said: “", "Yes", "She said: “Yes"),
    ("The 'red'", "house", "The 'red' house"),
    ("It costs $", "5", "It costs $5"),
    ("anti-", "war", "anti-war"),
    ("one - ", "two", "one - two"),
    ("He left", ", and came back", "He left, and came back"),
    ("He left", "(twice)", "He left (twice)"),
    ("He left", "…", "He left…"),
    ("assistant\n", "Paris", "assistant\nParis"),
    ("The capital is ", "Paris", "The capital is Paris"),
    ("The capital is", " Paris", "The capital is Paris"),
    ("def f():", "\n    return 1", "def f():\n    return 1"),
]


@pytest.mark.parametrize(("prompt", "answer", "text"), WRITTEN)
def test_prompt_and_answer_join_as_the_writing_has_it(prompt: str, answer: str, text: str) -> None:
    assert joined(prompt, answer) == text


@pytest.mark.parametrize("join", ["", " ", "\n", " -> "])
def test_what_the_user_writes_between_the_two_stands_there(join: str) -> None:
    assert joined("a", "b", join) == f"a{join}b"


def test_nothing_joins_an_empty_text() -> None:
    assert separator("", "a") == separator("a", "") == ""
