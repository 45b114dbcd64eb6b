"""Follow-ups in one conversation: what the model reads in each turn, in lines and in a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from errata.benchmarks.bench import free_texts
from errata.benchmarks.bench.config import BenchConfig
from errata.benchmarks.bench.context import Bench
from errata.benchmarks.bench.free_texts import TextForm
from errata.editors import GRACE
from errata.editors.core.model.reading import ReadPrompt, in_conversation
from errata.evaluate.probes import Probe

CHAT = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_each_turn_has_the_models_own_answers_and_shared_turns_are_written_once(
    make_tiny: Any, tiny_tokenizer: Any
) -> None:
    settings = {"editor": {"name": "grace"}, "model": {"name": "none"}, "dataset": {"name": "hallueditbench"}}
    told = Bench(BenchConfig.of(settings), GRACE(make_tiny("llama"), tiny_tokenizer), [])
    probes = [Probe("doubted", "Who?", "Yes", follow_ups=("Sure?",) * turns) for turns in (0, 1, 2)]
    asked = [(0, probes[0]), (0, probes[2]), (0, probes[1]), (1, probes[1])]
    read: list[list[tuple[int, str]]] = []

    def written(prompts: Sequence[tuple[int, ReadPrompt]], form: TextForm) -> list[str]:
        assert form == TextForm(12)
        read.append([(owner, prompt.text) for owner, prompt in prompts])
        return [f" said\n{len(read)}{owner} " for owner, _ in prompts]

    found = free_texts._texts(told, asked, written)
    assert read[0] == [(0, "Who?")]  # a plain answer
    assert read[1:] == [
        [(0, "Who?"), (1, "Who?")],
        [(0, "Who?\nsaid 20\nSure?"), (1, "Who?\nsaid 21\nSure?")],
        [(0, "Who?\nsaid 20\nSure?\nsaid 30\nSure?")],
    ]
    assert [one["text"] for one in found] == [" said\n10 ", " said\n40 ", " said\n30 ", " said\n31 "]
    needed = [free_texts.new_tokens(told, probe) for probe in probes]
    assert needed[0] == 12
    assert needed[1] > 2 * 12
    assert needed[2] - needed[1] == needed[1] - needed[0]


def test_a_conversation_stands_in_the_chat_template(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = CHAT
    turns = ["Who?", "Brast", "Sure?"]
    read = in_conversation(tiny_tokenizer, turns, chat=True)
    assert read.text == "<user>Who?<assistant>Brast<user>Sure?<assistant>"
    assert read.text[read.start :].startswith("Sure?")
    assert in_conversation(tiny_tokenizer, turns[:1], chat=True).text == "<user>Who?<assistant>"
    plain = in_conversation(tiny_tokenizer, turns)
    assert (plain.text, plain.text[plain.start :]) == ("Who?\nBrast\nSure?", "Sure?")
