"""Writes seconds, joules and bytes in the unit that reads best: one form for every table, sentence and page."""

from __future__ import annotations


def simulated(seconds: float) -> str:
    """Returns simulated time in s, min, h or d."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size or (unit == "h" and seconds >= size):
            return f"{seconds / size:.2f} {unit}"
    return f"{seconds:.1f} s"


def energy(joules: float) -> str:
    """Returns energy in J, kJ or MJ."""
    for unit, size in (("MJ", 1e6), ("kJ", 1e3)):
        if joules >= size:
            return f"{joules / size:.2f} {unit}"
    return f"{joules:.1f} J"


def size(count: float) -> str:
    """Returns bytes in decimal units, as networks and phones count them."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= step:
            return f"{count / step:.2f} {unit}"
    return f"{count:.0f} B"
