"""The folder that holds a testbed: plain Hugging Face model and tokenizer, its world, its text, and how it was made.

model.safetensors  config.json  tokenizer.json ...   float16 on disk, opened as float32 by plain `from_pretrained`
facts.json         the world, with what the model knows of each fact
text.jsonl.gz      text as in training, for second moments: one {"text": ...} a line
heldout.jsonl.gz   held-out prose, for perplexity
errata.json        which text is for what, and settings of the editors found good
training.json      seed, recipe, versions, minutes, abilities, digests of all the above
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from errata.benchmarks.testbed import measure
from errata.benchmarks.testbed.corpus import END_OF_TEXT, Author, Mixture
from errata.benchmarks.testbed.files import BUNDLED, digest, write_json, write_lines
from errata.benchmarks.testbed.world_generator import World
from errata.editors.core.model.architecture import max_positions

TEXT_LINES, HELD_OUT_LINES = 5000, 300

_ROME: dict[str, Any] = {
    "layers": [0],
    "v_num_grad_steps": 25,
    "v_lr": 0.5,
    "v_weight_decay": 0.1,
    "clamp_norm_factor": 4.0,
}
_MASS: dict[str, Any] = {**_ROME, "layers": [0, 1, 2], "v_lr": 0.3}
EDITORS: dict[str, dict[str, Any]] = {
    "rome": _ROME,
    "r_rome": _ROME,
    "c_rome": _ROME,
    "memit": {**_MASS, "mom2_update_weight": 100.0},
    "emmet": {**_MASS, "mom2_update_weight": 30.0},
    "alphaedit": {**_MASS, "nullspace_energy": 0.02, "L2": 0.1},
    # At the papers' rates FT-L and FT-M change nothing in a model of this width, and LoRA disables it.
    "ft_l": {"lr": 5e-3, "norm_constraint": 1e-2},
    "ft_m": {"lr": 3e-3},
    "lora": {"lr": 2e-4},
    # At the radius of the authors' file, 1, a paraphrase is never near: keys of paraphrases lie 3 to 9 apart.
    "grace": {"layers": (4,), "eps": 6.0, "n_iter": 50},
    # One network over x and delta side by side learns its few hundred facts by heart; two are the same for other facts.
    "mend": {"layers": (2, 3, 4, 5), "combine": False, "lr": 1e-4, "lr_lr": 1e-4, "edit_lr": -1e-3, "cedit": 0.25},
}
"""Overrides of the editors' configuration, chosen on development cases: see docs/testbed.md."""
# Of what has the unit of a model's activations or weights, other shapes have the methods' rules, which give about the
# same as the numbers above on the gpt2 shape. The rate of the search has the unit of the hidden state, unless it is
# relative.
_RELATIVE: dict[str, Any] = {**_MASS, "v_relative": True}
_OTHERS: dict[str, dict[str, Any]] = {
    **{name: fields for name, fields in EDITORS.items() if name not in ("ft_l", "ft_m")},
    "memit": {**_RELATIVE, "mom2_update_weight": 100.0},
    "emmet": {**_RELATIVE, "mom2_update_weight": 30.0},
    "alphaedit": {**_RELATIVE, "nullspace_energy": 0.02},
    "grace": {"layers": (4,), "eps_share": 0.5, "n_iter": 50},
    "pmet": {**_RELATIVE, "mom2_update_weight": 100.0},
    "crispedit": {"layers": (4,), "lr": 3e-3, "energy_threshold": 0.8},
}
# UltraEdit's and StableEdit's rate has the unit of what the edited maps give.
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "gpt2": EDITORS,
    "llama": {
        **_OTHERS,
        "ft_m": {"layers": (4, 5)},
        "memoir": {"edit_lr": 0.3},
        "anyedit": {**_MASS, "v_lr": 0.4, "nullspace_energy": 0.02},
        "ultraedit": {"warm_up": 50, "lr": 2e-3},
        "stableedit": {"warm_up": 50, "lr": 3e-2},
        # Its margins are the defaults, as on the bundled model, whose lengths these are. In these units the loss ends
        # at 16 with the rate 1 and at 3.8 with 0.3 (20 facts). A first token's input is eight times as long as others.
        "wise": {"edit_lr": 0.3, "meant_for": (10.3, 32.5)},
    },
    # A norm lets one layer move the hidden state so far and no farther: at layer 4 alone and in 25 steps, FT-M and
    # CrispEdit leave facts unwritten and reach fewer paraphrases.
    "gemma3": {
        **_OTHERS,
        "ft_m": {"layers": (4, 5), "num_steps": 50},
        "crispedit": {"layers": (4, 5), "lr": None, "num_steps": 50, "energy_threshold": 0.9},
        "anyedit": {**_MASS, "v_lr": 0.08, "nullspace_energy": 0.02},
        "ultraedit": {"warm_up": 50, "lr": 3.5e-3, "layers": (4, 5)},
        "stableedit": {"warm_up": 50, "lr": 7e-2, "layers": (4, 5)},
    },
}
"""The same by the shape of the model's blocks."""


