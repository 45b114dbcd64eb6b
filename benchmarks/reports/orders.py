"""Tables and panels of `protocol=compose`: an edit and what it meets, in both orders.

A row is a measure of one pair. The two numbers of the authors stand beside both orders, since neither says which order
is the better one (evaluate/orders.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from errata.benchmarks.reports.naming import INTERVENTIONS, Results, flat_settings, labels, readable
from errata.benchmarks.reports.palette import MUTED, look
from errata.benchmarks.reports.panels import Panel
from errata.benchmarks.reports.seeds import members
from errata.benchmarks.reports.strengths import TextTable
from errata.benchmarks.reports.tables import share
from errata.benchmarks.runs.json_values import number
from errata.evaluate.orders import order_free_error, order_sensitivity

SET_F1, FORGETTING = "set_f1", "forgetting"
_SHOWN = (("reliability", "Reliability"), ("generalization", "Generalization"), ("locality", "Locality"))
_SETS = (("forget", "Forget set"), ("retain", "Retain set"))
_DONE: Mapping[str, str] = {"edit": "edited", "compress": "compressed", "unlearn": "unlearned"}
_SIZE = (3.4, 0.26)  # inches of a panel, and of each of its rows


@dataclass(frozen=True)
class Pair:
    """One edit with what it meets, in the orders that were run.

    Attributes:
        method: The method's name.
        label: The method and what it meets, as readers know them.
        orders: Its runs by order.
    """

    method: str
    label: str
    orders: Mapping[str, Results]

    def alone(self, scoring: str, metric: str) -> float | None:
        """Return what a metric is behind the edit alone; None where no order begins with it."""
        steps = [run["composition"]["steps"] for run in self.orders.values()]
        found = next((own["edit"] for own in steps if "edit" in own), None)
        if scoring == FORGETTING:
            return None if found is None else found.get(FORGETTING, {}).get(metric, {}).get("answers")
        entry = None if found is None else found["summary"].get(scoring, {}).get(metric)
        return None if entry is None else entry["mean"]


def pairs(runs: Sequence[Results]) -> list[Pair]:
    """Return the pairs of a group's runs, in their order; nothing of other protocols."""
    own = [run for row in runs for run in members(row) if "composition" in run]
    found: dict[str, dict[str, Results]] = {}
    for run in own:
        settings = flat_settings(run["config"])
        key = repr(sorted((name, repr(value)) for name, value in settings.items() if name not in ("compose.order",)))
        found.setdefault(key, {})[run["composition"]["order"]] = run
    first = [next(iter(orders.values())) for orders in found.values()]
    named = _labels(first)
    return [
        Pair(run["names"]["editor"], label, orders)
        for run, label, orders in zip(first, named, found.values(), strict=True)
    ]


def _labels(runs: Sequence[Results]) -> list[str]:
    """Return the method and what it meets; where this is the same for several pairs, with what tells them apart."""
    plain, sized = ([f"{readable(run['names']['editor'])}, {met(run)}" for run in runs] for met in (_met, _met_sized))
    found = [own if plain.count(own) == 1 else long for own, long in zip(plain, sized, strict=True)]
    told = labels(runs) if len(set(found)) < len(found) else found
    return [own if found.count(own) == 1 else readable(long) for own, long in zip(found, told, strict=True)]


def _met(run: Results) -> str:
    """Return what an edit meets: "Wanda" or "RMU and Wanda"."""
    said = run["composition"]
    names = [str(said[role]["name"]) for role in said["order"].split("-") if role != "edit"]
    return " and ".join(sorted(INTERVENTIONS.get(name, name) for name in names))


def _met_sized(run: Results) -> str:
    """Return what an edit meets with how much it compresses, where that is given: "Wanda 40 %" or "GPTQ 3 bits"."""
    given = run["composition"]["compress"]
    sizes = [f"{100 * given['sparsity']:g} %"] if "sparsity" in given else []
    sizes += [f"{given['bits']} bits"] if "bits" in given else []
    return " ".join([_met(run), *sizes])


