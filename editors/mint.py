"""MINT: neurons of the upper MLPs are pulled, one after another, towards a direction that speaks for the answer.

    w <- (w + f d) / (1 + f),    d = delta / (max delta - min delta),    delta = B[y] - B[a],    B = pinv(W_U^T)

Gu et al. 2023, "Neuron Patching: Semantic-based Neuron-level Language Model Repair for Code Generation". It needs no
optimizer and no second moment. An answer token that the model does not choose costs one backward pass, and a forward
pass per patch.

1. The answer is read once, teacher-forced. Its tokens y that are not the model's choice a are taken in order.
2. Locate: a neuron's score is || (dP/dh * h)_n || over the prompt's tokens, with P the probability of y. The
   `candidates` neurons with the largest scores are kept (MINT's quantile, over all neurons of the model).
3. Patch: every candidate is tried, and the one that leaves the smallest P(a) - P(y) is patched. This is repeated, with
   the present choice as a, until the model chooses y.
4. After `max_patches` without success the token is given up, and its patches are undone.

Tries do not write to the model: all candidates run as one batch from the lowest edited block on, each with its own
change (core/forward/changed_neurons.py).

The authors' code that can be read is their later toolkit. This file differs from it in little:

- The prompt and the tokens of the answer so far are read as they are tokenised together. They decode the answer's
  tokens and tokenise prompt and text anew for each.
- B is solved from W_U^T W_U in float64, for the tokens in question only. Singular values below the limit of
  `torch.linalg.pinv` in float32 are left out, as they are in theirs.
- A neuron without a score is no candidate. Where all scores are zero, they have all neurons of the model as candidates.

The report has the neurons in the order of their patches, and which tokens are wrong in the end: a later token's
patches may undo an earlier one.

Legend: h (T, d_in) input of a down projection W (d, d_in); w (d,) column n of W; W_U (V, d) the head.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from errata.editors.core.config import EditorConfig, check_layers, check_positive
from errata.editors.core.dtypes import working_dtype
from errata.editors.core.edit import Solution
from errata.editors.core.editor import Editor
from errata.editors.core.errors import ArchitectureError, NumericalError
from errata.editors.core.families.fine_tuning import prompt_and_answer
from errata.editors.core.forward.changed_neurons import Changes, Neuron, PatchedRow
from errata.editors.core.ledger.interrupts import safe_point
from errata.editors.core.ledger.patch import LowRank, Patch, Update
from errata.editors.core.model.activations import limit_batch_tokens
from errata.editors.core.model.tokens import pad_id
from errata.editors.core.request import EditRequest

HEAD_ROWS = 4096  # rows of the head that are in float64 at once


@dataclass(frozen=True, kw_only=True)
class MINTConfig(EditorConfig):
    """MINT's fields. Defaults are those of the authors' toolkit."""

    layers: tuple[int, ...] | None = None
    """Layers whose neurons may be patched; null: those that `depth` says."""

    depth: Literal["half", "all", "fourth", "last3"] = "half"
    """The upper half of the layers, all, the upper fourth, or the last three."""

    locate: Literal["attribution", "activation", "random"] = "attribution"
    """What scores a neuron: gradient times activation, the activation alone, or chance."""

    direction: Literal["delta", "basis"] = "delta"
    """What a neuron is pulled towards: B[y] - B[a], or a point between the embedding of the last token read and B[y],
    nearer to B[y] in higher layers."""

    factor: float = 0.01
    """f: how far one patch pulls a neuron."""

    max_patches: int = 10
    """Patches per token of the answer, after which it is given up."""

    candidates: int = 10
    """Neurons that are tried for a token."""

    orthogonal: bool = False
    """Whether the direction of a token is made orthogonal to those of the answer's earlier tokens."""

    batch_tokens: int = 8192
    """Bound on the tokens of the candidates that are tried at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("factor", "max_patches", "candidates", "batch_tokens"))


def layers_of(depth: str, count: int) -> tuple[int, ...]:
    """Return the layers that `depth` names, of a model that has `count`."""
    first = {"half": count // 2, "all": 0, "fourth": count - max(1, count // 4), "last3": count - 3}[depth]
    return tuple(range(max(0, first), count))


def patched(w: Tensor, direction: Tensor, factor: float) -> Tensor:
    """Return a neuron's value vector (d,) after one patch towards `direction` (d,)."""
    return (w + factor * direction) / (1 + factor)


