"""Says in a sentence what a comparison found, and no more than its figures bear."""

from __future__ import annotations

import math
from collections.abc import Sequence

from devices.units import energy, simulated, size
from fedsim.study.paired import FEWEST, Row
from fedsim.study.results import Result, cost_of_target

NAMED = 3  # arms in a list; more are counted
SAME = 0.02  # share by which costs may differ and still be called the same
COSTS = {"simulated_s": "time", "joules": "energy", "traffic_bytes": "traffic"}
WRITTEN = {"simulated_s": simulated, "joules": energy, "traffic_bytes": size}


def answer(result: Result) -> str:
    """Returns who is ahead, by how much and at what cost; nothing of it may be chance."""
    base = next((row for row in result.rows if row.label == result.study.against), None)
    others = [row for row in result.rows if row is not base]
    if base is None or not others:
        return " ".join([*map(_alone, result.rows[:1]), *_target(result)])
    tested = [row for row in others if not math.isnan(row.p)]
    ahead = [row for row in tested if row.is_significant and row.metric.gain(row.difference) > 0]
    behind = [row for row in tested if row.is_significant and row.metric.gain(row.difference) < 0]
    if not tested:
        first = _untested(base, others)
    elif ahead:
        best = max(ahead, key=lambda row: row.metric.gain(row.difference))
        first = f"{best.label} is ahead of {base.label}: {_difference(best, base)}, {_price(best, base)}."
        if more := [row.label for row in ahead if row is not best]:
            first += f" So {'is' if len(more) == 1 else 'are'} {_listed(more)}."
    elif behind:
        first = f"{base.label} is ahead of {_listed([row.label for row in behind])}."
        worst = max(behind, key=lambda row: row.metric.gain(row.mean))
        first += f" The best of them, {worst.label}: {_difference(worst, base)}, {_price(worst, base)}."
    else:
        first = _undecided(base, tested)
    return " ".join([first, *_rest(base, ahead, behind, tested), *_target(result)])


def _alone(row: Row) -> str:
    spread = f" ± {row.metric.number(row.deviation)}" if len(row.scores) > 1 else ""
    costs = [write(getattr(row, key)) for key, write in WRITTEN.items()]
    return f"{row.label}: {row.metric.title} {row.metric.with_unit(row.mean)}{spread} for {_and(costs)}."


def _untested(base: Row, others: Sequence[Row]) -> str:
    """Returns who has the best mean, where there are too few seeds for more."""
    best = max([base, *others], key=lambda row: row.metric.gain(row.mean))
    other = base if best is not base else max(others, key=lambda row: row.metric.gain(row.mean))
    seeds = max(len(row.scores) for row in (base, *others))
    shared = any(set(row.scores) & set(base.scores) for row in others)
    few = f"{seeds} seed{'s' if seeds > 1 else ''}" if shared else "runs without a seed in common"
    tied = [row for row in (base, *others) if row.metric.number(row.mean) == best.metric.number(best.mean)]
    if len(tied) > 1:
        first = "the same" if len(tied) == len(others) + 1 else "the best"
        price = f", {tied[1].label} {_price(tied[1], tied[0])}" if len(tied) == 2 else ""
        chance = f"whether they differ{f' ({FEWEST} can)' if shared else ''}"
        return (
            f"{_listed([row.label for row in tied])} have {first} {best.metric.title}, "
            f"{best.metric.with_unit(best.mean)}{price}; {few} cannot tell {chance}."
        )
    return (
        f"{best.label} has the best {best.metric.title}, {best.metric.with_unit(best.mean)} against "
        f"{other.metric.with_unit(other.mean)} of {other.label}, {_price(best, other)}; {few} cannot tell "
        f"whether that is more than chance{f' ({FEWEST} can)' if shared else ''}."
    )


def _undecided(base: Row, tested: Sequence[Row]) -> str:
    best = max(tested, key=lambda row: row.metric.gain(row.difference))
    if not any(row.difference or row.half_width for row in tested):
        return f"None differs from {base.label}: every seed has the same score."
    low, high = best.interval
    why = "which includes 0" if low <= 0 <= high else f"which is not enough with {len(tested)} comparisons (Holm)"
    text = f"{best.metric.change(best.difference)} ({best.interval_text}, {why})"
    return f"None is known to be ahead of {base.label} or behind it; the best, {best.label}, differs by {text}."


def _rest(base: Row, ahead: Sequence[Row], behind: Sequence[Row], tested: Sequence[Row]) -> list[str]:
    """Returns who is behind where others are ahead, and who cannot be told from the row compared with."""
    found = []
    if ahead and behind:
        found.append(f"Behind {base.label}: {_listed([row.label for row in behind])}.")
    open_still = [row.label for row in tested if row not in ahead and row not in behind]
    if open_still and (ahead or behind):
        found.append(f"Not told apart from {base.label}: {_listed(open_still)}.")
    return found


def _difference(row: Row, base: Row) -> str:
    scores = f"{row.metric.with_unit(row.mean)} against {row.metric.with_unit(base.mean)}"
    return f"{scores}, {row.metric.change(row.difference)} ({row.interval_text})"


def _price(row: Row, base: Row) -> str:
    """Returns what a row costs in the measure of another."""
    found: dict[str, list[str]] = {}
    for key, name in COSTS.items():
        mine, theirs = getattr(row, key), getattr(base, key)
        if theirs > 0:
            times = mine / theirs
            found.setdefault("the same" if abs(times - 1) <= SAME else f"{times:.3g} times the", []).append(name)
    return "for " + _and([f"{times} {_and(names)}" for times, names in found.items()]) if found else "at no cost"


def _target(result: Result) -> list[str]:
    """Returns who reaches the target for least, of the arms whose every seed gets there."""
    target, metric = result.study.target, result.metric
    if target is None:
        return []
    costs = {row.label: cost_of_target(result, row.label) for row in result.rows}
    there = {label: cost for label, cost in costs.items() if cost["simulated_s_to_target"] is not None}
    name = metric.with_unit(target)
    if not there:
        return [f"No arm reaches {name} with every seed."]
    cheapest: dict[str, list[str]] = {}
    for key, what in COSTS.items():
        label = min(there, key=lambda label: there[label][f"{key}_to_target"])
        cheapest.setdefault(label, []).append(f"{WRITTEN[key](there[label][f'{key}_to_target'])} of {what}")
    parts = "; ".join(f"{label} ({', '.join(spent)})" for label, spent in cheapest.items())
    few = f", of the {len(there)} that reach it with every seed" if len(there) < len(costs) else ""
    return [f"To {name} for least{few}, on the average: {parts}."]


def _listed(labels: Sequence[str]) -> str:
    more = len(labels) - NAMED
    return _and([*labels[:NAMED], *([f"{more} more"] if more > 0 else [])])


def _and(texts: Sequence[str]) -> str:
    return " and ".join([*([", ".join(texts[:-1])] if len(texts) > 1 else []), texts[-1]])
