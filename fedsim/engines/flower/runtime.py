"""Flower's own runtime for one run: starts what it needs, leaves nothing behind.

`flwr run` by itself keeps a SuperLink with the environment of its first caller, and lets Ray listen on every interface.
Here each run has its own SuperLink in a private folder, on loopback, in one process group that ends with the run. May
import: the standard library, psutil (lazily), fedsim's session folders, trust and errors.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from fedsim.engines.session_folder import TOKEN, UMASK, SessionFolder, private_files, token_file
from fedsim.errors import ConfigError, RunError
from fedsim.settings import permissions

PREFIX = "fedsim-flwr-"
HOST = "127.0.0.1"
START_TIMEOUT_S, COMMAND_TIMEOUT_S = 60.0, 120.0  # host seconds, for a loaded machine
STOP_TIMEOUT_S, GRACE_S, KILLED_S = 2.0, 1.0, 0.5  # an interrupted run is to be gone within five seconds
POLL_S, STATUS_ATTEMPTS = 0.1, 3
TAIL_LINES = 5
# A Flower app without code of its own: the components are found in the installed packages, as by `fedsim run`.
APP = """\
[project]
name = "fedsim"
version = "1.0.0"
description = "The installed fedsim"
license = { text = "Apache-2.0" }
dependencies = []

[tool.flwr.app]
publisher = "fedsim"

[tool.flwr.app.components]
serverapp = "fedsim.runs.flower_app:app"
clientapp = "clients.app:app"

[tool.flwr.app.config]
overrides = ""
config-json = ""
"""
CONNECTION = """\
[superlink]
default = "private"

