"""The bundled testbed is what its recipe makes, and knows what it is said to know."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from errata.benchmarks.datasets import counterfact, world, zsre
from errata.benchmarks.testbed import bundle, measure, phenomena, train
from errata.benchmarks.testbed.corpus import NEVER, Author, Mixture, Packer, build_tokenizer, fifth
from errata.benchmarks.testbed.files import BUNDLED, digest, read_json, read_lines
from errata.benchmarks.testbed.recipe import SHAPES
from errata.benchmarks.testbed.world_generator import World, invent, share
from errata.editors.core.forward.residual_gain import residual_gains
from errata.editors.core.model.architecture import describe

BUDGET = 8 * 2**20


@pytest.fixture(scope="module")
def training() -> dict[str, Any]:
    return read_json(BUNDLED / "training.json")


@pytest.fixture(scope="module")
def bundled_world() -> World:
    return World.from_json(read_json(BUNDLED / "facts.json"))


@pytest.fixture(scope="module")
def opened() -> tuple[Any, Any]:
    return bundle.open_model(BUNDLED)


def recipe(**changes: Any) -> train.Recipe:
    """A recipe that takes seconds: the bundled one with a few of its steps."""
    return train.Recipe(**{"steps": 6, **changes})


# --- the world ----------------------------------------------------------------------------------------------------


def test_the_bundled_facts_are_the_world_that_the_bundled_seed_invents(
    training: dict[str, Any], bundled_world: World
) -> None:
    assert invent(training["seed"]) == bundled_world


def test_a_world_survives_json() -> None:
    made = invent(7)
    assert World.from_json(json.loads(json.dumps(made.as_json()))) == made


def test_other_seeds_invent_other_worlds_of_the_same_shape() -> None:
    one, other = invent(0), invent(1)
    assert len(one.facts) == len(other.facts) >= 1000
    assert Counter(f.relation for f in one.facts) == Counter(f.relation for f in other.facts)
    assert not {f.subject for f in one.facts} & {f.subject for f in other.facts}


def test_inventing_leaves_the_global_generators_alone() -> None:
    random.seed(3)
    state, torch_state = random.getstate(), torch.get_rng_state()
    train.new_model(recipe(), seed=0)
    invent(0)
    assert random.getstate() == state
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_every_relation_has_seven_trained_and_two_held_out_templates_each_with_one_slot() -> None:
    for relation in invent(0).relations.values():
        assert (len(relation.trained), len(relation.held_out)) == (7, 2), relation.name
        assert all(t.count("{}") == 1 for t in (*relation.trained, *relation.held_out)), relation.name
        assert all(clause.count("{o}") == 1 for clause in relation.clauses), relation.name
        assert not set(relation.trained) & set(relation.held_out), relation.name


def test_no_two_relations_of_a_kind_share_a_wording() -> None:
    wordings = [t for r in invent(0).relations.values() for t in (*r.trained, *r.held_out)]
    assert len(set(wordings)) == len(wordings)


def test_counterfactual_targets_are_of_the_objects_kind_and_false(bundled_world: World) -> None:
    for fact in bundled_world.facts:
        assert fact.target_new != fact.object
        assert fact.target_new in bundled_world.entities[bundled_world.relations[fact.relation].object]


def test_a_two_hop_answer_follows_from_the_two_facts(bundled_world: World) -> None:
    for hop in bundled_world.two_hop:
        composition = bundled_world.compositions[hop.composition]
        assert bundled_world.object_of[composition.first, hop.subject] == hop.via
        assert bundled_world.object_of[composition.second, hop.via] == hop.object


# --- the text -----------------------------------------------------------------------------------------------------


def test_no_held_out_paragraph_repeats_a_trained_pair_of_subject_and_clause(bundled_world: World) -> None:
    author = Author(bundled_world, random.Random(0))
    phrases = {
        (subject, clause.replace("{o}", fact.object)): share(f"{subject} {clause}") < 0.2
        for subject, facts in bundled_world.facts_of.items()
        for fact in facts
        for clause in bundled_world.relations[fact.relation].clauses
    }
    for _ in range(300):
        passage = author.prose()
        (start, end), text = passage.subjects[0], passage.text
        subject = text[start:end]
        assert not any(held and name == subject and phrase in text for (name, phrase), held in phrases.items())
    for text in read_lines(BUNDLED / "heldout.jsonl.gz"):
        said = [held for (name, phrase), held in phrases.items() if name in text and phrase in text]
        assert said, text
        assert any(said), text


def test_spans_of_a_passage_are_its_subject_and_its_objects(bundled_world: World) -> None:
    author = Author(bundled_world, random.Random(1))
    passages = author.passages(Mixture(prose=0.5))
    seen = 0
    for _ in range(300):
        passage = next(passages)
        for start, end in passage.subjects:
            assert bundled_world.kind_of[passage.text[start:end]] in ("country", "city", "person", "company")
        for start, end in passage.objects:
            assert passage.text[start:end] in bundled_world.kind_of
            seen += 1
    assert seen > 300


def test_the_tokenizer_keeps_single_names_whole_with_and_without_a_space(
    opened: tuple[Any, Any], bundled_world: World
) -> None:
    _, tokenizer = opened
    for name in bundled_world.single:
        assert len(tokenizer.encode(name)) == len(tokenizer.encode(f" {name}")) == 1, name
    several = [name for name in bundled_world.facts_of if " " in name]
    assert all(len(tokenizer.encode(f" {name}")) > 1 for name in several)


def test_tokenizer_gives_every_text_back(opened: tuple[Any, Any]) -> None:
    _, tokenizer = opened
    for text in (*read_lines(BUNDLED / "text.jsonl.gz")[:50], "Größe, 漢字\n\tand  spaces "):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_rows_are_full_and_no_first_token_is_predicted(bundled_world: World) -> None:
    packer = Packer(Author(bundled_world, random.Random(2)), build_tokenizer(bundled_world), Mixture())
    rows = packer.rows(64, 64)
    assert rows.ids.shape == rows.weight.shape == rows.subject_end.shape == (64, 64)
    assert (rows.weight[:, 0] == 0).all()
    assert set(rows.weight.ravel().tolist()) <= {0.0, 1.0, 3.0}


def test_the_bottleneck_hides_a_subject_from_all_that_follows_but_its_last_token_from_the_lower_layers_only() -> None:
    #                     position  0      1  2  3: a subject of two tokens, 4, 5
    ends = torch.tensor([[NEVER, NEVER, 3, 3, NEVER, NEVER]])
    lower, upper = (mask[0, 0] for mask in train.bottleneck_masks(ends))
    causal = torch.ones(6, 6).tril().bool()
    hidden = torch.zeros(6, 6, dtype=torch.bool)
    hidden[4:, 2] = True
    assert torch.equal(upper, causal & ~hidden)
    hidden[4:, 3] = True
    assert torch.equal(lower, causal & ~hidden)


def test_the_curriculum_begins_with_a_fifth_of_every_kind(bundled_world: World) -> None:
    chosen = Counter(bundled_world.kind_of[name] for name in fifth(bundled_world))
    everybody = Counter(bundled_world.kind_of[name] for name in bundled_world.facts_of)
    assert chosen.keys() == everybody.keys()
    assert all(abs(chosen[kind] - everybody[kind] / 5) < 1 for kind in everybody)


# --- the model ----------------------------------------------------------------------------------------------------


def test_training_twice_gives_bit_equal_weights() -> None:
    made = invent(0)
    tokenizer = build_tokenizer(made)
    first, second = (train.train(made, tokenizer, recipe(steps=3), seed=4).state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_moves_everything_but_the_sink() -> None:
    made = invent(0)
    start = train.new_model(recipe(), seed=4)
    end = train.train(made, build_tokenizer(made), recipe(steps=2), seed=4)
    before, after = (dict(model.named_parameters())["transformer.wpe.weight"] for model in (start, end))
    assert torch.equal(before[0], after[0])
    assert after[0].norm().item() == pytest.approx(recipe().sink_norm, rel=1e-5)
    assert not torch.equal(before[1], after[1])


def test_the_bundled_tokenizer_is_the_one_that_the_recipe_builds(
    tmp_path: Path, training: dict[str, Any], bundled_world: World
) -> None:
    built = build_tokenizer(bundled_world, training["recipe"]["vocabulary"])
    bundle.save_model(train.new_model(recipe(), seed=0), built, tmp_path)
    assert digest(tmp_path / "tokenizer.json") == training["sha256"]["tokenizer.json"]


def test_the_bundled_texts_are_the_ones_that_the_recipe_writes(bundled_world: World) -> None:
    assert read_lines(BUNDLED / "text.jsonl.gz") == bundle.text_lines(bundled_world)
    assert read_lines(BUNDLED / "heldout.jsonl.gz") == bundle.held_out_lines(bundled_world)


def test_every_file_has_the_digest_that_training_recorded(training: dict[str, Any]) -> None:
    assert {"model.safetensors", "tokenizer.json", "config.json", "facts.json"} <= training["sha256"].keys()
    for name, recorded in training["sha256"].items():
        assert digest(BUNDLED / name) == recorded, name


def test_the_bundled_recipe_is_the_default_recipe(training: dict[str, Any]) -> None:
    assert training["recipe"] == asdict(train.Recipe())


def test_the_folder_is_within_its_budget() -> None:
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file()) < BUDGET


def test_the_model_opens_as_float32_with_plain_from_pretrained() -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(BUNDLED)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_texts_fit_into_the_models_positions(opened: tuple[Any, Any]) -> None:
    model, tokenizer = opened
    for name in ("text.jsonl.gz", "heldout.jsonl.gz"):
        assert max(len(tokenizer.encode(text)) for text in read_lines(BUNDLED / name)) <= model.config.n_positions


def test_abilities_measured_again_are_those_recorded(
    opened: tuple[Any, Any], bundled_world: World, training: dict[str, Any]
) -> None:
    again = measure.abilities(*opened, bundled_world, every=8)
    recorded = training["abilities"]
    assert again["known"] / again["facts"] >= 0.99
    assert again["trained_behind"] >= 0.99
    for name in ("trained_behind", "trained_bare", "held_out_behind", "held_out_bare", "first_position"):
        assert again[name] == pytest.approx(recorded[name], abs=0.06), name  # a sample: every eighth fact
    for name in ("two_hop_trained", "two_hop_untrained"):
        assert again[name] == pytest.approx(recorded[name], abs=0.02), name


def test_held_out_prose_is_read_with_the_recorded_perplexity(opened: tuple[Any, Any], training: dict[str, Any]) -> None:
    found = measure.perplexity(*opened, read_lines(BUNDLED / "heldout.jsonl.gz"))
    assert found == pytest.approx(training["abilities"]["perplexity"], rel=0.01)


def test_batches_of_questions_change_no_answer(opened: tuple[Any, Any], bundled_world: World) -> None:
    facts = bundled_world.facts[::40]
    asked = [q for f in facts for q in measure.questions(f, bundled_world.relations[f.relation].trained)]
    together = measure.correct(*opened, asked)
    assert together == [measure.correct(*opened, [question])[0] for question in asked]
    wrong = [measure.Question(q.prompt, f.target_new) for f in facts for q in measure.questions(f, ("{} of",))]
    assert not any(measure.correct(*opened, wrong))


@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_trains_and_opens_with_the_beginning_of_text_that_it_was_trained_with(
    shape: str, tmp_path: Path
) -> None:
    made = invent(0)
    tokenizer = build_tokenizer(made)
    small = recipe(steps=2, layers=2, width=32, heads=2)
    model = train.train(made, tokenizer, small, seed=4, shape=shape)
    bundle.save_model(model, tokenizer, tmp_path, bos=SHAPES[shape].bos)
    opened, fast = bundle.open_model(tmp_path)
    begins = fast.encode("The craft")[0] == fast.bos_token_id
    assert begins == SHAPES[shape].bos == (shape != "gpt2")
    assert fast.encode("The craft")[begins:] == tokenizer.encode("The craft").ids
    gain = residual_gains(describe(opened), [1])[1]
    assert gain is None if shape == "gemma3" else gain == 1.0
    row = Packer(Author(made, random.Random(0)), tokenizer, SHAPES[shape].fit(small).mixture).rows(20, 16).ids[:, 0]
    assert (row == 0).all() == SHAPES[shape].bos


@pytest.mark.slow
def test_another_seed_of_the_same_recipe_has_the_same_abilities(tmp_path: Path, training: dict[str, Any]) -> None:
    abilities = train.build(tmp_path, seed=11, recipe=train.Recipe())
    assert abilities["known"] >= 0.98 * abilities["facts"]
    assert abilities["trained_behind"] >= 0.98
    assert abilities["held_out_behind"] >= 0.6
    assert abilities["first_position"] >= training["abilities"]["first_position"] - 0.15


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["llama", "gemma3"])
def test_models_of_other_shapes_know_the_same_world(shape: str, tmp_path: Path) -> None:
    abilities = train.build(tmp_path, seed=0, recipe=train.Recipe(), shape=shape)
    assert abilities["known"] >= 0.95 * abilities["facts"]
    assert world.is_testbed(tmp_path)


# --- its cases ----------------------------------------------------------------------------------------------------


def test_every_known_fact_is_a_case_and_ids_are_unique() -> None:
    found = world.cases()
    known = [fact for fact in read_json(BUNDLED / "facts.json")["facts"] if fact["known"]]
    assert len(found) == len({case.id for case in found}) == len(known)


@pytest.mark.slow
def test_every_fact_can_be_edited_to_every_other_object_of_its_relation() -> None:
    once, again = world.cases(), world.again_cases()
    assert again[: len(once)] == once
    assert len(again) == len({case.id for case in again}) > 10_000
    answers: dict[str, set[str]] = {}
    for case in again:
        relation, subject = case.id.split("/")[:2]
        assert case.request.target != case.request.target_true
        answers.setdefault(f"{relation}/{subject}", set()).add(case.request.target)
    assert sum(map(len, answers.values())) == len(again)
    halves = [case.id for split in world.SPLITS for case in world.again_cases(split=split)]
    assert sorted(halves) == sorted(case.id for case in again)


def test_the_two_halves_share_no_subject_and_make_the_whole() -> None:
    halves = {name: world.cases(split=name) for name in world.SPLITS}
    subjects = {name: {case.request.subject for case in found} for name, found in halves.items()}
    assert not subjects["dev"] & subjects["test"]
    assert sum(map(len, halves.values())) == len(world.cases())
    assert all(world.split(case) == name for name, found in halves.items() for case in found)
    assert min(map(len, halves.values())) > 300


def test_probes_of_a_case_are_true_of_the_world(bundled_world: World) -> None:
    true = {(f.relation, f.subject): f.object for f in bundled_world.facts}
    for case in world.cases()[::7]:
        relation, subject = case.id.split("/")
        assert case.request.target_true == true[relation, subject]
        for probe in case.probes:
            if probe.kind == "neighborhood":
                others = [name for (r, name) in true if r == relation and name in probe.prompt and name != subject]
                assert any(true[relation, name] == probe.target for name in others), (case.id, probe)
            if probe.kind == "distracting_neighborhood":
                assert probe.prompt.startswith(f"{case.request.text} {case.request.target}. ")


def test_a_portability_probe_follows_from_the_new_object(bundled_world: World) -> None:
    asked = [(case, probe) for case in world.cases() for probe in case.probes if probe.kind == "portability"]
    assert asked
    for case, probe in asked:
        assert case.id.startswith("birthplace/")
        assert probe.target == bundled_world.object_of["country", case.request.target]
        assert probe.other == bundled_world.object_of["country", str(case.request.target_true)]


def test_first_position_subjects_are_one_token_at_the_start_of_the_prompt(opened: tuple[Any, Any]) -> None:
    _, tokenizer = opened
    found = world.first_position_cases()
    assert len(found) > 100
    for case in found:
        assert case.request.subject_span[0] == 0
        assert len(tokenizer.encode(case.request.subject)) == 1
        assert tokenizer.encode(case.request.text)[0] == tokenizer.encode(case.request.subject)[0]


def test_no_case_elsewhere_is_a_first_position_case(opened: tuple[Any, Any]) -> None:
    _, tokenizer = opened
    for case in world.elsewhere_cases():
        assert case.request.subject_span[0] > 0 or len(tokenizer.encode(case.request.subject)) > 1


def test_the_model_answers_the_probes_of_what_must_stay(opened: tuple[Any, Any]) -> None:
    probes = world.known_facts()[::5]
    asked = [measure.Question(probe.prompt, str(probe.target)) for probe in probes]
    right = measure.correct(*opened, asked)
    assert sum(right) >= 0.98 * len(right)


@pytest.mark.parametrize("form", ["counterfact", "counterfact_plus"])
def test_records_are_read_by_the_counterfact_module_as_the_cases_themselves(tmp_path: Path, form: Any) -> None:
    path = tmp_path / "world.json"
    path.write_text(json.dumps(world.records(form)))
    loaded = counterfact.load(path, form=form)
    assert not loaded.dropped
    assert loaded.cases == world.cases(form=form)
    kinds = {probe.kind for case in loaded.cases for probe in case.probes}
    assert ("distracting_neighborhood" in kinds) == (form == "counterfact_plus")
    assert all(any(probe.kind == "neighborhood" for probe in case.probes) for case in loaded.cases)


def test_records_are_read_by_the_zsre_module_as_the_cases_themselves(tmp_path: Path) -> None:
    path = tmp_path / "world.json"
    path.write_text(json.dumps(world.records("zsre")))
    loaded, own = zsre.load(path, target="alt"), world.cases(form="zsre")
    assert not loaded.dropped
    assert [case.probes for case in loaded.cases] == [case.probes for case in own]
    assert [case.request.target_true for case in loaded.cases] == [case.request.target_true for case in own]
    assert all(case.request.target != case.request.target_true for case in own)


# --- its phenomena ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def patient() -> phenomena.ProbedModel:
    return phenomena.ProbedModel.open(BUNDLED)


def disabled(patient: phenomena.ProbedModel, method: str, group: str) -> int:
    """How many of a few edits of the development half disable the model."""
    cases = phenomena.chosen_cases(BUNDLED, 3, "dev")[group]
    outcomes = phenomena.single_edits(patient, patient.editor(method), cases)
    return sum(phenomena.disabling(outcome, patient.perplexity()) for outcome in outcomes)


def test_rome_disables_the_model_at_first_positions_and_its_repairs_do_not(patient: phenomena.ProbedModel) -> None:
    assert disabled(patient, "rome", "first") >= 1
    assert disabled(patient, "r_rome", "first") == disabled(patient, "c_rome", "first") == 0


def test_rome_disables_nothing_elsewhere(patient: phenomena.ProbedModel) -> None:
    assert disabled(patient, "rome", "elsewhere") == 0


def test_a_sequence_asks_no_edited_subject_and_leaves_the_model_as_it_was(patient: phenomena.ProbedModel) -> None:
    before = {name: value.clone() for name, value in patient.model.state_dict().items()}
    cases = phenomena.chosen_cases(BUNDLED, 2, "dev")["elsewhere"]
    points = phenomena.sequence(patient, "r_rome", cases, every=1, facts=10)
    assert [point["edits"] for point in points] == [0, 1, 2]
    assert all(torch.equal(before[name], value) for name, value in patient.model.state_dict().items())
    edited = [case.request.given_subject for case in cases]
    assert not any(subject in q.prompt for subject in edited for q in patient.others(edited, "any", 10_000))


def test_an_edit_disables_by_lost_facts_or_by_doubled_perplexity() -> None:
    fine = phenomena.EditDamage("a case", *[1.0] * 10)
    assert not phenomena.disabling(fine, before=1.0)
    assert phenomena.disabling(replace(fine, retention=0.49), before=1.0)
    assert phenomena.disabling(replace(fine, perplexity=2.01), before=1.0)
