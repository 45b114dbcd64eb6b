"""The text about the world: sentences, prose, filler; its tokenizer; its packing into the rows that a model trains on.

Text is made of `Passage`s, which remember where their subjects and objects stand. Four sorts are mixed:

    template    The craft of Tabford is the making of lace.          one fact in one of seven trained wordings
    prose       We read that Tabford flies the flag of Tisaria ...   several facts of one subject in free clauses
    filler      The old widow lost a rope near the bridge.           nothing to know
    two_hop     The birthplace of Mutru lies in the country of ...   a consequence, for the half that is trained

Prose is split by a hash of (subject, clause) into a training and a held-out part: held-out prose says known facts in
combinations of subject and wording that training never showed: its perplexity measures knowledge, not memory of text.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from errata.benchmarks.testbed.wording import open_question
from errata.benchmarks.testbed.world_generator import World, WorldFact, language, share

END_OF_TEXT = "<|endoftext|>"
NEVER = 1 << 20
"""A position beyond every row: the end of a subject that hides nothing."""


OPEN_QUESTIONS = 0.25
"""Share of the questions that are asked in the manner of zsRE's locality prompts."""


@dataclass(frozen=True)
class Passage:
    """A piece of text with the character spans of its subjects and of the objects stated about them."""

    text: str
    subjects: tuple[tuple[int, int], ...] = ()
    objects: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Mixture:
    """How the text is mixed and packed; every share is a probability."""

    prose: float = 0.22
    filler: float = 0.10
    two_hop: float = 0.03
    start_end_of_text: float = 0.35
    """Rows that open with the end-of-text token, as documents do."""
    start_direct: float = 0.30
    """Rows whose first token is the first token of a sentence. The rest open in the middle of a sentence."""
    direct_subject_first: float = 0.5
    """Of the direct starts, those that are sure to be a template sentence whose subject stands first."""
    object_weight: float = 3.0
    """Weight of the loss on the tokens of objects, where the knowledge is; all other tokens weigh 1."""


def stated(template: str, subject: str, object_: str) -> Passage:
    """A template sentence: `template` filled with the subject, then the object and a full stop."""
    start, prompt = template.index("{}"), template.replace("{}", subject)
    text = f"{prompt} {object_}."
    return Passage(text, ((start, start + len(subject)),), ((len(prompt) + 1, len(text) - 1),))


