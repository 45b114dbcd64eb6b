"""What the playground does, without its page: a model, edits on it in any order, and what it says with and without.

    desk = Desk.open(ModelConfig("world"))
    made = desk.make("rome", examples(desk.testbed)[0])
    desk.view(made.id)                      # the same questions to the untouched model, and to it as it stands
    desk.undo(made.id)                      # any edit, not only the last; desk.redo(made.id) puts it on again

Whatever is refused raises an ErrataError and leaves model and history as they were.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

TOP = 4  # answers shown of one prompt
TOKENS = 8  # of the model's own text behind it


@dataclass(frozen=True)
class Reply:
    """What a model says to one prompt.

    Attributes:
        top: Its likeliest next tokens with their probabilities, the likeliest first.
        text: What it writes by itself.
        says_target: Whether the wanted answer is its first choice at every token; None where none is wanted.
    """

    top: tuple[tuple[str, float], ...]
    text: str
    says_target: bool | None


@dataclass(frozen=True)
class AskedQuestion:
    """One question with the replies of the untouched model and of the model as it stands."""

    kind: Kind
    prompt: str
    untouched: Reply
    now: Reply

    @property
    def held(self) -> bool:
        """Whether the likeliest answer is what it was."""
        return self.untouched.top[0][0] == self.now.top[0][0]


@dataclass(frozen=True)
class AppliedEdit:
    """An edit that was made here, on the model now or undone.

    Attributes:
        edit: The edit.
        questions: What is asked about it.
        seconds: How long it took.
        warnings: What was said against it while it was made.
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
        """Whether the model carries it now."""
        return self.edit.is_applied


@dataclass(frozen=True)
class SessionView:
    """One edit, and what the model says about it without any edit and as it stands, with all that it carries now."""

    made: AppliedEdit
    asked: tuple[AskedQuestion, ...]

    def of(self, kind: Kind) -> tuple[AskedQuestion, ...]:
        return tuple(asked for asked in self.asked if asked.kind == kind)


class Session:
    """One model, and the edits made on it. Calls from several threads wait for each other.

    Attributes:
        config: Which model.
        testbed: Its folder, where it is a testbed; its world then says what to ask.
    """

    def __init__(self, model: Any, tokenizer: Any, config: ModelConfig, testbed: Path | None = None) -> None:
        from errata.editors.core.ledger.ledger import Ledger

        self.model, self.tokenizer, self.config, self.testbed = model, tokenizer, config, testbed
        self._ledger = Ledger.of(model)
        self._editors: dict[str, Editor] = {}
        self._made: dict[str, AppliedEdit] = {}
        self._untouched: dict[Probe, Reply] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, config: ModelConfig, *, precision: str | None = None, device: str | None = None) -> Session:
        """Load a model.

        Raises:
            ConfigError: there is none, or it cannot be loaded.
        """
        from errata import models
        from errata.benchmarks.datasets import world

        model, tokenizer = config.load(precision, device)
        folder = models.locate(config.name)
        is_testbed = isinstance(folder, Path) and world.is_testbed(folder)
        return cls(model, tokenizer, config, folder if is_testbed and isinstance(folder, Path) else None)

    @property
    def history(self) -> tuple[AppliedEdit, ...]:
        """Every edit made here, undone ones too, in the order in which they were made."""
        return tuple(self._made.values())

    def make(self, method: str, fact: ExampleFact, *, progress: Progress = silent) -> AppliedEdit:
        """Make an edit on top of those that the model carries.

        Raises:
            RequestError: the fact cannot be carried out as written.
            ErrataError: the method does not fit the model, lacks what it needs, or refuses the edit.
        """
        with self._lock:
            request = fact.request()
            asked = questions(fact, request, self.testbed)
            self._ask_untouched(asked)  # what cannot be asked is refused before anything is written
            editor = self._editor(method)
            editor.progress = progress
            started = time.perf_counter()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                edit = editor.apply(request)
            said = tuple(dict.fromkeys(str(w.message) for w in caught if _is_ours(w.category)))
            made = AppliedEdit(edit, asked, time.perf_counter() - started, said)
            self._made.pop(made.id, None)
            self._made[made.id] = made
            return made

    def undo(self, id: str) -> AppliedEdit:  # noqa: A002
        """Take an edit back, whichever; it stays in the history.

        Raises:
            LedgerError: there is no such edit, or it is undone already.
        """
        with self._lock:
            made = self._find(id)
            made.edit.undo()
            return made

    def redo(self, id: str) -> AppliedEdit:  # noqa: A002
        """Put an undone edit on again, on top of the others.

        Raises:
            LedgerError: there is no such edit, or the model carries it.
        """
        with self._lock:
            made = self._find(id)
            made.edit.apply()
            return made

    def clear(self) -> None:
        """Undo every edit."""
        with self._lock:
            self._ledger.clear()

    def view(self, id: str) -> SessionView:  # noqa: A002
        """Ask about an edit again.

        Raises:
            LedgerError: there is no such edit.
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

    def _editor(self, method: str) -> Editor:
        from errata import editors
        from errata.benchmarks.bench.config import editor_config

        if method not in self._editors:
            config = editor_config({"name": method}, self.config)
            self._editors[method] = editors.get(method)(self.model, self.tokenizer, config)
        return self._editors[method]

    def _ask_untouched(self, probes: Sequence[Probe]) -> list[Reply]:
        """The replies of the model without its edits, each asked for once."""
        if missing := [probe for probe in probes if probe not in self._untouched]:
            with self._ledger.untouched():
                self._untouched |= zip(missing, self._ask(missing), strict=True)
        return [self._untouched[probe] for probe in probes]

    def _ask(self, probes: Sequence[Probe]) -> list[Reply]:
        """The replies of the model as it stands."""
        from errata.evaluate.generation import generate
        from errata.evaluate.scoring import score

        scores = score(self.model, self.tokenizer, probes, next_token=True)
        texts = generate(self.model, self.tokenizer, [probe.prompt for probe in probes], TOKENS)
        replies = []
        for probe, scored, text in zip(probes, scores, texts, strict=True):
            assert scored.logprobs is not None
            best = scored.logprobs.exp().topk(TOP)
            words = [self.tokenizer.decode([token]) for token in best.indices.tolist()]
            says = None if probe.target is None else all(scored.target_correct)
            replies.append(Reply(tuple(zip(words, best.values.tolist(), strict=True)), text, says))
        return replies


class Sessions:
    """The models that the playground was started with, one of them open.

    Args:
        configs: By the name that they were given.
        precision, device: As `errata.load` takes them.
    """

    def __init__(
        self, configs: Mapping[str, ModelConfig], *, precision: str | None = None, device: str | None = None
    ) -> None:
        self._configs, self._precision, self._device = dict(configs), precision, device
        self.name = ""
        self.desk: Session | None = None

    def choose(self, name: str) -> Session:
        """The desk of a model. Another one than before is loaded anew, without edits, and the one before is dropped.

        Raises:
            ConfigError: it is not among the models, or cannot be loaded; the one before stays.
        """
        if name not in self._configs:
            raise ConfigError(f"no model {name!r} here; start the playground with model={name}")
        if self.desk is None or name != self.name:
            self.desk = Session.open(self._configs[name], precision=self._precision, device=self._device)
            self.name = name
        return self.desk


def _is_ours(category: type[Warning]) -> bool:
    return category.__module__.partition(".")[0] == "errata" or category is UserWarning
