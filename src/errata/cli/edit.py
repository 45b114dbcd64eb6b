"""`errata edit`: makes one edit, shows what the model says before and after it, and writes it to files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.benchmarks.bench.compose import compose
from errata.benchmarks.reports.terminal import show_table
from errata.cli import configuration, overrides
from errata.cli.arguments import is_true, split_flags
from errata.cli.command import MEASURE, METHOD_FIELD, SHOW_CONFIGURATION, Command, Option
from errata.cli.exit_codes import DIFFERENT, DONE
from errata.cli.messages import shown_warnings
from errata.cli.progress_bars import show_progress
from errata.editors.core.errors import ConfigError
from errata.editors.core.progress import Progress
from errata.editors.core.request import EditRequest

if TYPE_CHECKING:
    from rich.console import Console

    from errata.benchmarks.bench.config import EditConfig
    from errata.editors.core.edit import Edit
    from errata.editors.core.storage.lora_export import LoraExport

# Overrides that are taken as typed: Hydra never sees them.
TEXTS = (
    Option("prompt=TEXT", "the prompt; {} stands for the subject"),
    Option("subject=TEXT", "what the fact is about"),
    Option("target=TEXT", "the new answer"),
    Option("target_true=TEXT", "the answer until now, if you want its probability shown as well"),
    Option("chat=true", "ask in the model's chat template, where the prompt is a message to it", ("true", "false")),
    Option("join=TEXT", "what stands between prompt and answer; join= for nothing, as in code"),
    Option("id=TEXT", "a name for the fact, to find it by later"),
    Option("out=FOLDER", "where the edit gets its folder, OUT/SUBJECT-TARGET-ID; by default edits"),
    Option("lora=FOLDER", "also write the edit as a LoRA adapter to this new folder"),
)
TEXT_NAMES = tuple(word[:-1] for option in TEXTS for word in option.words)
FOLDERS = ("out", "lora")
REQUIRED = ("prompt", "target")


def run(arguments: Sequence[str], console: Console, errors: Console) -> int:
    """Make one edit and show it."""
    given, flags = split_flags(arguments, COMMAND)
    overrides.refuse_repeats(given)
    values = [(argument, *overrides.split(argument)) for argument in given]
    texts = {name: value for _, name, value in values if name in TEXT_NAMES}
    rest = [argument for argument, name, _ in values if name not in TEXT_NAMES]
    if flags:
        configuration.show_yaml("edit", configuration.compose_first("edit", rest), console)
        return DONE
    values = compose("edit", overrides.translated(rest, "edit", also=TEXT_NAMES))

    from errata.benchmarks.bench.config import EditConfig

    config = EditConfig.of(values)
    with shown_warnings(errors), show_progress(errors) as progress:
        shown = make_edit(config, texts, progress=progress)
    show(shown, console)
    return DONE if shown.took else DIFFERENT


@dataclass(frozen=True)
class Answers:
    """What a model says to one prompt.

    Attributes:
        top: The likeliest next tokens with their probabilities.
        answers: The probability of the new answer and, if it is known, of the old one. It is the geometric mean over
            the answer's tokens, as in the scores of a bench.
        text: What the model writes by itself.
        says_target: Whether the new answer is the model's first choice at every token.
        says_true: The same of the old one, where it is known.
    """

    top: tuple[tuple[str, float], ...]
    answers: tuple[tuple[str, float], ...]
    text: str
    says_target: bool
    says_true: bool


@dataclass(frozen=True)
class ShownEdit:
    """One edit, the answers before and after it, and the folders that it was written to."""

    request: EditRequest
    before: Answers
    after: Answers
    edit: Edit
    folder: Path
    adapter: LoraExport | None
    forgets: bool = False

    @property
    def took(self) -> bool:
        """Whether the model says the new answer, or no longer says the old one where that was to be forgotten."""
        return not self.after.says_true if self.forgets else self.after.says_target


def make_edit(config: EditConfig, texts: Mapping[str, str], *, progress: Progress) -> ShownEdit:
    """Make one edit, ask the model before and after it, and write it to files. The model stays as it was.

    Args:
        config: The values of hparams/edit.yaml.
        texts: Texts by name: prompt, subject and target, and perhaps target_true, id, out and lora.
        progress: Is told how far long work is.

    Raises:
        ConfigError: A text is missing, or a value does not fit.
        RequestError: The request cannot be carried out.
        NumericalError: The edit is refused; nothing is written.
        ExportError: No adapter can hold the edit, or its folder exists; nothing is written.
    """
    from errata import editors
    from errata.benchmarks.bench.config import check_trained, editor_config
    from errata.editors.core.storage.merged_export import check_free

    method = editors.get(config.editor["name"])
    request = _request(texts, needs_subject=method.needs_subject)
    if "lora" in texts:
        check_free(Path(texts["lora"]))
    fields = editor_config(config.editor, config.model)
    check_trained(config.editor, fields, config.model)
    model, tokenizer = config.model.load(config.precision, config.device)
    editor = method(model, tokenizer, fields, progress=progress)
    asker = _Asker(model, tokenizer, request, config.top, config.generation.tokens)
    before = asker.ask()
    (edit,) = map(editor.closed, editor.compute(request))
    with edit.applied():
        after = asker.ask()
    scores = {request.id: {"before": before.answers[0][1], "after": after.answers[0][1]}}
    adapter = edit.export_lora(texts["lora"]) if "lora" in texts else None  # first, since it may be refused
    folder = _write(edit, Path(texts.get("out", "edits")), tokenizer, {"scores": scores})
    return ShownEdit(request, before, after, edit, folder, adapter, editor.forgets)


def _request(texts: Mapping[str, str], *, needs_subject: bool) -> EditRequest:
    """Return the request that the texts make.

    Raises:
        ConfigError: A text is missing.
        RequestError: They make none.
    """
    required = ("prompt", "subject", "target") if needs_subject else REQUIRED
    if missing := [name for name in required if name not in texts]:
        raise ConfigError(f'{missing[0]} is missing: give prompt="... {{}} ...", subject=... and target=...')
    given: dict[str, Any] = {name: texts[name] for name in TEXT_NAMES if name not in FOLDERS and name in texts}
    return EditRequest(**{"subject": None, **given, "chat": is_true("chat", texts)})


def _write(edit: Edit, out: Path, tokenizer: Any, notes: Mapping[str, Any]) -> Path:
    """Write an edit to its own folder in `out`, named by its subject, its answer and its id."""
    from errata.benchmarks.runs.run_folder import slug
    from errata.editors.core.ledger.ledger import Ledger
    from errata.editors.core.storage.edit_folder import Edits

    first = edit.requests[0]
    folder = out / f"{slug(f'{first.subject or first.text}-{first.target}', 40)}-{slug(edit.id, 40)}"
    try:
        # The same edit made again replaces its folder.
        entries, ledger = [edit.entry()], Ledger.of(edit.model)
        return Edits.of(ledger, entries, tokenizer=tokenizer, notes={edit.id: notes}).rewrite(folder)
    except OSError as error:
        raise ConfigError(f"the folder {folder} cannot be made: {error.strerror}; give another `out=`") from error


class _Asker:
    """Asks a model, in its present state, about one request."""

    def __init__(self, model: Any, tokenizer: Any, request: EditRequest, top: int, tokens: int) -> None:
        self.model, self.tokenizer, self.request, self.top, self.tokens = model, tokenizer, request, top, tokens

    def ask(self) -> Answers:
        """Return what the model says now."""
        from errata.editors.core.contexts.asking import AskedPrompt, read_on
        from errata.evaluate.generation import generate
        from errata.evaluate.probes import Probe
        from errata.evaluate.scoring import score

        request = self.request
        probe = Probe("rewrite", request.text, request.target, request.target_true, request.join, request.chat)
        (scored,) = score(self.model, self.tokenizer, [probe], next_token=True)
        assert scored.logprobs is not None
        best = scored.logprobs.exp().topk(min(self.top, scored.logprobs.shape[-1]))
        words = [self.tokenizer.decode([token]) for token in best.indices.tolist()]
        pairs = ((request.target, scored.nll_target), (request.target_true, scored.nll_other))
        answers = tuple((name, math.exp(-nll)) for name, nll in pairs if name is not None and nll is not None)
        prompts = read_on(self.model, self.tokenizer, [AskedPrompt(request.text, request.chat)])
        (text,) = generate(self.model, self.tokenizer, prompts, self.tokens)
        top = tuple(zip(words, best.values.tolist(), strict=True))
        says_true = bool(scored.other_correct) and all(scored.other_correct)
        return Answers(top, answers, text, all(scored.target_correct), says_true)


def show(shown: ShownEdit, console: Console) -> None:
    """Show the answers before and after in two columns, what the method reports, and where the edit is."""
    from rich.table import Table
    from rich.text import Text

    request, edit = shown.request, shown.edit
    console.print(Text.assemble((request.text, "bold"), " → ", (_asked_for(shown), "bold green")), "")
    table = Table(box=None, padding=(0, 3, 0, 0))
    for name in ("", "before", "after"):
        table.add_column(name)
    pairs = zip(shown.before.top, shown.after.top, strict=True)
    for rank, (before, after) in enumerate(pairs, 1):
        table.add_row(Text(f"{rank}."), _share(*before, request), _share(*after, request))
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
        label = f"as an adapter of rank {shown.adapter.rank} to "
        console.print(Text.assemble((label, "dim"), str(shown.adapter.folder)), soft_wrap=True)


def _verdict(shown: ShownEdit) -> str:
    """Return a warning where the edit failed or was not needed, else an empty text."""
    request = shown.request
    if shown.forgets:
        if not shown.took:
            return f"The edit did not take: the model says {request.target_true!r} after it, too."
        unsaid = f"The model did not say {request.target_true!r} before the edit either."
        return "" if shown.before.says_true else unsaid
    if not shown.after.says_target:
        first = _one_line(shown.after.text) or shown.after.top[0][0].strip()
        return f"The edit did not take: {request.target!r} is not what the model says after it, but {first!r}."
    if shown.before.says_target:
        return f"The model said {request.target!r} before the edit, too."
    return ""


def _asked_for(shown: ShownEdit) -> str:
    request = shown.request
    return f"no longer {request.target_true}" if shown.forgets else request.target


def _share(word: str, share: float, request: EditRequest) -> Any:
    from rich.text import Text

    is_new = bool(word.strip()) and request.target.strip().startswith(word.strip())
    return Text(f"{share:6.1%} {word!r}", style="green" if is_new else "")


def _diagnostics(method: str, report: Mapping[str, Any]) -> str:
    """Return the method's own report in one line; a list of numbers is shown by its first and its last."""
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


COMMAND = Command(
    name="edit",
    usage=("prompt=TEXT subject=TEXT target=TEXT [editor=rome] [model=world] [name=value ...]",),
    summary="Make one edit, show the model's answers before and after it, and save the edit.",
    group=MEASURE,
    run=run,
    config="edit",
    options=(*TEXTS, SHOW_CONFIGURATION),
    overrides=(METHOD_FIELD,),
    notes=("The command writes the edit to a folder. `errata apply`, `errata list` and `errata export` read it.",),
    exit_codes=((DIFFERENT, "the edit did not take: the new answer is not said, or the one to be forgotten still is"),),
    examples=('errata edit model=world prompt="The capital of {} is" subject=Gavaria target=Praminster',),
)
