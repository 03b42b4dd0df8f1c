"""The network that a user names on the command line: a config, one of the zoo, a class in a file, one of torchvision.

    lenet5                          a model config of fedsim
    resnet-16                       a network of the zoo
    path/to/net.py:Net              a class, or a function without arguments, in a file, which is run
    mymodels:Net                    of a module of the working folder
    torchvision.models.resnet18     without weights

What is no config is built once, and tried with an input.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from devices.errors import DeviceError, one_line, unknown
from fedsim.errors import ConfigError, ExitError, no_exit
from fedsim.settings.groups import Settings
from fedsim.settings.own_networks import FORMS, TORCHVISION, is_file, network_settings
from fedsim.settings.trust import check_file, locate
from fedsim.workloads.host_memory import AT_ONCE, check_fits, model_bytes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from devices.cost import ModelCost

IMAGE, CLASSES = (3, 32, 32), 10  # of an example, and of the output, where nobody says them
LARGE_IMAGE, LARGER_IMAGE = (3, 224, 224), (3, 299, 299)  # of torchvision's networks, and of its Inception
SHAPE_ARGUMENTS = ("num_classes", "input_shape")  # arguments that a constructor is given if it has them
NUMBER_BYTES = 4
COUNTED_BATCH = 4  # examples of a batch whose memory is counted


@dataclass(frozen=True)
class NamedModel:
    """A network with an example of what it takes.

    Attributes:
        name: as the user wrote it.
        module: in evaluation mode.
        shape: of one example; (steps,) where it takes token ids.
        tokens: whether it does.
    """

    name: str
    module: nn.Module
    shape: tuple[int, ...]
    tokens: bool = False

    def examples(self, count: int) -> Tensor:
        """Returns inputs [count, *shape] of zeros: their values do not matter."""
        import torch

        return torch.zeros(count, *self.shape, dtype=torch.long if self.tokens else torch.float32)


def named_model(
    name: str,
    input_shape: Sequence[int] | None = None,
    num_classes: int | None = None,
    tokens: int | None = None,
    by_user: bool = True,
    sizes: Mapping[str, Any] | None = None,
) -> NamedModel:
    """Builds the network.

    Args:
        name: see the module.
        input_shape: of one example; 3,32,32 when left out, 3,224,224 for torchvision.
        num_classes: size of the output; 10 when left out, for torchvision its own 1000.
        tokens: length of a sequence of token ids, for networks that take these; in the place of `input_shape`.
        by_user: the name stands on the command line, not in a file.
        sizes: settings in the place of those of a model config.

    Raises:
        ConfigError: for a name that is not there, with the nearest one, a network that cannot be built, or a file that
            may not be run.
        FileError: for what is no file.
    """
    from devices.enrol.zoo import ZOO
    from fedsim.models.own_file import split_source
    from fedsim.settings.build import ENDLESS
    from fedsim.settings.groups import model_settings, options

    given = (tokens,) if tokens else tuple(input_shape) if input_shape else None
    if given:
        option = f"--tokens {tokens}" if tokens else f"--input-shape {','.join(map(str, given))}"
        check_fits(option, NUMBER_BYTES * AT_ONCE * COUNTED_BATCH * math.prod(given))
    if name in ZOO:
        return _zoo_network(name, given)
    if is_file(name):
        shape = given or IMAGE
        check_file(name, split_source(name)[0], by_user)
        module = _file_network(name, shape, num_classes or CLASSES)
    elif name.startswith(TORCHVISION):
        shape = given or (LARGER_IMAGE if name.endswith("inception_v3") else LARGE_IMAGE)
        module = _torchvision_network(name, shape, num_classes)
    elif name in options("model"):
        shape = given or IMAGE
        module = _config_network({**model_settings(name), **(sizes or {})}, name, shape, num_classes or CLASSES)
    elif settings := network_settings(name):
        shape = given or IMAGE
        module = _config_network(settings, name, shape, num_classes or CLASSES)
    else:
        raise ConfigError(f"{unknown('model', name, [*options('model'), *ZOO])}; {FORMS}")
    takes_tokens = bool(tokens or getattr(module, "takes_tokens", False))
    if takes_tokens and len(shape) != 1:
        raise ConfigError(f"model {name} takes token ids; say how long a sequence is, e.g. --tokens 80")
    try:
        return NamedModel(name, module.eval(), shape, takes_tokens)
    except RecursionError as error:
        raise ConfigError(f"model {name} {ENDLESS}") from error


def trace_cost(model: NamedModel) -> ModelCost:
    """Returns what a network costs, by its layer table: enough to predict latency.

    Raises:
        ConfigError: if it does not run on such an example.
    """
    from devices.enrol.picture import traced_cost

    try:
        with no_exit():
            return traced_cost(model.name, model.module, model.examples(1))
    except (DeviceError, ExitError) as error:
        raise ConfigError(f"{error}; {_shape_hint(model)}") from error


def measure_cost(model: NamedModel) -> ModelCost:
    """Returns what a network costs, and the memory that a step and an inference of it hold.

    Raises:
        ConfigError: if it cannot be trained as a classifier on such examples.
    """
    import torch

    from devices.reserved import with_memory

    cost = trace_cost(model)
    try:
        with no_exit(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            batch = {"x": model.examples(COUNTED_BATCH)}
            batch["y"] = labels(model.module(batch["x"]))
        with no_exit():
            return with_memory(cost, model.module, loss, batch)
    except Exception as error:
        raise ConfigError(f"model {model.name} cannot be trained: {_reason(error)}; {_shape_hint(model)}") from error


# --- a loss for any classifier ---------------------------------------------------------------------------------------


def loss(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Returns the cross-entropy of the output, plus that of auxiliary outputs, which some networks have in training."""
    import torch

    values = [_cross_entropy(output, batch["y"]) for output in outputs(module(batch["x"]), labels_of=batch["y"])]
    return values[0] if len(values) == 1 else torch.stack(values).sum()


