"""A device as a picture: predicted latency of small networks against their multiply-adds."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from devices.cost import ModelCost
from devices.enrol.zoo import ZOO
from devices.figures import new_figure, save_figure
from devices.latency.models import device_prices
from devices.latency.predictions import predict
from devices.profile import DeviceProfile
from devices.texts import NAME_LETTERS, visible
from devices.trace import trace


def zoo_cost(name: str) -> ModelCost:
    """Traces a network of the zoo and returns its cost."""
    network = ZOO[name]
    return traced_cost(name, network.build(), network.example(1))


def traced_cost(name: str, model: nn.Module, example: Tensor) -> ModelCost:
    """Traces a network and returns its cost from the layer table alone: enough to predict latency, not to train."""
    table = trace(model, example)
    return ModelCost(name, 2 * table.macs, 4 * table.macs, 0, 0, layers=table.rows)


def latency_picture(profile: DeviceProfile, path: str | Path, batch: int = 1) -> None:
    """Draws forward and training-step latency of the zoo against MACs, beside the device's one rate, as a PNG.

    Raises:
        DeviceError: for a device without latencies.
    """
    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    can_train = device_prices(profile).step is not None
    families = list(dict.fromkeys(network.family for network in ZOO.values()))
    for number, family in enumerate(families):
        costs = [zoo_cost(name) for name, network in ZOO.items() if network.family == family]
        costs.sort(key=lambda cost: cost.forward_flops)
        mega_macs = [batch * cost.forward_flops / 2e6 for cost in costs]
        made = [predict(cost, batch, profile) for cost in costs]
        axes.plot(mega_macs, [p.forward.ms for p in made], "o-", color=f"C{number}", label=family)
        steps = [p.step.ms for p in made if p.step]
        if steps:
            axes.plot(mega_macs, steps, "x:", color=f"C{number}")
    low, high = axes.get_xlim()
    line = [max(low, 0.05), high]
    axes.plot(line, [2e6 * m / profile.flops_per_s * 1e3 for m in line], color="grey", lw=1, label="one rate")
    axes.set(
        xscale="log", yscale="log", xlabel=f"million multiply-adds per pass (batch {batch})", ylabel="milliseconds"
    )
    what = "circles forward, crosses training step" if can_train else "forward passes; it cannot train"
    axes.set_title(f"{visible(profile.name, NAME_LETTERS)}: predicted latency; {what}")
    axes.legend(ncols=2, fontsize=8)
    axes.grid(alpha=0.3)
    save_figure(figure, path, dpi=120)
