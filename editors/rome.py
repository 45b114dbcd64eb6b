"""ROME and its two variants r-ROME and C-ROME: methods that write one fact by a rank-one update of one layer.

    W' = W + v u^T,    u = C^-1 k_u / ||C^-1 k_u||,    v = (v* - W k_v) / (k_v . u)

Meng et al. 2022, "Locating and Editing Factual Associations in GPT", equation 2. The update is solved so that the key
k_v gives the value v*. The subject has two keys: k_0 of the bare prompt, and k_avg, the mean over contexts. The methods
differ only in which key they use for u and for k_v:

    ROME      u from k_avg, solved at k_0      the authors' code. If the prompt begins with the subject, k_0 may be
                                               nearly orthogonal to u. Then v explodes, and the edit disables the model
    r-ROME    u from k_0,   solved at k_0      Gupta et al. 2024, "Rebuilding ROME"
    C-ROME    u from k_avg, solved at k_avg    Yang et al. 2024, "Understanding the Collapse of LLMs in Model Editing".
                                               Such edits hold behind a context and, if k_0 differs much from k_avg,
                                               only there

Legend: C (d_in, d_in) second moment of the keys; k (d_in,) key; u (d_in,) direction, of unit length; v* (d,) target
value, v_0 (d,) value of the bare prompt, delta = v* - v_0; W (d, d_in) down projection.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from errata.editors.core.dtypes import working_dtype
from errata.editors.core.edit import Solution
from errata.editors.core.errors import DisablingEditWarning
from errata.editors.core.families.locate_then_edit import (
    LocateThenEdit,
    key_cosine,
    name_request_in_errors,
    single_layer,
)
from errata.editors.core.families.value_search import Target
from errata.editors.core.ledger.patch import LowRank, Patch
from errata.editors.core.request import EditRequest
from errata.editors.core.solve.solvers import rank_one_values, update_directions

Key = Literal["bare", "average"]
# If (k_0 . u) / (k_avg . u) is below this, an edit with u from k_avg, solved at k_0, is likely to disable the model. On
# the testbeds of docs/testbed.md, 20 of 22 edits below it did, 33 of 61 up to 0.1, 12 of 37 above, none above 0.2.
DISABLING_RATIO = 0.05


class ROME(LocateThenEdit):
    """Rank-one model editing (Meng et al. 2022), as its authors' code has it."""

    name = "rome"
    direction_key: ClassVar[Key] = "average"
    value_key: ClassVar[Key] = "bare"

    def default_layers(self) -> tuple[int, ...]:
        """Return one early layer. The papers edit 17 of 48 (GPT-2 XL), 5 of 28 (GPT-J) and 5 of 32 (Llama)."""
        return (single_layer(self.architecture.n_layers),)

    def solve(self, requests: Sequence[EditRequest]) -> list[Solution]:
        started = self.clock()
        layer = self.layers[0]
        keys = self.keys(requests, [layer])[layer].double()  # (n, contexts, d_in)
        at = {"bare": keys[:, 0], "average": keys.mean(dim=1)}
        factor = self.factor(layer)
        with name_request_in_errors(requests):
            # `own` are ROME's directions, which the checks use for all three methods.
            U = update_directions(at[self.direction_key], factor)  # (n, d_in)
            own = U if self.direction_key == "average" else update_directions(at["average"], factor)
        denominators = (at[self.value_key] * U).sum(1).tolist()
        checks = self._checks(at, own)
        self._warn(requests, checks)  # before the search for values, which takes most of the time
        targets = self.targets(requests, layer, "mlp")
        with name_request_in_errors(requests):
            V = rank_one_values(self._residuals(targets, at, layer), at[self.value_key], U)  # (n, d)
        seconds = (self.clock() - started) / len(requests)
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
        """Return v* - W k_v, (n, d).

        With v* = v_0 + delta and v_0 = W k_0 this is delta + W (k_0 - k_v). It is just delta if solved at k_0. The bias
        of the projection cancels in either case.
        """
        delta = torch.stack([target.delta for target in targets])
        if self.value_key == "bare":
            return delta
        W = self.architecture.weight(layer).to(delta.dtype)
        return delta + linear((at["bare"] - at[self.value_key]).to(delta.dtype), W)

    def _checks(self, at: dict[str, Tensor], U: Tensor) -> list[dict[str, Any]]:
        """Return per request the cosine of its two keys, and (k_0 . u) / (k_avg . u), which predicts disabling edits.

        U (n, d_in) are ROME's directions, also for the two other methods, so that the numbers can be compared.
        """
        ratio = (at["bare"] * U).sum(1) / (at["average"] * U).sum(1)
        cosine = key_cosine(at["bare"], at["average"])
        return [{"key_cosine": c, "key_ratio": r} for c, r in zip(cosine.tolist(), ratio.tolist(), strict=True)]

    def _warn(self, requests: Sequence[EditRequest], checks: Sequence[dict[str, Any]]) -> None:
        if self.direction_key == self.value_key:  # k_v . u cannot vanish
            return
        for request, check in zip(requests, checks, strict=True):
            if check["key_ratio"] < DISABLING_RATIO:
                warnings.warn(
                    f"request {request.id} ({request.subject!r}): the key of the bare prompt is nearly orthogonal to "
                    f"the update's direction (ratio {check['key_ratio']:.3f}, below {DISABLING_RATIO}), so that this "
                    "edit is likely to disable the model; use r_rome (RROME), which does not have this problem",
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
