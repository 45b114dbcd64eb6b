"""The testbed's benchmark cases: edits of facts that the bundled model knows, and the probes of each edit.

Only facts that the model knows become cases, and only known facts are asked as neighbours: a model cannot be seen to
lose what it never had. Rewrites use a trained wording. Paraphrases use the held-out wordings behind a sentence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Literal

from errata.benchmarks.testbed.files import BUNDLED, read_json
from errata.benchmarks.testbed.wording import behind_a_sentence
from errata.benchmarks.testbed.world_generator import World, WorldFact, share
from errata.editors.core.config import choose
from errata.editors.core.request import EditRequest
from errata.evaluate.probes import Case, Probe, distracting

Split = Literal["dev", "test"]
SPLITS: tuple[Split, ...] = ("dev", "test")
NEIGHBORS = 5
CHOICES = 4
OPENINGS = ("We read that {}", "It is well known that {}", "In those years {}")
"""Open prompts about a subject, for free generation: how the testbed's prose begins."""


def split_of(subject: str) -> Split:
    """The half that a subject belongs to, by a hash of its name: settings are chosen on "dev", reported on "test"."""
    return "dev" if share(f"split {subject}") < 0.5 else "test"


def split(case: Case) -> Split:
    """The half that a case belongs to."""
    return split_of(case.request.given_subject)


def is_testbed(folder: Path) -> bool:
    """Whether a folder holds the facts of a testbed beside its model."""
    return (folder / "facts.json").is_file() and (folder / "training.json").is_file()


def check_split(split: str | None) -> None:
    """Refuse a half that does not exist.

    Raises:
        ConfigError: There is no such half; names the two.
    """
    if split is not None:
        choose(split, SPLITS, "split")


def cases(folder: Path = BUNDLED, *, split: Split | None = None) -> list[Case]:
    """Return every known fact of a testbed as a case with all kinds of probes, in the order of its facts.

    Args:
        folder: A testbed's folder; the bundled one by default.
        split: Only the cases of one half.

    Raises:
        ConfigError: There is no such split.
    """
    check_split(split)
    known = Known.of(folder)
    return [known.case(fact) for fact in known.facts if split in (None, split_of(fact.subject))]


def first_position_cases(folder: Path = BUNDLED, *, split: Split | None = None) -> list[Case]:
    """Cases whose subject is a single token and the first one of the prompt, where ROME's key is anomalous.

    Raises:
        ConfigError: no such split.
    """
    check_split(split)
    known = Known.of(folder)
    single = set(known.world.single)
    return [
        known.case(fact, _pick(fact, starting))
        for fact in known.facts
        if fact.subject in single and split in (None, split_of(fact.subject))
        for starting in [[t for t in known.templates(fact) if t.startswith("{}")]]
        if starting
    ]


def elsewhere_cases(folder: Path = BUNDLED, *, split: Split | None = None) -> list[Case]:
    """All other cases: subjects of several tokens, and single tokens in prompts that do not begin with them."""
    known = Known.of(folder)
    single = set(known.world.single)
    return [
        known.case(fact, _pick(fact, elsewhere))
        for fact in known.facts
        if split in (None, split_of(fact.subject))
        for elsewhere in [[t for t in known.templates(fact) if fact.subject not in single or not t.startswith("{}")]]
        if elsewhere
    ]


def again_cases(folder: Path = BUNDLED, *, split: Split | None = None) -> list[Case]:
    """Return every known fact with each object of its relation in turn, except the true one, as its new answer.

    The cases come in rounds; the first round is `cases()`. A sequence of these edits a fact again and again, and the
    last edit of it counts.

    Raises:
        ConfigError: no such split.
    """
    check_split(split)
    known = Known.of(folder)
    turns: list[list[Case]] = []
    for fact in known.facts:
        if split in (None, split_of(fact.subject)):
            new = [
                fact.target_new,
                *(o for o in known.objects(fact.relation) if o not in (fact.object, fact.target_new)),
            ]
            turns.append([known.case(replace(fact, target_new=o), number=i) for i, o in enumerate(new)])
    return [case for turn in zip_longest(*turns) for case in turn if case is not None]


def known_facts(folder: Path = BUNDLED, *, split: Split | None = None) -> list[Probe]:
    """One probe of every known fact, in a trained wording behind a sentence: what retention is measured on."""
    asked = known_facts_by_subject(folder)
    return [probe for subject, probes in asked.items() if split in (None, split_of(subject)) for probe in probes]


def known_facts_by_subject(folder: Path = BUNDLED) -> dict[str, list[Probe]]:
    """Every known fact as a probe whose `target` is the true object, by subject."""
    known = Known.of(folder)
    found: dict[str, list[Probe]] = {}
    for fact in known.facts:
        found.setdefault(fact.subject, []).append(known.retention(fact))
    return found


def questions(folder: Path = BUNDLED) -> list[tuple[str, list[str]]]:
    """Every known fact as a question with four objects to choose from, the true one first: general ability, as far as
    the testbed has any."""
    known = Known.of(folder)
    return [(known.retention(fact).prompt, [fact.object, *known.wrong(fact, CHOICES - 1)]) for fact in known.facts]