def said(order: str) -> str:
    """Return an order in words: "edited, then compressed"."""
    return ", then ".join(_DONE[role] for role in order.split("-"))


def measures(pair: Pair, scoring: str) -> Iterator[tuple[str, str, str, dict[str, float]]]:
    """Yield scoring, metric, its title, and its means by order, of each metric that all orders of a pair have."""
    for own in (scoring, SET_F1):
        for metric, title in _SHOWN:
            found = {order: run["summary"].get(own, {}).get(metric) for order, run in pair.orders.items()}
            means = {order: entry["mean"] for order, entry in found.items() if entry is not None}
            if len(means) == len(found):
                yield own, metric, f"{title}, set F1" if own == SET_F1 else title, means
    for name, title in _SETS:
        shares = _asked(pair, name, "answers")
        if shares:
            yield FORGETTING, name, f"{title}, answered", shares


def _asked(pair: Pair, name: str, measure: str) -> dict[str, float]:
    """Return a measure of a set of the unlearning at the end, by order; empty where an order has none."""
    found = {o: run["composition"].get(FORGETTING, {}).get("end", {}).get(name, {}) for o, run in pair.orders.items()}
    values = {order: number(entry[measure]) for order, entry in found.items() if entry.get(measure) is not None}
    return values if len(values) == len(found) else {}


def order_table(runs: Sequence[Results], scoring: str) -> TextTable | None:
    """Return the table of a group's compositions; None where it has none.

    Args:
        runs: Of one group.
        scoring: Whose metrics are shown beside the set F1.
    """
    found = pairs(runs)
    if not found:
        return None
    known = {order for pair in found for order in pair.orders}
    orders = sorted(known, key=lambda order: (not order.startswith("edit"), order))
    heads = ["", "measure, %", "edited alone", *map(said, orders), "order-free error", "order sensitivity"]
    rows = [
        row
        for pair in found
        for row in (*_rows(pair, scoring, orders), *_losses(pair, orders), _perplexities(pair, orders))
    ]
    return TextTable("Both orders", heads, rows, _notes(found))


def _rows(pair: Pair, scoring: str, orders: Sequence[str]) -> Iterator[list[str]]:
    for own, metric, title, means in measures(pair, scoring):
        alone = pair.alone(own, metric)
        cells = ["-" if alone is None else share(alone), *(share(means[o]) if o in means else "-" for o in orders)]
        yield (
            [pair.label, title, *cells, *map(share, _both(means, lower_is_better=metric == "forget"))]
            if len(means) > 1
            else [
                *(pair.label, title, *cells),
                *("-", "-"),
            ]
        )


def _both(means: Mapping[str, float], *, lower_is_better: bool) -> tuple[float, float]:
    """Return order-free error and order sensitivity; of more than two orders, of the best and the worst."""
    best, worst = max(means.values()), min(means.values())
    return order_free_error(best, worst, lower_is_better=lower_is_better), order_sensitivity(best, worst)


def _losses(pair: Pair, orders: Sequence[str]) -> Iterator[list[str]]:
    """Yield what each order makes of the loss on the texts of the unlearning."""
    steps = [run["composition"]["steps"].get("edit", {}) for run in pair.orders.values()]
    for name, title in _SETS:
        if found := _asked(pair, name, "loss"):
            alone = next((step[FORGETTING][name]["loss"] for step in steps if FORGETTING in step), None)
            cells = [_ratio(alone), *(_ratio(found.get(order)) for order in orders)]
            yield [pair.label, f"{title}, loss in nats", *cells, "-", "-"]


def _perplexities(pair: Pair, orders: Sequence[str]) -> list[str]:
    """Return how many times the untouched model's perplexity each order has."""
    found = {order: run["collapse"]["perplexity_ratio"] for order, run in pair.orders.items()}
    steps = [run["composition"]["steps"].get("edit") for run in pair.orders.values()]
    alone = next((step["perplexity_ratio"] for step in steps if step is not None), None)
    cells = [_ratio(alone), *(_ratio(found.get(order)) for order in orders)]
    return [pair.label, "Perplexity, times untouched", *cells, "-", "-"]


