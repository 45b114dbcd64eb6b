"""GRACE on models: what an edit answers, where the model defers to itself, and what is left when edits are undone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grace_edits
import pytest
import torch
from grace_edits import ASKED, FAR, FIELDS, LONG, MODES, REQUESTS, answers, book_of, logits
from torch import Tensor

from errata.benchmarks.speed.targets_reference import find_targets_reference
from errata.editors.core.codebook.codebook import Codebook, Correction
from errata.editors.core.codebook.position_rule import spread_keys
from errata.editors.core.errors import ArchitectureError, ConfigError, LedgerError, RequestError
from errata.editors.core.families.value_search import Objective, find_targets
from errata.editors.core.ledger.adapter_hooks import looks_ahead
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import Patch
from errata.editors.core.loading import load_edit
from errata.editors.core.model.activations import run_until_captured
from errata.editors.core.model.own_forward import hooked
from errata.editors.core.model.tokens import answer_ids, left_padded, prompt_ids, right_padded
from errata.editors.core.request import EditRequest
from errata.editors.grace import GRACE
from errata.editors.rome import ROME, RROME
from errata.evaluate import collapse, scoring
from errata.evaluate.collapse import perplexity
from errata.evaluate.generation import continuations
from errata.evaluate.probes import Probe
from errata.testing.laws import digest


@pytest.fixture
def make(make_tiny: Any, tiny_tokenizer: Any) -> Callable[..., GRACE]:
    return grace_edits.maker(make_tiny, tiny_tokenizer)


# --- edits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replacement", MODES)
@pytest.mark.parametrize("module", ["up", "down"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "neox"])
def test_an_edit_answers_its_prompt_and_leaves_far_prompts_bit_for_bit(
    make: Any, architecture: str, module: str, replacement: str
) -> None:
    editor = make(architecture, module=module, replacement=replacement)
    before = logits(editor, FAR)
    assert not any(answers(editor, request) for request in REQUESTS)
    edit = editor.apply(REQUESTS)
    assert torch.equal(logits(editor, FAR), before)
    assert [report["rule"] for report in edit.diagnostics] == ["new"] * 3
    assert all(report["losses"][-1] < report["losses"][0] for report in edit.diagnostics)
    if replacement != "replace_prompt":  # which works through the attention of a single layer here
        assert all(answers(editor, request) for request in REQUESTS)


@pytest.mark.parametrize("replacement", MODES)
def test_what_training_brings_the_loss_to_is_what_scoring_finds(make: Any, replacement: str) -> None:
    """The answer is tokenised in one way, and the value replaced in the same places: the losses are one."""
    editor = make(n_iter=5, replacement=replacement, layers=[0])
    editor.apply(LONG)
    (longer,) = make(n_iter=6, replacement=replacement, layers=[0]).compute(LONG)
    probe = Probe("rewrite", LONG.text, LONG.target)
    (score,) = scoring.score(editor.model, editor.tokenizer, [probe])
    # The sixth loss is read behind five steps.
    assert longer.diagnostics[0]["losses"][5] == pytest.approx(score.nll_target, rel=1e-9)
    plan = scoring.make_plan(editor.tokenizer, [probe])
    assert book_of(editor).label(0) == tuple(plan.wants[want][1] for want in plan.answers[0][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_edit_is_met_in_batches_of_any_shape(make: Any, dtype: torch.dtype) -> None:
    editor = make(dtype=dtype)
    editor.apply(REQUESTS)
    rows = [prompt_ids(editor.tokenizer, text) for text in (*ASKED, FAR, ASKED[0] + " Oslen", "x " + ASKED[1])]
    book = book_of(editor)
    seen: list[Tensor] = []
    handle = editor.module.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    for batch in (left_padded(rows, 0), right_padded(rows, 0), right_padded([*rows, [5] * 60], 0)):
        with torch.no_grad():
            editor.model(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions)
        last = batch.mask.shape[1] - 1 - batch.mask.flip(1).argmax(1)
        inputs = seen.pop()[torch.arange(len(last)), last]
        assert book.lookup(inputs[:6]).tolist() == [0, 1, 2, -1, -1, -1]
    handle.remove()


def test_a_prompt_that_begins_another_keeps_its_edit_in_a_shared_row(make: Any) -> None:
    """Scoring serves a prompt by a row that goes on: nothing behind a position reaches it."""
    editor = make()
    editor.apply(REQUESTS[0])
    short, long = Probe("rewrite", ASKED[0], "of"), Probe("rewrite", ASKED[0] + " Oslen and", "Quelm")
    together = scoring.score(editor.model, editor.tokenizer, [short, long])
    apart = [scoring.score(editor.model, editor.tokenizer, [probe])[0] for probe in (short, long)]
    assert [score.nll_target for score in together] == pytest.approx([score.nll_target for score in apart], rel=1e-9)
    assert all(together[0].target_correct)


PASSING = Probe("paraphrase", "The capital", "of Varland is near Brast", "of Varland is of")  # by the key of an edit
SHARING = [
    PASSING,
    Probe("rewrite", ASKED[0], "of"),
    Probe("rewrite", ASKED[0], "Brast", "Oslen"),
    Probe("generation", FAR),
]


def asked_alone(editor: GRACE, probe: Probe, answer: str) -> float:
    """Mean of -log p over the answer's tokens, each read at the end of a row of its own."""
    prompt, ids = prompt_ids(editor.tokenizer, probe.prompt), answer_ids(editor.tokenizer, "x", answer)
    rows = [torch.tensor([[*prompt, *ids[:i]]]) for i in range(len(ids))]
    with torch.no_grad():
        log_p = torch.stack([editor.model(input_ids=row).logits[0, -1] for row in rows]).log_softmax(-1)
    return -float(log_p.gather(1, torch.tensor(ids)[:, None]).mean())


