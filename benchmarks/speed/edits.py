"""How fast methods edit whose whole runs are not measured: AlphaEdit's batches, and GRACE and FT-M, which train.

As in whole_runs, `model` and `data` of the settings name a real model and a file of CounterFact. Loading, contexts,
second moments and projectors are not timed, on either path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from errata.benchmarks.speed.edits_reference import alphaedit, fine_tuned
from errata.benchmarks.speed.grace_reference import trained_value
from errata.benchmarks.speed.scoring import distance
from errata.benchmarks.speed.stage import Stage
from errata.benchmarks.speed.timing import TimedPair, Timing, difference, timed
from errata.benchmarks.speed.whole_runs import chosen_cases, make_editor
from errata.editors import FTM, GRACE, AlphaEdit
from errata.editors.core.edit import Edit
from errata.editors.core.editor import Editor
from errata.editors.core.request import EditRequest

# FT-M's, as published. The rule that replaces it takes its rate from the first gradient, which plain loops do not.
RATE = 5e-4
Found = TypeVar("Found")


def compare(stage: Stage) -> list[TimedPair]:
    """A batch of AlphaEdit; requests of GRACE and of FT-M, together and one by one."""
    requests = [case.request for case in chosen_cases(stage)]
    few = requests[: stage.config.plain_records]
    return [_alphaedit(stage, requests, few), *_grace(stage, requests, few), *_fine_tuning(stage, requests, few)]


def _alphaedit(stage: Stage, requests: Sequence[EditRequest], few: Sequence[EditRequest]) -> TimedPair:
    editor = make_editor(stage, AlphaEdit)
    projectors = {layer: editor.projector(layer).matrix() for layer in editor.layers}
    ridges = {layer: editor.ridge(layer) for layer in editor.layers}

    def batch(some: Sequence[EditRequest]) -> Edit:
        with editor.applied(some) as edit:
            return edit

    batch(requests[:1])  # the first products of a process pay for threads and page faults
    edit, fast = timed(lambda: batch(requests))
    problems = [editor.problem(request) for request in few]
    clock: dict[str, float] = {}
    updates, slow = timed(
        lambda: alphaedit(stage.architecture, problems, editor.settings.objective, projectors, ridges, clock)
    )
    share, once = len(requests) / len(few), clock["solves"]
    slow = Timing(*(share * (spent - once) + once for spent in (slow.seconds, slow.cpu_seconds)))
    if len(few) < len(requests):  # a batch of fewer requests is another edit
        edit = batch(few)
    apart = [
        difference(edit.patch.updates[stage.architecture.weight_name(layer)].matrix(torch.float64, stage.device), found)
        for layer, found in updates.items()
    ]
    settings = {"requests": len(requests), "plain_requests": len(few), "layers": list(editor.layers)}
    return TimedPair("edits", "AlphaEdit, batch", fast, slow, max(apart), None, settings)


def _grace(stage: Stage, requests: Sequence[EditRequest], few: Sequence[EditRequest]) -> list[TimedPair]:
    """The agreement is of the values."""
    editor = GRACE(stage.model, stage.tokenizer, {"n_iter": stage.config.steps})
    lr, steps = editor.config.edit_lr, stage.config.steps

    def plainly() -> list[torch.Tensor]:
        rows = [(request, editor.row(request)) for request in few]
        return [
            trained_value(
                stage.model,
                editor.module,
                row,
                editor.replaced_columns(row),
                editor.cold_start(request),
                lr=lr,
                steps=steps,
            )
            for request, row in rows
        ]

    def apart(edits: Sequence[Edit], values: Sequence[torch.Tensor]) -> float:
        ours = [edit.patch.adapters[editor.module_name].tensors["values"][0] for edit in edits]
        return max(difference(a, b) for a, b in zip(ours[: len(values)], values, strict=True))

    settings = {"layer": editor.layer, "steps": steps}
    return _trained("GRACE", editor, plainly, apart, requests, few, settings, one_by_one=5.0)


def _fine_tuning(stage: Stage, requests: Sequence[EditRequest], few: Sequence[EditRequest]) -> list[TimedPair]:
    """The agreement is of the losses: Adam moves an element whose gradient is all rounding as far as any other."""
    fields = {"lr": RATE} if stage.config.model is not None else {"lr": RATE, "num_steps": stage.config.steps}
    editor = FTM(stage.model, stage.tokenizer, fields)
    config, (trained,) = editor.config, editor.maps
    weight = trained.module.get_parameter("weight")

    def plainly() -> list[list[float]]:
        return [
            fine_tuned(
                stage.model,
                weight,
                editor.row(request),
                lr=RATE,
                steps=config.num_steps,
                stop_loss=config.stop_loss,
            )
            for request in few
        ]

    def apart(edits: Sequence[Edit], losses: Sequence[list[float]]) -> float:
        ours = [edit.diagnostics[0]["losses"] for edit in edits[: len(losses)]]
        if list(map(len, ours)) != list(map(len, losses)):
            return 1.0  # one of them stopped at another step
        return distance([loss for one in ours for loss in one], [loss for one in losses for loss in one])

    settings = {"layer": editor.layers[0], "lr": RATE, "most_steps": config.num_steps}
    return _trained("FT-M", editor, plainly, apart, requests, few, settings, one_by_one=None)


def _trained(
    name: str,
    editor: Editor,
    plainly: Callable[[], Found],
    apart: Callable[[Sequence[Edit], Found], float],
    requests: Sequence[EditRequest],
    few: Sequence[EditRequest],
    settings: Mapping[str, object],
    *,
    one_by_one: float | None,
) -> list[TimedPair]:
    """All requests together, and a few one by one, against the plain loop over these few.

    Args:
        name: Of the method.
        editor: Computes independent edits.
        plainly: What the plain loop finds for the few requests.
        apart: How far edits are from what the plain loop found. The first of them are those of the few requests.
        requests: All of them.
        few: The first of them.
        settings: What else to note.
        one_by_one: The ratio aimed at for requests that come one by one.
    """
    editor.compute(requests[:1])  # the first products of a process pay for threads and page faults
    together, fast = timed(lambda: editor.compute(requests))
    each, singly = timed(lambda: [editor.compute([request])[0] for request in few])
    found, slow = timed(plainly)
    share = len(requests) / len(few)
    scaled = Timing(share * slow.seconds, share * slow.cpu_seconds)
    settings = {**settings, "requests": len(requests), "plain_requests": len(few)}
    alone = {**settings, "requests": len(few)}
    return [
        TimedPair("edits", f"{name}, together", fast, scaled, apart(together, found), None, settings),
        TimedPair("edits", f"{name}, one by one", singly, slow, apart(each, found), one_by_one, alone),
    ]