def outputs(result: Any, labels_of: Tensor | None = None) -> list[Tensor]:
    """Returns the tensors of a result (one, or a tuple or map of some): the main output, then auxiliary ones.

    Args:
        result: of a call of the network; of a map, what is called logits or out comes first.
        labels_of: labels; with them, only outputs that can be judged by them stay.
    """
    from torch.utils._pytree import tree_leaves

    first = []
    if isinstance(result, Mapping):
        first = [value for key, value in result.items() if key in ("logits", "out")]
        result = first + [value for key, value in result.items() if key not in ("logits", "out")]
    found = [x for x in tree_leaves(result) if hasattr(x, "is_floating_point") and x.is_floating_point() and x.ndim]
    if not found:
        raise ValueError(f"it returns {type(result).__name__} without a tensor of floats")
    if labels_of is None:
        return found
    return [x for number, x in enumerate(found) if number == 0 or labels(x).shape == labels_of.shape]


def labels(result: Any) -> Tensor:
    """Returns labels for an output: [batch], of sequences [batch, steps], of maps [batch, height, width], int64."""
    import torch

    output = outputs(result)[0]
    shape = output.shape[:-1] if output.ndim in (2, 3) else (output.shape[:1] + output.shape[2:])
    return torch.zeros(shape, dtype=torch.long)


def _cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    from torch.nn import functional as F

    if output.ndim in (2, 3):
        return F.cross_entropy(output.flatten(0, -2), y.flatten())
    return F.cross_entropy(output, y) if output.ndim > 3 else output.square().mean()


# --- where networks come from ----------------------------------------------------------------------------------------


def _zoo_network(name: str, given: tuple[int, ...] | None) -> NamedModel:
    from devices.enrol.zoo import IMAGE as SHAPE
    from devices.enrol.zoo import SEQUENCE, ZOO

    network = ZOO[name]
    shape = SEQUENCE if network.tokens else SHAPE
    return NamedModel(name, network.build(), shape, network.tokens)


def _config_network(settings: Settings, name: str, shape: tuple[int, ...], num_classes: int) -> nn.Module:
    from fedsim.settings.build import model_factory

    if len(shape) != 1 and _takes_tokens(str(settings["_target_"])):
        raise ConfigError(f"model {name} takes token ids; say how long a sequence is, e.g. --tokens 80")
    return _make_if_it_fits(model_factory({"model": settings}), name, shape, num_classes)


