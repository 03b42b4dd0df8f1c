"""Which data a run folder says that it was made with."""

from __future__ import annotations

from pathlib import Path

from devices.errors import FileError
from fedsim.errors import ConfigError
from fedsim.report.files import read_summary
from fedsim.runs import checkpoint
from fedsim.workloads.fingerprint import DATA, Fingerprint


def recorded(run: Path) -> Fingerprint | None:
    """The fingerprint in a run folder, of its summary or else of its checkpoint; None where neither tells it."""
    if found := of_summary(run):
        return found
    try:
        saved = checkpoint.load(run)
    except (ConfigError, FileError):  # damaged: whoever needs it says so
        return None
    return saved.state.get(DATA) if saved is not None else None


def of_summary(run: Path) -> Fingerprint | None:
    """The fingerprint in a run's `summary.json`; None where it has none, as in version 0.1, or cannot be read."""
    try:
        found = read_summary(run).get(DATA)
    except (ConfigError, FileError):
        return None
    return found if isinstance(found, dict) else None
