"""Tables and closing lines of a run for the terminal, with figures in the units that read best."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from devices.units import energy, simulated, size
from fedsim.report.files import read_config
from fedsim.report.place import CONFIG
from fedsim.report.rounds import RoundReport
from fedsim.report.terminal import table
from fedsim.settings.catalogue import WorkloadRow
from fedsim.workloads.describe import ClientRow
from fedsim.workloads.metrics import (
    ACCURACY,
    ASYNCHRONY,
    ATTACK_SUCCESS,
    CLIENTS,
    MEAN_STALENESS,
    NETWORKS,
    STALENESS,
    Metric,
    judged,
    stops_at,
)

TABLE_ROWS = 10
NO_VALUE = "not finite"
MOST_NETWORKS = 3  # that are named
ASIDE = {"participants": "uniform", "uplink": "none", "attack": "none"}  # groups worth a word, but for these options
BY_CLASS = "examples of each class"


def closing_table(reports: Sequence[RoundReport], primary: Metric = ACCURACY) -> Table:
    """Lists up to ten evaluated rounds, evenly spread and always the last; time, energy and bytes since the start.

    Where clients judged models of their own, the mean of these is beside the figure of the global one.
    """
    name, of_clients = primary.name, CLIENTS + primary.name
    own = any(of_clients in report.metrics for report in reports)
    scores = (primary.heading, "clients' own") if own else (primary.heading,)
    shown = table("round", *scores, "time", "energy", "down", "up", "done", "lost")
    joules, down, up, done, lost = 0.0, 0, 0, 0, 0
    rows = []
    for report in reports:
        completed = len(report.outcomes.get("completed", ()))
        joules, down, up = joules + report.joules, down + report.down_bytes, up + report.up_bytes
        done, lost = done + completed, lost + len(report.cohort) - completed
        if judged([report], primary):
            score = primary.number(report.metrics[name]) if name in report.metrics else NO_VALUE
            costs = [simulated(report.now_s), energy(joules), size(down), size(up)]
            clients = report.metrics.get(of_clients)
            theirs = ["" if clients is None else primary.number(clients)] if own else []
            rows.append([str(report.round), score, *theirs, *costs, str(done), str(lost)])
    step = max(1, -(-len(rows) // TABLE_ROWS))
    for row in rows[::-1][::step][::-1]:
        shown.add_row(*row)
    return shown


def final_score(summary: dict[str, Any]) -> str:
    """Returns the primary metric of the last evaluation, or why there is none."""
    primary = Metric.named_in(summary)
    value = summary["final"][primary.name]
    if value is None:
        return NO_VALUE if summary.get("not_finite_rounds") else "not evaluated"
    return primary.with_unit(value)


def closing_lines(summary: dict[str, Any], folder: Path, reports: Sequence[RoundReport] = ()) -> list[str]:
    """Lists results, outcomes, who was never met, how far prices are known, the way to the target, and the folder."""
    primary = Metric.named_in(summary)
    name = primary.title
    judged_own = [r.metrics[CLIENTS + primary.name] for r in reports if CLIENTS + primary.name in r.metrics]
    traffic = summary["down_bytes"] + summary["up_bytes"]
    counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in summary["outcomes"].items() if count)
    clients, settings = summary["clients"], read_config(folder) if (folder / CONFIG).exists() else {}
    lines = [
        f"{what_ran(summary, settings)}: "
        f"test {name} {final_score(summary)} after {summary['rounds']} round{'' if summary['rounds'] == 1 else 's'}",
        *(
            f"clients' own models: {name} {primary.with_unit(value)} on their own held-out examples"
            for value in judged_own[-1:]
        ),
        *([privacy_line(summary["privacy"])] if "privacy" in summary else []),
        *attack_lines(summary),
        *masking_lines(summary),
        f"cost: {simulated(summary['simulated_s'])} of simulated time, {energy(summary['energy_j']['total'])}, "
        f"{size(traffic)} of traffic, peak memory {size(summary['peak_memory_bytes'])}",
        f"clients: {counts}; the busiest spent {energy(summary['energy_j']['max_client'])}",
        *([late] if summary["outcomes"].get("late") and (late := late_note(settings)) else []),
        f"clients that never took part: {clients['never']} of {clients['population']}",
        *([networks_line(summary[NETWORKS])] if NETWORKS in summary else []),
        *(asynchrony_lines(summary[ASYNCHRONY]) if ASYNCHRONY in summary else []),
        *(f"warning: {text}" for text in summary["warnings"]),
        *([repriced_line(summary)] if summary.get("repriced") else []),
        *([f"times: {summary['prices']['line']}"] if "prices" in summary else []),
    ]
    target = summary["to_target"]
    wanted = target[primary.name] if target else stops_at(settings)
    shown = "" if wanted is None else f"{name} {primary.scale * wanted:g} {primary.unit}".rstrip()
    if target:
        lines.append(
            f"{shown} reached in round {target['round']}: {simulated(target['simulated_s'])}, "
            f"{energy(target['energy_j'])}, {size(target['down_bytes'] + target['up_bytes'])}"
        )
    elif shown:
        lines.append(f"{shown} not reached")
    return [*lines, f"run folder: {folder} ({summary['host_s']:.1f} s on this host)"]


def what_ran(summary: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Names what ran by method, data and fleet, and what else makes it another run than the usual one.

    Args:
        summary: of the run; empty while it is not finished.
        settings: of the run, as far as they are known.
    """
    choices = settings.get("choices", {})
    method = summary.get("method") or choices.get("method") or choices.get("strategy")
    workload, fleet = (summary.get(group) or choices.get(group) for group in ("workload", "fleet"))
    more = (f"{group} {choices[group]}" for group, usual in ASIDE.items() if choices.get(group, usual) != usual)
    return ", ".join([f"{method} on {workload}", f"fleet {fleet}", *more])


