"""Causal tracing against numbers from ROME's own program, on both models and in both precisions."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from errata.editors.core.locating.corruption import Noise, ScaledNoise, Swap, scaled_noise
from errata.editors.core.locating.grids import Grid
from errata.editors.core.locating.token_classes import CLASSES, class_sums
from errata.editors.core.locating.tracing import FactTrace, trace
from errata.editors.core.model.architecture import describe

PROBABILITY = {"f32": 1e-5, "f64": 1e-9}  # absolute, of the README of the golden numbers
PARTS = {"mlp": "mlp", "attn": "attention"}
SEVERED = {"mlp": ("mlp",), "attn": ("attention",), "both": ("mlp", "attention")}
CASES = [("gpt2_tr", "f32"), pytest.param(("gpt2_tr", "f64"), marks=pytest.mark.slow), ("llama", "f32")]


@dataclass
class Golden:
    root: Path
    model_name: str
    dtype: str

    @property
    def allowed(self) -> float:
        return PROBABILITY[self.dtype]

    @functools.cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.root / "tokenizer")

    @functools.cached_property
    def model(self) -> Any:
        from transformers import AutoModelForCausalLM

        path = self.root / "models" / self.model_name
        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32).eval()
        return model.double() if self.dtype == "f64" else model

    def read(self, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        folder = self.root / self.model_name / "causal_trace"
        path = folder / f"{name}_{self.dtype}"
        return json.loads(path.with_suffix(".json").read_text()), load_file(path.with_suffix(".safetensors"))

    @functools.cache  # noqa: B019 - lives as long as the module
    def noise(self, noise: Noise) -> ScaledNoise:
        requests = json.loads((self.root / "requests.json").read_text())
        subjects = [self.tokenizer(request["subject"])["input_ids"] for request in requests]
        texts = None
        if noise.needs_texts:
            corpus = json.loads((self.root / "corpus_200.json").read_text())
            texts = [self.tokenizer(text)["input_ids"][:256] for text in corpus]
        return scaled_noise(describe(self.model), noise, subjects=subjects, texts=texts)

    def __hash__(self) -> int:
        return hash((self.model_name, self.dtype))

    def trace(self, meta: dict[str, Any], noise: Noise, grids: list[Grid], **more: Any) -> FactTrace:
        return trace(
            self.model, self.tokenizer, meta["prompt"], meta["subject"], self.noise(noise), grids=grids, **more
        )


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def golden(request: pytest.FixtureRequest, golden_root: Path) -> Golden:
    if not (golden_root / request.param[0] / "causal_trace").is_dir():
        pytest.skip("the golden numbers hold no causal_trace")
    return Golden(golden_root, *request.param)


def grid_of(name: str) -> Grid:
    """The grid of a table's name: state, mlp_w10, severed_both."""
    head, _, rest = name.partition("_")
    if head == "state":
        return Grid()
    return Grid(severed=SEVERED[rest.partition("_")[0]]) if head == "severed" else Grid(PARTS[head], int(rest[1:]))  # type: ignore[arg-type]


def noise_of(kind: str, table: str) -> Noise:
    two = "two" if table.startswith("severed") else "one"
    return Noise(
        kind.removesuffix("_replace"),
        replaced=kind.endswith("_replace"),
        draws=two,
        extra_tokens=int(table.endswith("extra_token1")),
    )


def tables_of(tensors: dict[str, Tensor]) -> dict[Noise, dict[str, Tensor]]:
    """The tables of one prompt, together where one trace gives them all."""
    found: dict[Noise, dict[str, Tensor]] = {}
    for name, table in tensors.items():
        kind, _, what = name.removesuffix(".scores").rpartition(".")
        # The released code has two draws there, and with nothing held its table is that of the second.
        if name.endswith(".scores") and what not in ("severed_none", "state_subject_last"):
            found.setdefault(noise_of(kind, what), {})[what] = table.double()
    return found


