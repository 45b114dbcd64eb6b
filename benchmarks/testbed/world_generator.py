"""The invented world: who lives in it, what is true of them, and what each fact is edited to. Nothing in it exists.

    world = invent(seed=0)
    world.facts[0]      # Fact(relation="capital", subject="Clounovia", object="Stamwick", target_new="Yeadale")

Everything follows from the seed through one private `random.Random`; the words come from `language.json`, as data.
Objects are drawn at random rather than implied by one another (a country's language says nothing about its citizens'
mother tongue), so that a fact can only be known by having been read. The one exception is wanted: two-hop questions,
where the answer follows from two facts ("in which country was she born?").
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

LANGUAGE_FILE = Path(__file__).with_name("language.json")


@dataclass(frozen=True)
class Relation:
    """A relation: the kinds it joins, and its wordings; `{}` is the subject, the object follows the template."""

    name: str
    subject: str
    object: str
    trained: tuple[str, ...]
    held_out: tuple[str, ...]
    clauses: tuple[str, ...]
    """Predicates for prose, with `{o}` where the object stands."""


@dataclass(frozen=True)
class Composition:
    """A two-hop question: the object of `second` for the object of `first` for the subject."""

    name: str
    first: str
    second: str
    trained: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True)
class WorldFact:
    """One true statement and its counterfactual: `target_new` is of the object's kind and differs from it."""

    relation: str
    subject: str
    object: str
    target_new: str


@dataclass(frozen=True)
class TwoHop:
    """A fact that follows from two others. Only the `trained` ones are ever said in the training text."""

    composition: str
    subject: str
    via: str
    object: str
    trained: bool


@dataclass(frozen=True)
class World:
    """All of one seed's world. `single` holds the names that the tokenizer must keep whole."""

    seed: int
    entities: Mapping[str, tuple[str, ...]]
    single: tuple[str, ...]
    facts: tuple[WorldFact, ...]
    two_hop: tuple[TwoHop, ...]
    relations: Mapping[str, Relation] = field(repr=False)
    compositions: Mapping[str, Composition] = field(repr=False)

    @cached_property
    def facts_of(self) -> dict[str, list[WorldFact]]:
        """Facts by subject, in the order of the relations."""
        found: dict[str, list[WorldFact]] = {}
        for fact in self.facts:
            found.setdefault(fact.subject, []).append(fact)
        return found

    @cached_property
    def object_of(self) -> dict[tuple[str, str], str]:
        """(relation, subject) -> true object."""
        return {(fact.relation, fact.subject): fact.object for fact in self.facts}

    @cached_property
    def kind_of(self) -> dict[str, str]:
        """Name -> kind; every name belongs to one kind only."""
        return {name: kind for kind, names in self.entities.items() for name in names}

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values; `World.from_json` inverts it."""
        return asdict(self) | {"format": "errata world 1"}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> World:
        """Rebuild a world from `as_json` (extra keys of its facts and two-hop questions are left aside)."""
        return World(
            seed=record["seed"],
            entities={kind: tuple(names) for kind, names in record["entities"].items()},
            single=tuple(record["single"]),
            facts=tuple(WorldFact(**{k: fact[k] for k in WorldFact.__dataclass_fields__}) for fact in record["facts"]),
            two_hop=tuple(TwoHop(**{k: hop[k] for k in TwoHop.__dataclass_fields__}) for hop in record["two_hop"]),
            relations={name: Relation(**_tuples(values)) for name, values in record["relations"].items()},
            compositions={name: Composition(**_tuples(values)) for name, values in record["compositions"].items()},
        )


def language() -> dict[str, Any]:
    """The words of the world, read from `language.json`."""
    return json.loads(LANGUAGE_FILE.read_text(encoding="utf-8"))


def share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: how everything that must not depend on a seed is split."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def invent(seed: int) -> World:
    """Invent the world of a seed. Equal seeds give equal worlds on every machine."""
    words = language()
    rng = random.Random(f"errata world {seed}")
    entities, single = _people_and_places(words, rng)
    relations = {name: Relation(name, **_tuples(values)) for name, values in words["relations"].items()}
    compositions = {name: Composition(name, **_tuples(values)) for name, values in words["two_hop"].items()}
    facts = tuple(fact for relation in relations.values() for fact in _facts(relation, entities, rng))
    two_hop = tuple(hop for c in compositions.values() for hop in _two_hop(c, facts, rng))
    return World(seed, entities, single, facts, two_hop, relations, compositions)


def _people_and_places(
    words: Mapping[str, Any], rng: random.Random
) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Entities by kind, and the names that are to be single tokens: all places, languages, and half of the persons."""
    parts, counts = words["names"], words["counts"]
    taken: set[str] = set()

    def coin(kind: str, syllables: int) -> str:
        """A new name: syllables, then the ending that tells its kind (persons' first names have none)."""
        while True:
            stem = "".join(_syllable(parts, rng) for _ in range(syllables))
            name = (stem + rng.choice(parts.get(kind, [""]))).capitalize()
            if name not in taken and 4 <= len(name) <= 11:
                taken.add(name)
                return name

    def several(kind: str, syllables: int) -> tuple[str, ...]:
        return tuple(coin(kind, syllables) for _ in range(counts[kind]))

    places = {kind: several(kind, 1) for kind in ("country", "city", "language", "continent")}
    mononyms, first_names, surnames = several("mononym", 2), several("first_name", 2), several("surname", 1)
    pairs = rng.sample([(first, last) for first in first_names for last in surnames], counts["full_name"])
    # Mononyms and full names alternate, so that any stride through the persons holds both.
    persons = [name for one, pair in zip(mononyms, pairs, strict=True) for name in (one, " ".join(pair))]
    companies = tuple(f"{coin('owner', 2)} {rng.choice(parts['company'])}" for _ in range(counts["company"]))
    entities = places | {"person": tuple(persons), "company": companies}
    entities |= {kind: tuple(names) for kind, names in words["objects"].items()}
    single = tuple(name for kind in places for name in places[kind]) + mononyms
    return entities, single


def _syllable(parts: Mapping[str, Sequence[str]], rng: random.Random) -> str:
    return rng.choice(parts["onsets"]) + rng.choice(parts["vowels"]) + rng.choice(parts["codas"])


def _facts(relation: Relation, entities: Mapping[str, Sequence[str]], rng: random.Random) -> list[WorldFact]:
    """One fact for every subject of the relation's kind.

    Capitals are distinct. All other objects are drawn from a pool about a quarter as large as the subjects are many, so
    that most facts have true neighbours (other subjects with the same object) and every target is true of some subject.
    """
    subjects, objects = entities[relation.subject], list(entities[relation.object])
    if relation.name == "capital":
        drawn = pool = rng.sample(objects, len(subjects))
    else:
        pool = rng.sample(objects, min(len(objects), max(8, len(subjects) // 4)))
        drawn = [rng.choice(pool) for _ in subjects]
    return [
        WorldFact(relation.name, subject, true, rng.choice([other for other in pool if other != true]))
        for subject, true in zip(subjects, drawn, strict=True)
    ]


def _two_hop(composition: Composition, facts: Sequence[WorldFact], rng: random.Random) -> list[TwoHop]:
    """The composition for every subject; a random half is trained."""
    object_of = {(fact.relation, fact.subject): fact.object for fact in facts}
    hops = [(fact.subject, fact.object) for fact in facts if fact.relation == composition.first]
    trained = set(rng.sample([subject for subject, _ in hops], len(hops) // 2))
    return [
        TwoHop(composition.name, subject, via, object_of[composition.second, via], subject in trained)
        for subject, via in hops
    ]


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
