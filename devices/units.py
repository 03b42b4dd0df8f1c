"""Writes seconds, joules and bytes in the unit that reads best: one form for every table, sentence and page."""

from __future__ import annotations


def simulated(seconds: float) -> str:
    """Returns simulated time in s, min, h or d."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size or (unit == "h" and seconds >= size):
            return f"{seconds / size:.2f} {unit}"
    return f"{seconds:.1f} s"


def energy(joules: float) -> str:
    """Returns energy in mJ, J, kJ or MJ."""
    for unit, size in (("MJ", 1e6), ("kJ", 1e3)):
        if joules >= size:
            return f"{joules / size:.2f} {unit}"
    return f"{1e3 * joules:.3g} mJ" if 0 < joules < 1 else f"{joules:.1f} J"


def size(count: float) -> str:
    """Returns bytes in decimal units, those of memory too."""
    unit, number = _of_bytes(count)
    return f"{number:.2f} {unit}" if unit != "B" else f"{number:.0f} B"


def short_size(count: float) -> str:
    """Returns bytes in three digits, where decimals would say more than is known."""
    unit, number = _of_bytes(count)
    return f"{number:.3g} {unit}" if number < 1000 else f"{number:.0f} {unit}"


def _of_bytes(count: float) -> tuple[str, float]:
    steps = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    return next(((unit, count / step) for unit, step in steps if count >= step), ("B", count))
