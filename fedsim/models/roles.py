"""What each tensor of a model is, and which of them stay on the clients' devices: found once, from the model.

Server and clients resolve `private` in the settings (roles or patterns) alike against the model's state dict, so a
private tensor is in no message: everything else is shared, that is sent and averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from devices.compression.masks import NORMS
from devices.errors import unknown
from fedsim.errors import ConfigError

TRAINED, STATISTIC, COUNTER = "trained", "statistic", "counter"
REAL = "fiub"  # kinds of numpy's types that have a mean and an order: floats, integers and flags
ALL = "all"  # the role of every tensor
SENT = "float16, float32, float64, integers or bool"


@dataclass(frozen=True)
class TensorRoles:
    """What each tensor of a model is.

    Attributes:
        kinds: by name, in the order of the state dict. "trained": a parameter, that an optimiser may move and that
            distances are taken of; "statistic": any other number with a fraction, such as a batch norm's running
            variance, of which only a mean makes sense; "counter": integers and flags, averaged and rounded.
        private: names of those that stay on the clients' devices.
    """

    kinds: Mapping[str, str]
    private: frozenset[str] = frozenset()

    @classmethod
    def of(cls, model: nn.Module, private: Iterable[str] = ()) -> TensorRoles:
        """Finds the roles of a model's tensors.

        Args:
            model: the network.
            private: patterns, see `private_names`.

        Raises:
            ConfigError: for a tensor that cannot be sent or averaged, and as `private_names`.
        """
        for name, tensor in model.state_dict().items():
            _check_can_be_sent(f"{name} of model {type(model).__name__}", tensor)
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        kinds = {name: _kind(t, name in parameters) for name, t in model.state_dict().items()}
        roles = cls(kinds, private_names(model, private))
        if roles.trained and roles.trained <= roles.private and not roles.keeps_all:
            kept = f"private={list(private)}"
            raise ConfigError(
                f"{kept} leaves no trained tensor of model {type(model).__name__} to share; keep some out"
            )
        return roles

    @property
    def keeps_all(self) -> bool:
        """Returns whether no tensor is shared."""
        return len(self.private) == len(self.kinds)

    def names(self, *kinds: str) -> frozenset[str]:
        """Returns the names of all tensors of these kinds, private ones too."""
        return frozenset(name for name, kind in self.kinds.items() if kind in kinds)

    @property
    def trained(self) -> frozenset[str]:
        """Returns the names of what is trained."""
        return self.names(TRAINED)

    @property
    def averaged(self) -> frozenset[str]:
        """Returns the names of statistics and counters."""
        return self.names(STATISTIC, COUNTER)


def _check_can_be_sent(what: str, tensor: Any) -> None:
    """Refuses tensors that Flower's arrays, which are numpy's, cannot hold, or that no strategy can average.

    Complex numbers have a mean, but no order: medians and magnitudes of them would mean another thing in each method.
    """
    if not isinstance(tensor, Tensor):
        raise ConfigError(f"{what} is {type(tensor).__name__}, and only tensors of a state dict can be sent")
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout != torch.strided:
        raise ConfigError(
            f"{what} is a {str(tensor.layout).removeprefix('torch.')} tensor; only dense ones can be sent"
        )
    try:
        can = torch.empty(0, dtype=tensor.dtype).numpy().dtype.kind in REAL
    except (TypeError, RuntimeError):  # of another torch's numbers, such as bfloat16, or quantised
        can = False
    if not can:
        hint = "; keep it as two real parts" if tensor.is_complex() else ""
        if tensor.dtype.is_floating_point:
            hint = "; keep it in float32 and cast it where it is used"
        raise ConfigError(f"{what} is {kind}, and weights that are sent and averaged must be {SENT}{hint}")


def _kind(tensor: Tensor, is_parameter: bool) -> str:
    if not tensor.is_floating_point():
        return COUNTER
    return TRAINED if is_parameter else STATISTIC


def private_names(model: nn.Module, patterns: Iterable[str]) -> frozenset[str]:
    """Returns the names in the model's state dict that `patterns` keep on the clients' devices.

    Args:
        model: the network.
        patterns: roles (`ROLES`) or shell patterns of names in the state dict, such as `blocks.0.*`.

    Raises:
        ConfigError: if one matches nothing, all together leave nothing to share without the role that says so, or two
            names of one tensor (tied weights) would be torn apart.
    """
    tensors, kind = model.state_dict(), type(model).__name__
    private = names_of(model, patterns, "private")
    if tensors and private >= tensors.keys() and ALL not in patterns:
        raise ConfigError(f"private={list(patterns)} leaves no tensor of model {kind} to share; keep some out of it")
    shared = {t.data_ptr(): name for name, t in tensors.items() if name not in private and t.numel()}
    for name in sorted(private):
        if tensors[name].numel() and tensors[name].data_ptr() in shared:
            other = shared[tensors[name].data_ptr()]
            raise ConfigError(f"{name} and {other} of model {kind} are one tensor: put both into private, or none")
    return frozenset(private)


def names_of(model: nn.Module, patterns: Iterable[str], setting: str) -> set[str]:
    """Returns the names in the model's state dict that roles or shell patterns stand for.

    Args:
        model: the network.
        patterns: see `private_names`.
        setting: where they come from.

    Raises:
        ConfigError: if one matches nothing.
    """
    tensors, kind = model.state_dict(), type(model).__name__
    names: set[str] = set()
    for pattern in patterns:
        if pattern in ROLES:
            found = ROLES[pattern](model)
            if not found:
                raise ConfigError(f"{setting} holds {pattern!r}, but model {kind} has {MISSING[pattern]}")
        else:
            found = {name for name in tensors if fnmatchcase(name, pattern)}
            if not found:
                what = unknown(f"role or pattern of {kind}'s tensors in {setting}:", pattern, [*ROLES, *tensors])
                raise ConfigError(what)
        names |= found
    return names


def everything(model: nn.Module) -> set[str]:
    """Returns all names: for methods that share something else."""
    return set(model.state_dict())


def head(model: nn.Module) -> set[str]:
    """Returns the names of the last linear layer."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return _below(model, linear[-1:])


def body(model: nn.Module) -> set[str]:
    """Returns all names but those of the last linear layer; nothing where there is none."""
    last = head(model)
    return set(model.state_dict()) - last if last else set()


def first(model: nn.Module) -> set[str]:
    """Returns the names of the first layer that has weights."""
    layers = [
        name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None
    ]
    return _below(model, layers[:1])


def norm(model: nn.Module) -> set[str]:
    """Returns the names of weights and statistics of all normalisation layers."""
    return _below(model, [name for name, module in model.named_modules() if isinstance(module, NORMS)])


def _below(model: nn.Module, modules: Iterable[str]) -> set[str]:
    prefixes = tuple(f"{name}." if name else "" for name in modules)
    return {name for name in model.state_dict() if name.startswith(prefixes)} if prefixes else set()


ROLES: dict[str, Callable[[nn.Module], set[str]]] = {
    **{"head": head, "body": body, "first": first, "norm": norm},
    ALL: everything,
}
MISSING = {
    ALL: "no tensors",
    "head": "no linear layer",
    "body": "no layer before a last linear one",
    "first": "no layer with weights",
    "norm": "no normalisation layers with weights; take a model that has some",
}
