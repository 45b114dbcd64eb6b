"""Linear regression of a model's outputs on the masks under which they were seen.

    f(mask) ~ b + sum_c w_c mask_c

Two ways to fit it:

- `least_squares`: in closed form. With fewer masks than components the smallest weights are taken that fit; `ridge`
  makes them smaller, which is less noise for some bias.
- `saga`: the loop of the published code (fast_l1's SAGA without a penalty), with its stopping rule. It walks the same
  way and stops early, so that weights of directions that few masks tell apart stay small.

Source: Shah et al. 2024, "Decomposing and Editing Predictions by Modeling Model Computation"; MadryLab/modelcomponents
and MadryLab/fast_l1, which were read.

Shapes: m masks, C components, n outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Fit = Literal["least_squares", "saga"]
FITS: tuple[Fit, ...] = ("least_squares", "saga")
# A pivot of a Cholesky factor below this share of the largest means that masks do not tell all components apart.
_SMALL_PIVOT = 1e-5
# Eigenvalues below this share of the largest count as zero.
_SMALL_EIGENVALUE = 1e-10
_HELD_OUT = 0.1  # the published share of masks that the first walk leaves out


@dataclass(frozen=True)
class SagaSettings:
    """How the loop walks. Defaults are the published ones for GPT-2, where an epoch has 36 steps.

    Attributes:
        lr: Length of a step.
        batch: Masks per step. With fewer masks than that an epoch is one step, and the loop stops early.
        check_every: Epochs between two looks.
        eps: An output rests where no weight has moved by more than the root of this in an epoch, per standard deviation
            of a mask. It is done when it has rested in two looks.
        most_epochs: Where the loop ends in any case.
    """

    lr: float = 1e-3
    batch: int = 2500
    check_every: int = 3
    eps: float = 1e-10
    most_epochs: int = 20_000


PUBLISHED = SagaSettings()


@dataclass(frozen=True)
class MaskFit:
    """A fitted line per output, in float64.

    Attributes:
        weights: (n, C) what an output gains where a component is kept.
        intercepts: (n,) the output where nothing is kept, as the line has it.
    """

    weights: Tensor
    intercepts: Tensor

    def predicted(self, masks: Tensor) -> Tensor:
        """Return the outputs (m, n) that the lines give for masks (m, C)."""
        return masks.double() @ self.weights.T + self.intercepts


def least_squares(masks: Tensor, outputs: Tensor, *, ridge: float = 0.0) -> MaskFit:
    """Fit by least squares, in closed form.

    Args:
        masks: (m, C) bool.
        outputs: (m, n).
        ridge: What is added to the variance of every component's mask, as a share of the mean variance. 0: none, and of
            several best fits the one with the smallest weights.
    """
    X, Y = masks.double(), outputs.double()
    mean, level = X.mean(0), Y.mean(0)
    X, Y = X - mean, Y - level
    m, C = X.shape
    added = ridge * float(X.square().sum(0).mean())
    if m > C:
        weights = _solved(X.T @ X, X.T @ Y, added)
    else:
        # X has no part along the ones, so that the rank of its Gram matrix is m - 1; adding a multiple of that part
        # changes nothing, because Y has none either.
        gram = X @ X.T
        weights = X.T @ _solved(gram + gram.diagonal().mean() / m, Y, added)
    return MaskFit(weights.T.contiguous(), level - mean @ weights)


def _solved(gram: Tensor, right: Tensor, added: float) -> Tensor:
    """Return (gram + added I)^+ right, of a positive semidefinite matrix."""
    gram = gram.clone()
    gram.diagonal().add_(added)
    factor, info = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal()
    if not int(info) and float(pivots.min()) > _SMALL_PIVOT * float(pivots.max()):
        return torch.cholesky_solve(right, factor)
    values, vectors = torch.linalg.eigh(gram)
    kept = values > _SMALL_EIGENVALUE * values.max().clamp_min(torch.finfo(values.dtype).tiny)
    vectors = vectors[:, kept]
    return vectors @ ((vectors.T @ right) / values[kept, None])


def saga(masks: Tensor, outputs: Tensor, *, settings: SagaSettings = PUBLISHED, seed: int = 0) -> MaskFit:
    """Fit by the published loop: without the last tenth of the masks until nothing moves, and then with all of them.

    The released weights are per standard deviation of a component's mask; these are per mask.

    Args:
        masks: (m, C) bool.
        outputs: (m, n).
        settings: Step, batch and stopping rule.
        seed: Of the order of the masks.
    """
    X, Y = masks.double(), outputs.double()
    drawn = torch.Generator().manual_seed(seed)
    weights, bias = X.new_zeros(X.shape[1], Y.shape[1]), Y.new_zeros(Y.shape[1])
    for count in dict.fromkeys((max(1, len(X) - round(_HELD_OUT * len(X))), len(X))):
        mean, spread = X[:count].mean(0), X[:count].std(0, correction=0)
        _walk((X[:count] - mean) / (spread + 1e-32), Y[:count], spread, weights, bias, settings, drawn)
    own = weights.T / spread.clamp_min(1e-32)  # a weight without spread has never moved from 0
    return MaskFit(own.contiguous(), bias - own @ mean)


def _walk(
    X: Tensor,
    Y: Tensor,
    spread: Tensor,
    weights: Tensor,
    bias: Tensor,
    settings: SagaSettings,
    drawn: torch.Generator,
) -> None:
    """Change weights (C, n) and bias (n,) by steps of SAGA, until each output has been at rest in two looks."""
    m = len(X)
    table, mean_gradient, mean_residual = torch.zeros_like(Y), torch.zeros_like(weights), torch.zeros_like(bias)
    rests = torch.zeros(len(bias), dtype=torch.int64)
    going = torch.arange(len(bias))
    for epoch in range(1, settings.most_epochs + 1):
        before = weights[:, going].clone()
        for rows in torch.randperm(m, generator=drawn).to(X.device).chunk(-(-m // settings.batch)):
            x, last = X[rows], table[rows][:, going]
            residual = x @ weights[:, going] - (Y[rows][:, going] - bias[going])
            change = residual - last
            gradient = x.T @ change / len(rows) + mean_gradient[:, going]
            level = change.mean(0) + mean_residual[going]
            weights[:, going] -= settings.lr * gradient
            bias[going] -= settings.lr * level
            table[rows[:, None], going] = residual
            share = len(rows) / m
            mean_gradient[:, going] += share * (gradient - mean_gradient[:, going])
            mean_residual[going] += share * (level - mean_residual[going])
        if epoch % settings.check_every == 0:
            moved = ((weights[:, going] - before).square() * spread.square()[:, None]).amax(0)
            rests[going] += (moved < settings.eps).cpu()
            going = (rests < 2).nonzero()[:, 0]
            if not len(going):
                return


def fitted(masks: Tensor, outputs: Tensor, fit: Fit = "least_squares", *, ridge: float = 0.0, seed: int = 0) -> MaskFit:
    """Return the fit by its name; arguments as `least_squares` and `saga`."""
    return saga(masks, outputs, seed=seed) if fit == "saga" else least_squares(masks, outputs, ridge=ridge)
