"""How far edits raise a model's loss on general text: a paired comparison with the untouched model, row by row.

    text = GeneralText(model, tokenizer, texts)     # reads the texts once with the untouched model
    with edit.applied():
        found = text.rise()                         # found.value = 3e-4: the loss has risen by 0.03 %
    found.is_below(1e-3)                            # whether the edit is admitted to the league of 1e-3

Both models read the same rows in the same batches, so that what a row is like cancels in the difference. A mean of two
thousand tokens has a standard error of several per cent; of the paired difference it is a small share of the rise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from errata.editors.core.dtypes import working_dtype
from errata.editors.core.errors import ConfigError
from errata.editors.core.forward.row_patches import lowest_block
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import Patch
from errata.editors.core.model.activations import run_base
from errata.editors.core.model.architecture import describe
from errata.editors.core.model.own_forward import evaluating
from errata.editors.core.model.tokens import Tokenizer, pad_id, prompt_ids, right_padded
from errata.evaluate.collapse import HeldOutTexts
from errata.evaluate.scoring import Model


@dataclass(frozen=True)
class LossRise:
    """The loss on general text beside the untouched model's.

    Attributes:
        loss: Mean negative log-likelihood of a token, in nats.
        untouched: That of the untouched model.
        value: The rise, as a share of the untouched model's loss; negative where the loss has fallen.
        error: The standard error of `value`, over rows.
        tokens: How many tokens are predicted.
        rows: How many rows they are in.
    """

    loss: float
    untouched: float
    value: float
    error: float
    tokens: int
    rows: int

    def is_below(self, cap: float, *, margin: float = 0.0) -> bool:
        """Return whether the loss is strictly below (1 + cap) times the untouched model's.

        This is the rule of the authors' code. A loss that is not a number is not below it.

        Args:
            cap: By how much of itself the loss may rise.
            margin: How many standard errors are added to the rise first, so that the true rise is likely below the cap.
        """
        if margin:
            return self.value + margin * self.error < cap
        return self.loss < (1 + cap) * self.untouched

    @property
    def perplexity(self) -> float:
        """The perplexity of the texts."""
        return math.exp(self.loss) if self.loss < 700 else math.inf if self.loss == self.loss else math.nan

    @property
    def perplexity_untouched(self) -> float:
        """The untouched model's perplexity of the texts."""
        return math.exp(self.untouched)


class GeneralText:
    """General text whose loss is compared with the untouched model's.

    Args:
        model: Any causal decoder of transformers; load it in float32, since 16-bit weights round away what the smaller
            leagues are about.
        tokenizer: Its fast tokenizer.
        texts: As of `HeldOutTexts`.
        max_tokens: Stop after the text that reaches this many predicted tokens; None reads all.
        patch: The edit that will be measured at several strengths, if it is one; blocks below it then run once.
        batch_tokens: Bound on rows x length of a batch.

    Raises:
        ErrataError: There is no token to predict.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        texts: Iterable[str],
        *,
        max_tokens: int | None = None,
        patch: Patch | None = None,
        batch_tokens: int = 8192,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._texts = HeldOutTexts(model, tokenizer, texts, max_tokens=max_tokens, batch_tokens=batch_tokens)
        with Ledger.of(model).untouched():
            if patch is not None:
                self._texts.keep_below(lowest_block(describe(model), patch))
            self._untouched, self._counts = self._texts.row_losses()

    @property
    def tokens(self) -> int:
        """How many tokens are predicted."""
        return self._texts.tokens

    def rise(self) -> LossRise:
        """Return the loss that the model has now, beside the untouched model's."""
        now, _ = self._texts.row_losses()
        return paired_rise(now.tolist(), self._untouched.tolist(), self.tokens)


def paired_rise(now: Sequence[float], untouched: Sequence[float], tokens: int) -> LossRise:
    """Return the rise of a loss over rows that two models have read.

    The rise is a ratio of sums, R = sum(d) / sum(u), with d = now - untouched and u the untouched loss of a row. Its
    standard error is that of a ratio estimator: sqrt(n / (n - 1) sum (d - R u)^2) / sum(u) over n rows (Cochran 1977,
    Sampling Techniques, section 2.11). It is NaN of a single row.

    Args:
        now: Summed loss of each row, in nats.
        untouched: The same of the untouched model.
        tokens: How many tokens are predicted in all rows.
    """
    a, b = (torch.tensor(losses, dtype=torch.float64) for losses in (now, untouched))
    total, n = float(b.sum()), len(b)
    value = float((a - b).sum()) / total
    spread = float(((a - b - value * b) ** 2).sum())
    error = math.sqrt(n / (n - 1) * spread) / total if n > 1 and math.isfinite(spread) else math.nan
    return LossRise(float(a.sum()) / tokens, total / tokens, value, error, tokens, n)


@torch.inference_mode()
def general_kl(model: Model, tokenizer: Tokenizer, texts: Sequence[str], *, padding: bool = False) -> float:
    """Return how far the predictions on texts have moved: KL(untouched || now) in nats, summed over the positions of a
    text, as a mean over texts.

    It is what the authors of canonical examples regularise their training with, one text at a time.

    Args:
        model: With edits on it.
        tokenizer: Its fast tokenizer.
        texts: They run in one batch.
        padding: Whether positions of padding count, as in the authors' code, which masks nothing.
    """
    architecture = describe(model)
    batch = right_padded([prompt_ids(tokenizer, text) for text in texts], pad_id(tokenizer))
    real = batch.mask.bool()
    if padding:
        whole = torch.ones_like(batch.mask)
        batch, real = replace(batch, mask=whole, positions=whole.cumsum(1) - 1), whole.bool()
    batch, real = batch.to(architecture.device), real.to(architecture.device)

    def predicted() -> Tensor:
        logits = architecture.logits(run_base(architecture, batch)[real])
        return torch.log_softmax(logits, dim=-1, dtype=working_dtype(logits.dtype))

    with evaluating(model):
        now = predicted()
        with Ledger.of(model).untouched():
            then = predicted()
    return float((then.exp() * (then - now)).double().sum()) / len(texts)


def last_admitted(losses: Sequence[float], cap: float) -> int:
    """Return the index of the last entry of a training whose loss is admitted to a league.

    The authors' rule for training: a run is scored at its last epoch below the cap, even where an earlier epoch was
    above it. The first entry is the untouched model, which is always admitted.

    Args:
        losses: Loss on general text, the untouched model's first.
        cap: By how much of itself it may rise.

    Raises:
        ConfigError: There is no entry, or the cap is not above 0.
    """
    if not losses or cap <= 0:
        raise ConfigError(f"expected the untouched model's loss first and a cap above 0, got {list(losses)} and {cap}")
    return max(i for i, loss in enumerate(losses) if i == 0 or loss < (1 + cap) * losses[0])
