"""Measures this host at its best: its peak, its memory's bandwidth, its clock.

A measured figure is a floor of the true one, and these bound prices, so each figure is the best that was seen.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

PRODUCT_SIZES = (512, 1024)
ARRAY_MB = (64, 256)  # beyond what most caches hold
OF_PEAK = 1.1  # a large product of matrices reaches nine tenths of the peak, or more
TRIES = 12


@dataclass(frozen=True)
class HostFigures:
    """What a host reaches with some threads.

    Attributes:
        macs_per_s: the fastest product of matrices times 1.1.
        bytes_per_s: the fastest copy or read of large arrays.
        clock_ghz: that the system names, or None; a virtual machine names its nominal one.
        isa: arm, x86, or none where it is neither.
    """

    threads: int
    macs_per_s: float
    bytes_per_s: float
    clock_ghz: float | None
    isa: str

    def best(self, other: HostFigures) -> HostFigures:
        """Returns the better of two measurements of one host, figure by figure."""
        rates = max(self.macs_per_s, other.macs_per_s), max(self.bytes_per_s, other.bytes_per_s)
        return HostFigures(self.threads, *rates, self.clock_ghz, self.isa)


def measure_host(threads: int = 1) -> HostFigures:
    """Measures the peak and the bandwidth of torch's present threads; a second or two."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    rates = []
    for size in PRODUCT_SIZES:
        a, b = torch.ones(size, size), torch.ones(size, size)
        rates.append(size**3 / _best(lambda a=a, b=b: a @ b, clock))  # type: ignore[misc]
    moved = []
    for megabytes in ARRAY_MB:
        x = torch.ones(megabytes * 2**20 // 4)
        y = torch.ones_like(x)
        num_bytes = 2 * 4 * x.numel()  # read twice, or read and written
        moved.append(num_bytes / _best(lambda x=x, y=y: y.copy_(x), clock))  # type: ignore[misc]
        moved.append(num_bytes / _best(lambda x=x, y=y: torch.dot(x, y), clock))  # type: ignore[misc]
    return HostFigures(threads, OF_PEAK * max(rates), max(moved), _clock_ghz(), _isa(platform.machine()))


def _best(run: Callable[[], object], clock: Callable[[], float]) -> float:
    """Returns the seconds of the fastest run."""
    run()
    found = []
    for _ in range(TRIES):
        started = clock()
        run()
        found.append(clock() - started)
    return max(1e-9, min(found))


def _clock_ghz() -> float | None:
    import psutil

    try:
        known = psutil.cpu_freq()
    except (OSError, NotImplementedError, AttributeError):
        return None
    mhz = 0.0 if known is None else max(known.max or 0.0, known.current or 0.0)
    return round(mhz / 1e3, 3) if 100 <= mhz <= 10_000 else None  # some systems count in other units


def _isa(machine: str) -> str:
    name = machine.lower()
    if name in ("x86_64", "amd64", "i386", "i686"):
        return "x86"
    return "arm" if name.startswith(("arm", "aarch")) else "none"