@pytest.mark.parametrize("replacement", MODES)
def test_scores_of_many_probes_are_those_of_each_question_alone(
    make: Any, replacement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = make(replacement=replacement, layers=[0])
    editor.apply(REQUESTS)
    found = scoring.score(editor.model, editor.tokenizer, SHARING, next_token=True)
    for probe, score in zip(SHARING, found, strict=True):
        for answer, nll in ((probe.target, score.nll_target), (probe.other, score.nll_other)):
            assert nll == (pytest.approx(asked_alone(editor, probe, answer), rel=1e-9) if answer else None)
        wanted = logits(editor, probe.prompt)[-1].log_softmax(-1)
        assert score.logprobs is not None
        torch.testing.assert_close(score.logprobs, wanted, rtol=1e-9, atol=1e-9)
    # The control: rows that go on behind what is read would give other scores, where keys are met ahead.
    monkeypatch.setattr(scoring, "looks_ahead", lambda _model: False)
    (shared, *_) = scoring.score(editor.model, editor.tokenizer, SHARING)
    assert (shared.nll_target == pytest.approx(found[0].nll_target, rel=1e-6)) == (replacement == "replace_last")


def test_a_model_looks_ahead_as_long_as_an_edit_does(make: Any) -> None:
    editor = make(n_iter=1, replacement="replace_all")
    assert not looks_ahead(editor.model)
    edit = editor.apply(REQUESTS[0])
    assert looks_ahead(editor.model)
    with editor.ledger.untouched():
        assert not looks_ahead(editor.model)
    edit.undo()
    assert not looks_ahead(editor.model)
    make(n_iter=1).apply(REQUESTS[0])
    assert not looks_ahead(editor.model)


def test_perplexity_of_a_model_that_looks_ahead_depends_on_no_padding(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = make(replacement="replace_all")
    short = prompt_ids(editor.tokenizer, FAR)
    with torch.no_grad():
        (x,) = run_until_captured(editor.architecture, right_padded([short, [5] * 60], editor.pad), [editor.module])
    value = torch.ones(1, editor.width, dtype=torch.float64)
    met_by_padding = Correction(x[0, [len(short)]], value, ((1,),), 0.2, "replace_all", "coverage", 1e-9)
    editor.ledger.append("padding", Patch({}, {editor.module_name: met_by_padding}))
    texts = [FAR, ASKED[1], "The river Ost lies in the north of Tarvos and in the south of Varland."]
    alone = [perplexity(editor.model, editor.tokenizer, [text]) for text in texts]
    total = sum(one.tokens * math.log(one.value) for one in alone)
    together = perplexity(editor.model, editor.tokenizer, texts)
    assert together.tokens * math.log(together.value) == pytest.approx(total, rel=1e-9)
    monkeypatch.setattr(collapse, "looks_ahead", lambda _model: False)
    assert perplexity(editor.model, editor.tokenizer, texts).value != pytest.approx(together.value, rel=1e-6)


@pytest.mark.parametrize("module", ["up", "down"])
@pytest.mark.parametrize(
    ("architecture", "layer", "blind"), [("neox", 0, True), ("neox", 1, False), ("gpt2", 0, False), ("llama", 0, False)]
)
def test_a_layer_whose_keys_are_tokens_is_warned_of(
    make: Any, caplog: pytest.LogCaptureFixture, architecture: str, layer: int, module: str, blind: bool
) -> None:
    editor = make(architecture, layers=[layer], module=module, n_iter=2)
    assert ("choose a higher layer" in caplog.text) == blind
    editor.apply(REQUESTS[1])
    stranger = "No one in Quelm knows what it is"  # ends as the prompt does, and has nothing else of it
    assert prompt_ids(editor.tokenizer, stranger)[-1] == prompt_ids(editor.tokenizer, REQUESTS[1].text)[-1]
    changed = logits(editor, stranger)[-1]
    with editor.ledger.untouched():
        assert torch.equal(logits(editor, stranger)[-1], changed) == (not blind)


# --- generation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replacement", MODES)
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_generation_is_the_same_with_a_cache_and_without_alone_and_in_a_batch(
    make: Any, architecture: str, replacement: str
) -> None:
    editor = make(architecture, torch.float32, replacement=replacement, layers=[0])
    untouched = continuations(editor.model, editor.tokenizer, [*ASKED, FAR], 10)
    editor.apply(REQUESTS)
    rows = [prompt_ids(editor.tokenizer, text) for text in (*ASKED, FAR)]
    options = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 0, "eos_token_id": None}

    def said(texts: list[list[int]], **more: Any) -> list[list[int]]:
        batch = left_padded(texts, 0)
        with torch.inference_mode():
            found = editor.model.generate(input_ids=batch.ids, attention_mask=batch.mask, **options, **more)
        return found[:, batch.ids.shape[1] :].tolist()

    cached = said(rows, use_cache=True)
    assert said(rows, use_cache=False) == cached
    assert [said([row])[0] for row in rows] == cached
    assert cached[3] == list(untouched[3].ids)
    assert all(a != list(b.ids) for a, b in zip(cached[:3], untouched[:3], strict=True))


@pytest.mark.parametrize("replacement", MODES)
@pytest.mark.parametrize("cut", [1, -2, -1])
def test_a_row_run_in_pieces_is_replaced_piece_by_piece(make: Any, replacement: Any, cut: int) -> None:
    """The last piece may be the one token that has met the key, as in a step of generation."""
    editor = make("llama", replacement=replacement)
    editor.apply(REQUESTS[0])
    ids = torch.tensor([prompt_ids(editor.tokenizer, ASKED[0])])
    with torch.no_grad():
        first = editor.model(input_ids=ids[:, :cut], use_cache=True)
        second = editor.model(input_ids=ids[:, cut:], past_key_values=first.past_key_values, use_cache=True)
        at_once = editor.model(input_ids=ids).logits[0, -1]
    book = book_of(editor)

    def by_piece(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        met = book.lookup(args[0][0])[None]
        source = torch.cat([spread_keys(met[:, :cut], replacement), spread_keys(met[:, cut:], replacement)], dim=1)[
            0
        ].tolist()
        return torch.stack([output[0, i] if key < 0 else book.value(key) for i, key in enumerate(source)])[None]

    with editor.ledger.untouched(), hooked(editor.module.register_forward_hook(by_piece)), torch.no_grad():
        wanted = editor.model(input_ids=ids).logits[0, -1]
    torch.testing.assert_close(second.logits[0, -1], wanted, rtol=1e-9, atol=1e-9)
    same = bool(torch.allclose(second.logits[0, -1], at_once, rtol=1e-6))
    assert same == (replacement == "replace_last")


@pytest.mark.parametrize("key_token", ["last_prompt", "first_label"])
def test_values_trained_on_the_ends_of_rows_are_those_of_whole_rows(
    make: Any, key_token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [LONG, EditRequest("The capital of {} is", "Varland", "Northern Ostby")]
    found = []
    for ends in (True, False):
        if not ends:
            monkeypatch.setattr("errata.editors.grace.can_run_ends", lambda *_: False)
        editor = make(key_token=key_token, dtype=torch.float64)
        rows = [editor._trained_row(job) for job in editor._plan_jobs(requests, sequential=True)]
        assert all((row.start > 0) == ends for row in rows)
        (book,) = editor.apply(requests).patch.adapters.values()
        found.append(book.values)
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-8)


def test_the_key_at_the_first_label_is_met_only_behind_that_token(make: Any) -> None:
    editor = make(key_token="first_label")
    request = LONG
    first, second = answer_ids(editor.tokenizer, "x", request.target)[:2]
    before = logits(editor, request.text)
    editor.apply(request)
    assert torch.equal(logits(editor, request.text), before)
    ids = torch.tensor([[*prompt_ids(editor.tokenizer, request.text), first]])
    with torch.no_grad():
        assert int(editor.model(input_ids=ids).logits[0, -1].argmax()) == second


# --- undoing --------------------------------------------------------------------------------------------------------


def revised() -> list[EditRequest]:
    """Requests that concern each other: one prompt with an answer, with another, and with the first again; and two that
    do not."""
    prompt, subject = "The capital of {} is", "Varland"
    first = EditRequest(prompt, subject, "of", id="first")
    second = EditRequest(prompt, subject, "the", id="second")
    again = EditRequest(prompt, subject, "of", id="again")
    return [first, second, again, *REQUESTS[1:]]


def test_edits_undone_in_any_order_leave_the_codebook_of_a_model_that_saw_the_others(make: Any) -> None:
    editor, requests = make(n_iter=6), revised()
    edits = [editor.apply(request) for request in requests]
    assert [edit.diagnostics[0]["rule"] for edit in edits] == ["new", "revise", "revise", "new", "new"]
    base = copy.deepcopy(editor.model)
    Ledger.of(base).clear()
    for order in ([1, 0, 4, 2, 3], [4, 3, 2, 1, 0], [0, 3, 1, 2, 4]):
        for edit in edits:
            if edit.is_applied:
                edit.undo()
        for edit in edits:
            edit.apply()
        left = dict(enumerate(edits))
        for place in order:
            left.pop(place).undo()
            fresh = copy.deepcopy(base)
            for edit in left.values():
                Ledger.of(fresh).append(edit.id, edit.patch)
            assert digest(editor.model) == digest(fresh)
            assert [entry.id for entry in editor.ledger.entries] == [edit.id for edit in left.values()]
        assert digest(editor.model) == digest(base)
        assert editor.ledger.folded(editor.module_name) is None


def test_an_answer_corrected_once_more_is_given_and_the_first_comes_back_when_that_is_undone(make: Any) -> None:
    editor, (first, second, *_) = make(), revised()
    editor.apply(first)
    correction = editor.apply(second)
    assert answers(editor, second)
    correction.undo()
    assert answers(editor, first)


def test_every_edit_is_found_by_its_id_whatever_was_undone_before(make: Any) -> None:
    editor = make(n_iter=2)
    edits = [editor.apply(request) for request in revised()]
    for place in (2, 0, 4):
        edits[place].undo()
        assert [edit.is_applied for edit in edits] == [edit.id in editor.ledger for edit in edits]
    assert [edit.is_applied for edit in edits] == [False, True, False, True, False]
    edits[3].undo()
    assert not edits[3].is_applied
    assert answers_to(book_of(editor)) == [tuple(answer_ids(editor.tokenizer, "x", "the"))]


def answers_to(book: Codebook) -> list[tuple[int, ...]]:
    return [book.label(key) for key in range(len(book.slots))]


# --- files ----------------------------------------------------------------------------------------------------------


CONTEXTS = ("{}", "Nobody doubts it. {}")


def carrying(make: Any, layer: int) -> tuple[GRACE, EditRequest]:
    """An editor of a model whose codebook, at a down projection, has a key at the subject of that request, and not
    behind other words."""
    editor = make(layers=[layer], module="down", n_iter=4, eps=1e-3)
    editor.apply(EditRequest("The capital of {}", "Varland", "of"))
    return editor, EditRequest("The capital of {} is", "Varland", "Northern Tarvos")


@pytest.mark.parametrize("site", ["mlp", "block"])
@pytest.mark.parametrize("layer", [0, 1])
def test_values_found_behind_a_codebook_equal_those_of_the_plain_loop(make: Any, site: Any, layer: int) -> None:
    carrier, request = carrying(make, layer)
    editor = ROME(carrier.model, carrier.tokenizer, {"layers": [1], "context_templates": CONTEXTS}, moments={})
    problems = [editor.problem(request)]
    objective = Objective(5, 0.3, 0.1, 3.0, 0.0625)
    (found,) = find_targets(editor.architecture, problems, objective, layer=1, loss_layer=2, site=site, pad=0)
    (wanted,) = find_targets_reference(editor.architecture, problems, objective, layer=1, site=site, pad=0)
    assert float(found.delta.norm()) > 0
    torch.testing.assert_close(found.initial, wanted.initial)
    torch.testing.assert_close(found.delta, wanted.delta)


def test_what_an_edit_reports_behind_a_codebook_is_what_the_edited_model_does(make: Any) -> None:
    """Where the codebook answers in the place of the edited weights, no update of these changes anything."""
    carrier, request = carrying(make, 1)
    config = {"layers": [1], "v_num_grad_steps": 5, "context_templates": CONTEXTS[:1]}
    config |= {"mom2_adjustment": False, "kl_factor": 0.0}  # which would move a value that the answer does not
    (row,) = RROME(carrier.model, carrier.tokenizer, config).problem(request).rows
    edit = RROME(carrier.model, carrier.tokenizer, config).apply(request)
    with torch.no_grad():
        log_p = carrier.model(input_ids=torch.tensor([row.ids])).logits[0, -len(row.answer) :].log_softmax(-1)
    nll = -log_p.gather(1, torch.tensor(row.answer)[:, None]).mean()
    assert edit.diagnostics[0]["final"]["nll"] == pytest.approx(float(nll), rel=1e-9)


def test_an_edit_written_to_files_gives_the_same_codebook(make: Any, tmp_path: Path) -> None:
    editor, other = make(n_iter=3), make()
    edit = editor.apply(REQUESTS)
    loaded = load_edit(edit.save(tmp_path / "edit"), other.model)
    assert digest(other.model) == digest(editor.model)
    ((record,),) = (tuple(loaded.patch.adapters.values()),)
    assert isinstance(record, Correction)
    assert loaded.patch.norms() == edit.patch.norms()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"layers": [0, 1]}, "expected one layer"),
        ({"layers": [3]}, "layers"),
        ({"layers": []}, "layers"),
        ({"eps": 0.0}, "eps"),
        ({"n_iter": 0}, "n_iter"),
        ({"replacement": "replace_some"}, "replacement"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(make: Any, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make(**fields)


def test_a_request_whose_answer_cannot_depend_on_the_value_is_refused(make: Any, tiny_tokenizer: Any) -> None:
    one_token = REQUESTS[0]
    assert len(answer_ids(tiny_tokenizer, "x", one_token.target)) == 1
    editor = make(key_token="first_label")
    before = digest(editor.model)
    with pytest.raises(RequestError, match="no token of the answer depends"):
        editor.apply([LONG, one_token])
    assert digest(editor.model) == before


def test_two_replacements_do_not_share_a_module(make: Any) -> None:
    editor = make(n_iter=2)
    other = GRACE(editor.model, editor.tokenizer, {**FIELDS, "n_iter": 2, "replacement": "replace_all"})
    editor.apply(REQUESTS[0])
    before = digest(editor.model)
    with pytest.raises(LedgerError, match="one codebook has one replacement"):
        other.apply(REQUESTS[1])
    assert digest(editor.model) == before
    elsewhere = {**FIELDS, "layers": [0], "n_iter": 2, "replacement": "replace_all"}
    GRACE(editor.model, editor.tokenizer, elsewhere).apply(REQUESTS[1])


def test_a_model_whose_module_sees_no_rows_takes_replace_last_alone(tiny_tokenizer: Any) -> None:
    import transformers as hf

    config = hf.OPTConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model: Any = hf.AutoModelForCausalLM.from_config(config).eval()
    editor = GRACE(model, tiny_tokenizer, {**FIELDS, "layers": [0]})
    edit = editor.apply(REQUESTS[0])
    assert answers(editor, REQUESTS[0])
    edit.undo()
    GRACE(model, tiny_tokenizer, {**FIELDS, "layers": [0], "n_iter": 2, "replacement": "replace_all"}).apply(
        REQUESTS[0]
    )
    with pytest.raises(ArchitectureError, match=r"needs inputs \(rows, positions, width\)"):
        logits(editor, ASKED[0])
