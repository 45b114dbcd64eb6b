"""What a run lets the model write behind each probe's prompt: the plain text, and the answer as WILD reads it.

A probe with follow-ups is a conversation: the model answers its prompt, is told the first follow-up, answers that, and
so on. Its text is the last answer. Probes of one question share the turns that they have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from errata.benchmarks.bench.context import Bench
from errata.editors.core.contexts.asking import AskedPrompt, read_on
from errata.editors.core.forward.row_patches import UNTOUCHED, RowPatches
from errata.editors.core.model.reading import ReadPrompt, as_read, in_conversation
from errata.editors.core.model.tokens import prompt_ids
from errata.evaluate.decoding import GREEDY, Decoding
from errata.evaluate.generation import continue_edited, generate
from errata.evaluate.open_texts import PAPERS_TOKENS, PAPERS_TOP_K
from errata.evaluate.probes import Probe

Written = Callable[[Sequence[tuple[int, ReadPrompt]], "TextForm"], list[str]]
Asked = Sequence[tuple[int, Probe]]
Turn = tuple[int, str, bool, tuple[str, ...]]  # owner, question, in chat, the follow-ups so far


@dataclass(frozen=True)
class TextForm:
    """How long a text is at most, and how it is written; `instruction` stands around the prompt, with {} for it."""

    tokens: int
    decoding: Decoding = GREEDY
    instruction: str | None = None

    def around(self, prompt: str) -> str:
        """Return what is asked for a prompt."""
        return prompt if self.instruction is None else self.instruction.replace("{}", prompt)


def plain_form(bench: Bench, probe: Probe) -> TextForm | None:
    """Return how the plain text behind a probe's prompt is written; None: there is none."""
    generation, is_open = bench.config.generation, probe.kind == "generation"
    if not probe.wants_text:
        return None
    if is_open and generation.fluency == "papers" and generation.fluency_tokens:
        drawn = Decoding(top_k=PAPERS_TOP_K, seed=bench.config.seed)
        return TextForm(_after_prompt(bench, probe, PAPERS_TOKENS), drawn)
    if probe.free.tokens is not None:
        tokens = probe.free.tokens
        return TextForm(_after_prompt(bench, probe, tokens) if probe.free.with_prompt else tokens)
    tokens = generation.fluency_tokens if is_open else generation.tokens
    return TextForm(tokens) if tokens else None


def wild_form(bench: Bench, probe: Probe) -> TextForm | None:
    """Return how WILD's answer is written; None: the run does not ask for it, or the probe has no such answer."""
    wild = bench.config.wild
    is_asked = wild.tokens and probe.wants_text and probe.kind != "generation" and probe.free.after is None
    is_asked = is_asked and not probe.follow_ups
    return TextForm(wild.tokens, Decoding(stop=wild.stop), wild.instruction) if is_asked else None


def new_tokens(bench: Bench, probe: Probe) -> int:
    """Return how many tokens are written behind a probe's prompt, at most; those of an instruction count too."""
    plain, wild = plain_form(bench, probe), wild_form(bench, probe)
    extra = 0
    if wild is not None:
        extra = wild.tokens + (len(prompt_ids(bench.tokenizer, wild.instruction)) if wild.instruction else 0)
    return max(0 if plain is None else _in_turns(bench, probe, plain.tokens), extra)


def _in_turns(bench: Bench, probe: Probe, tokens: int) -> int:
    """Return how many tokens stand behind a prompt once the model has answered all follow-ups."""
    if not probe.follow_ups:
        return tokens
    turns = [probe.prompt, *(turn for follow_up in probe.follow_ups for turn in ("", follow_up))]
    asked, first = (in_conversation(bench.tokenizer, said, chat=probe.chat).text for said in (turns, turns[:1]))
    behind = len(prompt_ids(bench.tokenizer, asked)) - len(prompt_ids(bench.tokenizer, first))
    return behind + tokens * (1 + len(probe.follow_ups))


def _after_prompt(bench: Bench, probe: Probe, tokens: int) -> int:
    """Return how many of `tokens` are left behind the prompt; at least one."""
    prompt = as_read(bench.tokenizer, probe.prompt, chat=probe.chat).text
    return max(1, tokens - len(prompt_ids(bench.tokenizer, prompt)))


def written_as_it_stands(bench: Bench, probes: Sequence[Probe]) -> list[dict[str, Any]]:
    """Return the texts behind each probe's prompt, of the model as it stands: {"text"} and, if asked for, {"wild"}."""

    def written(prompts: Sequence[tuple[int, ReadPrompt]], form: TextForm) -> list[str]:
        texts = [prompt for _, prompt in prompts]
        limit = {"batch_tokens": bench.batch_tokens}
        return generate(bench.model, bench.tokenizer, texts, form.tokens, decoding=form.decoding, **limit)

    return _texts(bench, [(UNTOUCHED, probe) for probe in probes], written)


