"""The loop that trains an editor: steps, evaluations on held-out cases, checkpoints, and the end.

    record = Trainer(editor, examples, held_out, schedule, folder).run(Stop())

A step depends only on the seed, the step and the checkpoint (the network and the moments of the optimiser). So on a
CPU, a run that was killed and started again ends with the bytes of one that was not. The network that is kept is the
best one on the held-out cases.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from errata.benchmarks.bench.attempts import REFUSALS
from errata.benchmarks.bench.train_config import Schedule
from errata.benchmarks.runs.stopping import Stop, Stopped
from errata.benchmarks.training.examples import ExampleSampler
from errata.editors.core.edit import Edit
from errata.editors.core.errors import NumericalError
from errata.editors.core.families.learned_editor import TrainedEditor
from errata.editors.core.files.tensor_cache import TensorCache
from errata.editors.core.ledger.adapter_hooks import check_trains_on_whole_texts
from errata.editors.core.model.own_forward import evaluating, frozen
from errata.editors.core.progress import Progress, silent
from errata.evaluate.metrics import Summary, Values, case_values, harmonic_mean, outcomes, summarise
from errata.evaluate.probes import Case
from errata.evaluate.scoring import score

CHECKPOINT = "checkpoint"  # its name in the run's folder
HELD_OUT_BATCH = 32  # held-out edits computed together
# Success on the held-out cases is the harmonic mean of those of these shares that were measured.
SUCCESS = ("reliability", "generalization", "locality")
SCORING = "teacher_forced"


@dataclass
class TrainingRecord:
    """How training went so far.

    Attributes:
        step: Steps done.
        best: The evaluation of the network that is kept, as in `history`.
        before: Scores of the untouched model on the held-out cases.
        history: One entry per evaluation: step, mean losses since the evaluation before, scores on the held-out cases.
        recent: Losses since the last evaluation, one entry per step.
        seconds: Time at work, over all starts of the run.
    """

    step: int = 0
    best: dict[str, Any] | None = None
    before: Summary = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    recent: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def worse(self) -> int:
        """Evaluations since the best one."""
        return sum(entry["step"] > self.best["step"] for entry in self.history) if self.best else 0


class Trainer:
    """One training run.

    Args:
        editor: With a new network.
        examples: Draws the examples to learn from.
        held_out: Cases that decide when to stop.
        schedule: How long to train.
        folder: Keeps the checkpoint and, under the name of the method, the best network.
        about: Values that JSON can hold, saved with the network.
        report: Called with every evaluation.
        progress: Called after every step.

    Raises:
        ArchitectureError: The model carries an edit that acts at the last token of each pass.
    """

    def __init__(
        self,
        editor: TrainedEditor,
        examples: ExampleSampler,
        held_out: Sequence[Case],
        schedule: Schedule,
        folder: Path,
        *,
        about: Mapping[str, Any] | None = None,
        report: Callable[[Mapping[str, Any]], object] = lambda _: None,
        progress: Progress = silent,
    ) -> None:
        check_trains_on_whole_texts(editor.model, type(editor).__name__)
        self.editor, self.examples, self.held_out, self.schedule = editor, examples, held_out, schedule
        self.folder, self.about, self.report, self.progress = folder, about or {}, report, progress
        self.cache = TensorCache(folder)
        self.groups = editor.parameter_groups()
        self.rates = [group["lr"] for group in self.groups]
        self.optimiser = torch.optim.Adam(self.groups)
        self.parameters = [parameter for group in self.groups for parameter in group["params"]]
        self.record = TrainingRecord()

    def run(self, stop: Stop) -> TrainingRecord:
        """Train to the end, from the last checkpoint where there is one. The folder then holds the best network.

        Raises:
            NumericalError: the loss is no longer finite; the message says what to lower. The last checkpoint stays.
            Stopped: `stop` asked for it; the checkpoint is of this step.
        """
        self._resume()
        if not self.record.before:
            self.record.before = summarise([_values(self.editor, case) for case in self.held_out])
        before = time.perf_counter() - self.record.seconds
        while not self._is_over():
            self._step()
            record, due = self.record, self.schedule
            if record.step % due.eval_every == 0 or record.step == due.steps:
                self._evaluate()
            record.seconds = time.perf_counter() - before
            if record.step % due.checkpoint_every == 0 or self._is_over():
                self._write()
            self.progress(record.step, due.steps, "steps")
            self._stop_here(stop)
        return self.record

    def _stop_here(self, stop: Stop) -> None:
        if self._is_over():
            return
        try:
            stop.check()
        except Stopped:
            self._write()
            raise

    def forget(self) -> None:
        """Remove the checkpoint of a training that is finished."""
        with self.cache.lock([CHECKPOINT]):
            self.cache.remove(CHECKPOINT)

    def _is_over(self) -> bool:
        patience = self.schedule.patience
        is_early = patience is not None and self.record.worse >= patience
        return self.record.step >= self.schedule.steps or is_early

    def _step(self) -> None:
        config, step = self.editor.config, self.record.step
        edits = self.examples.batch(step, config.accumulate_bs, config.edit_bs)
        at_once = self.schedule.edits_at_once or len(edits)
        with evaluating(self.editor.model), frozen(self.editor.model), torch.enable_grad():
            losses = self.editor.backward(edits, at_once)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, config.grad_clip))
        if not math.isfinite(norm):
            raise NumericalError(
                f"the gradient of training step {step} is not finite; lower editor.lr or editor.edit_lr"
            )
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.schedule.rate(step)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.record.step = step + 1
        self.record.recent.append({**losses, "gradient": norm})

    # --- held-out cases ---------------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        record = self.record
        scores = held_out_scores(self.editor, self.held_out)
        losses = {name: fmean(entry[name] for entry in record.recent) for name in record.recent[0]}
        entry = {"step": record.step, "losses": losses, "success": success(scores), "held_out": scores}
        record.history.append(entry)
        record.recent = []
        if record.best is None or entry["success"] > record.best["success"]:
            record.best = entry
            self.editor.save(self.folder, {**self.about, "training": {"step": record.step, "held_out": scores}})
        self.report(entry)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        tensors = {f"network.{name}": tensor for name, tensor in self.editor.network.state_dict().items()}
        for i, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{name}": tensor for name, tensor in state.items()}
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with self.cache.lock([CHECKPOINT]):
            self.cache.store(CHECKPOINT, plain, asdict(self.record))

    def _resume(self) -> None:
        with self.cache.lock([CHECKPOINT]):
            entry = self.cache.recover(CHECKPOINT)
        if entry is None:
            return
        network: dict[str, Tensor] = {}
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in entry.tensors.items():
            owner, _, rest = name.partition(".")
            if owner == "network":
                network[rest] = tensor
            else:
                index, _, kind = rest.partition(".")
                state.setdefault(int(index), {})[kind] = tensor
        self.editor.network.load_state_dict(network)
        self.optimiser.load_state_dict({"state": state, "param_groups": self.optimiser.state_dict()["param_groups"]})
        self.record = TrainingRecord(**entry.meta)


def success(scores: Summary) -> float:
    """Return the harmonic mean of SUCCESS under SCORING, from 0 to 1."""
    found = scores.get(SCORING, {})
    return harmonic_mean([float(found[metric]["mean"]) for metric in SUCCESS if metric in found] or [0.0])


def held_out_scores(editor: TrainedEditor, cases: Sequence[Case]) -> Summary:
    """Score single edits of the cases, as a bench does. A refused edit counts with the untouched scores."""
    values: list[Values] = []
    for start in range(0, len(cases), HELD_OUT_BATCH):
        group = cases[start : start + HELD_OUT_BATCH]
        for case, edit in zip(group, _computed(editor, group), strict=True):
            try:
                with nullcontext() if edit is None else edit.applied():
                    values.append(_values(editor, case))
            except REFUSALS:
                values.append(_values(editor, case))
    return summarise(values)


def _computed(editor: TrainedEditor, cases: Sequence[Case]) -> list[Edit | None]:
    """Return the edit of each case, computed together; None where the method refuses it."""
    try:
        return [*editor.compute([case.request for case in cases])]
    except REFUSALS:
        return [None] if len(cases) == 1 else [edit for case in cases for edit in _computed(editor, [case])]


def _values(editor: TrainedEditor, case: Case) -> Values:
    return case_values(outcomes(case, score(editor.model, editor.tokenizer, case.probes)))
