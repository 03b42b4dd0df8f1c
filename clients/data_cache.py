"""The prepared data of the clients that a worker has seen lately."""

from __future__ import annotations

from collections import OrderedDict

import torch

from fedsim.messages.weights import bytes_of
from fedsim.workloads.base import ClientData, Workload

CACHE_BYTES = 512 * 2**20  # of a process, on a CPU
SHARE_OF_CARD = 0.5  # of the memory that is free on a card when a process begins


class DataCache:
    """Examples on a device, ready for the network; the clients seen last stay.

    Args:
        workload: that makes them.
        device: where they will be used.
        memory_format: of images, as the network wants it.
    """

    def __init__(self, workload: Workload, device: torch.device, memory_format: str):
        self.workload, self.device, self.memory_format = workload, device, memory_format
        self.most_bytes = CACHE_BYTES
        if device.type == "cuda":
            self.most_bytes = int(SHARE_OF_CARD * torch.cuda.mem_get_info(device)[0])
        self._data: OrderedDict[tuple[int, int], ClientData] = OrderedDict()
        self._bytes = 0

    def of(self, client_id: int, part: int) -> ClientData:
        """What a client has while `part` lasts."""
        key = (client_id, part)
        if key in self._data:
            self._data.move_to_end(key)
            return self._data[key]
        raw = self.workload.client_part(client_id, part)
        data = self._data[key] = self.placed(raw)
        self._bytes += _bytes_of(data)
        while self._bytes > self.most_bytes and len(self._data) > 1:
            self._bytes -= _bytes_of(self._data.popitem(last=False)[1])
        return data

    def placed(self, raw: ClientData) -> ClientData:
        """The same data ready for the network, on its device."""
        train, test = (some.materialise(self.device, self.memory_format) for some in (raw.train, raw.test))
        return ClientData(train, test, raw.version)


def _bytes_of(data: ClientData) -> int:
    return bytes_of(data.train.tensors) + bytes_of(data.test.tensors)
