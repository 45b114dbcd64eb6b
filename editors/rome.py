"""ROME and its two repairs: one fact, one layer, one update of rank one.

    W' = W + v u^T,    u = C^-1 k_u / ||C^-1 k_u||,    v = (v* - W k_v) / (k_v . u)

Meng et al. 2022, "Locating and Editing Factual Associations in GPT", equation 2; the update is solved so that the key
k_v reads the value v*. Two keys of the subject are at hand: k_0, of the bare prompt, and k_avg, the mean over contexts.
The methods differ in nothing but which of them goes where:

    ROME      u from k_avg, solved at k_0      the authors' code. Where the subject stands first in the prompt, k_0 can
                                               be nearly orthogonal to u: v explodes and the edit disables the model
    r-ROME    u from k_0,   solved at k_0      Gupta et al. 2024, "Rebuilding ROME"
    C-ROME    u from k_avg, solved at k_avg    Yang et al. 2024, "Understanding the Collapse of LLMs in Model Editing";
                                               such edits hold behind a context and, where k_0 is unlike k_avg, only
                                               there

Legend: C (d_in, d_in) second moment of the keys; k (d_in,) key; u (d_in,) direction, of unit length; v* (d,) value
wanted, v_0 (d,) value of the bare prompt, delta = v* - v_0; W (d, d_in) down projection.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from errata.editors.core.dtypes import working_dtype
from errata.editors.core.edit import Solution
from errata.editors.core.errors import DisablingEditWarning
from errata.editors.core.families.locate_then_edit import LocateThenEdit, key_cosine, naming, single_layer
from errata.editors.core.families.value_search import Target
from errata.editors.core.ledger.patch import LowRank, Patch
from errata.editors.core.request import EditRequest
from errata.editors.core.solve.solvers import rank_one_values, update_directions

Key = Literal["bare", "average"]
# (k_0 . u) / (k_avg . u) below which an edit solved at k_0 with u from k_avg is likely to disable the model: on the
# testbeds of docs/testbed.md 20 of 22 edits below it did, 33 of 61 up to 0.1, 12 of 37 above, none above 0.2.
DISABLING_RATIO = 0.05


class ROME(LocateThenEdit):
    """Rank-one model editing (Meng et al. 2022), as its authors' code has it."""

    name = "rome"
    direction_key: ClassVar[Key] = "average"
    value_key: ClassVar[Key] = "bare"

    def default_layers(self) -> tuple[int, ...]:
        """One early layer: the papers edit 17 of 48 (GPT-2 XL), 5 of 28 (GPT-J) and 5 of 32 (Llama)."""
        return (single_layer(self.architecture.n_layers),)

    def solve(self, requests: Sequence[EditRequest]) -> list[Solution]:
        started = time.perf_counter()
        layer = self.layers[0]
        keys = self.keys(requests, [layer])[layer].double()  # (n, contexts, d_in)
        at = {"bare": keys[:, 0], "average": keys.mean(dim=1)}
        factor = self.factor(layer)
        with naming(requests):
            U = update_directions(at[self.direction_key], factor)  # (n, d_in)
            own = U if self.direction_key == "average" else update_directions(at["average"], factor)
        denominators = (at[self.value_key] * U).sum(1).tolist()
        checks = self._checks(at, own)
        self._warn(requests, checks)
        targets = self.targets(requests, layer, "mlp")
        with naming(requests):
            V = rank_one_values(self._residuals(targets, at, layer), at[self.value_key], U)  # (n, d)
        seconds = (time.perf_counter() - started) / len(requests)
        return [
            self._solution(
                request,
                layer,
                U[i],
                V[i],
                {**checks[i], "denominator": denominators[i], **targets[i].report(), "seconds": seconds},
            )
            for i, request in enumerate(requests)
        ]

    def _residuals(self, targets: Sequence[Target], at: dict[str, Tensor], layer: int) -> Tensor:
        """v* - W k_v (n, d). With v* = v_0 + delta and v_0 = W k_0 this is delta + W (k_0 - k_v): delta where solved at
        k_0, and free of the projection's bias in either case."""
        delta = torch.stack([target.delta for target in targets])
        if self.value_key == "bare":
            return delta
        W = self.architecture.weight(layer).to(delta.dtype)
        return delta + linear((at["bare"] - at[self.value_key]).to(delta.dtype), W)

    def _checks(self, at: dict[str, Tensor], U: Tensor) -> list[dict[str, Any]]:
        """Cosine of the two keys, and (k_0 . u) / (k_avg . u) with ROME's own u: what foretells a disabling edit."""
        ratio = (at["bare"] * U).sum(1) / (at["average"] * U).sum(1)
        cosine = key_cosine(at["bare"], at["average"])
        return [{"key_cosine": c, "key_ratio": r} for c, r in zip(cosine.tolist(), ratio.tolist(), strict=True)]

    def _warn(self, requests: Sequence[EditRequest], checks: Sequence[dict[str, Any]]) -> None:
        if self.direction_key == self.value_key:
            return
        for request, check in zip(requests, checks, strict=True):
            if check["key_ratio"] < DISABLING_RATIO:
                warnings.warn(
                    f"request {request.id} ({request.subject!r}): the key of the bare prompt is nearly orthogonal to "
                    f"the update's direction (ratio {check['key_ratio']:.3f}, below {DISABLING_RATIO}), so that this "
                    "edit is likely to disable the model; use r_rome (RROME), which does not have this fault",
                    DisablingEditWarning,
                    stacklevel=4,
                )

    def _solution(self, request: EditRequest, layer: int, u: Tensor, v: Tensor, report: dict[str, Any]) -> Solution:
        dtype = working_dtype(self.architecture.dtype)
        update = LowRank(v[:, None].to(dtype), u[None, :].to(dtype))
        return Solution(
            (request,), Patch({self.architecture.weight_name(layer): update}), ({"layer": layer, **report},)
        )


class RROME(ROME):
    """r-ROME (Gupta et al. 2024): the bare key everywhere."""

    name = "r_rome"
    direction_key = "bare"


class CROME(ROME):
    """C-ROME (Yang et al. 2024): the averaged key everywhere."""

    name = "c_rome"
    value_key = "average"
