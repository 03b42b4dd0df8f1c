"""The processes of a study's runs: forked from one that has imported everything, or started each for itself."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import IO

from fedsim.engines.leash import END_S, TIED
from fedsim.settings.groups import Settings
from fedsim.settings.permissions import environment

PYTHON = (sys.executable, "-P", "-m")  # -P: no file of the working folder stands in for a library
COMMAND, FORK_SERVER = (*PYTHON, "fedsim"), (*PYTHON, "fedsim.cli.fork_server")
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
CAN_FORK = sys.platform == "linux"  # libraries of other systems do not bear it
POLL_S = 0.2  # between looks at the runs
MESSAGE_BYTES = 4096


class Process:
    """A run's process.

    Attributes:
        code: how it ended, of a signal below zero; None while it goes on.
    """

    code: int | None = None


class Processes:
    """Starts runs; when its context is left, all of them have ended.

    Ctrl-C reaches none of them, for each is in a session of its own; all are on a leash (`engines.leash`).

    Args:
        lock: file descriptor that each of them inherits.
    """

    def __init__(self, lock: int):
        self.lock = lock
        self.alone: dict[Process, subprocess.Popen[bytes]] = {}
        self.server: _ForkServer | None = None

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for started in self.alone.values():
            started.terminate()
        if self.server is not None:
            self.server.close()
        end = time.monotonic() + END_S
        for started in self.alone.values():
            try:
                started.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                started.kill()
                started.wait()
            _untie(started)

    def start(
        self, arguments: Sequence[str], output: IO[bytes], settings: Settings | None = None, alone: bool = False
    ) -> Process:
        """Starts `fedsim`.

        Args:
            arguments: of the command line.
            output: where standard output and standard error go.
            settings: of the run, where the arguments come to these.
            alone: not to be forked.
        """
        if CAN_FORK and not alone:
            if self.server is not None and self.server.ready and self.server.has_ended:
                self.server.close()
                self.server = None
            self.server = self.server or _ForkServer(self.lock)
            if (forked := self.server.fork(arguments, settings, output)) is not None:
                return forked
        process = Process()
        self.alone[process] = _started([*COMMAND, *arguments], self.lock, subprocess.PIPE, output)
        return process

    def look(self) -> None:
        """Looks which runs have ended, for a while."""
        if self.server is None or not self.server.listen(POLL_S):
            time.sleep(POLL_S)
        for process, started in list(self.alone.items()):
            if (code := started.poll()) is not None:
                process.code = code
                _untie(self.alone.pop(process))


def _untie(started: subprocess.Popen[bytes]) -> None:
    """Closes the leash of a process that has ended."""
    if started.stdin is not None:
        started.stdin.close()


class _ForkServer:
    """The study's end of `fedsim.cli.fork_server`.

    Attributes:
        ready: it has said that it forks runs.
    """

    def __init__(self, lock: int):
        self.socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            self.process = _started(FORK_SERVER, lock, other.fileno(), subprocess.DEVNULL)
        self.ready = False
        self.running: dict[int, Process] = {}

    @property
    def has_ended(self) -> bool:
        """Returns whether the server is gone; its runs may be closing their folders still."""
        return self.process.poll() is not None

    def fork(self, arguments: Sequence[str], settings: Settings | None, output: IO[bytes]) -> Process | None:
        """Forks a run; None where the server does not."""
        while not (self.ready or self.has_ended):
            self.listen(POLL_S)
        before = set(self.running)
        if json.loads(json.dumps(settings)) != settings:  # a map has keys that JSON cannot tell from texts
            settings = None
        facts = {"arguments": list(arguments), "settings": settings}
        try:
            socket.send_fds(self.socket, [json.dumps(facts).encode()], [output.fileno()])
        except OSError:  # it is gone, or the message too long
            return None
        while not (started := self.running.keys() - before) and not self.has_ended:
            self.listen(POLL_S)
        return self.running[started.pop()] if started else None

    def listen(self, wait_s: float) -> bool:
        """Takes what the server says, and waits for it at most so long; returns whether more can come."""
        while select.select([self.socket], [], [], wait_s)[0]:
            try:
                message = self.socket.recv(MESSAGE_BYTES)
            except ConnectionError:
                message = b""
            if not message:  # the server and all its runs are gone
                for process in self.running.values():
                    process.code = self.process.wait()
                self.running.clear()
                return False
            answer = json.loads(message)
            self.ready = True
            if "started" in answer:
                self.running[answer["started"]] = Process()
            if "ended" in answer:
                self.running.pop(answer["ended"]).code = answer["code"]
            wait_s = 0.0
        return True

    def close(self) -> None:
        """Has the server end its runs and itself, and waits until all of them are gone."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
        end = time.monotonic() + 2 * END_S  # it gives its runs END_S, and so does their leash
        while self.listen(POLL_S) and time.monotonic() < end:
            pass
        self.process.kill()
        self.process.wait()
        self.socket.close()


def _started(command: Sequence[str], lock: int, stdin: int, output: int | IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=stdin,
        stdout=output,
        stderr=subprocess.STDOUT,
        env={**os.environ, **ONE_THREAD, **environment(), TIED: "1"},
        start_new_session=True,
        pass_fds=(lock,),
    )
