"""Counts the multiply-adds of torch's operators, and knows which operators take next to none.

Where this module has no formula, torch's own are asked, for fused attention on cards and operators that a user
registers; importing them takes a tenth of the time of torch itself. An operator without any formula is refused: taken
for an elementwise one, its products would cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from devices.errors import DeviceError

Macs = Callable[[Any, Tensor], float]  # of the positional arguments and the (first) output


def _inner(position: int) -> Macs:
    """Counts a matrix product: each output sums over the last dimension of its left matrix."""
    return lambda args, out: out.numel() * args[position].shape[-1]


def _trilinear(args: Any, out: Tensor) -> float:
    """Counts `_trilinear(a, b, c, expand_a, expand_b, expand_c, ...)`: one for each cell of all three, broadcast."""
    dims = args[0].dim() + len(args[3])
    sizes = [1] * dims
    for tensor, expanded in zip(args[:3], args[3:6], strict=True):
        own = iter(tensor.shape)
        shape = [1 if dim in expanded else next(own) for dim in range(dims)]
        sizes = [max(pair) for pair in zip(sizes, shape, strict=True)]
    return math.prod(sizes)


def _attention(query: Tensor, key: Tensor, value: Tensor, scores: int, values: int) -> float:
    """Counts so many products as large as query times key, and as scores times value."""
    pairs = query.numel() // query.shape[-1] * key.shape[-2]
    return pairs * (scores * query.shape[-1] + values * value.shape[-1])


def _convolution(args: Any, out: Tensor) -> int:
    """Counts a weight at every position of the side that it is slid over: the output, or a transposed one's input."""
    x, weight, transposed = args[0], args[1], args[6]
    return int(weight.numel() * _positions(x if transposed else out))


def _convolution_backward(args: Any, out: Tensor) -> int:
    """Counts as many for the input's gradient; for the weights' as torch does, as if all were in one group."""
    grad, x, weight, transposed, (of_input, of_weight, _) = args[0], args[1], args[2], args[7], args[10]
    slid, other = (x, grad) if transposed else (grad, x)
    macs = of_input * weight.numel() * _positions(slid)
    return int(macs + of_weight * math.prod(weight.shape[2:]) * slid.numel() * other.shape[1])


def _positions(x: Tensor) -> int:
    return x.shape[0] * math.prod(x.shape[2:])


def _cubes(share: float) -> Macs:
    """Counts a share of n^3 for each square matrix of the first argument, [..., n, n]."""
    return lambda args, out: share * args[0].numel() * args[0].shape[-1]


def _substitutions(share: float, matrix: int, right: int) -> Macs:
    """Counts a share of n^2 for each column that is solved for, with a factor [..., n, n]."""
    return lambda args, out: share * max(out.numel(), args[right].numel()) * args[matrix].shape[-1]


def _reflections(share: float) -> Macs:
    """Counts a QR decomposition [..., m, n] by Householder: a share of m k^2 - k^3 / 3, k the smaller side."""

    def macs(args: Any, out: Tensor) -> float:
        m, n = args[0].shape[-2:]
        k = min(m, n)
        return float(share * args[0].numel() / max(1, m * n) * (m * n * k - k**3 / 3))

    return macs


def _singular(args: Any, out: Tensor) -> float:
    """Counts 4 m^2 n + 8 m n^2 + 9 n^3 FLOPs, m the larger side (Golub and Van Loan, section 8.6)."""
    m, n = sorted(args[0].shape[-2:], reverse=True)
    return float(args[0].numel() / max(1, m * n) * (4 * m * m * n + 8 * m * n * n + 9 * n**3) / 2)


def _fourier(real: bool) -> Macs:
    """Counts 5 n log2 n FLOPs for n complex numbers, half of it for real ones."""

    def macs(args: Any, out: Tensor) -> float:
        larger = max(args[0], out, key=lambda x: x.numel())
        points = math.prod(larger.shape[dim] for dim in args[1])
        return float(larger.numel() * math.log2(max(1, points)) * (1.25 if real else 2.5))

    return macs


