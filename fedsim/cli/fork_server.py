"""A process that has imported what runs need, and forks one for each run that a study asks for.

It lives as long as the study: each run is a process of its own, as if `fedsim` had been started for it, without the
seconds that the imports take. Nothing is ever done here but importing fedsim and its libraries: no thread is started,
no setting read, no number drawn, so that every run finds what a new process would.

Standard input is a socket to the study (`fedsim.study.processes`): a message per run, with the arguments of `fedsim` in
JSON and the file that its output goes to. What comes back is the number of its process, and later how it ended.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from fedsim.cli.experiment import run_one
from fedsim.cli.main import app
from fedsim.cli.process import run_app
from fedsim.engines.leash import END_S

# What every run imports sooner or later; the last of each come from libraries that are imported where they are needed.
MODULES = (
    *("fedsim.cli.hydra_run", "fedsim.runs.experiment", "fedsim.runs.writer", "fedsim.runs.replay"),
    *("fedsim.report.folder", "fedsim.report.page", "fedsim.report.place"),
    *("fedsim.report.plots.run", "fedsim.report.progress", "fedsim.settings.foreign", "fedsim.engines.local"),
    *("fedsim.workloads.classification", "fedsim.workloads.partition", "fedsim.workloads.streams"),
    *("clients.app", "clients.trainers.batched", "strategies.stock", "strategies.architectures", "configs"),
    *("hydra._internal.logging_config", "jinja2"),
    *("numpy.ma", "numpy.random", "portalocker", "psutil", "pyarrow.parquet"),
    *(
        "safetensors.numpy",
        "tensorboard.plugins.hparams.api_pb2",
        "tensorboard.plugins.hparams.metadata",
        "tensorboard.summary.writer.event_file_writer",
        "torch.utils._device",
        "zoneinfo",
    ),
)
MESSAGE_BYTES, POLL_S = 2**20, 0.05
JEMALLOC = "JE_ARROW_MALLOC_CONF"  # pyarrow would start a thread that tidies memory; forks are for single ones


def main() -> None:
    """Forks runs until nobody asks for one any more; in a run, this is the command `fedsim`."""
    import_all()
    with socket.socket(fileno=os.dup(0)) as study:
        request = serve(study)
        study.detach()  # stays open: the study sees by it that this process is there
    sys.argv = [str(Path(__file__).parents[1] / "__main__.py"), *request["arguments"]]
    run_app(app if request["settings"] is None else partial(run_composed, request["settings"]))


def serve(study: socket.socket) -> dict[str, Any]:
    """Forks runs; returns in each of them, with what it is to do."""
    leash, held = os.pipe()  # each run has the one end as its standard input, and this process the other
    running: set[int] = set()
    study.send(b"{}")
    while True:
        if select.select([study], [], [], POLL_S)[0]:
            message, files, _, _ = socket.recv_fds(study, MESSAGE_BYTES, 1)
            if not message:
                _end(running)
                sys.exit()
            pid = os.fork()
            if not pid:
                os.close(held)
                _become(leash, files[0])
                request: dict[str, Any] = json.loads(message)
                return request
            os.close(files[0])
            running.add(pid)
            facts = {"started": pid}
            study.send(json.dumps(facts).encode())
        for pid, code in _ended(running):
            facts = {"ended": pid, "code": code}
            with suppress(OSError):  # the study has gone: the next message says so
                study.send(json.dumps(facts).encode())


def run_composed(settings: dict[str, Any], arguments: list[str], standalone_mode: bool) -> None:
    """Is `fedsim run` for settings that its arguments come to."""
    gc.disable()
    run_one(settings)


def import_all() -> None:
    """Imports what runs need."""
    gc.disable()  # as a run does while it imports
    os.environ[JEMALLOC] = "background_thread:false"
    for name in MODULES:
        importlib.import_module(name)
    del os.environ[JEMALLOC]
    gc.freeze()
    gc.enable()


def _become(leash: int, output: int) -> None:
    """Makes this process what a new one would be; that it keeps the socket tells the study that it is there."""
    import numpy as np

    os.setsid()
    for number, stream in ((0, leash), (1, output), (2, output)):
        os.dup2(stream, number)
    os.close(leash)
    os.close(output)
    np.random.seed()  # Python's own generator does so by itself


def _ended(running: set[int]) -> list[tuple[int, int]]:
    """Takes those that have ended out of the running ones; returns their exit codes, of a signal below zero."""
    found = []
    for pid in sorted(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            running.discard(pid)
            found.append((pid, os.waitstatus_to_exitcode(status)))
    return found


def _end(running: set[int]) -> None:
    """Asks the runs to end, as Ctrl-C would, and ends those that do not."""
    for pid in running:
        os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + END_S
    while running and time.monotonic() < end:
        _ended(running)
        time.sleep(POLL_S)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
