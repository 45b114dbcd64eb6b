"""UltraEdit and StableEdit: the gradient of new answers, normalised, turned into an update by a ridge regression.

    z = [x ; g],    z^ = (z - mu) / (sd + eps),    v_t = -lr ||x^_t||^2 g^_t,    W' = W + V^T (X X^T + ridge I)^-1 X

Gu et al. 2026, "UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing". One backward pass gives x and g at
the tokens that predict the answers. All edited maps of one shape share the running mean mu and deviation sd of every
token edited so far. No subject, no second moment and no search is needed.

StableEdit (Ma et al. 2026) differs in three fields: `variance=biased`, `whiten=full` and `ridge=10`. With `full`, g is
whitened by the covariance C of all g so far, once there are more tokens than dimensions:

    g^_t = C^-1/2 (g_t - mu_g),    eigenvalues of C not below 1e-6

The ledger keeps the statistics of each edit (count, mean, squared deviations per shape). Those of any set of edits are
their merge, so that an undo needs nothing else. With `whiten=full` an edit also keeps its rows of g, or their scatter
matrix if that is smaller: up to 4 d_out^2 bytes per shape, 67 MB at a width of 4096. `state_bytes` of the report says
how much it was.

A first edit alone is almost nothing: z is its own mean, and with one token v is exactly 0. An edit that is normalised
by its own tokens alone is warned about, or refused if there is only one token. Edits come in batches of a hundred
(`protocol=batch`, or `sequential` with `batch_size=100`), or behind a `warm_up`.

Code and paper differ from each other and from this file:

- UltraEdit multiplies the unbiased variance of a mini-batch by its size, so that the spread of small ones is too large
  and a mini-batch with one token gives NaN. `variance=unbiased` repeats this, but one token counts with no spread.
- Their sizes of mini-batches are only right for multiples of 10. Here the last mini-batch is smaller.
- StableEdit's warm-up edits stay on the model: `warm_up_stays=true`. By default only their statistics are kept.
- StableEdit's file has a ridge of 1, and every command that its authors list has 10.
- They solve in float32, and this file in float64.

Legend: x_t (d_in,) input of a map at token t; g_t (d_out,) gradient of the loss at its output; X (t, d_in); V (t,
d_out); mu, sd (d_in + d_out,); W (d_out, d_in); lr, ridge fields of the configuration.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from errata.editors.core.config import EditorConfig, check_layers, check_positive, norm_limit
from errata.editors.core.dtypes import working_dtype
from errata.editors.core.edit import Solution
from errata.editors.core.editor import Editor
from errata.editors.core.errors import ColdStatisticsWarning, ConfigError, NumericalError
from errata.editors.core.families.fine_tuning import prompt_and_answer
from errata.editors.core.families.map_choice import named_maps, select_projections
from errata.editors.core.families.warm_up import read_requests, requests_from_text
from errata.editors.core.forward.gradient_factors import AnsweredRow, gradient_factors
from errata.editors.core.ledger.entry import EditInfo, Entry
from errata.editors.core.ledger.interrupts import safe_point
from errata.editors.core.ledger.patch import LowRank, Patch, Update, compacted, merge
from errata.editors.core.model.activations import limit_batch_tokens
from errata.editors.core.model.architecture import LinearMap
from errata.editors.core.model.model_settings import read_model_settings
from errata.editors.core.model.texts import FACTBOOK
from errata.editors.core.model.tokens import pad_id
from errata.editors.core.request import EditRequest
from errata.editors.core.solve.solvers import small_adjoint
from errata.editors.core.solve.token_statistics import TokenStatistics, whitening

logger = logging.getLogger(__name__)
FLOOR = 1e-6  # the smallest eigenvalue of C that counts, of the authors' code

Shape = tuple[int, int]  # (d_out, d_in)
Statistics = Mapping[Shape, TokenStatistics]


@dataclass(frozen=True, kw_only=True)
class UltraEditConfig(EditorConfig):
    """UltraEdit's fields. Defaults are those of the authors' files; the layers are theirs for Mistral 7B."""

    FILES = ("warm_up",)

    layers: tuple[int, ...] | None = None
    """Layers to edit, counted from 0; null: the two before the last, as in the authors' file for Mistral 7B."""

    projections: tuple[str, ...] | None = None
    """The MLP's linear maps to edit in these layers, by the last part of their names; null: the down projection."""

    edit_modules: tuple[str, ...] | None = None
    """Full names of the maps to edit, as in the authors' files; null: as `layers` and `projections` say."""

    lr: float = 1e-6
    """Length of the values."""

    ridge: float = 1.0
    """Ridge of the regression, in the unit of squared activations."""

    mini_batch: int = 10
    """Requests whose loss is one mean over all their answer tokens."""

    variance: Literal["unbiased", "biased"] = "unbiased"
    """Which variance of a mini-batch counts in the spread; see the top of this file."""

    whiten: Literal["diagonal", "full"] = "diagonal"
    """Whether g is divided by its deviations, or whitened by its covariance once there are enough tokens."""

    warm_up: str | int | None = None
    """Requests whose statistics count from the beginning: a file (JSON with `prompt`, `subject`, `target`), or a number
    of them to cut from the text in the model's folder, else from the text that comes with errata; null: none."""

    warm_up_stays: bool = False
    """Whether the edits of the warm-up stay on the model, as in StableEdit's code: they are then a part of the first
    edit, and go with its undo."""

    warm_up_turn: int = 100
    """Requests of the warm-up that are measured, or edited, at once."""

    batch_tokens: int = 16384
    """Largest number of tokens in one forward pass; lower it if memory is short."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("lr", "ridge", "mini_batch", "warm_up_turn", "batch_tokens"))
        if isinstance(self.warm_up, int) and (isinstance(self.warm_up, bool) or self.warm_up < 1):
            raise ConfigError(f"warm_up: expected a file, a number above 0 or null, got {self.warm_up}")
        if self.warm_up_stays and self.warm_up is None:
            raise ConfigError("warm_up_stays: there is no warm-up that could stay; give warm_up a file or a number")


@dataclass(frozen=True, kw_only=True)
class StableEditConfig(UltraEditConfig):
    """StableEdit's fields: those of UltraEdit with the values that its authors' commands give."""

    ridge: float = 10.0
    """Ridge of the regression, in the unit of squared activations. The authors' file has 1, their commands have 10."""

    variance: Literal["unbiased", "biased"] = "biased"
    """Which variance of a mini-batch counts in the spread; see the top of this file."""

    whiten: Literal["diagonal", "full"] = "full"
    """Whether g is divided by its deviations, or whitened by its covariance once there are enough tokens."""


