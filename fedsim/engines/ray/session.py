"""Ray for the time of a run: a private instance that nobody else can reach, or a cluster that already stands.

`ray.init` does more than is wanted here: it takes the handler of SIGTERM, may join any cluster that it finds, listens
on every interface, tries for minutes when nobody answers.
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from devices.errors import one_line
from fedsim.engines.session_folder import SessionFolder, private_files, token_file
from fedsim.errors import RunError

FIRST_QUESTION = "/ray.rpc.NodeInfoGcsService/GetClusterId"  # a client's, to the cluster
ANSWER_S = 5.0  # host seconds within which a cluster must answer
# Of a private instance. Replies below 8 MiB go within Ray's own messages, for a quarter of the CPU time of shared
# memory; objects in it are freed at once, or the next ones touch fresh pages, of which every process maps its share.
# Ray would make workers 15 nicer than this process: beside any other load they would hardly get on.
SYSTEM = {"max_direct_call_object_size": 2**23, "free_objects_batch_size": 1, "worker_niceness": 0}
PREFIX = "fedsim-ray-"
LONGEST_FOLDER = 14  # characters; the paths of Ray's sockets add 89, and macOS allows 103
HELPERS = ("monitor", "log_monitor", "dashboard")  # Ray's names; of no use without a cluster, dashboard and shown logs
NEEDED = ("raylet", "gcs_server")  # Ray's names, too
GONE_S = 1.0  # host seconds that processes get to end by themselves


class RaySession:
    """A connection of this process to Ray. `close` ends what was started for it and nothing else.

    Args:
        address: HOST:PORT of a cluster, "auto" for the one on this machine, None for a private instance.
        num_cpus: CPUs that a private instance may hand out.

    Attributes:
        private: whether Ray runs for this session alone.

    Raises:
        RunError: when no cluster answers at the address, or Ray cannot be started.
    """

    def __init__(self, address: str | None, num_cpus: int):
        import ray

        self.private, self._joined = False, False
        self._folder: SessionFolder | None = None
        if ray.is_initialized():  # by whoever uses fedsim as a library: theirs to shut down
            return
        try:
            with _quiet():
                if address is None:
                    self._start(num_cpus)
                else:
                    self._join(address)
            _show_raylets_errors(False)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Leaves a cluster; ends a private instance with every process of it, within seconds."""
        import psutil
        import ray

        if not self.private and not self._joined:
            return
        processes = self._processes() if self.private else []
        self.private = self._joined = False
        if ray.is_initialized():
            ray.shutdown()
            _show_raylets_errors(True)
        else:  # it was interrupted
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        _end(processes)
        if self._folder is not None:
            self._folder.remove()
            self._folder = None
        _read_token_anew()

    def check(self) -> None:
        """Notices at once that Ray itself has died here; Ray would wait for it for a minute, or end this process.

        Raises:
            RunError: names what has ended.
        """
        from ray._private.worker import _global_node

        processes: dict[str, list[Any]] = _global_node.all_processes if self.private and _global_node else {}
        for kind in NEEDED:
            if any(info.process.poll() is not None for info in processes.get(kind, ())):
                raise RunError(f"Ray's {kind} has ended (killed, or out of memory), and no worker can go on without it")

    def _processes(self) -> list[Any]:
        """Every process of the private instance, also of one that was interrupted while it started."""
        import psutil

        if self._folder is None:
            return []
        found, path = [], str(self._folder.path)
        for child in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                if child.pid != self._folder.leash.pid and any(path in part for part in child.cmdline()):
                    found += [child, *child.children(recursive=True)]
        return found

    def _start(self, num_cpus: int) -> None:
        import ray

        self.private = True
        # A folder of its own: Ray's usual one is never emptied, and tells others which cluster to join.
        self._folder = SessionFolder(PREFIX, _short_folder())
        with _on_loopback(), _with_token(self._folder.path), private_files():
            try:
                ray.init(
                    address="local",
                    num_cpus=num_cpus,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.CRITICAL,
                    _temp_dir=str(self._folder.path / "ray"),  # Ray opens it, and all below, to everybody
                    _system_config=dict(SYSTEM),  # Ray writes this session's folder into it
                )
            except Exception as error:  # Ray raises that very class, too, where its raylet ends while it starts
                raise RunError(f"Ray could not be started: {one_line(error)}") from error
        _end_helpers()

    def _join(self, address: str) -> None:
        import ray

        _read_token_anew()
        where = answering(address)
        try:
            ray.init(address=where, log_to_driver=False, logging_level=logging.CRITICAL)
        except Exception as error:  # such as another version of Ray or Python
            reason = one_line(error)
            raise RunError(f"the Ray cluster at engine.address={address} cannot be used: {reason}") from error
        self._joined = True


