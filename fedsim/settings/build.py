"""Builds what settings name: the workload, the model, the strategy, everything with a `_target_`."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING, Any

from devices.errors import UserError, one_line, unknown
from devices.texts import as_yaml
from fedsim.errors import ConfigError, ExitError, in_words, no_exit
from fedsim.settings.groups import (
    FORMAT,
    FORMATS,
    NEEDED,
    Settings,
    options,
    preset,
    target_of,
)
from fedsim.settings.origins import is_the_users
from fedsim.settings.own_networks import IN_FILE, TORCHVISION
from fedsim.settings.parameters import check_parameters, takes, way_to_give
from fedsim.settings.permissions import allow, real_path
from fedsim.settings.run_settings import RunSettings, cohort_key
from fedsim.settings.trust import check_group, locate, source_file
from fedsim.workloads.host_memory import check_fits, model_bytes

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy
    from torch import Tensor, nn

    from devices.cost import LatencyModel
    from devices.fleet import Fleet
    from fedsim.attacks.base import Attack
    from fedsim.workloads.base import ModelFactory, Workload

CLIENT_BYTES = 64  # that a client of a fleet takes while it is drawn
ENDLESS = "contains itself, or nests deeper than torch can follow; keep what is around a layer outside of it"
LEFT_OUT = re.compile(r"missing \d+ required [a-z-]+ arguments?: '(\w+)'")  # in Python's words
WORLD_CACHE_SIZE = 4  # of a process: `fedsim bench` has a few runs open at a time, everything else one


def check_trusted(settings: Settings) -> None:
    """Checks what the configuration would call, before any of it is called; see `fedsim.settings.trust`.

    Raises:
        ConfigError: for the first `_target_` that a configuration may not name.
    """
    for group in NEEDED:
        check_group(group, settings[group])


@dataclass(frozen=True)
class World:
    """Holds what driver and workers build alike from the settings: pure functions of them, never changed by a run."""

    config_json: str  # the whole configuration, as every process is sent it
    settings: RunSettings
    workload: Workload
    fleet: Fleet
    latency: LatencyModel
    attack: Attack


@lru_cache(maxsize=WORLD_CACHE_SIZE)
def build_world(config_json: str) -> World:
    """Builds data, fleet and latency model; once per process and run, also when driver and worker share the process.

    Raises:
        ConfigError: for settings that do not fit together, such as a cohort larger than the population.
    """
    tree: Settings = json.loads(config_json)
    check_trusted(tree)
    workload, settings = build_workload(tree), RunSettings.of(tree)
    _check_memory(tree, model_factory(tree), workload)
    if settings.start_from is not None:
        workload.build_model()  # so that weights of another network are refused before a run begins
    fleet = instantiate(tree, "fleet", num_clients=workload.num_clients, seed=settings.seed)
    workload.record_with(fleet)
    for key, number in ((cohort_key(tree), settings.cohort), ("evaluate_clients", settings.evaluate_clients)):
        if number > workload.num_clients:
            raise ConfigError(f"{key} must be at most the {workload.num_clients} clients there are, got {number}")
    for group in ("compression", "uplink", "architecture", "participants", "loop"):
        instantiate(tree, group)  # workers make their own; a wrong setting is to be refused before a run begins
    trainer = instantiate(tree, "trainer")
    trainer.check_hooks()
    _check_kind(settings, workload, trainer.needs_classes)
    _check_shared(settings, trainer.shares_beside_weights)
    attack: Attack = instantiate(tree, "attack")
    attack.check_hooks()
    attack.check(workload)
    return World(config_json, settings, workload, fleet, instantiate(tree, "latency"), attack)


def build_workload(tree: Settings) -> Workload:
    """Builds the data alone, as the stream brings them.

    Args:
        tree: the whole configuration.

    Raises:
        ConfigError, DataError: if they are not there or do not fit the settings.
    """
    settings = RunSettings.of(tree)
    parts = {"model": model_factory(tree), "partition": instantiate(tree, "partition")}
    workload = instantiate(tree, "workload", **parts, num_clients=settings.num_clients, seed=settings.seed)
    workload.sample(1)  # a workload without examples to judge a model on says so
    stream = instantiate(tree, "stream")  # a partial: Hydra would copy the data
    try:
        streamed: Workload = stream(
            workload=workload, rounds=settings.rounds, evaluate_every=settings.evaluate_every, seed=settings.seed
        )
    except TypeError as error:
        _check_complete("stream", tree["stream"], error)
        raise
    return streamed


def _check_kind(settings: RunSettings, workload: Workload, needs_classes: bool) -> None:
    """Refuses a workload without classes where the trainer, or `engine.batch_clients`, needs them.

    Raises:
        ConfigError: naming both.
    """
    from fedsim.workloads.classification import ClassificationWorkload

    if isinstance(workload, ClassificationWorkload):
        return
    choices, together = settings.choices, settings.engine.batch_clients
    is_none = f"needs a classification workload, and {workload.name} is none"
    if needs_classes:
        name = choices.get("method") or f"trainer {choices['trainer']}"
        raise ConfigError(f"{name} {is_none}: it is judged by {workload.primary.title}; take another, such as fedavg")
    if together > 1:
        raise ConfigError(f"engine.batch_clients={together} {is_none}; set it to 1")


def _check_shared(settings: RunSettings, shares_beside_weights: bool) -> None:
    """Refuses that all tensors are private where clients send nothing else.

    Raises:
        ConfigError: naming the method.
    """
    from fedsim.models.roles import ALL

    if ALL in settings.private and not shares_beside_weights:
        name = settings.choices.get("method") or f"trainer {settings.choices['trainer']}"
        raise ConfigError(
            f"private=[{ALL}] leaves nothing to share: {name} sends weights alone; keep some out of it, or take a "
            "method that sends something else, such as fedproto"
        )


def _check_memory(tree: Settings, make: ModelFactory, workload: Workload) -> None:
    """Refuses a population or a model that this host cannot hold, before it is made.

    Raises:
        ConfigError: naming the largest number among the settings of the model.
    """
    import torch

    from fedsim.workloads.base import JUDGED_AT_ONCE

    check_fits(f"num_clients={workload.num_clients}", CLIENT_BYTES * workload.num_clients)
    batch = min(JUDGED_AT_ONCE, max(1, len(workload.test)))
    one, arguments = workload.inputs(workload.sample(1)), workload.model_arguments()

    def inputs(examples: int) -> tuple[Tensor, ...]:
        return tuple(torch.zeros((examples, *t.shape[1:]), dtype=t.dtype) for t in one)

    def refuse(error: Exception) -> None:
        fed = ", ".join(str(list(t.shape[1:])) for t in one)
        model = tree["model"]
        what = (
            f"model {model.get('source', model['_target_'])} cannot take an example of workload {workload.name}, {fed}"
        )
        raise ConfigError(f"{what} ({_place_in(error)}{in_words(error)}); take another model or workload") from error

    needed = model_bytes(lambda: make(**arguments), inputs, batch, refuse)
    if not needed:  # it could not be made without numbers
        try:
            with torch.random.fork_rng(devices=[]):
                make(**arguments)
        except UserError:
            raise
        except Exception as error:
            raise ConfigError(_no_factory(tree, error)) from error
    sizes = {key: value for key, value in tree["model"].items() if _largest(value) > 1}
    key = max(sizes, key=lambda name: _largest(sizes[name]), default="")
    check_fits(f"model.{key}={as_yaml(sizes[key])}" if key else f"model={tree['choices']['model']}", needed)


def _place_in(error: Exception) -> str:
    """Returns the innermost place in code of the user's; empty where there is none."""
    frames = [(frame.f_code.co_filename, line) for frame, line in walk_tb(error.__traceback__)]
    return next(
        (f"{file}, line {line}: " for file, line in reversed(frames) if is_the_users(real_path(Path(file)))), ""
    )


