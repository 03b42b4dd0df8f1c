"""Refuses what this host cannot hold, before it is made."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.errors import ConfigError, no_exit

if TYPE_CHECKING:
    import torch

UNITS = ((1e18, "EB"), (1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"))
CGROUP = Path("/sys/fs/cgroup/memory.max")
COPIES = 4  # of the weights at least: the server's, a client's, its gradients and what it sends
AT_ONCE = 2  # a layer's input and output are there together
CERTAINLY = 4  # what needs less than this part of the host fits


def host_bytes() -> int:
    """Returns the memory of this host, or what its container may take of it."""
    import psutil

    total = int(psutil.virtual_memory().total)
    try:
        limit = CGROUP.read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def check_fits(what: str, needed: float) -> None:
    """Refuses what this host cannot hold.

    Args:
        what: the setting, with its value.
        needed: bytes.

    Raises:
        ConfigError: with what is needed and what there is.
    """
    there = host_bytes()
    if needed > there:
        raise ConfigError(f"{what} needs {_size(needed)} of memory, and this host has {_size(there)}; take less")


def model_bytes(
    make: Callable[[], torch.nn.Module],
    inputs: Callable[[int], tuple[torch.Tensor, ...]],
    batch: int,
    refuse: Callable[[Exception], None] = lambda error: None,
) -> float:
    """Returns the least that training and judging a model takes, without making it; 0 where that cannot be known.

    Args:
        make: makes the model.
        inputs: makes what the model is fed, of so many examples.
        batch: examples that are judged at once.
        refuse: told what a network failed of that was run with one example.

    Raises:
        ConfigError: as `make` and `refuse` do.
    """
    import torch

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            with torch.device("meta"):
                network, one = make().eval(), inputs(1)
        except ConfigError:
            raise
        except Exception:  # a model that needs numbers, or is wrong: building it tells
            return 0.0
        tensors = list(chain(network.parameters(), network.buffers()))
        weights = float(sum(math.prod(t.shape) * t.element_size() for t in tensors))
        # Torch's shapes without numbers cost the import of its compiler, most of a second: a network that is surely
        # small is run with one example instead. No layer's output has more values a pixel than the layer has weights.
        at_most = weights * max(COPIES, sum(t.numel() for t in one))
        is_small = at_most < host_bytes() / CERTAINLY
        place, examples = ("cpu", 1) if is_small else ("meta", batch)
        largest = 0.0

        def look(module: Any, given: Any, answer: Any) -> None:
            nonlocal largest
            if isinstance(answer, torch.Tensor):
                largest = max(largest, float(math.prod(answer.shape) * answer.element_size()))

        with torch.device(place):
            try:
                with no_exit():
                    if is_small:
                        network = make().eval()
                    for module in network.modules():
                        module.register_forward_hook(look)
                    network(*inputs(examples))
            except ConfigError:
                raise
            except Exception:
                if is_small and (error := _fault(network, inputs(2))):  # a norm may want more than one
                    refuse(error)
    return COPIES * weights + AT_ONCE * largest * batch / examples


def _fault(network: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> Exception | None:
    """Returns what a forward pass fails of; None where it does not."""
    try:
        with no_exit():
            network(*inputs)
    except Exception as error:
        return error
    return None


def _size(count: float) -> str:
    for unit, name in UNITS:
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} bytes"
