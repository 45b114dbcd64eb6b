"""CoachHooK: MEMIT's updates in copies of the maps, which act at tokens where they differ unusually much.

    A = (lambda C + K_p K_p^T + K K^T)^-1 K,    W_h' = W_h + R A^T,    output W_h x where z >= alpha, else W x

(Li et al. 2024, "Consecutive Batch Model Editing with HooK Layers".) Values, keys and contexts are MEMIT's, with the
keys of earlier edits kept. The model's weights stay. Which tokens are in scope: core/side_memory/hook_layers.py.

One edit: the values are searched with the hooks of earlier edits in place. Then each layer is solved for its share,
from below. The layers below it act by their new W_h and the old alpha, and it and those above act by the old W_h at
every token. Last, alpha of each layer falls to the smallest z that a prompt of the edit reaches at its best token.

An edit can be undone in any order: the ledger has each edit's D as factors, its alpha and its keys. What is left is the
sum of the others' D and the smallest of their alphas.

Paper, code and this file differ:

- z of one token among T is at most (T - 1) / sqrt(T). So an alpha of 2.2 is out of reach for rows of six tokens or
  fewer, until an edit with so short a prompt has lowered it. `in_scope` of the report is the share of layers at which
  the edited token of the bare prompt is in scope in the end.
- The code takes mean and std over the padding of a batch too, so that an answer depends on what is asked beside it.
  Here rows are never padded. `statistics=prefix` also leaves out later tokens of the row.
- alpha is fitted on what the unedited model reads at each layer and used on what the edited one reads, as in the code.
  So a prompt may be out of scope at every layer but the lowest.
- Generated tokens never use W_h if there is a cache: they are rows of one token.
- The code keeps C + sum K K^T in float32; here the factor of C and the keys are kept. On 16-bit models its W_h is
  rounded at every use; here D has the working precision.
- An ablation in the code without hooks multiplies the keys of past edits by lambda too. It is not here.

Legend: n requests; K (d_in, n) keys; K_p those of earlier edits; R (d, n) residuals; A (d_in, n); W_h, W, D (d, d_in).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from errata.editors.core.config import norm_limit
from errata.editors.core.dtypes import working_dtype
from errata.editors.core.edit import Solution
from errata.editors.core.errors import ConfigError, LedgerError, NumericalError
from errata.editors.core.families import mass_editing
from errata.editors.core.families.locate_then_edit import name_request_in_errors
from errata.editors.core.families.value_search import Target
from errata.editors.core.families.write_goals import Goal
from errata.editors.core.forward.block_calls import hidden_of
from errata.editors.core.ledger import arithmetic
from errata.editors.core.ledger.interrupts import safe_point
from errata.editors.core.ledger.patch import LowRank, Patch, Update
from errata.editors.core.model.activations import StopForward, run_base
from errata.editors.core.model.own_forward import hooked
from errata.editors.core.model.tokens import LocatedSubject, right_padded
from errata.editors.core.request import EditRequest
from errata.editors.core.side_memory.hook_layers import HookLayer, HookUpdate, Statistics, z_scores
from errata.editors.core.side_memory.side_editor import refuse_flat_rows
from errata.editors.core.solve.solvers import check_keys
from errata.editors.memit import MEMIT, MEMITConfig

Acting = Callable[[Tensor, Tensor], Tensor]  # a map's output, from its input and from its own output


@dataclass(frozen=True, kw_only=True)
class CoachHooKConfig(MEMITConfig):
    """CoachHooK's fields: MEMIT's, and those of the hooks."""

    alpha: float = 2.2
    """z from which a token is in scope, before edits lower it."""

    statistics: Statistics = "row"
    """What mean and spread of a token's z are over: all tokens of its row, or those up to it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rect", "sphere", "prune", "lyaplock"):
            if getattr(self, name) is not None:
                raise ConfigError(f"{name}: expected null, because no weight is written")
        if self.past_values:
            raise ConfigError("past_values: expected false, because no weight is written")


