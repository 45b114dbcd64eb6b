"""Scores and summaries equal those of the original scripts, run on the same models and records."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import original_metrics
import pytest
import torch
from rounding import of_logits
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from errata.benchmarks.datasets import counterfact, zsre
from errata.benchmarks.datasets.json_records import RecordReader
from errata.evaluate import metrics
from errata.evaluate.collapse import next_token_kl
from errata.evaluate.probes import Case, Kind, Probe
from errata.evaluate.scoring import ProbeScore, score

# The originals' kinds in the order of their prompts, with their names in the files.
KINDS: dict[Kind, str] = {
    "rewrite": "rewrite_prompts",
    "paraphrase": "paraphrase_prompts",
    "neighborhood": "neighborhood_prompts",
    "distracting_neighborhood": "distracting_neighborhood_prompts",
}
STATES = ("unedited", "ROME")


class Golden:
    """One model folder with the originals' metrics, and the scores of its records by ours."""

    def __init__(self, root: Path, name: str) -> None:
        self.name, self.folder = name, root / name / "metrics"
        self.tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer")
        unedited = AutoModelForCausalLM.from_pretrained(root / "models" / name, dtype=torch.float32).eval()
        self.models = {"unedited": unedited, "ROME": with_rome(unedited, root / name / "rome" / "req0_mom2_f32")}
        self.counterfact = self.read("counterfact")
        self.cases = [
            counterfact.to_case(RecordReader(record, "#0"), form="counterfact_plus")
            for record in self.counterfact["records"]
        ]
        self.scores = {state: self.score_cases(state, self.cases) for state in STATES}
        found = [one.logprobs for scores in self.scores.values() for case in scores for one in case]
        # What two machines may differ by: the largest log probability stands for the largest logit.
        self.rounding = of_logits(max(float(logprobs.abs().max()) for logprobs in found if logprobs is not None))

    def read(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / f"{name}.json").read_text())

    def score_cases(self, state: str, cases: list[Case]) -> list[list[ProbeScore]]:
        """All cases in one call, split up again."""
        probes = [probe for case in cases for probe in case.probes]
        scores = iter(score(self.models[state], self.tokenizer, probes, next_token=True))
        return [[next(scores) for _ in case.probes] for case in cases]

    def outcomes(self, state: str) -> list[list[metrics.Outcome]]:
        return [metrics.outcomes(*pair) for pair in zip(self.cases, self.scores[state], strict=True)]


def with_rome(model: Any, stem: Path) -> Any:
    """A copy of the model with the stored weight change of one ROME edit."""
    edited = copy.deepcopy(model)
    name = json.loads(stem.with_suffix(".json").read_text())["weight_name"]
    with torch.no_grad():
        edited.get_parameter(name).add_(load_file(stem.with_suffix(".safetensors"))["weight_delta"])
    return edited


@pytest.fixture(scope="module")
def golden_models(golden_root: Path) -> list[Golden]:
    folders = sorted(path.parent.parent.name for path in golden_root.glob("*/metrics/counterfact.json"))
    assert folders, f"no */metrics/counterfact.json below {golden_root}"
    return [Golden(golden_root, name) for name in folders]


@pytest.fixture(params=STATES)
def state(request: pytest.FixtureRequest) -> str:
    return request.param


def by_kind(case: Case, scores: list[ProbeScore], kind: Kind) -> list[tuple[Probe, ProbeScore]]:
    return [pair for pair in zip(case.probes, scores, strict=True) if pair[0].kind == kind]


def scored(golden: Golden, state: str) -> Iterator[tuple[Kind, dict[str, Any], int, ProbeScore]]:
    """(kind, the originals' record, place among the prompts of the kind, our score)."""
    for case, scores, theirs in zip(golden.cases, golden.scores[state], golden.counterfact[state], strict=True):
        for kind in KINDS:
            for place, (_, ours) in enumerate(by_kind(case, scores, kind)):
                yield kind, theirs, place, ours


def test_probabilities_are_the_originals_to_rounding(golden_models: list[Golden], state: str) -> None:
    checked = 0
    for golden in golden_models:
        for kind, theirs, place, ours in scored(golden, state):
            expected = theirs[f"{KINDS[kind]}_probs"][place]
            new, true = ours.nll_target, ours.nll_other
            if "neighborhood" in kind:
                new, true = true, new
            assert new == pytest.approx(expected["target_new"], abs=golden.rounding, rel=0), golden.name
            assert true == pytest.approx(expected["target_true"], abs=golden.rounding, rel=0), golden.name
            checked += 1
    assert checked == 72 * len(golden_models)


def test_correct_flags_are_the_originals(golden_models: list[Golden], state: str) -> None:
    for golden in golden_models:
        for kind, theirs, place, ours in scored(golden, state):
            assert all(ours.target_correct) == theirs[f"{KINDS[kind]}_correct"][place], (golden.name, kind)


def test_summaries_are_the_originals_to_the_last_digit(golden_models: list[Golden], state: str) -> None:
    for golden in golden_models:
        ours = original_metrics.summary(map(original_metrics.counterfact_case, golden.outcomes(state)))
        theirs = golden.counterfact["summary"][state]
        names = [name for name in theirs if name.startswith("post_")]
        assert set(names) == set(ours)
        for name in names:
            assert ours[name] == pytest.approx(tuple(theirs[name]), abs=1e-9, nan_ok=True), (golden.name, name)


