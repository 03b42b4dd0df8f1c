"""The weights that training starts from, where these are another run's."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from fedsim.errors import ConfigError, in_words
from fedsim.models.roles import private_names

START = "start_from"
OF_A_RUN = "checkpoint/round-*/weights.safetensors"


def weights_file(path: str) -> Path:
    """Returns the file that `start_from` names: itself, or the last weights of a run folder.

    Raises:
        ConfigError: if there is none.
    """
    given = Path(path).expanduser()
    if given.is_file():
        return given
    if not given.is_dir():
        raise ConfigError(f"{START} must be a run folder or a .safetensors file, and there is no {path}")
    found = sorted(given.glob(OF_A_RUN))
    if not found:
        raise ConfigError(f"{START}={path} holds no {OF_A_RUN}: it is no run folder, or its run has no checkpoint")
    return found[-1]


def put_weights(network: nn.Module, path: str) -> None:
    """Puts the weights of a file into a network; a head of another shape stays as it was made.

    Args:
        network: changed in place.
        path: of `weights_file`.

    Raises:
        ConfigError: if the file cannot be read, or lacks a tensor, or has one of another shape.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = weights_file(path)
    try:
        given = load_file(file)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ConfigError(f"{START}={path}: {file} cannot be read as safetensors: {in_words(error)}") from error
    own = network.state_dict()
    kind, differing = type(network).__name__, []
    for name, tensor in own.items():
        if name not in given:
            raise ConfigError(f"{START}={path} has no tensor {name}, which model {kind} has; take the model it is of")
        if given[name].shape != tensor.shape:
            differing.append(name)
    head = private_names(network, ["head"]) if differing else frozenset()
    for name in differing:
        if name not in head:
            shapes = f"{list(given[name].shape)} where model {kind} has {list(own[name].shape)}"
            raise ConfigError(f"{START}={path} has {name} {shapes}; take the model it is of")
    with torch.no_grad():
        for name, tensor in own.items():
            if name not in differing:
                tensor.copy_(given[name])
