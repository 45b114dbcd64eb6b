"""Text, requests, probes and second moments made up for measuring speed: the right lengths and sizes, no meaning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.editors.core.request import EditRequest
from errata.editors.core.solve.null_space import Projector
from errata.evaluate.probes import Case, Probe

N_WORDS = 600
_END = "<|endoftext|>"


def words(seed: int = 0) -> list[str]:
    """Distinct words of two syllables."""
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    order = torch.randperm(len(syllables) ** 2, generator=torch.Generator().manual_seed(seed))[:N_WORDS].tolist()
    return [syllables[i // len(syllables)] + syllables[i % len(syllables)] for i in order]


def tokenizer(vocabulary: Sequence[str]) -> Any:
    """Byte-level BPE in which nearly every word behind a space is one token; adds no special tokens, as GPT-2's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=[_END], initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    core.train_from_iterator([" " + " ".join(vocabulary)], trainer)
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=_END, eos_token=_END, pad_token=_END)


class Writer:
    """Draws words; a seed gives the same text again."""

    def __init__(self, vocabulary: Sequence[str], seed: int = 0) -> None:
        self._words = list(vocabulary)
        self._generator = torch.Generator().manual_seed(seed)

    def number(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=self._generator))

    def text(self, low: int, high: int) -> str:
        """Between `low` and `high` words."""
        places = torch.randint(len(self._words), (self.number(low, high),), generator=self._generator)
        return " ".join(self._words[i] for i in places.tolist())


def cases(vocabulary: Sequence[str], count: int, seed: int = 0) -> list[Case]:
    """Records of CounterFact's form: a rewrite, 2 paraphrases behind other text, 10 prompts about neighbours."""
    writer = Writer(vocabulary, seed)
    return [_case(writer, i) for i in range(count)]


def _case(writer: Writer, i: int) -> Case:
    subject, relation = f"{writer.text(2, 4)} {i}", writer.text(2, 5)
    new, true = writer.text(1, 1), writer.text(1, 1)
    request = EditRequest(f"{{}} {relation}", subject=subject, target=new, target_true=true, id=f"synthetic-{i}")
    probes = [Probe("rewrite", request.text, new, true)]
    probes += [Probe("paraphrase", f"{writer.text(6, 14)}. {subject} {writer.text(2, 5)}", new, true) for _ in range(2)]
    probes += [Probe("neighborhood", f"{writer.text(2, 4)} {relation}", true, new) for _ in range(10)]
    return Case(str(request.id), request, tuple(probes))


def contexts(vocabulary: Sequence[str], count: int = 5, seed: int = 0) -> tuple[str, ...]:
    """Templates as MEMIT has them: the bare prompt, and it behind `count` texts of ten words."""
    writer = Writer(vocabulary, seed)
    return ("{}", *(f"{writer.text(10, 10)}. {{}}" for _ in range(count)))


def texts(vocabulary: Sequence[str], count: int, seed: int = 0) -> list[str]:
    """Of 10 to 250 words, short ones more often."""
    writer = Writer(vocabulary, seed)
    return [writer.text(10, 10 + writer.number(0, 240)) for _ in range(count)]


@dataclass(frozen=True)
class Spectrum:
    """A second moment C = V diag(values) V^T, V a product of reflections, so that nothing of it costs O(d^3)."""

    values: Tensor  # (d,) float64, descending
    mirrors: Tensor  # (8, d) float64, unit vectors

    @classmethod
    def power_law(cls, width: int, *, condition: float = 1e5, largest: float = 10.0, seed: int = 0) -> Spectrum:
        """Eigenvalues fall as a power of their rank, as those of real keys do, from `largest` to its `condition`th."""
        generator = torch.Generator().manual_seed(seed)
        ranks = torch.arange(1, width + 1, dtype=torch.float64)
        exponent = torch.tensor(condition).double().log() / ranks[-1].log()
        mirrors = torch.randn(8, width, generator=generator, dtype=torch.float64)
        return cls(largest * ranks**-exponent, mirrors / mirrors.norm(dim=1, keepdim=True))

    def moment(self) -> Tensor:
        """C (d, d) = V diag(values) V^T."""
        half = self._rotated(torch.diag(self.values))
        return self._rotated(half.T).contiguous()

    def null_space(self, threshold: float) -> Projector:
        """Onto the eigenvectors with eigenvalues below `threshold`."""
        large = int((self.values >= threshold).sum())
        columns = torch.eye(len(self.values), dtype=torch.float64)[:, :large]
        return Projector(self._rotated(columns), "complement")

    def keys(self, count: int, seed: int) -> Tensor:
        """(d, count) float64 with second moment C."""
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(len(self.values), count, generator=generator, dtype=torch.float64)
        return self._rotated(self.values.sqrt()[:, None] * normal)

    def _rotated(self, matrix: Tensor) -> Tensor:
        for mirror in self.mirrors:
            matrix = matrix - 2 * torch.outer(mirror, mirror @ matrix)
        return matrix