[superlink.private]
address = "{address}"
insecure = true
"""


@dataclass(frozen=True)
class Place:
    """Where a run works.

    Args:
        workers: processes that train clients (Flower's num-supernodes).
        gpus: GPUs in total, shared evenly among the workers.
        threads: of numerical libraries in each process.
        port: of the SuperLink on loopback; 0 takes a free one.
        ray_address: HOST:PORT of a standing Ray cluster, or "auto"; empty: Ray is started for the run, on loopback.
    """

    workers: int
    gpus: int = 0
    threads: int = 1
    port: int = 0
    ray_address: str = ""

    def federation(self) -> str:
        """What `flwr run --federation-config` is told."""
        told = f"num-supernodes={self.workers} client-resources-num-cpus=1"
        if self.gpus:  # rounded down: the shares must fit
            told += f" client-resources-num-gpus={int(1000 * min(1.0, self.gpus / self.workers)) / 1000}"
        # Ray refuses counts for a cluster that stands.
        return told if self.ray_address else f"{told} init-args-num-cpus={self.workers}"


def environment(folder: Path, place: Place) -> dict[str, str]:
    """The environment of everything that is started for a run; `folder` is private to it."""
    here, scripts = Path.cwd(), sysconfig.get_path("scripts")
    foreign = ("FLWR_",) if place.ray_address else ("FLWR_", "RAY_")  # a standing cluster may need keys from the latter
    env = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    data = os.environ.get("FEDSIM_DATA")
    env |= {
        "PATH": os.pathsep.join(filter(None, (scripts, env.get("PATH")))),
        "FLWR_HOME": str(folder / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # it would install torch again
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ADDRESS": place.ray_address or "local",  # without it Ray joins any cluster that it finds on the machine
        "OMP_NUM_THREADS": str(place.threads),
        "PYTHONUNBUFFERED": "1",
        "FEDSIM_DATA": str(here / Path(data).expanduser()) if data else str(here / "data"),
        "NO_PROXY": ",".join(filter(None, (env.get("NO_PROXY", env.get("no_proxy")), HOST))),
    }
    env["no_proxy"] = env["NO_PROXY"]
    if "PYTHONPATH" in env:
        env["PYTHONPATH"] = os.pathsep.join(str(here / part) for part in env["PYTHONPATH"].split(os.pathsep))
    if not place.ray_address:
        # Ray binds to loopback when its node has the loopback address, which it takes by itself only on Windows and
        # macOS; this is the switch between the two.
        env |= {"RAY_TMPDIR": str(folder), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / TOKEN)}  # made by `FlowerRuntime`
    return env | permissions.environment()


class FlowerRuntime:
    """A private SuperLink and SuperExec, for the time of a `with` block.

    Both, and everything that they start, are one process group, that of the folder's leash, which is ended at the close
    of the block or when this process is gone.
    """

    def __init__(self, place: Place):
        self.place = place
        self.processes: list[subprocess.Popen[bytes]] = []
        self.session: SessionFolder | None = None

    def __enter__(self) -> FlowerRuntime:
        self.address = f"{HOST}:{_port(self.place.port)}"
        # The leash leads a process group that a Ctrl-C in the terminal does not reach; all others join it.
        self.session = SessionFolder(PREFIX, _short_temp_folder(), group=True)
        self.folder = self.session.path
        try:
            token_file(self.folder)
            self.env = environment(self.folder, self.place)
            for name in ("home", "work", "app"):
                (self.folder / name).mkdir()
            (self.folder / "home" / "config.toml").write_text(CONNECTION.format(address=self.address))
            (self.folder / "app" / "pyproject.toml").write_text(APP)
            if Path("data").is_dir():  # where bare names are looked up, beside FEDSIM_DATA
                (self.folder / "work" / "data").symlink_to(Path("data").resolve())
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    def submit(self, settings: dict[str, Any], app: Path | None = None) -> str:
        """Hands the app and the settings to the SuperLink and returns the run's id."""
        config = self.folder / "run-config.toml"
        # JSON within JSON is a TOML text: all of it is printable ASCII.
        config.write_text(f"config-json = {json.dumps(json.dumps(settings))}\n")
        source = app.resolve() if app else self.folder / "app"
        answer = self._flwr(
            "run", str(source), "--federation-config", self.place.federation(), "--run-config", str(config)
        )
        return str(answer["run-id"])

    def status(self, run_id: str) -> str:
        """Flower's word for where the run is: pending, starting, running, finished:completed|failed|stopped.

        Raises:
            RunError: if one of the two processes has ended by itself, or does not answer.
        """
        for _ in range(STATUS_ATTEMPTS - 1):  # a question that is not answered in time ends no run
            self._check_alive()
            with suppress(RunError):
                return self._ask_status(run_id)
        return self._ask_status(run_id)

    def stop(self, run_id: str) -> None:
        """Asks Flower to stop the run; what does not answer in time is ended with the group."""
        with suppress(RunError):
            self._flwr("stop", run_id, timeout_s=STOP_TIMEOUT_S)

    def log(self, run_id: str) -> str:
        """What the run said, as far as the SuperLink has it."""
        with suppress(RunError):
            return self._call("log", run_id, "--show")
        return ""

    def _start(self) -> None:
        secret = ("--superexec-auth-secret-file", str(self.folder / TOKEN))
        server = ("flower-superlink", "--insecure", "--simulation", "--isolation", "process", *secret)
        host, _, port = self.address.rpartition(":")
        superlink = self._popen((*server, "--host", host, "--port", port))
        health = urllib.request.Request(f"http://{self.address}/health")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        end = time.monotonic() + START_TIMEOUT_S
        while True:
            self._check_alive()
            with suppress(OSError):
                opener.open(health, timeout=1.0).close()
                break
            if time.monotonic() > end:
                raise RunError(f"the SuperLink did not answer on {self.address} within {START_TIMEOUT_S:g} s")
            time.sleep(POLL_S)
        parent = ("--parent-pid", str(superlink.pid))
        self._popen(("flower-superexec", "--insecure", "--runtime-api-address", self.address, *parent, *secret))

    def _popen(self, command: tuple[str, ...]) -> subprocess.Popen[bytes]:
        with private_files(), (self.folder / f"{command[0]}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                env={**self.env, UMASK: os.environ[UMASK]},
                cwd=self.folder / "work",  # Ray's workers import from here before anything else
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=self._group,
            )
        self.processes.append(process)
        return process

    def _check_alive(self) -> None:
        for process in self.processes:
            if process.poll() is not None:
                name = str(process.args[0])  # type: ignore[index]
                log = (self.folder / f"{name}.log").read_text(errors="replace")
                raise RunError(f"{name} ended with code {process.returncode}; {end_of(log)}")

    def _flwr(self, *arguments: str, timeout_s: float = COMMAND_TIMEOUT_S) -> dict[str, Any]:
        """Calls `flwr ... --format json` and returns what it says.

        Raises:
            RunError: with the reason when it fails or takes too long.
        """
        said = self._call(*arguments, "--format", "json", timeout_s=timeout_s)
        try:
            answer: dict[str, Any] = json.loads(said[said.index("{") :])
        except ValueError:
            answer = {}
        if not answer.get("success"):
            raise RunError(f"flwr {arguments[0]} failed: {answer.get('error-message') or said}")
        return answer

    def _ask_status(self, run_id: str) -> str:
        return str(self._flwr("ls", "--run-id", run_id)["runs"][0]["status"])

    def _call(self, *arguments: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        try:
            done = subprocess.run(
                ["flwr", *arguments],
                env=self.env,
                cwd=self.folder / "work",
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                process_group=self._group,
            )
        except (subprocess.TimeoutExpired, ProcessLookupError, PermissionError) as error:
            raise RunError(f"flwr {arguments[0]} did not answer: {error}") from error
        return done.stdout or done.stderr

    def _end(self) -> None:
        """Ends the group, first politely; then the folder and the leash go."""
        for number, wait_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, KILLED_S)):
            for pid in self._members():
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)
            if self._gone(wait_s):
                break
        if self.session is not None:
            self.session.remove()

    def _gone(self, wait_s: float) -> bool:
        end = time.monotonic() + wait_s
        while time.monotonic() < end:
            for process in self.processes:
                process.poll()  # collects it: a group lives as long as one of its processes is not collected
            if not self._members():
                return True
            time.sleep(0.02)
        return False

    @property
    def _group(self) -> int:
        assert self.session is not None
        return self.session.leash.pid

    def _members(self) -> list[int]:
        """The processes of the group, without the leash that leads it."""
        import psutil

        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if os.getpgid(process.pid) == self._group != process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
        return found


def end_of(log: str) -> str:
    """The last lines, as the end of a sentence."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return f"the end of its log: {' | '.join(lines[-TAIL_LINES:]) or '(empty)'}"


def _port(wanted: int) -> int:
    """The wanted port if it is free, or a free one for 0."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, wanted))
        except OSError as error:
            raise ConfigError(
                f"--superlink-port={wanted} is taken on {HOST} ({error.strerror}); leave it out to take a free port"
            ) from error
        return int(probe.getsockname()[1])


def _short_temp_folder() -> str:
    """A folder for temporary files whose name leaves room for Ray's sockets: those have 103 characters."""
    usual = tempfile.gettempdir()
    return usual if len(usual) <= 14 or not os.path.isdir("/tmp") else "/tmp"
