"""A matrix that grows by rows while every earlier, shorter version stays valid. GRACE keeps its keys in one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class _Memory:
    """Memory that several versions of a `GrowingMatrix` share, and how many of its rows are taken."""

    def __init__(self, matrix: Tensor, squares: Tensor, taken: int) -> None:
        self.matrix, self.squares, self.taken = matrix, squares, taken


@dataclass(frozen=True, eq=False)
class GrowingMatrix:
    """A matrix (n, d) and its squared row lengths: immutable, and cheap to extend.

    Longer versions share its memory, which doubles when it is full. If two versions extend the same one, the second
    takes a copy.
    """

    memory: _Memory
    count: int

    @classmethod
    def empty(cls, like: Tensor) -> GrowingMatrix:
        """Return a matrix without rows, with the width, dtype and device of `like`."""
        return cls(_Memory(like.new_empty(0, like.shape[1]), like.new_empty(0), 0), 0)

    @property
    def matrix(self) -> Tensor:
        """(n, d): the rows."""
        return self.memory.matrix[: self.count]

    @property
    def squares(self) -> Tensor:
        """(n,): the squared lengths of the rows."""
        return self.memory.squares[: self.count]

    def extended(self, rows: Tensor) -> GrowingMatrix:
        """Return the matrix with the rows (m, d) appended."""
        memory, end = self.memory, self.count + len(rows)
        if memory.taken != self.count or end > len(memory.squares):
            memory = self._copied(max(16, 2 * self.count, end))
        memory.matrix[self.count : end], memory.squares[self.count : end] = rows, rows.square().sum(1)
        memory.taken = end
        return GrowingMatrix(memory, end)

    def products(self, x: Tensor) -> Tensor:
        """Return ||r||^2 - 2 x.r for every row r, (m, n): the squared distances to x (m, d) minus ||x||^2."""
        return torch.addmm(self.squares, x, self.matrix.T, alpha=-2)

    def replaced(self, index: int, row: Tensor) -> GrowingMatrix:
        """Return the matrix with another row (d,) at `index`."""
        memory = self._copied(len(self.memory.squares))
        memory.matrix[index], memory.squares[index] = row, row.square().sum()
        return GrowingMatrix(memory, self.count)

    def copy(self) -> GrowingMatrix:
        """Return a copy in memory of its own, with as much room."""
        return GrowingMatrix(self._copied(len(self.memory.squares)), self.count)

    def to(self, device: torch.device) -> GrowingMatrix:
        """Return a copy on another device."""
        return GrowingMatrix(_Memory(self.matrix.to(device), self.squares.to(device), self.count), self.count)

    def _copied(self, room: int) -> _Memory:
        memory = _Memory(self.matrix.new_empty(room, self.matrix.shape[1]), self.squares.new_empty(room), self.count)
        memory.matrix[: self.count], memory.squares[: self.count] = self.matrix, self.squares
        return memory
