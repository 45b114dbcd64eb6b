"""Loading a model with its tokenizer: the bundled testbed, a folder, a Hugging Face id, a GGUF file or a short name.

Weights come from safetensors and GGUF only, which cannot run code.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata import fetched_models, gguf_models
from errata.editors.core.config import did_you_mean, nearest
from errata.editors.core.errors import ConfigError
from errata.editors.core.files.atomic import digest_of_file
from errata.editors.core.model.model_settings import DEQUANTISED_FROM, LOADED_AS
from errata.editors.core.progress import without_bars
from errata.editors.core.storage import hub

if TYPE_CHECKING:
    import torch

WORLD = "world"
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # as the architectures call it
DTYPES = ("float32", "bfloat16", "float64", "float16")


def load(
    name: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | int | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its fast tokenizer.

    Args:
        name: "world" (the bundled testbed), "smollm2" (fetched once, see fetched_models.py), a folder as
            `save_pretrained` writes it, a file FILE.gguf, whose weights are dequantised, or a Hugging Face id.
        dtype: Precision of the weights, e.g. torch.bfloat16 or "bfloat16". None: as they are saved, but float32 where
            they are saved as float16, whose range is too small for the optimisation of an edit, or in a GGUF file.
        device: Where the model goes, as "cpu" or "cuda:1"; a number is a GPU. None: the first GPU where there is one,
            else the CPU.
        device_map: "auto" spreads the blocks over all GPUs; or a device for each module by its name, as in
            transformers. Needs accelerate. None: the whole model goes to `device`.
        revision: Branch, tag or commit of a Hugging Face id.
        trust_remote_code: Run the Python files that come with the model. Off unless you ask for it.

    Returns:
        (model, tokenizer), a PreTrainedModel and a PreTrainedTokenizerFast.

    Raises:
        ConfigError: no such folder, file or id, no weights in safetensors, damaged ones or ones of other shapes
            than config.json says, a GGUF file without the package that reads it, an unknown dtype or device, no fast
            tokenizer, or too little memory on the devices.
    """
    from errata.editors.core.storage.provenance import remember_source

    source = locate(name)
    goes_to = None if device_map is not None else resolved_device(device)
    spread = {} if device_map is None else {"device_map": _checked_map(device_map, device)}
    if _is_gguf(source):
        model, tokenizer = _load_gguf(name, Path(source), dtype, spread)
    else:
        model, tokenizer = _load_safetensors(name, source, dtype, spread, _options(source, revision, trust_remote_code))
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"{str(name)!r} has no fast tokenizer, which editing needs for character offsets")
    if (absent := next((n for n, parameter in model.named_parameters() if parameter.is_meta), None)) is not None:
        raise ConfigError(f"{str(name)!r} is larger than the devices of device_map: {absent} was left out of memory")
    for parameter in model.parameters():
        # Weights mapped from a file can lie at odd addresses, where the CPU's kernels round otherwise; a copy does not.
        parameter.data = parameter.data.clone()
    remember_source(model, str(name), revision)
    setattr(model, LOADED_AS, str(name))
    return (model.eval() if goes_to is None else model.eval().to(goes_to)), tokenizer


