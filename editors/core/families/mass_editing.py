"""Base class of methods that write many facts at once over several layers: MEMIT, EMMET and AlphaEdit.

The target value of each request is found at the output of the last edited layer. Then each layer, from the lowest to
the highest, is solved for its share of the remaining distance to that value:

    R_l = (Z - H) / (layers left),    W_l' = W_l + R_l A_l^T,    A_l from the layer's keys K_l by the method's solve

Keys K_l and values H are read with the updates of the lower layers in place. (Meng et al. 2023, "Mass-Editing Memory in
a Transformer", section 4.3 and algorithm 1.)

This holds where a block adds what its MLP gives to the residual stream, perhaps times a factor, which divides R_l.
Where a norm stands between the two (Gemma 2 and 3, OLMo 2), the MLP cannot give a difference of the residual stream.
There each layer has its own value. All are searched together where they are written, at the outputs of the down
projections, and R_l is what the search has found for layer l (write_goals.py).

An edit is made in three steps: the value says what is to be written (`_goal`), the system along which keys (`adjoint`),
and `_write` puts both into updates, layer by layer.

Legend: n requests; K (d_in, n) keys; Z (d, n) target values; H (d, n) present values; R (d, n) residuals; A (d_in, n).
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor

from errata.editors.core.brakes.past_keys import Past, PastKeys
from errata.editors.core.brakes.past_values import Drift, EarlierEdit, PastValues, pull
from errata.editors.core.config import check_positive
from errata.editors.core.dtypes import working_dtype
from errata.editors.core.edit import Solution
from errata.editors.core.errors import ArchitectureError, ConfigError, SharedKeyWarning
from errata.editors.core.families import context_templates
from errata.editors.core.families.layer_choice import spread_layers
from errata.editors.core.families.locate_config import LocateThenEditConfig
from errata.editors.core.families.locate_then_edit import OTHER_TEXT, LocateThenEdit, name_request_in_errors
from errata.editors.core.families.value_search import Target
from errata.editors.core.families.write_goals import Goal, HiddenGoal, OutputGoal
from errata.editors.core.forward.layerwise import LayerWalk
from errata.editors.core.forward.whole_rows import blocks_chain
from errata.editors.core.ledger.adapter_hooks import reads_layout
from errata.editors.core.ledger.interrupts import safe_point
from errata.editors.core.ledger.patch import LowRank, Patch
from errata.editors.core.request import EditRequest
from errata.editors.core.solve.solvers import check_keys


@dataclass(frozen=True, kw_only=True)
class MassEditingConfig(LocateThenEditConfig):
    """Fields shared by the methods that write many facts at once. Defaults are MEMIT's for GPT-2 XL."""

    ADDED = MappingProxyType({**LocateThenEditConfig.ADDED, "past_keys": None, "past_values": False, "lyaplock": None})

    context_template_length_params: tuple[tuple[int, int], ...] = ((10, 5),)
    """(length in tokens, how many) of the contexts that the model writes."""

    past_keys: bool | None = None
    """Whether an edit leaves the keys of earlier edits on the model alone. The keys are kept with each edit. null: as
    the method has it, true for AlphaEdit and false for the others."""

    past_values: bool = False
    """Whether an edit also writes the values of earlier edits again, so that a sequence stays the one-shot edit of all
    its requests, also after an undo. Edits keep their values for it. It takes past keys."""

    lyaplock: float | None = None
    """LyapLock's alpha: from how many times the first edit's loss on other keys on these weigh more, and drift is
    pulled back (60 in its file); null: neither. It takes past keys."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("lyaplock",))
        if self.past_keys is False and self.writes_back:
            raise ConfigError("past_keys: expected null or true, got false; past_values and lyaplock need past keys")
        if not self.mom2_adjustment:
            raise ConfigError(
                "mom2_adjustment: expected true, got false; this method is defined only with second moments"
            )

    @property
    def writes_back(self) -> bool:
        """Whether an edit writes more than its own values."""
        return self.past_values or self.lyaplock is not None


class MassEditor(LocateThenEdit):
    """Base class of the family. A method writes `adjoint`, and `state` if its later edits need data of earlier ones."""

    Config: ClassVar[type[MassEditingConfig]] = MassEditingConfig
    config: MassEditingConfig
    context_starts = context_templates.WORDS
    text_advice = OTHER_TEXT
    singular_advice = "give more text"
    # Whether edits keep their keys, and leave those of earlier edits alone, if `past_keys` is null.
    remembers_keys: ClassVar[bool] = False
    # Where the goal's hidden states are: behind the last edited block, or at the output of its down projection.
    written_at: ClassVar[Literal["block", "mlp"]] = "block"

    def setup(self) -> None:
        if reads_layout(self.architecture.model):
            raise ArchitectureError(
                f"the model carries an edit of behaviour that acts at some positions of a row, and {self.name} runs "
                "blocks by themselves; undo that edit, apply this one, and apply that edit again"
            )
        if not blocks_chain(self.architecture):
            raise ArchitectureError(
                f"the blocks {self.architecture.blocks_path} of this model do not hand over one hidden state and "
                f"nothing else, which {self.name} spreads an edit over; edit one layer (rome, ft_m), or use grace"
            )
        super().setup()
        self.past = PastKeys()
        self.past_values = PastValues(self.config.lyaplock)

    def default_layers(self) -> tuple[int, ...]:
        """Return the layers to edit if the configuration names none, also behind norms: `spread_layers`.

        On the development facts of the testbed's model of Gemma 3's shape (n = 16), MEMIT's reliability,
        generalization and locality were 100, 100 and 89 % with layers 0 to 2, and 94, 91 and 89 % with layer 0 alone.
        """
        return spread_layers(self.architecture.n_layers)

    def rules(self) -> dict[str, Any]:
        """Return the values of null fields.

        The clamp is 0.75 ||v_0||, as in the authors' code for all their models: v_0 is the residual stream. Behind a
        norm v_0 is what one MLP gives, and the clamp is ROME's first one, 4 ||v_0||. A joint search hardly reaches it:
        on the testbed's model of Gemma 3's shape 0.75 gave the same scores.
        """
        return {"clamp_norm_factor": 0.75 if self.gains else 4.0}

    @cached_property
    def gains(self) -> tuple[float, ...] | None:
        """What the block of each edited layer multiplies its MLP's output by; None if one has no such factor."""
        found = self.gains_at(self.layers)
        return None if None in found else tuple(gain for gain in found if gain is not None)

    @abstractmethod
    def adjoint(self, layer: int, K: Tensor) -> Tensor:
        """Return A (d_in, n) for the keys K (d_in, n), both float64; the layer's update is R A^T."""

    @property
    def remembers(self) -> bool:
        """Whether edits keep their keys, and leave those of earlier edits alone."""
        return (self.remembers_keys if self.config.past_keys is None else self.config.past_keys) or (
            self.config.writes_back
        )

    def state(self, keys: dict[int, Tensor]) -> dict[str, Tensor]:
        """Return tensors to keep in the ledger with an edit, given its keys {layer: (d_in, n)}."""
        dtype = working_dtype(self.architecture.dtype)
        return {_state_name(layer): K.to(dtype) for layer, K in keys.items()} if self.remembers else {}

    def past_adjoint(self, layer: int, K: Tensor, strength: float) -> Tensor:  # noqa: ARG002
        """Return B = (q P + K K^T)^-1 K, (d_in, N) in float64, for the keys K (d_in, N) of earlier edits.

        Args:
            layer: The layer.
            K: The keys.
            strength: q, which weighs what protects other keys.

        Raises:
            ConfigError: The method cannot write earlier values again.
        """
        raise ConfigError(f"past_values, lyaplock: {self.name} does not say what protects other keys")

    def within(self, layer: int, D: Tensor) -> Tensor:  # noqa: ARG002
        """Return the part of a change D (d_out, d_in) that lies where the method edits: here all of it."""
        return D

    def strength(self, layer: int) -> float:
        """Return q, LyapLock's weight of what protects other keys; 1 without it."""
        return 1.0 if self.config.lyaplock is None else self._drift(layer).strength

    def _drift(self, layer: int) -> Drift:
        """Return what the edits of this method on the model have made of a layer."""
        name, values, weight = _state_name(layer), _values_name(layer), self.architecture.weight_name(layer)
        device = self.architecture.weight(layer).device
        edits = [
            EarlierEdit(
                entry.id,
                entry.patch.updates[weight],
                entry.state[name].to(device),
                entry.state[values].to(device) if self.config.past_values else None,
            )
            for entry in self.ledger.entries
            if entry.info.method == self.name
            and name in entry.state
            and (values in entry.state or not self.config.past_values)
        ]
        return self.past_values.drift(layer, edits, lambda: self.moment(layer))

    def _pull(self, layer: int) -> LowRank | None:
        """Return what brings the values of earlier edits back; None where there is nothing to bring back."""
        if not self.config.writes_back:
            return None
        drift = self._drift(layer)
        if drift.D is None:
            return None
        adjoint = self.past_adjoint(layer, torch.cat(drift.keys, dim=1), drift.strength)
        return pull(drift, self.within(layer, drift.D), adjoint, working_dtype(self.architecture.dtype))

    def joined_state(self, solutions: Sequence[Solution]) -> dict[str, Tensor]:
        """Return the keys of all solutions side by side: later edits must leave each of them alone."""
        names = dict.fromkeys(name for solution in solutions for name in solution.state)
        return {name: torch.cat([solution.state[name] for solution in solutions], dim=1) for name in names}

    def _past_keys(self, layer: int) -> Past:
        """Return (id, K (d_in, n)) for every edit of this method that the model carries now; none if none count."""
        name = _state_name(layer)
        entries = [e for e in self.ledger.entries if e.info.method == self.name and name in e.state]
        return [(entry.id, entry.state[name]) for entry in entries] if self.remembers else []

    def solve(self, requests: Sequence[EditRequest]) -> list[Solution]:
        """Solve each request as a separate edit. Only the search for values runs for all requests together."""
        started = self.clock()
        targets = self._searched(requests)
        share = (self.clock() - started) / len(requests)
        return [self._distribute([r], [t], share) for r, t in zip(requests, targets, strict=True)]

    def solve_batch(self, requests: Sequence[EditRequest]) -> Solution:
        started = self.clock()
        shared = self._shared_keys(requests)
        self._warn(requests, shared)  # before the search for values, which takes most of the time
        targets = self._searched(requests)
        solution = self._distribute(requests, targets, (self.clock() - started) / len(requests))
        for report, others in zip(solution.diagnostics, shared, strict=True):
            if others:
                report["shared_key"] = len(others) + 1
        return solution

    def _searched(self, requests: Sequence[EditRequest]) -> list[Target]:
        """Search for the values: behind the last layer; if a norm stands between, where each layer writes its own."""
        if self.gains:
            return self.targets(requests, self.layers[-1], "block")
        return self.targets(requests, self.layers, "mlp")

    def _goal(self, targets: Sequence[Target]) -> Goal:
        """Return what is to be written, for all requests together."""
        if self.gains is None:
            return OutputGoal(rearrange([target.delta.double() for target in targets], "n l d -> l d n"))
        Z = torch.stack([target.initial + target.delta for target in targets]).double().T  # (d, n)
        return HiddenGoal(Z, self.gains)

    def _shared_keys(self, requests: Sequence[EditRequest]) -> list[list[str | None]]:
        """Return for each request the ids of the others with the same key, because they read the same tokens up to it.

        One key has one value. The solves write a mean of the values that such requests want, which meets none of them.
        No solve can do better, since the values are given. One value that serves all these requests would have to be
        searched for with all their prompts at once. The papers define no such search, so the requests are named.
        """
        groups: dict[tuple[tuple[int, ...], ...], list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            located = [self.locate(request, prefix) for prefix in self.prefixes]
            groups[tuple(tuple(subject.ids[: subject.last + 1]) for subject in located)].append(index)
        shared: list[list[str | None]] = [[] for _ in requests]
        for members in groups.values():
            for index in members:
                shared[index] = [requests[other].id for other in members if other != index]
        return shared

    def _warn(self, requests: Sequence[EditRequest], shared: Sequence[Sequence[str | None]]) -> None:
        for request, others in zip(requests, shared, strict=True):
            if others:
                more = f" and {len(others) - 1} more" if len(others) > 1 else ""
                warnings.warn(
                    f"request {request.id} ({request.text!r}) has the same key as request {others[0]}{more} of this "
                    "batch, because nothing but the subject is read before it, so that their answers are averaged and "
                    "none is likely to hold; put words before the subject in these prompts, use a method that does not "
                    "edit at the subject (ft_m, grace), or give them one after another and ask again for the first",
                    SharedKeyWarning,
                    stacklevel=4,
                )

    def _distribute(self, requests: Sequence[EditRequest], targets: Sequence[Target], seconds: float) -> Solution:
        """Distribute the way to the targets over the layers, as one edit; `seconds` per request were spent before."""
        started = self.clock()
        goal = self._goal(targets)
        updates, state = self._write(requests, goal)
        seconds += (self.clock() - started) / len(requests)
        reports = self._reports(targets, torch.stack(goal.distances, dim=1), seconds)
        if self.config.writes_back:
            ranks = [update.U.shape[1] for update in updates.values()]
            reports = tuple({**report, "update_rank": ranks} for report in reports)
        return Solution(tuple(requests), self.braked(Patch(updates)), reports, state)

    def _write(self, requests: Sequence[EditRequest], goal: Goal) -> tuple[dict[str, LowRank], dict[str, Tensor]]:
        """Solve one layer after another, each with the updates below in effect.

        Returns:
            The updates by the names of their weights, and what the ledger keeps with the edit.
        """
        located = [self.locate(request, prefix) for request in requests for prefix in self.prefixes]
        rows = [subject.ids[: subject.last + 1] for subject in located]  # nothing behind the edited token matters
        bare = range(0, len(rows), len(self.prefixes))  # H is read at the prompts without a context
        walk = LayerWalk(
            self.architecture,
            rows,
            self.layers,
            pad=self.pad,
            watched=bare,
            site=self.written_at,
            batch_tokens=self.config.batch_tokens,
        )
        updates, keys, values = {}, {}, {}
        for step, layer in enumerate(self.layers):
            safe_point()
            self.progress(step + 1, len(self.layers), "layers")
            contexts = rearrange(walk.keys.double(), "(n c) d -> n c d", n=len(requests))
            K = keys[layer] = grouped_mean(contexts).T  # (d_in, n)
            R = goal.residual(step, walk.hidden.double().T).to(K.device)
            with name_request_in_errors(requests):
                check_keys(K)
                A = self.adjoint(layer, K)
            update, wanted = self._update(layer, K, R, A)
            values |= wanted
            updates[self.architecture.weight_name(layer)] = update
            walk.advance(update)  # the next layer's K and H are read with this update in place
            written = update.U.double() @ (update.V.double() @ contexts[:, 0].T)
            goal.wrote(step, written, walk.hidden.double().T)
        return updates, {**self.state(keys), **values}

    def _update(self, layer: int, K: Tensor, R: Tensor, A: Tensor) -> tuple[LowRank, dict[str, Tensor]]:
        """Return a layer's update, R A^T beside what brings earlier values back, and the values to keep with it.

        Args:
            layer: The layer.
            K: (d_in, n) the keys.
            R: (d_out, n) what to add at them.
            A: (d_in, n) the solve for them.
        """
        dtype = working_dtype(self.architecture.dtype)
        back, wanted = self._pull(layer), {}
        if self.config.past_values:
            D = self._drift(layer).D
            wanted[_values_name(layer)] = (R if D is None else R + D @ K).to(dtype)
        U, V = R, A.T
        if back is not None:
            U, V = torch.cat([R - back.U @ (back.V @ K), back.U], dim=1), torch.cat([V, back.V.to(V)])
        return LowRank(U.to(dtype), V.to(K.device, dtype)), wanted

    def _reports(self, targets: Sequence[Target], distances: Tensor, seconds: float) -> tuple[dict[str, Any], ...]:
        """Return one report per request: its search, how far its target was before each layer's update and after all.

        `distances` (n, layers + 1). `written` is the share of the way that the updates have gone.
        """
        shared = {"layers": list(self.layers), "seconds": seconds}
        return tuple(
            {
                **target.report(),
                "distances": row[:-1].tolist(),
                "distance_after": float(row[-1]),
                "written": float(1 - row[-1] / row[0]) if row[0] > 0 else None,
                **shared,
            }
            for target, row in zip(targets, distances, strict=True)
        )


def _state_name(layer: int) -> str:
    return f"keys.{layer}"


def _values_name(layer: int) -> str:
    return f"values.{layer}"


def grouped_mean(keys: Tensor) -> Tensor:
    """Return the mean of the bare prompt's key and the mean key of the contexts: (n, contexts, d_in) -> (n, d_in).

    The authors' code averages by groups of contexts, and the bare prompt is one group.
    """
    if keys.shape[1] == 1:
        return keys[:, 0]
    return (keys[:, 0] + keys[:, 1:].mean(dim=1)) / 2