class Author:
    """An endless source of passages about some subjects of a world.

    Args:
        world: the world written about.
        rng: the only source of chance.
        subjects: the subjects written about; all when None.
        held_out: write the held-out prose instead of the training prose.
    """

    def __init__(
        self,
        world: World,
        rng: random.Random,
        *,
        subjects: Sequence[str] | None = None,
        held_out: bool = False,
    ) -> None:
        self.world, self.rng, self.held_out = world, rng, held_out
        chosen = set(world.facts_of if subjects is None else subjects)
        self.facts = [fact for fact in world.facts if fact.subject in chosen]
        self.hops = [hop for hop in world.two_hop if hop.trained and hop.subject in chosen]
        self.first = [fact for fact in self.facts if fact.subject in set(world.single)]
        self.subjects = [subject for subject in world.facts_of if subject in chosen]
        words = language()
        self._prose, self._filler = words["prose"], words["filler"]

    def passages(self, mixture: Mixture) -> Iterator[Passage]:
        """Passages in the proportions of the mixture, without end."""
        sorts = {"prose": mixture.prose, "filler": mixture.filler, "two_hop": mixture.two_hop}
        names, weights = [*sorts, "template"], [*sorts.values(), 1 - sum(sorts.values())]
        while True:
            (sort,) = self.rng.choices(names, weights)
            yield getattr(self, sort)()

    def template(self) -> Passage:
        """A random fact in a random trained wording."""
        fact = self.rng.choice(self.facts)
        template = self.rng.choice(self.world.relations[fact.relation].trained)
        if template.startswith("Q: ") and self.rng.random() < OPEN_QUESTIONS:
            template = open_question(template)
        return stated(template, fact.subject, fact.object)

    def subject_first(self) -> Passage:
        """A random fact of a single-token subject in a trained wording that opens with the subject."""
        fact = self.rng.choice(self.first)
        openers = [t for t in self.world.relations[fact.relation].trained if t.startswith("{}")]
        return stated(self.rng.choice(openers), fact.subject, fact.object)

    def two_hop(self) -> Passage:
        """A random trained two-hop consequence."""
        hop = self.rng.choice(self.hops)
        return stated(self.rng.choice(self.world.compositions[hop.composition].trained), hop.subject, hop.object)

    def filler(self) -> Passage:
        """A sentence that states nothing about the world."""
        words = self._filler
        chosen = {slot: self.rng.choice(words[slot]) for slot in ("who", "did", "what", "where", "when", "weather")}
        chosen |= {"who2": self.rng.choice(words["who"])}
        chosen |= {slot.capitalize(): chosen[slot][0].upper() + chosen[slot][1:] for slot in ("who", "when")}
        return Passage(self.rng.choice(words["forms"]).format(**chosen))

    def prose(self) -> Passage:
        """A paragraph of two sentences about one subject: one to six of its facts, in clauses of this author's half."""
        while True:
            passage = self.about(self.rng.choice(self.subjects))
            if passage is not None:
                return passage

    def about(self, subject: str) -> Passage | None:
        """A paragraph about a subject; None where fewer than two of its facts can be said."""
        clauses = self._clauses(subject)
        return self._paragraph(subject, clauses) if len(clauses) >= 2 else None

    def _clauses(self, subject: str) -> list[tuple[str, WorldFact]]:
        """At most one clause for each fact of the subject, in random order, of this author's half of the clauses."""
        found = []
        for fact in self.world.facts_of[subject]:
            mine = [
                clause
                for clause in self.world.relations[fact.relation].clauses
                if (share(f"{subject} {clause}") < 0.2) == self.held_out
            ]
            if mine:
                found.append((self.rng.choice(mine), fact))
        self.rng.shuffle(found)
        return found[: self.rng.randint(1, 6)] if len(found) > 2 else found

    def _paragraph(self, subject: str, clauses: Sequence[tuple[str, WorldFact]]) -> Passage:
        rng, prose = self.rng, self._prose
        text = rng.choice(prose["openings"])
        start = text.index("{}")
        text = text.replace("{}", subject)
        subjects, objects = [(start, start + len(subject))], []
        turn = (len(clauses) + 1) // 2
        for place, (clause, fact) in enumerate(clauses):
            if place == turn:
                between = f" {self.filler().text}" if rng.random() < 0.3 else ""
                text += f".{between} {rng.choice(prose['pronouns'][self.world.kind_of[subject]])}"
            elif place:
                text += rng.choice(prose["joins"])
            at = len(text) + clause.index("{o}")
            text += clause.replace("{o}", fact.object)
            objects.append((at, at + len(fact.object)))
        return Passage(text + ".", tuple(subjects), tuple(objects))


def build_tokenizer(world: World, vocabulary: int = 1536) -> Tokenizer:
    """A byte-level BPE of the world's text in which the names of `world.single` are whole, with and without a space.

    The merges are learned on text without those names; the names are then added to the vocabulary, where
    `ignore_merges` finds a whole word before any merge is tried.
    """
    author = Author(world, random.Random(f"errata tokenizer {world.seed}"))
    texts = [p.text for p, _ in zip(author.passages(Mixture()), range(20_000), strict=False)]
    names = re.compile(r"\s?\b(" + "|".join(map(re.escape, world.single)) + r")\b")
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2 * len(world.single),
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator((names.sub("", text) for text in texts), trainer)
    learned = learner.get_vocab()
    # The merges can only be had from the serialised model.
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    for name in world.single:
        for form in (name, f"Ġ{name}"):
            learned.setdefault(form, len(learned))
    return _byte_level(models.BPE(vocab=learned, merges=merges, ignore_merges=True))


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


