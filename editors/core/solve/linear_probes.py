"""Linear probes of two classes by logistic regression, many at once.

min over w, c:  sum_i log(1 + exp(-y_i (w . x_i + c))) + |w|^2 / 2

It is what scikit-learn's LogisticRegression minimises by default (C = 1, the intercept is not penalised), solved here
to the end by Newton's method in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

_STEPS = 30


def fit_probes(x: Tensor, is_positive: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights and intercepts of probes, (p, d) and (p,), in float64.

    Args:
        x: (p, n, d) the vectors of each probe.
        is_positive: (n,) bool.
    """
    p, n, d = x.shape
    x = torch.cat([x.double(), torch.ones(p, n, 1, dtype=torch.float64)], dim=2)
    y = is_positive.double().expand(p, n)
    penalty = torch.ones(d + 1, dtype=torch.float64)
    penalty[-1] = 0
    w = torch.zeros(p, d + 1, dtype=torch.float64)
    for _ in range(_STEPS):
        chance = torch.sigmoid((x @ w[..., None])[..., 0])
        slope = ((chance - y)[:, None] @ x)[:, 0] + penalty * w
        weight = chance * (1 - chance)
        # The intercept has no penalty: a little keeps the system regular where all chances are 0 or 1.
        curve = (x * weight[..., None]).mT @ x + torch.diag(penalty.clamp_min(1e-12))
        step = torch.linalg.solve(curve, slope[..., None])[..., 0]
        w = w - _shortened(x, y, w, step, penalty) * step
        if float(step.abs().max()) < 1e-10:
            break
    return w[:, :-1], w[:, -1]


def probe_accuracy(x: Tensor, is_positive: Tensor, weights: Tensor, intercepts: Tensor) -> Tensor:
    """Return the share of vectors that each probe puts on the right side, (p,). Arguments as of `fit_probes`."""
    says = (x.double() @ weights[..., None])[..., 0] + intercepts[:, None] > 0
    return (says == is_positive).double().mean(1)


def _shortened(x: Tensor, y: Tensor, w: Tensor, step: Tensor, penalty: Tensor) -> Tensor:
    """Return by how much of its length each step is taken, (p, 1): the first half that does not raise the loss."""

    def loss(at: Tensor) -> Tensor:
        logits = (x @ at[..., None])[..., 0]
        fit = torch.nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="none").sum(1)
        return fit + (penalty * at.square()).sum(1) / 2

    before, size = loss(w), torch.ones(len(w), 1, dtype=torch.float64)
    for _ in range(20):
        is_worse = loss(w - size * step) > before + 1e-12
        if not bool(is_worse.any()):
            break
        size = torch.where(is_worse[:, None], size / 2, size)
    return size
