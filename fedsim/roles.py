"""Which tensors of a model stay on the clients' devices: `private` in the settings, by role or by pattern.

Server and clients resolve it alike against the model's state dict, so a private tensor is in no message: everything
else is shared, that is sent and averaged. May import: torch, devices.errors, fedsim.errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _NormBase  # batch and instance norms

from devices.errors import unknown
from fedsim.errors import ConfigError

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def private_names(model: nn.Module, patterns: Iterable[str]) -> frozenset[str]:
    """The names in the model's state dict that `patterns` keep on the clients' devices.

    Args:
        model: the network.
        patterns: roles (`ROLES`) or shell patterns of names in the state dict, such as `blocks.0.*`.

    Raises:
        ConfigError: if one matches nothing, all together leave nothing to share, or two names of one tensor (tied
            weights) would be torn apart.
    """
    tensors, kind = model.state_dict(), type(model).__name__
    private: set[str] = set()
    for pattern in patterns:
        if pattern in ROLES:
            found = ROLES[pattern](model)
            if not found:
                raise ConfigError(f"private holds {pattern!r}, but model {kind} has {MISSING[pattern]}")
        else:
            found = {name for name in tensors if fnmatchcase(name, pattern)}
            if not found:
                what = unknown(f"role or pattern of {kind}'s tensors in private:", pattern, [*ROLES, *tensors])
                raise ConfigError(what)
        private |= found
    if tensors and private >= tensors.keys():
        raise ConfigError(f"private={list(patterns)} leaves no tensor of model {kind} to share; keep some out of it")
    shared = {t.data_ptr(): name for name, t in tensors.items() if name not in private and t.numel()}
    for name in sorted(private):
        if tensors[name].numel() and tensors[name].data_ptr() in shared:
            other = shared[tensors[name].data_ptr()]
            raise ConfigError(f"{name} and {other} of model {kind} are one tensor: put both into private, or none")
    return frozenset(private)


def head(model: nn.Module) -> set[str]:
    """The last linear layer."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return _below(model, linear[-1:])


def body(model: nn.Module) -> set[str]:
    """Everything but the last linear layer; nothing where there is none."""
    last = head(model)
    return set(model.state_dict()) - last if last else set()


def first(model: nn.Module) -> set[str]:
    """The first layer that has weights."""
    layers = [
        name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None
    ]
    return _below(model, layers[:1])


def norm(model: nn.Module) -> set[str]:
    """Weights and statistics of all normalisation layers."""
    return _below(model, [name for name, module in model.named_modules() if isinstance(module, NORMS)])


def _below(model: nn.Module, modules: Iterable[str]) -> set[str]:
    prefixes = tuple(f"{name}." if name else "" for name in modules)
    return {name for name in model.state_dict() if name.startswith(prefixes)} if prefixes else set()


ROLES: dict[str, Callable[[nn.Module], set[str]]] = {"head": head, "body": body, "first": first, "norm": norm}
MISSING = {
    "head": "no linear layer",
    "body": "no layer before a last linear one",
    "first": "no layer with weights",
    "norm": "no normalisation layers with weights; take a model that has some",
}