class CoachHooK(MEMIT):
    """Consecutive batches in hook layers (Li et al. 2024)."""

    name = "coachhook"
    writes_weights = False
    Config = CoachHooKConfig
    config: CoachHooKConfig
    remembers_keys = True
    advice: ClassVar[Mapping[str, str]] = MappingProxyType({"share": "lower mom2_update_weight"})

    def setup(self) -> None:
        super().setup()
        for layer in self.layers:
            refuse_flat_rows(self.architecture, layer, self.name)

    def _distribute(self, requests: Sequence[EditRequest], targets: Sequence[Target], seconds: float) -> Solution:
        solution = super()._distribute(requests, targets, seconds)
        updates = {layer: solution.patch.updates[self.architecture.weight_name(layer)] for layer in self.layers}
        prompts = [self.locate(request, "") for request in requests]
        folded, adapters = {}, {}
        for layer, update in updates.items():
            assert isinstance(update, LowRank)
            record = HookUpdate(update, self.config.alpha, self.config.statistics)
            folded[layer] = self._extended(layer, record)
        reached = self._largest_z(prompts, folded)
        for layer, layers in folded.items():
            update = updates[layer]
            assert isinstance(update, LowRank)
            # A NaN, of a row of one token, lowers nothing.
            alpha = min([self.config.alpha, *(z for z in reached[layer] if not math.isnan(z))])
            adapters[self.module_name(layer)] = HookUpdate(update, alpha, self.config.statistics)
            folded[layer] = replace(layers, alpha=min(layers.alpha, alpha))
        inside = self._in_scope(prompts, folded)
        size, ratio = self._sizes(requests, updates)
        alphas = {layer: each.alpha for layer, each in folded.items()}
        reports = tuple(
            {
                **report,
                "update_norm": size,
                "update_ratio": ratio,
                "row_tokens": len(prompt.ids),
                "in_scope": share,
                "alpha": [alphas[layer] for layer in self.layers],
            }
            for report, prompt, share in zip(solution.diagnostics, prompts, inside, strict=True)
        )
        return replace(solution, patch=Patch({}, adapters), diagnostics=reports)

    def _sizes(self, requests: Sequence[EditRequest], updates: Mapping[int, Update]) -> tuple[float, float | None]:
        """Return the norm of all updates, and the largest ratio to the norm of a weight; None if one is zero.

        Raises:
            NumericalError: The ratio is beyond the limit, as if the weights were written.
        """
        norms = {layer: update.norm() for layer, update in updates.items()}
        weights = {layer: arithmetic.norm(self.architecture.weight(layer)) for layer in updates}
        limit = norm_limit(self.name, self.config.to_dict())
        for layer, norm in norms.items():
            if not norm <= (limit * weights[layer] or math.inf):
                raise NumericalError(
                    f"the update of {self.module_name(layer)} has norm {norm:.3g}, more than {limit:.3g} times the "
                    f"weight's {weights[layer]:.3g}: the computation has exploded; see the editor's diagnostics",
                    record=requests[0].id,
                )
        known = all(weights.values())
        return math.hypot(*norms.values()), max(norms[x] / weights[x] for x in norms) if known else None

    def _write(self, requests: Sequence[EditRequest], goal: Goal) -> tuple[dict[str, LowRank], dict[str, Tensor]]:
        """Solve one layer after another, each with the hooks below it renewed."""
        located = [self.locate(request, prefix) for request in requests for prefix in self.prefixes]
        bare = located[:: len(self.prefixes)]
        held = {layer: self._held(layer) for layer in self.layers}
        acting: dict[int, Acting] = {layer: _everywhere(held[layer]) for layer in self.layers}
        updates: dict[str, LowRank] = {}
        keys: dict[int, Tensor] = {}
        dtype = working_dtype(self.architecture.dtype)
        hidden = self._hidden(bare, acting)
        for step, layer in enumerate(self.layers):
            safe_point()
            self.progress(step + 1, len(self.layers), "layers")
            contexts = rearrange(self._keys(located, layer, acting).double(), "(n c) d -> n c d", n=len(requests))
            K = keys[layer] = mass_editing.grouped_mean(contexts).T  # (d_in, n)
            R = goal.residual(step, hidden.double().T)
            with name_request_in_errors(requests):
                check_keys(K)
                A = self.adjoint(layer, K)
            update = LowRank(R.to(K.device, dtype), A.T.to(K.device, dtype))
            updates[self.architecture.weight_name(layer)] = update
            acting[layer] = self._extended(layer, HookUpdate(update, self.config.alpha, self.config.statistics)).act
            hidden = self._hidden(bare, acting)
            written = update.U.double() @ (update.V.double() @ contexts[:, 0].T)
            goal.wrote(step, written.to(R.device), hidden.double().T)
        return updates, self.state(keys)

    # --- the hooks --------------------------------------------------------------------------------------------------

    def module_name(self, layer: int) -> str:
        """Return the name of a layer's down projection."""
        return self.architecture.weight_name(layer).removesuffix(".weight")

    def _held(self, layer: int) -> HookLayer | None:
        """Return what the ledger's edits have added at a layer."""
        found = self.ledger.folded(self.module_name(layer))
        if found is not None and not isinstance(found, HookLayer):
            raise LedgerError(f"{self.module_name(layer)} carries an adapter of another kind; undo it first")
        return None if found is None else found.to(self.architecture.weight(layer).device)

    def _extended(self, layer: int, record: HookUpdate) -> HookLayer:
        held = self._held(layer)
        return HookUpdate.folded([record]) if held is None else held.extended([record])

    def groups(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return the indices of rows that run together: those of one length, so that nothing is padded."""
        found: dict[int, list[int]] = defaultdict(list)
        for index, row in enumerate(rows):
            found[len(row)].append(index)
        return list(found.values())

    @torch.no_grad()
    def _run(self, rows: Sequence[Sequence[int]], acting: Mapping[int, Acting]) -> None:
        """Run the model on rows of ids, with each edited layer acting as it is told to."""

        def replaced(layer: int) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], _output: Tensor) -> Tensor:
                base = module.forward(args[0])
                return acting[layer](args[0], base).to(base.dtype)

            return hook

        downs = [(layer, self.architecture.down(layer)) for layer in self.layers]
        with hooked(*(down.register_forward_hook(replaced(layer)) for layer, down in downs)):
            run_base(self.architecture, right_padded(rows, self.pad).to(self.architecture.device))

    def _keys(self, located: Sequence[LocatedSubject], layer: int, acting: Mapping[int, Acting]) -> Tensor:
        """Return what a layer's down projection reads at the edited tokens, (r, d_in)."""
        found: dict[int, Tensor] = {}
        rows = [subject.ids for subject in located]
        for group in self.groups(rows):

            def reading(_module: nn.Module, args: tuple[Any, ...], group: list[int] = group) -> None:
                found.update({i: args[0][b, located[i].last] for b, i in enumerate(group)})
                raise StopForward

            with hooked(self.architecture.down(layer).register_forward_pre_hook(reading)), suppress(StopForward):
                self._run([rows[i] for i in group], acting)
        return torch.stack([found[i] for i in range(len(rows))])

    def _hidden(self, located: Sequence[LocatedSubject], acting: Mapping[int, Acting]) -> Tensor:
        """Return the hidden states behind the last edited layer at the edited tokens, (r, d)."""
        found: dict[int, Tensor] = {}
        rows = [subject.ids for subject in located]
        for group in self.groups(rows):

            def leaving(_module: nn.Module, _args: Any, output: Any, group: list[int] = group) -> None:
                states = hidden_of(output)
                found.update({i: states[b, located[i].last] for b, i in enumerate(group)})
                raise StopForward

            block = self.architecture.block(self.layers[-1])
            with hooked(block.register_forward_hook(leaving)), suppress(StopForward):
                self._run([rows[i] for i in group], acting)
        return torch.stack([found[i] for i in range(len(rows))])

    def _scores(
        self, prompts: Sequence[LocatedSubject], folded: Mapping[int, HookLayer], acting: Mapping[int, Acting]
    ) -> dict[int, dict[int, Tensor]]:
        """Return z of every token of each prompt at each layer: {layer: {index of the prompt: (t,)}}."""
        found: dict[int, dict[int, Tensor]] = {layer: {} for layer in self.layers}
        rows = [prompt.ids for prompt in prompts]
        for group in self.groups(rows):

            def watched(layer: int, group: list[int] = group) -> Acting:
                def act(x: Tensor, base: Tensor) -> Tensor:
                    z = z_scores(folded[layer].change(x).norm(dim=-1), self.config.statistics)
                    found[layer].update(dict(zip(group, z, strict=True)))
                    return acting[layer](x, base)

                return act

            self._run([rows[i] for i in group], {layer: watched(layer) for layer in self.layers})
        return found

    def _largest_z(self, prompts: Sequence[LocatedSubject], folded: Mapping[int, HookLayer]) -> dict[int, list[float]]:
        """Return the largest z of each prompt at each layer, where no layer acts."""
        found = self._scores(prompts, folded, {layer: lambda _x, base: base for layer in self.layers})
        return {layer: [float(z.max()) for z in rows.values()] for layer, rows in found.items()}

    def _in_scope(self, prompts: Sequence[LocatedSubject], folded: Mapping[int, HookLayer]) -> list[float]:
        """Return the share of layers at which the edited token of each prompt is in scope, where all layers act."""
        found = self._scores(prompts, folded, {layer: each.act for layer, each in folded.items()})
        inside = {layer: {i: float(z[prompts[i].last]) for i, z in rows.items()} for layer, rows in found.items()}
        return [
            sum(inside[layer][i] >= folded[layer].alpha for layer in self.layers) / len(self.layers)
            for i in range(len(prompts))
        ]


def _everywhere(held: HookLayer | None) -> Acting:
    """Return the copy at every token."""
    return lambda x, base: base if held is None else base + held.change(x)
