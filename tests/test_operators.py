"""What operators multiply: no product is free, and none that nobody knows passes for an elementwise one."""

import re
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, library, nn
from torch.nn import functional as F
from torch.utils.flop_counter import flop_registry, register_flop_formula
from torchs_counter import counter

from devices.errors import DeviceError
from devices.meter import Flops, measure
from devices.operators import PLAIN, PRODUCTS, is_plain
from devices.trace import KINDS, trace

D = 8  # width of the inputs below, [2, 8]


class Calls(nn.Module):
    """A function of the input and one parameter."""

    def __init__(self, function: Callable[..., Tensor], *shape: int):
        super().__init__()
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        self.weight, self.function = nn.Parameter(weight), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def spd(x: Tensor) -> Tensor:
    """A matrix per example that has all decompositions, [batch, 8, 8], by one multiplication per cell."""
    return x[:, :, None] * x[:, None, :] + 9 * torch.eye(D, device=x.device)


def fused(x: Tensor, w: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x[:, None, None], w[None, None], w[None, None])


PER_EXAMPLE = {
    "mm": (Calls(lambda x, w: x @ w, D, 5), D * 5),
    "mv": (Calls(lambda x, w: torch.stack([w @ row for row in x]), 5, D), D * 5),
    "dot": (Calls(lambda x, w: torch.stack([torch.dot(w, row) for row in x]), D), D),
    "complex": (Calls(lambda x, w: (x.to(torch.cfloat) @ w.to(torch.cfloat)).real, D, 5), 4 * D * 5),
    "complex batches": (Calls(lambda x, w: (x.to(torch.cfloat)[:, None] * 1j @ w.to(torch.cfloat)).imag, D, 5), 160),
    "addbmm": (Calls(lambda x, w: torch.addbmm(x[:, :5], x[None], w[None]), D, 5), D * 5),
    "einsum": (Calls(lambda x, w: torch.einsum("bi,ij->bj", x, w), D, 5), D * 5),
    "bilinear": (nn.Bilinear(D, D, 3), None),  # two inputs: below
    "bilinear function": (Calls(lambda x, w: F.bilinear(x, x, w), 3, D, D), 3 * D * D),
    "cdist": (Calls(torch.cdist, 30, D), 30 * D),
    "cdist, differences": (Calls(lambda x, w: torch.cdist(x, w, p=1.0), 5, D), 5 * D),
    "conv_tbc": (Calls(lambda x, w: torch.conv_tbc(x.T[:, :, None].contiguous(), w, w[0, 0]), 3, 1, 4), 6 * 3 * 4),
    "attention": (Calls(fused, 6, D), 2 * 6 * D),
    "solve": (Calls(lambda x, w: torch.linalg.solve(spd(x), w), D, 3), D**3 / 3 + 3 * D**2),
    "inverse": (Calls(lambda x, w: torch.linalg.inv(spd(x)) * w, 1), D**3),
    "determinant": (Calls(lambda x, w: torch.linalg.det(spd(x)) * w, 1), D**3 / 3),
    "cholesky": (Calls(lambda x, w: torch.linalg.cholesky(spd(x)) * w, 1), D**3 / 6),
    "triangular": (Calls(lambda x, w: torch.linalg.solve_triangular(spd(x), w, upper=True), D, 3), 3 * D**2 / 2),
    "qr": (Calls(lambda x, w: torch.linalg.qr(spd(x)).Q * w, 1), 2 * (D**3 - D**3 / 3)),
    "eigenvalues": (Calls(lambda x, w: torch.linalg.eigh(spd(x)).eigenvectors * w, 1), 9 * D**3 / 2),
    "singular values": (Calls(lambda x, w: torch.linalg.svd(spd(x)).U * w, 1), 21 * D**3 / 2),
    "fourier": (Calls(lambda x, w: torch.fft.fft(x.to(torch.cfloat)).real * w, 1), 2.5 * D * 3),
    "real fourier": (Calls(lambda x, w: torch.fft.rfft(x).real * w, 1), 1.25 * D * 3),
}


@pytest.mark.parametrize("case", [case for case, (_, macs) in PER_EXAMPLE.items() if macs is not None])
def test_no_product_is_free(case: str):
    """By layer kinds, by our counter and by torch's with our formulas; the batch of two is divided out."""
    model, macs = PER_EXAMPLE[case]
    x = torch.randn(2, D, generator=torch.Generator().manual_seed(1))
    assert trace(model, x).macs == pytest.approx(macs)
    with torch.no_grad(), Flops() as ours:
        model(x)
    with torch.no_grad(), counter() as torchs:
        model(x)
    assert ours.total == pytest.approx(2 * 2 * macs, abs=1)
    assert torchs.get_total_flops() == ours.total


