"""Folders of edits put together and held against each other: sums are bit-exact, contradictions are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from errata.editors.core.errors import MergeError, OtherBaseError
from errata.editors.core.ledger.entry import EditInfo
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import LowRank, Patch
from errata.editors.core.model.architecture import describe
from errata.editors.core.request import EditRequest
from errata.editors.core.storage.edit_folder import Edits
from errata.editors.core.storage.merging import compare, conflicts, merge


def put(ledger: Ledger, subject: str, target: str, *, seed: int, prompt: str = "The capital of {} is") -> None:
    d_out, d_in = describe(ledger.model).weight(0).shape
    drawn = torch.Generator().manual_seed(seed)
    update = LowRank(torch.randn(d_out, 1, generator=drawn), torch.randn(1, d_in, generator=drawn))
    request = EditRequest(prompt, subject, target)
    patch = Patch({describe(ledger.model).weight_name(0): update})
    ledger.append(f"{subject}-{target}-{seed}", patch, EditInfo("made up", (request,)))


def folder(ledger: Ledger, *facts: tuple[str, str, int]) -> Edits:
    ledger.clear()
    for subject, target, seed in facts:
        put(ledger, subject, target, seed=seed)
    edits = Edits.of(ledger)
    ledger.clear()
    return edits


SHARED = ("Ost", "Brast", 0)


def test_a_merge_has_the_bits_of_a_model_that_carries_both_and_shares_what_both_have(
    ledger: Ledger, digest: Any, tmp_path: Path
) -> None:
    first = folder(ledger, SHARED, ("Quelm", "Oslen", 1))
    second = folder(ledger, ("Varland", "Brast", 2), SHARED)
    both = merge(first, second)
    assert both.ids == ("Ost-Brast-0", "Quelm-Oslen-1", "Varland-Brast-2")
    Edits.read(both.write(tmp_path / "both")).apply_to(ledger.model)
    found = digest(ledger.model)
    ledger.clear()
    for subject, target, seed in (SHARED, ("Quelm", "Oslen", 1), ("Varland", "Brast", 2)):
        put(ledger, subject, target, seed=seed)
    assert digest(ledger.model) == found


def test_two_answers_for_a_fact_are_named_and_one_side_can_be_preferred(ledger: Ledger) -> None:
    first = folder(ledger, ("Ost", "Brast", 0), ("Quelm", "Oslen", 1))
    second = folder(ledger, ("Quelm", "Tarvos", 2), ("Ost", "Brast ", 3), ("Varland", "Oslen", 4))
    with pytest.raises(MergeError) as caught:
        merge(first, second)
    (conflict,) = caught.value.conflicts
    assert conflict == "'The capital of Quelm is' should be 'Oslen' (Quelm-Oslen-1) and 'Tarvos'"
    assert conflict in str(caught.value)
    assert "Quelm-Tarvos-2" not in merge(first, second, prefer="first").ids
    preferred = merge(first, second, prefer="second")
    assert preferred.ids == ("Ost-Brast-0", "Quelm-Tarvos-2", "Varland-Oslen-4")  # Ost has its answer already


def test_a_preference_that_would_lose_other_facts_of_an_edit_is_refused(ledger: Ledger) -> None:
    both = tuple(EditRequest("The capital of {} is", subject, "Oslen") for subject in ("Quelm", "Varland"))
    put(ledger, "Quelm", "Oslen", seed=1)
    (entry,) = ledger.entries
    ledger.clear()
    ledger.append("two facts", entry.patch, EditInfo(requests=both))
    first = Edits.of(ledger)
    ledger.clear()
    second = folder(ledger, ("Quelm", "Tarvos", 2))
    with pytest.raises(MergeError, match=r"'The capital of Varland is' \(two facts\)"):
        merge(first, second, prefer="second")
    assert merge(first, second, prefer="first").ids == ("two facts",)
    of_its_own = folder(ledger, ("Quelm", "Tarvos", 2), ("Varland", "Oslen", 3))
    assert merge(first, of_its_own, prefer="second").ids == of_its_own.ids


def test_a_fact_is_the_same_whatever_its_case_and_spaces(ledger: Ledger) -> None:
    first = folder(ledger, ("Quelm", "Oslen", 1))
    put(ledger, "quelm", "Tarvos", seed=2, prompt="the  CAPITAL of {} is")
    (found,) = conflicts(first, Edits.of(ledger))
    assert (found.first.target, found.second.target) == ("Oslen", "Tarvos")


def test_edits_of_two_models_do_not_go_together(ledger: Ledger, make_tiny: Any, open_ledger: Any) -> None:
    first = folder(ledger, SHARED)
    other = folder(Ledger.of(model := make_tiny("gpt2", n_layers=2, seed=1)), ("Quelm", "Oslen", 1))
    with pytest.raises(OtherBaseError, match=r"weight: transformer\.h\.0"):
        merge(first, other)
    double = folder(open_ledger(torch.float64), ("Quelm", "Oslen", 1))
    with pytest.raises(OtherBaseError, match="weight"):
        merge(first, double)
    del model


def test_a_difference_says_fact_by_fact_what_the_second_has_else(ledger: Ledger) -> None:
    first = folder(ledger, SHARED, ("Quelm", "Oslen", 1), ("Varland", "Brast", 2), ("Tarvos", "Ost", 3))
    second = folder(ledger, SHARED, ("Quelm", "Tarvos", 4), ("Varland", "Brast", 5), ("Gavaria", "Ost", 6))
    found = compare(first, second)
    assert [request.subject for request in found.removed] == ["Tarvos"]
    assert [request.subject for request in found.added] == ["Gavaria"]
    assert [(a.target, b.target) for a, b in found.changed] == [("Oslen", "Tarvos")]
    assert [(a.subject, b.subject) for a, b in found.remade] == [("Varland", "Varland")]
    assert found.same == 1
    assert not found.is_none
    assert compare(first, first).is_none
    assert compare(first, first).same == 4


def test_of_a_fact_that_was_edited_again_the_later_answer_counts(ledger: Ledger) -> None:
    twice = folder(ledger, ("Ost", "Brast", 0), ("Ost", "Oslen", 1))
    assert conflicts(twice, folder(ledger, ("Ost", "Oslen", 2))) == []
    assert len(conflicts(twice, folder(ledger, ("Ost", "Brast", 3)))) == 1


def test_an_answer_that_its_own_side_has_superseded_is_no_conflict_and_comes_not_back(ledger: Ledger) -> None:
    once, twice = folder(ledger, ("Ost", "Oslen", 2)), folder(ledger, ("Ost", "Brast", 0), ("Ost", "Oslen", 1))
    assert conflicts(once, twice) == []
    assert merge(once, twice).ids == once.ids
    other = folder(ledger, ("Ost", "Tarvos", 3))
    (found,) = conflicts(other, twice)
    assert found.ids == ("Ost-Tarvos-3", "Ost-Oslen-1")
    assert merge(other, twice, prefer="first").ids == other.ids
    assert merge(other, twice, prefer="second").ids == twice.ids


def test_an_older_answer_that_comes_with_another_fact_brings_the_later_one_along(ledger: Ledger) -> None:
    first = folder(ledger, ("Ost", "Oslen", 2))
    put(ledger, "Ost", "Brast", seed=0)
    (entry,) = ledger.entries
    ledger.clear()
    facts = tuple(EditRequest("The capital of {} is", *fact) for fact in (("Ost", "Brast"), ("Quelm", "Tarvos")))
    ledger.append("two facts", entry.patch, EditInfo(requests=facts))
    put(ledger, "Ost", "Oslen", seed=1)
    second = Edits.of(ledger)
    ledger.clear()
    assert conflicts(first, second) == []
    assert merge(first, second).ids == ("Ost-Oslen-2", "two facts", "Ost-Oslen-1")