def _largest(value: Any) -> float:
    """Returns the largest number in a setting."""
    if isinstance(value, list):
        return max(map(_largest, value), default=0.0)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else 0.0


def instantiate(groups: Mapping[str, Settings], group: str, **extra: Any) -> Any:
    """Makes the object that a group's `_target_` names.

    Args:
        groups: by group, its settings.
        group: which of them.
        extra: arguments that settings do not have.

    Raises:
        ConfigError: when a configuration may not name it (see `fedsim.settings.trust`), or its constructor refuses the
            settings; the sentence is the constructor's own.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate as hydra_instantiate

    check_group(group, groups[group])
    check_parameters(group, groups[group], extra)
    try:
        with no_exit():
            return hydra_instantiate({"_convert_": "all", **groups[group]}, **extra)  # lists and dicts, not OmegaConf's
    except ExitError as error:
        raise ConfigError(f"{group}: {error}") from error
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise type(cause)(str(cause)) from error
        _check_complete(group, groups[group], cause)
        raise ConfigError(f"{group}: {one_line(cause or error)}") from error


def _check_complete(group: str, tree: Settings, error: BaseException | None) -> None:
    """Raises a sentence that names the setting where a constructor that hands settings on lacked one."""
    if isinstance(error, TypeError) and (left_out := LEFT_OUT.search(str(error))):
        way = way_to_give(group, tree, left_out[1])
        raise ConfigError(f"{group}.{left_out[1]} must be given, {way} ({one_line(error)})") from error


def model_factory(groups: Mapping[str, Settings]) -> ModelFactory:
    """Returns what makes the model, in the memory format of `memory_format`, with the weights of `start_from`.

    Raises:
        ConfigError: when its constructor refuses the settings, or the format is unknown.
    """
    own = {key: value for key, value in groups["model"].items() if key != FORMAT}
    make, layout = instantiate({"model": _of_file(own)}, "model"), memory_format(groups)
    start = groups.get("start_from")
    taken: tuple[str, ...] = ("input_shape", "num_classes")
    try:
        signature = inspect.signature(make)
        if str(own["_target_"]).startswith(TORCHVISION):
            taken = ("num_classes",)
        elif all(p.kind is not p.VAR_KEYWORD for p in signature.parameters.values()):
            taken = tuple(name for name in taken if name in signature.parameters)
        signature.bind(**dict.fromkeys(taken))
    except TypeError as error:
        raise ConfigError(_no_factory(groups, error)) from error
    except ValueError:  # it does not say what it takes
        pass

    def model(**shapes: Any) -> nn.Module:
        from torch.nn import Module

        from fedsim.models.starting import put_weights
        from fedsim.workloads.base import MEMORY_FORMATS

        with no_exit():
            network: nn.Module = make(**{name: value for name, value in shapes.items() if name in taken})
        target = f"model._target_={own['_target_']!r}"
        if not isinstance(network, Module):
            raise ConfigError(f"{target} must make a torch.nn.Module, got {type(network).__name__}")
        try:
            _refuse_lazy(network)
            if not any(p.requires_grad for p in network.parameters()):
                raise ConfigError(f"{target} makes a network without weights to train")
            network.to(memory_format=MEMORY_FORMATS[layout])  # type: ignore[call-overload]
            if start is not None and not any(t.is_meta for t in network.state_dict().values()):
                put_weights(network, str(start))
            return network
        except RecursionError as error:
            raise ConfigError(f"{target} makes a network that {ENDLESS}") from error

    return model


def _of_file(tree: Settings) -> Settings:
    """Returns the settings of a network in a file as those of its class, once the file has been run.

    Raises:
        ConfigError: for a file that may not be run, or has no such class or function.
    """
    source = tree.get("source")
    if tree.get("_target_") != IN_FILE or not isinstance(source, str):
        return tree
    check_group("model", tree)
    from fedsim.models.own_file import named_in_file, split_source

    target, found = named_in_file(":".join(filter(None, (str(source_file(source)), split_source(source)[1]))))
    if not inspect.isclass(found) and not inspect.isroutine(found):
        raise ConfigError(f"model={source} must be a class or a function that makes a network, got {found!r:.60}")
    allow(target)
    return {**{key: value for key, value in tree.items() if key != "source"}, "_target_": target}


def _refuse_lazy(network: nn.Module) -> None:
    """Refuses a network that has weights of no shape: they are counted and sent before it sees a first input.

    Raises:
        ConfigError: naming the first tensor that has no shape until then.
    """
    from torch.nn.parameter import is_lazy

    for name, tensor in itertools.chain(network.named_parameters(), network.named_buffers()):
        if is_lazy(tensor):
            raise ConfigError(
                f"{name} of model {type(network).__name__} has no shape before a first input (a lazy layer); give the "
                "layer its sizes"
            )


def _no_factory(groups: Mapping[str, Settings], error: Exception) -> str:
    """Says that the model's `_target_` makes no network when it is given the shapes of the data."""
    return (
        f"model._target_={groups['model']['_target_']!r} makes no network for the input_shape and num_classes of a "
        f"workload ({in_words(error)}); name a function that takes both and returns the network, "
        "in a file of your own, e.g. model._target_=mine.network"
    )


