"""Information flow against numbers from the authors' own program, on both models and in both precisions."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from errata.editors.core.locating.attention_patterns import Attention
from errata.editors.core.locating.block_sums import BlockSums, block_sums
from errata.editors.core.locating.flow_graph import Edge, edges_of, route
from errata.editors.core.locating.information_flow import LayerShares, head_parts, layer_shares, shares_of_neurons
from errata.editors.core.model.architecture import Architecture, describe

# The README of the golden numbers: 1e-9 in float64; in float32, contributions of tiny parts agree to about 3e-5.
ALLOWED = {"f32": 3e-5, "f64": 1e-9}
CASES = [("gpt2_tr", "f64"), ("gpt2_tr", "f32"), ("llama", "f32")]
LEAST = 0.04  # of the renormalised graph
LAYER = 3  # kept with its parts, other norms and thresholds


@dataclass(frozen=True)
class Golden:
    root: Path
    model_name: str
    dtype: str

    def close(self, found: Tensor | float, expected: Tensor | float) -> None:
        pair = (torch.as_tensor(each, dtype=torch.float64) for each in (found, expected))
        torch.testing.assert_close(*pair, atol=ALLOWED[self.dtype], rtol=0)

    @functools.cached_property
    def said(self) -> dict[str, Any]:
        return json.loads(self._path(".json").read_text())

    @functools.cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self._path(".safetensors"))

    def _path(self, ending: str) -> Path:
        return self.root / self.model_name / "information_flow" / f"prompt0_{self.dtype}{ending}"

    @functools.cached_property
    def architecture(self) -> Architecture:
        from transformers import AutoModelForCausalLM

        path = self.root / "models" / self.model_name
        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32).eval()
        return describe(model.double() if self.dtype == "f64" else model)

    @functools.cached_property
    def blocks(self) -> list[BlockSums]:
        return block_sums(self.architecture, self.said["input_ids"]).blocks

    @functools.cached_property
    def layers(self) -> list[LayerShares]:
        return [layer_shares(block) for block in self.blocks]

    def as_released(self) -> list[LayerShares]:
        """The shares with the bias of the values twice, as the released method adds it once more."""
        found = []
        for layer, block in enumerate(self.blocks):
            assert block.attention is not None
            bias = self.architecture.block(layer).attn.c_attn.bias.detach().double().chunk(3)[-1]  # type: ignore[operator, union-attr]
            heads = block.attention.n_heads
            twice = Attention(block.attention.pattern, block.attention.values + bias.reshape(heads, 1, -1))
            found.append(layer_shares(replace(block, attention=twice)))
        return found


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def golden(request: pytest.FixtureRequest, golden_root: Path) -> Golden:
    if not (golden_root / request.param[0] / "information_flow").is_dir():
        pytest.skip("the golden numbers hold no information_flow")
    return Golden(golden_root, *request.param)


def graphs(golden: Golden) -> dict[str, list[Edge]]:
    """The graphs that are kept, and those whose routes are: as they are, and without small parts."""
    found = {"bias_once.graph": golden.layers}
    if golden.model_name == "gpt2_tr":
        found["as_released.graph"] = golden.as_released()
    found |= {f"{name}_renormalised{LEAST}": [_released(each) for each in layers] for name, layers in found.items()}
    return {name: edges_of(layers, ahead=True) for name, layers in found.items()}


def _released(layer: LayerShares) -> LayerShares:
    """The released renormalising: it divides the MLP's shares by their sum over all tokens, added to the residual's."""
    kept = layer.thresholded(LEAST)
    mlp, middle = (share * (share > LEAST) for share in (layer.mlp, layer.mlp_residual))
    total = middle + mlp.sum()
    return replace(kept, mlp=mlp / total, mlp_residual=middle / total)


def test_every_share_of_a_layer_is_that_of_the_original(golden: Golden) -> None:
    for layer, found in enumerate(golden.layers):
        golden.close(found.attention, golden.tensors[f"bias_once.layer{layer}.attn"])
        golden.close(found.attention_residual, golden.tensors[f"bias_once.layer{layer}.attn_residual"])
        golden.close(found.mlp, golden.tensors[f"layer{layer}.mlp"])
        golden.close(found.mlp_residual, golden.tensors[f"layer{layer}.mlp_residual"])
        neurons, rest = shares_of_neurons(golden.architecture, golden.blocks[layer], layer, -1)
        golden.close(neurons, golden.tensors[f"layer{layer}.neurons_last"])
        golden.close(rest, golden.said["neurons_last_residual"][layer])


def test_parts_other_norms_and_thresholds_are_those_of_the_original(golden: Golden) -> None:
    block, found = golden.blocks[LAYER], golden.layers[LAYER]
    assert block.attention is not None
    golden.close(block.entry, golden.tensors[f"layer{LAYER}.resid_pre"])
    golden.close(block.middle, golden.tensors[f"layer{LAYER}.resid_mid"])
    golden.close(head_parts(block, block.attention)[-1], golden.tensors[f"layer{LAYER}.parts_last_position"])
    by_kind = {"_norm2": layer_shares(block, 2), **{f"_threshold{t}": found.thresholded(t) for t in (0.02, 0.1)}}
    for kind, expected in by_kind.items():
        golden.close(expected.attention, golden.tensors[f"layer{LAYER}.attn{kind}"])
        golden.close(expected.attention_residual, golden.tensors[f"layer{LAYER}.attn_residual{kind}"])


def test_the_bias_of_values_counts_twice_in_the_released_shares(golden: Golden) -> None:
    if golden.model_name != "gpt2_tr":
        pytest.skip("this model has no biases")
    for layer, found in enumerate(golden.as_released()):
        golden.close(found.attention, golden.tensors[f"as_released.layer{layer}.attn"])
        golden.close(found.attention_residual, golden.tensors[f"as_released.layer{layer}.attn_residual"])


def test_graphs_and_routes_are_those_of_the_original(golden: Golden) -> None:
    last, made = len(golden.said["input_ids"]) - 1, graphs(golden)
    for name, edges in made.items():
        kept = golden.said[name]
        if isinstance(kept, int):
            assert len(edges) == kept
        else:
            _same_edges(golden, [edge for edge in edges if edge.weight > 1e-4], kept)
    for name, expected in golden.said["route_from_last_token"].items():
        graph, _, threshold = name.partition(">")
        found = route(made[graph], len(golden.blocks), last, float(threshold))
        if isinstance(expected, dict):
            states = {node for edge in found for node in edge[:2]}
            assert (len(found), len(states)) == (expected["edges"], expected["nodes"])
            golden.close(sum(edge.weight for edge in found) / len(found), expected["weight_sum"] / len(found))
        else:
            _same_edges(golden, found, expected)


def _same_edges(golden: Golden, found: list[Edge], expected: list[tuple[str, str, float]]) -> None:
    mine = {(str(edge.source), str(edge.target)): edge.weight for edge in found}
    theirs = {(source, target): weight for source, target, weight in expected}
    assert mine.keys() == theirs.keys()
    weights = [torch.tensor([each[pair] for pair in theirs], dtype=torch.float64) for each in (mine, theirs)]
    golden.close(*weights)
