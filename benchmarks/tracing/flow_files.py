"""An information flow as plain values, and its files: flow.json with every share, flow.png with the route."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from errata.benchmarks.runs.json_values import encodable
from errata.editors.core.files.atomic import write_atomically
from errata.editors.core.locating.flow_graph import edges_of, route, token_shares
from errata.editors.core.locating.information_flow import InformationFlow

NUMBERS, PICTURE = "flow.json", "flow.png"
_DIGITS = 7


def flow_record(flow: InformationFlow, token: int, threshold: float) -> dict[str, Any]:
    """Return a flow and the route to one token's last state as plain values.

    Args:
        flow: The flow.
        token: The token, counted from 0; negative: from the end.
        threshold: Edges up to this share are no part of the route.

    Returns:
        `route` lists (source, target, share), with nodes named as in flow_graph.py. `token_shares` says how much of
        the state comes from each token's embedding. `layers` has the shares of the token's own states per block:
        `attention` [key token][head], `attention_residual`, `mlp`, `mlp_residual`.
    """
    mixed = token_shares(flow, token)
    token = token % len(flow.tokens)
    edges = edges_of(flow.layers)
    found = route(edges, len(flow.layers), token, threshold)
    layers = [
        {
            "attention": _rounded(layer.attention[token, : token + 1].numpy()),
            "attention_residual": _rounded(layer.attention_residual[token].numpy()),
            "mlp": _rounded(layer.mlp[token].numpy()),
            "mlp_residual": _rounded(layer.mlp_residual[token].numpy()),
        }
        for layer in flow.layers
    ]
    return {
        "prompt": flow.prompt,
        "tokens": list(flow.tokens),
        "says": flow.says,
        "probability": flow.probability,
        "token": token,
        "threshold": threshold,
        "n_layers": len(flow.layers),
        "n_edges": len(edges),
        "route": [[str(edge.source), str(edge.target), float(f"{edge.weight:.{_DIGITS}g}")] for edge in found],
        "token_shares": _rounded(mixed.numpy()),
        "layers": layers,
    }


def write_flow(folder: Path, record: Mapping[str, Any], picture: bytes) -> None:
    """Write the record and the picture of a flow.

    Raises:
        OSError: The disk is full, or the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / NUMBERS, (json.dumps(encodable(record), allow_nan=False) + "\n").encode())
    write_atomically(folder / PICTURE, picture)


def _rounded(values: np.ndarray) -> Any:
    """Return an array as nested lists of numbers with a few significant digits."""
    if values.ndim == 0:
        return float(f"{float(values):.{_DIGITS}g}")
    return [_rounded(each) for each in values]
