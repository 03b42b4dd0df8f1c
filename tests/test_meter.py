"""What one example costs in a network."""

import copy
import json

import pytest
import torch
from torch import Tensor, nn
from torchs_counter import counter

from devices.cost import ModelCost
from devices.errors import DeviceError
from devices.meter import inference_bytes, measure, peak_memory_bytes


def squares(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["x"]).square().mean()


class Tagger(nn.Module):
    """Embedding 5, LSTM 7, and a linear layer to 11 classes at every step."""

    def __init__(self, layers: int = 1, both_ways: bool = False):
        super().__init__()
        self.embedding = nn.Embedding(11, 5)
        self.lstm = nn.LSTM(5, 7, layers, batch_first=True, bidirectional=both_ways)
        self.classes = nn.Linear(14 if both_ways else 7, 11)

    def forward(self, x: Tensor) -> Tensor:
        return self.classes(self.lstm(self.embedding(x))[0])


def test_two_linear_layers_cost_their_products():
    """Forward 2*3*4 + 2*4*2 = 40; backward 24 + 16 for the weights and 16 for the hidden layer, none for the input.

    Kept: the ReLU's output, once although two operations want it, 4 floats; and the output for the square, 2 floats.
    """
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    cost = measure(model, squares, {"x": torch.randn(6, 3)}, "mlp")
    assert (cost.name, cost.forward_flops, cost.backward_flops, cost.calls) == ("mlp", 40, 56, 3)
    assert (cost.parameter_bytes, cost.activation_bytes) == ((16 + 10) * 4, (4 + 2) * 4)


class Skips(nn.Module):
    """Decides by a draw of the host which layers run."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if torch.rand(()).item() < 0.5 else self.body(self.body(x))


def test_what_a_network_costs_is_no_matter_of_what_was_drawn_before():
    costs = set()
    for seed in range(8):
        torch.manual_seed(seed)
        model, batch = Skips(), {"x": torch.zeros(4, 3)}
        costs.add((measure(model, squares, batch, "skips"), inference_bytes(model, squares, batch)))
    assert len(costs) == 1


def test_convolution_costs_its_kernel_at_every_pixel():
    """Forward 2 * 3 out * 2 in * 9 * 16 pixels = 1728; backward the same for the weights alone. Kept: the output."""
    cost = measure(nn.Conv2d(2, 3, 3, padding=1), squares, {"x": torch.randn(5, 2, 4, 4)}, "conv")
    assert (cost.forward_flops, cost.backward_flops, cost.calls) == (1728, 1728, 1)
    assert (cost.parameter_bytes, cost.activation_bytes) == ((54 + 3) * 4, 48 * 4)


def test_lstm_costs_its_gates_at_every_step():
    """I = 5, H = 7, 4 steps: forward 2*4*7*(5+7)*4 = 2688; the classes 2*7*11*4 = 616.

    Backward: 2*28*5*4 for weights and input each, 2240; 2*28*7 for 4 steps of weights, 3 of state, 2744; classes 1232.
    """
    cost = measure(Tagger(), squares, {"x": torch.zeros(3, 4, dtype=torch.long)}, "tagger")
    assert (cost.forward_flops, cost.backward_flops, cost.calls) == (2688 + 616, 2240 + 2744 + 1232, 3)
    assert cost.parameter_bytes == 4 * (11 * 5 + 28 * (5 + 7) + 2 * 28 + 7 * 11 + 11)


def test_lstm_on_numbers_has_no_input_gradient():
    """Backward is 2*28*5*4 = 1120 for the input weights and 2744 for the state, as above."""
    cost = measure(
        nn.LSTM(5, 7, batch_first=True), lambda m, b: m(b["x"])[0].sum(), {"x": torch.randn(3, 4, 5)}, "lstm"
    )
    assert (cost.forward_flops, cost.backward_flops) == (2688, 1120 + 2744)


def test_gru_has_three_gates():
    """Forward 2*3*7*(5+7)*4 = 2016; backward 2*21*5*4 = 840 and 2*21*7*(4+3) = 2058."""
    cost = measure(nn.GRU(5, 7, batch_first=True), lambda m, b: m(b["x"])[0].sum(), {"x": torch.randn(3, 4, 5)}, "gru")
    assert (cost.forward_flops, cost.backward_flops) == (2016, 840 + 2058)


@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_counter_of_a_real_step_agrees_with_the_measured_cost(both_ways: bool, frozen: bool):
    """The real step runs the CPU's LSTM kernel, the measured one plain products: the same FLOPs, to the last one."""
    model, batch = Tagger(2, both_ways), {"x": torch.randint(11, (3, 4))}
    model.lstm.requires_grad_(not frozen)
    cost = measure(model, squares, batch, "tagger")
    with counter() as counted:
        squares(model, batch).backward()
    assert counted.get_total_flops() == 3 * (cost.forward_flops + cost.backward_flops)


