"""Rows of a CSV file, or windows of consecutive rows, as of a sensor."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from devices.errors import one_line, unknown
from devices.reading import open_file
from devices.texts import quoted
from fedsim.errors import ConfigError, DataError
from fedsim.workloads.host_memory import check_fits
from fedsim.workloads.importing.found import Found, ids, number_labels

if TYPE_CHECKING:
    import pandas as pd

MISSING = ("", "NA", "N/A", "NaN", "nan", "NULL", "null", "None")
OTHER_SEPARATORS = (";", "\t")


def import_csv(
    file: Path,
    label: str,
    user: str | None = None,
    features: Sequence[str] | None = None,
    window: int | None = None,
    step: int | None = None,
    kind: Literal["tabular", "image"] = "tabular",
    separator: str = ",",
) -> Found:
    """Reads numbers as float32, [n, features], or of every window [n, window * features], as they are in the file.

    A window never spans two labels or users; the rows at the end of a stretch that fill no window are left out.

    Args:
        file: with a heading for each column.
        label: column of the class; of a window, all rows have the same.
        user: column of who made a row.
        features: columns of numbers; None: all others.
        window: rows that make one example; None: every row is one.
        step: rows from the start of a window to the next; None: `window`.
        kind: "image" keeps a window [n, window, features], for convolutions.
        separator: between cells.

    Raises:
        ConfigError: if an argument is wrong.
        DataError, FileError: naming the row and column that cannot be used.
    """
    if window is None and (step is not None or kind == "image"):
        raise ConfigError(f"{'--step' if step is not None else '--kind image'} is for windows; give --window too")
    if window is not None and (window < 1 or (step is not None and step < 1)):
        raise ConfigError(f"--window and --step must be at least 1, got {window} and {step}")
    if len(separator) != 1:
        raise ConfigError(f"--separator must be one character, got {separator!r}")
    table = _read(file, label, user, features, separator)
    columns = [name for name in table.columns if name not in (label, user)]
    values = np.stack([_numbers(table[name], name, file) for name in columns], 1)
    labels = _texts(table[label], label, file)
    users = None if user is None else _texts(table[user], user, file)
    notes = [f"features: {', '.join(columns)}"]
    if window is None:
        y, classes = number_labels(labels, str(file))
        return Found(values, y, classes, "tabular", None if users is None else ids(users, str(file)), notes=notes)
    step = step or window
    starts, stretches, dropped = _windows(labels, users, window, step)
    if not starts:
        raise DataError(
            f"{file} has no {window} consecutive rows of one class{' and user' if user else ''}; lower --window"
        )
    check_fits(f"{file} with {len(starts)} windows of {window} rows", 2 * len(starts) * window * values[0].nbytes)
    x = np.stack([values[start : start + window] for start in starts])
    y, classes = number_labels([labels[start] for start in starts], str(file))
    notes.append(f"windows of {window} rows, one every {step}")
    if dropped:
        notes.append(f"left out: {dropped} rows that fill no window")
    return Found(
        x if kind == "image" else x.reshape(len(x), -1),
        y,
        classes,
        kind,
        None if users is None else ids([users[start] for start in starts], str(file)),
        stretches=np.array(stretches),
        overlap=-(-window // step) - 1,
        notes=notes,
    )


def _read(file: Path, label: str, user: str | None, features: Sequence[str] | None, separator: str) -> pd.DataFrame:
    import pandas as pd

    # Two rows, as pandas would take cells beyond the headings for names of rows.
    top = _parse(file, separator, header=None, nrows=2, dtype=str, keep_default_na=False)
    columns = [str(name).strip() for name in top.iloc[0]]
    if len(set(columns)) < len(columns):
        twice = next(name for name in columns if columns.count(name) > 1)
        raise DataError(f"{file} has the heading {twice!r} more than once; name its columns differently")
    for option, name in (("--label", label), ("--user", user), *(("--features", name) for name in features or ())):
        if name is not None and name not in columns:
            held = next((s for s in OTHER_SEPARATORS if len(columns) == 1 and s in columns[0]), None)
            hint = f"; the cells look as if they were separated by {held!r}: --separator {held!r}" if held else ""
            raise DataError(f"{file}: {unknown(f'column of {option}', name, columns)}{hint}")
    named = [*(features or ()), label, *([user] if user else [])]
    if len(set(named)) < len(named):
        raise ConfigError("--label, --user and --features must name different columns")
    wanted = list(features) if features else [name for name in columns if name not in (label, user)]
    if "" in wanted:
        raise DataError(f"{file} has no heading for column {columns.index('') + 1}; name it, or choose with --features")
    if not wanted:
        raise DataError(f"{file} has no column beside {label!r} for the features")
    texts = {name: str for name in (label, user) if name is not None}
    table = _parse(
        file,
        separator,
        header=0,
        names=columns,
        dtype=texts,
        keep_default_na=False,
        na_values={name: list(MISSING) for name in wanted},
    )
    if not len(table):
        raise DataError(f"{file} has no rows below its headings")
    return pd.DataFrame(table[[*wanted, *texts]])


def _parse(file: Path, separator: str, **how: Any) -> pd.DataFrame:
    import pandas as pd

    with open_file(file) as opened:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)
                return pd.DataFrame(pd.read_csv(opened, sep=separator, low_memory=False, **how))
        except (ValueError, OSError, MemoryError, pd.errors.ParserWarning) as error:
            reason = one_line(error).removeprefix("Error tokenizing data. ").removeprefix("C error: ")
            raise DataError(f"{file} cannot be read as CSV: {reason or type(error).__name__}") from None


def _numbers(column: pd.Series, name: str, file: Path) -> np.ndarray:
    """Returns a column as float32 [rows].

    Raises:
        DataError: naming the first row (the headings are row 0) that is missing, a text or out of float32's range.
    """
    import pandas as pd

    numeric = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
    read = column if numeric else pd.to_numeric(column.astype(str), errors="coerce")
    with np.errstate(over="ignore"):
        wide = read.to_numpy(np.float64, na_value=np.nan)
        values = wide.astype(np.float32)
    wrong = ~np.isfinite(values)
    if not wrong.any():
        return values
    row = int(wrong.argmax())
    held = "no value" if column.isna().iloc[row] else quoted(str(column.iloc[row]))
    too_large = f"which is too large for float32 (at most {np.finfo(np.float32).max:.1e})"
    why = too_large if np.isfinite(wide[row]) else "and features must be numbers"
    raise DataError(
        f"{file} holds {held} in row {row + 1}, column {name!r}, {why}; mend or remove the row, or choose the columns "
        "with --features"
    )


def _texts(column: pd.Series, name: str, file: Path) -> list[str]:
    texts = [str(text).strip() for text in column.fillna("")]  # a row that is too short lacks it
    if "" in texts:
        raise DataError(f"{file} has no value in row {texts.index('') + 1}, column {name!r}; fill it or remove the row")
    return texts


def _windows(labels: list[str], users: list[str] | None, window: int, step: int) -> tuple[list[int], list[int], int]:
    """Returns where windows start, the stretch of rows with one label and user that each is of, and rows in none."""
    keys = list(zip(labels, users or labels, strict=True))
    borders = [0, *(i for i in range(1, len(keys)) if keys[i] != keys[i - 1]), len(keys)]
    starts: list[int] = []
    stretches: list[int] = []
    used = 0
    for number, (first, end) in enumerate(pairwise(borders)):
        own = list(range(first, end - window + 1, step))
        starts += own
        stretches += [number] * len(own)
        used += min(window, step) * (len(own) - 1) + window if own else 0
    return starts, stretches, len(keys) - used