def answering(address: str) -> str:
    """HOST:PORT of a cluster that answers: `ray.init` would try for minutes, and not be interrupted.

    Raises:
        RunError: if nobody answers, or it asks for a token that this process does not have.
    """
    import grpc  # type: ignore[import-untyped]
    from ray._private.authentication.grpc_authentication_client_interceptor import (
        SyncAuthenticationMetadataClientInterceptor,
    )
    from ray._private.services import canonicalize_bootstrap_address
    from ray.exceptions import AuthenticationError

    start = "start one with ray start --head, or leave engine.address out to use this machine alone"
    try:
        where = canonicalize_bootstrap_address(address)
    except (ConnectionError, ValueError) as error:
        raise RunError(f"no Ray cluster was found for engine.address={address}; {start}") from error
    with grpc.insecure_channel(where, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=ANSWER_S)
        except grpc.FutureTimeoutError:
            raise RunError(f"no Ray cluster answers at engine.address={address}; {start}") from None
        try:
            metadata = SyncAuthenticationMetadataClientInterceptor()
            ask = grpc.intercept_channel(channel, metadata).unary_unary(FIRST_QUESTION)
            ask(b"", timeout=ANSWER_S)
        except (grpc.RpcError, AuthenticationError) as error:
            code = error.code() if isinstance(error, grpc.RpcError) else grpc.StatusCode.UNAUTHENTICATED
            if code == grpc.StatusCode.UNAUTHENTICATED:  # others are for `ray.init` to judge
                raise RunError(
                    f"the Ray cluster at engine.address={address} asks for its token: set RAY_AUTH_MODE=token and "
                    "RAY_AUTH_TOKEN_PATH (a file with it), or RAY_AUTH_TOKEN, as on its machines"
                ) from None
    return str(where)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Ray from talking to the user and to its makers, and from taking the signals."""
    with _environment(RAY_USAGE_STATS_ENABLED="0"), warnings.catch_warnings(), _signals_kept():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Lets Ctrl-C and SIGTERM do what they did before `ray.init`, also while it runs.

    Ray takes the handler of SIGTERM, and this process crashes at its end when an exception cuts short the last half
    second, in which it connects: a signal waits for that.
    """
    from ray._private import utils, worker

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    before = {number: handler for number, handler in before.items() if handler not in (None, signal.SIG_IGN)}
    came: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        came.append(number)
        while frame is not None:
            if frame.f_code.co_name == "connect" and frame.f_code.co_filename == worker.__file__:
                return
            frame = frame.f_back
        raise KeyboardInterrupt  # the one exception that Ray's C++ lets through

    take, utils.set_sigterm_handler = utils.set_sigterm_handler, lambda _: None
    try:
        for number in before:
            signal.signal(number, handle)
        yield
    finally:
        utils.set_sigterm_handler = take
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def _show_raylets_errors(shown: bool) -> None:
    """Whether Ray prints a paragraph on stdout for every worker that dies; the switch is that of its debugger."""
    from ray._private import worker

    worker._worker_logs_enabled = shown


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Lets nothing of Ray listen beyond this machine.

    Ray binds to loopback when its node has the loopback address. It does not take that as an argument, but gives it to
    itself on Windows and macOS; this is the switch between the two, for this process and for those that it starts.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        with _environment(**{ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}):
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _with_token(folder: Path) -> Iterator[None]:
    """Lets only who has a token of this session speak to Ray; it is in a file that only this user can read."""
    with _environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token_file(folder)), RAY_AUTH_TOKEN=None):
        _read_token_anew()
        yield


def _read_token_anew() -> None:
    """Lets Ray forget the token and the mode that it has read from the environment: another session has others."""
    from ray import _raylet

    raylet: Any = _raylet
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _environment(**changed: str | None) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changed}
    _set(changed)
    try:
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _short_folder() -> str:
    folder = tempfile.gettempdir()
    return folder if len(folder) <= LONGEST_FOLDER or not os.path.isdir("/tmp") else "/tmp"


def _end_helpers() -> None:
    """Ends what a private instance does not need: 270 MB, and a second of every shutdown."""
    from ray._private.worker import _global_node

    processes: dict[str, list[Any]] = _global_node.all_processes if _global_node else {}
    for kind in HELPERS:
        for info in processes.pop(kind, []):
            info.process.kill()
            info.process.wait()


def _end(processes: list[Any]) -> None:
    """Waits for processes that are about to end, and kills those that do not."""
    import psutil

    _, alive = psutil.wait_procs(processes, timeout=GONE_S)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=GONE_S)