def ranged(direction: Tensor) -> Tensor:
    """Return a direction (d,) over the distance between its largest and its smallest element; zeros stay zeros."""
    width = direction.max() - direction.min()
    return direction / width if width > 0 else torch.zeros_like(direction)


def apart_from(direction: Tensor, earlier: Sequence[Tensor]) -> Tensor:
    """Return a direction (d,) made orthogonal to unit directions that are so to each other, with its norm as before."""
    rest = direction
    for unit in earlier:
        rest = rest - (rest @ unit) * unit
    return rest * (direction.norm() / rest.norm()) if rest.norm() > 0 else rest


class AnswerDirections:
    """Rows of B = pinv(W_U^T) (V, d): what the residual stream needs so that the head hears one token.

    Args:
        head: W_U (V, d).
    """

    def __init__(self, head: Tensor) -> None:
        self.head, self.dtype = head, working_dtype(head.dtype)
        width = head.shape[1]
        gram = torch.zeros(width, width, dtype=torch.float64, device=head.device)
        for rows in head.split(HEAD_ROWS):
            gram.addmm_(rows.double().T, rows.double())
        values, vectors = torch.linalg.eigh(gram)
        cut = max(max(head.shape) * torch.finfo(self.dtype).eps, (width * torch.finfo(torch.float64).eps) ** 0.5)
        kept = values > cut**2 * values.max()
        self.rank = int(kept.sum())
        self._inverse = (vectors[:, kept] / values[kept]) @ vectors[:, kept].T

    def __getitem__(self, token: int) -> Tensor:
        """Return B[token] (d,), in the working precision."""
        return (self.head[token].double() @ self._inverse).to(self.dtype)


@dataclass
class Located:
    """The neurons that are tried for a token.

    Attributes:
        scores: (d_in,) by layer.
        threshold: The least score of a candidate.
        neurons: The candidates, lowest layer and column first.
        probabilities: (V,) after the prompt, on the model as patched so far.
    """

    scores: dict[int, Tensor]
    threshold: float
    neurons: list[Neuron]
    probabilities: Tensor


@dataclass
class TokenReport:
    """How one token of the answer went; `neurons` is empty if it was given up."""

    index: int
    neurons: list[Neuron]
    tries: int
    gaps: tuple[float, float]


