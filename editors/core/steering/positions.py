"""At which positions of a row an affine change of hidden states acts.

    all       every token
    prompt    every token of a pass of several tokens; passes of one token, as in generation with a cache, are as before
    last      the last token of each row in each pass: the end of the prompt, then each generated token
    prefix    the first n tokens of the prompt, or n in its middle or at its end; prompts of one token are left alone
    span      the tokens from `start` to before `stop`, counted in the row without padding

What `prompt`, `last` and `prefix` do depends on what a pass holds. So `Folded.looks_ahead` is true of them, and scores
run such rows one by one, each up to the token that is read. Where padding is and what a cache holds is read from the
decoder's arguments (`RowLayout`), so that rows padded on the right or left get what they get alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from errata.editors.core.errors import ConfigError, LedgerError
from errata.editors.core.ledger.row_layout import RowLayout
from errata.editors.core.steering.kinds import ALIGNMENTS, PLACES


@dataclass(frozen=True)
class Where:
    """The positions of one affine change.

    Attributes:
        place: all, prompt, last, prefix or span.
        align: Where the tokens of a prefix stand in the prompt: front, middle or back.
        start: First position of a span.
        stop: One past its last position; None: to the end of the row.
    """

    place: str = "all"
    align: str = "front"
    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        if self.place not in PLACES:
            raise ConfigError(f"positions: expected {', '.join(PLACES)}, got {self.place!r}")
        if self.align not in ALIGNMENTS:
            raise ConfigError(f"align: expected {', '.join(ALIGNMENTS)}, got {self.align!r}")
        if self.start < 0 or (self.stop is not None and self.stop <= self.start):
            raise ConfigError(f"expected a span of at least one position from 0 on, got {self.start} to {self.stop}")

    @property
    def needs_layout(self) -> bool:
        """Whether it has to know where the tokens of each row stand."""
        return self.place in ("last", "prefix", "span")

    @property
    def looks_ahead(self) -> bool:
        """Whether what a token gets depends on the tokens behind it."""
        return self.place in ("prompt", "last", "prefix")

    @property
    def plain(self) -> dict[str, Any]:
        """The values that differ from the defaults, for a file."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {"place": self.place} | {name: value for name, value in values.items() if value != _DEFAULTS[name]}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Return the positions that `plain` has written; errors as of a new one, and TypeError for other fields."""
        return cls(**values)

    def acts_in(self, t: int) -> bool:
        """Return whether it acts in passes of t tokens per row."""
        return t > 1 or self.place not in ("prompt", "prefix")

    def inside(self, b: int, t: int, layout: RowLayout, device: torch.device) -> Tensor | None:
        """Return the tokens that a change without rows of its own acts at, (b, t); None: at all."""
        if self.place == "last":
            return layout.last(b, t, device)
        if self.place == "span":
            at = layout.positions(b, t, device)
            return (at >= self.start) & (at < (torch.iinfo(at.dtype).max if self.stop is None else self.stop))
        return None

    def rows_of_prefix(self, n: int, b: int, t: int, layout: RowLayout, device: torch.device) -> Tensor:
        """Return which of the n rows of a prefix each token gets, (b, t); -1: none.

        Raises:
            LedgerError: A prompt is shorter than the prefix, or its middle or end is in a part of it.
        """
        at = layout.positions(b, t, device)
        lengths = at.max(1, keepdim=True).values + 1
        if layout.past and self.align != "front":
            raise LedgerError(f"an addition at the {self.align} of a prompt needs the whole prompt in one pass")
        if not layout.past and bool((lengths < n).any()):
            raise LedgerError(
                f"expected a prompt of at least {n} tokens, as the addition has, got {int(lengths.min())}; write a "
                "longer prompt, or undo the edit"
            )
        begins = {"front": 0 * lengths, "middle": lengths // 2 - n // 2, "back": lengths - n}[self.align]
        rows = at - begins
        return torch.where((at >= 0) & (rows >= 0) & (rows < n), rows, -1)


EVERYWHERE = Where()
_DEFAULTS: Mapping[str, Any] = {name: field.default for name, field in Where.__dataclass_fields__.items()}
