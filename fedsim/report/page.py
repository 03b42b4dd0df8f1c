"""A run as one page that needs nothing else: `report.html`, made from what the run folder holds."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from devices.errors import FileError
from devices.reading import read_text
from devices.texts import NAME_LETTERS, visible
from devices.units import energy, simulated, size
from devices.writing import write_atomic
from fedsim.report import strict_json
from fedsim.report.checksums import check_inside, sha256_of_file
from fedsim.report.files import (
    Rows,
    check_run,
    config_text,
    read_columns,
    read_config,
    read_failure,
    read_last_scores,
    read_pictures,
    read_summary,
    row_files,
    select_rows,
)
from fedsim.report.html import Page, Part
from fedsim.report.page_tables import (
    PHASES,
    busy_table,
    classes_table,
    closers,
    deployed_table,
    devices_table,
    fairness_table,
    microphones_table,
    networks_table,
    never_took_part,
    stragglers,
)
from fedsim.report.place import CLIENTS, CONFIG, CONFUSION, PAGE, ROUNDS, SPLIT, SUMMARY
from fedsim.report.plots.on_page import (
    attack_curve,
    confusion_map,
    figure_curves,
    histogram,
    loss_curve,
    outcomes,
    reliability,
    score_curve,
    split_labels,
    split_sizes,
    task_curves,
    task_map,
    time_by_device,
)
from fedsim.report.repeat import commands
from fedsim.report.rounds import RoundReport, read_rounds, running_costs
from fedsim.report.split import primary_of, read_split
from fedsim.report.text import aim, asynchrony_lines, attackers, late_note, what_ran
from fedsim.workloads.by_class import CALIBRATION, CLASSES, ECE, MACRO_F1
from fedsim.workloads.by_class import CONFUSION as CONFUSED
from fedsim.workloads.describe import Split
from fedsim.workloads.metrics import (
    ACCURACY,
    ASYNCHRONY,
    ATTACK_SUCCESS,
    MEAN_STALENESS,
    MICROPHONES,
    NETWORKS,
    STALENESS,
    Metric,
    judged,
    stops_at,
    took_part,
)
from fedsim.workloads.metrics import CLIENTS as OF_CLIENTS

OF_AN_EXCHANGE = (
    "Seconds and joules are of a completed exchange: a client that is asked to train, or to judge a model. Tail J is "
    "what its radio takes while it stays awake after a transfer; it is part of mean J."
)
WHO_CLOSED = "Stragglers are the clients that were most often the last of a round whose reply was taken"
WHO_FILLED = (
    "Listed are the clients whose replies most often filled the buffer, which ends a round: nobody is waited for, "
    "and a round lasts until enough replies have come"
)
OF_FAIRNESS = (
    "The last score of each client that judged a model, its own where the method has one, on its own held-out "
    "examples; worst tenth is the mean of the lowest tenth of the clients."
)
OF_ATTACKS = (
    "The share of test examples that the global model tells as the attacker's target: those of other classes with the "
    "patch on them, or those of the flipped class."
)
OF_NETWORKS = "Clients that have taken part, by the network that they last trained."
OF_MICROPHONES = (
    "The last model that was judged, on the test set as each kind of microphone hears it. They are simulated: drawn, "
    "not measured."
)
LOST = {"late": "were late", "offline": "were offline", "out_of_memory": "lacked the memory", "failed": "failed"}
WORTH_A_WORD = 0.01  # of those asked
FILES = {
    CONFIG: "all settings",
    SUMMARY: "the figures above",
    ROUNDS: "a line per round",
    SPLIT: "how the data are split",
    CONFUSION: "how often each class was taken for each",
}
SHOWN = (CLASSES, CONFUSED, CALIBRATION)  # of the summary, as pictures and tables
VERSIONS = ("fedsim", "commit", "python", "torch", "flwr", "numpy")


def write_page(folder: Path) -> Path:
    """Writes the page of a run, finished or not, into its folder.

    Args:
        folder: of the run.

    Raises:
        ConfigError, FileError: if the folder holds no run, or one that cannot be read.
    """
    check_run(folder)
    write_atomic(folder / PAGE, page_of(Told(folder)).as_html())
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


@dataclass(frozen=True)
class Told:
    """What a run folder tells, each part read when it is asked for and once."""

    folder: Path

    @cached_property
    def rounds(self) -> list[RoundReport]:
        """Returns the reports of its rounds."""
        return read_rounds(self.folder)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Returns its settings."""
        return read_config(self.folder)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Returns its summary; empty while it is not finished."""
        return read_summary(self.folder)

    @property
    def is_buffered(self) -> bool:
        """Returns whether clients came in their own time, and no round waited for a cohort."""
        return self.settings.get("choices", {}).get("loop", "rounds") != "rounds" or ASYNCHRONY in self.summary

    @cached_property
    def primary(self) -> Metric:
        """Returns the metric that its models are judged by."""
        return primary_of(self.folder)

    @cached_property
    def split(self) -> Split | None:
        """Returns how its data are split."""
        return read_split(self.folder)

    @cached_property
    def rows(self) -> Rows:
        """Returns its client rows; empty where there are none."""
        rows = read_columns(self.folder)
        return rows if rows and len(rows["client"]) else {}

    @cached_property
    def took_part(self) -> set[int]:
        """Returns the clients that completed a round."""
        return took_part(self.rounds)

    @cached_property
    def population(self) -> int | None:
        """Returns how many clients there are, where anything says so."""
        said = self.summary.get("clients", {}).get("population")
        return said or (self.split.num_clients if self.split else None)


def page_of(told: Told) -> Page:
    """Returns the page of a run."""
    summary, failure = told.summary, read_failure(told.folder)
    prices = summary.get("prices")
    config = config_text(told.folder)
    return Page(
        title=_title(told),
        mark=_mark_of(told.folder),
        where=str(told.folder),
        answer=answer(told),
        failure=f"{failure['error']}: {failure['reason']}" if failure else "",
        warnings=summary.get("warnings", []),
        prices=(prices["line"], prices["calls_share"] > 0.5) if prices else None,
        figures=[*(_figures(told) if summary else []), _absent(told)],
        parts=list(_parts(told)),
        commands=commands(told.folder, told.settings, summary),
        files=_files(told.folder),
        details=[
            (CONFIG, config),
            *([(SUMMARY, strict_json.dumps(_without(summary, SHOWN), indent=1))] if summary else []),
        ],
        made_by=", ".join(f"{name} {v}" for name in VERSIONS if (v := summary.get("versions", {}).get(name))),
    )


def _without(summary: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if key not in names}


def _title(told: Told) -> str:
    return what_ran(told.summary, told.settings)


# --- the answer ------------------------------------------------------------------------------------------------------


def answer(told: Told) -> str:
    """Returns what came of a run in a sentence: the score, what it took, who was lost, and who closed rounds."""
    parts = [_reached(told), *_lost(told), *_waited_for(told), *_target(told)]
    return "; ".join(parts) + "."


def _reached(told: Told) -> str:
    rounds, primary = told.rounds, told.primary
    took = {key: values[-1] for key, values in running_costs(rounds).items()} if rounds else {}
    found = judged(rounds, primary)
    value = found[-1].metrics.get(primary.name) if found else None
    score = f"{primary.with_unit(value)} {primary.title}" if value is not None else f"No {primary.title} was measured"
    own = [r.metrics[OF_CLIENTS + primary.name] for r in rounds if OF_CLIENTS + primary.name in r.metrics]
    theirs = f" ({primary.with_unit(own[-1])} on the clients' own held-out examples)" if own else ""
    if not took:
        return "No round is finished"
    count = rounds[-1].round
    cost = f"{simulated(took['simulated_s'])} of simulated time, {energy(took['joules'])} and "
    text = f"{score}{theirs} after {count} round{'s' if count != 1 else ''}, {cost}{size(took['traffic_bytes'])}"
    return text if told.summary else f"Not finished: {text}"


def _lost(told: Told) -> list[str]:
    asked = sum(len(r.cohort) for r in told.rounds)
    counts = {o: sum(len(r.outcomes.get(o, ())) for r in told.rounds) for o in LOST}
    shares = [(counts[o] / asked, o) for o in LOST if asked and counts[o] / asked >= WORTH_A_WORD]
    ranked = sorted(shares, reverse=True)
    if not ranked:
        return []
    texts = [
        f"{100 * share:.0f} % {'of those asked ' if not n else ''}{LOST[o]}" for n, (share, o) in enumerate(ranked)
    ]
    return [", ".join(texts)]


def _waited_for(told: Told) -> list[str]:
    last = closers(told.rows) if told.rows else {}
    if not last or not len(last["device"]) or len(np.unique(told.rows["device"])) < 2:
        return []
    devices, closed = np.unique(last["device"], return_counts=True)
    most = int(np.argmax(closed))
    did = "filled the buffer in" if told.is_buffered else "closed"
    return [f"{visible(devices[most], NAME_LETTERS)} {did} {closed[most]} of {len(last['device'])} rounds"]


def _target(told: Told) -> list[str]:
    primary, found = told.primary, told.summary.get("to_target")
    if found:
        spent = f"{simulated(found['simulated_s'])} and {energy(found['energy_j'])}"
        return [f"{primary.with_unit(found[primary.name])} was reached in round {found['round']}, after {spent}"]
    asked = stops_at(told.settings)
    if told.summary and asked is not None:
        return [f"{primary.with_unit(asked)} was not reached"]
    return []


# --- the cards -------------------------------------------------------------------------------------------------------


def _figures(told: Told) -> list[tuple[str, str, str]]:
    """Returns what one wants to know first: name, figure, what it is of."""
    summary, primary = told.summary, told.primary
    spent, joules = summary["outcomes"], summary["energy_j"]
    final, best = (_value(primary, summary[key][primary.name]) for key in ("final", "best"))
    traffic = summary["down_bytes"] + summary["up_bytes"]
    found = [
        (primary.title, final, f"best {best} in round {summary['best']['round']}"),
        ("simulated time", simulated(summary["simulated_s"]), f"{summary['rounds']} rounds"),
        ("energy", energy(joules["total"]), f"busiest client {energy(joules['max_client'])}"),
        ("waiting", energy(joules["waiting"]), "for rounds to close, beside that energy"),
        ("traffic", size(traffic), f"down {size(summary['down_bytes'])}, up {size(summary['up_bytes'])}"),
        ("peak memory", size(summary["peak_memory_bytes"]), "of the busiest device"),
        ("completed", f"{spent['completed']} of {sum(spent.values())}", "clients that were asked to train"),
    ]
    if spent_privacy := summary.get("privacy"):
        at = f"at delta {spent_privacy['delta']:.2g}, for a client in every round"
        found.append(("epsilon", f"{spent_privacy['epsilon']:.3g}", at))
    who = summary.get("attack")
    if (success := summary["final"].get(ATTACK_SUCCESS)) is not None:
        what = "; ".join([aim(summary), *([attackers(summary)] if who else [])])
        found.append(("attack success", ACCURACY.with_unit(success), what))
    elif who:
        found.append(("attack", who["name"], attackers(summary)))
    if (masks := summary.get("masking")) is not None:
        beside = f"beside {size(masks['masked_bytes'])} of masked numbers, for each client and round"
        found.append(("keys and shares", size(masks["up_bytes"] + masks["down_bytes"]), beside))
    if mean := summary.get(ASYNCHRONY, {}).get(MEAN_STALENESS):
        found.append(("staleness", f"{mean:.2g}", "changes of the weights since a client got them, on average"))
    if summary["storage_bytes"]:
        found.append(("storage", size(summary["storage_bytes"]), "kept on a device between rounds, at most"))
    if target := summary["to_target"]:
        took = f"{simulated(target['simulated_s'])}, {energy(target['energy_j'])}"
        found.append((f"to {_value(primary, target[primary.name])}", f"round {target['round']}", took))
    return found


def _absent(told: Told) -> tuple[str, str, str]:
    """Counts the clients that took part in no round; where nobody says how many there are, those that did."""
    count, population = len(told.took_part), told.population
    so_far = "" if told.summary else ", so far"
    if population is None:
        return "took part", str(count), f"clients that completed a round{so_far}"
    return "never took part", f"{population - count} of {population}", f"clients that completed no round{so_far}"


def _value(primary: Metric, value: float | None) -> str:
    return "not judged" if value is None else primary.with_unit(value)


# --- the sections ----------------------------------------------------------------------------------------------------


def _parts(told: Told) -> Iterator[Part]:
    drawn = [each for each in (score_curve(told.rounds, told.primary), loss_curve(told.rounds)) if each is not None]
    if drawn:
        yield Part(f"What {told.primary.title} took", drawn)
    if (tasks := task_curves(told.rounds)) is not None:
        matrix = told.summary.get("continual", {}).get("accuracy_matrix")
        yield Part("Tasks", [tasks, *([task_map(matrix)] if matrix else [])])
    elif own := read_pictures(told.folder):
        yield Part("Pictures", [_png(picture) for picture in own])
    if (attacked := attack_curve(told.rounds)) is not None:
        yield Part("How far the attack came", [attacked], (), OF_ATTACKS)
    if figures := figure_curves(told.rounds):
        yield Part("What else is known of the rounds", figures)
    yield from _by_class(told.summary)
    if heard := told.summary.get(MICROPHONES):
        table = microphones_table(heard, told.summary.get("compression", ()))
        yield Part("Microphones", (), [table], OF_MICROPHONES)
    yield from _fairness(told)
    if (became := outcomes(told.rounds)) is not None:
        waits = not told.is_buffered
        slowest = stragglers(told.rows, "Stragglers" if waits else "Last of a buffer") if told.rows else None
        bounded = not waits or told.settings.get("deadline_s") is not None
        waited = f"{WHO_CLOSED if waits else WHO_FILLED}{'.' if bounded else ': it took as long as they did.'}"
        note = " ".join(filter(None, [late_note(told.settings), waited if slowest else ""]))
        title = f"Who was asked to train, and who {'was waited for' if waits else 'filled the buffer'}"
        yield Part(title, [became], [slowest] if slowest else [], note)
    if told.population is not None:
        absent = never_took_part(told.rows, told.took_part, told.population, told.split)
        if absent is not None:
            yield Part("Who never took part", (), [absent[0]], absent[1])
    if found := told.summary.get(ASYNCHRONY):
        yield _asynchrony(found)
    if told.rows:
        yield _devices(told.rows)
    if given := told.summary.get(NETWORKS):
        yield Part("Which network each kind of device trains", (), [networks_table(given)], OF_NETWORKS)
    if deployed := told.summary.get("compression"):
        yield Part("What each kind of device runs", (), [deployed_table(deployed)])
    if told.split is not None:
        labelled = bool(told.split.rows[0].label_counts)
        drawn = [*([split_labels(told.split)] if labelled else []), split_sizes(told.split)]
        yield Part("How the data are split", drawn)


def _asynchrony(found: Mapping[str, Any]) -> Part:
    ages = {int(age): count for age, count in found[STALENESS].items()}
    idle = f"No client was at work for {simulated(found['server_idle_s'])}." if found["server_idle_s"] >= 1 else ""
    drawn = []
    if ages:
        step = max(1, -(-(max(ages) + 1) // 25))
        bins = [edge - 0.5 for edge in range(0, max(ages) + step + 1, step)]
        drawn.append(histogram(list(ages), "Replies by their staleness", "changes of the weights since", bins, ages))
    said, *end = (f"{line[0].upper()}{line[1:]}." for line in asynchrony_lines(found))
    table = busy_table(found["busy"], {"all": found.get(MEAN_STALENESS), **found.get("device_staleness", {})})
    return Part("Who was at work", drawn, [table], " ".join([said, *([idle] if idle else []), *end]))


def _devices(rows: Rows) -> Part:
    phases = [phase for phase in PHASES if (rows["phase"] == phase).any()]
    drawn = [time_by_device(select_rows(rows, rows["phase"] == phase), PHASES[phase]) for phase in phases]
    tables = [devices_table(rows, phase) for phase in phases]
    return Part(
        "Where the time of a device goes",
        [picture for picture in drawn if picture is not None],
        [table for table in tables if table is not None],
        OF_AN_EXCHANGE,
    )


def _by_class(summary: dict[str, Any]) -> Iterator[Part]:
    classes, drawn = summary.get(CLASSES), []
    if classes and summary.get(CONFUSED):
        drawn.append(confusion_map(summary[CONFUSED], [entry["name"] for entry in classes]))
    if bins := [(b["confidence"], b["accuracy"]) for b in summary.get(CALIBRATION, ()) if b["predictions"]]:
        drawn.append(reliability(bins))
    final = summary.get("final", {})
    said = [f"macro F1 {ACCURACY.with_unit(final[MACRO_F1])}"] if MACRO_F1 in final else []
    said += [f"calibration error {ACCURACY.with_unit(final[ECE])}"] if ECE in final else []
    if classes or drawn:
        note = f"On the test set, with the last model that was judged: {', '.join(said)}." if said else ""
        if (heard := summary.get(MICROPHONES)) and (kinds := len(heard.get("seen", ()))) > 1:
            note += f" Tables and pictures have the test set {kinds} times, once by each kind of microphone, alike."
        yield Part("Class by class", drawn, [classes_table(classes)] if classes else [], note)


def _fairness(told: Told) -> Iterator[Part]:
    scores = read_last_scores(told.folder, told.primary.name)
    if len(scores) < 2:
        return
    values = [told.primary.scale * score for _, score in scores.values()]
    bins = np.linspace(0, 100, 11) if told.primary.unit == "%" else np.histogram_bin_edges(values, 10)
    drawn = histogram(values, f"Clients by their {told.primary.title}", told.primary.label, bins.tolist())
    yield Part("How clients fare", [drawn], [fairness_table(scores, told.primary)], OF_FAIRNESS)


def _png(data: bytes) -> Markup:
    address = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return Markup('<img src="{}" alt="drawn by the workload">').format(address)


def _files(folder: Path) -> list[tuple[str, str]]:
    found = [(name, what) for name, what in FILES.items() if (folder / name).exists()]
    rows = row_files(folder)
    shown = [*rows[:2], *rows[-1:]] if len(rows) > 3 else rows
    return [*found, *((f"{CLIENTS}/{path.name}", "a row per client and exchange") for path in shown)]
