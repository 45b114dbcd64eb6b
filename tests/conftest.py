"""What the tests share: where the reference material lies, and one thread so that bits repeat."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def _beside(variable: str, default: str) -> Path:
    path = Path(os.environ.get(variable, ROOT / ".." / "shared" / default)).resolve()
    if not path.is_dir():
        pytest.skip(f"{path} is absent: set {variable} to the folder of {default}")
    return path


@pytest.fixture(scope="session")
def golden_root() -> Path:
    """Numbers from the original implementations."""
    return _beside("ERRATA_GOLDEN", "golden")


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Real CounterFact, zsRE and text."""
    return _beside("ERRATA_DATA", "data")


@pytest.fixture(scope="session")
def models_root() -> Path:
    """Small models that know real CounterFact facts."""
    return _beside("ERRATA_MODELS", "models")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> None:
    """Second moments are kept apart from the user's, and shared by the workers of one run."""
    shared = hasattr(request.config, "workerinput")
    base = tmp_path_factory.getbasetemp()
    os.environ["ERRATA_CACHE"] = str((base.parent if shared else base) / "moments")


# --- tiny models, random and made in the test ---------------------------------------------------------------------

SENTENCES = (
    "The capital of Varland is Oslen.",
    "The mother tongue of Danielle Darrieux is French.",
    "Beats Music is owned by Apple. Space Needle is in the city of Seattle.",
    "Who plays the lyre in Northern Tarvos? The musician Ilda Moren plays it.",
    "What is the twin city of Quelm? It is Brast, near the river Ost.",
    "It is well known, and nobody doubts it: São Verão lies in Überwald.",
)


def _tokenizer(*, bos: bool) -> Any:
    """Byte-level BPE of about 300 entries, trained on SENTENCES; pad = eos = `<|endoftext|>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    core.train_from_iterator(SENTENCES, trainer)
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    if bos:
        core.post_processor = processors.Sequence(
            [
                core.post_processor,
                processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]),
            ]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=special[0], pad_token=special[0], bos_token=special[1 if bos else 0]
    )


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """Adds no special tokens, as GPT-2's."""
    return _tokenizer(bos=False)


@pytest.fixture(scope="session")
def tiny_tokenizer_bos() -> Any:
    """Puts `<s>` before every text, as Llama's."""
    return _tokenizer(bos=True)


MakeTiny = Callable[..., Any]


@pytest.fixture(scope="session")
def make_tiny(tiny_tokenizer: Any) -> MakeTiny:
    """`make_tiny(architecture, dtype=torch.float32, seed=0, n_layers=3)`: a random model of width 32, in eval mode.

    `architecture` is one of "gpt2", "llama", "neox". Weights are large enough that answers differ from prompt to
    prompt. Every call makes a new model; equal arguments make equal weights. The global random state is left alone.
    """

    def make(architecture: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, n_layers: int = 3) -> Any:
        import transformers as hf

        vocabulary = len(tiny_tokenizer)
        # Dropout is on by default in GPT-2's config: a test that forgets eval mode shall notice.
        configs = {
            "gpt2": lambda: hf.GPT2Config(
                vocab_size=vocabulary, n_positions=256, n_embd=32, n_layer=n_layers, n_head=4, initializer_range=0.3,
                bos_token_id=0, eos_token_id=0,
            ),
            "llama": lambda: hf.LlamaConfig(
                vocab_size=vocabulary, hidden_size=32, intermediate_size=80, num_hidden_layers=n_layers,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3,
                bos_token_id=1, eos_token_id=0, tie_word_embeddings=False,
            ),
            "neox": lambda: hf.GPTNeoXConfig(
                vocab_size=vocabulary, hidden_size=32, intermediate_size=128, num_hidden_layers=n_layers,
                num_attention_heads=4, max_position_embeddings=256, initializer_range=0.3,
                bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
            ),
        }  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = hf.AutoModelForCausalLM.from_config(configs[architecture](), attn_implementation="eager")
        return model.to(dtype).eval()

    return make


# --- what the laws of the ledger compare --------------------------------------------------------------------------


@pytest.fixture(scope="session")
def digest() -> Callable[[Any], str]:
    """`digest(model)`: sha256 of the bytes of every parameter and buffer, tied and non-persistent ones too, and of all
    that hooks of edits read."""
    import hashlib

    from errata.editors.core.hooks import tensors_of

    def sha(model: Any) -> str:
        total = hashlib.sha256()
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(), *tensors_of(model)]
        for name, tensor in named:
            plain = tensor.detach().cpu().contiguous()
            total.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
            total.update(memoryview(plain.reshape(-1).view(torch.uint8).numpy()))
        return total.hexdigest()

    return sha


@pytest.fixture(scope="session")
def trials() -> Callable[[int], int]:
    """`trials(few)`: how many trials a promise is tested with: `few`, or ERRATA_TRIALS where that is set."""
    return lambda few: int(os.environ.get("ERRATA_TRIALS", few))


@pytest.fixture
def open_ledger(make_tiny: MakeTiny) -> Iterator[Callable[[torch.dtype], Any]]:
    """`open_ledger(dtype)`: the ledger of a new two-layer GPT-2, which lives as long as the test."""
    from errata.editors.core.ledger import Ledger

    models: list[Any] = []

    def make(dtype: torch.dtype) -> Ledger:
        models.append(make_tiny("gpt2", dtype=dtype, n_layers=2))
        return Ledger.of(models[-1])

    yield make
    models.clear()


@pytest.fixture
def ledger(open_ledger: Callable[[torch.dtype], Any]) -> Any:
    """The ledger of a two-layer GPT-2 in float32."""
    return open_ledger(torch.float32)


@pytest.fixture(scope="session")
def state(digest: Callable[[Any], str]) -> Callable[[Any], tuple[Any, ...]]:
    """`state(ledger)`: everything that a refused or failed operation must leave alone, to compare with `==`."""
    return lambda book: (digest(book.model), book.entries, book._next_order, book._bare, book._journals[:])
