"""Work on fixed tensors that is recorded once and done again by one call."""

from __future__ import annotations

from collections.abc import Callable
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

    def record(self, work: Work) -> Work | None:
        """Returns the replay of a graph; None for work that waits for the host, or draws from torch's generator."""
        generator = torch.cuda.default_generators[self.stream.device_index]
        before = generator.get_state()
        for _ in range(WARM_UPS):
            work()
        if not torch.equal(before, generator.get_state()):
            return None  # its draws would depend on the replays before it
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
            return None
        return graph.replay
