"""One experiment on Flower's own runtime: handed in, followed, and ended with its true outcome.

`flwr run` returns 0 whatever happens; the truth is in `flwr ls`, the reason in the run folder or the log.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from devices.errors import UserError
from devices.writing import write_atomic
from fedsim.engines.flower.runtime import FlowerRuntime, Place, end_of
from fedsim.errors import RunError
from fedsim.report import strict_json
from fedsim.report.files import read_failure, read_summary
from fedsim.report.place import check_free
from fedsim.report.rounds import RoundReport
from fedsim.workloads.bundle import data_roots

POLL_S, STATUS_S = 0.1, 10.0  # a status costs most of a CPU second: asked for seldom, or when the folder says "over"
PATH_KEYS = ("path", "root", "weights")  # their texts may name files even without a separator in them


def run(
    settings: dict[str, Any],
    out: Path,
    place: Place,
    app: Path | None = None,
    watch: Callable[[RoundReport], None] | None = None,
) -> dict[str, Any]:
    """Runs one experiment into the folder `out` and returns its summary.

    Args:
        settings: composed and checked.
        out: the run folder.
        place: workers, port, Ray.
        app: folder of a Flower app that is bundled and run; None: the installed packages.
        watch: called with each round as it comes in.

    Raises:
        UserError: for wrong settings, also when they are seen only in the first round.
        RunError: when the run fails, is stopped from outside, or Flower cannot be started.
    """
    check_free(out)
    settings = anchored({**settings, "out": str(out.resolve())}, Path.cwd())
    with FlowerRuntime(place) as flower:
        run_id = flower.submit(settings, app)
        try:
            status = _follow(flower, run_id, out, watch)
        except BaseException as error:  # Ctrl-C and the command's own for SIGTERM
            if not isinstance(error, Exception):
                flower.stop(run_id)
                _note(out, type(error).__name__)
            raise
        if status == "finished:completed" and (out / "summary.json").exists():
            return read_summary(out)
        log = flower.log(run_id)
    reason = failure(out, status, log)
    if out.is_dir():
        try:
            write_atomic(out / "flower.log", log)
        except OSError as error:
            reason.add_note(f"flower.log could not be written: {error.strerror}")
    raise reason


def failure(out: Path, status: str, log: str) -> Exception:
    """Returns the error that a failed run left behind: in its folder, else in the log, else the log's last lines."""
    note = read_failure(out)
    if note:
        name, reason = note["error"], note["reason"]
    else:
        raised = re.findall(r"^(?:fedsim|devices)\.errors\.(\w+): (.+)$", log, re.MULTILINE)
        name, reason = raised[-1] if raised else ("", "")
    if kind := _user_errors(UserError).get(name):
        error: Exception = kind(reason)
    elif name:
        error = RunError(reason if name.endswith(("ClientError", "RunError")) else f"{name}: {reason}")
    else:
        error = RunError(f"Flower's run ended as {status} without a reason; {end_of(log)}")
    error.traceback = log  # type: ignore[attr-defined]  # printed with FEDSIM_TRACEBACK=1
    return error


def _user_errors(kind: type[UserError]) -> dict[str, type[UserError]]:
    """Returns an error class and those derived from it, by name."""
    derived = (_user_errors(below) for below in kind.__subclasses__())
    return {kind.__name__: kind} | {name: found for errors in derived for name, found in errors.items()}


def anchored(settings: dict[str, Any], here: Path) -> dict[str, Any]:
    """Returns the settings with relative files made absolute: Flower's processes work in another folder."""
    moved = {key: value if key == "choices" else _anchored(value, here) for key, value in settings.items()}
    devices = moved["fleet"].get("devices")
    if isinstance(devices, dict):  # profiles by name or by path
        moved["fleet"]["devices"] = {_anchored(name, here, "devices"): share for name, share in devices.items()}
    return moved


def _anchored(value: Any, here: Path, key: str = "") -> Any:
    if isinstance(value, dict):
        return {k: _anchored(v, here, str(k)) for k, v in value.items()}
    if isinstance(value, list):
        return [_anchored(v, here, key) for v in value]
    if not isinstance(value, str) or not value or key in ("", "_target_"):  # settings outside of groups: name, out
        return value
    bare = os.sep not in value and not Path(value).suffix
    if bare and (key not in PATH_KEYS or any((root / value).exists() for root in data_roots())):
        return value  # a name, perhaps one of the data folders, which stay the same
    return str(here / value) if (here / value).exists() else value


def _follow(flower: FlowerRuntime, run_id: str, out: Path, watch: Callable[[RoundReport], None] | None) -> str:
    """Passes on rounds as they are written until Flower says that the run is over; returns its last word."""
    asked_at, lines = time.monotonic(), _new_lines(out / "rounds.jsonl")
    while True:
        over = any((out / name).exists() for name in ("summary.json", "failure.json"))
        status = ""
        if over or time.monotonic() - asked_at > STATUS_S:
            status, asked_at = flower.status(run_id), time.monotonic()
        for line in next(lines):
            if watch:
                watch(RoundReport.from_json(line))
        if status.startswith("finished"):
            return status
        time.sleep(POLL_S)


def _new_lines(path: Path) -> Iterator[list[str]]:
    """Yields, whenever it is asked, the complete lines written since it was asked last."""
    read = 0
    while True:
        lines: list[str] = []
        if path.exists():
            with path.open("rb") as file:
                file.seek(read)
                lines = [raw.decode() for raw in file if raw.endswith(b"\n")]
            read += sum(len(line.encode()) for line in lines)
        yield lines


def _note(out: Path, error: str) -> None:
    """Writes the note that a run in this process would have left: Flower's processes are ended without a last word."""
    if (out / "config.yaml").exists() and not any((out / n).exists() for n in ("summary.json", "failure.json")):
        write_atomic(
            out / "failure.json", strict_json.dumps({"error": error, "reason": "interrupted"}, indent=1) + "\n"
        )