def _load_safetensors(
    name: str | Path, source: str | Path, dtype: Any, spread: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with _said_in_one_line(name):
        config = AutoConfig.from_pretrained(source, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        wanted = _dtype(dtype, getattr(config, "dtype", None))
        with without_bars():
            model: Any = AutoModelForCausalLM.from_pretrained(
                source, config=config, dtype=wanted, use_safetensors=True, **spread, **options
            )
    return model, tokenizer


def _load_gguf(name: str | Path, path: Path, dtype: Any, spread: Mapping[str, Any]) -> tuple[Any, Any]:
    wanted = _dtype(dtype, None)
    if spread:
        raise ConfigError(f"{str(name)!r} is a GGUF file, which device_map cannot spread; give one device")
    quantised_as = gguf_models.read_header(path).quantised_as
    with _said_in_one_line(name), without_bars():
        model, tokenizer = gguf_models.load_plain(path, wanted)
    if quantised_as is not None:
        setattr(model, DEQUANTISED_FROM, quantised_as)
    return model, tokenizer


def _is_gguf(source: str | Path) -> bool:
    """Return whether what `locate` has found is a GGUF file."""
    return isinstance(source, Path) and source.suffix.lower() == gguf_models.SUFFIX


def resolved_dtype(
    name: str | Path,
    dtype: torch.dtype | str | None = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> torch.dtype:
    """The precision that `load` would give the model; arguments and errors as there. Reads no weights."""
    from transformers import AutoConfig

    if dtype is not None:
        return _dtype(dtype, None)
    source = locate(name)
    if _is_gguf(source):
        return _dtype(None, None)
    with _said_in_one_line(name):
        config = AutoConfig.from_pretrained(source, **_options(source, revision, trust_remote_code))
        return _dtype(None, getattr(config, "dtype", None))


def layer_count(name: str | Path, revision: str | None = None) -> int | None:
    """Return how many layers a model has by its config.json or GGUF header, in milliseconds: no weights are loaded.

    None where the file is not on this machine, or says it in another way.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    source = locate(name)
    if _is_gguf(source):
        return gguf_models.read_header(Path(source)).n_layers
    try:
        cached = source / "config.json" if isinstance(source, Path) else None
        path = cached or try_to_load_from_cache(str(source), "config.json", revision=revision)
        content = json.loads(Path(path).read_text(encoding="utf-8")) if isinstance(path, str | Path) else {}
    except (OSError, ValueError, HFValidationError):
        return None  # loading the model says what the matter is
    parts = [content, content.get("text_config")] if isinstance(content, dict) else []
    for part in parts:
        if isinstance(part, dict):
            found = next((part[field] for field in _LAYER_COUNTS if isinstance(part.get(field), int)), None)
            if found is not None:
                return int(found)
    return None


def resolved_device(device: torch.device | str | int | None = None) -> torch.device:
    """The device that `load` would put a model on. A number is a GPU: 1 means cuda:1.

    Raises:
        ConfigError: no such device, several, or a GPU where there is none.
    """
    import torch

    cuda = torch.cuda.is_available()
    if device is None:
        return torch.device("cuda" if cuda else "cpu")
    name = str(device).strip()
    if name == "auto" or "," in name:
        raise ConfigError(
            f"device: expected one device, as cpu or cuda:0, got {name!r}; to spread a model over several GPUs, give "
            "model.device_map=auto (in Python device_map='auto'); to take the first GPU, leave device out"
        )
    try:
        found = torch.device(f"cuda:{name}" if name.isdecimal() else name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {name!r}: expected cpu, cuda or cuda:0 ({_first_line(error)})") from error
    if found.type == "cuda" and not cuda:
        raise ConfigError(f"device {name!r} was asked for, but this machine has no usable GPU; leave it out, or cpu")
    if found.type == "cuda" and (found.index or 0) >= (count := torch.cuda.device_count()):
        raise ConfigError(f"device {name!r} was asked for, but the GPUs here are cuda:0 to cuda:{count - 1}")
    return found


def _checked_map(device_map: str | Mapping[str, Any], device: Any) -> str | dict[str, Any]:
    """Return a device map, once it can be used.

    Raises:
        ConfigError: There is a device as well, accelerate is not installed, or the word is not one of transformers.
    """
    from importlib.util import find_spec

    if device is not None:
        raise ConfigError(f"device={device} and device_map are both given; leave one out")
    if isinstance(device_map, str) and device_map not in DEVICE_MAPS:
        raise ConfigError(f"unknown device_map {device_map!r}{did_you_mean(device_map, DEVICE_MAPS)}")
    if find_spec("accelerate") is None:
        raise ConfigError("device_map needs accelerate: pip install accelerate")
    return device_map if isinstance(device_map, str) else dict(device_map)


def locate(name: str | Path) -> str | Path:
    """The folder or GGUF file that a name means, or the name itself where it can only be a Hugging Face id.

    A model of fetched_models.py is fetched if its file is not there yet.

    Raises:
        ConfigError: it can only be a folder or a file, and there is none, or it holds no model; it cannot be fetched.
    """
    text = str(name)
    if text == WORLD:
        return _checked(_bundled())
    path = Path(os.path.expanduser(text))  # noqa: PTH111 - that of Path raises where there is no such user
    if text.strip() and path.is_dir():
        return _checked(path)
    if text in fetched_models.FETCHED:
        return fetched_models.fetch(text)
    if path.suffix.lower() == gguf_models.SUFFIX:
        if not path.is_file():
            raise ConfigError(f"no GGUF file at {text!r}")
        return path
    is_path = isinstance(name, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text
    if is_path or not text.strip() or any(not (c.isascii() and (c.isalnum() or c in "-_./")) for c in text):
        raise ConfigError(
            f"no model at {text!r}: expected a folder with config.json, a GGUF file, a Hugging Face id, {WORLD!r} or "
            f"{', '.join(map(repr, fetched_models.FETCHED))}"
        )
    return text


def _bundled() -> Path:
    """The testbed's folder, which lies in the package wherever that is installed."""
    from importlib.resources import files

    return Path(str(files("errata.benchmarks.testbed"))) / "model"


def fingerprint(name: str | Path, revision: str | None = None) -> str:
    """A digest that changes when the model does: every byte of a folder's files or of a GGUF file, which takes seconds
    for gigabytes; or the id and its revision."""
    folder = locate(name)
    total = hashlib.sha256()
    if not isinstance(folder, Path):
        total.update(f"{folder}@{revision}".encode())
        return total.hexdigest()
    if _is_gguf(folder):
        return digest_of_file(folder)
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            total.update(f"{path.name} {path.stat().st_size} ".encode() + bytes.fromhex(digest_of_file(path)))
    return total.hexdigest()


def _options(source: str | Path, revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """Options of `from_pretrained`. Where the Hub cannot be reached only its cache is looked at, at once: left to
    itself, transformers tries for half a minute."""
    only_cached = not isinstance(source, Path) and not hub.is_reachable()
    return {"revision": revision, "trust_remote_code": trust_remote_code, "local_files_only": only_cached}


def _checked(folder: Path) -> Path:
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"{folder} is a LoRA adapter: expected a whole model. Open it with PEFT on its base model, or write the "
            "edited model itself (errata export merged=FOLDER)"
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} holds no config.json: expected a folder as `save_pretrained` writes it")
    if not any(folder.glob("*.safetensors")):
        others = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; {others[0]} is a pickle, which can run code: save the model again as safetensors" if others else ""
        raise ConfigError(f"{folder} holds no weights: expected model.safetensors{hint}")
    return folder


@contextmanager
def _said_in_one_line(name: str | Path) -> Iterator[None]:
    """What transformers and safetensors complain of as a ConfigError about that model."""
    from safetensors import SafetensorError

    said = f"{str(name)!r} could not be loaded"
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError) as error:
        hint = "; trust_remote_code=True runs that code" if "custom code" in str(error) else ""
        if isinstance(locate(name), str) and "/" not in str(name):
            near = nearest(str(name), [WORLD, *fetched_models.FETCHED])
            there = "did you mean" if near else "expected a folder, an id ORG/NAME of the Hub, or"
            hint += f"; {there} {near or WORLD!r}{'?' if near else ''}"
        raise ConfigError(f"{said}: {_first_line(error).rstrip('.')}{hint}") from error
    except SafetensorError as error:
        raise ConfigError(f"{said}: its weights are damaged ({_first_line(error)}); fetch it again") from error
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        reason = "its weights have other shapes than its config.json says; are they of one model?"
        raise ConfigError(f"{said}: {reason}") from error


def _dtype(asked: Any, saved: Any) -> Any:
    import torch

    if asked is None:
        return torch.float32 if saved in (None, torch.float16, "float16") else saved
    if isinstance(asked, torch.dtype):
        return asked
    if asked not in DTYPES:
        raise ConfigError(f"unknown precision {asked!r}{did_you_mean(str(asked), DTYPES)}")
    return getattr(torch, asked)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
