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

A prompt's first token is a special case. Models without a token that begins a text use it as an attention sink: early
blocks blow its hidden state up, always in the same direction, and later tokens attend to it without reading anything
(Xiao et al. 2024, "Efficient Streaming Language Models with Attention Sinks"; Sun et al. 2024, "Massive Activations").
From then on every first token has nearly the same key, and no value added to its huge state reaches the answer. An edit
there has three ways to fail. ROME's v explodes and changes the first token of every text. r-ROME's stays small, and
nothing is written. A longer delta is written, but into the first token of every prompt. The sign is a small key ratio,
(k_0 . u) / (k_avg . u). `weak_key=earlier_layer` edits such a subject below the block where its state blows up: its key
there is still its own. On SmolLM2-135M-Instruct (n = 8 facts of CounterFact), r-ROME wrote 12 % of them token by
token at layer 5 in 15 steps, 62 % at layer 0 in as many, and all of them in 25 (docs/which-method.md).

Legend: C (d_in, d_in) second moment of the keys; k (d_in,) key; u (d_in,) direction, of unit length; v* (d,) target
value, v_0 (d,) value of the bare prompt, delta = v* - v_0; W (d, d_in) down projection.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from errata.editors.core.dtypes import working_dtype
from errata.editors.core.edit import Solution
from errata.editors.core.errors import DisablingEditWarning, RequestError
from errata.editors.core.families.layer_choice import single_layer
from errata.editors.core.families.locate_config import LocateThenEditConfig
from errata.editors.core.families.locate_then_edit import LocateThenEdit, name_request_in_errors
from errata.editors.core.families.value_search import Target
from errata.editors.core.forward.state_norms import last_state_norms
from errata.editors.core.ledger.patch import LowRank, Patch
from errata.editors.core.request import EditRequest
from errata.editors.core.solve.solvers import rank_one_values, update_directions

Key = Literal["bare", "average"]
# If (k_0 . u) / (k_avg . u) is below this, an edit with u from k_avg, solved at k_0, is likely to disable the model. On
# the testbeds of docs/testbed.md, 20 of 22 edits below it did, 33 of 61 up to 0.1, 12 of 37 above, none above 0.2.
DISABLING_RATIO = 0.05
# Below this the key is weak, see ROMEConfig.weak_key. On SmolLM2-135M-Instruct (layer 5, CounterFact), all 41 subjects
# of one token that stand first were below 0.05, and of 40 of two tokens that stand first 4 were below 0.1.
WEAK_RATIO = 0.1
# A token is an attention sink where its hidden state is this many times as long as behind a context. In the same model
# it was at most 1.3 times as long for 30 random subjects, and 7 to 11 times for 41 subjects that are sinks.
SINK_GROWTH = 2.0


@dataclass(frozen=True, kw_only=True)
class ROMEConfig(LocateThenEditConfig):
    """ROME's fields."""

    ADDED = MappingProxyType({**LocateThenEditConfig.ADDED, "weak_key": "earlier_layer"})

    weak_key: Literal["edit", "earlier_layer", "refuse"] = "earlier_layer"
    """What to do where (k_0 . u) / (k_avg . u) is below 0.1, as at a prompt's first token that is an attention sink:
    "edit" the layer still, as the authors' code does; edit the "earlier_layer", the last one before the sink forms; or
    "refuse"."""


@dataclass(frozen=True)
class _Keys:
    """The keys of some requests at one layer, and what follows from them.

    Attributes:
        layer: The layer.
        at: The bare and the average keys, each (n, d_in).
        directions: (n, d_in) the unit directions of the updates.
        checks: Per request, what its report says of its keys.
    """

    layer: int
    at: dict[Key, Tensor]
    directions: Tensor
    checks: list[dict[str, Any]]

    def select(self, indices: Sequence[int]) -> _Keys:
        at: dict[Key, Tensor] = {name: keys[list(indices)] for name, keys in self.at.items()}
        return _Keys(self.layer, at, self.directions[list(indices)], [self.checks[i] for i in indices])


# Indices of requests, and their keys at the layer to edit.
_Group = tuple[list[int], _Keys]


