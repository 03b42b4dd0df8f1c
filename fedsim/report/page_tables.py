"""The tables of a run's page, from its client rows: devices, stragglers, who never took part, how clients fare."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from devices.texts import quoted
from devices.units import size
from fedsim.messages.cohort import OUTCOMES
from fedsim.report.files import Rows, select_rows
from fedsim.report.html import Table
from fedsim.workloads.describe import Split
from fedsim.workloads.metrics import ACCURACY, LOSS, MICROPHONES, Metric

SLOWEST, MOST_DEVICES, MOST_CLASSES = 8, 40, 20  # lines of tables
JOULES = ("down", "compute", "up", "tail")  # the parts of a client's joules; runs of fedsim 0.1 have their sum alone
CLASS_LOST = 0.25  # share of a class's examples that is worth a word
PHASES = {"train": "Training", "evaluate": "Judging"}  # exchanges: what is asked of a client


def devices_table(rows: Rows, phase: str) -> Table | None:
    """Returns a line per device: who was asked in this phase, what became of them, what a completed exchange took."""
    rows = select_rows(rows, rows["phase"] == phase)
    if not len(rows["client"]):
        return None
    seen = [outcome for outcome in OUTCOMES if (rows["outcome"] == outcome).any()]
    parts = [part for part in JOULES if f"{part}_joules" in rows]
    header = ["device", "clients", "asked", *(o.replace("_", " ") for o in seen), "median s", "95 % s", "mean J"]
    header += [f"{part} J" for part in parts]
    lines = []
    for device in np.unique(rows["device"]):
        group = select_rows(rows, rows["device"] == device)
        done = select_rows(group, group["outcome"] == "completed")
        counts = [str(np.sum(group["outcome"] == outcome)) for outcome in seen]
        took = [short(np.quantile(done["total_s"], q)) if len(done["total_s"]) else "" for q in (0.5, 0.95)]
        took += [_mean(done["joules"]), *(_mean(done[f"{part}_joules"]) for part in parts)]
        peak, kept = size(group["peak_memory_bytes"].max()), size(group["storage_bytes"].max())
        clients = str(len(np.unique(group["client"])))
        lines.append([str(device), clients, str(len(group["client"])), *counts, *took, peak, kept])
    return Table([*header, "peak memory", "storage"], lines, PHASES.get(phase, phase))


def closers(rows: Rows) -> Rows:
    """Returns the row of each round whose reply was the last that was taken."""
    done = select_rows(rows, (rows["phase"] == "train") & (rows["outcome"] == "completed"))
    came_s = done["start_s"] + done["total_s"]  # of one cohort all start at once, with a buffer each by itself
    done = select_rows(done, np.lexsort((done["client"], done["total_s"], came_s, done["round"])))
    return select_rows(done, np.append(done["round"][1:] != done["round"][:-1], True)[: len(done["round"])])


def stragglers(rows: Rows, caption: str = "Stragglers") -> Table | None:
    """Returns the clients that closed most rounds; None where no client did."""
    last = closers(rows)
    if not len(last["client"]):
        return None
    done = select_rows(rows, (rows["phase"] == "train") & (rows["outcome"] == "completed"))
    clients, closed = np.unique(last["client"], return_counts=True)
    lines = []
    for number in np.argsort(-closed, kind="stable")[:SLOWEST]:
        own = select_rows(done, done["client"] == clients[number])
        means = [_mean(own[f"{phase}_s"]) for phase in ("down", "compute", "up", "total")]
        share = f"{closed[number]} of {len(last['client'])}"
        lines.append([f"client {clients[number]}", str(own["device"][0]), share, str(len(own["client"])), *means])
    header = ["client", "device", "rounds closed", "completed", "down s", "compute s", "up s", "total s"]
    return Table(header, lines, caption)


# --- who never took part ---------------------------------------------------------------------------------------------


def never_took_part(rows: Rows, took_part: set[int], population: int, split: Split | None) -> tuple[Table, str] | None:
    """Returns a line per device of the clients that completed no round, and what their absence loses.

    Args:
        rows: of all clients that were asked.
        took_part: clients that completed a round.
        population: how many clients there are.
        split: of the data, where it is known.

    Returns:
        None where all took part.
    """
    never = [client for client in range(population) if client not in took_part]
    if not never:
        return None
    sizes = split.sizes if split and len(split.sizes) == population == split.num_clients else ()
    asked = select_rows(rows, rows["phase"] == "train") if rows else rows
    groups: dict[str, list[int]] = {}
    device_of = dict(zip(asked["client"].tolist(), asked["device"].tolist(), strict=True)) if asked else {}
    for client in never:
        groups.setdefault(str(device_of.get(client, "never asked")), []).append(client)
    lines = [_absent(name, clients, asked, sizes) for name, clients in sorted(groups.items())[:MOST_DEVICES]]
    header = ["device", "clients", "times asked", "what became of them"]
    return Table([*header, *(["training examples", "share"] if sizes else [])], lines), _lost(never, split, sizes)


def _absent(name: str, clients: Sequence[int], asked: Rows, sizes: Sequence[int]) -> list[str]:
    own = asked["outcome"][np.isin(asked["client"], clients)] if asked else np.array([])
    became = [f"{np.sum(own == o)} {o.replace('_', ' ')}" for o in OUTCOMES if (own == o).any()]
    line = [name, str(len(clients)), str(len(own)), ", ".join(became)]
    if sizes:
        lost = sum(sizes[client] for client in clients)
        line += [str(lost), f"{100 * lost / max(sum(sizes), 1):.1f} %"]
    return line


def _lost(never: Sequence[int], split: Split | None, sizes: Sequence[int]) -> str:
    """Returns a sentence on what the training lost with these clients."""
    names = ", ".join(map(str, never[:20])) + (f" and {len(never) - 20} more" if len(never) > 20 else "")
    text = f"Completed no round: {'clients' if len(never) > 1 else 'client'} {names}."
    if not sizes or split is None:
        return text
    lost = 100 * sum(sizes[client] for client in never) / max(sum(sizes), 1)
    text += f" {lost:.1f} % of the training examples are theirs, and no model has learned from them."
    if len(split.rows) == len(sizes) and split.rows[0].label_counts:
        counts = np.array([row.label_counts for row in split.rows])
        shares = counts[list(never)].sum(0) / np.maximum(counts.sum(0), 1)
        worst = [i for i in np.argsort(-shares, kind="stable")[:3] if shares[i] >= CLASS_LOST]
        if worst:
            classes = ", ".join(f"{quoted(split.class_names[i])} {100 * shares[i]:.0f} %" for i in worst)
            text += f" Share of the examples of a class that is lost so: {classes}."
    return text


# --- how clients fare ------------------------------------------------------------------------------------------------


def fairness_table(scores: dict[int, tuple[str, float]], primary: Metric) -> Table:
    """Returns a line for all clients and one per device: the scores of their own judgements, from worst to best.

    Args:
        scores: device and last score of each client that judged.
        primary: what the scores are values of.
    """
    groups: dict[str, list[float]] = {"all": [score for _, score in scores.values()]}
    for device, score in sorted(scores.values()):
        groups.setdefault(device, []).append(score)
    lines = []
    for name, values in groups.items():
        ranked = sorted(values, key=primary.gain)
        tenth = ranked[: math.ceil(len(ranked) / 10)]
        figures = (ranked[0], float(np.mean(tenth)), float(np.median(ranked)), float(np.mean(ranked)), ranked[-1])
        lines.append([name, str(len(ranked)), *map(primary.with_unit, figures)])
    return Table(["device", "clients", "worst", "worst tenth", "median", "mean", "best"], lines)


def busy_table(busy: Mapping[str, float], staleness: Mapping[str, float | None]) -> Table:
    """Returns a line for all clients and one per device.

    Args:
        busy: the share of the time in which a client was at work.
        staleness: the mean of the replies that were used.
    """
    rows = [[name, f"{100 * share:.1f} %", short(staleness.get(name))] for name, share in busy.items()]
    return Table(["device", "at work", "staleness of its replies"], rows)


def classes_table(classes: Sequence[dict[str, Any]]) -> Table:
    """Returns a line per class, the worst first; of many classes the worst."""
    ranked = sorted(classes, key=lambda entry: (entry["f1"] is not None, entry["f1"] or 0.0))
    rows = [
        [entry["name"], str(entry["examples"]), *(_share(entry[key]) for key in ("accuracy", "f1"))]
        for entry in ranked[:MOST_CLASSES]
    ]
    caption = f"The {MOST_CLASSES} worst of {len(classes)} classes" if len(classes) > MOST_CLASSES else ""
    return Table(["class", "examples", "accuracy", "F1"], rows, caption)


def _share(value: float | None) -> str:
    return "" if value is None or value != value else ACCURACY.with_unit(value)


def deployed_table(entries: Sequence[dict[str, Any]]) -> Table:
    """Returns what each kind of device runs."""
    names = [key for key in dict.fromkeys(key for entry in entries for key in entry) if key != MICROPHONES]
    rows = [
        [short(entry[n]) if isinstance(entry.get(n), float) else str(entry.get(n, "")) for n in names]
        for entry in entries
    ]
    return Table([name.replace("_", " ") for name in names], rows)


def networks_table(given: Mapping[str, Mapping[str, int]]) -> Table:
    """Returns a line per device: how many of its clients train which network."""
    names = sorted({network for own in given.values() for network in own})
    lines = [[device, *(str(own.get(name, "")) for name in names)] for device, own in given.items()]
    return Table(["device", *names], lines)


def microphones_table(heard: dict[str, Any], deployed: Sequence[dict[str, Any]]) -> Table:
    """Returns a line per kind of microphone, those that no client has behind the others.

    Args:
        heard: accuracy and loss of the last model on each kind, and the share of the clients that have it.
        deployed: what devices run of that model, with the same figures where there are any.
    """
    runs = [entry[MICROPHONES] for entry in deployed if MICROPHONES in entry]
    header, lines = ["microphone", "clients", "accuracy", "loss"], []
    for number in range(len(runs)):
        name = "compressed" if len(runs) == 1 else f"compressed {number + 1}"
        header += [f"{name}: accuracy", "loss"]
    for kind, figures in {**heard["seen"], **heard["unseen"]}.items():
        clients = "none: unseen" if kind in heard["unseen"] else _share(figures.get("share"))
        found = [figures, *(run.get(kind, {}) for run in runs)]
        shown = [text for one in found for text in (_share(one.get(ACCURACY.name)), short(one.get(LOSS)))]
        lines.append([kind, clients, *shown])
    return Table(header, lines)


def _mean(values: np.ndarray) -> str:
    """Returns the mean of the numbers that are there: some columns are not in the older files of a resumed run."""
    there = values[~np.isnan(values)]
    return short(there.mean()) if len(there) else ""


def short(value: Any) -> str:
    """Returns a number in three digits; empty where there is none."""
    return "" if value is None or value != value else f"{value:.3g}"
