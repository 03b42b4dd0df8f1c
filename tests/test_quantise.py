"""Quantisation and distillation against hand-computed numbers, and integer kernels that really are some."""

import math

import pytest
import torch
from torch import nn

from devices.compression.distil import divergence
from devices.compression.kernels import int8_network, integer_operators
from devices.compression.quantise import (
    ActivationRange,
    dequantise,
    fake_quantise,
    fold_batch_norms,
    limits,
    quantise,
    quantise_weight,
)
from devices.compression.sizes import dense_bytes, wire_bytes
from devices.compression.two_paths import step_of
from devices.errors import DeviceError
from fedsim.models.lenet import LeNet5
from fedsim.models.resnet import ResNet

# --- after training -------------------------------------------------------------------------------------------------


def test_weights_get_a_scale_for_each_output_channel_by_hand():
    """Largest 1.27 and 2.54: steps 0.01 and 0.02; a channel of zeros has step 1."""
    weight = torch.tensor([[1.27, -0.5, 0.004], [0.03, -2.54, 1.0], [0.0, 0.0, 0.0]])
    integers, scales = quantise_weight(weight)
    torch.testing.assert_close(scales, torch.tensor([0.01, 0.02, 1.0]))
    assert integers.tolist() == [[127, -50, 0], [2, -127, 50], [0, 0, 0]]
    torch.testing.assert_close(dequantise(integers, scales)[0], torch.tensor([1.27, -0.5, 0.0]))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_error_is_at_most_half_a_step(bits: int):
    weight = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    integers, scales = quantise_weight(weight, bits)
    error = (dequantise(integers, scales) - weight).abs().flatten(1).amax(1)
    assert bool((error <= scales / 2 + 1e-7).all())
    assert len(integers.unique()) <= 2**bits - 1
    assert limits(bits) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def test_activations_by_hand():
    """Range -1 to 4.1: step 0.02, zero 50; 0 stays 0, and what lies outside is clipped."""
    seen = ActivationRange()
    seen.see(torch.tensor([-1.0, 4.1]))
    assert (seen.scale, seen.zero) == (pytest.approx(0.02), 50)
    x = torch.tensor([0.0, 0.031, -9.0, 9.0])
    torch.testing.assert_close(seen.fake(x), torch.tensor([0.0, 0.04, -1.0, 4.1]))
    inside = torch.linspace(-1, 4.1, 999)
    assert float((seen.fake(inside) - inside).abs().max()) <= seen.scale / 2 + 1e-6


def test_ranges_hold_zero_and_move_by_a_hundredth():
    seen = ActivationRange()
    seen.see(torch.tensor([2.0, 3.0]))
    assert (seen.low, seen.high, seen.zero) == (0.0, 3.0, 0)
    seen.see(torch.tensor([-1.0, 13.0]))
    assert (seen.low, seen.high) == (pytest.approx(-0.01), pytest.approx(3.1))
    flat = ActivationRange()
    flat.see(torch.zeros(3))
    assert flat.fake(torch.zeros(2)).tolist() == [0.0, 0.0]