# By the name in torch, without the mark of operators in place. Dense linear algebra: FLOPs of Golub and Van Loan,
# "Matrix Computations", 4th edition, tables and sections 3.2, 4.2, 5.2, 7.5, 8.3 and 8.6, halved.
PRODUCTS: dict[str, Macs] = {
    **dict.fromkeys(("aten::mm", "aten::bmm", "aten::mv", "aten::dot", "aten::vdot"), _inner(0)),
    **dict.fromkeys(("aten::_int_mm", "aten::_scaled_mm", "aten::linear", "aten::mkldnn_linear"), _inner(0)),
    **dict.fromkeys(("aten::addmm", "aten::baddbmm", "aten::addmv", "aten::_addmm_activation"), _inner(1)),
    "aten::addbmm": lambda args, out: args[1].numel() * args[2].shape[-1],
    "aten::_trilinear": _trilinear,
    **dict.fromkeys(("aten::_cdist_forward", "aten::_euclidean_dist", "aten::_pdist_forward"), _inner(0)),
    **dict.fromkeys(
        ("aten::_cdist_backward", "aten::_pdist_backward"), lambda args, out: args[0].numel() * args[1].shape[-1]
    ),
    "aten::convolution": _convolution,
    "aten::convolution_backward": _convolution_backward,
    "aten::conv_tbc": lambda args, out: out.numel() * args[1].shape[0] * args[1].shape[1],
    "aten::conv_tbc_backward": lambda args, out: 2 * args[0].numel() * args[2].shape[0] * args[2].shape[1],
    "torchvision::deform_conv2d": lambda args, out: out.numel() * args[1][0].numel(),
    "torchvision::_deform_conv2d_backward": lambda args, out: 2 * args[0].numel() * args[2][0].numel(),
    "aten::_scaled_dot_product_flash_attention_for_cpu": lambda args, out: _attention(args[0], args[1], args[2], 1, 1),
    # The scores once more, then the gradients of scores, value, key and query.
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": lambda args, out: _attention(
        args[1], args[2], args[3], 3, 2
    ),
    **dict.fromkeys(("aten::linalg_lu", "aten::linalg_lu_factor_ex"), _cubes(1 / 3)),
    **dict.fromkeys(("aten::_linalg_det", "aten::_linalg_slogdet"), _cubes(1 / 3)),
    **dict.fromkeys(("aten::linalg_cholesky_ex", "aten::cholesky"), _cubes(1 / 6)),
    **dict.fromkeys(("aten::linalg_inv_ex", "aten::linalg_pinv"), _cubes(1)),
    "aten::cholesky_inverse": _cubes(1 / 3),
    "aten::_linalg_eigh": _cubes(9 / 2),
    "aten::linalg_eig": _cubes(25 / 2),
    **dict.fromkeys(("aten::linalg_eigvals", "aten::_linalg_eigvals"), _cubes(10 / 2)),
    "aten::_linalg_solve_ex": lambda args, out: _cubes(1 / 3)(args, out) + _substitutions(1, 0, 1)(args, out),
    "aten::linalg_lu_solve": _substitutions(1, 0, 2),
    "aten::cholesky_solve": _substitutions(1, 1, 0),
    "aten::_cholesky_solve_helper": _substitutions(1, 1, 0),
    "aten::linalg_solve_triangular": _substitutions(1 / 2, 0, 1),
    "aten::triangular_solve": _substitutions(1 / 2, 1, 0),
    "aten::geqrf": _reflections(1),
    "aten::linalg_qr": _reflections(2),  # and the orthogonal matrix
    "aten::linalg_householder_product": _reflections(1),
    "aten::_linalg_svd": _singular,
    "aten::_fft_c2c": _fourier(real=False),
    **dict.fromkeys(("aten::_fft_r2c", "aten::_fft_c2r"), _fourier(real=True)),
}