def test_frozen_network_costs_its_forward_pass():
    cost = measure(nn.Linear(3, 4).requires_grad_(False), squares, {"x": torch.randn(6, 3)}, "frozen")
    assert (cost.forward_flops, cost.backward_flops, cost.activation_bytes) == (24, 0, 0)


def test_cost_of_one_example_does_not_depend_on_the_batch():
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3, 2)
    )
    small, large = (measure(model, squares, {"x": torch.randn(n, 2, 4, 4)}, "net") for n in (4, 64))
    assert (small.forward_flops, small.backward_flops) == (large.forward_flops, large.backward_flops)
    assert small.activation_bytes == pytest.approx(large.activation_bytes, abs=12)  # mean and scale of 3 channels


def test_measuring_leaves_the_model_and_the_random_state_untouched():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    squares(model, {"x": torch.randn(6, 3)}).backward()
    model.eval()
    state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    gradients = [p.grad.clone() for p in model.parameters()]
    with torch.no_grad():
        cost = measure(model, squares, {"x": torch.randn(6, 3, generator=torch.Generator().manual_seed(0))}, "net")
    assert cost.backward_flops == 56
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert not any(module.training or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.backends.mkldnn.enabled


def test_empty_batch_is_refused():
    with pytest.raises(DeviceError, match="network 'net' cannot be measured on an empty batch"):
        measure(nn.Linear(3, 4), squares, {"x": torch.zeros(0, 3)}, "net")


@pytest.mark.parametrize(("optimiser", "expected"), [(0, 52 + 280), (1, 100 + 280), (2, 148 + 280)])
def test_peak_memory_is_weights_batch_activations_and_optimiser(optimiser: float, expected: int):
    """48 bytes of weights, 12 of an example and 16 of its output, which is freed when it has been summed into 4 bytes.

    The backward pass holds weights, their gradient, the loss, its gradient, and the batch: 104 + 12 each, less for 10.
    """
    model = nn.Linear(3, 4, bias=False)
    cost = measure(model, lambda m, b: m(b["x"]).sum(), {"x": torch.randn(6, 3)}, "linear")
    assert cost.step_bytes == ((104, 12), (52, 28))
    assert peak_memory_bytes(cost, 10, optimiser) == expected


def test_peak_memory_of_a_cost_without_moments_is_twice_the_weights_and_the_activations():
    assert peak_memory_bytes(ModelCost("old", 1.0, 2.0, 104, 24), 10, 1) == 3 * 104 + 240


def test_lstm_keeps_what_its_kernel_does():
    """I = 5, H = 7, 4 steps of 4 bytes. Workspace 9*7 + 6*7, output 7, as the kernel gives it and again in the order of
    the examples for the classes, embedding 5, logits 11; whatever the steps, two first and two last states of 7.
    """
    cost = measure(Tagger(), squares, {"x": torch.zeros(3, 4, dtype=torch.long)}, "tagger")
    assert cost.activation_bytes == 16 * (105 + 7 + 7 + 5 + 11) + 4 * 4 * 7


def test_cost_with_moments_survives_json_and_old_costs_can_be_read():
    cost = measure(nn.Linear(3, 4), squares, {"x": torch.randn(4, 3)}, "net")
    assert ModelCost.from_dict(json.loads(json.dumps(vars(cost)))) == cost
    old = {key: value for key, value in vars(cost).items() if not key.endswith("_bytes")}
    read = ModelCost.from_dict({**old, "parameter_bytes": 64, "activation_bytes": 16})
    assert (read.step_bytes, read.inference_bytes) == ((), ())