class ROME(LocateThenEdit):
    """Rank-one model editing (Meng et al. 2022), as its authors' code has it."""

    name = "rome"
    Config = ROMEConfig
    config: ROMEConfig
    direction_key: ClassVar[Key] = "average"
    value_key: ClassVar[Key] = "bare"
    clamp: ClassVar[float] = 2.0

    def rules(self) -> dict[str, Any]:
        """Return the values of null fields.

        The clamp is 2 ||v_0|| for ROME and r-ROME, where the authors' code has 4. On SmolLM2-135M-Instruct (n = 8
        facts of CounterFact, ROME at layer 5), 4 and 2 both wrote every fact, and 2 moved the answers about neighbours
        less than half as far: 0.15 against 0.38 nats. 1 wrote 62 % of the facts token by token. C-ROME keeps 4.
        """
        return {"clamp_norm_factor": 4.0 if self.config.as_published else self.clamp}

    def default_layers(self) -> tuple[int, ...]:
        """Return one early layer. The papers edit 17 of 48 (GPT-2 XL), 5 of 28 (GPT-J) and 5 of 32 (Llama)."""
        return (single_layer(self.architecture.n_layers),)

    def solve(self, requests: Sequence[EditRequest]) -> list[Solution]:
        started = self.clock()
        groups = self._by_layer(requests)
        self._warn(requests, groups)  # before the search for values, which takes most of the time
        found: dict[int, Solution] = {}
        for indices, keys in groups:
            some = [requests[i] for i in indices]
            found |= zip(indices, self._solve_at(some, keys), strict=True)
        seconds = (self.clock() - started) / len(requests)
        for solution in found.values():
            solution.diagnostics[0]["seconds"] = seconds
        return [found[i] for i in range(len(requests))]

    def _solve_at(self, requests: Sequence[EditRequest], keys: _Keys) -> list[Solution]:
        """Solve requests at the layer that their keys are of."""
        solved_at, U = keys.at[self.value_key], keys.directions
        denominators = (solved_at * U).sum(1).tolist()
        targets = self.targets(requests, keys.layer, "mlp")
        with name_request_in_errors(requests):
            V = rank_one_values(self._residuals(targets, keys), solved_at, U)  # (n, d)
        return [
            self._solution(
                request,
                keys.layer,
                U[i],
                V[i],
                {**keys.checks[i], "denominator": denominators[i], **targets[i].report()},
            )
            for i, request in enumerate(requests)
        ]

    def _read_keys(self, requests: Sequence[EditRequest], layer: int) -> _Keys:
        keys = self.keys(requests, [layer])[layer].double()  # (n, contexts, d_in)
        at: dict[Key, Tensor] = {"bare": keys[:, 0], "average": keys.mean(dim=1)}
        factor = self.factor(layer)
        with name_request_in_errors(requests):
            # `own` are ROME's directions, which the checks use for all three methods.
            U = update_directions(at[self.direction_key], factor)  # (n, d_in)
            own = U if self.direction_key == "average" else update_directions(at["average"], factor)
        return _Keys(layer, at, U, self._checks(at, own))

    # --- weak keys --------------------------------------------------------------------------------------------------

    def _by_layer(self, requests: Sequence[EditRequest]) -> list[_Group]:
        """Return the keys of all requests, grouped by the layer to edit, with the indices of each group's requests."""
        keys = self._read_keys(requests, self.layers[0])
        weak = [i for i, check in enumerate(keys.checks) if check["key_ratio"] < WEAK_RATIO]
        if weak and self.config.weak_key == "refuse":
            raise self._refusal(requests[weak[0]], keys.checks[weak[0]])
        moved = self._moved(requests, keys, weak) if self.config.weak_key == "earlier_layer" else []
        gone = {i for indices, _ in moved for i in indices}
        stay = [i for i in range(len(requests)) if i not in gone]
        return [*([(stay, keys.select(stay))] if stay else []), *moved]

    def _moved(
        self, requests: Sequence[EditRequest], keys: _Keys, weak: Sequence[int]
    ) -> list[tuple[list[int], _Keys]]:
        """Return the weak requests that have a better key at a layer below the one that makes their token a sink."""
        by_layer: dict[int, list[int]] = defaultdict(list)
        for i in weak:
            layer = self._sink_layer(requests[i])
            if layer is not None and self.has_moment(layer):
                by_layer[layer].append(i)
        found = []
        for layer, indices in sorted(by_layer.items()):
            there = self._read_keys([requests[i] for i in indices], layer)
            better = [n for n, check in enumerate(there.checks) if check["key_ratio"] >= WEAK_RATIO]
            for n in better:
                there.checks[n]["weak_ratio"] = keys.checks[indices[n]]["key_ratio"]
            if better:
                found.append(([indices[n] for n in better], there.select(better)))
        return found

    def _sink_layer(self, request: EditRequest) -> int | None:
        """Return the last layer before the request's token becomes an attention sink; None if it does not.

        It becomes one in the first block that gives it a far longer hidden state than behind the contexts. If that is
        block 0, its own layer is returned, as its key is read before the state blows up.
        """
        if self.layers[0] == 0 or len(self.prefixes) == 1:
            return None
        located = [self.locate(request, prefix) for prefix in self.prefixes]
        rows = [subject.ids[: subject.last + 1] for subject in located]
        norms = last_state_norms(
            self.architecture, rows, self.layers[0], pad=self.pad, batch_tokens=self.config.batch_tokens
        )
        grown = (norms[0] > SINK_GROWTH * norms[1:].median(dim=0).values).nonzero().flatten().tolist()
        below = [layer for layer in range(max(1, grown[0])) if self.architecture.down_paths[layer]] if grown else []
        return below[-1] if below else None

    def _refusal(self, request: EditRequest, check: dict[str, Any]) -> RequestError:
        return RequestError(
            f"the key of the bare prompt is weak (ratio {check['key_ratio']:.3f}, below {WEAK_RATIO}), so that an edit "
            f"of layer {self.layers[0]} would not hold or do damage, which weak_key=refuse forbids; put words before "
            "the subject, or set weak_key=earlier_layer",
            record=request.id,
            field="subject",
        )

    def _residuals(self, targets: Sequence[Target], keys: _Keys) -> Tensor:
        """Return v* - W k_v, (n, d).

        With v* = v_0 + delta and v_0 = W k_0 this is delta + W (k_0 - k_v). It is just delta if solved at k_0. The bias
        of the projection cancels in either case.
        """
        delta = torch.stack([target.delta for target in targets])
        if self.value_key == "bare":
            return delta
        W = self.architecture.weight(keys.layer).to(delta.dtype)
        return delta + linear((keys.at["bare"] - keys.at[self.value_key]).to(delta.dtype), W)

    def _checks(self, at: dict[Key, Tensor], U: Tensor) -> list[dict[str, Any]]:
        """Return per request the cosine of its two keys, and (k_0 . u) / (k_avg . u), which predicts disabling edits.

        U (n, d_in) are ROME's directions, also for the two other methods, so that the numbers can be compared.
        """
        ratio = (at["bare"] * U).sum(1) / (at["average"] * U).sum(1)
        cosine = _key_cosine(at["bare"], at["average"])
        return [{"key_cosine": c, "key_ratio": r} for c, r in zip(cosine.tolist(), ratio.tolist(), strict=True)]

    def _warn(self, requests: Sequence[EditRequest], groups: Sequence[_Group]) -> None:
        if self.direction_key == self.value_key:  # k_v . u cannot vanish
            return
        advice = "use r_rome (RROME), which does not have this problem"
        if self.config.weak_key == "edit" and self.layers[0] > 0:
            advice = "set weak_key=earlier_layer"
        for indices, keys in groups:
            for i, check in zip(indices, keys.checks, strict=True):
                if check["key_ratio"] < DISABLING_RATIO:
                    warnings.warn(
                        f"request {requests[i].id} ({requests[i].subject!r}): the key of the bare prompt is nearly "
                        f"orthogonal to the update's direction (ratio {check['key_ratio']:.3f}, below "
                        f"{DISABLING_RATIO}), so that this edit is likely to disable the model; {advice}",
                        DisablingEditWarning,
                        stacklevel=4,
                    )

    def _solution(self, request: EditRequest, layer: int, u: Tensor, v: Tensor, report: dict[str, Any]) -> Solution:
        dtype = working_dtype(self.architecture.dtype)
        update = LowRank(v[:, None].to(dtype), u[None, :].to(dtype))
        patch = self.braked(Patch({self.architecture.weight_name(layer): update}))
        return Solution((request,), patch, ({"layer": layer, **report},))


class RROME(ROME):
    """r-ROME (Gupta et al. 2024): the bare key everywhere."""

    name = "r_rome"
    direction_key = "bare"


class CROME(ROME):
    """C-ROME (Yang et al. 2024): the averaged key everywhere."""

    name = "c_rome"
    value_key = "average"
    clamp = 4.0


def _key_cosine(first: Tensor, second: Tensor) -> Tensor:
    """Return the cosines (n,) of two sets of keys (n, d_in), as float64."""
    return torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=-1)
