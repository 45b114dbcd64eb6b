"""Every figure of the pages is drawn from data that are kept beside it, and the pages state the same numbers."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from errata.benchmarks.speed.report import rows as speed_rows
from errata.benchmarks.tracing.trace_summary import best_cells

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
FIGURES = DOCS / "figures"
SCREENSHOTS = {"playground"}  # taken of a page in a browser


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FIGURES)
    return importlib.import_module("draw")


def data_of(name: str) -> dict[str, Any]:
    return json.loads((FIGURES / f"{name}.json").read_text(encoding="utf-8"))


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def cells(text: str, heading: str) -> list[list[str]]:
    """The rows of the first table below a line that holds `heading`."""
    lines = iter(text[text.index(heading) :].splitlines())
    table = []
    for line in lines:
        if line.startswith("|"):
            table.append([cell.strip() for cell in line.strip("|").split("|")])
        elif table:
            break
    return [row for row in table if not re.fullmatch(r"[-: ]+", "".join(row))]


def test_every_picture_of_the_pages_has_its_data_or_is_a_screenshot(draw: ModuleType) -> None:
    shown = {
        Path(name).stem for text in DOCS.glob("*.md") for name in re.findall(r"\]\(([\w-]+\.png)\)", page(text.name))
    }
    shown |= set(re.findall(r"\(docs/([\w-]+)\.png\)", (ROOT / "README.md").read_text(encoding="utf-8")))
    there = {path.stem for path in DOCS.glob("*.png")}
    assert shown == there
    assert there - SCREENSHOTS == set(draw.DRAWN) == {path.stem for path in FIGURES.glob("*.json")}


def test_every_figure_was_drawn_from_the_data_beside_it(draw: ModuleType) -> None:
    for name in draw.DRAWN:
        kept = Image.open(DOCS / f"{name}.png")
        assert kept.text[draw.CHUNK] == draw.digest(data_of(name)), f"python docs/figures/draw.py {name}"  # type: ignore[attr-defined]


def test_no_data_of_a_figure_names_a_path_of_the_machine_that_measured_it() -> None:
    for path in FIGURES.glob("*.json"):
        assert not re.findall(r'"/\w[^"]*/[^"]*"', path.read_text(encoding="utf-8")), path.name


# Drawing all takes 12 seconds.
@pytest.mark.parametrize("part", ["first", pytest.param("others", marks=pytest.mark.slow)])
def test_figures_are_drawn_again_with_their_size_and_digest(draw: ModuleType, tmp_path: Path, part: str) -> None:
    names = sorted(draw.DRAWN)
    for name in names[:2] if part == "first" else names[2:]:
        (tmp_path / f"{name}.png").write_bytes(draw.drawn(name))
        kept, new = (Image.open(folder / f"{name}.png") for folder in (DOCS, tmp_path))
        assert new.text[draw.CHUNK] == kept.text[draw.CHUNK]  # type: ignore[attr-defined]
        assert new.size == kept.size, name


def test_another_number_gives_another_digest(draw: ModuleType) -> None:
    data = data_of("speed")
    data["comparisons"][0]["ratio"] += 0.1
    assert draw.digest(data) != draw.digest(data_of("speed"))


# --- the pages' numbers ----------------------------------------------------------------------------------------------


def test_the_tables_of_speed_state_the_numbers_of_the_figure() -> None:
    text = page("performance.md")
    table = [row for row in cells(text, "| phase | what | ours, s") if row[0] != "phase"]
    table += [row for row in cells(text, "The phase grace") if row[0] != "phase"]
    told = [[re.sub(r"^(\d+)\.0$", r"\1", cell) for cell in row] for row in table]
    assert told == [list(row) for row in speed_rows(data_of("speed"))]


def test_the_page_on_training_states_the_numbers_of_the_figure() -> None:
    data, text = data_of("training"), page("training.md")
    lines = re.findall(
        r"^step +(\d+) +edit ([\d.]+), locality ([\d.]+), gradient ([\d.]+) +held out: (.*)$", text, re.MULTILINE
    )
    assert [int(line[0]) for line in lines] == [entry["step"] for entry in data["history"]]
    for (_, *losses, scores), entry in zip(lines, data["history"], strict=True):
        assert [float(loss) for loss in losses] == [entry["losses"][name] for name in ("edit", "locality", "gradient")]
        for name, right, preferred in re.findall(r"(\w+) ([\d.]+)% \(([\d.]+)%\)", scores):
            held = entry["held_out"]
            assert f"{100 * held['teacher_forced'][name]['mean']:.1f}" == right
            assert f"{100 * held['probability'][name]['mean']:.1f}" == preferred
    best = data["best"]["step"]
    assert f"kept: step {best:6d}" in text
    kept = next(entry["held_out"] for entry in data["history"] if entry["step"] == best)
    row = next(row for row in cells(text, "distracting locality |") if row[0].startswith("held out"))
    names = ("reliability", "generalization", "locality")
    told = [[100 * kept[way][name]["mean"] for way in ("teacher_forced", "probability")] for name in names]
    assert row[1:4] == [f"{right:.1f} ({preferred:.1f})" for right, preferred in told]


def test_the_tables_of_equal_damage_state_the_numbers_of_the_figure(draw: ModuleType) -> None:
    data, text = data_of("equal_damage"), page("equal-damage.md")
    for where in draw.equal_damage.TITLES:
        assert "\n".join(draw.equal_damage.table(data, where)) in text, where
        told = data[where]["text"]
        assert f"{told['tokens']:,} tokens in {told['rows']} rows" in text


def test_the_tables_of_quantising_edits_state_the_numbers_of_the_figure(draw: ModuleType) -> None:
    data, text = data_of("quantising"), page("quantising-edits.md")
    told = draw.quantising
    tables = (told.kept_lines, told.change_lines, told.rounded_lines, told.grid_lines, told.real_lines)
    for lines in tables:
        assert "\n".join(lines(data)) in text
    assert all(own["same_weights"] and own["n"] == 30 and not own["refused"] for own in data["world"])
    assert {row["n"] for row in data["real"]} == {20}


def test_the_tables_of_composing_interventions_state_the_numbers_of_the_figure(draw: ModuleType) -> None:
    data, text = data_of("composing"), page("composing-interventions.md")
    for where in ("world", "real"):
        for lines in (draw.composing.order_lines, draw.composing.rest_lines):
            assert "\n".join(lines(data, where)) in text, (lines.__name__, where)
    assert "\n".join(draw.composing.kept_lines(data)) in text
    data = data_of("unlearning")
    for lines in (draw.unlearning.edit_lines, draw.unlearning.forgotten_lines):
        assert "\n".join(lines(data)) in text, lines.__name__


def test_the_page_on_results_states_the_numbers_of_the_demo() -> None:
    runs = data_of("demo")["runs"]
    table = {row[0]: row[1:] for row in cells(page("results-on-the-testbed.md"), "| | ROME |")}
    for name in ("reliability", "locality"):
        told = [f"{100 * run['summary']['probability'][name]['mean']:.0f}" for run in runs]
        assert table[f"{name}, %"] == told
    assert table["disabling edits, of 20"] == [str(run["disabling"]) for run in runs]
    assert table["largest perplexity, after over before"] == [f"{max(run['perplexity_ratios']):.3g}" for run in runs]


def test_the_page_on_locating_states_the_numbers_of_the_figure() -> None:
    data, text = data_of("locating"), page("locating-facts.md")
    table = {row[0]: row[1:] for row in cells(text, "| token | hidden state")}
    told: dict[str, list[str]] = {}
    for found in data["effects"].values():
        for name, layer, *numbers in best_cells(found["logit_difference"]):
            mean, low, high = (f"{number:.2f}" for number in numbers)
            told.setdefault(name, []).append(f"{mean} [{low}, {high}], {layer}")
    assert {name: row for name, row in table.items() if name in told} == told
    counts = data["counts"]
    assert f"the first {counts['traced']} facts" in text
    assert f"{counts['answered otherwise']:,} others were answered otherwise" in text
    assert f"{counts['no donor found']} had no donor" in text


def test_the_page_on_information_flow_tells_what_its_figure_shows() -> None:
    data, text = data_of("information_flow"), page("information-flow.md")
    assert (data["prompt"], data["threshold"]) == ("The Eiffel Tower is in the city of", 0.04)
    assert f'prompt="{data["prompt"]}"' in text
    names, layers = data["tokens"], data["layers"]

    def brought(layer: int, *tokens: str) -> float:
        return sum(sum(row) for name, row in zip(names, layers[layer]["attention"], strict=True) if name in tokens)

    # What the heads bring from the subject, from the word that says what is asked, and what the MLPs add.
    late = range(2, len(layers))
    assert max(late, key=lambda layer: brought(layer, "iffel", " Tower")) == 23
    assert max(range(len(layers)), key=lambda layer: brought(layer, " city")) == 1
    assert sorted(range(24, len(layers)), key=lambda layer: layers[layer]["mlp"])[-2:] == [24, 29]
    assert names[data["token_shares"].index(max(data["token_shares"]))] == "The"


def test_the_page_on_information_flow_states_the_shares_of_many_facts() -> None:
    text = " ".join(page("information-flow.md").split())
    for found, layer in zip(data_of("flow_facts")["models"], (23, 3), strict=True):
        shares = found["subject"]
        assert max(range(len(shares["mean"])), key=lambda each: shares["mean"][each]) == layer
        mean, low, high = (f"{shares[end][layer]:.2f}" for end in ("mean", "low", "high"))
        assert f"{mean} [{low}, {high}]" in text
        assert f"{found['n']} facts" in text


def test_the_page_on_heads_states_the_numbers_of_the_figure() -> None:
    data, text = data_of("heads"), " ".join(page("heads.md").split())
    counts, spent = data["counts"], data["perplexity"]
    assert f"the first {counts['ranked'] + counts['measured']} facts" in text
    assert f"{counts['unknown']:,} others were answered otherwise" in text
    rows = {(row[0], row[1]): row[2:] for row in cells(page("heads.md"), "| head | factor")[1:]}
    for sweep in data["sweeps"]:
        for effect in sweep["effects"]:
            factor = f"{effect['factor']:g}"
            key = ("none", "1") if factor == "1" else (sweep["head"], factor)
            perplexity = spent["plain"] if factor == "1" else spent[sweep["head"]].get(factor)
            shares = [effect[name]["mean"] for name in ("context", "memory", "other", "remembered")]
            if key in rows:
                assert rows[key] == [*(f"{100 * share:.0f} %" for share in shares), f"{perplexity:.1f}"]
    memory, context = (data["strongest"][side][0] for side in ("memory", "context"))
    assert (memory["head"], f"{memory['mean']:.2f}", f"{memory['low']:.2f}") == ("23.3", "-0.97", "-1.37")
    told = (f"{context[end]:.2f}" for end in ("mean", "low", "high"))
    assert "{} [{}, {}]".format(*told) in text


def test_the_page_on_leaks_states_the_numbers_of_the_figure(draw: ModuleType) -> None:
    data, text = data_of("leaks"), page("leaks.md")
    for heading, rows in (
        ("## Every method", draw.leaks.methods(data["testbed"]["rows"])),
        ("## Leaving out", draw.leaks.cures(data["testbed"]["rows"])),
        ("## On a real", draw.leaks.methods(data["real"]["rows"])),
    ):
        assert cells(text, heading)[1:] == rows


def test_the_page_on_behaviour_edits_states_the_numbers_of_the_figure(draw: ModuleType) -> None:
    data, text = data_of("behaviour"), page("behaviour-edits.md")
    assert cells(text, "## On a real model")[1:] == draw.behaviour.strengths(data)
    assert cells(text, "### Every kind")[1:] == draw.behaviour.kinds(data_of("behaviour_kinds"))
    for number in (data["n"], data["learnt_from"], data["text_tokens"]):
        assert f"{number:,}" in text[text.index("## On a real model") :]


def test_the_first_figure_shows_what_the_bundled_model_does(draw: ModuleType) -> None:
    data = draw.ledger.measure()
    assert data == data_of("ledger")
    assert data["weights_that_differ_at_the_end"] == 0
    answers = [state["answers"] for state in data["states"]]
    assert answers[3] == [answers[0][0], answers[2][1]]  # the first fact is taken back, the second stays
    assert answers[4] == answers[0]


def test_the_page_on_attribution_states_the_numbers_of_the_figure(draw: ModuleType) -> None:
    data, text = data_of("attribution"), page("attribution.md")
    for lines in (draw.attribution.fits(data), draw.attribution.edits(data)):
        assert "\n".join(lines) in text
    for where in ("testbed", "real"):
        counts = data[where]
        assert (
            f"{len(counts['facts'])} facts, {counts['n_components']} components and {counts['n_masks']:,} masks" in text
        )
    forgotten = next(row for row in data["edits"] if "forget" in row["name"])
    assert f"{forgotten['reached']} of {forgotten['n']} true answers were no longer said" in text


def test_the_page_on_finding_settings_states_the_numbers_of_the_figure(draw: ModuleType) -> None:
    data, text = data_of("tuning"), page("tuning.md")
    assert cells(text, "| model | found")[1:] == draw.tuning.gains(data)
    assert cells(text, "| model | layers")[1:] == draw.tuning.correlations(data)