def written_edited(bench: Bench, patches: RowPatches, asked: Asked) -> list[dict[str, Any]]:
    """Return the texts behind each probe's prompt, each of the model as its own edit makes it; as above."""

    def written(prompts: Sequence[tuple[int, ReadPrompt]], form: TextForm) -> list[str]:
        limit = {"batch_tokens": bench.batch_tokens}
        found = continue_edited(patches, bench.tokenizer, prompts, form.tokens, decoding=form.decoding, **limit)
        return [continuation.text for continuation in found]

    return _texts(bench, asked, written)


def _texts(bench: Bench, asked: Asked, written: Written) -> list[dict[str, Any]]:
    forms = [None if probe.follow_ups else plain_form(bench, probe) for _, probe in asked]
    plain = _of_form(bench, asked, forms, written)
    if any(probe.follow_ups for _, probe in asked):
        last = _last_answers(bench, asked, written)
        plain = [last.get(i, text) for i, text in enumerate(plain)]
    if not bench.config.wild.tokens:
        return [{"text": text} for text in plain]
    wild = _of_form(bench, asked, [wild_form(bench, probe) for _, probe in asked], written)
    return [{"text": text, "wild": answer} for text, answer in zip(plain, wild, strict=True)]


def _last_answers(bench: Bench, asked: Asked, written: Written) -> dict[int, str]:
    """Return what the model says to the last follow-up of each probe that has some, by the probe's index."""
    forms = {i: plain_form(bench, probe) for i, (_, probe) in enumerate(asked) if probe.follow_ups}
    open_ones = {i: form for i, form in forms.items() if form is not None}
    questions = dict.fromkeys((asked[i][1].prompt, asked[i][1].chat) for i in open_ones)
    # Facts of an edit stand before the first message.
    read = read_on(bench.model, bench.tokenizer, [AskedPrompt(prompt) for prompt, _ in questions])
    first = {question: one.text for question, one in zip(questions, read, strict=True)}
    said: dict[Turn, str] = {}
    for turn in range(max((1 + len(asked[i][1].follow_ups) for i in open_ones), default=0)):
        due = [(i, form) for i, form in open_ones.items() if len(asked[i][1].follow_ups) >= turn]
        for form in dict.fromkeys(form for _, form in due):
            wanted = list(dict.fromkeys(_turn(asked[i], turn) for i, own in due if own == form))
            prompts = [(one[0], _conversation(bench, said, first, one)) for one in wanted]
            said |= zip(wanted, written(prompts, form), strict=True)
    return {i: said[_turn(asked[i], len(asked[i][1].follow_ups))] for i in open_ones}


def _turn(one: tuple[int, Probe], turn: int) -> Turn:
    owner, probe = one
    return owner, probe.prompt, probe.chat, probe.follow_ups[:turn]


def _conversation(
    bench: Bench, said: Mapping[Turn, str], first: Mapping[tuple[str, bool], str], turn: Turn
) -> ReadPrompt:
    """Return the conversation up to a follow-up, with the model's answers to those before it."""
    owner, prompt, chat, follow_ups = turn
    turns = [first[prompt, chat]]
    for i, follow_up in enumerate(follow_ups):
        turns += [" ".join(said[owner, prompt, chat, follow_ups[:i]].split()), follow_up]
    return in_conversation(bench.tokenizer, turns, chat=chat)


def _of_form(bench: Bench, asked: Asked, forms: Sequence[TextForm | None], written: Written) -> list[str | None]:
    """Return the text behind each probe's prompt in its form. One prompt can be an open one of one case and a neighbour
    of another, so that texts of different forms are kept apart."""
    found: dict[tuple[int, ReadPrompt, TextForm], str] = {}
    around = [probe.prompt if form is None else form.around(probe.prompt) for (_, probe), form in _both(asked, forms)]
    questions = [AskedPrompt(prompt, probe.chat) for prompt, (_, probe) in zip(around, asked, strict=True)]
    prompts = read_on(bench.model, bench.tokenizer, questions)
    keys = [
        None if form is None else (owner, prompt, form)
        for ((owner, _), form), prompt in zip(_both(asked, forms), prompts, strict=True)
    ]
    each = dict.fromkeys(form for form in forms if form is not None)
    for form in sorted(each, key=lambda one: one.tokens):
        wanted = list(dict.fromkeys(key[:2] for key in keys if key is not None and key[2] == form))
        for (owner, prompt), text in zip(wanted, written(wanted, form), strict=True):
            found[owner, prompt, form] = text
    return [None if key is None else found[key] for key in keys]


def _both(asked: Asked, forms: Sequence[TextForm | None]) -> list[tuple[tuple[int, Probe], TextForm | None]]:
    return list(zip(asked, forms, strict=True))
