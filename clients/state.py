"""What a client keeps between rounds. May import: torch, fedsim.messages."""

from __future__ import annotations

from flwr.app import ArrayRecord

from fedsim.messages import record_of, tensors_of
from fedsim.workload import Tensors


class ClientState(Tensors):
    """Named tensors that stay on the device from round to round.

    They count as device storage, not as traffic. Keep them small: a coreset is indices, not images. What a trainer
    changes here is stored only when the server accepts the client's reply; a late or crashed round leaves no trace.
    """

    @classmethod
    def unpack(cls, record: ArrayRecord | None) -> ClientState:
        """The state that the driver keeps for this client; empty at first."""
        return cls(tensors_of(record) if record is not None else {})

    def pack(self) -> ArrayRecord:
        """The form that travels back with the reply."""
        return record_of(self)

    @property
    def storage_bytes(self) -> int:
        """Bytes on the device."""
        return sum(t.element_size() * t.numel() for t in self.values())
