"""The sides of `fedsim bench`, each in a process of its own: bare loops, and whole rounds of an engine.

A process of its own keeps what one side does to its process (allocator, garbage collector, loaded libraries) away from
the others. Sides work one at a time, when the bench tells them to.
"""

from __future__ import annotations

import json
import multiprocessing
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from fedsim.engines.base import Engine
from fedsim.errors import RunError
from fedsim.settings.groups import Settings

EngineFactory = Callable[[Settings], Engine]
START_TIMEOUT_S = 300.0


class Side(Protocol):
    """Something that can train one round after the other."""

    def round(self, number: int) -> int:
        """Trains one round; returns how many examples it went over."""

    def close(self) -> None:
        """Ends what the side has started."""


class PlainLoop:
    """The loop that everybody writes: copy the weights in, train, average; no messages, devices or reports.

    Args:
        settings: of the run; the model is contiguous whatever they say.
    """

    memory_format = "contiguous"

    def __init__(self, settings: Settings):
        import torch

        from fedsim.settings.build import build_world, pick_device
        from fedsim.settings.groups import FORMAT

        if FORMAT in settings["model"]:
            settings = {**settings, "model": {**settings["model"], FORMAT: self.memory_format}}
        world = build_world(json.dumps(settings))
        self.workload, self.cohort = world.workload, world.settings.cohort
        trainer = world.settings.groups["trainer"]
        self.lr, self.batch_size = trainer["lr"], trainer["batch_size"]
        torch.set_num_threads(world.settings.engine.threads)
        self.device = pick_device(world.settings.engine.device, world.settings.engine.tf32)
        self.model = self.workload.build_model().to(self.device)
        self.weights = {name: t.clone() for name, t in self.model.state_dict().items()}
        clients = range(self.workload.num_clients)
        self.data = [self.workload.client_data(c).train.materialise(self.device, self.memory_format) for c in clients]

    def round(self, number: int) -> int:
        """Trains a cohort and averages what it learnt; returns how many examples that were."""
        import torch

        from fedsim.seeding import torch_generator

        shuffle = torch_generator(number, "plain")
        cohort = torch.randperm(self.workload.num_clients, generator=shuffle)[: self.cohort].tolist()
        self.weights = self.mean_of(cohort, shuffle)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return sum(len(self.data[client]) for client in cohort)

    def mean_of(self, cohort: list[int], shuffle: Any) -> Any:
        """Trains each client of a cohort and returns the mean of their weights, by name."""
        import torch

        sums = {name: torch.zeros_like(t) for name, t in self.weights.items()}
        for client_id in cohort:
            self.model.load_state_dict(self.weights)
            self.train(self.data[client_id], shuffle)
            for name, t in self.model.state_dict().items():
                sums[name] += t / len(cohort)
        return sums

    def train(self, data: Any, shuffle: Any) -> None:
        """Trains the model for one epoch."""
        import torch

        optimiser = torch.optim.SGD(self.model.parameters(), self.lr)
        for rows in torch.randperm(len(data), generator=shuffle).split(self.batch_size):
            optimiser.zero_grad()
            self.workload.loss(self.model, data.gather(rows)).backward()
            optimiser.step()

    def close(self) -> None:
        """Does nothing: a loop has no process and no file."""


class FastLoop(PlainLoop):
    """The same loop as fast as it gets by hand: channels last, gradients asked for directly, one update for all."""

    memory_format = "channels_last"

    def train(self, data: Any, shuffle: Any) -> None:
        """Trains the model for one epoch."""
        import torch

        parameters: list[Any] = list(self.model.parameters())
        for rows in torch.randperm(len(data), generator=shuffle).split(self.batch_size):
            loss = self.workload.loss(self.model, data.gather(rows))
            gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
            with torch.no_grad():
                torch._foreach_add_(parameters, gradients, alpha=-self.lr)