def memory_format(groups: Mapping[str, Settings]) -> str:
    """Returns how images and convolution weights lie in memory: a setting of the model, as it changes the last bits.

    Channels-last, a training step of a small convolutional network on a CPU takes 0.6 to 0.85 of its time; networks
    whose config says nothing stay contiguous.
    """
    name = groups["model"].get(FORMAT, FORMATS[0])
    if name not in FORMATS:
        raise ConfigError(unknown(f"value for model.{FORMAT}", name, FORMATS))
    return str(name)


def build_strategy(settings: RunSettings, num_clients: int, offered: bool = False) -> Strategy:
    """Builds the strategy and tells it how many clients to sample, by FedAvg's arguments.

    All strategies take them but Flower's wrappers: there the strategy inside does.

    Args:
        settings: of the run.
        num_clients: there are.
        offered: it is offered the clients of a round, and takes all of them.
    """
    train, judge = min(settings.num_asked, num_clients), settings.evaluate_clients
    sampling = {
        "fraction_train": train / num_clients,
        "min_train_nodes": train,
        "fraction_evaluate": judge / num_clients,
        "min_evaluate_nodes": judge,
        "min_available_nodes": train,
    }
    if offered:
        sampling |= {"fraction_train": 1.0, "min_train_nodes": 1, "min_available_nodes": 1}
    tree = settings.groups["strategy"]
    check_group("strategy", tree)  # what it is, and what its wrappers take, is looked up next
    if isinstance(kind := locate("strategy._target_", tree["_target_"]), type):
        stock_rule("check_class")(kind)
    sampling |= _architecture(settings)
    if "strategy" in tree:
        strategy: Strategy = instantiate({"strategy": _with_sampling(tree, sampling)}, "strategy")
    else:
        strategy = instantiate(settings.groups, "strategy", **sampling)
    stock_rule("check")(strategy, min(settings.cohort, num_clients))
    return strategy


