"""ICE, IKE and SCR: what a question reads, how facts are found, and that the ledger treats them as other edits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from quick_editors import REQUESTS

import errata
from errata.editors import ICE, IKE, ROME, SCR
from errata.editors.core.contexts import asking
from errata.editors.core.contexts.asking import AskedPrompt, read_on
from errata.editors.core.contexts.context import Context, Fact, Retrieval, contexts_of
from errata.editors.core.contexts.demonstrations import made_up, read_demonstrations
from errata.editors.core.contexts.similarity import similarities
from errata.editors.core.errors import ConfigError, DatasetError, ExportError, LedgerError, RequestError
from errata.editors.core.ledger.patch import Patch
from errata.editors.core.model.tokens import answer_ids, prompt_ids
from errata.editors.core.request import EditRequest
from errata.evaluate.generation import continuations
from errata.evaluate.probes import Probe
from errata.evaluate.scoring import make_plan, score
from errata.testing.laws import digest

FACT, ASKED = REQUESTS[0], "Where is the capital of Varland?"
READ = "New Fact: The capital of Varland is Brast\nPrompt: Where is the capital of Varland?"
PROBE = Probe("paraphrase", ASKED, "Brast")


@pytest.fixture
def model(make_tiny: Any) -> Any:
    return make_tiny("gpt2")


def read(editor: Any, *prompts: str) -> list[str]:
    return [each.text for each in read_on(editor.model, editor.tokenizer, [AskedPrompt(prompt) for prompt in prompts])]


def test_a_question_reads_the_fact_and_then_itself_and_after_an_undo_itself(model: Any, tiny_tokenizer: Any) -> None:
    editor = ICE(model, tiny_tokenizer)
    bare = score(model, tiny_tokenizer, [PROBE])
    edit = editor.apply(FACT)
    assert read(editor, ASKED) == [READ]
    (row,) = make_plan(tiny_tokenizer, [PROBE], model=model).rows
    answer = answer_ids(tiny_tokenizer, READ, "Brast")
    assert list(row) == [*prompt_ids(tiny_tokenizer, READ), *answer[:-1]]
    logits = model(torch.tensor([row])).logits[0].log_softmax(-1)
    start = len(row) - len(answer)
    wanted = -sum(float(logits[start + i, token]) for i, token in enumerate(answer)) / len(answer)
    (with_fact,) = score(model, tiny_tokenizer, [PROBE])
    assert with_fact.nll_target == pytest.approx(wanted, rel=1e-5)
    assert edit.diagnostics[0]["loss"] == pytest.approx(
        score(model, tiny_tokenizer, [Probe("rewrite", FACT.text, "Brast")])[0].nll_target, rel=1e-5
    )
    with editor.ledger.untouched():
        assert read(editor, ASKED) == [ASKED]
        assert score(model, tiny_tokenizer, [PROBE]) == bare
    edit.undo()
    assert read(editor, ASKED) == [ASKED]
    assert score(model, tiny_tokenizer, [PROBE]) == bare


def test_generation_reads_the_facts_too(model: Any, tiny_tokenizer: Any) -> None:
    editor = ICE(model, tiny_tokenizer)
    wanted = continuations(model, tiny_tokenizer, [READ], 6)
    with editor.applied(FACT):
        assert continuations(model, tiny_tokenizer, [ASKED], 6) == wanted
        (whole,) = read_on(model, tiny_tokenizer, [AskedPrompt(ASKED)])
        assert continuations(model, tiny_tokenizer, [whole], 6) == wanted


@pytest.mark.parametrize("encoder", ["tfidf", "hidden"])
def test_of_many_facts_a_question_reads_the_nearest(model: Any, tiny_tokenizer: Any, encoder: str) -> None:
    editor = ICE(model, tiny_tokenizer, {"encoder": encoder})
    edits = [editor.apply(request) for request in REQUESTS]
    for request in REQUESTS:
        (text,) = read(editor, request.text)
        assert text == f"New Fact: {request.text} {request.target}\nPrompt: {request.text}"
    edits[1].undo()
    assert "Darrieux is English" not in read(editor, REQUESTS[1].text)[0]
    edits[1].apply()
    assert "Darrieux is English" in read(editor, REQUESTS[1].text)[0]
    editor.rollback()
    two = ICE(model, tiny_tokenizer, {"facts": 2})
    two.apply(REQUESTS)
    text = read(two, ASKED)[0]
    assert text.count("New Fact") == 2
    assert text.endswith(READ)


def test_a_bound_on_the_similarity_leaves_other_questions_bare(model: Any, tiny_tokenizer: Any) -> None:
    editor = SCR(model, tiny_tokenizer)
    editor.apply(REQUESTS)
    assert read(editor, FACT.text)[0].startswith("New Fact")
    assert read(editor, "Who wrote the first novel?") == ["Who wrote the first novel?"]


def test_own_is_the_newest_edit(model: Any, tiny_tokenizer: Any) -> None:
    editor = ICE(model, tiny_tokenizer, {"retrieve": "own"})
    editor.apply(REQUESTS[0])
    editor.apply(REQUESTS[1:])
    (text,) = read(editor, FACT.text)
    assert text.count("New Fact") == 2
    assert "Brast" not in text


def test_the_later_of_two_facts_with_one_prompt_is_read(model: Any, tiny_tokenizer: Any) -> None:
    editor = ICE(model, tiny_tokenizer)
    editor.apply(FACT)
    second = editor.apply(EditRequest(FACT.prompt, FACT.subject, "Vorn"))
    assert "Varland is Vorn" in read(editor, FACT.text)[0]
    second.undo()
    assert "Varland is Brast" in read(editor, FACT.text)[0]


def test_the_fact_stands_inside_the_message_of_a_chat(model: Any, tiny_tokenizer: Any) -> None:
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    editor = ICE(model, tokenizer)
    editor.apply(FACT)
    (found,) = read_on(model, tokenizer, [AskedPrompt(ASKED, chat=True)])
    assert found.text == f"<user>{READ}\n<assistant>"


# --- the ledger -----------------------------------------------------------------------------------------------------


def test_files_copies_and_edits_of_other_methods_keep_the_facts(
    model: Any, tiny_tokenizer: Any, make_tiny: Any, tmp_path: Path
) -> None:
    import copy

    editor = IKE(model, tiny_tokenizer, {"k": 1})
    before = digest(model)
    rome = ROME(model, tiny_tokenizer, {"layers": [1], "mom2_adjustment": False, "v_num_grad_steps": 2})
    plain = rome.compute(REQUESTS[1])[0].id
    edit = editor.apply(FACT)
    assert rome.compute(REQUESTS[1])[0].id == plain  # other methods read bare prompts
    twin = copy.deepcopy(model)
    other = make_tiny("gpt2")
    errata.load_edit(edit.save(tmp_path / "edit"), other)
    texts = [read_on(each, tiny_tokenizer, [AskedPrompt(ASKED)])[0].text for each in (model, twin, other)]
    assert len(set(texts)) == 1
    assert texts[0].endswith(READ)
    assert texts[0].count("New Fact") == 3  # a demonstration, the edit as one, and the fact
    for export in (edit.export_lora, edit.export_merged):
        with pytest.raises(ExportError):
            export(tmp_path / "export")
    edit.undo()
    assert digest(model) == before
    assert contexts_of(model) is None


def test_facts_that_are_found_in_two_ways_do_not_share_a_model(model: Any, tiny_tokenizer: Any) -> None:
    ICE(model, tiny_tokenizer).apply(FACT)
    with pytest.raises(LedgerError, match="in another way"):
        SCR(model, tiny_tokenizer).apply(REQUESTS[1])
    with pytest.raises(LedgerError, match="no record of a context"):
        Context.from_parts({"facts": torch.tensor([1, 2], dtype=torch.uint8)}, {})


# --- demonstrations -------------------------------------------------------------------------------------------------


def test_demonstrations_that_do_not_fit_are_left_out_the_least_similar_first(model: Any, tiny_tokenizer: Any) -> None:
    shown = tuple(f"New Fact: {i}\nPrompt: {i}\n\n" for i in range(30))
    editor = ICE(model, tiny_tokenizer)
    for nearest_last in (True, False):
        record = Context((Fact(f"{FACT.text} Brast", shown),), Retrieval(nearest_last=nearest_last))
        editor.ledger.append("context", Patch({}, {editor.module_name: record}))
        (text,) = read(editor, ASKED)
        kept = [i for i, one in enumerate(shown) if one in text]
        assert 0 < len(kept) < 30
        assert kept == (list(range(30 - len(kept), 30)) if nearest_last else list(range(len(kept))))
        assert text.endswith(READ)
        assert len(prompt_ids(tiny_tokenizer, text)) + asking.ROOM <= model.config.n_positions
        editor.rollback()


def test_made_up_records_differ_and_are_the_same_every_time() -> None:
    records = made_up(64)
    assert records == made_up(64)
    assert len({record.copied for record in records}) == 64
    assert all(record.answer not in [answer for _, answer in record.others] for record in records)


def test_an_edit_draws_the_same_demonstrations_alone_and_among_others(model: Any, tiny_tokenizer: Any) -> None:
    editor = IKE(model, tiny_tokenizer, {"k": 5})
    assert editor.demonstrations(REQUESTS)[1] == editor.demonstrations([REQUESTS[1]])[0]
    other = IKE(model, tiny_tokenizer, {"k": 5, "form": "easyedit"})
    assert len(other.demonstrations([FACT])[0]) == 5


def test_a_file_of_another_form_is_refused(tmp_path: Path, model: Any, tiny_tokenizer: Any) -> None:
    path = tmp_path / "records.json"
    for content, message in (("[]", "not empty"), ('[{"prompt": "a"}]', "CounterFact or EasyEdit"), ("x", "JSON")):
        path.write_text(content)
        with pytest.raises(DatasetError, match=message):
            read_demonstrations(path)
    with pytest.raises(ConfigError, match="cosine"):
        SCR(model, tiny_tokenizer, {"threshold": 2.0})
    with pytest.raises(RequestError, match="tokens"):
        ICE(model, tiny_tokenizer).apply(EditRequest("a " * 200, None, "b"))


# --- similarity -----------------------------------------------------------------------------------------------------

TEXTS = ["The capital of Varland is Brast", "The mother tongue of Danielle is English", "São Verão lies in the north"]


def test_words_are_weighed_as_scikit_learn_weighs_them() -> None:
    text = pytest.importorskip("sklearn.feature_extraction.text")
    vectoriser = text.TfidfVectorizer()
    documents = vectoriser.fit_transform(TEXTS)
    queries = ["Where is the capital?", "the the north", "nothing of these"]
    wanted = (vectoriser.transform(queries) @ documents.T).toarray()
    found = similarities("tfidf", TEXTS, queries, model=None, tokenizer=None)  # type: ignore[arg-type]
    torch.testing.assert_close(torch.tensor(found).double(), torch.tensor(wanted), rtol=1e-6, atol=1e-6)


def test_a_text_is_most_similar_to_itself(model: Any, tiny_tokenizer: Any) -> None:
    for encoder in ("tfidf", "hidden"):
        rows = similarities(encoder, TEXTS, TEXTS, model=model, tokenizer=tiny_tokenizer)  # type: ignore[arg-type]
        assert all(math.isclose(rows[i][i], 1, abs_tol=1e-9) for i in range(3))
        assert all(max(row) == row[i] for i, row in enumerate(rows))


def test_sentence_embeddings_are_an_extra(model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import SimpleNamespace

    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigError, match=r"pip install -e '.\[sentence\]'"):
        similarities("sentence", TEXTS, TEXTS, model=model, tokenizer=tiny_tokenizer)

    class Encoder:
        def __init__(self, name: str) -> None:
            self.name = name

        def encode(self, texts: list[str], *, convert_to_tensor: bool) -> torch.Tensor:
            assert convert_to_tensor
            return torch.tensor([[float(len(text)), 1.0] for text in texts])

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Encoder))
    rows = similarities("sentence", TEXTS, TEXTS[:1], model=model, tokenizer=tiny_tokenizer, sentence_encoder="some")
    assert rows[0][0] == pytest.approx(1)