def normed() -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 3))
    for tensor in (model[1].weight, model[1].bias, model[1].running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(model[1].running_var, 0.5, 2.0)
    return model.eval()


@torch.no_grad()
def test_folded_norms_by_the_formula():
    model, x = normed(), torch.randn(4, 2, 5, 5)
    folded = fold_batch_norms(model)
    factor = model[1].weight / torch.sqrt(model[1].running_var + model[1].eps)
    layer = folded.get_submodule("0")
    torch.testing.assert_close(layer.weight, model[0].weight * factor.view(-1, 1, 1, 1))
    torch.testing.assert_close(layer.bias, model[1].bias + (model[0].bias - model[1].running_mean) * factor)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("make", [normed, lambda: LeNet5((2, 12, 12), 3).eval(), lambda: ResNet((2, 8, 8), 3).eval()])
def test_a_quantised_network_is_close_and_its_wire_a_quarter(make):
    model = make()
    size = {nn.Sequential: 5, LeNet5: 12, ResNet: 8}[type(model)]
    draw = torch.Generator().manual_seed(2)
    batches = [torch.randn(16, 2, size, size, generator=draw) for _ in range(8)]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = quantise(model, batches)
    x = torch.randn(32, 2, size, size, generator=draw)
    assert float((result.model(x) - model(x)).abs().mean() / model(x).abs().mean()) < 0.05
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(result.tensors[n].dtype == torch.int8 for n in result.bits)
    if isinstance(model, LeNet5):
        assert wire_bytes(result.tensors, result.bits) < 0.3 * dense_bytes(model.state_dict())
    coarse = quantise(model, batches, bits=2)
    assert float((coarse.model(x) - model(x)).abs().mean()) > float((result.model(x) - model(x)).abs().mean())
    assert wire_bytes(coarse.tensors, coarse.bits) < wire_bytes(result.tensors, result.bits)


@torch.no_grad()
def test_floats_stay_where_only_weights_are_quantised():
    model, x = normed(), torch.randn(4, 2, 5, 5)
    result = quantise(model, activation_bits=None)
    by_hand = fold_batch_norms(model)
    for name in ("0", "4"):
        layer = by_hand.get_submodule(name)
        layer.weight.data = dequantise(*quantise_weight(layer.weight))
    assert torch.equal(result.model(x), by_hand(x))
    with pytest.raises(DeviceError, match="were never seen; give batches"):
        quantise(model)


# --- in training ----------------------------------------------------------------------------------------------------


def test_straight_through_and_learned_step_gradients_by_hand():
    """Step 0.5, -2..1, v = -3, -0.8, 0.2, 1, 1.6: outside the weight gets none; share 1 / sqrt(5 x 1)."""
    weight = torch.tensor([-1.5, -0.4, 0.1, 0.5, 0.8], requires_grad=True)
    step = torch.tensor(0.5, requires_grad=True)
    out = fake_quantise(weight, step, -2, 1)
    assert out.tolist() == [-1.0, -0.5, 0.0, 0.5, 0.5]
    upstream = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    out.backward(upstream)
    assert weight.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 0.0]
    by_step = 1 * -2 + 2 * (-1 + 0.8) + 3 * (0 - 0.2) + 4 * 0 + 5 * 1
    assert step.grad.item() == pytest.approx(by_step / math.sqrt(5))


def test_steps_per_channel_get_the_sum_of_their_channel():
    weight = torch.tensor([[0.3, 0.9], [4.0, -4.0]], requires_grad=True)
    step = torch.tensor([[1.0], [2.0]], requires_grad=True)
    fake_quantise(weight, step, -2, 1).sum().backward()
    by_hand = [(0 - 0.3) + (1 - 0.9), 1.0 + (-2.0 + 2.0)]
    torch.testing.assert_close(step.grad.flatten(), torch.tensor(by_hand) / math.sqrt(2))


def test_steps_of_a_weight_by_hand():
    """Mean |w| of 2 and 4, 3 bits: 2 x mean / sqrt(3)."""
    weight = torch.tensor([[1.0, -3.0], [4.0, 4.0]])
    torch.testing.assert_close(step_of(weight, torch.ones(2, 2), 3), torch.tensor([4.0, 8.0]) / 3**0.5)


# --- real kernels -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_int8_kernels_run_and_are_integer_ones():
    model, x = ResNet((3, 16, 16), 10).eval(), torch.randn(4, 3, 16, 16)
    network = int8_network(model, x)
    assert len(integer_operators(network)) >= 10
    assert not integer_operators(model)
    assert float((network(x) - model(x)).abs().mean() / model(x).abs().mean()) < 0.1


def test_a_network_that_stays_in_floats_is_refused():
    class Scale(nn.Module):
        def forward(self, x):
            return x.cumsum(1)

    with pytest.raises(DeviceError, match="no int8 operator after quantising"):
        int8_network(Scale().eval(), torch.randn(2, 3))

    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(DeviceError, match="cannot run in int8 here"):
        int8_network(Branching().eval(), torch.randn(2, 3))


# --- distillation ---------------------------------------------------------------------------------------------------


def test_distillation_by_hand():
    """Teacher (ln 3, 0) at T = 1 says 3/4 and 1/4, the student 1/2: KL = 3/4 ln 3/2 + 1/4 ln 1/2."""
    student, teacher = torch.zeros(2, 2), torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0]])
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert divergence(student, teacher).item() == pytest.approx(kl)
    softened = torch.tensor([[2 * math.log(3), 0.0]])
    assert divergence(student[:1], softened, temperature=2.0).item() == pytest.approx(4 * kl)


def test_distillation_teaches_the_student_only():
    student, teacher = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    divergence(student, teacher, temperature=4.0).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert divergence(teacher, teacher, temperature=4.0).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("call", [lambda: limits(1), lambda: divergence(torch.ones(1, 2), torch.ones(1, 2), 0.0)])
def test_values_out_of_range_are_refused(call):
    with pytest.raises(DeviceError, match="must be"):
        call()