# A few operations per element that is read or written, where torch does not tag them "pointwise" ("reduction" is a tag
# since torch 2.11 only). In this order: reductions, what moves elements or makes them, questions about tensors, random
# numbers, activations and norms, sums and orders and look-ups (some with a logarithm of steps per element), samples
# between pixels, losses and rounding to fewer bits, optimisers.
PLAIN = frozenset(
    """
    all amax amin aminmax any argmax argmin count_nonzero linalg_vector_norm logsumexp mean nansum norm prod std
    std_mean sum var var_mean
    _chunk_cat _coalesce _coalesced _conj_copy _conj_physical _copy_from _efficientzerotensor _fw_primal_copy
    _index_put_impl _indices_copy _jagged_to_padded_dense_forward _lazy_clone _local_scalar_dense _make_dual_copy
    _mkldnn_reshape _mkldnn_transpose _new_zeros_with_same_feature_meta _pack_padded_sequence
    _padded_dense_to_jagged_forward _pin_memory _reshape_alias_copy _reshape_copy _resize_output
    _sparse_coo_tensor_with_dims _sparse_coo_tensor_with_dims_and_tensors _stack _to_copy _to_dense _to_sparse
    _unsafe_index _unsafe_index_put _unsafe_masked_index _unsafe_masked_index_put_accumulate _unsafe_view
    _values_copy alias_copy arange as_strided as_strided_copy as_strided_scatter block_diag cat channel_shuffle
    clone col2im complex constant_pad_nd copy detach detach_copy diag_embed diagonal_copy diagonal_scatter empty
    empty_like empty_permuted empty_strided expand_copy eye fill flip full full_like gather im2col index index_add
    index_copy index_fill index_put index_reduce index_select indices_copy lift lift_fresh lift_fresh_copy linspace
    logspace masked_fill masked_scatter masked_select max_unpool2d max_unpool3d mkldnn_reorder_conv2d_weight
    mkldnn_reorder_conv3d_weight narrow_copy new_empty new_empty_strided new_full new_ones new_zeros nonzero
    nonzero_static ones ones_like permute_copy pixel_shuffle pixel_unshuffle polar put randperm range
    reflection_pad1d reflection_pad2d reflection_pad3d repeat repeat_interleave replication_pad1d replication_pad2d
    replication_pad3d resize resize_as roll rot90 scalar_tensor scatter scatter_add scatter_reduce select_copy
    select_scatter set slice_copy slice_scatter sparse_mask split_copy split_with_sizes_copy squeeze squeeze_copy
    stack t t_copy take to_mkldnn to_padded_tensor transpose transpose_copy tril triu unbind_copy unfold_backward
    unfold_copy unsafe_split unsafe_split_with_sizes unsqueeze unsqueeze_copy values_copy view_as_complex_copy
    view_as_real_copy view_copy zero zeros zeros_like

    _assert_async _assert_tensor_metadata _dimI _dimV _functional_assert_async _fused_sdp_choice
    _has_same_storage_numel _is_all_true _is_any_true _linalg_check_errors _nnz allclose dense_dim equal
    is_coalesced is_pinned is_same_size is_set_to record_stream sparse_dim

    _dirichlet_grad _fused_dropout _sample_dirichlet _standard_gamma _standard_gamma_grad bernoulli binomial cauchy
    exponential geometric log_normal multinomial native_dropout normal normal_functional poisson rand rand_like
    randint randint_like randn randn_like random rrelu_with_noise rrelu_with_noise_functional uniform

    _add_relu _batch_norm_no_update _batch_norm_with_update _batch_norm_with_update_functional _fused_rms_norm
    _log_softmax _masked_scale _masked_softmax _native_batch_norm_legit _native_batch_norm_legit_functional
    _native_batch_norm_legit_no_training _prelu_kernel _safe_softmax _softmax _thnn_fused_gru_cell
    _thnn_fused_lstm_cell _transform_bias_rescale_qkv _weight_norm_interface batch_norm_elemt
    batch_norm_gather_stats batch_norm_gather_stats_with_counts batch_norm_stats batch_norm_update_stats celu
    cudnn_batch_norm floor_divide glu glu_jvp hardswish leaky_relu log_sigmoid_forward log_softmax native_batch_norm
    native_group_norm native_layer_norm native_norm renorm softmax threshold

    __irshift__ _adaptive_avg_pool2d _adaptive_avg_pool3d _aminmax _cummax_helper _cummin_helper _embedding_bag
    _embedding_bag_forward_only _logcumsumexp _unique _unique2 adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d addr avg_pool1d avg_pool2d avg_pool3d bincount
    bucketize cummax cummin cumprod cumsum dist embedding embedding_renorm fractional_max_pool2d
    fractional_max_pool3d histc histogram isin kthvalue linalg_cross logcumsumexp lu_unpack max_pool2d_with_indices
    max_pool3d_with_indices median mkldnn_adaptive_avg_pool2d mkldnn_max_pool2d mkldnn_max_pool3d mode nanmedian
    quantized_max_pool1d quantized_max_pool2d quantized_max_pool3d searchsorted segment_reduce sort topk trace
    unique_consecutive unique_dim unique_dim_consecutive

    _grid_sampler_2d_cpu_fallback _upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d affine_grid_generator grid_sampler_2d grid_sampler_3d
    upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d
    upsample_nearest3d upsample_trilinear3d

    _ctc_loss _fake_quantize_learnable_per_channel_affine _fake_quantize_learnable_per_tensor_affine
    _fake_quantize_per_tensor_affine_cachemask_tensor_qparams _fused_moving_avg_obs_fq_helper
    _fused_moving_avg_obs_fq_helper_functional binary_cross_entropy binary_cross_entropy_with_logits dequantize
    fake_quantize_per_channel_affine_cachemask fake_quantize_per_tensor_affine_cachemask huber_loss int_repr
    mse_loss multi_margin_loss multilabel_margin_loss_forward nll_loss2d_forward nll_loss_forward
    quantize_per_channel quantize_per_tensor quantize_per_tensor_dynamic smooth_l1_loss soft_margin_loss

    _amp_foreach_non_finite_check_and_unscale _amp_update_scale _fused_adagrad _fused_adam _fused_adamw _fused_sgd
    """.split()  # noqa: SIM905 - as a list it takes a screen for each ten
)
# Gradients of products: what else has "backward" in its name is the gradient of a plain operator.
PRODUCT_MARKS = ("conv", "matmul", "_mm_", "attention", "rnn", "lstm_mps", "dist_", "_sparse_")
DETECTION = {"nms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool"}  # torchvision: samples between pixels


