"""AnyEdit: answers of any length, in chunks, each with a value of its own at the token before it.

    row of chunk c    question, answer up to the end of chunk c without its last token
    site of chunk c   the token that predicts the first token of chunk c
    A = (P (K K^T + K_h K_h^T + K_p K_p^T) + L2 I)^-1 P K,    W' = W + R A^T

Jiang et al. 2025, "AnyEdit: Edit Any Knowledge Encoded in Language Models", and AlphaEdit_ARE of jianghoucheng/AnyEdit.
A single value cannot make a model write a long answer. So the answer is cut into windows. One chunk after another gets
the value, behind the last edited layer, that makes the model write it, while those of earlier chunks stay added at
their sites. Then all values are written at once by AlphaEdit's solve, or by MEMIT's with `spread=memit`. The keys K are
those of the sites in the row of question and whole answer. The keys K_h of all its other positions are held.

No subject is needed, as the sites follow from the answer. There are no contexts and no KL term: these fields of the
family have no effect here, as `fact_token` has none. Where this differs from the authors' code:

- Keys of padding are not held. Theirs are, where answers of unequal length share a batch.
- With an overlap, the last window ends with the answer. Theirs goes on with a chunk of the repeated tokens alone where
  a window ends there by chance.
- The system is solved in float64 by its columns. Their solve in float32 has errors up to 4e-4 (tests/editors/
  test_anyedit.py).
- Keys of earlier edits are left alone, as AlphaEdit does by default (`past_keys`): those of the sites.

Legend in core/families/mass_editing.py; K_h (d_in, m) the keys of the other positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from errata.editors.alphaedit import AlphaEdit, AlphaEditConfig
from errata.editors.core.brakes.past_keys import Past
from errata.editors.core.brakes.past_values import ridge_columns
from errata.editors.core.config import check_least, check_positive
from errata.editors.core.errors import ConfigError, RequestError
from errata.editors.core.families.locate_then_edit import name_request_in_errors
from errata.editors.core.families.mass_editing import MassEditor
from errata.editors.core.families.search_rows import PromptRow, SearchProblem
from errata.editors.core.families.value_search import Target
from errata.editors.core.families.write_goals import Goal, HiddenGoal, OutputGoal
from errata.editors.core.forward.layerwise import LayerWalk
from errata.editors.core.ledger.interrupts import safe_point
from errata.editors.core.ledger.patch import LowRank
from errata.editors.core.model.own_forward import hooked
from errata.editors.core.model.reading import read_ids
from errata.editors.core.request import EditRequest
from errata.editors.core.solve.null_space import dense_adjoint
from errata.editors.core.solve.solvers import Factor, check_keys


@dataclass(frozen=True, kw_only=True)
class AnyEditConfig(AlphaEditConfig):
    """AnyEdit's fields: AlphaEdit's, with the defaults of the authors' files, and those of the windows."""

    v_num_grad_steps: int = 25
    """Iterations of the search for the value of a chunk. The last one only computes the loss."""

    v_weight_decay: float = 1e-3
    """Weight of ||delta|| / ||v_0||^2."""

    stop_loss: float = 1e-2
    """The search for a chunk's value ends once its loss is below this."""

    window: int = 40
    """Tokens of a chunk."""

    overlap: int = 0
    """Tokens of a chunk that the next one has, too."""

    spread: Literal["alphaedit", "memit"] = "alphaedit"
    """Which solve writes the values: AlphaEdit's, within the null space, or MEMIT's (lambda C + K K^T)^-1 K."""

    mom2_update_weight: float | None = None
    """lambda of MEMIT's solve; null: the width d_in of a key, or a tenth of it behind norms."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("window", "mom2_update_weight"))
        check_least(self, {"overlap": 0})
        if self.overlap >= self.window:
            raise ConfigError(f"overlap: expected less than the window of {self.window} tokens, got {self.overlap}")
        if self.nas is not None or self.nas_facts is not None:
            raise ConfigError("nas, nas_facts: expected null, because an answer has several values")
        if self.writes_back:
            raise ConfigError("past_values, lyaplock: expected none, because an answer has several keys")


@dataclass
class ChunkTargets(Target):
    """The values of an answer's chunks, c of them, as one target.

    `initial` and `delta` are (c, d), or (c, L, d) of a joint search; `losses` are those of all chunks in order.

    Attributes:
        chunks: One target per chunk.
        sites: The position of each in the row of question and answer.
    """

    chunks: list[Target] = field(default_factory=list)
    sites: tuple[int, ...] = ()

    @classmethod
    def of(cls, chunks: Sequence[Target], sites: Sequence[int]) -> ChunkTargets:
        losses = [loss for chunk in chunks for loss in chunk.losses]
        initial, delta = (torch.stack([getattr(chunk, name) for chunk in chunks]) for name in ("initial", "delta"))
        return cls(initial, delta, losses, chunks=list(chunks), sites=tuple(sites))

    def report(self) -> dict[str, Any]:
        """Return the searches as JSON values; `final` is that of the chunk whose search ended worst."""
        worst = max(self.chunks, key=lambda chunk: chunk.losses[-1]["nll"])
        return {**super().report(), "final": worst.losses[-1], "chunks": [chunk.report() for chunk in self.chunks]}


class AnyEdit(AlphaEdit):
    """Long answers in chunks (Jiang et al. 2025)."""

    name = "anyedit"
    Config = AnyEditConfig
    config: AnyEditConfig
    settings: AnyEditConfig
    needs_subject = False
    advice = MappingProxyType(
        {
            "search": "give more v_num_grad_steps or a smaller window",
            "share": "lower L2 (with spread=memit mom2_update_weight), or raise nullspace_energy",
        }
    )

    def rules(self) -> dict[str, Any]:
        """Return the values of null fields: AlphaEdit's, the authors' clamp of 4 ||v_0||, and MEMIT's lambda."""
        width = self.architecture.map_at(self.layers[0]).shape[1]
        weight = float(width if self.gains else width / 10)
        return {**super().rules(), "clamp_norm_factor": 4.0, "mom2_update_weight": weight}

    # --- chunks and their values ------------------------------------------------------------------------------------

    def _ids(self, request: EditRequest) -> tuple[list[int], list[int]]:
        """Return the ids of a request's question and of its answer."""
        try:
            question, answer = read_ids(
                self.tokenizer, request.text, request.target, chat=request.chat, join=request.join
            )
        except RequestError as error:
            raise error.of(request.id) from error
        count = len(question) + len(answer)
        self.architecture.check_length(count, f"{count} tokens with its answer", request.id)
        return question, answer

    def _windows(self, answer: Sequence[int]) -> list[tuple[int, int]]:
        """Return each chunk of an answer as its first index and the one behind its last."""
        step = self.config.window - self.config.overlap
        starts = range(0, max(1, len(answer) - self.config.overlap), step)
        return [(start, min(start + self.config.window, len(answer))) for start in starts]

    def _problem(self, request: EditRequest, window: tuple[int, int]) -> SearchProblem:
        question, answer = self._ids(request)
        start, end = window
        row = PromptRow((*question, *answer[: end - 1]), len(question) + start - 1, tuple(answer[start:end]))
        return SearchProblem(str(request.id), (row,), None)

    def _searched(self, requests: Sequence[EditRequest]) -> list[Target]:
        """Search for the values of all first chunks together, and for those of later chunks request by request."""
        windows = [self._windows(self._ids(request)[1]) for request in requests]
        layer, site = (self.layers[-1], "block") if self.gains else (self.layers, "mlp")
        firsts = [self._problem(request, own[0]) for request, own in zip(requests, windows, strict=True)]
        found: list[Target] = []
        for request, own, first in zip(requests, windows, self._found(firsts, layer, site), strict=True):
            before = len(self._ids(request)[0]) - 1
            chunks, sites = [first], [before + start for start, _ in own]
            for number, window in enumerate(own[1:], 1):
                problem = self._problem(request, window)
                with self._added(chunks, sites[:number], len(problem.rows[0].ids)):
                    chunks += self._found([problem], layer, site)
            found.append(ChunkTargets.of(chunks, sites))
        return found

    def _added(self, chunks: Sequence[Target], sites: Sequence[int], length: int) -> AbstractContextManager[object]:
        """Return a context manager: inside, the values of earlier chunks are added in rows of this length."""
        deltas = torch.stack([chunk.delta for chunk in chunks])  # (c, d) or (c, L, d)

        def adding(values: Tensor) -> Callable[..., Any]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
                states = output[0] if isinstance(output, (tuple, list)) else output
                rows = states.reshape(-1, states.shape[-1])
                if len(rows) != length:  # the end of a row, which begins behind these sites
                    return output
                index = torch.tensor(sites, device=rows.device)
                added = rows.index_add(0, index, values.to(rows)).reshape(states.shape)
                return (added, *output[1:]) if isinstance(output, (tuple, list)) else added

            return hook

        if self.gains:
            return hooked(self.architecture.block(self.layers[-1]).register_forward_hook(adding(deltas)))
        maps = [self.architecture.down(layer) for layer in self.layers]
        return hooked(*(m.register_forward_hook(adding(deltas[:, i]), prepend=True) for i, m in enumerate(maps)))

    def _goal(self, targets: Sequence[Target]) -> Goal:
        deltas = torch.cat([target.delta for target in targets]).double()
        if self.gains is None:
            return OutputGoal(rearrange(deltas, "n l d -> l d n"))
        return HiddenGoal((torch.cat([target.initial for target in targets]).double() + deltas).T, self.gains)

    def _shared_keys(self, requests: Sequence[EditRequest]) -> list[list[str | None]]:
        """Return nothing: no two requests of a batch have one question, so that no two sites read the same tokens."""
        return [[] for _ in requests]

    # --- writing ----------------------------------------------------------------------------------------------------

    def _write(self, requests: Sequence[EditRequest], goal: Goal) -> tuple[dict[str, LowRank], dict[str, Tensor]]:
        """Solve one layer after another, with the keys of all sites of all answers."""
        read = [self._ids(request) for request in requests]
        rows = [[*question, *answer] for question, answer in read]
        sites = [[len(q) - 1 + start for start, _ in self._windows(answer)] for q, answer in read]
        owners = [request for request, own in zip(requests, sites, strict=True) for _ in own]  # of each key
        walk = LayerWalk(
            self.architecture,
            rows,
            self.layers,
            pad=self.pad,
            watched=range(len(rows)),
            everywhere=True,
            batch_tokens=self.config.batch_tokens,
        )
        updates, keys = {}, {}
        for step, layer in enumerate(self.layers):
            safe_point()
            self.progress(step + 1, len(self.layers), "layers")
            K, held, H = _split(walk.states(), sites)
            keys[layer] = K
            R = goal.residual(step, H).to(K.device)
            with name_request_in_errors(owners):
                check_keys(K)
                A = self._held_adjoint(layer, K, held)
            update, _ = self._update(layer, K, R, A)
            updates[self.architecture.weight_name(layer)] = update
            walk.advance(update)
            written = update.U.double() @ (update.V.double() @ K)
            goal.wrote(step, written, _split(walk.states(), sites)[2])
        return updates, self.state(keys)

    def _held_adjoint(self, layer: int, K: Tensor, held: Tensor) -> Tensor:
        """Return A (d_in, n) for the keys K (d_in, n), with `held` (d_in, m) and those of earlier edits left alone."""
        past = [keys.to(K) for _, keys in self._past_keys(layer)]
        M = torch.cat([*past, held, K], dim=1)
        if self.config.spread == "memit":
            factor, weight = self.factor(layer), self.settings.mom2_update_weight
            if not isinstance(factor, Factor) or weight is None:
                raise ConfigError("spread=memit: expected mom2_dtype=float64 and second moments")
            columns = ridge_columns(factor.half(M) / weight**0.5, 1.0)
            return factor.second_half(columns[:, -K.shape[1] :]) / weight**0.5
        P = self.projector(layer)
        if not self._exact[layer]:
            return dense_adjoint(P.matrix(), M, K.shape[1], self.ridge(layer))
        columns = P.to(K.device, torch.float64) @ M
        return ridge_columns(columns, self.ridge(layer))[:, -K.shape[1] :]

    def _past_keys(self, layer: int) -> Past:
        # MEMIT's solve needs no projector, whose device AlphaEdit looks at.
        return MassEditor._past_keys(self, layer)

    def _reports(self, targets: Sequence[Target], distances: Tensor, seconds: float) -> tuple[dict[str, Any], ...]:
        """Return one report per request; its distances are over all sites of its answer."""
        counts = [len(target.sites) for target in targets if isinstance(target, ChunkTargets)]
        grouped = torch.stack([part.square().sum(0).sqrt() for part in distances.split(counts)])
        return super()._reports(targets, grouped, seconds)


def _split(states: Sequence[tuple[Tensor, Tensor]], sites: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the keys at the sites (d_in, n), those at all other positions (d_in, m), and the hidden states (d, n)."""
    at, others, hidden = [], [], []
    for (keys, final), own in zip(states, sites, strict=True):
        index = torch.tensor(own, device=keys.device)
        rest = torch.ones(len(keys), dtype=torch.bool, device=keys.device).index_fill(0, index, False)
        at.append(keys[index].double())
        others.append(keys[rest].double())
        hidden.append(final[index.to(final.device)].double())
    return torch.cat(at).T, torch.cat(others).T, torch.cat(hidden).T
