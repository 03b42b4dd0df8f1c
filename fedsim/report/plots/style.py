"""Colours, units and names that all pictures of runs share."""

from __future__ import annotations

from fedsim.workloads.metrics import METRICS, shown_as

# Okabe and Ito, "Color Universal Design", 2008: told apart by all common kinds of colour vision. Black is the arm
# that the others are compared with.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# Of classes, which can be many: those above come first.
CLASS_COLOURS = (
    *COLOURS,
    *("#8C6D31", "#7F7F7F", "#B22222", "#6A5ACD", "#2F8F8F", "#A0B83A", "#E377C2", "#4B5D16", "#9E9AC8", "#F7B6A3"),
    *("#3B4CC0", "#BCA97C", "#66C2A5", "#8A3B67"),
)
# The same on a page, where the dark has lighter ones of them; FOREGROUND is the arm that others are compared with.
ON_PAGE = tuple(f"var(--s{number},{colour})" for number, colour in enumerate(COLOURS))
FOREGROUND, FAINT = "var(--fg,currentColor)", "var(--faint,#BDBDBD)"
UNITS: dict[str, tuple[tuple[float, str], ...]] = {
    "simulated_s": ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds")),
    "joules": ((1e6, "MJ"), (1e3, "kJ"), (1.0, "J")),
    "traffic_bytes": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes")),
}
NAMES = {
    "simulated_s": "simulated time",
    "joules": "energy of all devices",
    "traffic_bytes": "traffic, down and up",
    "rounds": "rounds",
}
AXES = ("rounds", "simulated_s", "joules", "traffic_bytes")  # along which a metric is a line; anything else is a point


def axis_name(axis: str) -> str:
    """Returns what an axis is of, in words: what a run took, or one of its figures."""
    metric = shown_as(axis)
    return metric.label if metric else NAMES.get(axis, axis.removeprefix(METRICS).replace("_", " "))