def attack_lines(summary: Mapping[str, Any]) -> list[str]:
    """Returns who attacked, and how far the attack came where that is no matter of the score."""
    success, who = summary["final"].get(ATTACK_SUCCESS), summary.get("attack")
    if who is None:
        return [] if success is None else [f"attack success: {ACCURACY.with_unit(success)}"]
    if success is None:
        return [f"attack: {attackers(summary)}"]
    return [f"attack success: {ACCURACY.with_unit(success)} {aim(summary)} ({attackers(summary)})"]


def aim(summary: Mapping[str, Any]) -> str:
    """Returns what an attack success is a share of, in words that follow it."""
    return str(summary.get("attack", {}).get("aim", "of what the attacker is after"))


def attackers(summary: Mapping[str, Any]) -> str:
    """Returns which attack was made by how many clients."""
    who = summary["attack"]
    population = summary.get("clients", {}).get("population")
    return f"{who['name']} by {who['malicious']}{'' if population is None else f' of {population}'} clients"


def masking_lines(summary: Mapping[str, Any]) -> list[str]:
    """Returns what a client sends and receives in a round for its update to be masked, where it is."""
    found = summary.get("masking")
    if found is None:
        return []
    beside = f"{size(found['up_bytes'])} of keys and shares up and {size(found['down_bytes'])} down"
    return [f"masks: a client sends {size(found['masked_bytes'])} of masked numbers a round, and beside them {beside}"]


def privacy_line(spent: Mapping[str, float]) -> str:
    """Returns what the weights tell of one client at most."""
    return f"privacy: epsilon {spent['epsilon']:.3g} at delta {spent['delta']:.2g}, for a client in every round"


def late_note(settings: Mapping[str, Any]) -> str:
    """Returns which clients count as late where more are asked than are needed; empty where they are not."""
    if settings.get("over_selection", 1) <= 1:
        return ""
    first = f"late: the reply came after the first {settings['cohort']} of a round (over_selection)"
    return first if settings["deadline_s"] is None else f"{first}, or after deadline_s"


def networks_line(given: Mapping[str, Mapping[str, int]]) -> str:
    """Returns which networks most clients train."""
    counts = sum((Counter(own) for own in given.values()), Counter[str]())
    most = [f"{network} for {count}" for network, count in counts.most_common(MOST_NETWORKS)]
    more = len(counts) - len(most)
    return f"networks of {counts.total()} clients: {'; '.join(most)}{f'; {more} more' if more else ''}"


def asynchrony_lines(found: Mapping[str, Any]) -> list[str]:
    """Returns how stale replies were and how busy clients, and whose work no round counts."""
    left = found["in_flight"]
    who = f"{left} clients were" if left > 1 else "1 client was"
    end = [f"at the end {who} at work: their energy and bytes are in no round"] if left else []
    return [_asynchrony_line(found), *end]


def _asynchrony_line(found: Mapping[str, Any]) -> str:
    oldest, unused = max(map(int, found[STALENESS]), default=0), found["unused"]
    stale = f"replies were {found.get(MEAN_STALENESS, 0.0):.1f} versions old on average, {oldest} at most"
    lost = f", {unused} too old or late to be used" if unused else ""
    busy = f"{found['at_work']:.1f} clients at work on average, {100 * found['busy']['all']:.0f} % of all"
    return f"{stale}{lost}; {busy}"


def repriced_line(summary: Mapping[str, Any]) -> str:
    """Returns which run was re-priced, and how far."""
    made = summary["repriced"]
    if not made["ended"]:
        return f"re-priced: all {made['rounds']} rounds of {made['run']}, priced anew"
    return (
        f"re-priced: the first {summary['rounds']} of {made['rounds']} rounds of {made['run']}; it ends {made['ended']}"
    )


def sweep_table(summaries: Sequence[tuple[list[str], dict[str, Any]]]) -> Table:
    """Lists the runs of a sweep, named by the overrides in which they differ."""
    common = set.intersection(*(set(overrides) for overrides, _ in summaries))
    titles = {Metric.named_in(s).title for _, s in summaries}
    score = titles.pop() if len(titles) == 1 else "score"
    shown = table("run", "overrides", score, "time", "energy", "down", "up", left=("overrides",))
    for number, (overrides, s) in enumerate(summaries):
        score = final_score(s)
        costs = [
            simulated(s["simulated_s"]),
            energy(s["energy_j"]["total"]),
            size(s["down_bytes"]),
            size(s["up_bytes"]),
        ]
        shown.add_row(str(number), " ".join(o for o in overrides if o not in common), score, *costs)
    return shown


def split_table(rows: Sequence[ClientRow], num_clients: int) -> Table:
    """Lists the first clients of a split: sizes and labels."""
    shown = table("client", "train", "held out", "classes", BY_CLASS, left=(BY_CLASS,))
    for row in rows:
        counts = " ".join(f"{label}:{count}" for label, count in enumerate(row.label_counts) if count)
        shown.add_row(str(row.client), str(row.train), str(row.test), str(row.classes), counts)
    if len(rows) < num_clients:
        shown.caption = f"the first {len(rows)} of {num_clients} clients"
    return shown


def workload_table(rows: Sequence[WorkloadRow]) -> Table:
    """Lists the workloads there are."""
    columns = ("workload", "kind", "here", "where, or how to get it")
    shown = table(*columns, left=columns)
    for row in rows:
        shown.add_row(row.name, row.kind, "yes" if row.found else "no", row.where)
    return shown
