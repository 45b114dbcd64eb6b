"""How fast a batch is edited into a model with MEMIT and all its probes are scored: everything but the loading."""

from __future__ import annotations

import torch

from errata.benchmarks.speed import end_to_end_reference, synthetic
from errata.benchmarks.speed.keys_reference import restored
from errata.benchmarks.speed.scoring import distance, values
from errata.benchmarks.speed.scoring_reference import by_record
from errata.benchmarks.speed.stage import Stage
from errata.benchmarks.speed.targets import objective
from errata.benchmarks.speed.timing import TimedPair, Timing, difference, timed
from errata.editors.core.edit import Edit
from errata.editors.core.ledger.patch import LowRank
from errata.editors.memit import MEMIT, MEMITConfig
from errata.evaluate.probes import Case
from errata.evaluate.scoring import score


def compare(stage: Stage) -> list[TimedPair]:
    """The whole, and its two halves in `settings`. What is computed once a model (second moments, our factors) is
    there before."""
    config = stage.config
    cases = synthetic.cases(stage.words, config.batch, config.seed)
    editor = make_editor(stage)
    for layer in editor.layers:
        editor.factor(layer)
    _warm_up(stage, editor)
    edit, our_edit, scores, our_scoring = _ours(stage, editor, cases)
    updates, plain_edit, plain_scores, plain_scoring = _plain(stage, editor, cases)
    ours = [edit.patch.updates[stage.architecture.weight_name(layer)] for layer in editor.layers]
    assert all(isinstance(update, LowRank) for update in ours)
    apart = [
        difference(update.matrix(torch.float64, stage.device), theirs)
        for update, theirs in zip(ours, updates.values(), strict=True)
    ]
    settings = {
        "requests": config.batch,
        "steps": config.steps,
        "layers": list(editor.layers),
        "probes": sum(len(case.probes) for case in cases),
        "edit_ratio": plain_edit.cpu_seconds / our_edit.cpu_seconds,
        "scoring_ratio": plain_scoring.cpu_seconds / our_scoring.cpu_seconds,
        "scores_agreement": distance(scores, plain_scores),
    }
    target = stage.target(6.0, 20.0 if config.precision == "bf16" else 8.0)
    fast, slow = our_edit + our_scoring, plain_edit + plain_scoring
    return [TimedPair("end_to_end", "MEMIT, edit and score", fast, slow, max(apart), target, settings)]


def make_editor(stage: Stage) -> MEMIT:
    """MEMIT with contexts and second moments made up, so that it needs no text; searches never stop early."""
    goal = objective(stage.config.steps)
    moment = synthetic.Spectrum.power_law(stage.sizes[1], largest=1.0, seed=stage.config.seed).moment()
    moment = moment.float().to(stage.device)
    config = MEMITConfig(
        layers=stage.layers,
        v_num_grad_steps=goal.v_num_grad_steps,
        v_lr=goal.v_lr,
        v_weight_decay=goal.v_weight_decay,
        clamp_norm_factor=goal.clamp_norm_factor,
        kl_factor=goal.kl_factor,
        stop_loss=goal.stop_loss,
        context_templates=synthetic.contexts(stage.words, seed=stage.config.seed),
        mom2_update_weight=100.0,
    )
    return MEMIT(stage.model, stage.tokenizer, config, moments=dict.fromkeys(stage.layers, moment))


def _warm_up(stage: Stage, editor: MEMIT) -> None:
    """Run one edit first: the first products of a process pay for threads and page faults, which no timing includes."""
    (case,) = synthetic.cases(stage.words, 1, stage.config.seed + 1)
    with editor.applied(case.request):
        score(stage.model, stage.tokenizer, case.probes)


def _ours(stage: Stage, editor: MEMIT, cases: list[Case]) -> tuple[Edit, Timing, list[float], Timing]:
    edit, editing = timed(lambda: editor.apply([case.request for case in cases]))
    try:
        probes = [probe for case in cases for probe in case.probes]
        found, scoring = timed(lambda: score(stage.model, stage.tokenizer, probes))
    finally:
        edit.undo()
    return edit, editing, values(found), scoring


def _plain(
    stage: Stage, editor: MEMIT, cases: list[Case]
) -> tuple[dict[int, torch.Tensor], Timing, list[float], Timing]:
    problems = [editor.problem(case.request) for case in cases]
    moments = {layer: editor.moment(layer) for layer in editor.layers}
    weight = editor.settings.mom2_update_weight
    assert weight is not None  # the editor has filled it in
    updates, editing = timed(
        lambda: end_to_end_reference.memit(
            stage.architecture,
            problems,
            editor.settings.objective,
            editor.layers,
            moments,
            weight,
        )
    )
    with torch.no_grad(), restored(stage.architecture, editor.layers):
        for layer, update in updates.items():
            written = stage.architecture.weight(layer)
            written += update.to(written)
        found, scoring = timed(lambda: by_record(stage.model, stage.tokenizer, cases))
    return updates, editing, found, scoring
