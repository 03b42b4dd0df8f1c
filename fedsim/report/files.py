"""Reads what a run folder holds, whoever made it: settings, summary, note of a failure, client rows, pictures.

Every reader gives what the page and the comparisons need, or one sentence. Links that lead out of the folder are not
followed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from devices.errors import FileError
from devices.reading import parse_json, parse_yaml, read_bytes, read_json, read_parquet, read_text
from fedsim.errors import ConfigError
from fedsim.report.checksums import check_inside, check_signed
from fedsim.report.client_rows import client_schema
from fedsim.report.place import BY_ROUNDS, CLIENTS, CONFIG, FAILURE, PICTURES, ROUNDS, ROWS, SUMMARY
from fedsim.settings.forms import (
    FIGURE,
    INTEGERS,
    MAP,
    MAPS,
    METRIC,
    NAME,
    NUMBER,
    NUMBERS,
    TEXT,
    TEXTS,
    WHOLE,
    Form,
    Forms,
    check_tree,
    maps_of,
    optional,
)
from fedsim.settings.moved import updated
from fedsim.workloads.by_class import ECE, MACRO_F1
from fedsim.workloads.metrics import (
    ASYNCHRONY,
    ATTACK_SUCCESS,
    DELTA,
    EPSILON,
    MEAN_STALENESS,
    NETWORKS,
    PRIMARY,
    STALENESS,
    Metric,
)

if TYPE_CHECKING:
    import pandas as pd

Rows = dict[str, np.ndarray]  # a column of client rows by name, [rows] each
JSON_TEXTS = ("metrics", "work")

SETTINGS: Forms = {"seed": optional(WHOLE), "choices": optional(maps_of(NAME))}
OUTCOMES = Form(
    "a map of whole numbers, 'completed' among them", lambda value: maps_of(WHOLE).fits(value) and "completed" in value
)
FIGURES: Forms = {
    **{"method": TEXT, "workload": TEXT, "fleet": TEXT, "seed": WHOLE, "rounds": WHOLE},
    "final": MAP,
    "best": MAP,
    "energy_j": {"total": NUMBER, "max_client": NUMBER, "waiting": NUMBER},
    "outcomes": OUTCOMES,
    **dict.fromkeys(("simulated_s", "host_s"), NUMBER),
    **dict.fromkeys(("down_bytes", "up_bytes", "peak_memory_bytes", "storage_bytes"), WHOLE),
    "to_target": Form("a map or null", lambda value: value is None or isinstance(value, dict)),
    "clients": optional(MAP),
    "warnings": optional(TEXTS),
    "prices": optional(MAP),
    "compression": optional(MAPS),
    "microphones": optional(MAP),
    "repriced": optional(MAP),
    NETWORKS: optional(maps_of(maps_of(WHOLE))),
    ASYNCHRONY: optional(Form("what a run with loop=buffer says of its clients", lambda v: _is_asynchrony(v))),
    **dict.fromkeys(("privacy", "attack", "masking"), optional(MAP)),
    BY_ROUNDS: optional(TEXT),
    **dict.fromkeys(("continual", "versions"), optional(MAP)),
    "classes": optional(MAPS),
    "calibration": optional(MAPS),
    "confusion": optional(
        Form("a list of lists of whole numbers", lambda v: isinstance(v, list) and all(map(INTEGERS.fits, v)))
    ),
}
BY_CLASS = dict.fromkeys((MACRO_F1, ECE, ATTACK_SUCCESS), optional(NUMBER))
CLASS = {"name": TEXT, "examples": WHOLE, "accuracy": FIGURE, "f1": FIGURE}
BIN = {"predictions": WHOLE, "accuracy": optional(NUMBER), "confidence": optional(NUMBER)}
MATRIX = Form(
    "rows of numbers or null, all of one length",
    lambda rows: (
        isinstance(rows, list)
        and all(isinstance(row, list) and len(row) == len(rows[0]) and all(map(FIGURE.fits, row)) for row in rows)
    ),
)
STREAM: Forms = {"accuracy_matrix": optional(MATRIX)}
ROUND = Form("a round or null", lambda value: value is None or WHOLE.fits(value))
TARGET: Forms = {"round": WHOLE, "simulated_s": NUMBER, "energy_j": NUMBER}
PRICES = {"line": TEXT, "calls_share": NUMBER}
CLIENTS_SEEN = {"population": WHOLE}
HEARD: Forms = {"round": WHOLE, "seen": maps_of(NUMBERS), "unseen": maps_of(NUMBERS)}
DEPLOYED: Forms = {"microphones": optional(maps_of(NUMBERS))}
ATTACK: Forms = {"name": TEXT, "malicious": WHOLE, "aim": optional(TEXT)}
MASKING: Forms = dict.fromkeys(("masked_bytes", "up_bytes", "down_bytes"), WHOLE)
SPENT = dict.fromkeys((EPSILON, DELTA), NUMBER)
REPRICED = {"run": TEXT, "rounds": WHOLE, "ended": TEXT}
NOTE = {"error": TEXT, "reason": TEXT}
LATER_COLUMNS = {"down_joules", "compute_joules", "up_joules", "tail_joules"}  # fedsim 0.1 had their sum alone
PNG, MAX_PICTURE = b"\x89PNG\r\n\x1a\n", 32 * 2**20


def check_run(folder: Path) -> None:
    """Refuses what is no run folder.

    Raises:
        ConfigError: naming what it lacks.
    """
    for name in (CONFIG, ROUNDS):
        if not (folder / name).exists():
            raise ConfigError(f"{folder} holds no run: {name} is not in it")


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the settings of a run; classes that an earlier version had elsewhere go by their present names.

    Raises:
        ConfigError: if there are none.
        FileError: if they cannot be read, or are not what the run wrote.
    """
    path = folder / CONFIG
    if not path.exists():
        raise ConfigError(f"{folder} holds no run: there is no {CONFIG} in it")
    text = config_text(folder)
    settings = parse_yaml(text, str(path))
    if not isinstance(settings, dict):
        raise FileError(f"{path} holds no settings")
    check_tree(settings, SETTINGS, str(path))
    return dict(updated(settings))