@pytest.mark.parametrize("case", ["mm", "complex", "bilinear function", "cdist", "conv_tbc", "attention", "solve"])
def test_gradients_of_products_are_products(case: str):
    """A gradient of the weight takes no less than the product itself, but that of a solution: it reuses the factors."""
    model, macs = PER_EXAMPLE[case]
    least = 3 * D**2 if case == "solve" else macs
    cost = measure(model, lambda m, b: m(b["x"]).sum(), {"x": torch.randn(4, D)}, case)
    assert cost.forward_flops == pytest.approx(2 * macs, abs=1)
    assert cost.backward_flops >= 2 * least


def test_a_bilinear_layer_is_one_multiply_add_per_weight():
    table = trace(nn.Bilinear(4, 5, 3, bias=False), (torch.randn(2, 4), torch.randn(2, 5)))
    assert table.rows[KINDS.index("fc")] == (60, 4 + 5 + 3, 60, 1)


def test_a_deformable_convolution_is_a_convolution():
    """3 inputs, 4 outputs, kernel 3, 36 pixels: 3 * 9 * 4 * 36 = 3888; its gradients need two such products."""

    class Deformed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torchvision.ops.DeformConv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, x.new_zeros(len(x), 18, 6, 6))

    assert trace(Deformed(), torch.randn(2, 3, 6, 6)).rows[KINDS.index("conv")][0] == 3888
    cost = measure(Deformed(), lambda m, b: m(b["x"]).sum(), {"x": torch.randn(4, 3, 6, 6)}, "deformed")
    assert (cost.forward_flops, cost.backward_flops) == (2 * 3888, 4 * 3888)


def test_an_operator_that_nobody_knows_is_refused_until_a_formula_is_given():
    @library.custom_op("own::twice", mutates_args=())
    def twice_through(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight @ weight

    model, x = Calls(lambda x, w: twice_through(x, w), D, D), torch.randn(4, D)
    for count in (
        lambda: trace(model, x),
        lambda: measure(model, lambda m, b: m(b["x"]).detach().sum(), {"x": x}, "own"),
    ):
        with pytest.raises(DeviceError, match=r"own::twice cannot be priced.*register_flop_formula"):
            count()
    operator = torch.ops.own.twice
    register_flop_formula(operator)(lambda x, weight, out_shape=None: 4 * x[0] * weight[0] * weight[1])
    try:
        assert trace(model, x).macs == 2 * D * D
    finally:
        del flop_registry[operator]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("module", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d])
def test_convolutions_multiply_as_torch_says(module: type[nn.Module], groups: int):
    """Both ways, with and without a gradient of the input; torch's counter uses its own formulas of them."""
    conv, dims = module(4, 8, 3, stride=2, padding=1, groups=groups, bias=groups > 1), int(module.__name__[-2])
    for wanted in (False, True):
        x = torch.randn(3, 4, *(9,) * dims, requires_grad=wanted)
        with counter() as torchs:
            conv(x).sum().backward()
        with Flops() as ours:
            conv(x).sum().backward()
        assert ours.total == torchs.get_total_flops() > 0


def test_matrix_functions_without_a_formula_are_refused():
    model = Calls(lambda x, w: torch.linalg.matrix_exp(spd(x)) * w, 1)
    with pytest.raises(DeviceError, match="network Calls cannot be traced: operator aten::linalg_matrix_exp cannot be"):
        trace(model, torch.randn(2, D))


MULTIPLIES = r"mm$|mm_|mv$|conv|linear|matmul|attention|linalg|cholesky|solve|svd|qr|eig|fft_|rnn|lstm|gru|dist"
# Gates behind products that are operators of their own, norms, and words that hold those above by chance.
ONE_PASS = r"_thnn_fused|vector_norm|cross|check_errors|powsum|upsample|^dist$|sqrt|reorder|_interface|embedding"


def test_no_operator_of_torch_whose_name_tells_of_products_is_plain():
    """Over all operators that this torch has: a new one is refused, not priced as elementwise."""
    assert not {f"aten::{name}" for name in PLAIN} & set(PRODUCTS)
    found = []
    for full in torch._C._dispatch_get_all_op_names():
        space, _, rest = full.partition("::")
        name, _, overload = rest.partition(".")
        if torch._C._dispatch_has_kernel_for_dispatch_key(full, "CompositeImplicitAutograd"):
            continue  # seen as its parts
        if space != "aten" or not re.search(MULTIPLIES, name) or re.search(ONE_PASS, name):
            continue
        func = getattr(getattr(torch.ops.aten, name), overload or "default", None)
        if func is not None and is_plain(func):
            found.append(full)
    assert not found
