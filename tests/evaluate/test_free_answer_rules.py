"""The rules for free answers and open texts, each on ten records with scores computed by hand, and the judges."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import errata
from errata.benchmarks.bench.free_texts import TextForm, wild_form
from errata.benchmarks.bench.text_scores import Verdicts
from errata.benchmarks.bench.wild_config import WildConfig
from errata.editors.core.contexts.tf_idf import TfIdf
from errata.editors.core.errors import ConfigError
from errata.evaluate import judging, overlap, scoring
from errata.evaluate.answer_forms import is_exact, squad_form, word_f1
from errata.evaluate.decoding import Decoding, DrawnFromTop
from errata.evaluate.generation import generate
from errata.evaluate.judging import Claim
from errata.evaluate.metrics import case_values, summarise
from errata.evaluate.open_texts import english_words, papers_fluency
from errata.evaluate.outcomes import Outcome, success_by_scoring, unchanged_by_scoring
from errata.evaluate.probes import FreeAnswer, Probe
from errata.evaluate.scoring import ProbeScore

NOTHING = ProbeScore(None, None, (), ())

# What was written up to a stop string, the wanted answer, exact match, and F1 of the sets of words.
WILD_TEN = [
    (" English", "English", 1, 1.0),
    (" the English language", "English language", 1, 1.0),  # articles do not count
    (" English, and French", "English", 0, 2 * 1 / (1 + 3)),
    (" ENGLISH!", "English", 1, 1.0),
    ("", "English", 0, 0.0),
    (" U", "U.S.", 0, 0.0),  # "." ended the answer
    (" us", "U.S.", 1, 1.0),  # without punctuation
    (" Oslen Brast Oslen", "Oslen Brast", 0, 1.0),  # sets of words: a repetition is not seen
    (" a river in Brast", "Brast", 0, 2 * 1 / (1 + 3)),
    (" The", "the", 0, 0.0),  # an empty form is no answer
]


def test_wild_on_ten_records() -> None:
    found = []
    for text, target, exact, f1 in WILD_TEN:
        outcome = Outcome(Probe("rewrite", "Q", target), NOTHING, wild=text)
        got = success_by_scoring(outcome)
        assert got == {"wild": exact, "wild_f1": pytest.approx(f1)}, text
        found.append(case_values([outcome]))
    summary = summarise(found)
    assert (summary["wild"]["reliability"]["mean"], summary["wild"]["reliability"]["n"]) == (pytest.approx(0.4), 10)
    assert summary["wild_f1"]["reliability"]["mean"] == pytest.approx((1 + 1 + 0.5 + 1 + 0 + 0 + 1 + 1 + 0.5 + 0) / 10)


def test_wild_takes_any_spelling_and_no_question_that_needs_several_answers() -> None:
    several = Probe("rewrite", "Q", "Oslen", aliases=("Oslen city",))
    assert success_by_scoring(Outcome(several, NOTHING, wild=" Oslen City"))["wild"] == 1
    both = Probe("rewrite", "Q", "Oslen", also=(("Brast",),))
    assert "wild" not in success_by_scoring(Outcome(both, NOTHING, wild=" Oslen"))
    assert squad_form("An  apple,\na Day") == "apple day"
    assert not is_exact("", [""])
    assert word_f1("x", []) == 0


def test_wilds_locality_is_the_same_text_as_before() -> None:
    probe = Probe("neighborhood", "Q", "Oslen")
    pairs = [(" Oslen", " Oslen", 1), (" Oslen", " the Oslen", 0), ("", "", 1), (" x", " y", 0)]
    for now, then, same in pairs:
        assert unchanged_by_scoring(Outcome(probe, NOTHING, wild=now, wild_before=then)) == {"wild": same}


# --- BLEU and ROUGE-L -------------------------------------------------------------------------------------------------

# A text, the answer, BLEU (geometric mean of the precisions of n-grams, times the penalty of a short text), and the
# share of the answer's words that the text has in order. Below each comment: precisions of 1- to 4-grams.
OVERLAP_TEN = [
    ("a b c d", "a b c d", 1.0, 1.0),
    ("a b c d e", "a b c d f", (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4), 4 / 5),
    ("a b c d", "a b c d e", math.exp(1 - 5 / 4), 4 / 5),  # a short text
    ("a b c d e", "a b c d", (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4), 1.0),
    ("x y", "a b", 0.0, 0.0),
    ("a", "a", 1.0, 1.0),  # of one order only
    ("a b", "a b", 1.0, 1.0),
    ("a c b d", "a b c d", (1 * 1 / 6 * 1 / 8 * 1 / 8) ** (1 / 4), 3 / 4),  # 0/3, 0/2, 0/1, smoothed: 1/6, 1/8, 1/8
    ("a b a b", "a b", (2 / 4 * 1 / 3 * 1 / 4 * 1 / 4) ** (1 / 4), 1.0),  # counts are clipped
    ("a b c", "a b c", 1.0, 1.0),
]


def test_bleu_and_rouge_l_on_ten_records() -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    for text, answer, bleu, rouge_l in OVERLAP_TEN:
        assert overlap.bleu(text, [answer]) == pytest.approx(bleu, abs=1e-6), text
        assert overlap.rouge_l(text, [answer]) == pytest.approx(rouge_l), text
    assert overlap.rouge_l("a b", ["c", "a b"]) == overlap.bleu("a b", ["c", "a b"]) == pytest.approx(1)


@pytest.mark.parametrize("missing", ["sacrebleu", "rouge_score"])
def test_without_its_libraries_overlap_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[overlap\]'"):
        overlap.check_installed()


# --- fluency and consistency ------------------------------------------------------------------------------------------

# A text, and the number of different 2-grams and 3-grams if each comes once: then the entropies are their logarithms.
FLUENT_TEN = [
    ("one two three four", 3, 2),
    ("one two three.", 3, 2),  # the full stop is a unit
    ("it isn't so", 3, 2),  # it is n't so
    ("Brast's river runs", 3, 2),  # Brast 's river runs
    ("3.5 and 4,000 boats", 3, 2),  # numbers are whole
    ("the U.S. is big", 3, 2),
    ("well-known old town", 2, 1),
    ("a, b; c", 4, 3),
    ('he said "yes" then', 5, 4),
    ("Oslen. Brast is", 3, 2),
]


def test_the_papers_fluency_on_ten_records() -> None:
    for text, pairs, triples in FLUENT_TEN:
        by_hand = 100 * (2 / 3 * math.log2(pairs) + 4 / 3 * math.log2(triples)) / 2
        assert papers_fluency([text]) == pytest.approx(by_hand), english_words(text)
    assert papers_fluency(["a a a a a"]) == pytest.approx(0)
    assert papers_fluency([]) is None


def test_words_are_split_as_nltk_splits_a_sentence() -> None:
    nltk = pytest.importorskip("nltk.tokenize")
    sentences = [
        "She didn't see it, and they'll say: it's John's (or the cats').",
        'The "old" town of Oslen -- 3,400 people in 1990; 12% moved...',
        "He cannot pay $4.50 for a well-known book!",
        "Is Brast's boat [the red one] in the U.S. or not?",
        "We gonna go & look @ it, I'd say.",
    ]
    for sentence in sentences:
        theirs = nltk.NLTKWordTokenizer().tokenize(sentence)
        assert len(english_words(sentence)) == len(theirs), (english_words(sentence), theirs)


CONSISTENT_TEN = ["a river in Brast", "the old town", "Brast has a river", "a river", "old boats in the old town",
                  "lace and boats", "the town of Brast", "lace", "in in in", "boats on the river"]  # fmt: skip


def test_consistency_by_hand_on_ten_records() -> None:
    learned = TfIdf.of(["river town", "river lace"])
    common, rare = math.log(3 / 3) + 1, math.log(3 / 2) + 1
    assert learned.idf == pytest.approx({"river": common, "town": rare, "lace": rare})
    norm = math.sqrt(common**2 + rare**2)
    ten = [
        ("river", "river", 1), ("river", "town", 0), ("River, river!", "river", 1),
        ("river town", "river", common / norm), ("river town", "town", rare / norm), ("x", "river", 0), ("", "", 0),
        ("river town", "town river", 1),
        ("town lace", "town", math.sqrt(0.5)), ("river town", "river lace", common**2 / norm**2),
    ]  # fmt: skip
    for text, reference, cosine in ten:
        assert 100 * learned.cosine(text, reference) == pytest.approx(100 * cosine), (text, reference)


def test_consistency_is_that_of_scikit_learns_vectors() -> None:
    sklearn = pytest.importorskip("sklearn.feature_extraction.text")
    vectors = sklearn.TfidfVectorizer().fit(CONSISTENT_TEN).transform(CONSISTENT_TEN)
    learned = TfIdf.of(CONSISTENT_TEN)
    theirs = (vectors @ vectors.T).toarray()
    for i, one in enumerate(CONSISTENT_TEN):
        for j, other in enumerate(CONSISTENT_TEN):
            assert 100 * learned.cosine(one, other) == pytest.approx(100 * theirs[i, j], abs=1e-9)


def test_essence_drift_is_the_logarithm_of_a_ratio_of_perplexities() -> None:
    probe = Probe("essence", "Oslen", "is a town")
    before, after = ProbeScore(math.log(2.0), None, (), ()), ProbeScore(math.log(3.0), None, (), ())
    values = case_values([Outcome(probe, after, before)])
    assert values == {"probability": {"essence_drift": pytest.approx(math.log(1.5))}}
    assert not probe.wants_text


# --- how texts are written --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def testbed() -> tuple[Any, Any]:
    return errata.load("world")


def test_draws_depend_on_their_own_prompt_alone(testbed: tuple[Any, Any]) -> None:
    prompts = ["We read that", "It is well known that Gavaria", "In those years"]
    drawn = Decoding(top_k=5, seed=1)
    together = generate(*testbed, prompts, 8, decoding=drawn)
    alone = [generate(*testbed, [prompt], 8, decoding=drawn)[0] for prompt in reversed(prompts)]
    assert together == alone[::-1]
    assert generate(*testbed, prompts, 8, decoding=Decoding(top_k=5, seed=2)) != together
    assert generate(*testbed, prompts, 8, decoding=Decoding(top_k=1)) == generate(*testbed, prompts, 8)


def test_tokens_are_drawn_by_their_probabilities_among_the_likeliest() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    counts = torch.zeros(4)
    for row in range(500):
        draw = DrawnFromTop([[row]], 1, Decoding(top_k=2, seed=3))
        counts[draw(torch.zeros(1, 1), logits[None]).argmax()] += 1
    assert counts[2:].sum() == 0
    assert counts[0] / 500 == pytest.approx(0.625, abs=0.06)  # 0.5 / 0.8; 0.06 are 2.8 standard errors


def test_a_text_ends_before_the_first_stop_string(testbed: tuple[Any, Any]) -> None:
    prompts = ["Q: Which city is the capital of Gavaria? A:", "We read that Gavaria"]
    whole = generate(*testbed, prompts, 16)
    cut = generate(*testbed, prompts, 16, decoding=Decoding(stop=(".", "\n")))
    assert cut == [text.partition(".")[0].partition("\n")[0] for text in whole]
    assert any(len(one) < len(other) for one, other in zip(cut, whole, strict=True))


def test_an_instruction_stands_around_the_prompt() -> None:
    assert TextForm(5, instruction="Q: {}\nA:").around("Who?") == "Q: Who?\nA:"
    assert TextForm(5).around("Who?") == "Who?"


# --- judges -----------------------------------------------------------------------------------------------------------

CLAIMS = [Claim("Q", ("Oslen",), " Oslen"), Claim("Q", ("Oslen",), " Brast"), Claim("Q", ("Oslen",), " Oslen")]


@pytest.fixture
def judges(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    module = ModuleType("judges_of_a_test")
    vars(module)["contains"] = lambda claims: [claim.answers[0] in claim.text for claim in claims]
    vars(module)["short"] = lambda _: [True]
    vars(module)["broken"] = lambda _: 1 / 0
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield module


def test_code_that_a_flag_does_not_trust_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "evil_judge_of_a_test.py").write_text(
        f"from pathlib import Path\nPath({str(marker)!r}).touch()\njudge = lambda claims: [True] * len(claims)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="trust_judge_code=true"):
        judging.find_judge("evil_judge_of_a_test:judge", trust_code=False)
    assert not marker.exists()
    judging.find_judge("evil_judge_of_a_test:judge", trust_code=True)
    assert marker.exists()


@pytest.mark.usefixtures("judges")
def test_verdicts_are_asked_once_and_written_down() -> None:
    written: list[dict[str, Any]] = []
    asked: list[int] = []
    found = judging.find_judge("judges_of_a_test:contains", trust_code=True)

    def counting(claims: Any) -> Any:
        asked.append(len(claims))
        return found(claims)

    verdicts = Verdicts("contains", counting, keep=written.append)
    assert verdicts.of(CLAIMS) == [True, False, True]
    assert asked == [2]
    again = Verdicts("contains", counting, {entry["claim"]: entry["verdict"] for entry in written})
    assert again.of(CLAIMS) == [True, False, True]
    assert asked == [2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("judges_of_a_test:gone", "no function"),
        ("no_such_module_at_all:judge", "cannot be imported"),
        ("nonsense", "unknown judge"),
    ],
)
@pytest.mark.usefixtures("judges")
def test_a_judge_that_is_not_there_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        judging.find_judge(name, trust_code=True)


@pytest.mark.parametrize(("name", "message"), [("short", "expected 3 times"), ("broken", "ZeroDivisionError")])
def test_a_judge_that_fails_is_named(judges: ModuleType, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        judging.verdicts(getattr(judges, name), name, CLAIMS)


def test_a_model_judges_by_the_likelier_letter(monkeypatch: pytest.MonkeyPatch, testbed: tuple[Any, Any]) -> None:
    asked: list[Probe] = []

    def scored(_model: Any, _tokenizer: Any, probes: list[Probe], **_: Any) -> list[ProbeScore]:
        asked.extend(probes)
        return [ProbeScore(1.0, 2.0 if "answer: Oslen\n\n" in probe.prompt else 0.5, (), ()) for probe in probes]

    monkeypatch.setattr(scoring, "score", scored)
    assert judging.model_judge(*testbed)(CLAIMS) == [True, False, True]
    assert all((probe.target, probe.other, probe.chat) == ("A", "B", False) for probe in asked)


@pytest.mark.parametrize(
    "fields",
    [
        {"judge": "a:b"},  # without tokens
        {"tokens": 5, "judge": "model"},
        {"tokens": 5, "judge_model": "x"},
        {"tokens": 5, "instruction": "no slot"},
        {"tokens": 5, "stop": ("",)},
        {"tokens": -1},
    ],
)
def test_settings_without_effect_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        WildConfig(**fields)


def test_what_is_not_read_right_behind_the_prompt_has_no_answer_of_wild() -> None:
    bench: Any = SimpleNamespace(config=SimpleNamespace(wild=WildConfig(tokens=5)))
    asked = [
        Probe("rewrite", "Q", "Oslen"),
        Probe("unrelated", "Q"),
        Probe("rewrite", "Q", "Oslen", free=FreeAnswer(after="Answer:")),
        Probe("generation", "Q"),
        Probe("essence", "Q", "Oslen"),
    ]
    assert [wild_form(bench, probe) is not None for probe in asked] == [True, True, False, False, False]
