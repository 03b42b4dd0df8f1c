"""The trained network on the devices of the fleet: compressed as each runs it, judged, weighed and priced."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from devices.compression.plan import CompressionPlan, Recipe
from devices.errors import DeviceError
from devices.fleet import Fleet
from devices.latency.models import INT8_BITS, deployed_ms, int8_ms
from fedsim.errors import NotFiniteError
from fedsim.exchanges.slices import model_cost
from fedsim.settings.build import World, instantiate
from fedsim.workloads.base import Examples, Workload
from fedsim.workloads.metrics import LOSS

CALIBRATION = (8, 16)  # batches and examples in each, for the ranges of activations


def calibration(workload: Workload, data: Examples) -> Iterator[Tensor]:
    """Inputs of a client's own examples, without labels: the first ones, as many as there are."""
    batches, size = CALIBRATION
    for rows in torch.arange(min(len(data), batches * size)).split(size):
        yield workload.inputs(data.gather(rows))[0]


def deployments(world: World, model: nn.Module) -> list[dict[str, Any]]:
    """Returns an entry per recipe that devices of the fleet follow, in the order of the fleet.

    Each has the recipe, the devices and how many clients own them; sizes; metrics on the test set; and the predicted
    milliseconds of one inference by device: `latency_ms` by the run's latency model and the compressed network's own
    shape (zeros in it save no time), in int8 for 8 bits where the device was measured so. `no_int8` names those that
    were not: their time is that of floating point. Empty without compression.

    Args:
        world: of the run.
        model: the trained network.
    """
    plan: CompressionPlan = instantiate(world.settings.groups, "compression")
    if not plan.active:
        return []
    workload = world.workload
    example = workload.inputs(workload.sample(2))[0]
    model = model.cpu().eval()
    entries = []
    for recipe, devices in _by_recipe(plan, world.fleet).items():
        batches = calibration(workload, workload.client_data(0).train)
        compressed = plan.apply(model, example, recipe, batches)
        cost = model_cost(workload, compressed.shape, "compressed")
        predicted: dict[str, float] = {}
        unknown: list[str] = []
        for profile in world.fleet.profiles:
            if profile.name in devices:
                predicted[profile.name] = deployed_ms(world.latency, cost, profile, recipe.bits)
                if recipe.bits == INT8_BITS and int8_ms(cost, 1, profile) is None:
                    unknown.append(profile.name)
        entries.append(
            {
                **vars(recipe),
                "devices": devices,
                **compressed.facts(),
                "flops": cost.forward_flops,
                **_judged(workload, compressed.model),
                "latency_ms": predicted,
                **({"no_int8": unknown} if unknown else {}),
            }
        )
    return entries


def _judged(workload: Workload, model: nn.Module) -> dict[str, Any]:
    """Returns a model's metrics on the test set; None where its output is not finite."""
    try:
        return workload.judge_deployed(model)
    except NotFiniteError:
        return {workload.primary.name: None, LOSS: None}


def _by_recipe(plan: CompressionPlan, fleet: Fleet) -> dict[Recipe, dict[str, int]]:
    """Devices with the number of clients that own them, by recipe."""
    owners = {name: count for name, count, _ in fleet.summary() if count}
    found: dict[Recipe, dict[str, int]] = {}
    for profile in fleet.profiles:
        if profile.name in owners:
            found.setdefault(plan.recipe(profile), {})[profile.name] = owners[profile.name]
    return found


def check_plan(plan: CompressionPlan, model: nn.Module, example: Tensor, fleet: Fleet) -> None:
    """Raises DeviceError before a run if a recipe of the fleet cannot be followed with this network."""
    if any(recipe.keep < 1 for recipe in _by_recipe(plan, fleet)):
        from devices.compression.channels import ChannelGroups

        try:
            ChannelGroups.find(model, example)
        except DeviceError as error:
            raise DeviceError(f"{error}; take compression=magnitude or quantise, or another model") from error
