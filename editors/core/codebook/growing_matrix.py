"""A matrix that grows by rows, of which every earlier length stays at hand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class _Memory:
    """Memory that several `GrowingMatrix` share, and how many of its rows are taken."""

    def __init__(self, matrix: Tensor, squares: Tensor, taken: int) -> None:
        self.matrix, self.squares, self.taken = matrix, squares, taken


@dataclass(frozen=True, eq=False)
class GrowingMatrix:
    """A matrix (n, d) and its squared row lengths, cheap to extend and never changed: longer ones share its memory,
    which doubles when it is full. Where two extend the same, the second takes a copy."""

    memory: _Memory
    count: int

    @classmethod
    def empty(cls, like: Tensor) -> GrowingMatrix:
        """Without rows; width, dtype and device of `like`."""
        return cls(_Memory(like.new_empty(0, like.shape[1]), like.new_empty(0), 0), 0)

    @property
    def matrix(self) -> Tensor:
        """(n, d)."""
        return self.memory.matrix[: self.count]

    @property
    def squares(self) -> Tensor:
        """(n,)."""
        return self.memory.squares[: self.count]

    def extended(self, rows: Tensor) -> GrowingMatrix:
        """With more rows (m, d) behind them."""
        memory, end = self.memory, self.count + len(rows)
        if memory.taken != self.count or end > len(memory.squares):
            memory = self._copied(max(16, 2 * self.count, end))
        memory.matrix[self.count : end], memory.squares[self.count : end] = rows, rows.square().sum(1)
        memory.taken = end
        return GrowingMatrix(memory, end)

    def products(self, x: Tensor) -> Tensor:
        """||r||^2 - 2 x.r for every row r, (m, n): the squared distances of x (m, d) but for its own squared length."""
        return torch.addmm(self.squares, x, self.matrix.T, alpha=-2)

    def replaced(self, place: int, row: Tensor) -> GrowingMatrix:
        """With another row (d,) at a place."""
        memory = self._copied(len(self.memory.squares))
        memory.matrix[place], memory.squares[place] = row, row.square().sum()
        return GrowingMatrix(memory, self.count)

    def copy(self) -> GrowingMatrix:
        """A copy in memory of its own, with as much room."""
        return GrowingMatrix(self._copied(len(self.memory.squares)), self.count)

    def to(self, device: torch.device) -> GrowingMatrix:
        """A copy on another device."""
        return GrowingMatrix(_Memory(self.matrix.to(device), self.squares.to(device), self.count), self.count)

    def _copied(self, room: int) -> _Memory:
        memory = _Memory(self.matrix.new_empty(room, self.matrix.shape[1]), self.squares.new_empty(room), self.count)
        memory.matrix[: self.count], memory.squares[: self.count] = self.matrix, self.squares
        return memory
