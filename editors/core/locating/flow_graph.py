"""The flow of information as a graph, and the route that leads to one token's last state.

Nodes, per layer l and token t:

    X0_t    the embedding
    A{l}_t  the state behind the attention        M{l}_t  the MLP        I{l}_t  the block's output

Edges run upward in the model. I{l-1}_s -> A{l}_t has the shares of all heads that look from t at s, and where s = t the
residual's too. A{l}_t -> M{l}_t and M{l}_t -> I{l}_t have the MLP's share, and A{l}_t -> I{l}_t the residual's. Where
the MLP reads the block's input, beside the attention, its first edge comes from I{l-1}_t.

Source: Ferrando and Voita 2024; facebookresearch/llm-transparency-tool, routes/graph.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from errata.editors.core.locating.information_flow import InformationFlow, LayerShares, check_token


class Node(NamedTuple):
    """A state of the model: its kind (X, A, M or I), layer and token."""

    kind: str
    layer: int
    token: int

    def __str__(self) -> str:
        return f"{self.kind}{self.layer}_{self.token}"


class Edge(NamedTuple):
    """What flows from one state into another, as a share of the latter."""

    source: Node
    target: Node
    weight: float


def edges_of(layers: Sequence[LayerShares], *, ahead: bool = False) -> list[Edge]:
    """Return the edges of a flow, lowest layer first.

    Args:
        layers: The shares.
        ahead: Also edges from later tokens, which no token sees; the original has them, with the floor as weight.
    """
    return [edge for layer, found in enumerate(layers) for edge in _edges(layer, found, ahead)]


def _edges(layer: int, found: LayerShares, ahead: bool) -> Iterator[Edge]:
    sources = found.attention.sum(-1) + torch.diag(found.attention_residual)
    tokens = range(len(found.mlp))
    below = [Node("X", 0, token) if layer == 0 else Node("I", layer - 1, token) for token in tokens]
    for token, row in enumerate(sources.tolist()):
        for source in tokens if ahead else range(token + 1):
            yield Edge(below[source], Node("A", layer, token), row[source])
    for token in tokens:
        middle, mlp, above = (Node(kind, layer, token) for kind in "AMI")
        yield Edge(middle if found.reads_middle else below[token], mlp, float(found.mlp[token]))
        yield Edge(mlp, above, float(found.mlp[token]))
        yield Edge(middle, above, float(found.mlp_residual[token]))


def route(edges: Sequence[Edge], n_layers: int, token: int, threshold: float = 0.0) -> list[Edge]:
    """Return the edges with more than `threshold` that lead to a token's last state, in the order of `edges`.

    Args:
        edges: The edges of a flow.
        n_layers: Blocks of the model.
        token: The token, counted from 0.
        threshold: The smallest share that an edge must exceed.
    """
    into: dict[Node, list[Edge]] = {}
    for edge in edges:
        if edge.weight > threshold:
            into.setdefault(edge.target, []).append(edge)
    reached, waiting = set[Node](), [Node("I", n_layers - 1, token)]
    while waiting:
        node = waiting.pop()
        if node not in reached:
            reached.add(node)
            waiting += [edge.source for edge in into.get(node, [])]
    return [edge for edge in edges if edge.weight > threshold and edge.target in reached]


def token_shares(flow: InformationFlow, token: int) -> Tensor:
    """Return how much of a token's last state comes from each token's embedding, (T,): shares, multiplied up.

    What an MLP adds counts as coming from the token where it stands. This is the rollout of Abnar and Zuidema 2020,
    with these shares in the place of attention weights, as in Ferrando et al. 2022 (ALTI).

    Raises:
        ConfigError: there is no such token.
    """
    check_token(token, len(flow.tokens))
    row = torch.zeros(len(flow.tokens), dtype=torch.float64)
    row[token] = 1
    for layer in reversed(flow.layers):
        # (T, S); edges from later tokens are the floor alone.
        sources = (layer.attention.sum(-1) + torch.diag(layer.attention_residual)).tril()
        row = row @ (sources / sources.sum(-1, keepdim=True).clamp_min(1e-12))
    return row
