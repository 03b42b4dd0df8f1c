"""What a device pays for its front-end, such as a spectrogram: once a clip, or in every round where sounds change."""

from __future__ import annotations

import math

import torch

from clients.trainers.base import ClientContext
from devices.cost import ModelCost
from devices.meter import inference_memory_bytes
from fedsim.workloads.base import Workload

PREPARED = "front-end"  # in a client's state: the part whose features it keeps, held-out ones, has it the translator


class FrontEnd:
    """Reports the front-end of the clips that a client looks at, and the features that it keeps.

    A client makes the features of all of its clips when it first trains, or answers, and keeps them. Where its sounds
    are augmented, those that it trains on are made anew in every round, and not kept. One that judges a model before it
    has trained makes those of its held-out clips for that time. What translates spectrograms is fetched when a client
    first trains, kept, and run on a share of its clips in every round.
    """

    def __init__(self, workload: Workload):
        self.cost, self.translation, self.anew = workload.front_end, workload.translation, workload.recordings_change
        self.feature_bytes = 4 * math.prod(workload.input_shape)
        self.workload = workload

    def pay(self, client: ClientContext, phase: str) -> None:
        """Reports work, memory, storage and downloads of one client in an exchange.

        Args:
            client: its state says what it keeps, and is changed.
            phase: "train", "evaluate" or "query.<question>".

        Raises:
            OutOfMemoryError: when the device cannot hold what a clip takes.
        """
        if self.cost is None:
            return
        part, train, held = self.workload.part(client.round), len(client.data.train), len(client.data.test)
        before, kept, fetched = client.state[PREPARED].tolist() if PREPARED in client.state else (-1, 0, 0)
        new = max(0, held - kept)
        if phase != "evaluate":
            new += train if self.anew or before != part else 0
            before, kept = part, held
        self._run(client, self.cost, new)
        if self.translation is not None and phase == "train":
            self._run(client, self.translation, self.workload.num_translated(train))
            client.log.fetched_bytes = 0 if fetched else self.translation.parameter_bytes
            fetched = 1
        if before >= 0:
            client.log.features_bytes = self.feature_bytes * (kept + (0 if self.anew else train))
        if fetched and self.translation is not None:
            client.log.features_bytes += self.translation.parameter_bytes
        if phase != "evaluate":
            client.state[PREPARED] = torch.tensor([before, kept, fetched])

    def _run(self, client: ClientContext, cost: ModelCost, clips: int) -> None:
        """Reports that a network, or the front-end, runs on so many clips, one by one."""
        if clips:
            client.log.reserve(inference_memory_bytes(cost, 1))
            client.log.add(cost, 1, forwards=clips)
