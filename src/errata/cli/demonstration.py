"""`errata edit`: one edit, what the model says before and after it, and the edit as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.benchmarks.reports.terminal import show_table
from errata.editors.core.errors import ConfigError
from errata.editors.core.progress import Progress
from errata.editors.core.request import EditRequest

if TYPE_CHECKING:
    from rich.console import Console

    from errata.benchmarks.bench.config import EditConfig
    from errata.editors.core.edit import Edit
    from errata.editors.core.storage.lora_export import LoraExport

# Overrides that are taken as typed: Hydra never sees them.
TEXTS = ("prompt", "subject", "target", "target_true", "id", "out", "lora")
FOLDERS = ("out", "lora")
REQUIRED = ("prompt", "subject", "target")


@dataclass(frozen=True)
class Answers:
    """What a model says to one prompt: its likeliest next tokens, the probability of some answers, its own text, and
    whether the wanted answer is its first choice at every token.

    The probability of an answer is the geometric mean over its tokens, as in the scores of a bench.
    """

    top: tuple[tuple[str, float], ...]
    answers: tuple[tuple[str, float], ...]
    text: str
    says_target: bool


@dataclass(frozen=True)
class Shown:
    """One edit with the answers before and after it, the folder that it was written to, and its adapter if wanted."""

    request: EditRequest
    before: Answers
    after: Answers
    edit: Edit
    folder: Path
    adapter: LoraExport | None


def run(config: EditConfig, texts: Mapping[str, str], *, progress: Progress) -> Shown:
    """Make one edit, ask before and after, and write it.

    Args:
        config: See hparams/edit.yaml.
        texts: prompt, subject, target, and perhaps target_true, id, out, lora (a new folder for an adapter).
        progress: Told of long work.

    Raises:
        ConfigError: a text is missing, or a value does not fit.
        RequestError: the request cannot be carried out.
        NumericalError: the edit is refused; nothing is written.
        ExportError: no adapter can hold the edit, or its folder is there already; nothing is written.
    """
    from errata import editors
    from errata.benchmarks.bench.config import editor_config
    from errata.editors.core.storage.merged_export import check_free

    if missing := [name for name in REQUIRED if name not in texts]:
        raise ConfigError(f'{missing[0]} is missing: give prompt="... {{}} ...", subject=... and target=...')
    request = EditRequest(**{name: texts[name] for name in TEXTS if name not in FOLDERS and name in texts})
    if "lora" in texts:
        check_free(Path(texts["lora"]))
    method, fields = editors.get(config.editor["name"]), editor_config(config.editor, config.model)
    model, tokenizer = config.model.load(config.precision, config.device)
    editor = method(model, tokenizer, fields, progress=progress)
    ask = _Asker(model, tokenizer, request, config.top, config.generation.tokens)
    before = ask()
    (edit,) = editor.compute(request)
    with edit.applied():
        after = ask()
    scores = {request.id: {"before": before.answers[0][1], "after": after.answers[0][1]}}
    adapter = edit.export_lora(texts["lora"]) if "lora" in texts else None  # first, since it may be refused
    folder = _written(edit, Path(texts.get("out", "edits")), tokenizer, {"scores": scores})
    return Shown(request, before, after, edit, folder, adapter)


def _written(edit: Edit, out: Path, tokenizer: Any, notes: Mapping[str, Any]) -> Path:
    """The new folder of an edit in `out`, named by its subject, its answer and its id."""
    from errata.benchmarks.runs.run_folder import slug
    from errata.editors.core.ledger.ledger import Ledger
    from errata.editors.core.storage.edit_folder import Edits

    first = edit.requests[0]
    folder = out / f"{slug(f'{first.subject}-{first.target}', 40)}-{slug(edit.id, 40)}"
    try:
        # The same edit made again takes its own place.
        entries, ledger = [edit.entry()], Ledger.of(edit.model)
        return Edits.of(ledger, entries, tokenizer=tokenizer, notes={edit.id: notes}).rewrite(folder)
    except OSError as error:
        raise ConfigError(f"the folder {folder} cannot be made: {error.strerror}; give another `out=`") from error


class _Asker:
    """Asks a model about one request, as it stands."""

    def __init__(self, model: Any, tokenizer: Any, request: EditRequest, top: int, tokens: int) -> None:
        self.model, self.tokenizer, self.request, self.top, self.tokens = model, tokenizer, request, top, tokens

    def __call__(self) -> Answers:
        import math

        from errata.evaluate.generation import generate
        from errata.evaluate.probes import Probe
        from errata.evaluate.scoring import score

        request = self.request
        probe = Probe("rewrite", request.text, request.target, request.target_true)
        (scored,) = score(self.model, self.tokenizer, [probe], next_token=True)
        assert scored.logprobs is not None
        best = scored.logprobs.exp().topk(min(self.top, scored.logprobs.shape[-1]))
        words = [self.tokenizer.decode([token]) for token in best.indices.tolist()]
        pairs = ((request.target, scored.nll_target), (request.target_true, scored.nll_other))
        answers = tuple((name, math.exp(-nll)) for name, nll in pairs if name is not None and nll is not None)
        (text,) = generate(self.model, self.tokenizer, [request.text], self.tokens)
        top = tuple(zip(words, best.values.tolist(), strict=True))
        return Answers(top, answers, text, scored.target_correct is not None and all(scored.target_correct))


def show(shown: Shown, console: Console) -> None:
    """Before and after in two columns, what the method reports, and where the edit is."""
    from rich.table import Table
    from rich.text import Text

    request, edit = shown.request, shown.edit
    console.print(Text.assemble((request.text, "bold"), " → ", (request.target, "bold green")), "")
    table = Table(box=None, padding=(0, 3, 0, 0))
    for name in ("", "before", "after"):
        table.add_column(name)
    pairs = zip(shown.before.top, shown.after.top, strict=True)
    for place, (before, after) in enumerate(pairs, 1):
        table.add_row(Text(f"{place}."), _share(*before, request), _share(*after, request))
    table.add_section()
    for (name, before), (_, after) in zip(shown.before.answers, shown.after.answers, strict=True):
        table.add_row(Text(f"p({name})"), f"{before:.4f}", f"{after:.4f}")
    table.add_row(Text("writes"), Text(_one_line(shown.before.text)), Text(_one_line(shown.after.text)))
    show_table(console, table)
    console.print()
    if verdict := _verdict(shown):
        console.print(Text(verdict, style="bold red"), "", soft_wrap=True)
    console.print(Text(_diagnostics(edit.method, edit.diagnostics[0]), style="dim"), soft_wrap=True)
    console.print(Text.assemble(("written to ", "dim"), str(shown.folder)), soft_wrap=True)
    if shown.adapter is not None:
        rank, folder = shown.adapter.rank, str(shown.adapter.folder)
        console.print(Text.assemble((f"as an adapter of rank {rank} to ", "dim"), folder), soft_wrap=True)


def _verdict(shown: Shown) -> str:
    """What has to be said where the edit has not made, or need not have made, the wanted answer the first choice."""
    request = shown.request
    if not shown.after.says_target:
        first = _one_line(shown.after.text) or shown.after.top[0][0].strip()
        return f"The edit did not take: {request.target!r} is not what the model says after it, but {first!r}."
    if shown.before.says_target:
        return f"The model said {request.target!r} before the edit, too."
    return ""


def _share(word: str, share: float, request: EditRequest) -> Any:
    from rich.text import Text

    is_new = bool(word.strip()) and request.target.strip().startswith(word.strip())
    return Text(f"{share:6.1%} {word!r}", style="green" if is_new else "")


def _diagnostics(method: str, report: Mapping[str, Any]) -> str:
    """The method's own report in one line; of a list of numbers the first and the last."""
    parts = [method]
    for name, value in report.items():
        if name == "request":
            continue
        if isinstance(value, float):
            parts.append(f"{name} {value:.4g}")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            if value and all(isinstance(entry, int | float) for entry in value):
                parts.append(f"{name} {value[0]:.3g}..{value[-1]:.3g}")
        elif not isinstance(value, Mapping):
            parts.append(f"{name} {value}")
    return ", ".join(parts)


def _one_line(text: str) -> str:
    return " ".join(text.split())
