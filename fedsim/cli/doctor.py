"""`fedsim doctor`: checks an installation: versions, GPU, data, writable folders, and a run of a few seconds."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import typer

from fedsim.runs.experiment import build_engine

Check = tuple[str, bool, str]  # what, whether it is fine, what was found
PACKAGES = (
    "fedsim-edge",
    "torch",
    "torchvision",
    "flwr",
    "ray",
    "hydra-core",
    "numpy",
    "tensorboard",
    "pyarrow",
    "torch-pruning",
)


def doctor() -> None:
    """Check this installation: versions, GPU, data, writable folders, and a run of a few seconds.

    Example: fedsim doctor
    """
    from rich.text import Text

    from fedsim.report.terminal import console, table

    shown, fine = console(), True
    rows = table("check", "", "found", left=("check", "", "found"))
    with shown.status("examining"):
        for what, good, found in _checks():
            fine &= good
            rows.add_row(what, "ok" if good else Text("FAILED", style="red"), found)
    shown.print(rows)
    raise typer.Exit(0 if fine else 1)


def _checks() -> Iterator[Check]:
    yield "python", True, f"{platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores"
    for package in PACKAGES:
        try:
            yield package, True, version(package)
        except PackageNotFoundError:
            yield package, False, "not installed"
    yield _gpu()
    yield from _data()
    for folder in (Path("runs"), Path("data")):
        yield f"write to {folder}/", *_writable(folder)
    yield "run", *_short_run()


def _gpu() -> Check:
    import torch

    if not torch.cuda.is_available():
        return "GPU", True, "none; clients train on the CPU"
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    return "GPU", True, f"{torch.cuda.device_count()} x {', '.join(sorted(names))}"


def _data() -> Iterator[Check]:
    from fedsim.settings.catalogue import list_workloads
    from fedsim.workloads.bundle import bundle_names

    here = ", ".join(row.name for row in list_workloads() if row.found)
    bundles = ", ".join(bundle_names()) or "none"
    place = f"FEDSIM_DATA={os.environ.get('FEDSIM_DATA', '(not set)')}"
    yield "data", True, f"{place}; workloads that are here: {here}; bundles: {bundles}"


def _writable(folder: Path) -> tuple[bool, str]:
    real = Path(os.path.realpath(folder))  # not resolve(), which fails for links in a loop
    parent = folder if folder.exists() else real.parent
    good = os.access(parent, os.W_OK)
    return good, str(real) if good else f"{parent} is not writable; use out=... or another working folder"


def _short_run() -> tuple[bool, str]:
    from fedsim.runs.writer import run
    from fedsim.settings.compose import compose
    from fedsim.workloads.metrics import Metric

    started = time.monotonic()
    try:
        settings = compose(["rounds=3", "cohort=5"])
        with tempfile.TemporaryDirectory() as folder:
            summary = run(settings, build_engine(settings), Path(folder) / "run")
    except Exception as error:  # whatever it is, it is the finding
        return False, f"{type(error).__name__}: {error}"
    primary = Metric.named_in(summary)
    score = primary.with_unit(summary["final"][primary.name])
    return True, f"3 rounds in {time.monotonic() - started:.1f} s, test {primary.title} {score}"
