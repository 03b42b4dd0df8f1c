"""Work on fixed tensors that is recorded once and done again by one call."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import torch

Work = Callable[[], None]  # reads and writes tensors that stay where they are, and decides nothing by their numbers
WARM_UPS = 2  # kernels are chosen and workspaces made when an operation first runs, which no recording may do


class Recorder(Protocol):
    """Makes one call of many.

    Attributes:
        freezes_numbers: what is no tensor is in a later call what it was when the work was recorded.
    """

    freezes_numbers: bool

    def record(self, work: Work) -> Work | None:
        """Returns what does the same work again; None where it cannot be recorded. May do it several times."""


class Repeater:
    """Records nothing: the work is done again as it was written, as on a CPU."""

    freezes_numbers = False

    def record(self, work: Work) -> Work:
        """Returns the work itself."""
        return work


class GraphRecorder:
    """Records CUDA graphs, which share the memory that they need in between.

    Args:
        stream: on which they are recorded and replayed: one at a time.
    """

    freezes_numbers = True

    def __init__(self, stream: torch.cuda.Stream):
        self.stream, self.pool = stream, torch.cuda.graph_pool_handle()
        self.failed: torch.cuda.CUDAGraph | None = None  # kept: torch's allocators go on asking it

    def record(self, work: Work) -> Work | None:
        """Returns the replay of a graph; None for work that waits for the host, or after a recording has failed."""
        if self.failed is not None:
            return None
        for _ in range(WARM_UPS):
            work()
        if waits_for_host(work):
            return None
        self.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            # `torch.cuda.graph` would collect garbage and empty torch's cache for every graph.
            graph.capture_begin(self.pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        except RuntimeError:
            self.failed = graph
            self._let_go()
            return None
        return graph.replay

    def _let_go(self) -> None:
        """Ends for all of torch a recording that has failed; before 2.12 it goes on for its allocator and generator.

        The former would free nothing more that two streams have used, the latter refuse all draws
        until another recording ends.
        """
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self.stream.device_index, self.pool)
        nothing = torch.zeros(1, device=self.stream.device)
        other = torch.cuda.CUDAGraph()
        other.capture_begin(capture_error_mode="thread_local")
        nothing.zero_()
        other.capture_end()


def waits_for_host(work: Work) -> bool:
    """Returns whether work that is done here once more makes the host wait for the card, which no recording may."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its search for waits a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError:  # it was done before without one
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False
