"""What the playground does, without its page: edits on a model in any order, and its answers with and without them.

    session = Session.open(ModelConfig("world"))
    made = session.make("rome", examples(session.testbed)[0])
    session.view(made.id)                   # ask the untouched model and the edited model the same questions
    session.undo(made.id)                   # any edit, not only the last; session.redo(made.id) applies it again

What is refused raises an ErrataError, and model and history stay as they were.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.editors.core.errors import ConfigError, LedgerError
from errata.editors.core.progress import Progress, silent
from errata.evaluate.probes import Kind, Probe
from errata.playground.examples import ExampleFact, questions

if TYPE_CHECKING:
    from errata.benchmarks.bench.config import ModelConfig
    from errata.editors.core.edit import Edit
    from errata.editors.core.editor import Editor
    from errata.editors.core.request import EditRequest

TOP = 4  # answers shown for one prompt
TOKENS = 8  # length of the text that the model writes after it


@dataclass(frozen=True)
class Reply:
    """What a model says to one prompt.

    Attributes:
        top: The likeliest next tokens with their probabilities, the likeliest first.
        text: The text that the model writes after the prompt.
        says_target: Whether the target is the model's first choice at every token; None where there is no target.
    """

    top: tuple[tuple[str, float], ...]
    text: str
    says_target: bool | None


@dataclass(frozen=True)
class AskedQuestion:
    """One question, with the replies of the untouched model and of the model as it is now."""

    kind: str
    prompt: str
    untouched: Reply
    now: Reply

    @property
    def held(self) -> bool:
        """Return whether the likeliest answer is still the same."""
        return self.untouched.top[0][0] == self.now.top[0][0]


@dataclass(frozen=True)
class AppliedEdit:
    """An edit that was made in this session; it is applied or undone.

    Attributes:
        edit: The edit.
        questions: What the page asks about it.
        seconds: How long it took.
        warnings: The warnings of errata while it was made.
    """

    edit: Edit
    questions: tuple[Probe, ...]
    seconds: float
    warnings: tuple[str, ...]

    @property
    def id(self) -> str:
        return self.edit.id

    @property
    def request(self) -> EditRequest:
        return self.edit.requests[0]

    @property
    def is_applied(self) -> bool:
        """Return whether the model carries the edit now."""
        return self.edit.is_applied


@dataclass(frozen=True)
class SessionView:
    """One edit, with what the model says about it untouched and with all edits that it carries now."""

    made: AppliedEdit
    asked: tuple[AskedQuestion, ...]

    def of(self, kind: Kind) -> tuple[AskedQuestion, ...]:
        """Return the questions of one kind."""
        return tuple(asked for asked in self.asked if asked.kind == kind)


@dataclass(frozen=True)
class SessionOptions:
    """How sessions are started.

    Attributes:
        fields: Fields of methods that were set, by method.
        precision: Of the weights, as `errata.load` takes it.
        device: Where to load a model, as `errata.load` takes it.
        out: The folder in which edits are saved.
    """

    fields: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    precision: str | None = None
    device: str | None = None
    out: Path = Path("edits")


class Session:
    """One model and the edits made on it. Calls from several threads wait for each other.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
        config: Which model it is.
        testbed: The model's folder if it is a testbed, whose world then provides questions; else None.
        options: How it was started.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: ModelConfig,
        testbed: Path | None = None,
        options: SessionOptions | None = None,
    ) -> None:
        from errata.editors.core.ledger.ledger import Ledger

        self.model, self.tokenizer, self.config, self.testbed = model, tokenizer, config, testbed
        self.options = options or SessionOptions()
        self._ledger = Ledger.of(model)
        self._editors: dict[str, Editor] = {}
        self._made: dict[str, AppliedEdit] = {}
        self._untouched: dict[Probe, Reply] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, config: ModelConfig, options: SessionOptions | None = None) -> Session:
        """Load a model and begin a session on it.

        Raises:
            ConfigError: There is no such model, or it cannot be loaded.
        """
        from errata import models
        from errata.benchmarks.datasets import world

        options = options or SessionOptions()
        model, tokenizer = config.load(options.precision, options.device)
        folder = models.locate(config.name)
        is_testbed = isinstance(folder, Path) and world.is_testbed(folder)
        return cls(model, tokenizer, config, folder if is_testbed and isinstance(folder, Path) else None, options)

    @property
    def history(self) -> tuple[AppliedEdit, ...]:
        """Return all edits of the session, undone ones too, in the order in which they were made."""
        return tuple(self._made.values())

    @property
    def applied(self) -> tuple[AppliedEdit, ...]:
        """Return the edits that the model carries, in the order in which it carries them."""
        return tuple(self._made[entry.id] for entry in self._ledger.entries if entry.id in self._made)

    @property
    def has_chat(self) -> bool:
        """Return whether prompts can be asked in the model's own chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    @property
    def load_arguments(self) -> dict[str, Any]:
        """Return the arguments of `errata.load` that give this model."""
        given = {
            "name": self.config.name,
            "dtype": self.options.precision,
            "device": self.options.device,
            "revision": self.config.revision,
            "trust_remote_code": self.config.trust_remote_code or None,
        }
        return {name: value for name, value in given.items() if value is not None}

    def make(self, method: str, fact: ExampleFact, *, progress: Progress = silent) -> AppliedEdit:
        """Make an edit on top of those that the model carries.

        Args:
            method: The name of a registered method.
            fact: What to edit and what to ask about it.
            progress: Is told how far long work is.

        Raises:
            RequestError: The fact cannot be carried out as written.
            ErrataError: The method does not fit the model, lacks what it needs, or refuses the edit.
        """
        with self._lock:
            request = fact.request()
            asked = questions(fact, request, self.testbed)
            self._ask_untouched(asked)  # a question that cannot be asked is refused before the edit
            editor = self._editor(method)
            editor.progress = progress
            started = time.perf_counter()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                edit = self._apply(editor, request)
            shown = tuple(dict.fromkeys(str(w.message) for w in caught if _is_ours(w.category)))
            made = AppliedEdit(edit, asked, time.perf_counter() - started, shown)
            self._made.pop(made.id, None)
            self._made[made.id] = made
            return made

    def undo(self, id: str) -> AppliedEdit:  # noqa: A002
        """Undo any edit. It stays in the history.

        Raises:
            LedgerError: There is no such edit, or it is undone already.
        """
        with self._lock:
            made = self._find(id)
            made.edit.undo()
            return made

    def redo(self, id: str) -> AppliedEdit:  # noqa: A002
        """Apply an undone edit again, on top of the others.

        Raises:
            LedgerError: There is no such edit, or the model carries it.
        """
        with self._lock:
            made = self._find(id)
            made.edit.apply()
            return made

    def clear(self) -> None:
        """Undo every edit."""
        with self._lock:
            self._ledger.clear()

    def save(self, name: str) -> Path:
        """Write the edits that the model carries into a new folder, below the one for saved edits.

        Args:
            name: What to call the folder. Characters that cannot stand in the name of a file are replaced.

        Raises:
            ConfigError: The model carries no edit, or the folder cannot be written.
            ExportError: There is such a folder already.
        """
        from errata.benchmarks.runs.run_folder import slug
        from errata.editors.core.storage.edit_folder import Edits

        with self._lock:
            if not len(self._ledger):
                raise ConfigError("the model carries no edit, so there is nothing to save")
            folder = self.options.out / slug(name)
            try:
                self.options.out.mkdir(parents=True, exist_ok=True)
                return Edits.of(self._ledger, tokenizer=self.tokenizer).write(folder)
            except OSError as error:
                raise ConfigError(
                    f"the folder {folder} cannot be written: {error.strerror}; start with out="
                ) from error

    def view(self, id: str) -> SessionView:  # noqa: A002
        """Ask the questions about an edit, of the untouched model and of the model as it is now.

        Raises:
            LedgerError: There is no such edit.
        """
        with self._lock:
            made = self._find(id)
            untouched = self._ask_untouched(made.questions)
            now = self._ask(made.questions) if len(self._ledger) else untouched
        rows = zip(made.questions, untouched, now, strict=True)
        return SessionView(
            made, tuple(AskedQuestion(probe.kind, probe.prompt, before, after) for probe, before, after in rows)
        )

    def _find(self, id: str) -> AppliedEdit:  # noqa: A002
        if id not in self._made:
            raise LedgerError("no such edit was made here; reload the page")
        return self._made[id]

    def _apply(self, editor: Editor, request: EditRequest) -> Edit:
        """Apply an edit. Where the same one is on the model, the error says so in the page's words."""
        try:
            return editor.apply(request)
        except LedgerError as error:
            if any(made.request == request and made.edit.method == editor.name for made in self.applied):
                raise LedgerError("the model carries this edit already; undo it first, or change a field") from error
            raise

    def _editor(self, method: str) -> Editor:
        from errata import editors
        from errata.benchmarks.bench.config import editor_config

        if method not in self._editors:
            config = editor_config({**self.options.fields.get(method, {}), "name": method}, self.config)
            self._editors[method] = editors.get(method)(self.model, self.tokenizer, config)
        return self._editors[method]

    def _ask_untouched(self, probes: Sequence[Probe]) -> list[Reply]:
        """Return the replies of the untouched model. Each question is asked only once."""
        if missing := [probe for probe in probes if probe not in self._untouched]:
            with self._ledger.untouched():
                self._untouched |= zip(missing, self._ask(missing), strict=True)
        return [self._untouched[probe] for probe in probes]

    def _ask(self, probes: Sequence[Probe]) -> list[Reply]:
        """Return the replies of the model as it is now."""
        from errata.editors.core.contexts.asking import AskedPrompt, read_on
        from errata.evaluate.generation import generate
        from errata.evaluate.scoring import score

        scores = score(self.model, self.tokenizer, probes, next_token=True)
        asked = [AskedPrompt(probe.prompt, probe.chat, probe.join) for probe in probes]
        prompts = read_on(self.model, self.tokenizer, asked)
        texts = generate(self.model, self.tokenizer, prompts, TOKENS)
        replies = []
        for probe, scored, text in zip(probes, scores, texts, strict=True):
            assert scored.logprobs is not None
            best = scored.logprobs.exp().topk(TOP)
            words = [self.tokenizer.decode([token]) for token in best.indices.tolist()]
            says = None if probe.target is None else all(scored.target_correct)
            replies.append(Reply(tuple(zip(words, best.values.tolist(), strict=True)), text, says))
        return replies


class Sessions:
    """The models that the playground was started with; one of them has an open session.

    Args:
        configs: The models, by the name that the page shows.
        options: How their sessions are started.
    """

    def __init__(self, configs: Mapping[str, ModelConfig], options: SessionOptions | None = None) -> None:
        self._configs, self.options = dict(configs), options or SessionOptions()
        self.name = ""
        self.session: Session | None = None

    def choose(self, name: str) -> Session:
        """Return the session of a model.

        A model other than the one before is loaded without edits, and the session before is dropped.

        Raises:
            ConfigError: It is not among the models, or cannot be loaded; the session before stays open.
        """
        if name not in self._configs:
            raise ConfigError(f"no model {name!r} here; start the playground with model={name}")
        if self.session is None or name != self.name:
            self.session = Session.open(self._configs[name], self.options)
            self.name = name
        return self.session


def _is_ours(category: type[Warning]) -> bool:
    return category.__module__.partition(".")[0] == "errata" or category is UserWarning
