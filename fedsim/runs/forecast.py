"""Forecasts roughly how long a run will take on this host, so that nobody waits for hours unannounced."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

from devices.errors import DeviceError
from fedsim.errors import DataError, ExitError, no_exit

if TYPE_CHECKING:
    from fedsim.runs.federation import Federation
    from fedsim.workloads.base import Workload

ANNOUNCED_S = 60.0  # shorter runs are simply waited for
STEP_S, CLIENT_S, FLOPS_PER_S = 3e-4, 1e-3, 1.5e10  # a step's calls, a client's messages, one core at small batches
FORWARD, STEP = 2, 6  # FLOPs of a multiply-add: judged, and trained forward and backward
MAX_INSPECTED = 8  # clients whose data are counted


def host_seconds(federation: Federation, after: int = 0) -> float:
    """Returns the time that training and judging will roughly take, from their steps and multiply-adds.

    What a method does beside its steps is not in it, nor what a second worker gains.

    Args:
        federation: before its first round.
        after: rounds that are behind it.
    """
    settings, workload = federation.settings, federation.world.workload
    trainer, rounds = settings.groups["trainer"], settings.rounds - after
    cohort = min(settings.cohort, workload.num_clients)
    ids = range(0, workload.num_clients, max(1, workload.num_clients // MAX_INSPECTED))
    sizes = [_examples(workload, i, after + 1) for i in islice(ids, MAX_INSPECTED)]
    size = sum(sizes) / len(sizes)
    batch = max(1, min(_number(trainer, "batch_size", 1), size))
    epochs = _number(trainer, "local_epochs", 1)
    steps = _number(trainer, "local_steps", epochs * -(-size // batch))
    judged = len(workload.test) * (rounds // settings.evaluate_every + 1.0)
    judged += rounds * settings.evaluate_clients / settings.evaluate_every * size
    macs = _macs(federation)
    per_round = cohort * (CLIENT_S + steps * (STEP_S + STEP * macs * batch / FLOPS_PER_S))
    return float(rounds * per_round + judged * FORWARD * macs / FLOPS_PER_S)


def sentence(seconds: float, checkpoint_s: float | None) -> str:
    """Returns what is said before a run that takes longer than a minute; empty before others.

    Args:
        seconds: as `host_seconds` has them.
        checkpoint_s: host seconds between checkpoints; None: there are none.
    """
    from devices.units import simulated

    if seconds < ANNOUNCED_S:
        return ""
    if checkpoint_s is None:
        after = "as checkpoint_s=null, fedsim resume would start it anew"
    else:
        often = f"at most one every {checkpoint_s:g} s" if checkpoint_s else "at most one a round"
        after = f"after Ctrl-C, fedsim resume goes on from the last checkpoint ({often})"
    return f"roughly {simulated(seconds)} of training on one core lie ahead; {after}"


def _number(settings: dict[str, Any], key: str, default: float) -> float:
    """Returns a setting of the trainer; the default where it has none, as trainers from elsewhere may."""
    value = settings.get(key)
    return default if isinstance(value, bool) or not isinstance(value, int | float) else value


def _examples(workload: Workload, client: int, round: int) -> int:
    """Counts the examples that a client trains on in a round; none where a task has nothing for it."""
    try:
        return len(workload.client_part(client, workload.part(round)).train)
    except DataError:
        return 0


def _macs(federation: Federation) -> float:
    """Returns the multiply-adds of one example; one per weight where the network cannot be traced."""
    from devices.trace import trace

    model, workload = federation.model, federation.world.workload
    try:
        with no_exit():
            return trace(model, workload.inputs(workload.sample(1))).macs
    except (DeviceError, ExitError):
        return float(sum(p.numel() for p in model.parameters()))