@dataclass(frozen=True)
class Turn:
    """What one edit measures.

    Attributes:
        requests: The requests, in their order.
        x: (t, d_in) inputs of each map at the tokens of the turn, mini-batch after mini-batch.
        g: (t, d_out) gradients at the outputs of each map, likewise.
        sizes: Tokens of each mini-batch.
        losses: Loss of each request before the edit, in nats per token.
    """

    requests: tuple[EditRequest, ...]
    x: list[Tensor]
    g: list[Tensor]
    sizes: list[int]
    losses: list[float]


class UltraEdit(Editor):
    """Editing by normalised gradients and a ridge regression (Gu et al. 2026)."""

    name = "ultraedit"
    Config = UltraEditConfig
    config: UltraEditConfig

    def setup(self) -> None:
        self.maps = self._choose_maps()
        self.architecture.check_writable(self.maps)
        self.architecture.check_trainable(self.maps)
        self.pad = pad_id(self.tokenizer)
        self._batch_tokens = limit_batch_tokens(self.config.batch_tokens, self.architecture.device)
        self._eps = torch.finfo(working_dtype(self.architecture.dtype)).eps
        self._has_warned = False
        self._warm: Statistics | None = None
        self._past: tuple[tuple[str, ...], Statistics] = ((), {})

    def _choose_maps(self) -> list[LinearMap]:
        parts, count = self.architecture, self.architecture.n_layers
        if self.config.edit_modules is not None:
            return named_maps(parts, self.config.edit_modules)
        default = tuple(range(max(0, count - 3), max(1, count - 1)))
        layers = check_layers(self.config.layers if self.config.layers is not None else default, count)
        if self.config.projections is None:
            return [parts.map_at(layer) for layer in layers]
        found = {layer: parts.mlp_maps(layer) for layer in layers}
        names = select_projections(found[layers[0]], self.config.projections)
        return [found[layer][name] for layer in layers for name in names]

    # --- solving ----------------------------------------------------------------------------------------------------

    def solve(self, requests: Sequence[EditRequest]) -> list[Solution]:
        return self._solve([[request] for request in requests])

    def solve_batch(self, requests: Sequence[EditRequest]) -> Solution:
        """Solve all requests by one regression per map: a turn of the authors' code."""
        return self._solve([requests])[0]

    def _solve(self, edits: Sequence[Sequence[EditRequest]]) -> list[Solution]:
        if not self.config.warm_up_stays or self._entries():
            return self._solve_turns(edits)
        # The warm-up is a part of each of these edits, which are made on the model that it leaves.
        with self.ledger.transaction():
            warm, ids = self._apply_warm_up()
            statistics = self.past_statistics()
            solutions = self._solve_turns(edits)
            self.ledger.remove_many(ids)
        return [self._with_warm_up(each, warm, statistics) for each in solutions]

    def _solve_turns(self, edits: Sequence[Sequence[EditRequest]]) -> list[Solution]:
        started = time.perf_counter()
        turns = self.measure(edits)
        past = self.past_statistics()
        seconds = (time.perf_counter() - started) / sum(map(len, edits))
        return [self._solution(turn, past, seconds) for turn in turns]

    def _solution(self, turn: Turn, past: Statistics, seconds: float, *, diagonal: bool = False) -> Solution:
        started = time.perf_counter()
        safe_point()
        statistics = {shape: own.merged(past.get(shape)) for shape, own in self.statistics(turn).items()}
        self._check_enough(turn, statistics, past)
        values, report = self.values(turn, statistics, diagonal=diagonal)
        updates = {found.name: self.update(x, V) for found, x, V in zip(self.maps, turn.x, values, strict=True)}
        state = self._state(turn)
        seconds += (time.perf_counter() - started) / len(turn.requests)
        shared = {
            "tokens": sum(turn.sizes),
            "statistics": min(each.count for each in statistics.values()),
            "state_bytes": sum(tensor.nbytes for tensor in state.values()),
            **report,
            "seconds": seconds,
        }
        reports = tuple({"loss": loss, **shared} for loss in turn.losses)
        return Solution(turn.requests, Patch(updates), reports, state)

    def _check_enough(self, turn: Turn, statistics: Statistics, past: Statistics) -> None:
        if min(each.count for each in statistics.values()) == 1:
            raise NumericalError(
                "one answer token is its own mean, so that the edit would be nothing; give warm_up, or more requests",
                record=turn.requests[0].id,
            )
        if not past and len(turn.requests) == 1 and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{self.name}: request {turn.requests[0].id} is normalised by its own {sum(turn.sizes)} tokens alone, "
                "so that little of it is left; give warm_up (a file of requests, or a number), or edit in batches",
                ColdStatisticsWarning,
                stacklevel=5,
            )

    def joined_state(self, solutions: Sequence[Solution]) -> dict[str, Tensor]:
        """Return the statistics of all solutions together."""
        state: dict[str, Tensor] = {}
        for shape in self._shapes:
            found: TokenStatistics | None = None
            for solution in solutions:
                own = TokenStatistics.from_tensors(solution.state, _prefix(shape))
                found = own if found is None else found.merged(own)
            state |= {} if found is None else found.tensors(_prefix(shape))
        return state

    # --- the formulas -----------------------------------------------------------------------------------------------

    def row(self, request: EditRequest) -> AnsweredRow:
        """Return the prompt and its new answer as ids. Errors are those of `prompt_and_answer`."""
        ids, answer = prompt_and_answer(self.architecture, self.tokenizer, request)
        return AnsweredRow((*ids, *answer[:-1]), answer)

    def measure(self, edits: Sequence[Sequence[EditRequest]]) -> list[Turn]:
        """Return x and g of every edit, on the model as it stands.

        The requests of an edit are sorted by length, the longest first, and cut into mini-batches, as in the authors'
        code.
        """
        size, batches, places = self.config.mini_batch, [], []
        for e, requests in enumerate(edits):
            rows = [self.row(request) for request in requests]
            order = sorted(range(len(rows)), key=lambda i, rows=rows: -len(rows[i].ids))
            for start in range(0, len(order), size):
                batches.append([rows[i] for i in order[start : start + size]])
                places.append((e, order[start : start + size]))
        factors, losses = gradient_factors(
            self.architecture,
            [found.module for found in self.maps],
            batches,
            pad=self.pad,
            batch_tokens=self._batch_tokens,
            answers_only=True,
        )
        dtype, device = working_dtype(self.architecture.dtype), self.architecture.device
        sizes = [sum(len(row.answer) for row in batch) for batch in batches]
        turns = []
        for e, requests in enumerate(edits):
            mine = [b for b, (owner, _) in enumerate(places) if owner == e]
            by_request = {i: loss for b in mine for i, loss in zip(places[b][1], losses[b], strict=True)}
            chosen = slice(sum(sizes[: mine[0]]), sum(sizes[: mine[-1] + 1]))
            turns.append(
                Turn(
                    tuple(requests),
                    [f.x[chosen].to(device, dtype) for f in factors],
                    [f.delta[chosen].to(device, dtype) for f in factors],
                    [sizes[b] for b in mine],
                    [by_request[i] for i in range(len(requests))],
                )
            )
        return turns

    def statistics(self, turn: Turn) -> Statistics:
        """Return the statistics of a turn's own tokens, by shape."""
        found: dict[Shape, TokenStatistics] = {}
        unbiased, full = self.config.variance == "unbiased", self.config.whiten == "full"
        for linear_map, x, g in zip(self.maps, turn.x, turn.g, strict=True):
            scatter = g.shape[1] if full else 0
            for z in torch.cat([x, g], dim=1).split(turn.sizes):
                block = TokenStatistics.of(z, unbiased=unbiased, scatter=scatter)
                found[linear_map.shape] = block.merged(found.get(linear_map.shape))
        return found

    def values(
        self, turn: Turn, statistics: Statistics, *, diagonal: bool = False
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """Return V (t, d_out) of each map, in float64, and what there is to report on it.

        Args:
            turn: The edit's tokens.
            statistics: Those of all tokens so far, with these.
            diagonal: Leave out the whitening, as in a warm-up.
        """
        values, clamped = [], []
        whiteners: dict[Shape, Tensor] = {}
        if self.config.whiten == "full" and not diagonal:
            for (d_out, d_in), each in statistics.items():
                if each.count > d_out + 1:
                    whiteners[d_out, d_in], share = whitening(each, self._eps, FLOOR)
                    clamped.append(share)
        for linear_map, x, g in zip(self.maps, turn.x, turn.g, strict=True):
            each, d_in = statistics[linear_map.shape], x.shape[1]
            z = torch.cat([x, g], dim=1).double() - each.mean
            deviation = each.deviation(self._eps) + self._eps
            x_hat = z[:, :d_in] / deviation[:d_in]
            whitener = whiteners.get(linear_map.shape)
            g_hat = z[:, d_in:] / deviation[d_in:] if whitener is None else z[:, d_in:] @ whitener
            values.append(-self.config.lr * x_hat.square().sum(dim=1, keepdim=True) * g_hat)
        return values, {"clamped_share": max(clamped)} if clamped else {}

    def update(self, x: Tensor, V: Tensor) -> Update:
        """Return V^T (X X^T + ridge I)^-1 X as factors, or multiplied out where that is smaller."""
        X, dtype = x.double(), working_dtype(self.architecture.dtype)
        adjoint = small_adjoint(X.T, X.T, self.config.ridge)  # (d_in, t)
        return compacted(LowRank(V.T.contiguous().to(dtype), adjoint.T.contiguous().to(dtype)))

    # --- statistics over the ledger ---------------------------------------------------------------------------------

    def past_statistics(self) -> Statistics:
        """Return the statistics of the warm-up and of every edit of this method on the model, by shape."""
        entries, (ids, found) = self._entries(), self._past
        if not ids or ids != tuple(entry.id for entry in entries[: len(ids)]):
            ids, found = (), self._warm_statistics()
        for entry in entries[len(ids) :]:
            for shape in self._shapes:
                if (own := TokenStatistics.from_tensors(entry.state, _prefix(shape))) is not None:
                    found = {**found, shape: own.to(self.architecture.device).merged(found.get(shape))}
            ids = (*ids, entry.id)
        self._past = (ids, found)
        return found

    @property
    def _shapes(self) -> list[Shape]:
        return list(dict.fromkeys(found.shape for found in self.maps))

    def _entries(self) -> list[Entry]:
        return [entry for entry in self.ledger.entries if entry.info.method == self.name and entry.state]

    def _state(self, turn: Turn) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for shape, own in self.statistics(turn).items():
            rows = torch.cat([g for found, g in zip(self.maps, turn.g, strict=True) if found.shape == shape])
            state |= own.tensors(_prefix(shape), rows)
        return state

    # --- warm-up ----------------------------------------------------------------------------------------------------

    def _warm_up_turns(self) -> list[list[EditRequest]]:
        warm_up = self.config.warm_up
        assert warm_up is not None
        if isinstance(warm_up, str):
            requests = read_requests(warm_up)
        else:
            requests = requests_from_text(read_model_settings(self.model).text or FACTBOOK, warm_up)
        size = self.config.warm_up_turn
        return [requests[start : start + size] for start in range(0, len(requests), size)]

    def _warm_statistics(self) -> Statistics:
        """Return the statistics of the warm-up on the untouched model; nothing if there is none, or if it stays."""
        if self.config.warm_up is None or self.config.warm_up_stays:
            return {}
        if self._warm is None:
            found: dict[Shape, TokenStatistics] = {}
            with self.ledger.untouched():
                for turn in self.measure(self._warm_up_turns()):
                    found = {shape: own.merged(found.get(shape)) for shape, own in self.statistics(turn).items()}
            self._warm = found
        return self._warm

    def _apply_warm_up(self) -> tuple[list[Patch], list[str]]:
        """Append the turns of the warm-up to the ledger, and return their patches and the ids of their entries."""
        patches: list[Patch] = []
        ids: list[str] = []
        limit = norm_limit(self.name, self.config.to_dict())
        for i, requests in enumerate(self._warm_up_turns()):
            (turn,) = self.measure([requests])
            solution = self._solution(turn, self.past_statistics(), 0.0, diagonal=True)
            ids.append(f"(warm-up: {i})")
            info = EditInfo(self.name)
            self.ledger.append(ids[-1], solution.patch, info, state=solution.state, max_norm_ratio=limit)
            patches.append(solution.patch)
        return patches, ids

    def _with_warm_up(self, solution: Solution, warm: Sequence[Patch], past: Statistics) -> Solution:
        """Return the solution with the updates and the statistics of the warm-up in it."""
        patch = merge([*warm, solution.patch])
        updates = {name: compacted(update) for name, update in patch.updates.items()}
        state: dict[str, Tensor] = {}
        for shape, before in past.items():
            own = TokenStatistics.from_tensors(solution.state, _prefix(shape))
            state |= before.merged(own).tensors(_prefix(shape))
        return Solution(solution.requests, Patch(updates), solution.diagnostics, state)


def _prefix(shape: Shape) -> str:
    return f"statistics.{shape[0]}x{shape[1]}"


class StableEdit(UltraEdit):
    """UltraEdit with gradients that are whitened in full, and a stronger ridge (Ma et al. 2026)."""

    name = "stableedit"
    Config = StableEditConfig
    config: StableEditConfig
