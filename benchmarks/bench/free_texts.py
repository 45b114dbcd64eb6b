"""What a run lets the model write behind each probe's prompt: the plain text, and the answer as WILD reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from errata.benchmarks.bench.context import Bench
from errata.editors.core.contexts.asking import AskedPrompt, read_on
from errata.editors.core.forward.row_patches import UNTOUCHED, RowPatches
from errata.editors.core.model.reading import ReadPrompt, as_read
from errata.editors.core.model.tokens import prompt_ids
from errata.evaluate.decoding import GREEDY, Decoding
from errata.evaluate.generation import continue_edited, generate
from errata.evaluate.open_texts import PAPERS_TOKENS, PAPERS_TOP_K
from errata.evaluate.probes import Probe

Written = Callable[[Sequence[tuple[int, ReadPrompt]], "TextForm"], list[str]]
Asked = Sequence[tuple[int, Probe]]


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
    return TextForm(wild.tokens, Decoding(stop=wild.stop), wild.instruction) if is_asked else None


def new_tokens(bench: Bench, probe: Probe) -> int:
    """Return how many tokens are written behind a probe's prompt, at most; those of an instruction count too."""
    plain, wild = plain_form(bench, probe), wild_form(bench, probe)
    extra = 0
    if wild is not None:
        extra = wild.tokens + (len(prompt_ids(bench.tokenizer, wild.instruction)) if wild.instruction else 0)
    return max(0 if plain is None else plain.tokens, extra)


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
    plain = _of_form(bench, asked, [plain_form(bench, probe) for _, probe in asked], written)
    if not bench.config.wild.tokens:
        return [{"text": text} for text in plain]
    wild = _of_form(bench, asked, [wild_form(bench, probe) for _, probe in asked], written)
    return [{"text": text, "wild": answer} for text, answer in zip(plain, wild, strict=True)]


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