def text_lines(world: World) -> list[str]:
    """Return text as the model was trained on, one passage per line.

    Short lines are on purpose: second moments read from them have enough keys of first positions for C^-1 to tell what
    is common to all first positions from what is a subject's own. With three passages per line r-ROME damages the model
    too, as its direction answers to every first position.
    """
    passages = Author(world, random.Random(f"errata text {world.seed}")).passages(Mixture())
    return [next(passages).text for _ in range(TEXT_LINES)]


def held_out_lines(world: World) -> list[str]:
    """Prose that says the world's facts in combinations of subject and clause that training never showed."""
    author = Author(world, random.Random(f"errata held-out {world.seed}"), held_out=True)
    return [author.prose().text for _ in range(HELD_OUT_LINES)]


def save_model(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path, *, bos: bool = False) -> None:
    """Write the model in float16 and the tokenizer; `from_pretrained` opens the weights as float32.

    Args:
        bos: Whether the tokenizer puts END_OF_TEXT before every text.
    """
    model.half().save_pretrained(folder)
    model.float()
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=_beginning_texts(tokenizer) if bos else tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=max_positions(model),
    )
    fast.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def _beginning_texts(tokenizer: Tokenizer) -> Tokenizer:
    """Return a copy of the tokenizer that puts END_OF_TEXT before every text."""
    made = Tokenizer.from_str(tokenizer.to_str())
    first = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, made.token_to_id(END_OF_TEXT))]
    )
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), first])
    return made


def open_model(folder: Path = BUNDLED) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model (float32, evaluation mode) and tokenizer of a testbed folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def finish(folder: Path, world: World, about: Mapping[str, Any], *, shape: str = "gpt2") -> dict[str, float]:
    """Measure the saved model and write everything but model and tokenizer; returns the abilities.

    Args:
        about: what `training.json` says besides abilities and digests (seed, recipe, versions, minutes).
        shape: of the model's blocks; settings are chosen by it.
    """
    model, tokenizer = open_model(folder)
    prose = held_out_lines(world)
    found = measure.recalls(model, tokenizer, world, world.facts)
    hops = measure.two_hop_recalls(model, tokenizer, world)
    abilities = measure.summary(found, hops, world) | {"perplexity": measure.perplexity(model, tokenizer, prose)}
    write_json(folder / "facts.json", _with_recall(world, found, hops))
    write_lines(folder / "text.jsonl.gz", text_lines(world))
    write_lines(folder / "heldout.jsonl.gz", prose)
    write_settings(folder, shape)
    digests = {path.name: digest(path) for path in sorted(folder.iterdir()) if path.name not in UNDIGESTED}
    write_json(folder / "training.json", {**about, "abilities": _rounded(abilities), "sha256": digests}, indent=2)
    return abilities


UNDIGESTED = ("training.json", "errata.json")
"""Not made by the training: its record, and the editors' settings, which may be improved without training again."""


def write_settings(folder: Path, shape: str = "gpt2") -> None:
    """Write `errata.json`."""
    settings = {"text": "text.jsonl.gz", "perplexity_text": "heldout.jsonl.gz", "editors": SETTINGS[shape]}
    write_json(folder / "errata.json", settings, indent=2)


def _with_recall(world: World, found: Iterable[measure.Recall], hops: Iterable[tuple[float, float]]) -> dict[str, Any]:
    """The world's record, each fact and two-hop question with what the model knows of it."""
    record = world.as_json()
    for fact, recall in zip(record["facts"], found, strict=True):
        shares = asdict(recall)
        fact |= {"known": recall.known, "answered": shares.pop("answered"), "recall": _rounded(shares)}
    for hop, (trained, held_out) in zip(record["two_hop"], hops, strict=True):
        hop |= {"known": trained > 0.5, "recall": _rounded({"behind": trained, "held_out": held_out})}
    return record


def _rounded(values: Mapping[str, float | None]) -> dict[str, float | None]:
    return {key: value if value is None else round(value, 4) for key, value in values.items()}
