"""What a client keeps between rounds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsim.messages.weights import bytes_of
from fedsim.workloads.base import Tensors


class ClientState(Tensors):
    """Named tensors that stay on the device from round to round.

    They count as device storage, not as traffic. Keep them small: a coreset is indices, not images.

    What a trainer changes here in `fit` or `answer` stays with the client once its local work has ended, whether or not
    the server takes the reply: a personal model does not wait for a deadline. A round in which the client fails,
    crashes, runs out of memory or leaves before that leaves no trace, and what `evaluate` changes is never stored.
    Names that begin with OF_REPLY are for what must agree with the server's books, such as what a compressed update
    still owes: they are stored only when the server takes the reply, else the client has those it had before.
    """

    @classmethod
    def of(cls, kept: Mapping[str, Tensor]) -> ClientState:
        """Returns copies of what the client kept, to be changed in place."""
        return cls({name: t.clone() for name, t in kept.items()})

    @property
    def storage_bytes(self) -> int:
        """Counts its bytes on the device; what a faulty trainer puts beside tensors has none."""
        return bytes_of({name: t for name, t in self.items() if isinstance(t, Tensor)})

    def restored(self, group: str, initial: Mapping[str, Tensor]) -> Tensors:
        """Returns what `store` has put under `group`, on the devices of `initial`; `initial` where nothing is yet."""
        return {
            name: self[f"{group}.{name}"].to(t.device) if f"{group}.{name}" in self else t
            for name, t in initial.items()
        }

    def store(self, group: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps copies of tensors under `group`.

        Raises:
            FloatingPointError: if one holds NaN or infinity: it would stay with the client for ever.
        """
        for name, t in tensors.items():
            if not bool(torch.isfinite(t).all()):
                what = f"{name} of what it keeps holds NaN or infinite numbers"
                raise FloatingPointError(f"{what}; lower trainer.lr or set trainer.clip_norm")
            self[f"{group}.{name}"] = t.detach().clone()