class MINT(Editor):
    """Neurons of the upper MLPs, patched one by one until the model chooses the answer (Gu et al. 2023)."""

    name = "mint"
    Config = MINTConfig
    config: MINTConfig

    def setup(self) -> None:
        architecture, given = self.architecture, self.config.layers
        count = architecture.n_layers
        dense = [layer for layer in layers_of(self.config.depth, count) if architecture.down_paths[layer] is not None]
        self.layers = check_layers(given, count) if given is not None else tuple(dense or [count - 1])
        maps = [architecture.map_at(layer) for layer in self.layers]
        architecture.check_writable(maps)
        architecture.check_trainable(maps)
        head = architecture.head._parameters.get("weight")
        if head is None or not head.is_floating_point() or head.shape[1:] != (architecture.d_model,):
            raise ArchitectureError(
                f"MINT needs a head that reads the residual stream of width {architecture.d_model} with one plain "
                f"matrix, got {'none' if head is None else tuple(head.shape)}"
            )
        self.pad = pad_id(self.tokenizer)
        self._batch_tokens = limit_batch_tokens(self.config.batch_tokens, architecture.device)
        self._answers: AnswerDirections | None = None
        if given is None:
            self.filled_in = {"layers": list(self.layers)}

    def answers(self) -> AnswerDirections:
        """Return the directions of tokens, from the head as it is when they are first needed."""
        if self._answers is None:
            with self.clock.one_off("factors"):
                self._answers = AnswerDirections(self.architecture.head.get_parameter("weight").detach())
        return self._answers

    def solve(self, requests: Sequence[EditRequest]) -> list[Solution]:
        solutions = []
        for done, request in enumerate(requests):
            safe_point()
            self.progress(done, len(requests), "patching neurons")
            try:
                solutions.append(self._solve_one(request))
            except NumericalError as error:
                raise error.of(request.id) from error
        return solutions

    def _solve_one(self, request: EditRequest) -> Solution:
        started = time.perf_counter()
        ids, answer = prompt_and_answer(self.architecture, self.tokenizer, request)
        choices = self._choices(ids, answer, Changes())
        changes, reports = Changes(), []
        history: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}
        random = torch.Generator().manual_seed(self.config.seed)
        for index, (wanted, chosen) in enumerate(zip(answer, choices, strict=True)):
            if wanted != chosen:
                row = self._row((*ids, *answer[:index]))
                changes, report = self._patch(row, index, wanted, chosen, changes, history, random)
                reports.append(report)
        wrong = [i for i, (w, c) in enumerate(zip(answer, self._choices(ids, answer, changes), strict=True)) if w != c]
        patches = [neuron for report in reports for neuron in report.neurons]
        described = {
            "neurons": [list(neuron) for neuron in patches],
            "tokens": len(answer),
            "patched_tokens": [report.index for report in reports if report.neurons],
            "skipped_tokens": [report.index for report in reports if not report.neurons],
            "wrong_tokens": wrong,
            "tries": [report.tries for report in reports],
            "gaps": [list(report.gaps) for report in reports],
            "layers": sorted({layer for layer, _ in patches}),
            "seconds": time.perf_counter() - started,
        }
        return Solution((request,), Patch(self._updates(changes)), (described,))

    def _row(self, ids: Sequence[int]) -> PatchedRow:
        return PatchedRow(self.architecture, ids, self.layers, pad=self.pad, batch_tokens=self._batch_tokens)

    def _choices(self, ids: Sequence[int], answer: Sequence[int], changes: Changes) -> list[int]:
        """Return the model's choice for each token of the answer, teacher-forced in one pass."""
        row = self._row((*ids, *answer[:-1]))
        return _finite(row.answer_logits(changes, len(answer))).argmax(-1).tolist()

    def _updates(self, changes: Changes) -> dict[str, Update]:
        """Return the changes as factors: the changed columns beside rows that are 1 at one neuron. Without changes, it
        is one factor of zeros."""
        updates: dict[str, Update] = {}
        for layer in self.layers:
            found = changes.of_layer(layer)
            if found is not None:
                V = torch.eye(self.architecture.weight(layer).shape[1])[found[0]].to(found[1])
                updates[self.architecture.weight_name(layer)] = LowRank(found[1].T.contiguous(), V)
        if not updates:
            W = self.architecture.weight(self.layers[-1])
            zeros = W.new_zeros(W.shape[0], 1), W.new_zeros(1, W.shape[1])
            updates[self.architecture.weight_name(self.layers[-1])] = LowRank(*zeros)
        return updates

    # --- one token of the answer ------------------------------------------------------------------------------------

    def _patch(
        self,
        row: PatchedRow,
        index: int,
        wanted: int,
        chosen: int,
        changes: Changes,
        history: Mapping[int, list[Tensor]],
        random: torch.Generator,
    ) -> tuple[Changes, TokenReport]:
        """Patch neurons until the model chooses the token, or give it up.

        Args:
            row: The prompt with the answer so far.
            index: Index of the token in the answer.
            wanted: The token, y.
            chosen: The model's choice before any patch, a.
            changes: Those of the tokens before.
            history: By layer, the unit directions of the tokens before that were written; grows by this token's.
            random: Where `locate=random` draws from.

        Returns:
            The changes with those of this token, and its report.
        """
        located = self.locate(row, wanted, changes, random)
        directions = self.directions(row, wanted, chosen, history)
        before = float(located.probabilities[chosen] - located.probabilities[wanted])
        now, patches, first, columns = changes, [], chosen, self._columns(located.neurons)
        for tries in range(1, self.config.max_patches + 1):
            safe_point()
            if not located.neurons:
                return changes, TokenReport(index, [], tries - 1, (before, before))
            steps = [(n, self._step(w, now.columns.get(n), directions[n[0]])) for n, w in columns.items()]
            gaps, probabilities = self.gaps(row, now, steps, wanted, chosen)
            best = min(range(len(steps)), key=lambda i: (gaps[i], steps[i][0]))
            now, chosen = now.with_added(*steps[best]), int(probabilities[best].argmax())
            patches.append(steps[best][0])
            if chosen == wanted:
                for layer, direction in directions.items():
                    history[layer].append(nn.functional.normalize(direction, dim=0))
                after = float(probabilities[best][first] - probabilities[best][wanted])
                return now, TokenReport(index, patches, tries, (before, after))
        return changes, TokenReport(index, [], self.config.max_patches, (before, before))

    def locate(self, row: PatchedRow, wanted: int, changes: Changes, random: torch.Generator) -> Located:
        """Return the neurons with the largest scores for a token."""
        gradients = self.config.locate == "attribution"
        logits, seen = row.with_inputs(changes, gradients=gradients)
        logits = _finite(logits.to(working_dtype(logits.dtype)))
        probabilities = logits.detach().softmax(-1)
        inputs = {layer: x.detach().to(logits.dtype).reshape(len(row.ids), -1) for layer, x in seen.items()}
        if gradients:  # dP/dh = P dlog P/dh, which does not underflow where P is tiny
            found = torch.autograd.grad(logits.log_softmax(-1)[wanted], list(seen.values()))
            for (layer, h), gradient in zip(list(inputs.items()), found, strict=True):
                inputs[layer] = gradient.to(h).reshape(h.shape) * h
        scores = {layer: h.norm(dim=0) for layer, h in inputs.items()}
        if self.config.locate == "random":
            scores = {layer: torch.rand(len(s), generator=random).to(s) for layer, s in scores.items()}
        flat = torch.cat([s.to(logits.device) for s in scores.values()])
        unscored = (self.architecture.n_layers - len(scores)) * self.architecture.d_mlp
        threshold = _threshold(flat, len(flat) + unscored, self.config.candidates)
        kept = {at: ((s >= threshold) & (s > 0)).nonzero().flatten().tolist() for at, s in scores.items()}
        scale = float(probabilities[wanted]) if gradients else 1.0
        return Located(
            {layer: scale * s for layer, s in scores.items()},
            scale * threshold,
            [(layer, n) for layer, columns in kept.items() for n in columns],
            probabilities,
        )

    def directions(
        self, row: PatchedRow, wanted: int, chosen: int, history: Mapping[int, Sequence[Tensor]]
    ) -> dict[int, Tensor]:
        """Return what neurons are pulled towards, (d,) by layer."""
        answers, count = self.answers(), self.architecture.n_layers
        if self.config.direction == "delta":
            towards = dict.fromkeys(self.layers, ranged(answers[wanted] - answers[chosen]))
        else:
            embedding = self.architecture.base.get_input_embeddings().weight[row.ids[-1]]  # type: ignore[operator]
            start, end = embedding.detach().to(answers[wanted]), answers[wanted]
            towards = {layer: ranged(start.lerp(end, (layer + 1) / count)) for layer in self.layers}
        if not self.config.orthogonal:
            return towards
        return {layer: apart_from(direction, history[layer]) for layer, direction in towards.items()}

    def gaps(
        self, row: PatchedRow, changes: Changes, steps: Sequence[tuple[Neuron, Tensor]], wanted: int, chosen: int
    ) -> tuple[list[float], Tensor]:
        """Return P(a) - P(y) with each of the steps, and the probabilities (n, V) themselves."""
        logits = _finite(row.logits(changes, steps))
        probabilities = logits.to(working_dtype(logits.dtype)).softmax(-1)
        return (probabilities[:, chosen] - probabilities[:, wanted]).tolist(), probabilities

    def _columns(self, neurons: Sequence[Neuron]) -> dict[Neuron, Tensor]:
        """Return the value vectors (d,) of neurons as they are in the model, in the working precision."""
        weights = {layer: self.architecture.weight(layer) for layer in {layer for layer, _ in neurons}}
        dtype = working_dtype(self.architecture.dtype)
        return {(layer, column): weights[layer][:, column].to(dtype) for layer, column in neurons}

    def _step(self, w: Tensor, before: Tensor | None, direction: Tensor) -> Tensor:
        """Return what one more patch adds to a neuron (d,) that was `w`, and to which `before` has been added."""
        w = w if before is None else w + before
        return patched(w, direction.to(w), self.config.factor) - w


def _threshold(scores: Tensor, count: int, candidates: int) -> float:
    """Return the 1 - candidates / count quantile of `count` scores: those given, and zeros."""
    above, below = (
        float(scores.kthvalue(len(scores) - i).values) if i < len(scores) else 0.0 for i in (candidates - 1, candidates)
    )
    return below + candidates / count * (above - below)


def _finite(logits: Tensor) -> Tensor:
    if not bool(torch.isfinite(logits).all()):
        raise NumericalError("the model gives logits that are NaN or inf; load it in float32")
    return logits
