"""A prompt as the model reads it: plain, or inside an instruct model's own chat template, ready for the answer.

    in_chat(tokenizer, "Where does Danielle Darrieux come from?").text
    # "<|im_start|>user\nWhere does Danielle Darrieux come from?<|im_end|>\n<|im_start|>assistant\n"

The template is the tokenizer's. What a tokenizer puts before every text is left out here, so that exactly one token
begins the text once it is tokenised like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from errata.editors.core.errors import RequestError
from errata.editors.core.model.tokens import Tokenizer, answer_ids, prompt_ids

_ANSWER = "Xq7Zk"  # stands for an answer, to see what a template writes in front of one


@dataclass(frozen=True)
class ReadPrompt:
    """A prompt as the model reads it.

    Attributes:
        text: Everything up to the place where the answer begins.
        start: Where the prompt that was written begins in `text`, in characters.
        join: What stands between `text` and an answer; None: see `joining.joined`.
    """

    text: str
    start: int
    join: str | None


def in_chat(tokenizer: Tokenizer, message: str) -> ReadPrompt:
    """Return a message as the chat template asks it.

    Raises:
        RequestError: the tokenizer has no chat template, or the template drops or changes the message.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError(
            "the tokenizer has no chat template, so that chat=True has no form; use an instruct model, or write the "
            "prompt as its text",
            field="chat",
        )
    turns = [{"role": "user", "content": message}]
    text, turn = (_rendered(tokenizer, turns, add_generation_prompt=asks) for asks in (True, False))
    # In the message's own turn: a word such as "assistant" may also be in what begins the answer.
    start = text.rfind(message, 0, len(turn) if text.startswith(turn) else len(text))
    if start < 0:
        raise RequestError(
            f"the chat template changes the message {message[:60]!r}; give it without white space around it",
            field="prompt",
        )
    return ReadPrompt(text, start, _join(tokenizer, turns, text))


def as_read(tokenizer: Tokenizer, prompt: str, *, chat: bool = False, join: str | None = None) -> ReadPrompt:
    """Return the text that a model reads for a prompt, plain or in its chat form.

    Args:
        prompt: The prompt as it was written.
        chat: Whether it is a message of a chat.
        join: What stands between prompt and answer where the user says so.

    Raises:
        RequestError: as `in_chat`.
    """
    if not chat:
        return ReadPrompt(prompt, 0, join)
    read = in_chat(tokenizer, prompt)
    return read if join is None else replace(read, join=join)


def in_conversation(tokenizer: Tokenizer, turns: Sequence[str], *, chat: bool = False) -> ReadPrompt:
    """Return a conversation as the model reads it, ready for the answer to its last message.

    Args:
        tokenizer: The tokenizer.
        turns: What was said in turn: a message, the model's answer, the next message, ...; the last is a message.
        chat: Whether it stands in the chat template; otherwise each turn is a line.

    Raises:
        RequestError: The tokenizer has no chat template.
    """
    if not chat:
        return ReadPrompt("\n".join(turns), sum(len(turn) + 1 for turn in turns[:-1]), None)
    first = in_chat(tokenizer, turns[0])
    if len(turns) == 1:
        return first
    said = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    text = _rendered(tokenizer, said, add_generation_prompt=True)
    return ReadPrompt(text, max(0, text.rfind(turns[-1])), first.join)


def read_ids(
    tokenizer: Tokenizer, prompt: str, answer: str | None, *, chat: bool = False, join: str | None = None
) -> tuple[list[int], list[int]]:
    """Return the ids of a prompt and those of its answer (none without one), as the model reads them.

    Raises:
        RequestError: as `in_chat` and `answer_ids`.
    """
    read = as_read(tokenizer, prompt, chat=chat, join=join)
    answer_tokens = answer_ids(tokenizer, read.text, answer, read.join) if answer else []
    return prompt_ids(tokenizer, read.text), answer_tokens


def _join(tokenizer: Tokenizer, turns: list[dict[str, str]], text: str) -> str:
    """What stands between the prompt and an answer in a conversation that the template has written whole."""
    whole = _rendered(tokenizer, [*turns, {"role": "assistant", "content": _ANSWER}], add_generation_prompt=False)
    end = whole.rfind(_ANSWER)
    return whole[len(text) : end] if end >= len(text) and whole.startswith(text) else ""


def _rendered(tokenizer: Tokenizer, turns: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
    begin = getattr(tokenizer, "bos_token", None)
    adds_one = begin is not None and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(begin) if adds_one and begin else text
