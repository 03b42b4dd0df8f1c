"""What clients keep between rounds, in the driver's hands."""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import ArrayRecord

from fedsim.messages.records import OF_REPLY, record_of, tensors_of
from fedsim.workloads.base import Tensors


class ClientStore:
    """Tensors by client and name, stored at the end of an exchange; see `clients.state.ClientState`."""

    def __init__(self) -> None:
        self._states: dict[int, Tensors] = {}

    def get(self, client_id: int) -> Tensors:
        """What a client keeps, never changed; empty where that is nothing."""
        return self._states.get(client_id, {})

    def commit(self, client_id: int, state: Tensors, accepted: bool = True) -> None:
        """Stores a client's state; of a reply that was not accepted, without what is of the reply."""
        if not accepted:
            own = {name: t for name, t in state.items() if not name.startswith(OF_REPLY)}
            owed = {name: t for name, t in self.get(client_id).items() if name.startswith(OF_REPLY)}
            state = own | owed
        if state or client_id in self._states:
            self._states[client_id] = state

    def all(self) -> dict[int, Tensors]:
        """The states by client."""
        return dict(self._states)

    def packed(self) -> dict[int, ArrayRecord]:
        """The states for a checkpoint."""
        return {client_id: record_of(state) for client_id, state in self._states.items()}

    def restore(self, states: Mapping[int, ArrayRecord]) -> None:
        """Takes the states of a checkpoint, also of one that calls what is of the reply by its older names."""
        for client_id, state in states.items():
            self.commit(client_id, {_present_name(name): t for name, t in tensors_of(state).items()})

    def __len__(self) -> int:
        return len(self._states)


def _present_name(name: str) -> str:
    """The present name of a tensor in a client's state."""
    if name == "uplink.residual":
        return f"{OF_REPLY}residual"
    return f"{OF_REPLY}{name}" if name.startswith("pool_") else name
