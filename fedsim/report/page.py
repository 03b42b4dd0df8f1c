"""A run as one page that needs nothing else: `report.html`, made from what the run folder holds."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from devices.errors import FileError
from devices.reading import read_text
from devices.texts import visible, visible_lines
from devices.units import energy, simulated, size
from devices.writing import write_atomic
from fedsim.messages.cohort import OUTCOMES
from fedsim.report import strict_json
from fedsim.report.checksums import check_inside, sha256_of_file
from fedsim.report.files import (
    Rows,
    check_run,
    config_text,
    read_columns,
    read_config,
    read_failure,
    read_pictures,
    read_summary,
    select_rows,
)
from fedsim.report.page_template import HTML
from fedsim.report.place import PAGE, SUMMARY
from fedsim.report.plots.split import draw_split
from fedsim.report.rounds import RoundReport, read_rounds
from fedsim.report.split import primary_of, read_split
from fedsim.report.text import late_note
from fedsim.workloads.describe import Split
from fedsim.workloads.metrics import Metric, took_part

CELL_LETTERS = 100  # of a text in a table
SLOWEST = 8  # clients in the table of stragglers
OF_AN_EXCHANGE = (
    "Seconds and joules are of a completed exchange: a client that is asked to train, or to judge a model. Tail J is "
    "what its radio takes while it stays awake after a transfer; it is part of mean J."
)
JOULES = ("down", "compute", "up", "tail")  # the parts of a client's joules; runs of fedsim 0.1 have their sum alone
WHO_CLOSED = (
    "The clients that were most often the last of a round whose reply was taken: without a deadline, it took as long "
    "as they did."
)


@dataclass(frozen=True)
class Table:
    """Rows of texts under a header; the first column stands to the left."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Part:
    """A section of the page.

    Attributes:
        pictures: addresses that hold the pictures themselves.
        note: what to know when reading it.
    """

    title: str
    pictures: Sequence[str] = ()
    table: Table | None = None
    note: str = ""


def write_page(folder: Path) -> Path:
    """Writes the page of a run, finished or not, into its folder.

    Args:
        folder: of the run.

    Raises:
        ConfigError, FileError: if the folder holds no run, or one that cannot be read.
    """
    import jinja2

    check_run(folder)
    rounds, config, summary = read_rounds(folder), config_text(folder), read_summary(folder)
    split = read_split(folder)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["short"] = partial(visible, most=CELL_LETTERS)
    html = environment.from_string(HTML).render(
        title=_title(read_config(folder).get("choices", {}), summary),
        of=_mark_of(folder),
        folder=str(folder),
        figures=[*(_figures(summary) if summary else []), _never_took_part(rounds, summary, split)],
        warnings=summary.get("warnings", []),
        prices=summary.get("prices"),
        failure=read_failure(folder),
        parts=_parts(folder, rounds, read_columns(folder), summary, split),
        config=config,
        summary=strict_json.dumps(summary, indent=1) if summary else "",
    )
    write_atomic(folder / PAGE, visible_lines(html))
    return folder / PAGE


def has_page(folder: Path) -> bool:
    """Returns whether a finished run has its page, made after its summary."""
    try:
        return _mark_of(folder) in read_text(check_inside(folder, folder / PAGE))
    except FileError:
        return False


def _mark_of(folder: Path) -> str:
    """Says which summary a page is of."""
    path = folder / SUMMARY
    return f"of summary {sha256_of_file(path)}" if path.exists() else "of a run that is not finished"


def _title(choices: dict[str, Any], summary: dict[str, Any]) -> str:
    method = summary.get("method") or choices.get("method") or choices.get("strategy")
    return f"{method} on {choices.get('workload')}, fleet {summary.get('fleet') or choices.get('fleet')}"


