"""NAS: every value that an edit writes is given one norm, that of the values of facts on the untouched model.

    v* = v_0 + delta,    v* <- a v* / ||v*||

v_0 is what the MLP gives at the edited token of the bare prompt. (Liu et al. 2026, "Norm Anchoring", arXiv 2602.02543;
SasyaTitech/NAS, util/vstar_stats.py and compute_z.py.) a is the mean of ||v*|| over facts, each searched for with the
bare prompt alone, once the 5 % with the longest are left out.

The authors' code differs from the paper where ||v*|| > 2 a: it writes v_0, so that the edit is not made and nothing
says so. `nas_beyond` chooses. Their facts are 1,000 records of a dataset, and those of one batch of 16 share one loss
and one end of the search. Here every search has its own end, and the facts are the caller's.

Legend: n requests; v_0, v*, delta (d,); a the anchor; gain what the block multiplies its MLP's output by.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from errata.editors.core.errors import ConfigError, NumericalError, RequestError
from errata.editors.core.families.value_search import Target
from errata.editors.core.request import EditRequest

Beyond = Literal["refuse", "scale", "drop"]
# A value longer than this many anchors is not written by the authors' code.
FAR = 2.0
# Share of the longest values that the anchor leaves out.
LONGEST = 0.05
# Added to a norm in the authors' code.
_EPSILON = 1e-10


def anchored(target: Target, outputs: Tensor, gain: float, anchor: float, beyond: Beyond, name: str | None) -> Target:
    """Return the target whose value at the MLP's output has the norm `anchor`.

    Args:
        target: What the search has found.
        outputs: (d,) v_0, the MLP's output.
        gain: 1 where the search was at the MLP's output itself.
        anchor: a.
        beyond: What to do with a value longer than 2 a.
        name: The request, for an error.

    Raises:
        NumericalError: The value is longer than 2 a, and is to be refused.
    """
    v0 = outputs.to(target.delta)
    value = v0 + target.delta / gain
    norm = float(value.norm())
    if norm > FAR * anchor and beyond == "refuse":
        raise NumericalError(
            f"the value found has norm {norm:.3g}, more than {FAR:g} times the anchor {anchor:.3g}; raise nas, or set "
            "nas_beyond=scale",
            record=name,
        )
    is_dropped = norm > FAR * anchor and beyond == "drop"
    wanted = v0 if is_dropped else anchor * value / (norm + _EPSILON)
    return replace(target, delta=gain * (wanted - v0), found_norm=norm, anchor=anchor, is_dropped=is_dropped)


def value_norms(targets: Sequence[Target], outputs: Tensor, gain: float) -> Tensor:
    """Return ||v*|| (n,) of targets, given v_0 (n, d)."""
    deltas = torch.stack([target.delta for target in targets])
    return (outputs.to(deltas) + deltas / gain).norm(dim=1).double()


def anchor_of(norms: Tensor) -> float:
    """Return the mean of norms (n,) without the longest 5 %, rounded down to a count."""
    kept = len(norms) - int(LONGEST * len(norms))
    return float(norms.sort().values[:kept].mean())


def read_facts(path: str | Path) -> list[EditRequest]:
    """Read facts whose values give the anchor.

    Raises:
        ConfigError: The file is no JSON list of {"prompt", "subject", "target"}, or an empty one.
    """
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8"))
        facts = [EditRequest(**record) for record in records]
    except (OSError, ValueError, TypeError, RequestError) as error:
        raise ConfigError(
            f'nas_facts: expected a file with a JSON list of {{"prompt", "subject", "target"}}, got {path}: {error}'
        ) from error
    if not facts:
        raise ConfigError(f"nas_facts: {path} has no facts; expected at least one")
    return facts
