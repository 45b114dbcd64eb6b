"""Where the tokens of each row stand in a forward pass: behind how many tokens of a cache, and which are padding.

    ids        .  .  a  b  c        mask  0 0 1 1 1        the first row is padded on the left, the second on the right
               a  b  c  .  .              1 1 1 0 0

    positions  -  -  0  1  2        last token of each row: columns 4 and 2
               0  1  2  -  -

It is read from what the decoder is given: a module inside sees only the states of all tokens, padding included. Without
a mask no token counts as padding.

Legend: b rows; t tokens of each row in this pass; T tokens of the cache and this pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.editors.core.errors import LedgerError


@dataclass(frozen=True)
class RowLayout:
    """The layout of one forward pass.

    Attributes:
        past: Tokens of the cache, T - t.
        mask: (b, T), 0 at padding; None where all tokens are real.
    """

    past: int = 0
    mask: Tensor | None = None

    @classmethod
    def of(cls, args: Sequence[Any], keywords: Mapping[str, Any]) -> RowLayout:
        """Return the layout of the pass that a decoder of transformers is called for.

        Args:
            args: What the decoder is given by its position: the token ids, or nothing.
            keywords: What it is given by name.

        Raises:
            LedgerError: The mask is not one number per row and token, or may be among the arguments without names.
        """
        if len(args) > 1:
            raise LedgerError(
                "an edit acts at some positions of a row and reads the attention mask that the decoder is given by "
                f"name, got {len(args)} arguments without names; call it with attention_mask=..., past_key_values=..."
            )
        mask, cache = keywords.get("attention_mask"), keywords.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise LedgerError(
                f"an edit acts at some positions of a row and needs an attention mask (rows, tokens), got {shape}; "
                "give that mask, or make the edit with positions='all'"
            )
        return cls(past, mask)

    def real(self, b: int, t: int, device: torch.device) -> Tensor:
        """Return which tokens of this pass are no padding, (b, t).

        Raises:
            LedgerError: The mask is that of another batch.
        """
        if self.mask is None:
            return torch.ones(b, t, dtype=torch.bool, device=device)
        if tuple(self.mask.shape) != (b, self.past + t):
            raise LedgerError(
                f"expected an attention mask of {(b, self.past + t)} for {b} rows of {t} tokens behind {self.past} in "
                f"the cache, got {tuple(self.mask.shape)}"
            )
        return self.mask[:, self.past :].to(device).bool()

    def positions(self, b: int, t: int, device: torch.device) -> Tensor:
        """Return the position of each token in its row without padding, (b, t); -1 at padding."""
        real = self.real(b, t, device)
        if self.mask is None:
            before = torch.full((b, 1), self.past, device=device)
        else:
            before = self.mask[:, : self.past].to(device).bool().sum(1, keepdim=True)
        return torch.where(real, before + real.cumsum(1) - 1, -1)

    def last(self, b: int, t: int, device: torch.device) -> Tensor:
        """Return which tokens are the last real ones of their rows in this pass, (b, t)."""
        real = self.real(b, t, device)
        return real & (real.flip(1).cumsum(1).flip(1) == 1)