@dataclass(frozen=True)
class Known:
    """A world and what its model knows of it."""

    world: World
    facts: tuple[WorldFact, ...]
    answered: Mapping[tuple[str, str], Sequence[int]]
    """(relation, subject) -> which trained templates are answered at the start of a prompt."""
    hops: Mapping[str, tuple[str, str]]
    """Subject of a known two-hop question -> (composition, object)."""

    @staticmethod
    def of(folder: Path) -> Known:
        """Read `facts.json` of a testbed's folder."""
        record = read_json(folder / "facts.json")
        world = World.from_json(record)
        known = [(fact, said) for fact, said in zip(world.facts, record["facts"], strict=True) if said["known"]]
        hops = {hop["subject"]: (hop["composition"], hop["object"]) for hop in record["two_hop"] if hop["known"]}
        answered = {(fact.relation, fact.subject): tuple(said["answered"]) for fact, said in known}
        return Known(world, tuple(fact for fact, _ in known), answered, hops)

    @cached_property
    def index_of(self) -> dict[WorldFact, int]:
        """The index of each fact among all facts of the world: its number in records."""
        return {fact: index for index, fact in enumerate(self.world.facts)}

    def templates(self, fact: WorldFact) -> list[str]:
        """The trained wordings in which the model answers the fact as a bare prompt; all of them where it is none."""
        trained = self.world.relations[fact.relation].trained
        answered = self.answered[fact.relation, fact.subject]
        return [trained[i] for i in answered] or list(trained)

    def neighbors(self, fact: WorldFact) -> list[WorldFact]:
        """True neighbours: known facts of other subjects with the same relation and object."""
        return self._others(fact, fact.object)

    def _others(self, fact: WorldFact, object_: str) -> list[WorldFact]:
        same = [f for f in self.facts if f.relation == fact.relation and f.subject != fact.subject]
        found = [f for f in same if f.object == object_]
        return sorted(found, key=lambda f: share(f"{fact.subject} beside {f.subject}"))[:NEIGHBORS]

    def retention(self, fact: WorldFact) -> Probe:
        """The fact in one of its trained wordings, behind a sentence."""
        template = _pick(fact, self.world.relations[fact.relation].trained, "kept")
        return Probe("neighborhood", behind_a_sentence(template.replace("{}", fact.subject)), fact.object)

    def wrong(self, fact: WorldFact, count: int) -> list[str]:
        """Other objects of the fact's relation, the same every time."""
        others = [other for other in self.objects(fact.relation) if other != fact.object]
        return sorted(others, key=lambda other: share(f"{fact.relation} {fact.subject} or {other}"))[:count]

    def objects(self, relation: str) -> list[str]:
        """What the known facts of a relation have for objects, in their order."""
        return list(dict.fromkeys(fact.object for fact in self.facts if fact.relation == relation))

    def case(self, fact: WorldFact, template: str | None = None, *, number: int = 0) -> Case:
        """The edit of a fact in one wording, with all kinds of probes; `number` tells several edits of it apart."""
        template = template or _pick(fact, self.templates(fact))
        name = f"{fact.relation}/{fact.subject}" + (f"/{number}" if number else "")
        request = EditRequest(template, fact.subject, fact.target_new, fact.object, id=name)
        probes = (*self._about(fact, request), *self._around(fact, request), *self._beyond(fact))
        return Case(name, request, probes, reference=(fact.relation, fact.target_new))

    def _about(self, fact: WorldFact, request: EditRequest) -> list[Probe]:
        """Probes of the edit itself."""
        new, true = fact.target_new, fact.object
        reworded = [t.replace("{}", fact.subject) for t in self.world.relations[fact.relation].held_out]
        return [Probe("rewrite", request.text, new, true)] + [
            Probe("paraphrase", behind_a_sentence(prompt), new, true) for prompt in reworded
        ]

    def _around(self, fact: WorldFact, request: EditRequest) -> list[Probe]:
        """Probes of what must stay: other subjects in the edit's wording, alone and behind the distracting edit."""
        new = fact.target_new
        beside = (
            self.neighbors(fact)
            or [f for f in self.facts if f.relation == fact.relation and fact.subject != f.subject and f.object != new][
                :NEIGHBORS
            ]
        )
        asked = [(request.prompt.replace("{}", f.subject), f.object) for f in beside]
        like_new = [request.prompt.replace("{}", f.subject) for f in self._others(fact, new)]
        return [
            *(Probe("neighborhood", prompt, true, new) for prompt, true in asked),
            *(Probe("distracting_neighborhood", distracting(request, p), true, new) for p, true in asked),
            *(Probe("attribute", prompt, new, fact.object) for prompt in like_new),
        ]

    def _beyond(self, fact: WorldFact) -> list[Probe]:
        """Probes of consequences, where the model knew what followed before, and open prompts."""
        probes = [Probe("generation", opening.replace("{}", fact.subject)) for opening in OPENINGS]
        composition, before = self.hops.get(fact.subject, (None, None))
        if composition and self.world.compositions[composition].first == fact.relation:
            after = self.world.object_of[self.world.compositions[composition].second, fact.target_new]
            asked = [t.replace("{}", fact.subject) for t in self.world.compositions[composition].trained]
            if after != before:
                probes += [Probe("portability", behind_a_sentence(prompt), after, before) for prompt in asked]
        return probes


def _pick(fact: WorldFact, templates: Sequence[str], purpose: str = "edit") -> str:
    """One of the wordings, the same every time."""
    return templates[int(share(f"{purpose} {fact.relation} {fact.subject}") * len(templates))]
