"""The network of a worker: one object that is reused for every client, its weights in one buffer where they can be."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedsim.messages.weights import SentWeights, is_channels_last, join_storage, joined, joined_like
from fedsim.workloads.base import Tensors


class LiveModel:
    """A network and its weights as they lie in memory.

    Attributes:
        weights: live weights and buffers by name, detached.
        parameters: those that are trained.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self.model, self.device = model.to(device), device
        self._buffer = _join(self.model)
        self.weights: Tensors = dict(self.model.state_dict())
        self.parameters: list[Tensor] = [p for p in self.model.parameters() if p.requires_grad]
        self._assigned = [(m, n, t) for m in model.modules() for n, t in m.named_buffers(recurse=False)]
        self._beside = {n: t for n, t in model.named_buffers() if n not in self.weights}  # in no state dict
        self._as_built = [t.clone() for t in self._beside.values()]
        self._channels_last = self._buffer is not None and is_channels_last(self.weights.values())
        self._received: tuple[Tensors, Tensors] = ({}, {})  # as they came, and on the device
        self._joined: Tensor | None = None  # those on the device, joined as the model's are

    def blank(self) -> tuple[Tensors, Tensor | None]:
        """Returns tensors like the network's weights, without the numbers, and the buffer of all where there is one."""
        if self._buffer is None:
            return {name: torch.empty_like(t) for name, t in self.weights.items()}, None
        buffer, views, start = torch.empty_like(self._buffer), {}, 0
        for name, slot in self.weights.items():
            views[name] = buffer.as_strided(slot.shape, slot.stride(), start)
            start += slot.numel()
        return views, buffer

    def received(self, weights: Tensors) -> Tensors:
        """Broadcast weights on this worker's device; taken over once when the cohort shares them."""
        if not weights:
            return {}
        if self._received[0] is not weights:
            own, self._joined = self._laid_out(weights)
            self._received = (weights, own)
        return self._received[1]

    @torch.no_grad()
    def load(self, weights: Tensors) -> None:
        """Puts weights into the network.

        Args:
            weights: of `received`, perhaps with others in the place of some; nothing leaves the network as it is.

        Raises:
            ValueError: if they are not those of this network.
        """
        if not weights:
            return
        if weights.keys() != self.weights.keys():
            raise ValueError(f"the broadcast has weights {sorted(weights)}, the model {sorted(self.weights)}")
        self.put(weights, self._joined)

    @torch.no_grad()
    def put(self, weights: Tensors, buffer: Tensor | None) -> None:
        """Puts weights with the names of the network's into it, at once where they lie in a buffer like its own.

        What its state dict leaves out is as it was built: nothing of an earlier client stays.
        """
        for module, name, place in self._assigned:
            module._buffers[name] = place
        if self._beside:
            torch._foreach_copy_(list(self._beside.values()), self._as_built)
        if self._buffer is not None and buffer is not None:
            self._buffer.copy_(buffer)
        else:
            torch._foreach_copy_(list(self.weights.values()), [weights[name] for name in self.weights])

    @torch.no_grad()
    def take_in(self) -> None:
        """Brings buffers that the network has assigned anew (`self.mean = ...`) to where its weights lie."""
        for module, name, place in self._assigned:
            if (now := module._buffers[name]) is not place and now is not None:
                module._buffers[name] = place.copy_(now)

    def sent(self, weights: Tensors, broadcast: Tensors, stay: bool = False) -> SentWeights:
        """A copy of weights for the way back.

        Args:
            weights: of an update; the network's own are one copy.
            broadcast: as they came.
            stay: leave them on this device.
        """
        device = self.device if stay else "cpu"
        if weights is self.weights and self._buffer is not None and (stay or self._joined is not None):
            return joined(self._buffer, self._channels_last, device)
        return joined_like(weights, broadcast, self._channels_last, device)

    def _laid_out(self, weights: Tensors) -> tuple[Tensors, Tensor | None]:
        """A copy of the weights; where they fit the model's buffer, in one like it, which comes beside them."""
        fits = self._buffer is not None and list(weights) == list(self.weights)
        if not fits or any(weights[n].dtype != t.dtype or weights[n].shape != t.shape for n, t in self.weights.items()):
            return {name: t.to(self.device, copy=True) for name, t in weights.items()}, None
        views, buffer = self.blank()
        for name, view in views.items():
            view.copy_(weights[name])
        return views, buffer


def _join(model: nn.Module) -> Tensor | None:
    """Joins the model's weights in one buffer, in the order of its state dict; None if it cannot (tied weights)."""
    live = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    names = list(model.state_dict())
    return join_storage([live[name] for name in names]) if set(names) == set(live) else None
