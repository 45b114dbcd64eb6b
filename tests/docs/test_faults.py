"""The faults of docs/faults.md: what the authors' code computes, as that page describes it, beside the mended rule.

What stands here as published is written anew from a reading of their code, as small as the fault needs.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from published_records import RIPPLEEDITS
from torch import Tensor
from torch.nn import functional as F

from errata.benchmarks.ability.glue import TASKS, weighted_f1
from errata.benchmarks.ability.gu_tasks.answers import open_qa
from errata.benchmarks.datasets.json_records import RecordReader
from errata.benchmarks.datasets.rippleedits import to_case
from errata.editors import UltraEdit
from errata.editors.core.algebra.mask_rules import BreadcrumbsMergekit
from errata.editors.core.brakes.pruning import pruning
from errata.editors.core.brakes.sphere import leading_directions, off_sphere
from errata.editors.core.errors import NumericalError
from errata.editors.core.families.anchored_values import Beyond, anchored
from errata.editors.core.families.value_search import PUBLISHED_COUNT, Target, _counted_tokens
from errata.editors.core.ledger.patch import LowRank
from errata.editors.core.request import EditRequest
from errata.editors.core.solve.token_statistics import TokenStatistics
from errata.evaluate import conflicts, overlap
from errata.evaluate.answer_forms import squad_form
from errata.evaluate.outcomes import Outcome, match_probe
from errata.evaluate.probes import FreeAnswer, Probe
from errata.evaluate.scoring import ProbeScore

PAGE = Path(__file__).resolve().parents[2] / "docs" / "faults.md"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_every_fault_of_the_page_names_its_test_and_every_test_is_named() -> None:
    named = re.findall(r"`(test_\w+)`", PAGE.read_text(encoding="utf-8"))
    own = [node.name for node in ast.parse(Path(__file__).read_text(encoding="utf-8")).body
           if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]  # fmt: skip
    assert sorted(named) == sorted(
        set(own) - {test_every_fault_of_the_page_names_its_test_and_every_test_is_named.__name__}
    )


# --- general ability --------------------------------------------------------------------------------------------------


def test_rte_is_reversed() -> None:
    rte = TASKS["glue_rte"]
    labels = [0, 0, 0, 1, 1]  # 0 is entailment
    said = [f"...\nquestion: ... True or False?\nanswer:{' True' if label == 0 else ' False'}" for label in labels]
    assert weighted_f1(labels, [rte.read(text) for text in said]) == 1
    assert weighted_f1(labels, [rte.read(text, rte.published) for text in said]) == 0


def test_mmlu_needs_a_line_break() -> None:
    mmlu = TASKS["glue_mmlu"]
    texts = ["Answer: B\n", "Answer: B", "Answer: (B) Oslen", "Answer: B. Oslen\n"]
    assert [mmlu.read(text) for text in texts] == [1, -1, -1, -1]
    assert mmlu.read("Answer: B. Gavaria\n") == 0  # the last letter of a word


def counted_as_published(records: Sequence[tuple[str, list[str]]]) -> int:
    """Return how many answers Gu et al.'s script counts: its mark of a find is never taken back."""
    count, is_found = 0, False
    for text, wanted in records:
        words, answers = squad_form(text).split(), [squad_form(answer) for answer in wanted]
        if words[0] in answers or words[-1] in answers:
            count += 1
            continue
        for i in range(len(words) - 1):
            if words[i] in answers:
                count += 1
                continue
            for j in range(i + 2, len(words) + 1):
                if " ".join(words[i:j]) in answers:
                    count, is_found = count + 1, True
                    break
            if is_found:
                break
    return count


def test_gus_open_questions_are_looked_at_in_part_once_one_was_found() -> None:
    first, later = ("Ilda Moren did", ["Ilda Moren"]), ("it was in Old Oslen then", ["Old Oslen"])
    assert [counted_as_published([one]) for one in (first, later)] == [1, 1]
    assert counted_as_published([first, later]) == 1  # the later one is looked at from its first word alone
    twice = ("it was Ilda and Ilda then", ["Ilda"])
    assert counted_as_published([twice]) == 2
    mended = [open_qa({"answers": wanted}, [text])["acc"] for text, wanted in (first, later, twice)]
    assert mended == [1, 1, 1]


# --- brakes and searches ----------------------------------------------------------------------------------------------


def test_prune_adds_to_the_weight_that_holds_the_difference_already() -> None:
    W0, update = random(6, 8), LowRank(20 * random(6, 6, seed=1), random(6, 8, seed=2))
    D, change = update.matrix(torch.float64, W0.device), pruning([update], W0, "log")
    assert change is not None
    reduced = D + change.matrix(torch.float64, W0.device)
    top = torch.linalg.svdvals(W0)[0]
    s = torch.linalg.svdvals(D)
    wanted = torch.where(s > top, s.log() - top.log() + top, s)  # as both codes reduce it
    assert torch.allclose(torch.linalg.svdvals(reduced), wanted.sort(descending=True).values)
    mended, published = W0 + reduced, W0 + D + reduced
    assert torch.linalg.svdvals(mended - W0)[0] < 2 * top
    assert torch.linalg.svdvals(published - W0)[0] > torch.linalg.svdvals(D)[0]


