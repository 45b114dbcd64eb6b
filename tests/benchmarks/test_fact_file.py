"""A file of facts: three formats that say the same, and whatever is wrong in one, at once and by its line."""

from __future__ import annotations

import csv
import io
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errata.benchmarks.facts.fact_file import FactsError, read
from errata.editors.core.errors import DatasetError
from errata.editors.core.request import EditRequest
from errata.evaluate.probes import Probe

REQUESTS = [
    EditRequest("The capital of {} is", "Gavaria", "Praminster", "Brulminster", id="gavaria"),
    EditRequest('Who said "a, b" of {}? It was', "São, Verão", "ü 😀 #1"),
    EditRequest("{} was founded in", "Ost", "1945"),
    EditRequest("Is {} a city?", "Quelm", "no"),
]
YAML = """\
# corrections
facts:
  - prompt: The capital of {} is
    subject: Gavaria
    target: Praminster
    target_true: Brulminster     # as it was
    id: gavaria
  - {prompt: 'Who said "a, b" of {}? It was', subject: "São, Verão", target: "ü 😀 #1"}

  - prompt: '{} was founded in'
    subject: Ost
    target: 1945
  - prompt: Is {} a city?
    subject: Quelm
    target: no
    target_true: null
"""
JSONL = "\n\n".join(
    json.dumps({name: value for name, value in vars(request).items() if value is not None and (name != "id" or not n)})
    for n, request in enumerate(REQUESTS)
)
CSV = """\
subject,target,prompt,target_true,id
Gavaria,Praminster,The capital of {} is,Brulminster,gavaria

"São, Verão",ü 😀 #1,"Who said ""a, b"" of {}? It was",,
Ost,1945,{} was founded in,,
Quelm,no,Is {} a city?,,
"""


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problems(folder: Path, name: str, text: str) -> list[str]:
    path = written(folder, name, text)
    with pytest.raises(FactsError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    found = zip(caught.value.lines, caught.value.problems, strict=True)
    assert all(line == f"{path}:{problem.line}: {problem.message}" for line, problem in found)
    return [f"{problem.line}: {problem.message}" for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [("f.yaml", YAML, [3, 8, 10, 13]), ("f.jsonl", JSONL, [1, 3, 5, 7]), ("f.csv", CSV, [2, 4, 5, 6])],
)
def test_all_formats_say_the_same_with_the_line_of_each_fact(
    tmp_path: Path, name: str, text: str, lines: list[int]
) -> None:
    facts = read(written(tmp_path, name, text))
    content = [(r.prompt, r.subject, r.target, r.target_true) for r in (fact.request for fact in facts)]
    assert content == [(r.prompt, r.subject, r.target, r.target_true) for r in REQUESTS]
    assert [fact.line for fact in facts] == lines
    assert facts[0].request.id == REQUESTS[0].id == "gavaria"


def test_a_list_alone_a_byte_order_mark_and_cells_over_several_lines_are_read(tmp_path: Path) -> None:
    alone = YAML.replace("facts:\n", "")
    assert len(read(written(tmp_path, "f.yml", alone))) == 4
    assert len(read(written(tmp_path, "f.csv", "\ufeff" + CSV))) == 4
    facts = read(written(tmp_path, "g.csv", 'prompt,subject,target\n"A line\nof {} is",x,y\n{} is,x,z\n'))
    assert [fact.line for fact in facts] == [2, 4]
    assert facts[0].request.text == "A line\nof x is"


@pytest.mark.parametrize("name", ["f.yaml", "f.jsonl", "f.csv"])
def test_an_empty_file_has_no_facts(tmp_path: Path, name: str) -> None:
    assert read(written(tmp_path, name, "")) == []
    assert read(written(tmp_path, "g.yaml", "facts:\n")) == read(written(tmp_path, "h.csv", "prompt,subject\n")) == []


ASKED = """\
chat: true
join: ""
facts:
- prompt: The capital of {} is
  subject: Gavaria
  target: Praminster
  paraphrases:
  - "{} is governed from"
  - {prompt: "The seat of {}", answer: Praminster City, chat: false, join: " "}
  unchanged: [The capital of Mesmar is, {prompt: Sovaria lies in, answer: the north}]
- {prompt: 'x = ', target: "1", chat: no}
- prompt: 2 + 2 is
  target: five
  chat: false
  join: " "
"""


def test_facts_have_their_form_and_their_questions(tmp_path: Path) -> None:
    bad = problems(tmp_path, "bad.yaml", ASKED)
    assert bad == ["11: chat: expected true or false, got 'no'"]
    first, code, last = read(written(tmp_path, "f.yaml", ASKED.replace("chat: no", "chat: false")))
    assert (first.request.chat, first.request.join) == (True, "")
    assert first.paraphrases == (
        Probe("paraphrase", "Gavaria is governed from", "Praminster", None, "", True),
        Probe("paraphrase", "The seat of Gavaria", "Praminster City", None, " ", False),
    )
    assert first.unchanged == (
        Probe("neighborhood", "The capital of Mesmar is", None, None, "", True),
        Probe("neighborhood", "Sovaria lies in", "the north", None, "", True),
    )
    assert (code.request.prompt, code.request.subject, code.request.join) == ("x = ", None, "")
    assert (last.request.chat, last.request.join, last.paraphrases) == (False, " ", ())


def test_json_lines_and_csv_say_the_same_of_forms_and_questions(tmp_path: Path) -> None:
    wanted = read(written(tmp_path, "f.yaml", ASKED.split("- {prompt: 'x")[0]))
    row = {"prompt": "The capital of {} is", "subject": "Gavaria", "target": "Praminster"}
    seat = {"prompt": "The seat of {}", "answer": "Praminster City", "chat": False, "join": " "}
    north = {"prompt": "Sovaria lies in", "answer": "the north"}
    asked = {"paraphrases": ["{} is governed from", seat], "unchanged": ["The capital of Mesmar is", north]}
    lines = [json.dumps({"chat": True, "join": ""}), json.dumps({**row, **asked})]
    (fact,) = read(written(tmp_path, "f.jsonl", "\n".join(lines)))
    assert (fact.request, fact.paraphrases, fact.unchanged) == (
        wanted[0].request, wanted[0].paraphrases, wanted[0].unchanged,
    )  # fmt: skip
    out = io.StringIO()
    table = csv.writer(out)
    table.writerow([*row, "chat", "join", *asked])
    table.writerow([*row.values(), "true", '""', *(json.dumps(questions) for questions in asked.values())])
    table.writerow(["{} lies in", "Ost", "x", "", "", "", "Mesmar lies in\n\nSovaria lies in"])
    fact, other = read(written(tmp_path, "f.csv", out.getvalue()))
    assert (fact.request, fact.paraphrases, fact.unchanged) == (
        wanted[0].request, wanted[0].paraphrases, wanted[0].unchanged,
    )  # fmt: skip
    assert [probe.prompt for probe in other.unchanged] == ["Mesmar lies in", "Sovaria lies in"]
    assert (other.request.chat, other.request.join) == (False, None)


BAD_FORMS = {
    ("f.jsonl", '{"prompt": "a", "target": "b", "chat": 1}'): "1: chat: expected true or false, got 1",
    ("f.jsonl", '{"join": 3}'): "1: join: expected text, got 3",
    ("f.jsonl", '{"prompt": "a", "target": "b", "unchanged": "c"}'): "1: unchanged: expected a list of questions",
    ("f.jsonl", '{"prompt": "a", "target": "b", "unchanged": [""]}'): "1: unchanged: expected a prompt, got ''",
    ("f.jsonl", '{"prompt": "a", "target": "b", "unchanged": [4]}'): "1: unchanged: expected a prompt, or prompt and",
    ("f.yaml", "chat: maybe\nfacts: []\n"): "1: chat: expected true or false, got 'maybe'",
    ("f.yaml", "- prompt: a\n  target: b\n  paraphrases:\n  - c\n  - promt: d\n"): "5: paraphrases: unknown field",
    ("f.yaml", "- prompt: a\n  target: b\n  paraphrases:\n  - c\n  -\n"): "5: paraphrases: expected a prompt",
    ("f.yaml", "- prompt: a\n  target: b\n  paraphrases:\n  - '{} d'\n"): "4: paraphrases: '{} d' holds '{}', but",
    ("f.yaml", "- prompt: a\n  target: b\n  unchanged:\n  - {prompt: c, answer: ' '}\n"): "4: unchanged: answer: exp",
    ("f.yaml", "- prompt: a\n  target: b\n  unchanged: {a: b}\n"): "3: unchanged: expected text, got a mapping",
    ("f.yaml", "- prompt: '{} a'\n  target: b\n"): "1: subject: is missing, and '{}' stands for it",
    ("f.csv", "prompt,target,chat\na,b,perhaps\n"): "2: chat: expected true or false, got 'perhaps'",
    ("f.csv", 'prompt,target,unchanged\na,b,"[1"\n'): "2: unchanged: is no JSON",
}


@pytest.mark.parametrize(("name", "text"), BAD_FORMS)
def test_a_bad_form_or_question_is_named_with_its_line(tmp_path: Path, name: str, text: str) -> None:
    assert any(problem.startswith(BAD_FORMS[name, text]) for problem in problems(tmp_path, name, text))


BAD = """\
facts:
- prompt: The capital of {} is
  subject: Gavaria
  target: Praminster
- prompt: the  CAPITAL of {} is
  subject: Gavaria
  target: Oslen
- prompt: Who knows
  subject: Gavaria
  target: x
- promt: x {}
  subject: [a]
- prompt: The capital of Gavaria is
  subject: Gavaria
  target: Praminster
  target: Praminster
- 7
- prompt: '{} is'
  subject: Ost
  target: Ost
  id: one
- prompt: '{} was'
  subject: Ost
  target: Ost
  id: one
"""


def test_whatever_is_wrong_is_found_at_once_and_by_its_line(tmp_path: Path) -> None:
    assert problems(tmp_path, "f.yaml", BAD) == [
        "5: contradicts line 2: 'the  CAPITAL of Gavaria is' cannot be both 'Praminster' and 'Oslen'; keep one",
        "8: prompt: holds neither '{}' nor the subject 'Gavaria': 'Who knows'",
        "11: unknown field 'promt'; did you mean 'prompt'?",
        "11: prompt is missing",
        "11: target is missing",
        "12: subject: expected text, got a sequence",
        "13: repeats line 2: 'The capital of Gavaria is' -> 'Praminster'; drop one",
        "16: target is given twice",
        "17: expected a fact with prompt, subject and target",
        "22: has the id 'one' of line 18; give each its own",
    ]


WRONG = {
    ("f.yaml", "facts: 3\n"): "1: expected a list of facts",
    ("f.yaml", "a: 1\nfacts: []\n"): "1: expected facts: and nothing beside it, got 'a'",
    ("f.yaml", "- prompt: '{\n"): "2: is no YAML",
    ("f.yaml", "- a\n---\n- b\n"): "2: is no YAML",
    ("f.yaml", "x: \x07\n"): "1: is no YAML",
    ("f.yaml", "[" * 5000): "1: is no YAML",
    ("f.jsonl", "[" * 100_000): "1: is no JSON",
    (
        "f.yaml",
        "- prompt: !!python/object/apply:os.system [ls]\n  subject: a\n  target: b\n",
    ): "1: prompt: expected text",
    ("f.jsonl", "{}\n{\n"): "2: is no JSON",
    ("f.jsonl", "[1]\n"): "1: expected an object",
    ("f.jsonl", '{"prompt": "{} is", "subject": "a", "target": 3}\n'): "1: target: expected text, got 3",
    ("f.jsonl", '\n{"prompt": "{} is", "subject": "a", "target": "x", "target": "y"}\n'): "2: target is given twice",
    ("f.jsonl", '{"prompt": "{} is", "subject": "a", "target": "b", "target_true": "b"}'): "1: target_true: the new",
    ("f.csv", "promt,subject,target\na,b,c\n"): "1: unknown column 'promt'; did you mean 'prompt'?",
    ("f.csv", "prompt,subject,target\n{} is,a\n"): "2: expected 3 cells as in the first line, got 2",
    ("f.csv", 'prompt,subject,target\n{} is,a,"b\n'): "2: is no CSV",
    ("f.csv", "prompt,subject,target\n{} is,a,\n"): "2: target is missing",
}


@pytest.mark.parametrize(("name", "text"), WRONG)
def test_what_is_wrong_with_a_format_is_said_by_its_line(tmp_path: Path, name: str, text: str) -> None:
    assert any(problem.startswith(WRONG[name, text]) for problem in problems(tmp_path, name, text))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"absent\.yaml: cannot be read: No such file"):
        read(tmp_path / "absent.yaml")
    (tmp_path / "f.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DatasetError, match="UTF-8"):
        read(tmp_path / "f.csv")
    with pytest.raises(DatasetError, match=r"expected a name that ends in \.yaml"):
        read(written(tmp_path, "facts.txt", ""))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([("f.yaml", YAML), ("f.jsonl", JSONL), ("f.csv", CSV)]), st.integers(0, 2**32))
def test_no_damage_to_a_file_is_more_than_a_typed_error(
    tmp_path_factory: pytest.TempPathFactory, file: tuple[str, str], seed: int
) -> None:
    rng, (name, text) = random.Random(seed), file
    damaged = list(text)
    for _ in range(rng.randrange(1, 4)):
        damaged[rng.randrange(len(damaged))] = rng.choice("{}[]:,\"'\n\t -#&*!|>%@`\x00é0")
    try:
        facts = read(written(tmp_path_factory.mktemp("facts"), name, "".join(damaged)))
    except DatasetError as error:
        assert str(error)
    else:
        assert all(fact.request.text for fact in facts)