def config_text(folder: Path) -> str:
    """Reads `config.yaml` as it stands.

    Raises:
        FileError: if it cannot be read, or is not what the run wrote.
    """
    path = check_inside(folder, folder / CONFIG)
    text = read_text(path)
    check_signed(text, path)
    return text


def read_summary(folder: Path) -> dict[str, Any]:
    """Reads the summary of a finished run; empty where there is none.

    Raises:
        FileError: if it cannot be read, or is none.
    """
    path = folder / SUMMARY
    if not path.exists() and not path.is_symlink():
        return {}
    summary = read_json(check_inside(folder, path))
    check_tree(summary, FIGURES, str(path))
    check_tree(summary, METRIC if PRIMARY in summary else {}, str(path))
    primary = Metric.named_in(summary).name
    check_tree(summary, {"final": {primary: FIGURE, **BY_CLASS}, "best": {primary: FIGURE, "round": ROUND}}, str(path))
    target = {primary: NUMBER, **TARGET}
    for key, forms in (
        ("to_target", target),
        ("prices", PRICES),
        ("clients", CLIENTS_SEEN),
        ("microphones", HEARD),
        ("repriced", REPRICED),
        ("privacy", SPENT),
        ("attack", ATTACK),
        ("masking", MASKING),
        ("continual", STREAM),
    ):
        if summary.get(key):
            check_tree(summary[key], forms, f"{path}: {key}")
    for key, forms in (("classes", CLASS), ("calibration", BIN), ("compression", DEPLOYED)):
        for entry in summary.get(key, ()):
            check_tree(entry, forms, f"{path}: {key}")
    if any(len(row) != len(summary.get("classes", ())) for row in summary.get("confusion", ())):
        raise FileError(f"{path}: confusion has rows of other lengths than there are classes")
    if (found := summary.get(ASYNCHRONY)) and found[STALENESS]:
        ages = {int(age): count for age, count in found[STALENESS].items()}  # earlier versions had these alone
        found.setdefault(MEAN_STALENESS, sum(age * count for age, count in ages.items()) / sum(ages.values()))
    return dict(summary)


def read_failure(folder: Path) -> dict[str, Any]:
    """Reads the note of a run that failed; empty where there is none.

    Raises:
        FileError: if it cannot be read, or is none.
    """
    path = folder / FAILURE
    if not path.exists() and not path.is_symlink():
        return {}
    note = read_json(check_inside(folder, path))
    check_tree(note, NOTE, str(path))
    return dict(note)


def row_files(folder: Path) -> list[Path]:
    """Lists the files of client rows, in order.

    Raises:
        FileError: if `clients` is no folder, or leads elsewhere.
    """
    place = check_inside(folder, folder / CLIENTS)
    if place.exists() and not place.is_dir():
        raise FileError(f"{place} is a file, and must be a folder of client rows")
    return [check_inside(folder, path) for path in sorted(place.glob("*.parquet")) if ROWS.fullmatch(path.name)]


