"""The keys of earlier edits, which a later edit should leave alone, as a factor that grows with them.

    (S + K_p K_p^T)^-1,    S = H^T H,    as the factor over the columns H^-T K_p        (null_space.GrowingFactor)

The keys are in the ledger's entries. So an undone edit no longer counts, and another model has its own keys. The factor
is kept between edits, and made again after an undo.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from errata.editors.core.errors import NumericalError
from errata.editors.core.solve.null_space import GrowingFactor

Past = Sequence[tuple[str, Tensor]]  # (id of an edit, its keys (d_in, n)), in the order of the ledger


class PastKeys:
    """One growing factor per layer."""

    def __init__(self) -> None:
        # By layer: ids of entries, and the factor over their keys.
        self._past: dict[int, tuple[tuple[str, ...], GrowingFactor]] = {}
        # By layer: the factor over past keys, the keys of the last solve, and the factor over both. If those keys enter
        # the ledger, as they usually do, the third is the next `_past`.
        self._expected: dict[int, tuple[GrowingFactor, Tensor, GrowingFactor]] = {}

    def adjoint(self, layer: int, past: Past, K: Tensor, columns: Callable[[Tensor], Tensor], ridge: float) -> Tensor:
        """Return Q (ridge I + Q^T Q)^-1 E, (d_in, n), with Q the columns of all keys and E those of K.

        Args:
            layer: The layer.
            past: The keys of earlier edits.
            K: (d_in, n) the keys of the present edit, as the ledger will hold them.
            columns: What makes columns of keys.
            ridge: The regularisation.

        Raises:
            NumericalError: The ridge is too small for these keys.
        """
        factor = self.factor(layer, past, columns, ridge)
        adjoint, following = factor.append(columns(K))
        self._expected[layer] = (factor, K, following)
        return adjoint

    def factor(self, layer: int, past: Past, columns: Callable[[Tensor], Tensor], ridge: float) -> GrowingFactor:
        """Return the factor over the past keys: the last one, extended by new keys; a new one after an undo."""
        ids, factor = self._past.get(layer, ((), None))
        if factor is None or factor.ridge != ridge or ids != tuple(id_ for id_, _ in past[: len(ids)]):
            ids, factor = (), GrowingFactor.empty(ridge)
        for id_, keys in past[len(ids) :]:
            try:
                ids, factor = (*ids, id_), self._with(layer, factor, keys, columns)
            except NumericalError as error:
                # Without a row number: the error is about an earlier edit, not about one of the present requests.
                raise NumericalError(f"with the keys of {id_}: {error.message}") from error
        self._past[layer] = (ids, factor)
        return factor

    def _with(
        self, layer: int, factor: GrowingFactor, keys: Tensor, columns: Callable[[Tensor], Tensor]
    ) -> GrowingFactor:
        """Return the factor with these keys added; it is known already if they are the keys of the last solve."""
        base, expected, following = self._expected.get(layer, (None, None, None))
        if base is factor and expected is not None and following is not None and torch.equal(expected, keys):
            return following
        return factor.append(columns(keys))[1]