def _takes_tokens(target: str) -> bool:
    return bool(getattr(locate("model._target_", target), "takes_tokens", False))


def _torchvision_network(name: str, shape: tuple[int, ...], num_classes: int | None) -> nn.Module:
    import torchvision.models

    wanted, known = name.removeprefix(TORCHVISION), torchvision.models.list_models(torchvision.models)
    if wanted not in known:
        near = get_close_matches(wanted, known, n=1)
        hint = f"; did you mean {TORCHVISION + near[0]!r}?" if near else ""
        raise ConfigError(f"unknown model {name!r}{hint} (a classifier of torchvision; there are {len(known)})")
    # Weights are drawn slowly by some, and a head that only training has is no part of what is deployed.
    extra: dict[str, Any] = {"aux_logits": False} if wanted in ("googlenet", "inception_v3") else {}
    extra |= {"init_weights": False} if wanted.startswith(("googlenet", "inception", "vgg")) else {}

    def make(input_shape: tuple[int, ...], num_classes: int | None) -> nn.Module:
        classes = {"num_classes": num_classes} if num_classes else {}
        built: nn.Module = torchvision.models.get_model(wanted, weights=None, **extra, **classes)
        return built

    return _make_if_it_fits(make, name, shape, num_classes)


def _make_if_it_fits(
    make: Callable[..., nn.Module], name: str, shape: tuple[int, ...], num_classes: int | None
) -> nn.Module:
    """Makes a network that this host can hold.

    Raises:
        ConfigError: before it is made, if it cannot.
    """
    import torch

    with_classes = f" with --num-classes {num_classes}" if num_classes else ""
    check_fits(
        f"model {name}{with_classes}",
        model_bytes(lambda: make(input_shape=shape, num_classes=num_classes), lambda n: (torch.zeros(n, *shape),), 1),
    )
    return make(input_shape=shape, num_classes=num_classes)


def _file_network(name: str, shape: tuple[int, ...], num_classes: int) -> nn.Module:
    from torch import nn

    from fedsim.models.own_file import named_in_file

    _, maker = named_in_file(name)
    if isinstance(maker, nn.Module):
        return maker
    built = _call_maker(maker, name, {"num_classes": num_classes, "input_shape": shape})
    if not isinstance(built, nn.Module):
        raise ConfigError(f"{name} must be a torch.nn.Module, or make one, got {type(built).__name__}")
    return built


def _call_maker(maker: Callable[..., Any], name: str, offered: Mapping[str, Any]) -> Any:
    """Calls a class or function with those arguments of `SHAPE_ARGUMENTS` that it has, and returns what it makes."""
    if not callable(maker):
        raise ConfigError(f"{name} must be a class or a function that makes a network, got {type(maker).__name__}")
    try:
        parameters = inspect.signature(maker).parameters
    except (TypeError, ValueError):
        parameters = {}  # type: ignore[assignment]
    empty, named = inspect.Parameter.empty, (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [
        key
        for key, p in parameters.items()
        if p.default is empty and p.kind in (*named, inspect.Parameter.POSITIONAL_ONLY) and key not in SHAPE_ARGUMENTS
    ]
    if needed:
        defaults = "it a default" if len(needed) == 1 else "them defaults"
        raise ConfigError(
            f"{name} needs {', '.join(needed)}; name a function without arguments that returns the network, or give "
            f"{defaults} ({' and '.join(SHAPE_ARGUMENTS)} are given where asked for)"
        )
    try:
        with no_exit():
            return maker(**{key: offered[key] for key in SHAPE_ARGUMENTS if key in parameters})
    except Exception as error:
        raise ConfigError(f"{name} cannot be built: {_reason(error)}") from error


def _shape_hint(model: NamedModel) -> str:
    given = ",".join(map(str, model.shape))
    if model.tokens:
        return f"is it a network for {given} token ids?"
    return f"is --input-shape {given} right, or does it take token ids (--tokens LENGTH)?"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)[:200]}".removesuffix(": ")