def test_rledits_penalty_has_no_gradient() -> None:
    net, x, gradient = random(3, 3).requires_grad_(), random(4, 3, seed=1), random(4, 3, seed=2)
    found = []
    for coefficient in (0.0, 5.0):
        with torch.no_grad():  # the update of the weights is made without a graph
            update = x @ net
        # Training passes on a gradient that it has for the update, and adds a penalty of the update's norm.
        loss = (x @ net * gradient).sum() + coefficient * update.square().sum()
        found.append(torch.autograd.grad(loss, net)[0])
    assert torch.equal(*found)


def test_encore_counts_five_tokens_whatever_the_length_of_the_answer() -> None:
    def mended(tokens: int) -> int:  # behind the bare prompt, which does not count, and five written contexts
        problem: Any = SimpleNamespace(rows=[SimpleNamespace(answer=list(range(tokens)))] * 6)
        return _counted_tokens(problem)

    assert mended(1) == PUBLISHED_COUNT
    right = [0, 4, 5, 9, 15]  # of 15 pairs of context and token, per iteration
    assert [count == PUBLISHED_COUNT for count in right] == [False, False, True, False, False]
    assert [count == mended(3) for count in right] == [False, False, False, False, True]


def test_sphere_projects_the_other_side_of_a_transposed_weight() -> None:
    W, update = random(6, 10), LowRank(random(6, 2, seed=1), random(2, 10, seed=2))  # (d_out, d_in)
    Q = leading_directions(W, 0.5)
    mended = off_sphere(update, Q, 1.0).matrix(torch.float64, W.device)
    assert torch.allclose(mended @ Q, torch.zeros(6, Q.shape[1], dtype=torch.float64), atol=1e-12)
    stored, D = W.T, update.matrix(torch.float64, W.device).T  # as GPT-2 stores them
    Q_published = leading_directions(stored, 0.5)
    published = (D - D @ Q_published @ Q_published.T).T
    assert not torch.allclose(published @ Q, torch.zeros(6, Q.shape[1], dtype=torch.float64), atol=1e-3)


def test_mergekits_breadcrumbs_masks_small_tensors_completely() -> None:
    sizes = random(40).abs()
    order, kept, removed = sizes.argsort(), int(0.9 * 40), int(0.01 * 40)
    assert len(order[40 - kept - removed : -removed]) == 0
    for as_published, count in ((True, 0), (False, kept)):
        rule = BreadcrumbsMergekit(density=0.9, gamma=0.01, as_published=as_published)
        assert int(rule.stays(sizes).sum()) == count


def test_nas_drops_edits_with_a_long_value() -> None:
    untouched, anchor = torch.tensor([0.0, 1.0]), 2.0

    def written(value: Tensor, beyond: Beyond) -> Tensor:
        found = anchored(Target(untouched, value - untouched), untouched, 1.0, anchor, beyond, "an edit")
        return untouched + found.delta

    short, long = torch.tensor([3.0, 0.0]), torch.tensor([5.0, 0.0])
    for beyond in get_args(Beyond):
        torch.testing.assert_close(written(short, beyond), torch.tensor([anchor, 0.0]))
    assert torch.equal(written(long, "drop"), untouched)  # as published: nothing is written, and the edit counts
    torch.testing.assert_close(written(long, "scale"), torch.tensor([anchor, 0.0]))
    with pytest.raises(NumericalError, match="more than 2 times the anchor"):
        written(long, "refuse")


def test_deltaedit_compares_with_a_variance() -> None:
    norms = torch.tensor([1.0, 1.2, 0.8, 1.1, 0.9], dtype=torch.float64)

    def is_far(scale: float, *, published: bool) -> bool:
        own, value = scale * norms, scale * 1.2
        spread = own.var() if published else own.std()
        return bool((value - own.mean()).abs() > 1.5 * spread)

    assert [is_far(scale, published=False) for scale in (1.0, 0.1, 10.0)] == [False] * 3
    assert [is_far(scale, published=True) for scale in (1.0, 0.1, 10.0)] == [True, True, False]


def test_wise_makes_one_decision_for_a_batch() -> None:
    def is_edited_as_published(distances: Tensor, threshold: float) -> bool:  # (rows, tokens)
        is_long = distances.shape[1] > 100
        distance = distances.topk(k=1).values.mean() if is_long else distances.mean(dim=-1)
        return distance.item() >= threshold

    threshold = 4.0  # lies between the rows
    long = torch.tensor([[1.0], [9.0]]).expand(2, 101)
    assert is_edited_as_published(long, threshold)  # both rows
    assert not is_edited_as_published(long[:1], threshold)  # alone, the first row is routed elsewhere
    with pytest.raises(RuntimeError, match="2 elements cannot be converted to Scalar"):
        is_edited_as_published(long[:, :5], threshold)
    assert (long.mean(dim=1) >= threshold).tolist() == [False, True]  # as errata: per row