def _ratio(value: Any) -> str:
    return "-" if value is None else f"{number(value):.3g}"


def _notes(found: Sequence[Pair]) -> list[str]:
    notes = [
        "Order-free error: 100 less the better order. Order sensitivity: how far the two orders are apart. Set F1: as "
        "the authors of composable interventions measure edit success."
    ]
    each = [run["composition"] for pair in found for run in pair.orders.values()]
    # A run that an older version began has no numbers of the untouched model.
    before = [said[FORGETTING]["untouched"] for said in each if "untouched" in said.get(FORGETTING, {})]
    notes += dict.fromkeys(f"Before: {'; '.join(_before(said, *one) for one in _SETS)}." for said in before)
    ends = {said["end"] for said in each if "compress" in said["order"].split("-")}
    repeats = {"again": "is done again", "keep": "has what it fixed put back", "none": "is not done again"}
    for end in sorted(ends):
        notes.append(f"A compression that is not the last step {repeats[end]} at the end (compose.end={end}).")
    bits = [run["composition"]["average_bits"] for pair in found for run in pair.orders.values()]
    known = sorted({f"{number(value):.4g}" for value in bits if value is not None}, key=float)
    if known:
        notes.append(f"Average bits of an element of the blocks' maps at the end: {', '.join(known)}.")
    return notes


def _before(said: Mapping[str, Any], name: str, title: str) -> str:
    """Return what the untouched model knows of a set of the unlearning."""
    own = said[name]
    loss = f"{title.lower()} of {own['texts']} texts, loss {_ratio(own['loss'])} nats"
    return loss if own["answers"] is None else f"{loss}, {share(own['answers'])} % of {own['asked']} answers"


def order_panels(runs: Sequence[Results], scoring: str) -> list[Panel]:
    """Return a panel per metric: a line per pair from one order to the other; nothing of other protocols."""
    found = pairs(runs)
    titles = {(own, metric): title for pair in found for own, metric, title, _ in measures(pair, scoring)}
    size = (_SIZE[0], 0.9 + _SIZE[1] * len(found))
    return [
        Panel(title, partial(_lines, found=found, scoring=scoring, own=own, metric=metric), size)
        for (own, metric), title in titles.items()
    ]


def _lines(axis: Any, *, found: Sequence[Pair], scoring: str, own: str, metric: str) -> None:
    """Draw each pair: filled where the edit comes first, hollow where it comes later, and a tick for the edit alone."""
    for row, pair in enumerate(found):
        means = next((m for s, name, _, m in measures(pair, scoring) if (s, name) == (own, metric)), {})
        if not means:  # measured of other pairs alone
            continue
        colour = look(pair.method).colour
        places = [100 * mean for mean in means.values()]
        axis.plot([min(places), max(places)], [row, row], color=colour, linewidth=1.4, alpha=0.6)
        for order, mean in means.items():
            style: Any = {"marker": "o", "linestyle": "none", "color": colour, "markersize": 5, "clip_on": False}
            fill = colour if order.startswith("edit") else "none"
            axis.plot([100 * mean], [row], markerfacecolor=fill, zorder=3, **style)
        if (alone := pair.alone(own, metric)) is not None:
            axis.plot([100 * alone], [row], marker="|", markersize=9, color=MUTED, linestyle="none", clip_on=False)
    style = {"linestyle": "none", "color": MUTED, "markersize": 5}
    axis.plot([], [], marker="o", label="edited first", **style)
    axis.plot([], [], marker="o", markerfacecolor="none", label="edited later", **style)
    axis.plot([], [], marker="|", label="edited alone", **{**style, "markersize": 9})
    axis.set_yticks(range(len(found)), [pair.label for pair in found])
    axis.set_ylim(len(found) - 0.5, -0.5)
    axis.set_xlim(-2, 102)
    axis.set_xlabel("%")
    axis.grid(axis="x")