class CapturedLoop(PlainLoop):
    """The same steps on a card as fast as they get by hand: 32 clients on 16 streams, a step of all one CUDA graph.

    Clients are equal, and their examples fill whole batches; one at a time copies its weights in and out.
    """

    CLIENTS, STREAMS = 32, 16

    def __init__(self, settings: Settings):
        import torch

        super().__init__(settings)
        example = {name: t[: self.batch_size].clone() for name, t in self.data[0].tensors.items()}
        self.models = [self.workload.build_model().to(self.device) for _ in range(self.CLIENTS)]
        self.batches = [{name: t.clone() for name, t in example.items()} for _ in self.models]
        streams = [torch.cuda.Stream() for _ in range(self.STREAMS)]
        self.graph = torch.cuda.CUDAGraph()
        main = torch.cuda.Stream()
        with torch.cuda.stream(main):
            for _ in range(3):
                self._steps(streams, main)
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph, stream=main):
            self._steps(streams, main)

    def _steps(self, streams: Any, main: Any) -> None:
        """Takes a step of every client, each on a stream."""
        import torch

        for stream in streams:
            stream.wait_stream(main)
        for number, (model, batch) in enumerate(zip(self.models, self.batches, strict=True)):
            with torch.cuda.stream(streams[number % len(streams)]):
                parameters: list[Any] = list(model.parameters())
                gradients = torch.autograd.grad(self.workload.loss(model, batch), parameters)
                with torch.no_grad():
                    torch._foreach_add_(parameters, gradients, alpha=-self.lr)
        for stream in streams:
            main.wait_stream(stream)

    def mean_of(self, cohort: list[int], shuffle: Any) -> Any:
        """Trains the clients of a cohort 32 at a time and returns the mean of their weights, by name."""
        import torch

        sums = {name: torch.zeros_like(t) for name, t in self.weights.items()}
        for first in range(0, len(cohort), self.CLIENTS):
            some = cohort[first : first + self.CLIENTS]
            rows = [torch.randperm(len(self.data[c]), generator=shuffle).to(self.device) for c in some]
            for model in self.models[: len(some)]:
                model.load_state_dict(self.weights)
            for step in range(len(self.data[some[0]]) // self.batch_size):
                places = slice(step * self.batch_size, (step + 1) * self.batch_size)
                for client, order, batch in zip(some, rows, self.batches, strict=False):
                    for name, t in batch.items():
                        torch.index_select(self.data[client].tensors[name], 0, order[places], out=t)
                self.graph.replay()
            for model in self.models[: len(some)]:
                for name, t in model.state_dict().items():
                    sums[name] += t / len(cohort)
        return sums


class EngineRounds:
    """Whole rounds of a federation, reports included; only evaluation is left out.

    Args:
        make_engine: builds the engine that the settings name; a module-level function.
        folder: new, for the reports.
    """

    def __init__(self, settings: Settings, make_engine: EngineFactory, folder: Path):
        from fedsim.report.folder import RunFolder
        from fedsim.runs.federation import Federation
        from fedsim.settings.build import build_world

        self.engine = make_engine(settings)
        self.federation = Federation(build_world(json.dumps(settings)), self.engine)
        self.folder = RunFolder(folder, settings)
        self.engine.start()

    def round(self, number: int) -> int:
        """Runs and writes a training round; in round 0 clients only judge, so that their data are drawn and cached."""
        if number == 0:
            for _ in range(3):  # with two workers, seven of eight data sets are then where they are needed
                self.federation.ask_clients(0)
            return 0
        started, start_s = time.perf_counter(), self.federation.grid.clock.now_s
        report, clients = self.federation.report(number, start_s, self.federation.train(number), started)
        self.folder.add(report, clients)
        return sum(client.num_examples for client in clients)

    def close(self) -> None:
        """Closes the run folder and ends the engine's processes."""
        self.folder.close()
        self.engine.close()


class SideProcess:
    """A side in its own process, from here: told what to do, and measured.

    Args:
        make: called in the new process with `arguments`; a class or function of a module.

    Attributes:
        start_s: host seconds from the process's imports to the first round.
        idle_bytes: resident memory of the process when it was ready.
    """

    def __init__(self, make: Callable[..., Side], *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments))
        self._process.start()
        theirs.close()
        self.start_s, self.idle_bytes = self._answer(START_TIMEOUT_S)

    def round(self, number: int) -> tuple[float, float, float]:
        """Runs a round; returns host seconds, CPU seconds of the process and all its children, and examples."""
        self._pipe.send(number)
        seconds, cpu_s, examples = self._answer()
        return seconds, cpu_s, examples

    def close(self) -> int:
        """Ends the process; the most resident memory that it had, in bytes (its children's is not in it)."""
        self._pipe.send(None)
        (peak_bytes,) = self._answer()
        self._process.join()
        return int(peak_bytes)

    def kill(self) -> None:
        """Ends the process whatever it does."""
        with suppress(OSError):
            self._pipe.close()  # it ends its engine when it notices
        self._process.join(10)
        self._process.kill()

    def _answer(self, timeout_s: float | None = None) -> tuple[float, ...]:
        try:
            if not self._pipe.poll(timeout_s):
                raise RunError(f"a side of the bench did not start within {timeout_s:g} s")
            answer: tuple[float, ...] | BaseException = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise RunError("a side of the bench ended without a word; was it out of memory?") from error
        if isinstance(answer, BaseException):
            raise answer
        return answer


def _serve(pipe: Connection, make: Callable[..., Side], arguments: tuple[Any, ...]) -> None:
    import resource
    import signal
    import sys

    import psutil

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the bench, which closes the pipe
    me, side = psutil.Process(), None
    try:
        started = time.perf_counter()
        side = make(*arguments)
        pipe.send((time.perf_counter() - started, me.memory_info().rss))
        while (number := pipe.recv()) is not None:
            # Looking for them takes milliseconds, so it is not done between the two readings.
            family = [me, *me.children(recursive=True)]
            cpu_s, started = _cpu_s(family), time.perf_counter()
            examples = side.round(number)
            pipe.send((time.perf_counter() - started, _cpu_s(family) - cpu_s, examples))
        unit = 1 if sys.platform == "darwin" else 1024
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        side.close()
        side = None
        pipe.send((peak_bytes,))
    except EOFError:
        pass
    except Exception as error:
        error.traceback = traceback.format_exc()  # type: ignore[attr-defined]
        with suppress(OSError):
            pipe.send(error)
    finally:
        if side is not None:
            side.close()


def _cpu_s(processes: list[Any]) -> float:
    """Returns the CPU seconds of these processes so far."""
    import psutil

    total = 0.0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total
