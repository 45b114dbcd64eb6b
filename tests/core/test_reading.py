"""What a model reads for a prompt and an answer: ids of the text as it stands, in a chat inside the template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from errata.editors import FTM, ROME
from errata.editors.core.errors import RequestError
from errata.editors.core.families.fine_tuning import prompt_and_answer
from errata.editors.core.model.architecture import describe
from errata.editors.core.model.reading import as_read, in_chat, read_ids
from errata.editors.core.model.tokens import answer_ids, prompt_ids
from errata.editors.core.request import EditRequest
from errata.evaluate.probes import Probe
from errata.evaluate.scoring import score
from errata.testing.tiny_models import tiny_tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}[end]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
SPACED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<u> {{ m.content }} </u>"
    "{% else %} {{ m.content }} {% endif %}{% endfor %}"
)
PAIRS = [
    ("The capital of Varland is", "Oslen"),
    ("the place (", "Oslen"),
    ("法国的首都是", "马德里"),
    ("pd.read_", "csv("),
    ("It lies in\n", "Varland"),
    ("It lies in", ", say, Varland"),
    ("It lies in ", "Varland"),
]


@pytest.fixture
def tokenizer() -> Any:
    made = tiny_tokenizer()
    made.chat_template = TEMPLATE
    return made


def all_tokenizers(models_root: Path) -> list[Any]:
    from transformers import AutoTokenizer

    return [tiny_tokenizer(), tiny_tokenizer(bos=True), AutoTokenizer.from_pretrained(models_root / "cf-llama")]


@pytest.mark.parametrize(("prompt", "answer"), PAIRS)
def test_ids_of_prompt_and_answer_are_those_of_the_text(prompt: str, answer: str, models_root: Path) -> None:
    for made in all_tokenizers(models_root):
        ids, wanted = read_ids(made, prompt, answer)
        assert ids == prompt_ids(made, prompt)
        text = made.decode([*ids, *wanted], skip_special_tokens=True)
        assert text == made.decode(prompt_ids(made, as_text(prompt, answer)), skip_special_tokens=True)


def as_text(prompt: str, answer: str) -> str:
    from errata.editors.core.model.joining import joined

    return joined(prompt, answer)


def test_where_both_begin_apart_the_ids_are_those_of_the_whole_text_behind_the_prompts(models_root: Path) -> None:
    for made in all_tokenizers(models_root):
        for prompt, answer in (PAIRS[0], PAIRS[5]):
            ids, wanted = read_ids(made, prompt, answer)
            assert [*ids, *wanted] == prompt_ids(made, as_text(prompt, answer))


def test_an_answer_of_nothing_is_refused(tokenizer: Any) -> None:
    with pytest.raises(RequestError, match="tokenises to nothing"):
        answer_ids(tokenizer, "x", " ")


def test_a_chat_is_the_template_around_the_message_and_nothing_before_the_answer(tokenizer: Any) -> None:
    read = in_chat(tokenizer, "Where does Ann live?")
    assert read.text == "[user]\nWhere does Ann live?[end]\n[assistant]\n"
    assert read.text[read.start :].startswith("Where does Ann live?")
    ids, answer = read_ids(tokenizer, "Where does Ann live?", "Oslen", chat=True)
    assert tokenizer.decode([*ids, *answer]) == f"{read.text}Oslen"


def test_a_chat_begins_with_one_token_of_beginning_whoever_writes_it() -> None:
    made = tiny_tokenizer(bos=True)
    for template in (TEMPLATE, "{{ bos_token }}" + TEMPLATE, SPACED):
        made.chat_template = template
        ids, _ = read_ids(made, "Where does Ann live?", "Oslen", chat=True)
        assert ids.count(made.bos_token_id) == 1, template
        assert ids[0] == made.bos_token_id, template


def test_what_a_template_writes_before_an_answer_stands_there() -> None:
    made = tiny_tokenizer(bos=True)
    made.chat_template = SPACED
    assert in_chat(made, "Where?").join == " "
    assert as_read(made, "Where?", chat=True, join="-").join == "-"


def test_without_a_template_chat_is_refused_and_says_what_to_do() -> None:
    with pytest.raises(RequestError, match=r"no chat template.*instruct model"):
        in_chat(tiny_tokenizer(), "Where?")


def test_a_template_that_changes_the_message_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | trim }}{% endfor %}"
    with pytest.raises(RequestError, match="changes the message"):
        in_chat(tokenizer, " Where? ")


def test_a_request_in_chat_is_edited_and_scored_where_the_chat_reads_it(make_tiny: Any, tokenizer: Any) -> None:
    model = make_tiny("gpt2")
    request = EditRequest("Where does {} live?", "Danielle Darrieux", "English", chat=True)
    probe = Probe("rewrite", request.text, "English", "French", chat=True)
    before = score(model, tokenizer, [probe])[0].nll_target
    with FTM(model, tokenizer, {"layers": [1]}).applied(request):
        after = score(model, tokenizer, [probe])[0].nll_target
        ids, answer = read_ids(tokenizer, request.text, "English", chat=True)
        row = torch.tensor([[*ids, *answer]])
        with torch.no_grad():
            logits = model(row).logits[0].log_softmax(-1)
        said = [logits[len(ids) - 1 + i, token].item() for i, token in enumerate(answer)]
    assert before is not None and after is not None
    assert after == pytest.approx(-sum(said) / len(said), abs=1e-4)
    assert after < before - 1
    assert prompt_and_answer(describe(model), tokenizer, request) == (tuple(ids), tuple(answer))


def test_the_search_for_a_value_reads_the_chat_with_each_context_inside_the_message(
    make_tiny: Any, tokenizer: Any
) -> None:
    request = EditRequest("Where does {} live?", "Danielle Darrieux", "English", chat=True)
    fields = {"layers": [1], "context_templates": ["{}", "Yes. {}"], "mom2_adjustment": False}
    editor = ROME(make_tiny("gpt2"), tokenizer, fields)
    for row, context in zip(editor.problem(request).rows, ("", "Yes. "), strict=True):
        ids, answer = read_ids(tokenizer, context + request.text, "English", chat=True)
        assert row.ids == (*ids, *answer[:-1])
        assert row.answer == tuple(answer)
        assert tokenizer.decode(row.ids[: row.start + 1]).endswith(f"[user]\n{context}Where does Danielle Darrieux")


def test_white_space_at_the_end_of_a_prompt_is_the_users(tokenizer: Any) -> None:
    request = EditRequest("The capital of {} is\n", "Varland", "Oslen")
    assert request.text == "The capital of Varland is\n"
    ids, answer = read_ids(tokenizer, request.text, request.target)
    assert tokenizer.decode([*ids, *answer]) == "The capital of Varland is\nOslen"


def test_plain_requests_are_written_as_before_and_others_say_their_form() -> None:
    plain = EditRequest("{} is", "Ann", "here", id="a")
    assert plain.as_dict() == {"prompt": "{} is", "subject": "Ann", "target": "here", "target_true": None, "id": "a"}
    other = EditRequest("{} is", "Ann", "here", join="", chat=True)
    assert {"join": "", "chat": True}.items() <= other.as_dict().items()
    assert EditRequest(**other.as_dict()) == other
    assert other.id != EditRequest("{} is", "Ann", "here").id


def test_a_message_that_also_begins_the_answer_is_found_in_its_own_turn(tokenizer: Any) -> None:
    for message in ("assistant", "stan"):
        read = in_chat(tokenizer, message)
        assert read.text[: read.start] == "[user]\n"
