"""The search for values as plain as the originals have it: one request at a time, whole rows, all logits, every step.

The oracle that editors/core/families/value_search.py is tested against, and what it has to be faster than. Nothing in
the library uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from errata.editors.core.families.search_rows import PromptRow, SearchProblem
from errata.editors.core.families.value_search import Objective, Target
from errata.editors.core.forward.suffix import Edited, Site
from errata.editors.core.model.architecture import Architecture
from errata.editors.core.model.own_forward import evaluating, frozen, hooked
from errata.editors.core.model.tokens import right_padded


def find_targets_reference(
    architecture: Architecture,
    problems: Sequence[SearchProblem],
    objective: Objective,
    *,
    layer: Edited,
    site: Site,
    pad: int,
) -> list[Target]:
    """As `find_targets` with the last layer as loss layer, one request after another."""
    with evaluating(architecture.model), frozen(architecture.model):
        return [_search(architecture, problem, objective, layer, site, pad) for problem in problems]


def _search(
    architecture: Architecture, problem: SearchProblem, objective: Objective, layer: Edited, site: Site, pad: int
) -> Target:
    assert problem.essence is not None
    rows = (*problem.rows, problem.essence)
    batch = right_padded([row.ids for row in rows], pad).to(architecture.device)
    starts = [row.start for row in rows]
    layers = [layer] if isinstance(layer, int) else list(layer)
    weight = architecture.weight(layers[0])
    delta = torch.zeros(len(layers), architecture.d_model, dtype=weight.dtype, device=weight.device, requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=objective.v_lr)
    initial: list[Tensor] = []
    reference: Tensor | None = None
    target = Target(delta, delta)

    def add(
        number: int, _module: object, _args: object, output: Tensor | tuple[Tensor, ...]
    ) -> Tensor | tuple[Tensor, ...]:
        hidden = output[0] if isinstance(output, (tuple, list)) else output
        shaped = hidden.reshape(*batch.ids.shape, -1).clone()
        if number == len(initial):
            initial.append(shaped[0, starts[0]].detach().clone())
        for i, start in enumerate(starts):
            shaped[i, start] += delta[number]
        shaped = shaped.reshape(hidden.shape)
        return (shaped, *output[1:]) if isinstance(output, (tuple, list)) else shaped

    modules = [architecture.down(one) if site == "mlp" else architecture.block(one) for one in layers]
    for step in range(1, objective.v_num_grad_steps + 1):
        optimiser.zero_grad()
        # At the MLP beneath the hooks of edits that the model carries, as the weights are that will make the value.
        hooks = [
            module.register_forward_hook(partial(add, number), prepend=site == "mlp")
            for number, module in enumerate(modules)
        ]
        with hooked(*hooks):
            logits = architecture.model(
                input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
            ).logits
        log_p = torch.log_softmax(logits, dim=2)
        nll = -torch.stack([_answer(log_p[i], row) for i, row in enumerate(problem.rows)]).mean()
        now = log_p[-1, problem.essence.start]
        reference = now.detach().clone() if reference is None else reference
        kl = objective.kl_factor * torch.nn.functional.kl_div(reference, now, log_target=True, reduction="sum")
        decays = [torch.norm(own) / torch.norm(value) ** 2 for own, value in zip(delta, initial, strict=True)]
        decay = objective.v_weight_decay * torch.stack(decays).mean()
        loss = nll + kl + decay
        target.losses.append({"loss": loss.item(), "nll": nll.item(), "kl": kl.item(), "weight_decay": decay.item()})
        if loss.item() < objective.stop_loss or step == objective.v_num_grad_steps:
            break
        loss.backward()
        optimiser.step()
        for number, value in enumerate(initial):
            bound = objective.clamp_norm_factor * value.norm()
            if delta[number].norm() > bound:
                with torch.no_grad():
                    delta[number] *= bound / delta[number].norm()
    found = torch.stack(initial), delta.detach().clone()
    target.initial, target.delta = (states[0] if isinstance(layer, int) else states for states in found)
    return target


def _answer(log_p: Tensor, row: PromptRow) -> Tensor:
    """Mean log probability of the answer's tokens, (1 / T) sum log p."""
    first = len(row.ids) - len(row.answer)
    return torch.stack([log_p[first + t, token] for t, token in enumerate(row.answer)]).mean()