def _figures(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Returns what one wants to know first: name, figure, what it is of."""
    outcomes, joules = summary["outcomes"], summary["energy_j"]
    primary = Metric.named_in(summary)
    final, best = (_value(primary, summary[key][primary.name]) for key in ("final", "best"))
    traffic = summary["down_bytes"] + summary["up_bytes"]
    asked = sum(outcomes.values())
    found = [
        (primary.title, final, f"best {best} in round {summary['best']['round']}"),
        ("simulated time", simulated(summary["simulated_s"]), f"{summary['rounds']} rounds"),
        ("energy", energy(joules["total"]), f"busiest client {energy(joules['max_client'])}"),
        ("waiting", energy(joules["waiting"]), "for rounds to close, beside that energy"),
        ("traffic", size(traffic), f"down {size(summary['down_bytes'])}, up {size(summary['up_bytes'])}"),
        ("peak memory", size(summary["peak_memory_bytes"]), "of the busiest device"),
        ("completed", f"{outcomes['completed']} of {asked}", "clients that were asked to train"),
    ]
    if summary["storage_bytes"]:
        found.append(("storage", size(summary["storage_bytes"]), "kept on a device between rounds, at most"))
    if target := summary["to_target"]:
        spent = f"{simulated(target['simulated_s'])}, {energy(target['energy_j'])}"
        found.append((f"to {_value(primary, target[primary.name])}", f"round {target['round']}", spent))
    return found


def _never_took_part(rounds: list[RoundReport], summary: dict[str, Any], split: Split | None) -> tuple[str, str, str]:
    """Counts the clients that took part in no round; where nobody says how many there are, those that did."""
    count = len(took_part(rounds))
    population = summary.get("clients", {}).get("population") or (split.num_clients if split else None)
    so_far = "" if summary else ", so far"
    if population is None:
        return "took part", str(count), f"clients that completed a round{so_far}"
    return "never took part", f"{population - count} of {population}", f"clients that completed no round{so_far}"


def _value(primary: Metric, value: float | None) -> str:
    return "not judged" if value is None else primary.with_unit(value)


def _parts(
    folder: Path,
    rounds: list[RoundReport],
    rows: Rows,
    summary: dict[str, Any],
    split: Split | None,
) -> list[Part]:
    from fedsim.report.plots.run import as_svg, curves, outcomes, time_by_device

    parts, primary = [], primary_of(folder)
    if (picture := curves(rounds, primary)) is not None:
        parts.append(Part(f"What {primary.title} took", [as_svg(picture)]))
    own = [_png(picture) for picture in read_pictures(folder)]
    if own:
        parts.append(Part("Tasks", own))
    if rows and len(rows["client"]):
        picture = time_by_device(rows)
        shown = [as_svg(picture)] if picture else []
        parts.append(Part("Where the time of a device goes", shown, _devices(rows), OF_AN_EXCHANGE))
        if (stragglers := _stragglers(rows)) is not None:
            parts.append(Part("Stragglers", (), stragglers, WHO_CLOSED))
    if (picture := outcomes(rounds)) is not None:
        asked = "What became of the clients that were asked"
        parts.append(Part(asked, [as_svg(picture)], note=late_note(read_config(folder))))
    if summary.get("compression"):
        parts.append(Part("What each kind of device runs", (), _deployed(summary["compression"])))
    if split is not None:
        parts.append(Part("How the data are split", [as_svg(draw_split(split))]))
    return parts


def _png(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _devices(rows: Rows) -> Table:
    """Returns a line per device: who was asked, what became of them, and what a completed exchange took."""
    seen = [outcome for outcome in OUTCOMES if (rows["outcome"] == outcome).any()]
    parts = [part for part in JOULES if f"{part}_joules" in rows]
    header = ["device", "clients", "asked", *(o.replace("_", " ") for o in seen), "median s", "95 % s", "mean J"]
    header += [f"{part} J" for part in parts]
    lines = []
    for device in np.unique(rows["device"]):
        group = select_rows(rows, rows["device"] == device)
        done = select_rows(group, group["outcome"] == "completed")
        counts = [str(np.sum(group["outcome"] == outcome)) for outcome in seen]
        took = [_short(np.quantile(done["total_s"], q)) if len(done["total_s"]) else "" for q in (0.5, 0.95)]
        took += [_mean(done["joules"]), *(_mean(done[f"{part}_joules"]) for part in parts)]
        peak, kept = size(group["peak_memory_bytes"].max()), size(group["storage_bytes"].max())
        clients = str(len(np.unique(group["client"])))
        lines.append([str(device), clients, str(len(group["client"])), *counts, *took, peak, kept])
    return Table([*header, "peak memory", "storage"], lines)


def _stragglers(rows: Rows) -> Table | None:
    """Returns the clients that closed most rounds; None where no client did."""
    done = select_rows(rows, (rows["phase"] == "train") & (rows["outcome"] == "completed"))
    if not len(done["client"]):
        return None
    done = select_rows(done, np.lexsort((done["client"], done["total_s"], done["round"])))
    last = np.append(done["round"][1:] != done["round"][:-1], True)
    clients, closed = np.unique(done["client"][last], return_counts=True)
    lines = []
    for number in np.argsort(-closed, kind="stable")[:SLOWEST]:
        own = select_rows(done, done["client"] == clients[number])
        means = [_mean(own[f"{phase}_s"]) for phase in ("down", "compute", "up", "total")]
        share = f"{closed[number]} of {last.sum()}"
        lines.append([f"client {clients[number]}", str(own["device"][0]), share, str(len(own["client"])), *means])
    return Table(["client", "device", "rounds closed", "completed", "down s", "compute s", "up s", "total s"], lines)


def _deployed(entries: Sequence[dict[str, Any]]) -> Table:
    names = list(dict.fromkeys(key for entry in entries for key in entry))
    return Table(
        [name.replace("_", " ") for name in names],
        [
            [_short(entry[n]) if isinstance(entry.get(n), float) else str(entry.get(n, "")) for n in names]
            for entry in entries
        ],
    )


def _mean(values: np.ndarray) -> str:
    """Returns the mean of the numbers that are there: some columns are not in the older files of a resumed run."""
    there = values[~np.isnan(values)]
    return _short(there.mean()) if len(there) else ""


def _short(value: Any) -> str:
    return "" if value != value else f"{value:.3g}"