@pytest.mark.parametrize("number", [*(pytest.param(i, marks=pytest.mark.slow) for i in range(3)), 3])
def test_every_table_of_a_prompt_is_that_of_the_original(golden: Golden, number: int) -> None:
    meta, tensors = golden.read(f"prompt{number}")
    compared = 0
    for noise, tables in tables_of(tensors).items():
        grids = {what: grid_of(what) for what in tables}
        found = golden.trace(meta, noise, list(grids.values()))
        for what, table in tables.items():
            torch.testing.assert_close(
                found.grids[grids[what].name]["probability"], table, rtol=0, atol=golden.allowed, msg=f"{noise} {what}"
            )
            compared += 1
        assert found.subject_range == tuple(meta["subject_range"])
        assert found.clean["probability"] == pytest.approx(meta["high_score"], abs=golden.allowed)
        assert found.answers[0] == meta["answer"]
        if not noise.replaced and not noise.extra_tokens:
            kind = meta["kinds"][noise.rule]
            assert found.corrupted["probability"] == pytest.approx(kind["low_score"], abs=golden.allowed)
    assert compared > 8
    last = golden.trace(meta, Noise("s3"), [Grid()], tokens="subject_last")
    table = tensors["s3.state_subject_last.scores"].double()
    torch.testing.assert_close(last.grids["state"]["probability"], table, rtol=0, atol=golden.allowed)


def test_replaced_subjects_are_those_of_the_original_in_both_directions(golden: Golden) -> None:
    meta, tensors = golden.read("token_replacement")
    for number, pair in enumerate(meta["pairs"]):
        decode = golden.tokenizer.decode
        same = [a == b for a, b in zip(pair["clean_ids"], pair["corrupt_ids"], strict=True)]
        first, end = same.index(False), len(same) - same[::-1].index(False)
        subject, other = (decode(pair[name][first:end]).strip() for name in ("clean_ids", "corrupt_ids"))
        for direction in ("denoising", "noising"):
            found = trace(
                golden.model, golden.tokenizer, pair["clean"], subject, Swap(other),
                grids=[Grid(), Grid("mlp", 3)], direction=direction,
            )  # fmt: skip
            assert list(found.answer_ids) == pair["answers"]
            base = found.corrupted if direction == "denoising" else found.clean
            told = pair[direction]
            assert [base["answer"], base["other"]] == pytest.approx(told["unpatched_probs"], abs=golden.allowed)
            assert base["logit_difference"] == pytest.approx(told["unpatched_logit_difference"], abs=golden.allowed)
            for grid, name in (("state", "state"), ("mlp, window 3", "mlp_w3")):
                cells = found.grids[grid]
                key = f"pair{number}.{direction}.{name}"
                probabilities = torch.stack([cells["answer"], cells["other"]], dim=-1)
                kinds = ((probabilities, "probs", 1), (cells["logit_difference"], "logit_difference", 10))
                for ours, what, scale in kinds:
                    theirs = tensors[f"{key}.{what}"].double()
                    torch.testing.assert_close(ours, theirs, rtol=0, atol=scale * golden.allowed, msg=f"{key}.{what}")


def test_averages_over_classes_of_tokens_are_those_of_the_notebook(golden: Golden) -> None:
    _, tensors = golden.read("averages")
    grids = [Grid(), Grid("mlp", 10), Grid("attention", 10)]
    traces = [golden.trace(golden.read(f"prompt{i}")[0], Noise("s3"), grids) for i in range(4)]
    assert len(CLASSES) == 6
    for grid, name in zip(grids, ("state", "mlp_w10", "attn_w10"), strict=True):
        sums = class_sums(traces, [found.grids[grid.name]["probability"] for found in traces])
        for ours, what in ((sums.means(), "result"), (sums.deviations(), "result_std")):
            theirs = tensors[f"{name}.{what}"].double()
            torch.testing.assert_close(
                torch.from_numpy(ours), theirs, rtol=0, atol=golden.allowed, msg=f"{name} {what}"
            )


def test_noise_of_texts_has_the_moments_of_the_original(golden: Golden) -> None:
    if golden.dtype == "f64":
        pytest.skip("kept in float32 alone")
    _, rules = golden.read("noise_rules")
    _, prompt = golden.read("prompt0")
    own = golden.noise(Noise("m"))
    assert own.factor is not None
    torch.testing.assert_close(torch.from_numpy(own.factor @ own.factor.T), rules["cov"], rtol=0, atol=1e-9)
    # The columns of a singular value decomposition have a sign that is up to the library.
    mean, factor = rules["mean"].numpy(), rules["transform_weight"].numpy()
    for rule in ("m", "t5"):
        (drawn,) = ScaledNoise(Noise(rule), 1.0, mean, factor).drawn(5, 64)
        torch.testing.assert_close(torch.from_numpy(drawn), prompt[f"{rule}.noise"], rtol=0, atol=1e-9)