def name_of(func: Any) -> str:
    """Returns an operator's name without the mark of in-place ones: "aten::add" of `aten.add_.Tensor`."""
    name = str(func._schema.name)
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


@lru_cache(maxsize=4096)
def is_plain(func: Any) -> bool:
    """Returns whether an operator takes so few operations per element that its multiply-adds are not counted."""
    space, _, name = name_of(func).partition("::")
    if space == "torchvision":
        return name.strip("_").removesuffix("_backward") in DETECTION
    if space in ("prims", "profiler", "debugprims"):
        return True
    if space != "aten":
        return False
    if func.is_view or name in PLAIN or name.startswith("_foreach_"):
        return True
    if "backward" in name:
        return not (any(mark in name for mark in PRODUCT_MARKS) or name.startswith(("linear", "mkldnn_linear")))
    packet = getattr(torch.ops.aten, name, None)
    overloads = [func, *(getattr(packet, each) for each in packet.overloads())] if packet is not None else [func]
    return any(torch.Tag.pointwise in each.tags for each in overloads)


def macs_of(func: Any, args: Any, kwargs: Any, out: Any) -> float | None:
    """Counts the multiply-adds of one call; None for a plain operator. A complex product is four real ones.

    Raises:
        DeviceError: for an operator that may multiply and that no formula knows.
    """
    macs = PRODUCTS.get(name_of(func))
    if macs is not None:
        first = next((x for x in tree_leaves(out) if isinstance(x, Tensor)), None)
        return macs(_positional(func, args, kwargs), first) * _parts(func, args) if first is not None else 0.0
    if is_plain(func):
        return None
    from torch.utils.flop_counter import flop_registry  # late: it imports triton

    if func._overloadpacket in flop_registry:
        flops = float(flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out))
        return flops * _parts(func, args) / 2
    raise DeviceError(
        f"operator {func._schema.name} cannot be priced: no formula says how much it multiplies; "
        "register one with torch.utils.flop_counter.register_flop_formula"
    )


def _positional(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """Returns all arguments in the order of the schema, with defaults."""
    left = func._schema.arguments[len(args) :]
    return [*args, *((kwargs or {}).get(each.name, each.default_value) for each in left)]


def _parts(func: Any, args: Any) -> int:
    """Returns the real products in one: 4 of complex numbers, which formulas of Fourier transforms have already."""
    is_complex = any(isinstance(x, Tensor) and x.is_complex() for x in tree_leaves(args))
    return 4 if is_complex and "_fft_" not in func._schema.name else 1
