"""What a model keeps beside its trained weights, statistics and counters: checkpoints, strategies, engines, uplinks."""

from pathlib import Path

import pytest
import torch
from test_models import CONFIGS, from_config
from torch import nn

from fedsim.checkpoint import Checkpoints, Saved, load
from fedsim.messages import record_of
from fedsim.models.convnet import ConvNet
from fedsim.models.mlp import MLP
from fedsim.report import weights_sha256


class Odd(nn.Module):
    """Tensors that only other people's models have: numbers without a dimension, none at all, bits, half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("seen", torch.tensor([True, False, True]))
        self.register_buffer("nothing", torch.zeros(0, 4))
        self.register_buffer("halves", torch.arange(3).half())
        self.register_buffer("turned", torch.arange(6.0).reshape(2, 3).T)


BUILT = [pytest.param(lambda p=p: from_config(p), id=p.stem) for p in CONFIGS] + [
    pytest.param(lambda: MLP((6,), 3, hidden=[5], norm="batch"), id="mlp-batch"),
    pytest.param(lambda: ConvNet((1, 8, 8), 3, batch_norm=True), id="convnet-batch"),
    pytest.param(Odd, id="odd"),
]


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", BUILT)
def test_every_model_comes_back_from_a_checkpoint_as_it_was(make, tmp_path: Path):
    """Names, dtypes, shapes and bytes: the hash takes in all of them."""
    weights = record_of(make().state_dict())
    Checkpoints(tmp_path, 0).write(Saved(1, weights, {"kept": weights}, {}))
    back = load(tmp_path)
    assert back is not None
    assert weights_sha256(back.weights) == weights_sha256(back.state["kept"]) == weights_sha256(weights)