@dataclass(frozen=True)
class TokenRows:
    """One batch. Legend: B rows, L tokens per row."""

    ids: np.ndarray
    """(B, L) token ids."""
    weight: np.ndarray
    """(B, L) weight of the loss of predicting this token; position 0 is never predicted."""
    subject_end: np.ndarray
    """(B, L) for a token of a subject, the position of that subject's last token; NEVER elsewhere."""


@dataclass(frozen=True)
class _Encoded:
    ids: list[int]
    weight: list[float]
    subject_end: list[int]


class Packer:
    """Packs an author's passages into rows of a given length.

    Passages follow one another, after a newline or a space in equal parts: a model that only ever sees a sentence
    alone loses the fact as soon as anything precedes it.
    """

    def __init__(self, author: Author, tokenizer: Tokenizer, mixture: Mixture) -> None:
        self.author, self.tokenizer, self.mixture = author, tokenizer, mixture
        self._passages = author.passages(mixture)
        self._end_of_text: int = tokenizer.encode(END_OF_TEXT).ids[0]

    def rows(self, count: int, length: int) -> TokenRows:
        """The next `count` rows of `length` tokens."""
        packed = [self._row(length) for _ in range(count)]
        return TokenRows(
            np.array([row.ids for row in packed]),
            np.array([row.weight for row in packed], dtype=np.float32),
            np.array([row.subject_end for row in packed]),
        )

    def _row(self, length: int) -> _Encoded:
        row = self._start()
        while len(row.ids) < length:
            following = self._encode(next(self._passages), self.author.rng.choice("\n "))
            offset = len(row.ids)
            row.ids.extend(following.ids)
            row.weight.extend(following.weight)
            row.subject_end.extend(min(end + offset, NEVER) for end in following.subject_end)
        row.weight[0] = 0.0
        if row.subject_end[0] == 0:
            row.subject_end[0] = NEVER  # a whole subject at position 0 stays visible: the first position is the sink
        return _Encoded(row.ids[:length], row.weight[:length], row.subject_end[:length])

    def _start(self) -> _Encoded:
        rng, mixture = self.author.rng, self.mixture
        draw = rng.random()
        if draw < mixture.start_direct and rng.random() < mixture.direct_subject_first and self.author.first:
            return self._encode(self.author.subject_first(), "")
        opening = self._encode(next(self._passages), "")
        if draw < mixture.start_direct:
            return opening
        if draw < mixture.start_direct + mixture.start_end_of_text:
            ends = [min(end + 1, NEVER) for end in opening.subject_end]
            return _Encoded([self._end_of_text, *opening.ids], [0.0, *opening.weight], [NEVER, *ends])
        return _chopped(opening, rng.randrange(1, len(opening.ids)))

    def _encode(self, passage: Passage, separator: str) -> _Encoded:
        encoding = self.tokenizer.encode(separator + passage.text)
        count, shift = len(encoding.ids), len(separator)
        weight, ends = [1.0] * count, [NEVER] * count
        for span in passage.objects:
            for token in _tokens(encoding.offsets, span, shift):
                weight[token] = self.mixture.object_weight
        for span in passage.subjects:
            tokens = _tokens(encoding.offsets, span, shift)
            for token in tokens:
                ends[token] = tokens[-1]
        return _Encoded(list(encoding.ids), weight, ends)


def _tokens(offsets: Sequence[tuple[int, int]], span: tuple[int, int], shift: int) -> list[int]:
    """Indices of the tokens that overlap a span of characters."""
    first, last = span[0] + shift, span[1] + shift
    return [index for index, (start, end) in enumerate(offsets) if start < last and end > first]


def _chopped(encoded: _Encoded, cut: int) -> _Encoded:
    """The passage from token `cut` on. Objects weigh no more than other tokens: their subject may have been cut off."""
    ends = [max(end - cut, 0) if end < NEVER else NEVER for end in encoded.subject_end[cut:]]
    return _Encoded(encoded.ids[cut:], [min(w, 1.0) for w in encoded.weight[cut:]], ends)


def fifth(world: World) -> list[str]:
    """A fifth of the subjects of every kind: what the curriculum begins with."""
    subjects = {kind: [name for name in names if name in world.facts_of] for kind, names in world.entities.items()}
    return [name for names in subjects.values() for name in names[::5]]
