"""Batched scoring says what scoring prompt by prompt says."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rounding import of_logits

from errata.benchmarks.speed.scoring import measure
from errata.editors.core.errors import ErrataError, RequestError
from errata.editors.core.extensions import ExtensionPoint
from errata.editors.core.model import tokens
from errata.editors.core.model.activations import limit_batch_tokens
from errata.editors.core.model.architecture import describe
from errata.editors.core.model.own_forward import hooked
from errata.editors.core.request import EditRequest
from errata.evaluate.probes import Case, Probe
from errata.evaluate.scoring import ProbeScore, run_plan, score
from errata.evaluate.scoring_plan import make_plan, shared_rows, unscorable_reasons, unshared

PROBES = (
    Probe("rewrite", "The capital of Varland is", "Brast", "Oslen"),
    Probe("paraphrase", "It is well known: the capital of Varland is", "Brast", "Oslen"),
    Probe("neighborhood", "The mother tongue of Danielle Darrieux is", "French", "English"),
    Probe("distracting_neighborhood", "The capital of Varland is Brast. The mother tongue of", "French", "Brast"),
    Probe("rewrite", "The capital of Varland is", "Brast", "Oslen"),
    Probe("portability", "The capital of Varland is Brast", "near the river Ost", None),
    Probe("attribute", "The", "capital", "capital of Varland"),
    Probe("generation", "The musician Ilda Moren"),
    Probe("neighborhood", "São Verão lies in", "Überwald", "{}"),
)


def one_by_one(model: Any, tokenizer: Any, probe: Probe) -> ProbeScore:
    """The oracle: every answer in a forward pass of its own, no batch, no mask, no padding, the whole logits."""

    def answer(text: str | None) -> tuple[float | None, tuple[bool, ...], tuple[int, ...]]:
        if text is None:
            return None, (), ()
        ids = tokens.answer_ids(tokenizer, "x", text)
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].double()
        nll = -logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)].mean()
        choice = logits.argmax(-1).tolist()
        return float(nll), tuple(a == b for a, b in zip(choice, ids, strict=True)), tuple(choice)

    prompt = tokens.prompt_ids(tokenizer, probe.prompt)
    with torch.inference_mode():
        nll_target, target_correct, choice = answer(probe.target)
        nll_other, other_correct, _ = answer(probe.other)
        logprobs = model(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)
    return ProbeScore(nll_target, nll_other, target_correct, other_correct, choice, logprobs)


def assert_same(ours: list[ProbeScore], reference: list[ProbeScore], tolerance: float) -> None:
    for mine, theirs in zip(ours, reference, strict=True):
        assert mine.nll_target == pytest.approx(theirs.nll_target, abs=tolerance)
        assert mine.nll_other == pytest.approx(theirs.nll_other, abs=tolerance)
        assert mine.target_correct == theirs.target_correct
        assert mine.other_correct == theirs.other_correct
        assert mine.target_choice == theirs.target_choice
        if mine.logprobs is not None and theirs.logprobs is not None:
            torch.testing.assert_close(mine.logprobs.double(), theirs.logprobs.double(), atol=5 * tolerance, rtol=0)


def rounding(reference: list[ProbeScore]) -> float:
    """How far float32 may be off these scores: the largest log probability stands for the largest logit."""
    return of_logits(max(float(one.logprobs.abs().max()) for one in reference if one.logprobs is not None))


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "neox"])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batched_scores_equal_one_by_one(
    architecture: str, bos: bool, dtype: torch.dtype, make_tiny: Any, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue("tiny_tokenizer_bos" if bos else "tiny_tokenizer")
    model = make_tiny(architecture, dtype=dtype)
    ours = score(model, tokenizer, PROBES, next_token=True)
    assert all(mine.logprobs is not None and mine.logprobs.dtype == dtype for mine in ours)
    # The others take their rotary angles in float32 whatever the model's dtype.
    exact = dtype == torch.float64 and architecture == "gpt2"
    reference = [one_by_one(model, tokenizer, probe) for probe in PROBES]
    assert_same(ours, reference, 1e-10 if exact else rounding(reference))


@pytest.mark.parametrize("model_name", ["cf-gpt2", "cf-llama"])
def test_batched_scores_equal_one_by_one_on_real_prompts(model_name: str, models_root: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models_root / model_name)
    model = AutoModelForCausalLM.from_pretrained(models_root / model_name, dtype=torch.float32)
    double = AutoModelForCausalLM.from_pretrained(models_root / model_name, dtype=torch.float32).double()
    probes = [
        Probe("rewrite", "The mother tongue of Danielle Darrieux is", "English", "French"),
        Probe("neighborhood", "Michel Rocard is a native speaker of", "French", "English"),
        Probe("rewrite", "The headquarter of Majorette is located in", "London", "Paris"),
        Probe("distracting_neighborhood", "Danielle Darrieux is English. Montesquieu, a native", "French", "English"),
    ]
    truth = [one_by_one(double, tokenizer, probe) for probe in probes]
    assert_same(score(double, tokenizer, probes, next_token=True), truth, 1e-10 if model_name == "cf-gpt2" else 1e-6)
    assert_same(score(model, tokenizer, probes, next_token=True), truth, rounding(truth))


def test_order_and_batch_size_do_not_matter(make_tiny: Any, tiny_tokenizer: Any) -> None:
    model = make_tiny("gpt2")
    scores = score(model, tiny_tokenizer, PROBES, next_token=True)
    reference = dict(zip(PROBES, scores, strict=True))
    for batch_tokens in (1, 60, 100_000):
        shuffled = random.Random(batch_tokens).sample(PROBES, len(PROBES))
        ours = score(model, tiny_tokenizer, shuffled, batch_tokens=batch_tokens)
        assert_same(ours, [reference[probe] for probe in shuffled], rounding(scores))


def test_reading_in_small_chunks_changes_nothing(
    make_tiny: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny("gpt2")
    whole = score(model, tiny_tokenizer, PROBES, next_token=True)
    monkeypatch.setattr("errata.evaluate.scoring._LOGITS_AT_ONCE", 3 * len(tiny_tokenizer))
    assert_same(score(model, tiny_tokenizer, PROBES, next_token=True), whole, rounding(whole))


def test_the_padding_side_of_the_tokenizer_does_not_matter(
    make_tiny: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny("llama")
    before = score(model, tiny_tokenizer, PROBES)
    monkeypatch.setattr(tiny_tokenizer, "padding_side", "left")
    assert score(model, tiny_tokenizer, PROBES) == before


def test_a_prompt_with_two_answers_of_one_token_is_one_row(tiny_tokenizer: Any) -> None:
    single = [w for w in ("is", "the", "in", "of", "plays") if len(tokens.answer_ids(tiny_tokenizer, "x", w)) == 1][:2]
    rows = make_plan(tiny_tokenizer, [Probe("rewrite", "The capital of Varland is", single[0], single[1])]).rows
    assert rows == (tuple(tiny_tokenizer("The capital of Varland is")["input_ids"]),)


def test_probes_of_different_cases_share_their_rows(tiny_tokenizer: Any) -> None:
    one = make_plan(tiny_tokenizer, PROBES, next_token=True)
    assert len(make_plan(tiny_tokenizer, PROBES * 3, next_token=True).rows) == len(one.rows)
    naive = {
        (*tiny_tokenizer(p.prompt)["input_ids"], *tokens.answer_ids(tiny_tokenizer, "x", answer)[:-1])
        for p in PROBES
        for answer in (p.target, p.other)
        if answer is not None
    }
    assert len(one.rows) < len(naive)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple), max_size=30))
def test_shared_rows_serve_every_row_and_none_begins_another(rows: list[tuple[int, ...]]) -> None:
    kept, place = shared_rows(set(rows))
    assert set(place) == set(rows)
    assert all(kept[place[row]][: len(row)] == row for row in rows)
    assert not [(a, b) for a in kept for b in kept if a != b and b[: len(a)] == a]
    assert [len(row) for row in kept] == sorted(len(row) for row in kept)


def test_scoring_leaves_training_flags_and_weights_alone(make_tiny: Any, tiny_tokenizer: Any) -> None:
    model = make_tiny("gpt2")
    quiet = score(model, tiny_tokenizer, PROBES)
    model.train()
    model.transformer.h[1].eval()
    flags = [module.training for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert score(model, tiny_tokenizer, PROBES) == quiet  # dropout is off
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(RequestError):
        score(model, tiny_tokenizer, [Probe("rewrite", "The", "  ")])
    assert [module.training for module in model.modules()] == flags


def test_next_token_logprobs_are_kept_for_the_kinds_asked_for_only(make_tiny: Any, tiny_tokenizer: Any) -> None:
    model = make_tiny("gpt2")
    scores = score(model, tiny_tokenizer, PROBES, next_token={"neighborhood"})
    kept = {probe.kind for probe, one in zip(PROBES, scores, strict=True) if one.logprobs is not None}
    assert kept == {"neighborhood"}
    assert all(one.logprobs is None for one in score(model, tiny_tokenizer, PROBES))


def test_next_token_logprobs_of_all_are_also_those_of_other_packages_kinds(
    make_tiny: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ExtensionPoint, "others", lambda _: ("elsewhere",))
    probes = [Probe("elsewhere", "The capital of Varland is", "Oslen"), PROBES[0]]
    assert all(one.logprobs is not None for one in score(make_tiny("gpt2"), tiny_tokenizer, probes, next_token=True))


def test_a_model_gone_to_nan_is_right_about_nothing(make_tiny: Any, tiny_tokenizer: Any) -> None:
    model = make_tiny("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(float("nan"))
    first = Probe("rewrite", "The", "<|endoftext|>")  # ends in id 0, which argmax finds in a row of NaN
    assert tokens.answer_ids(tiny_tokenizer, "x", "<|endoftext|>")[-1] == 0
    for one in score(model, tiny_tokenizer, [*PROBES, first]):
        assert not any(one.target_correct + one.other_correct)
        assert one.nll_target is None or one.nll_target != one.nll_target


def test_a_prompt_beyond_the_positions_of_the_model_is_refused(make_tiny: Any, tiny_tokenizer: Any) -> None:
    long = Probe("rewrite", "the capital of " * 200, "a", "b")
    with pytest.raises(ErrataError, match=f"at most 256 tokens.*in the {long.kind} probe '{long.prompt[:20]}"):
        score(make_tiny("gpt2"), tiny_tokenizer, [*PROBES, long])


def test_a_prompt_without_tokens_is_refused_by_name(make_tiny: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(RequestError, match="neighborhood probe has no tokens"):
        score(make_tiny("gpt2"), tiny_tokenizer, [Probe("neighborhood", "", "a")])


def test_an_answer_without_tokens_is_refused_with_the_prompt_of_its_probe(make_tiny: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(RequestError, match="neighborhood probe 'The mother': "):
        score(make_tiny("gpt2"), tiny_tokenizer, [Probe("neighborhood", "The mother", " ")])


def test_what_cannot_be_scored_is_told_beforehand(make_tiny: Any, tiny_tokenizer: Any) -> None:
    probes = [
        *PROBES,
        Probe("neighborhood", "", "a"),
        Probe("generation", "The musician"),
        Probe("rewrite", "x " * 500, "a"),
    ]
    model = make_tiny("gpt2")
    found = unscorable_reasons(model, tiny_tokenizer, probes)
    assert [reason is None for reason in found] == [True] * len(PROBES) + [False, True, False]
    longer = unscorable_reasons(model, tiny_tokenizer, probes, [0] * len(PROBES) + [0, 256, 0])
    assert [reason is None for reason in longer] == [True] * len(PROBES) + [False, False, False]


def test_progress_ends_with_every_row(make_tiny: Any, tiny_tokenizer: Any) -> None:
    seen: list[tuple[int, int, str]] = []

    def told(done: int, total: int, what: str) -> None:
        seen.append((done, total, what))

    score(make_tiny("gpt2"), tiny_tokenizer, PROBES, batch_tokens=50, progress=told)
    assert len(seen) > 1
    assert [done for done, _, _ in seen] == sorted({done for done, _, _ in seen})
    assert seen[-1][0] == seen[-1][1] == len(make_plan(tiny_tokenizer, PROBES).rows)


def test_no_probes_make_no_scores(make_tiny: Any, tiny_tokenizer: Any) -> None:
    assert score(make_tiny("gpt2"), tiny_tokenizer, []) == []


def test_a_plan_can_be_run_again_on_the_model_as_it_then_stands(make_tiny: Any, tiny_tokenizer: Any) -> None:
    model = make_tiny("gpt2")
    planned = make_plan(tiny_tokenizer, PROBES)
    before = run_plan(model, planned)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight.mul_(-1)
    after = run_plan(model, planned)
    assert after != before
    assert after == score(model, tiny_tokenizer, PROBES)


def test_a_cpu_gets_batches_that_its_caches_hold() -> None:
    cpu = torch.device("cpu")
    assert limit_batch_tokens(10**9, cpu) == 1024 * torch.get_num_threads()
    assert limit_batch_tokens(10, cpu) == 10
    assert limit_batch_tokens(10**9, torch.device("cuda")) == 10**9


def test_the_measurement_of_speed_compares_equal_results(make_tiny: Any, tiny_tokenizer: Any) -> None:
    request = EditRequest("The capital of {} is", "Varland", "Brast", "Oslen")
    cases = [Case(str(i), request, PROBES[i : i + 4]) for i in range(0, len(PROBES), 4)]
    scores, generation = measure(make_tiny("gpt2"), tiny_tokenizer, cases, new_tokens=4)
    assert scores.settings["probes"] == sum(probe.target is not None for probe in PROBES)
    assert max(scores.agreement, scores.settings["floor"]) < 1e-5
    assert generation.agreement == 0


def test_the_example_of_scoring_runs_and_reads_what_its_picture_says(make_tiny: Any, tiny_tokenizer: Any) -> None:
    first, second = Probe("rewrite", "Who is", "Oslen", "is"), Probe("rewrite", "The is of", "the", "of")
    p, q = (tuple(tokens.prompt_ids(tiny_tokenizer, probe.prompt)) for probe in (first, second))
    (a, b, c), (d,) = (tokens.answer_ids(tiny_tokenizer, "x", text) for text in ("Oslen", "is"))
    (x,), (y,) = (tokens.answer_ids(tiny_tokenizer, "x", text) for text in ("the", "of"))
    assert len(p) == len(q) == 3
    planned = make_plan(tiny_tokenizer, [first, second])
    assert planned.rows == (q, (*p, a, b))
    assert planned.reads == ((0, 2), (1, 2), (1, 3), (1, 4))
    assert planned.wants == ((0, x), (0, y), (1, a), (1, d), (2, b), (3, c))
    ends = sorted([p, (*p, a), (*p, a, b), q], key=lambda row: (len(row), row))
    assert unshared(planned).rows == tuple(ends)
    model = make_tiny("gpt2")
    parts, run, read = describe(model), [], []
    with hooked(
        parts.down(0).register_forward_hook(lambda _module, args, _output: run.append(args[0].shape[:2])),
        parts.head.register_forward_hook(lambda _module, args, _output: read.append(args[0].shape[:-1].numel())),
    ):
        run_plan(model, planned)
    assert (run, read) == ([(2, 5)], [4])