def read_rows(path: Path, columns: list[str] | None = None) -> Any:
    """Reads the client rows of one file, as a pyarrow Table.

    Raises:
        FileError: if it cannot be read, or lacks a column or has one of another type.
    """
    table = read_parquet(path, columns)
    for field in client_schema():
        if columns is not None and field.name not in columns:
            continue
        if field.name not in table.schema.names:
            if field.name not in LATER_COLUMNS:
                raise FileError(f"{path} holds no client rows: it has no column {field.name!r}")
        elif table.schema.field(field.name).type != field.type:
            found = table.schema.field(field.name).type
            raise FileError(f"{path} holds no client rows: {field.name} is {found}, and must be {field.type}")
    return table


def read_all_rows(folder: Path) -> pd.DataFrame | None:
    """Reads all client rows of a run; None where there are none.

    Raises:
        FileError: as `read_rows`.
    """
    import pandas as pd

    tables = [read_rows(path).replace_schema_metadata().to_pandas() for path in row_files(folder)]
    return pd.concat(tables) if tables else None


def read_columns(folder: Path) -> Rows:
    """Reads all client rows of a run as columns by name, but for its JSON texts; empty where there are none.

    Raises:
        FileError: as `read_rows`.
    """
    import pyarrow as pa

    tables = [read_rows(path).replace_schema_metadata() for path in row_files(folder)]
    if not tables:
        return {}
    rows = pa.concat_tables(tables, promote_options="default")
    return {name: as_array(rows[name]) for name in rows.column_names if name not in JSON_TEXTS}


def read_last_scores(folder: Path, name: str) -> dict[int, tuple[str, float]]:
    """Reads the device and the last value of a metric of each client that judged a model, by client.

    Args:
        folder: of the run.
        name: of the metric.

    Raises:
        FileError: as `read_rows`, or if the metrics of a row are not what a run writes.
    """
    found: dict[int, tuple[str, str, str]] = {}
    for path in row_files(folder):
        table = read_rows(path, ["phase", "client", "device", "outcome", "metrics"])
        judged = np.array([p == "evaluate" for p in table["phase"].to_pylist()], bool)
        judged &= np.array([o == "completed" for o in table["outcome"].to_pylist()], bool)
        places = {client: place for place, client in enumerate(table["client"].to_pylist()) if judged[place]}
        for client, place in places.items():
            found[client] = str(path), table["device"][place].as_py(), table["metrics"][place].as_py()
    values = {client: (device, parse_json(text, path)) for client, (path, device, text) in found.items()}
    return {
        client: (device, float(tree[name]))
        for client, (device, tree) in sorted(values.items())
        if isinstance(tree, dict) and NUMBER.fits(tree.get(name))
    }


def as_array(column: Any) -> np.ndarray:
    """Returns a column of a pyarrow Table, NaN for null, as its `to_numpy`, which would import pandas."""
    import pyarrow as pa

    if pa.types.is_string(column.type):
        return np.array(column.to_pylist(), object)
    if column.null_count or not column.num_chunks:
        return np.array(column.to_pylist(), float)
    return np.concatenate([np.from_dlpack(chunk) for chunk in column.chunks])


def select_rows(rows: Rows, where: np.ndarray) -> Rows:
    """Returns the rows that a mask or indices choose."""
    return {name: column[where] for name, column in rows.items()}


def read_pictures(folder: Path) -> list[bytes]:
    """Reads the pictures that a run drew, in order of their names, but for links to elsewhere and what is no PNG."""
    found = []
    for path in sorted((folder / PICTURES).glob("*.png")):
        try:
            data = read_bytes(check_inside(folder, path), MAX_PICTURE)
        except FileError:
            continue
        if data.startswith(PNG):
            found.append(data)
    return found


def _is_asynchrony(value: Any) -> bool:
    """Returns whether this is what `fedsim.runs.asynchrony` writes."""
    numbers = {"unused": WHOLE, "at_work": NUMBER, "server_idle_s": NUMBER, "in_flight": WHOLE}
    later = {MEAN_STALENESS: NUMBER, "device_staleness": maps_of(NUMBER)}
    return (
        isinstance(value, dict)
        and value.keys() - later.keys() == {*numbers, STALENESS, "busy"}
        and all(form.fits(value[name]) for name, form in later.items() if name in value)
        and all(form.fits(value[name]) for name, form in numbers.items())
        and maps_of(WHOLE).fits(value[STALENESS])
        and all(age.isdecimal() and len(age) < 8 and 0 < count < 2**40 for age, count in value[STALENESS].items())
        and maps_of(NUMBER).fits(value["busy"])
        and "all" in value["busy"]
    )
