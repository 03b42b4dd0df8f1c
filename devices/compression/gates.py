"""Gates that switch the channels of a network by its inputs, and masks from a few examples of one user.

Source: Kim et al., "Prototype-based Personalized Pruning", ICASSP 2021, reconstructed from its abstract and that of a
patent (US 12 505 348 B2), which covers the idea: no figure here is the paper's. The shape of a gate module follows
ConvNet-AIG, from memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from devices.compression.channel_graph import CONVOLUTIONS, TRANSPOSED, ChannelGroup, Coupling
from devices.compression.channels import ChannelGroups, Kept
from devices.errors import DeviceError, unknown

MODES = ("threshold", "topk")
LAYERS = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
LEAST_HIDDEN = 8
OPEN = 1.0  # bias of a fresh gate: sigmoid(1) = 0.73, so that all channels begin as kept
THRESHOLD = 0.5

Switch = Callable[[str, Tensor], Tensor]  # a group and its pooled inputs [batch, in] to gates [batch or 1, units]


def hard(soft: Tensor) -> Tensor:
    """Returns 1 where a soft gate is above one half, else 0, with the soft gate's gradient (straight through)."""
    return (soft > THRESHOLD).to(soft.dtype) + (soft - soft.detach())  # the bracket is exactly 0


class Gates(nn.Module):
    """One small network per gated group: a(x) = W2 ReLU(W1 pool(x) + b1) + b2, where x is what its layer is fed.

    Groups that one layer makes are gated: the channels of a residual sum come from several layers and always stay, as
    do inputs and outputs of the network. Channels that a group norm takes together share a gate. A gate acts where its
    channels are read, behind norms, activations and pooling, so a closed gate is a removed channel exactly.

    Args:
        model: the dense network.
        groups: its channel groups.
        hidden: r, units of the hidden layer, or one number per gated group; None is max(8, inputs / 4).
        conditioned: the keep ratio is one more input, so that one set of gates serves several budgets.

    Attributes:
        names: of the gated groups, in the order of the network.

    Raises:
        DeviceError: if no group can be gated.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: ChannelGroups,
        hidden: int | Sequence[int] | None = None,
        conditioned: bool = False,
    ):
        super().__init__()
        self.groups, self.conditioned = groups, conditioned
        self.names = [name for name, group in groups.groups.items() if _made_by_one(model, group)]
        if not self.names:
            raise DeviceError(
                f"network {type(model).__name__} has no channels to gate: all that could go are parts of residual sums"
            )
        self.sites = nn.ModuleDict()
        self.mlps = nn.ModuleDict()
        for layer in self._layers():
            self.sites[_key(layer)] = _Site(model.get_submodule(layer), layer, groups, self.names)
        for number, name in enumerate(self.names):
            inputs, width = (
                self.site(name).inputs,
                hidden if hidden is None or isinstance(hidden, int) else hidden[number],
            )
            width = max(LEAST_HIDDEN, inputs // 4) if width is None else width
            mlp = nn.Sequential(nn.Linear(inputs + conditioned, width), nn.ReLU(), nn.Linear(width, self.units(name)))
            nn.init.constant_(mlp[2].bias, OPEN)  # type: ignore[arg-type]
            self.mlps[_key(name)] = mlp

    @classmethod
    def like(cls, tensors: Mapping[str, Tensor], model: nn.Module, groups: ChannelGroups) -> Gates:
        """Builds gates from tensors: their shapes say how wide each gate is and whether it is conditioned."""
        first = next(t for name, t in tensors.items() if name.endswith(".0.weight"))
        widths = [t.shape[0] for name, t in tensors.items() if name.endswith(".0.weight")]
        plain = cls(model, groups, widths)
        conditioned = first.shape[1] > plain.site(plain.names[0]).inputs
        gates = cls(model, groups, widths, True) if conditioned else plain
        gates.load_state_dict(dict(tensors))
        return gates

    def units(self, name: str) -> int:
        """Returns how many gates a group has."""
        group = self.groups.groups[name]
        return group.channels // group.unit

    def site(self, layer: str) -> _Site:
        """Returns the input of a layer."""
        return self.sites[_key(layer)]  # type: ignore[return-value]

    def soft(self, name: str, pooled: Tensor, ratio: float, noise: torch.Generator | None = None) -> Tensor:
        """Returns e(x) = sigmoid(a(x)) of a group, [batch, units].

        Args:
            name: of the group.
            pooled: its layer's inputs, averaged over space or time, [batch, in].
            ratio: the keep ratio to aim at; read by conditioned gates only.
            noise: draws logistic noise that is added to a, in training.
        """
        pooled = pooled.to(next(self.mlps[_key(name)].parameters()).dtype)  # of gates, whatever the network's own
        if self.conditioned:
            pooled = torch.cat([pooled, pooled.new_full((len(pooled), 1), ratio)], 1)
        logits = self.mlps[_key(name)](pooled)
        if noise is not None:
            u = torch.rand(logits.shape, generator=noise).clamp(1e-6, 1 - 1e-6).to(logits.device)
            logits = logits + (u / (1 - u)).log()
        return torch.sigmoid(logits)

    def choose(self, name: str, prototype: Tensor, ratio: float, mode: str, held: Tensor | None = None) -> Tensor:
        """Chooses the mask of a group, [units] bool.

        Args:
            name: of the group.
            prototype: mean soft gates, [units].
            ratio: for "topk": the highest ceil(ratio x units) stay, of equal ones the first; "threshold" takes those
                above one half, or the highest where there is none.
            mode: one of MODES.
            held: units to choose from; all of them when None.
        """
        if mode not in MODES:
            raise DeviceError(unknown("mask mode", mode, MODES))
        if held is not None:
            prototype = prototype.masked_fill(~held, -1.0)
        mask = prototype > THRESHOLD
        if mode == "topk" or not bool(mask.any()):
            count = self.groups.count(name, ratio) // self.groups.groups[name].unit if mode == "topk" else 1
            count = min(count, int(held.sum())) if held is not None else count
            best = prototype.argsort(descending=True, stable=True)[:count]
            mask = torch.zeros_like(mask).index_fill_(0, best, True)
        return mask

    def kept(self, masks: Mapping[str, Tensor]) -> Kept:
        """Returns the channels that masks of units leave; those of groups without gates all stay."""
        kept = self.groups.all()
        for name, mask in masks.items():
            kept[name] = mask.cpu().repeat_interleave(self.groups.groups[name].unit).nonzero().flatten()
        self.groups.check(kept)
        return kept

    def masks(self, kept: Kept) -> dict[str, Tensor]:
        """Returns the masks that leave these channels, by gated group, [units] bool."""
        whole = self.groups.mask_of(kept)
        return {name: whole[name][:: self.groups.groups[name].unit] for name in self.names}

    def at_ratio(self, ratio: float) -> Kept:
        """Returns the first channels of gated groups at a ratio, and all others: the sizes of every "topk" mask."""
        kept = self.groups.all()
        kept.update({name: torch.arange(self.groups.count(name, ratio)) for name in self.names})
        return kept

    def keep_ratio(self, kept: Kept) -> float:
        """Returns the share of gated channels that stay."""
        every = sum(self.groups.groups[name].channels for name in self.names)
        return sum(len(kept[name]) for name in self.names) / every

    def _layers(self) -> list[str]:
        """Lists the layers that make or read gated channels."""
        found = {c.layer: None for name in self.names for c in self.groups.groups[name].couplings if c.side != "both"}
        return list(found)


class GatedNetwork(nn.Module):
    """A network, dense or already narrowed, run under gates; its own module stays as it is.

    Args:
        network: the network.
        gates: of the dense one.
        kept: the channels that `network` has; None is all.

    Attributes:
        switch: says what the gates of each group are.
    """

    switch: Switch

    def __init__(self, network: nn.Module, gates: Gates, kept: Kept | None = None):
        super().__init__()
        self.network, self.gates = network, gates
        self.training = network.training
        self.places = nn.Module()  # of each gated layer, which of its dense inputs are there
        self.held = dict(gates.masks(kept).items()) if kept is not None else {}
        indices = gates.groups.indices(kept) if kept is not None else {}
        for key, site in gates.sites.items():
            index = indices.get(f"{site.layer}.weight", {}).get(site.dim)  # type: ignore[call-overload]
            place = index if index is not None and len(index) < site.size else None  # type: ignore[operator]
            device = site.source.device
            self.places.register_buffer(key, place if place is None else place.to(device), persistent=False)
        self.switch = PerSample(gates, 1.0)

    def through(self, switch: Switch) -> GatedNetwork:
        """Sets other gates and returns the network."""
        self.switch = switch
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Returns what the network gives for x under its gates, which are read in the order in which layers run."""
        values: dict[str, Tensor] = {}
        handles = [
            self.network.get_submodule(site.layer).register_forward_pre_hook(  # type: ignore[arg-type]
                partial(self._at, cast(_Site, site), getattr(self.places, key), values)
            )
            for key, site in self.gates.sites.items()
        ]
        try:
            outputs: Tensor = self.network(x)
            return outputs
        finally:
            for handle in handles:
                handle.remove()

    def _at(
        self, site: _Site, place: Tensor | None, values: dict[str, Tensor], _: nn.Module, given: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        """Closes the gates of what a layer reads, then asks for the gates of what it makes."""
        x = given[0]
        if site.reads:
            read = [values[name] for name in site.reads]
            gates = torch.cat([*read, read[0].new_ones(len(read[0]), 1)], 1)
            source = site.source if place is None else site.source[place]
            x = x * site.spread(gates[:, source], x).to(x.dtype)
        if site.makes:
            values[site.makes] = self.switch(site.makes, site.pooled(x, place))
        return (x, *given[1:])


class _Site(nn.Module):
    """The input of one layer: which gates act on each of its entries, and how it is pooled for the layer's own gates.

    Attributes:
        source: by entry, its gate among those of `reads` one behind the other; behind them stands one that is open.
        pool: by entry, which pooled input it belongs to: a map that was flattened is pooled as the map was.
        share: by pooled input, one over its entries.
    """

    source: Tensor
    pool: Tensor
    share: Tensor

    def __init__(self, module: nn.Module, layer: str, groups: ChannelGroups, gated: list[str]):
        super().__init__()
        self.layer, self.linear = layer, isinstance(module, nn.Linear)
        self.size: int = module.in_features if self.linear else module.in_channels  # type: ignore[assignment]
        self.dim = int(not isinstance(module, TRANSPOSED))
        self.makes = next((n for n in gated if any(_is(c, layer, "out") for c in groups.groups[n].couplings)), "")
        self.reads = [n for n in gated if any(_is(c, layer, "in") for c in groups.groups[n].couplings)]
        units = {name: groups.groups[name].channels // groups.groups[name].unit for name in self.reads}
        source, pool, start = torch.full((self.size,), sum(units.values())), torch.arange(self.size), 0
        for name, group in groups.groups.items():
            for coupling in group.couplings:
                if _is(coupling, layer, "in"):
                    pool[coupling.entries] = coupling.entries[:, :1].expand_as(coupling.entries)
                    if name in units:
                        unit = torch.arange(group.channels) // group.unit
                        source[coupling.entries] = (start + unit)[:, None].expand_as(coupling.entries)
            start += units.get(name, 0)
        _, pool, counts = pool.unique(return_inverse=True, return_counts=True)
        self.inputs = len(counts)
        self.register_buffer("source", source, persistent=False)
        self.register_buffer("pool", pool, persistent=False)
        self.register_buffer("share", 1.0 / counts, persistent=False)

    def spread(self, gates: Tensor, x: Tensor) -> Tensor:
        """Returns gates by entry [batch, in] in the shape that multiplies x."""
        middle = [1] * (x.dim() - 2)
        return gates.view(len(gates), *middle, -1) if self.linear else gates.view(len(gates), -1, *middle)

    def pooled(self, x: Tensor, place: Tensor | None) -> Tensor:
        """Returns the mean of each input over space or time, [batch, inputs]; removed inputs count as 0."""
        if x.dim() > 2:
            x = x.mean(tuple(range(1, x.dim() - 1)) if self.linear else tuple(range(2, x.dim())))
        if self.inputs == self.size and place is None:
            return x
        pool = self.pool if place is None else self.pool[place]
        return (x.new_zeros(len(x), self.inputs).index_add(1, pool, x) * self.share).to(x.dtype)


# --- switches ---------------------------------------------------------------------------------------------------------


class PerSample:
    """A switch with gates for each example, hard with the gradient of the soft ones.

    Attributes:
        values: by group, the gates of the last pass, [batch, units].
    """

    def __init__(self, gates: Gates, ratio: float, noise: torch.Generator | None = None):
        self.gates, self.ratio, self.noise = gates, ratio, noise
        self.values: dict[str, Tensor] = {}

    def __call__(self, name: str, pooled: Tensor) -> Tensor:
        self.values[name] = hard(self.gates.soft(name, pooled, self.ratio, self.noise))
        return self.values[name]


class PerUser:
    """A switch with one set of gates for all examples of a user: its prototype, their mean soft gates (section 2.2).

    Layer by layer: each layer is fed what remains under the prototype gates before it. Gradients reach all examples.

    Args:
        gates: the gates.
        ratio: the keep ratio to aim at.
        noise: as for `Gates.soft`.

    Attributes:
        values: by group, the gates of the last pass, [1, units].
        prototypes: by group, [1, units].
    """

    def __init__(self, gates: Gates, ratio: float, noise: torch.Generator | None = None):
        self.gates, self.ratio, self.noise = gates, ratio, noise
        self.values: dict[str, Tensor] = {}
        self.prototypes: dict[str, Tensor] = {}

    def __call__(self, name: str, pooled: Tensor) -> Tensor:
        soft = self.gates.soft(name, pooled, self.ratio, self.noise)
        self.prototypes[name] = soft.mean(0, keepdim=True)
        self.values[name] = hard(self.prototypes[name])
        return self.values[name].repeat_interleave(len(soft), 0)


class Personal:
    """A switch that turns one user's examples into masks, layer by layer, without gradient.

    Args:
        gates: the gates.
        ratio: keep ratio.
        mode: "threshold" or "topk", see `Gates.choose`.
        held: by group, the units that the network has; all where it is empty.

    Attributes:
        prototypes: by group, [units].
        wanted: by group, the mask if the network had all channels, [units] bool.
        masks: by group, the mask of what it has, [units] bool; the layers behind are fed what it leaves.
    """

    def __init__(self, gates: Gates, ratio: float, mode: str, held: Mapping[str, Tensor] | None = None):
        self.gates, self.ratio, self.mode, self.held = gates, ratio, mode, held or {}
        self.prototypes: dict[str, Tensor] = {}
        self.wanted: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}

    def __call__(self, name: str, pooled: Tensor) -> Tensor:
        prototype = self.prototypes[name] = self.gates.soft(name, pooled, self.ratio).mean(0)
        held = self.held.get(name)
        held = held.to(prototype.device) if held is not None else None
        self.wanted[name] = self.gates.choose(name, prototype, self.ratio, self.mode)
        self.masks[name] = self.gates.choose(name, prototype, self.ratio, self.mode, held)
        return self.masks[name].to(prototype.dtype)[None]


@torch.no_grad()
def personal_masks(network: GatedNetwork, x: Tensor, ratio: float, mode: str) -> Personal:
    """Computes the prototype and masks of the user who owns the inputs x [m, ...]; labels are not needed.

    Runs in evaluation mode. With ratio 1 use all channels instead: the gates are open then.
    """
    was_training = network.training
    switch = Personal(network.gates, ratio, mode, network.held)
    network.eval().through(switch)(x)
    network.train(was_training)
    return switch


def mean_jaccard_distance(masks: Tensor) -> float:
    """Returns the mean of 1 - |both| / |either| over all pairs of masks [users, units] bool; 0 if all are equal."""
    held = masks.double()
    both = held @ held.T
    either = held.sum(1)[:, None] + held.sum(1)[None] - both
    users = len(masks)
    pairs = torch.triu_indices(users, users, 1)
    return float((1 - both / either.clamp(min=1))[pairs[0], pairs[1]].mean()) if users > 1 else 0.0


@torch.no_grad()
def layer_flops(model: nn.Module, x: Tensor, layers: Iterable[str]) -> dict[str, float]:
    """Counts forward FLOPs of convolutions and linear layers for one example, by name; a multiply-add is two."""
    found: dict[str, float] = {}

    def count(name: str, layer: nn.Module, _: tuple[Any, ...], out: Tensor) -> None:
        channels = out.shape[-1] if isinstance(layer, nn.Linear) else out.shape[1]
        found[name] = 2.0 * layer.weight.numel() * out[0].numel() / channels  # type: ignore[operator]

    handles = [model.get_submodule(name).register_forward_hook(partial(count, name)) for name in layers]
    was_training = model.training
    try:
        model.eval()(x[:1])
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return found


def _key(name: str) -> str:
    """Returns a layer's name as one word of a state dict."""
    return name.replace(".", "-")


def _is(coupling: Coupling, layer: str, side: str) -> bool:
    return coupling.layer == layer and coupling.side == side


def _made_by_one(model: nn.Module, group: ChannelGroup) -> bool:
    modules = dict(model.named_modules())
    ends = [modules.get(c.layer) for c in group.couplings if c.side != "both"]
    made = [c for c in group.couplings if c.side == "out"]
    return len(made) == 1 and len(ends) > 1 and all(isinstance(end, LAYERS) for end in ends)
