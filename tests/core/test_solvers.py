"""The fast solves are the plain formulas of the papers, in float64, whatever the shapes; and say when they cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from errata.editors.core.errors import NumericalError, StatisticsError
from errata.editors.core.solve import solvers
from errata.editors.core.solve.null_space import GrowingFactor, Projector, dense_adjoint

sizes = st.integers(3, 24)
counts = st.integers(1, 30)
seeds = st.integers(0, 2**31)


def keys(d: int, n: int, seed: int) -> Tensor:
    return torch.randn(d, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(d: int, seed: int) -> Tensor:
    X = keys(d, 3 * d, seed + 1) * torch.logspace(0, -1, d, dtype=torch.float64)[:, None]
    return X @ X.T / X.shape[1]


def projector(d: int, rank: int, seed: int) -> Tensor:
    Q, _ = torch.linalg.qr(keys(d, d, seed + 2))
    return Q[:, :rank] @ Q[:, :rank].T


def close(ours: Tensor, truth: Tensor) -> None:
    assert float((ours.double() - truth).norm()) <= 1e-8 * float(truth.norm() + 1e-12)


@settings(max_examples=60, deadline=None)
@given(d=sizes, n=counts, seed=seeds, weight=st.sampled_from([0.5, 30.0, 15000.0]))
def test_memit_s_adjoint_is_the_solve_on_both_sides_of_the_crossover(d: int, n: int, seed: int, weight: float) -> None:
    C, K = moment(d, seed), keys(d, n, seed)
    truth = torch.linalg.solve(weight * C + K @ K.T, K)
    close(solvers.memit_adjoint(K, lambda: C, weight, solvers.factorise(C)), truth)
    close(solvers.memit_adjoint(K, lambda: C, weight, None), truth)


@settings(max_examples=60, deadline=None)
@given(d=sizes, n=counts, seed=seeds)
def test_rome_s_direction_and_value_send_each_key_to_its_residual_along_the_whitened_key(
    d: int, n: int, seed: int
) -> None:
    C, K, R = moment(d, seed), keys(d, n, seed).T, keys(d, n, seed + 3).T
    U = solvers.update_directions(K, solvers.factorise(C))
    whitened = torch.linalg.solve(C, K.T).T
    close(U, whitened / whitened.norm(dim=1, keepdim=True))
    close(solvers.update_directions(K, None), K / K.norm(dim=1, keepdim=True))
    other = keys(d, n, seed + 4).T  # solved at another key than the direction is from
    V = solvers.rank_one_values(R, other, U)
    close(torch.einsum("nd,nk,nk->nd", V, U, other), R)


@settings(max_examples=60, deadline=None)
@given(d=sizes, n=counts, seed=seeds, ridge=st.sampled_from([0.1, 10.0]))
def test_emmet_s_adjoint_is_its_formula(d: int, n: int, seed: int, ridge: float) -> None:
    C, K = moment(d, seed), keys(d, n, seed)
    inverse = torch.linalg.inv(C)
    truth = (torch.linalg.inv(K.T @ inverse @ K + ridge * torch.eye(n, dtype=torch.float64)) @ K.T @ inverse).T
    close(solvers.small_adjoint(K, solvers.factorise(C).solve(K), ridge), truth)


@settings(max_examples=60, deadline=None)
@given(d=sizes, batches=st.lists(st.integers(1, 5), min_size=1, max_size=6), seed=seeds, data=st.data())
def test_the_growing_factor_gives_every_batch_the_direct_solve(
    d: int, batches: list[int], seed: int, data: st.DataObject
) -> None:
    P = projector(d, data.draw(st.integers(1, d)), seed)
    factor, M = GrowingFactor.empty(0.1), torch.zeros(d, 0, dtype=torch.float64)
    for i, n in enumerate(batches):
        K = keys(d, n, seed + 10 + i)
        M = torch.cat([M, K], dim=1)
        adjoint, factor = factor.append(P @ K)
        truth = torch.linalg.solve(P @ M @ M.T + 0.1 * torch.eye(d, dtype=torch.float64), P @ K)
        close(adjoint, truth)
        close(dense_adjoint(P, M, n, 0.1), truth)


def test_the_null_space_is_that_of_the_small_eigenvalues() -> None:
    Q, _ = torch.linalg.qr(keys(8, 8, 0))
    values = torch.tensor([0.001, 0.002, 0.01, 0.03, 0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    C = Q @ torch.diag(values) @ Q.T
    P = Projector.null_space(C, threshold=0.02)
    assert (P.dimensions, P.form) == (3, "span")
    close(P.matrix(), Q[:, :3] @ Q[:, :3].T)
    by_share = Projector.null_space(1e6 * C, threshold=0.0, energy=0.043 / float(values.sum()) + 1e-9)
    assert by_share.dimensions == 4, "a share of the trace does not depend on the scale"
    close(by_share.matrix(), Q[:, :4] @ Q[:, :4].T)
    with pytest.raises(StatisticsError, match=r"the smallest is 0\.001"):
        Projector.null_space(C, threshold=1e-6)


def test_a_projector_is_the_same_in_each_of_its_forms() -> None:
    Q, _ = torch.linalg.qr(keys(12, 12, 0))
    C = Q @ torch.diag(torch.arange(1.0, 13.0).double()) @ Q.T
    for dimensions, form in ((5, "span"), (6, "span"), (7, "complement"), (12, "complement")):
        P = Projector.null_space(C, threshold=dimensions + 0.5)
        assert (P.dimensions, P.form) == (dimensions, form)
        whole = Projector.from_matrix(Q[:, :dimensions] @ Q[:, :dimensions].T)
        assert whole.dimensions == dimensions
        close(P.matrix(), whole.matrix())
        close(P @ keys(12, 4, 1), whole @ keys(12, 4, 1))
        assert P.is_exact
        assert whole.is_exact


def test_what_is_no_projector_is_noticed() -> None:
    P = projector(16, 7, 3)
    assert Projector.from_matrix(P.float()).is_exact
    assert not Projector.from_matrix(1.01 * P).is_exact
    skewed = torch.linalg.inv(torch.eye(16, dtype=torch.float64) + 0.3 * torch.triu(keys(16, 16, 4), 1))
    oblique = skewed @ P @ torch.linalg.inv(skewed)
    assert float((oblique @ oblique - oblique).norm()) < 1e-8
    assert not Projector.from_matrix(oblique).is_exact, "idempotent, but not symmetric"


def test_a_singular_moment_has_no_factor_and_no_hidden_ridge() -> None:
    K = keys(12, 5, 0)
    C = K @ K.T
    with pytest.raises(StatisticsError, match=r"singular: it was collected from too few .* tokens; give more text"):
        solvers.factorise(C)
    # With enough keys of the batch the sum has an inverse, and that is what is used.
    batch = keys(12, 12, 1)
    truth = torch.linalg.solve(2.0 * C + batch @ batch.T, batch)
    close(solvers.memit_adjoint(batch, lambda: C, 2.0, None), truth)
    with pytest.raises(StatisticsError, match="plus the keys of the batch"):
        solvers.memit_adjoint(keys(12, 2, 2), lambda: C, 2.0, None)


@pytest.mark.parametrize(
    ("solve", "message", "rows"),
    [
        (
            lambda K: solvers.small_adjoint(torch.cat([K, K], 1), torch.cat([K, K], 1), 0.0),
            "depend on each other",
            {3, 4, 5},
        ),
        (lambda K: solvers.small_adjoint(0 * K[:, :1], K[:, :1], 0.0), "zero or not finite", {0}),
        (lambda K: solvers.check_keys(K / torch.tensor([1.0, 1.0, 0.0])), "zero or not finite", {2}),
        (lambda K: solvers.update_directions(0 * K.T, None), "zero or not finite", {0}),
        (lambda K: solvers.update_directions((K * torch.tensor([1.0, 0.0, 1.0])).T, None), "zero or not finite", {1}),
        (lambda K: solvers.rank_one_values(K.T, torch.eye(8)[:3], torch.eye(8)[[0, 3, 2]]), "orthogonal to", {1}),
        (lambda K: GrowingFactor.empty(1.0).append(K / torch.tensor([1.0, 0.0, 1.0])), "L2 = 1 is too small", {1}),
        (lambda K: dense_adjoint(-torch.eye(len(K)), torch.eye(8), 2, 1.0), "singular at L2 = 1", {None}),
    ],
)
def test_a_solve_without_an_answer_is_a_typed_error_that_says_whose_it_is(
    solve: Any, message: str, rows: set[int | None]
) -> None:
    with pytest.raises(NumericalError, match=message) as caught:
        solve(keys(8, 3, 0))
    assert caught.value.row in rows
