"""How a client's model is judged: as its device runs it, pruned and quantised where the run compresses."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

from clients.trainers.base import ClientContext, LocalTrainer
from devices.compression.plan import CompressionPlan, Pruned, Recipe
from devices.cost import ModelCost
from devices.latency.models import deployed_ms
from devices.profile import DeviceProfile
from fedsim.exchanges.slices import model_cost
from fedsim.messages.updates import Broadcast
from fedsim.runs.deployment import CALIBRATION, calibration
from fedsim.settings.build import World


class Judge:
    """Evaluates what the devices of a fleet run, with its sizes and predicted latency.

    Args:
        world: of the run.
        compression: what devices run of the model.
        trainer: that judges.
        personal: whether each client's model is another.
    """

    def __init__(self, world: World, compression: CompressionPlan, trainer: LocalTrainer, personal: bool):
        self.world, self.compression, self.trainer = world, compression, trainer
        self.personal = personal or type(trainer).personalise is not LocalTrainer.personalise
        self._networks: dict[Recipe, ModelCost] = {}  # what devices run, where that is not all of the model
        self._pruned: tuple[object, dict[Recipe, Pruned]] = (None, {})

    def metrics(self, client: ClientContext, task: Broadcast) -> dict[str, float]:
        """Metrics on the client's held-out part; its device pays for the passes."""
        own = self.trainer.personalise(client, task) if len(client.data.test) else {}
        return {**self._metrics(client, task), **own}

    def _metrics(self, client: ClientContext, task: Broadcast) -> dict[str, float]:
        if not self.compression.active or not len(client.data.test):
            metrics = self.trainer.evaluate(client, task)
            prices: dict[str, float] = {}
            bits = self.trainer.integer_bits(task.round, client.profile)
            for name, network in client.log.judged.items():
                prices |= self._predicted(network, client.profile, name, bits)
            return {**prices, **metrics}
        recipe = self.compression.recipe(client.profile)
        pruned = self._pruned_by(recipe, client, task)
        deployed = self.compression.finish(pruned, recipe, calibration(self.world.workload, client.data.train))
        if recipe not in self._networks:
            self._networks[recipe] = model_cost(self.world.workload, deployed.shape, "compressed", client.device)
        network = self._networks[recipe]
        if recipe.bits < 32:
            batches, size = CALIBRATION
            client.log.add_examples(network, min(len(client.data.train), batches * size), size)
        shared = deployed.model is not client.model  # with others: what a trainer does to it is for this client only
        own = replace(client, model=deepcopy(deployed.model) if shared else client.model, step_cost=network)
        own.seed_dropout(own.model)
        metrics = self.trainer.evaluate(own, task)
        return {**metrics, **deployed.facts(), **self._predicted(network, client.profile, bits=recipe.bits)}

    def _pruned_by(self, recipe: Recipe, client: ClientContext, task: Broadcast) -> Pruned:
        """The model as devices with this recipe share it; once for all clients that were sent the same weights."""
        if self._pruned[0] is not task.weights or self.personal:
            self._pruned = (task.weights, {})
        made = self._pruned[1]
        if recipe not in made:
            workload = self.world.workload
            example = workload.inputs(workload.sample(2))[0].to(client.device)
            made[recipe] = self.compression.prune(client.model, example, recipe)
        return made[recipe]

    def _predicted(self, network: ModelCost, own: DeviceProfile, name: str = "", bits: int = 32) -> dict[str, float]:
        """FLOPs of one inference and its milliseconds on the client's device, and on each kind that the fleet has."""
        latency, end = self.world.latency, f"_{name}" if name else ""
        found = {
            f"latency_ms{end}": deployed_ms(latency, network, own, bits),
            f"flops{end}": float(network.forward_flops),
        }
        kinds = self.world.fleet.profiles if len(self.world.fleet.profiles) > 1 else ()
        return found | {f"latency_ms_on_{p.name}{end}": deployed_ms(latency, network, p, bits) for p in kinds}