def test_every_case_is_the_originals(golden_models: list[Golden], state: str) -> None:
    for golden in golden_models:
        theirs = golden.counterfact["summary"][f"{state}_per_case"]
        for case, measured in zip(golden.cases, golden.outcomes(state), strict=True):
            place = theirs["case_id"].index(float(case.id))
            for name, value in original_metrics.counterfact_case(measured).items():
                assert value == pytest.approx(theirs[name][place], abs=golden.rounding), (golden.name, name)


def test_our_score_is_the_originals_before_rounding(golden_models: list[Golden], state: str) -> None:
    for golden in golden_models:
        cases = [metrics.case_values(measured) for measured in golden.outcomes(state)]
        summary, ours = metrics.summarise(cases), metrics.papers_score(cases, "probability")
        theirs = golden.counterfact["summary"][state]["post_score"][0]
        assert ours is not None
        assert 100 * ours.mean == pytest.approx(theirs, abs=0.01)
        for kind, metric in metrics.METRIC_OF_KIND.items():
            if kind in KINDS:
                rate = golden.counterfact["summary"][state][f"post_{kind}_success"][0]
                assert 100 * summary["probability"][metric]["mean"] == pytest.approx(rate, abs=0.005)


def test_success_magnitude_and_kl_of_each_neighbor_are_counterfact_pluss(golden_models: list[Golden]) -> None:
    for golden in golden_models:
        rows = {(row["case"], row["index"]): row for row in golden.counterfact["per_prompt_S_M_KL"]}
        seen = 0
        for case, before, after in zip(golden.cases, *(golden.scores[s] for s in STATES), strict=True):
            # The originals number a case's prompts in the order of KINDS, which is that of our probes.
            for index, probe in enumerate(case.probes):
                row = rows.get((int(case.id), index))
                if row is None:
                    continue
                assert probe.kind in ("neighborhood", "distracting_neighborhood")
                seen += 1
                base, edited = before[index], after[index]
                for name, one in (("base", base), ("ROME", edited)):
                    assert metrics.prefers_target(one) == bool(row[f"{name}.S"])
                    assert original_metrics.magnitude(one) == pytest.approx(row[f"{name}.M"], abs=golden.rounding)
                assert base.logprobs is not None and edited.logprobs is not None
                # Their kl_div(..., reduction="batchmean") divides by the first dimension, here the vocabulary.
                plain, vocabulary = next_token_kl(edited.logprobs, base.logprobs), edited.logprobs.numel()
                assert plain / vocabulary == pytest.approx(row["ROME.KL"], abs=1e-8)
                assert plain == pytest.approx(row["ROME.KL"] * vocabulary, abs=2e-5)
        assert seen == len(rows)


def test_next_token_distributions_are_the_originals(golden_models: list[Golden], state: str) -> None:
    checked = 0
    for golden in golden_models:
        tensors = load_file(golden.folder / "counterfact.safetensors")
        for case, scores in zip(golden.cases, golden.scores[state], strict=True):
            stored = tensors.get(f"case{case.id}.{state}.neglogprobs")
            if stored is not None:
                ours = torch.stack([one.logprobs for one in scores[: len(stored)] if one.logprobs is not None])
                torch.testing.assert_close(-ours, stored, atol=2 * golden.rounding, rtol=0)
                checked += 1
    assert checked == len(golden_models), "of each model one case is stored"


def zsre_case(entry: dict[str, Any], raw: dict[str, Any] | None) -> Case:
    """The case of one golden zsRE entry, from MEND's record where it is one."""
    if raw is not None:
        return zsre.to_case(RecordReader(raw, "#0"))
    record = entry["record"]
    case = counterfact.to_case(
        RecordReader({**record, "neighborhood_prompts": [], "case_id": 0, "attribute_prompts": []}, "#0")
    )
    first, answer = record["neighborhood_prompts"][0]["prompt"], record["neighborhood_prompts"]
    neighbor = Probe("neighborhood", first, "".join(part["target"] for part in answer))
    return replace(case, probes=(*case.probes, neighbor))


def test_zsre_tokens_are_right_where_the_originals_say_so(golden_models: list[Golden], state: str) -> None:
    checked = 0
    for golden in golden_models:
        file = golden.read("zsre")
        raw = {record["src"]: record for record in file["raw"]}
        for entry in file["cases"]:
            request = entry["record"]["requested_rewrite"]
            question = request["prompt"].replace("{}", request["subject"])
            case = zsre_case(entry, raw.get(question))
            assert case.request.text == question
            scores = score(golden.models[state], golden.tokenizer, case.probes)
            for kind in ("rewrite", "paraphrase", "neighborhood"):
                ours = [flag for _, one in by_kind(case, scores, kind) for flag in one.target_correct]
                assert ours == entry[state][f"{KINDS[kind]}_correct"], (golden.name, question, kind)
                values = original_metrics.zsre_case(metrics.outcomes(case, scores))
                assert values[f"post_{kind}_acc"] == pytest.approx(sum(ours) / len(ours))
                checked += len(ours)
    assert checked > 100
