"""What a model still knows of the texts that an unlearning reads, beside the scores of `protocol=compose`.

Of each set, `forget` and `retain`:

    loss       mean negative log-probability of its tokens, in nats
    answers    share of its answers whose every token is the likeliest; None where no record has an answer
    texts, asked    how many texts and answers that is

A record of a set can have a `prompt` and an `answer` beside its `text`. At most ASKED records of each are read: of
those to forget the first, which are trained on; of those to retain the ones behind the `n_texts` that are trained on,
or the first where the source ends there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from errata.benchmarks.bench.context import Bench
from errata.benchmarks.bench.measurements import share_kept
from errata.editors.core.interventions.calibration import text_of
from errata.editors.core.interventions.intervention import InterventionConfig
from errata.editors.core.model.texts import AskedText, read_asked
from errata.evaluate.collapse import HeldOutTexts
from errata.evaluate.probes import Probe
from errata.evaluate.scoring import score

FORGET, RETAIN = SETS = ("forget", "retain")
ASKED = 200


@dataclass(frozen=True)
class TextSet:
    """Texts, and questions about what they say."""

    texts: tuple[str, ...]
    questions: tuple[Probe, ...]

    @staticmethod
    def of(records: list[AskedText]) -> TextSet:
        """Return the set that records make."""
        asked = [one for one in records if one.prompt is not None and one.answer is not None]
        questions = tuple(Probe("neighborhood", one.prompt or "", one.answer) for one in asked)
        return TextSet(tuple(one.text for one in records), questions)


def sets_of(model: Any, config: InterventionConfig) -> dict[str, TextSet]:
    """Return what is measured of an unlearning; nothing where its fields name no texts to forget.

    Args:
        model: The model, whose folder may bring a text to retain.
        config: Of the unlearning.

    Raises:
        DatasetError: A text cannot be read.
    """
    forget, trained = getattr(config, FORGET, None), getattr(config, "n_texts", 0)
    if not isinstance(forget, str):
        return {}
    retain = read_asked(text_of(model, getattr(config, RETAIN, None)), max_texts=trained + ASKED)
    found = {FORGET: read_asked(forget, max_texts=min(trained, ASKED) or ASKED), RETAIN: retain[trained:] or retain}
    return {name: TextSet.of(records[:ASKED]) for name, records in found.items()}


def measured(bench: Bench, sets: Mapping[str, TextSet]) -> dict[str, dict[str, Any]]:
    """Return {set: {"loss", "answers", "texts", "asked"}} of the model as it stands."""
    return {name: _measured(bench, one) for name, one in sets.items()}


def _measured(bench: Bench, own: TextSet) -> dict[str, Any]:
    read = HeldOutTexts(bench.model, bench.tokenizer, own.texts, batch_tokens=bench.batch_tokens)
    losses, tokens = read.row_losses()
    scores = score(bench.model, bench.tokenizer, own.questions, batch_tokens=bench.batch_tokens)
    return {
        "loss": float(losses.sum() / tokens.sum()),
        "answers": share_kept(scores),
        "texts": len(own.texts),
        "asked": len(own.questions),
    }