def _architecture(settings: RunSettings) -> dict[str, Any]:
    """Returns the rule that gives clients their networks, for a strategy that takes one.

    Raises:
        ConfigError: for a rule that needs such a strategy, where there is none.
    """
    rule, tree = instantiate(settings.groups, "architecture"), settings.groups["strategy"]
    if takes(tree, "architecture"):
        return {"architecture": rule}
    if rule.chooses:
        chosen = settings.choices
        able = [m for m in options("method") if _takes_architecture(preset(m).get("strategy"))]
        raise ConfigError(
            f"architecture={chosen['architecture']} gives clients different networks, and strategy="
            f"{chosen['strategy']} sends all the same; take {' or '.join(f'method={name}' for name in able)}, or "
            "architecture=none"
        )
    return {}


def _takes_architecture(strategy: str | None) -> bool:
    target = target_of("strategy", strategy) if strategy else None
    return target is not None and takes({"_target_": target}, "architecture")


def _with_sampling(tree: Settings, sampling: Mapping[str, Any]) -> Settings:
    """Returns a strategy's settings with those of the sampling where they are taken: by it, or by the one inside."""
    inside = tree.get("strategy")
    if not isinstance(inside, dict) or takes(tree, "fraction_train"):
        return {**tree, **sampling}
    return {**tree, "strategy": _with_sampling(inside, sampling)}


def stock_rule(name: str) -> Callable[..., Any]:
    """Returns a function of `strategies.stock`, which knows what Flower's own strategies need."""
    from hydra.utils import get_method

    found: Callable[..., Any] = get_method(f"strategies.stock.{name}")
    return found


def pick_device(name: str, tf32: bool = False) -> Any:
    """Returns the torch device of `engine.device`: "auto" takes a GPU when there is one.

    A GPU is told to compute the same numbers every time; operations that cannot be repeated are refused there.

    Args:
        name: auto, cpu or cuda.
        tf32: let a GPU multiply in 19 bits.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        instead = "go on where there is one, or begin a new run with engine.device=cpu"
        raise ConfigError(f"engine.device=cuda needs a GPU, and torch finds none here; {instead}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    elif name == "cpu" and tf32:
        raise ConfigError("engine.tf32=true is for a GPU, and this run is trained on the CPU; leave it out")
    if name == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False  # a search would choose kernels by the time they take
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    return torch.device(name)
