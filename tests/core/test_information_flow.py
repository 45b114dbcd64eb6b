"""Laws of information flow, on tiny models of several architectures, and values computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_architectures
import torch

from errata.editors.core.errors import ArchitectureError, ConfigError, RequestError
from errata.editors.core.locating import block_sums as sums
from errata.editors.core.locating.block_sums import BlockSums, block_sums
from errata.editors.core.locating.flow_graph import Edge, Node, edges_of, route, token_shares
from errata.editors.core.locating.frozen_norms import exact, freeze
from errata.editors.core.locating.information_flow import (
    InformationFlow,
    head_parts,
    information_flow,
    layer_shares,
    neuron_shares,
    shares,
    thresholded,
)
from errata.editors.core.model.architecture import Architecture, describe
from errata.testing import tiny_model, tiny_tokenizer

IDS = (3, 4, 5, 6, 7)
PROMPT = "The capital of Varland is"
# One after the other, side by side, behind a norm (two kinds of block), with a factor, behind a gate, heads that share
# values, a norm behind the sum, experts.
KINDS = ("llama", "gptj", "gemma2", "olmo2", "minicpm3", "afmoe", "falcon", "bert", "mixtral")


def tokens(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_shares_are_those_of_the_original_s_unit_tests() -> None:
    whole, parts, residual = tokens([2, 2], [4, 4]), tokens([[1, 1], [-1, 0]], [[1, 1], [2, 2]]), tokens([2, 1], [1, 1])  # type: ignore[arg-type, list-item]
    found, rest = shares(whole, parts, residual, norm=2)
    torch.testing.assert_close(found, tokens([0.43613, 0], [0.25, 0.5]), atol=1e-5, rtol=0)
    torch.testing.assert_close(rest, torch.tensor([0.56387, 0.25], dtype=torch.float64), atol=1e-5, rtol=0)
    kept, left = thresholded(tokens([0.03, 0.05], [0.15, 0.8]), torch.tensor([0.92, 0.05]).double(), 0.1)
    torch.testing.assert_close(kept, tokens([0, 0], [3 / 19, 16 / 19]))
    torch.testing.assert_close(left, torch.tensor([1.0, 0.0]).double())


def test_a_state_whose_shares_are_all_small_keeps_none() -> None:
    kept, left = thresholded(tokens([0.05, 0.05]), torch.tensor([0.9]).double(), 0.95)
    assert (kept.tolist(), left.tolist()) == ([[0, 0]], [0])


@pytest.fixture(scope="module", params=KINDS)
def ran(request: pytest.FixtureRequest) -> tuple[Architecture, list[BlockSums]]:
    architecture = describe(tiny_architectures.tiny_model(request.param, len(tiny_tokenizer())))
    return architecture, block_sums(architecture, IDS).blocks


def test_the_parts_of_heads_and_the_bias_are_what_the_attention_adds(ran: tuple[Architecture, list[BlockSums]]) -> None:
    architecture, blocks = ran
    for layer, block in enumerate(blocks):
        assert block.attention is not None
        parts = torch.stack(head_parts(block, block.attention)).sum((1, 2))
        bias = architecture.attention_out(layer)._parameters.get("bias")
        if bias is not None:
            parts = parts + block.behind(exact(bias).expand(len(IDS), -1))
        parts = parts + sum(norm.bias for norm in block.behind.norms)
        torch.testing.assert_close(block.entry + parts, block.middle, atol=1e-5, rtol=1e-5)
        found = layer_shares(block)
        torch.testing.assert_close(found.attention.sum((1, 2)) + found.attention_residual, torch.ones(5).double())
        torch.testing.assert_close(found.mlp + found.mlp_residual, torch.ones(5).double())


def test_what_reads_what_is_told_apart(ran: tuple[Architecture, list[BlockSums]]) -> None:
    architecture, blocks = ran
    kind = architecture.model.config.model_type  # type: ignore[union-attr]
    for block in blocks:
        assert block.reads_middle == (kind not in ("gptj", "falcon"))
        assert len(block.behind.norms) == (kind in ("gemma2", "olmo2", "afmoe"))
        assert torch.equal(block.stream, block.middle) == (kind != "bert")
        assert (block.behind.gain != 1) == (kind == "minicpm3")
        assert block.attention is not None
        assert (block.attention.factor is not None) == (kind == "afmoe")


@pytest.mark.parametrize(
    ("kind", "why"),
    [("mamba", "has no attention"), ("gemma3n_text", "several streams"), ("rwkv", "is no sum of values, weighted")],
)
def test_other_kinds_of_blocks_are_refused_with_a_reason(kind: str, why: str) -> None:
    model = tiny_architectures.tiny_model(kind, len(tiny_tokenizer()))
    with pytest.raises(ArchitectureError, match=why):
        block_sums(describe(model), IDS)


def test_a_norm_is_linear_while_its_statistics_are_held() -> None:
    torch.manual_seed(0)
    given, part = torch.randn(4, 8), torch.randn(3, 4, 8).double()
    norm = torch.nn.LayerNorm(8)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    frozen = freeze(norm, given)
    assert frozen.is_centred
    torch.testing.assert_close(frozen(given.double()) + frozen.bias, exact(norm(given)), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(frozen(part).sum(0), frozen(part.sum(0)))
    with pytest.raises(ArchitectureError, match="expected to be a norm"):
        freeze(torch.nn.GELU(), given)


@pytest.fixture(scope="module")
def flow() -> InformationFlow:
    return information_flow(tiny_model("gpt2", len(tiny_tokenizer())), tiny_tokenizer(), PROMPT)


def test_fused_attention_gives_the_shares_of_plain_attention() -> None:
    model = tiny_model("llama", len(tiny_tokenizer()))
    found = {}
    for kind in ("sdpa", "eager"):
        model.set_attn_implementation(kind)
        found[kind] = information_flow(model, tiny_tokenizer(), PROMPT).layers[-1]
    torch.testing.assert_close(found["sdpa"].attention, found["eager"].attention, atol=1e-5, rtol=0)


def test_a_route_leads_down_from_the_last_state_and_grows_as_the_threshold_falls(flow: InformationFlow) -> None:
    edges = edges_of(flow.layers)
    last, n_layers = len(flow.tokens) - 1, len(flow.layers)
    found = {threshold: set(route(edges, n_layers, last, threshold)) for threshold in (0.0, 0.1, 0.9)}
    assert set(edges) >= found[0.0] >= found[0.1] >= found[0.9]
    for threshold, kept in found.items():
        targets = {edge.target for edge in kept}
        assert all(edge.weight > threshold for edge in kept)
        above = {Node("I", n_layers - 1, last)} | {edge.source for edge in kept}
        assert targets <= above
    assert all(edge.source.token <= edge.target.token for edge in edges)
    assert len(edges_of(flow.layers, ahead=True)) > len(edges)


def test_edges_into_a_state_sum_to_one_where_nothing_comes_from_ahead(flow: InformationFlow) -> None:
    sums: dict[Node, float] = {}
    for edge in edges_of(flow.layers, ahead=True):
        if edge.target.kind != "M":
            sums[edge.target] = sums.get(edge.target, 0) + edge.weight
    assert list(sums.values()) == pytest.approx([1.0] * len(sums))


def test_side_by_side_the_mlp_reads_the_block_s_input() -> None:
    found = information_flow(tiny_model("neox", len(tiny_tokenizer())), tiny_tokenizer(), PROMPT)
    edges = edges_of(found.layers)
    assert Edge(Node("X", 0, 2), Node("M", 0, 2), float(found.layers[0].mlp[2])) in edges
    assert not [edge for edge in edges if (edge.source.kind, edge.target.kind) == ("A", "M")]


def test_shares_of_tokens_sum_to_one_and_the_first_token_comes_from_itself(flow: InformationFlow) -> None:
    found = token_shares(flow, -1)
    assert float(found.sum()) == pytest.approx(1)
    assert token_shares(flow, 0).tolist() == [1.0] + [0.0] * (len(flow.tokens) - 1)
    with pytest.raises(ConfigError, match="token: expected less than"):
        token_shares(flow, len(flow.tokens))


def test_the_shares_of_neurons_and_of_the_residual_sum_to_one() -> None:
    model = tiny_model("llama", len(tiny_tokenizer()))
    found, rest = neuron_shares(model, tiny_tokenizer(), PROMPT, 1)
    assert float(found.sum()) + rest == pytest.approx(1)
    with pytest.raises(ConfigError, match="token: expected at least -"):
        neuron_shares(model, tiny_tokenizer(), PROMPT, 1, token=-99)
    with pytest.raises(RequestError, match="tokens for the prompt"):
        neuron_shares(model, tiny_tokenizer(), PROMPT * 99, 1)


def test_thresholds_are_shares(flow: InformationFlow) -> None:
    kept = flow.thresholded(0.05).layers[0]
    assert float(kept.attention[kept.attention > 0].min()) > 0.05
    with pytest.raises(ConfigError, match="threshold"):
        flow.thresholded(2)


def _failing(hooks: Any) -> Any:
    def some(watch: Any) -> Any:
        yield next(hooks(watch))
        raise MemoryError

    return some


def test_nothing_is_left_on_the_model(flow: InformationFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    del flow
    model: Any = tiny_model("gpt2", len(tiny_tokenizer()))
    before = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    information_flow(model, tiny_tokenizer(), PROMPT)
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(sums._BlockWatch, "hooks", _failing(sums._BlockWatch.hooks))
        information_flow(model, tiny_tokenizer(), PROMPT)
    assert before == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