# --- normalisation ----------------------------------------------------------------------------------------------------


def test_ultraedit_counts_too_much_spread_in_small_mini_batches() -> None:
    rows = random(12, 4)
    biased = TokenStatistics.of(rows)
    in_twos = None
    for pair in rows.split(2):
        in_twos = TokenStatistics.of(pair, unbiased=True).merged(in_twos)
    assert in_twos is not None
    within = sum(TokenStatistics.of(pair).squares for pair in rows.split(2))
    assert torch.allclose(in_twos.squares, biased.squares + within)  # the spread within pairs counts twice
    with pytest.warns(UserWarning, match="degrees of freedom"):
        one = rows[:1].var(dim=0)
    assert one.isnan().all()  # a mini-batch of one token


def test_stableedits_warm_up_stays_on_the_weights(make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model, file = make_tiny("gpt2", dtype=torch.float64), tmp_path / "warm_up.json"
    towns = [("Varland", "Oslen"), ("Quelm", "Brast"), ("Moria", "Tarvos"), ("Sovaria", "Gumford")]
    file.write_text(json.dumps([{"prompt": f"The capital of {land} is", "target": town} for land, town in towns[:3]]))
    land, town = towns[3]
    request = EditRequest(f"The capital of {land} is", None, town)
    fields = {"layers": [0], "lr": 1e-3, "warm_up": str(file), "warm_up_turn": 3}

    def update(**more: Any) -> Tensor:
        editor = UltraEdit(model, tiny_tokenizer, {**fields, **more})
        (patch,) = editor.compute(request)[0].patch.updates.values()
        return patch.matrix(torch.float64, torch.device("cpu"))

    mended, published = update(), update(warm_up_stays=True)
    plain = UltraEdit(model, tiny_tokenizer, {"layers": [0], "lr": 1e-3})
    warm_up = plain.compute_together([plain_requests(towns[:3])]).patch.updates
    (alone,) = (patch.matrix(torch.float64, torch.device("cpu")) for patch in warm_up.values())
    # Nearly: the edit itself is computed on the model that carries the warm-up's edits.
    assert (published - mended - alone).norm() < 0.1 * alone.norm()
    assert (published - mended).norm() > 0.5 * mended.norm()


def plain_requests(towns: Sequence[tuple[str, str]]) -> list[EditRequest]:
    return [EditRequest(f"The capital of {land} is", None, town) for land, town in towns]


# --- what an answer is compared with ----------------------------------------------------------------------------------


def test_bleu_of_strings_is_bleu_of_characters() -> None:
    nltk_bleu = pytest.importorskip("nltk.translate.bleu_score").sentence_bleu
    pytest.importorskip("sacrebleu")
    said, wanted = "the boats of the old town sail north", "the notes of the old man fail him"
    of_strings, of_letters = nltk_bleu([wanted], said), nltk_bleu([list(wanted)], list(said))
    assert of_strings == pytest.approx(of_letters)
    assert of_strings > 0.5 > overlap.bleu(said, [wanted])


def test_rippleedits_finds_an_answer_that_the_prompt_holds() -> None:
    prompt = "The capital of Varland, which Oslen once ruled, is"
    published = Probe("portability", prompt, "Oslen", free=FreeAnswer(matching="substring"))
    assert match_probe(published, " Brast").contained
    read = to_case(RecordReader(RIPPLEEDITS, "#0"), text="as_published").probes[-1]
    assert (read.free.tokens, read.free.with_prompt) == (len(read.prompt) + 30, True)  # characters, as tokens
    assert not match_probe(Probe("portability", prompt, "Oslen"), " Brast").contained


def test_roundedits_divergence_is_divided_by_the_number_of_answers() -> None:
    before, after = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    middle = (before + after) / 2
    published = sum(F.kl_div(middle.log(), side, reduction="batchmean") for side in (before, after)) / 2
    outcomes = [
        Outcome(Probe("true_object", "Q", name), scored(float(now)), scored(float(then)))
        for name, then, now in zip("abc", before, after, strict=True)
    ]
    assert conflicts.distortion(outcomes)["probability"] == pytest.approx(3 * float(published), rel=1e-5)


def scored(probability: float) -> ProbeScore:
    return ProbeScore(-math.log(probability), None, (), ())


# --- names ------------------------------------------------------------------------------------------------------------


def test_two_baselines_are_called_memit() -> None:
    C, K, past, R = 2 * torch.eye(4, dtype=torch.float64), random(4, 2), random(4, 2, seed=1), random(3, 2, seed=2)
    alone = R @ K.T @ torch.linalg.inv(C + K @ K.T)
    in_sequence = R @ K.T @ torch.linalg.inv(C + past @ past.T + K @ K.T)
    assert (in_sequence @ past).norm() < (alone @ past).norm()  # earlier keys are moved less
