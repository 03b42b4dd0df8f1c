"""Runs each of the cases on stdin, a JSON map of name to overrides, on the CPU and on the pretended card of `card.py`.

Prints a JSON line for each: its name and what went wrong, empty where both gave the same bytes. A process of its own,
because torch counts the devices once.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from contextlib import nullcontext

import torch
from card import CARD, Card  # before anything that might run a backward pass

from clients import worker
from clients.app import serve
from fedsim.engines.base import assume_task_identity
from fedsim.engines.local import LocalEngine
from fedsim.report.rounds import HOST_FIELDS, weights_sha256
from fedsim.runs import federation
from fedsim.settings.build import build_world, pick_device
from fedsim.settings.compose import compose


def told(overrides: list[str], on_card: bool) -> str:
    """Everything that a run leaves but host seconds."""
    worker.worker_for.cache_clear()
    build_world.cache_clear()
    worker.pick_device = federation.pick_device = (lambda name, tf32=False: CARD) if on_card else pick_device
    with Card() if on_card else nullcontext():
        run = federation.Federation(build_world(json.dumps(compose(overrides))), LocalEngine(serve))
        rounds = [(dataclasses.asdict(report), [dataclasses.asdict(c) for c in rows]) for report, rows in run.rounds()]
    lines = [({key: v for key, v in report.items() if key not in HOST_FIELDS}, rows) for report, rows in rounds]
    return weights_sha256(run.arrays) + json.dumps(lines, default=str)


def wrong(overrides: list[str]) -> str:
    try:
        here, there = told(overrides, False), told(overrides, True)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "" if here == there else "the card gave other bytes than the CPU"


if __name__ == "__main__":
    torch.set_num_threads(1)
    assume_task_identity()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    for name, overrides in json.load(sys.stdin).items():
        print(json.dumps([name, wrong(overrides)]), flush=True)
