"""How a prompt is placed and asked, beyond the templates themselves. Pure functions of text."""

from __future__ import annotations

from errata.benchmarks.testbed.world_generator import share

BEFORE = (
    "The old widow mended a rope near the bridge.",
    "It was warm at noon.",
    "A stranger sold three cups behind the barn.",
    "Last winter her sister broke a lantern.",
)
"""Sentences that a prompt may stand behind; which one is decided by the prompt."""


def behind_a_sentence(prompt: str) -> str:
    """The prompt as it stands in running text, with a sentence before it."""
    return f"{BEFORE[int(share(prompt) * len(BEFORE))]} {prompt}"


def open_question(template: str) -> str:
    """`Q: Where was {} born? A:` as zsRE's locality prompts ask it: `nq question: Where was {} born?`."""
    return template.replace("Q: ", "nq question: ").removesuffix(" A:")
