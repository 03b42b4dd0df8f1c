"""What a device pays for its front-end, such as a spectrogram: once a clip, or in every round where sounds change."""

from __future__ import annotations

import math

import torch

from clients.trainers.base import ClientContext
from devices.meter import inference_memory_bytes
from fedsim.workloads.base import Workload

PREPARED = "front-end"  # in a client's state: the part whose features it keeps, and how many held-out ones


class FrontEnd:
    """Reports the front-end of the clips that a client looks at, and the features that it keeps.

    A client makes the features of all of its clips when it first trains, or answers, and keeps them. Where its sounds
    are augmented, those that it trains on are made anew in every round, and not kept. One that judges a model before it
    has trained makes those of its held-out clips for that time.
    """

    def __init__(self, workload: Workload):
        self.cost, self.anew = workload.front_end, workload.recordings_change
        self.feature_bytes = 4 * math.prod(workload.input_shape)
        self.workload = workload

    def pay(self, client: ClientContext, phase: str) -> None:
        """Reports work, memory and storage of one client in an exchange.

        Args:
            client: its state says what it keeps, and is changed.
            phase: "train", "evaluate" or "query.<question>".

        Raises:
            OutOfMemoryError: when the device cannot hold what a clip takes.
        """
        if self.cost is None:
            return
        part, train, held = self.workload.part(client.round), len(client.data.train), len(client.data.test)
        before, kept = client.state[PREPARED].tolist() if PREPARED in client.state else (-1, 0)
        new = max(0, held - kept)
        if phase != "evaluate":
            new += train if self.anew or before != part else 0
            client.state[PREPARED] = torch.tensor([part, held])
            client.log.features_bytes = self.feature_bytes * (held + (0 if self.anew else train))
        elif before >= 0:
            client.log.features_bytes = self.feature_bytes * (kept + (0 if self.anew else train))
        if new:
            client.log.reserve(inference_memory_bytes(self.cost, 1))
            client.log.add(self.cost, 1, forwards=new)
