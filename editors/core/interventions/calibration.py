"""The text that a compression measures inputs on, and that an unlearning reads, as rows of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from errata.editors.core.config import check_least
from errata.editors.core.errors import DatasetError
from errata.editors.core.interventions.intervention import InterventionConfig
from errata.editors.core.model.architecture import max_positions
from errata.editors.core.model.model_settings import read_model_settings
from errata.editors.core.model.texts import FACTBOOK, read_texts
from errata.editors.core.model.tokens import Tokenizer
from errata.editors.core.moments.collect import token_rows

_TEXTS_AT_ONCE = 32  # tokenised before it is seen whether they are enough


@dataclass(frozen=True, kw_only=True)
class CalibratedConfig(InterventionConfig):
    """Fields of every compression that measures inputs."""

    TEXTS: ClassVar[tuple[str, ...]] = ("text",)

    text: str | None = None
    """Text whose inputs are measured: a file, or name:config:split of the hub; null: the model folder's own, or the
    factbook that comes with errata."""
    n_rows: int = 128
    """Rows of it, one after another from its beginning."""
    row_tokens: int = 256
    """Tokens of a row, at most as many as the model takes. The papers take 2048 or more."""

    def __post_init__(self) -> None:
        check_least(self, {"n_rows": 1, "row_tokens": 1})


def text_of(model: Any, source: str | None) -> str | Path:
    """Return the text that a field names, or else that of the model's folder, or the factbook.

    Args:
        model: The model, or its folder.
        source: The field.
    """
    return source or read_model_settings(model).text or FACTBOOK


def running_rows(
    model: nn.Module, tokenizer: Tokenizer, texts: Sequence[str], count: int, length: int
) -> list[list[int]]:
    """Return the first rows of all texts joined into one.

    Args:
        model: Says how long a row can be.
        tokenizer: Its tokenizer.
        texts: The texts.
        count: Rows, at most.
        length: Tokens of a row, at most.

    Raises:
        DatasetError: The texts hold no whole row.
    """
    length = min(length, max_positions(model) or length)
    wanted, ids = count * length, []
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        for row in token_rows(tokenizer, list(texts[start : start + _TEXTS_AT_ONCE]), wanted):
            ids += row
        if len(ids) >= wanted:
            break
    rows = [ids[start : start + length] for start in range(0, min(len(ids), wanted) - length + 1, length)]
    if not rows:
        raise DatasetError(f"expected a text of at least {length} tokens, got {len(ids)}; lower row_tokens")
    return rows


def calibration_rows(model: nn.Module, tokenizer: Tokenizer, config: CalibratedConfig) -> list[list[int]]:
    """Return the rows that a configuration names; errors as `running_rows` and `read_texts`."""
    texts = read_texts(text_of(model, config.text))
    return running_rows(model, tokenizer, texts, config.n_rows, config.row_tokens)
