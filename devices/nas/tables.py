"""Layer tables of NAS-Bench-201, FBNet and Once-for-All networks from their numbers alone, thousands at once.

The columns are those of `devices.trace`: ten layer kinds times (macs, activations, weights, calls), then a constant,
for one example. Norms and activations are left out, as runtimes fuse them. Source: fedsim (the networks are those of
Dong and Yang, "NAS-Bench-201", ICLR 2020, Wu et al., "FBNet", CVPR 2019, with the stem and head assumed there, and Cai
et al., "Once-for-All", ICLR 2020).
"""

from __future__ import annotations

import itertools

import numpy as np

from devices.errors import DeviceError, unknown
from devices.latency.columns import MAC_ROWS
from devices.nas import ofa
from devices.trace import COLUMNS, KINDS

FEATURE_SETS = ("counts", "layers")

NB201_OPS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
NB201_EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))  # of the cell's four nodes, in the order of the ids
NB201_CELLS = 5  # per stage
NB201_STAGES = ((16, 32), (32, 16), (64, 8))  # channels, pixels a side

FBNET_OPS = ("k3_e1", "k3_e1_g2", "k3_e3", "k3_e6", "k5_e1", "k5_e1_g2", "k5_e3", "k5_e6", "skip")
FBNET_STAGES = ((16, 1, 1), (24, 4, 1), (32, 4, 2), (64, 4, 2), (112, 4, 1), (184, 4, 2), (352, 1, 1))
OFA_NUMBERS = 2 * ofa.BLOCKS + len(ofa.STAGES) + 1
FBNET_SIDE = 32  # pixels; 100 classes, a last pointwise layer to 1504


def nb201_features(ops: np.ndarray, features: str = "layers") -> np.ndarray:
    """Returns what the networks of NAS-Bench-201 cost on CIFAR: 3 x 32 x 32 inputs, ten classes, batch 1.

    Args:
        ops: ids of `NB201_OPS` on the edges of `NB201_EDGES`, [n, 6].
        features: "layers" sums the layers by kind; "counts" only counts the cell's operations.

    Returns:
        [n, 41] for "layers"; [n, 5] for "counts": skips, 1x1 and 3x3 convolutions, pools, and a constant.

    Raises:
        DeviceError: for ids or a shape that do not fit, or an unknown feature set.
    """
    ops = _checked("nb201", ops, len(NB201_EDGES), len(NB201_OPS), features)
    counts = (ops[:, :, None] == np.arange(len(NB201_OPS))).sum(axis=1)
    if features == "counts":
        return np.column_stack([counts[:, 1:], np.ones(len(ops))]).astype(float)
    return _with_constant(counts @ _nb201_operations() + _nb201_skeleton())


def nb201_connected(ops: np.ndarray) -> np.ndarray:
    """Returns whether a path without `none` leads from the cell's input to its output, [n] bool.

    Ids are those of `nb201_features`. In the other networks the cells compute nothing, and runtimes that cut dead
    branches time them as empty.
    """
    ops = _checked("nb201", ops, len(NB201_EDGES), len(NB201_OPS), "counts")
    alive = np.zeros((len(ops), 4), dtype=bool)
    alive[:, 0] = True
    for edge, (start, end) in enumerate(NB201_EDGES):  # in the order of their ends' nodes, so that one pass is enough
        alive[:, end] |= alive[:, start] & (ops[:, edge] != NB201_OPS.index("none"))
    return alive[:, 3]


def fbnet_features(ops: np.ndarray, features: str = "layers") -> np.ndarray:
    """Returns what the networks of FBNet cost with 3 x 32 x 32 inputs and 100 classes, batch 1.

    Args:
        ops: ids of `FBNET_OPS` in the 22 searchable layers, [n, 22].
        features: "layers" sums the layers by kind; "counts" only counts the operations over all positions.

    Returns:
        [n, 41] for "layers"; [n, 9] for "counts": every operation but skip, and a constant.

    Raises:
        DeviceError: as in `nb201_features`.
    """
    positions, rest = _fbnet_operations()
    ops = _checked("fbnet", ops, len(positions), len(FBNET_OPS), features)
    if features == "counts":
        counts = (ops[:, :, None] == np.arange(len(FBNET_OPS) - 1)).sum(axis=1)
        return np.column_stack([counts, np.ones(len(ops))]).astype(float)
    return _with_constant(positions[np.arange(len(positions)), ops].sum(axis=1) + rest)


def ofa_features(networks: np.ndarray, features: str = "layers") -> np.ndarray:
    """Returns what subnets of Once-for-All cost on ImageNet at their own resolution, batch 1, [n, 41].

    Args:
        networks: 20 kernel sizes, 20 ratios, 5 depths and the resolution, [n, 46].
        features: "layers".

    Raises:
        DeviceError: for numbers that are not in the space, or other features.
    """
    networks = np.asarray(networks)
    if features != "layers":
        raise DeviceError(unknown("feature set of space ofa", features, ("layers",)))
    if networks.ndim != 2 or networks.shape[1] != OFA_NUMBERS or not np.issubdtype(networks.dtype, np.integer):
        numbers = f"{OFA_NUMBERS} whole numbers [n, {OFA_NUMBERS}]"
        raise DeviceError(f"networks of ofa are {numbers}, got {networks.dtype} {list(networks.shape)}")
    resolution = networks[:, -1]
    if len(networks) and not (resolution.min() >= ofa.SMALLEST and resolution.max() <= ofa.LARGEST):
        raise DeviceError(
            f"resolutions of ofa are {ofa.SMALLEST} to {ofa.LARGEST}, got {resolution.min()} to {resolution.max()}"
        )
    sizes, place = np.unique(resolution, return_inverse=True)
    blocks, rest = (np.array(part) for part in zip(*map(_ofa_operations, sizes.tolist()), strict=True))
    ks, ratios, depths = np.split(networks[:, :-1], [ofa.BLOCKS, 2 * ofa.BLOCKS], axis=1)
    total = rest[place]
    for block in range(ofa.BLOCKS):
        there = block % ofa.DEEPEST < depths[:, block // ofa.DEEPEST]
        options = [(ks, ofa.KERNELS), (ratios, ofa.EXPANSIONS)]
        if not all(np.isin(values[there, block], allowed).all() for values, allowed in options):
            raise DeviceError(f"block {block} of a network of ofa needs a kernel of 3, 5 or 7 and a ratio of 3, 4 or 6")
        kernel, ratio = (np.searchsorted(allowed, values[there, block]) for values, allowed in options)
        total[there] += blocks[place[there], block, kernel, ratio]
    return _with_constant(total)


def network_features(space: str, ops: np.ndarray, features: str = "layers") -> np.ndarray:
    """Returns `nb201_features`, `fbnet_features` or `ofa_features`, by the name of the space.

    Raises:
        DeviceError: also for an unknown space.
    """
    tables = {"nb201": nb201_features, "fbnet": fbnet_features, "ofa": ofa_features}
    if space not in tables:
        raise DeviceError(unknown("space", space, tables))
    return tables[space](ops, features)


def network_macs(space: str, ops: np.ndarray) -> np.ndarray:
    """Counts each network's multiply-adds for one example, [n]: convolutions and classifier, no pools and adds."""
    rows = network_features(space, ops)[:, :-1].reshape(len(ops), len(KINDS), len(COLUMNS))
    return np.asarray(rows[:, MAC_ROWS, 0].sum(axis=1))


def connected(space: str, ops: np.ndarray) -> np.ndarray:
    """Returns which networks compute something, [n] bool: outside NAS-Bench-201 all."""
    return nb201_connected(ops) if space == "nb201" else np.ones(len(ops), dtype=bool)


def _checked(space: str, ops: np.ndarray, width: int, choices: int, features: str) -> np.ndarray:
    if features not in FEATURE_SETS:
        raise DeviceError(unknown("feature set", features, FEATURE_SETS))
    ops = np.asarray(ops)
    if ops.ndim != 2 or ops.shape[1] != width or not np.issubdtype(ops.dtype, np.integer):
        raise DeviceError(f"networks of {space} are operation ids [n, {width}], got {ops.dtype} {list(ops.shape)}")
    if ops.size and not (ops.min() >= 0 and ops.max() < choices):
        raise DeviceError(f"operation ids of {space} are 0 to {choices - 1}, got {ops.min()} to {ops.max()}")
    return ops.astype(np.int64)


def _with_constant(rows: np.ndarray) -> np.ndarray:
    return np.column_stack([rows, np.ones(len(rows))])


def _row(kind: str, macs: float, activations: float, weights: float = 0.0) -> np.ndarray:
    """Returns one call of one layer as a flat table, [40]."""
    table = np.zeros((len(KINDS), len(COLUMNS)))
    table[KINDS.index(kind)] = macs, activations, weights, 1
    return table.ravel()


def _convolution(inputs: int, outputs: int, kernel: int, side: int, stride: int = 1, groups: int = 1) -> np.ndarray:
    """Returns a square convolution of `side` pixels, with stride 2 half as many, rounded up; a flat table, [40]."""
    if groups > 1:
        kind = "depthwise" if groups == inputs else "grouped"
    else:
        kind = "pointwise" if kernel == 1 else "conv3x3" if (kernel, stride) == (3, 1) else "conv"
    weights, out_side = kernel * kernel * inputs * outputs // groups, -(-side // stride)
    return _row(kind, weights * out_side**2, inputs * side**2 + outputs * out_side**2, weights)


def _nb201_operations() -> np.ndarray:
    """Sums all cells of one operation on one edge, [5 operations, 40]."""
    table = np.zeros((len(NB201_OPS), len(KINDS) * len(COLUMNS)))
    for channels, side in NB201_STAGES:
        elements = channels * side**2
        table[1] += NB201_CELLS * _row("elementwise", elements, 2 * elements)
        table[2] += NB201_CELLS * _convolution(channels, channels, 1, side)
        table[3] += NB201_CELLS * _convolution(channels, channels, 3, side)
        table[4] += NB201_CELLS * _row("pool", 9 * elements, 2 * elements)
    return table


def _nb201_skeleton() -> np.ndarray:
    """Sums stem, the two reductions and the classifier, [40]."""
    table: np.ndarray = _convolution(3, 16, 3, 32) + _row("fc", 640, 64 + 10, 640)
    for (inputs, side), (outputs, half) in itertools.pairwise(NB201_STAGES):
        table = table + _convolution(inputs, outputs, 3, side, 2) + _convolution(outputs, outputs, 3, half)
        table = table + _row("pool", 4 * inputs * half**2, inputs * (side**2 + half**2))
        table = table + _convolution(inputs, outputs, 1, half)
    return table


def _fbnet_operations() -> tuple[np.ndarray, np.ndarray]:
    """Returns each operation at each position, [22, 9, 40], and stem and head, [40]."""
    positions, inputs, side = [], 16, FBNET_SIDE
    for outputs, layers, first_stride in FBNET_STAGES:
        for layer in range(layers):
            stride = first_stride if layer == 0 else 1
            positions.append([_fbnet_layer(name, inputs, outputs, side, stride) for name in FBNET_OPS])
            inputs, side = outputs, side // stride
    rest = _convolution(3, 16, 3, FBNET_SIDE) + _convolution(inputs, 1504, 1, side)
    return np.array(positions), rest + _row("fc", 1504 * 100, 1504 + 100, 1504 * 100)


def _fbnet_layer(name: str, inputs: int, outputs: int, side: int, stride: int) -> np.ndarray:
    """Sums pointwise, depthwise, pointwise, and an add where shapes agree, [40]; `name` as in `FBNET_OPS`."""
    same = inputs == outputs and stride == 1
    if name == "skip":
        elements = inputs * side**2
        return _row("elementwise", elements, 2 * elements) if same else _convolution(inputs, outputs, 1, side, stride)
    groups, expanded, out_side = 2 if name.endswith("g2") else 1, inputs * int(name[4]), side // stride
    table: np.ndarray = _convolution(inputs, expanded, 1, side, groups=groups)
    table = table + _convolution(expanded, expanded, int(name[1]), side, stride, expanded)
    table = table + _convolution(expanded, outputs, 1, out_side, groups=groups)
    if same:
        table = table + _row("elementwise", outputs * out_side**2, 3 * outputs * out_side**2)
    return table


def _ofa_operations(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns each block by kernel and ratio, [20, 3, 3, 40], and what all subnets of a resolution have, [40]."""
    half = -(-side // 2)
    rest: np.ndarray = _convolution(3, ofa.STEM, 3, side, 2) + _convolution(ofa.STEM, ofa.STEM, 3, half, 1, ofa.STEM)
    rest = rest + _convolution(ofa.STEM, ofa.STEM, 1, half) + _residual(ofa.STEM, half)
    blocks, inputs, side = [], ofa.STEM, half
    for outputs, first_stride, squeezed, _ in ofa.STAGES:
        for layer in range(ofa.DEEPEST):
            stride = 1 if layer else first_stride
            options = itertools.product(ofa.KERNELS, ofa.EXPANSIONS)
            made = [_ofa_block(inputs, outputs, side, stride, squeezed, *option) for option in options]
            blocks.append(np.array(made).reshape(len(ofa.KERNELS), len(ofa.EXPANSIONS), -1))
            inputs, side = outputs, -(-side // stride)
    rest = rest + _convolution(inputs, ofa.EXPANDED, 1, side) + _mean(ofa.EXPANDED, side)
    rest = rest + _convolution(ofa.EXPANDED, ofa.LAST, 1, 1)
    return np.array(blocks), rest + _row("fc", ofa.LAST * 1000, ofa.LAST + 1000, ofa.LAST * 1000)


def _ofa_block(
    inputs: int, outputs: int, side: int, stride: int, squeezed: bool, kernel: int, ratio: int
) -> np.ndarray:
    """Sums pointwise, depthwise, squeeze-and-excitation, pointwise, and an add where shapes agree, [40]."""
    middle, out_side = inputs * ratio, -(-side // stride)
    table: np.ndarray = _convolution(inputs, middle, 1, side) + _convolution(
        middle, middle, kernel, side, stride, middle
    )
    if squeezed:
        inner, elements = ofa.divisible(middle // ofa.SQUEEZE), middle * out_side**2
        table = table + _mean(middle, out_side) + _convolution(middle, inner, 1, 1) + _convolution(inner, middle, 1, 1)
        table = table + _row("elementwise", elements, 2 * elements + middle)
    table = table + _convolution(middle, outputs, 1, out_side)
    return table + _residual(outputs, out_side) if inputs == outputs and stride == 1 else table


def _residual(channels: int, side: int) -> np.ndarray:
    elements = channels * side**2
    return _row("elementwise", elements, 3 * elements)


def _mean(channels: int, side: int) -> np.ndarray:
    return _row("pool", channels * side**2, channels * (side**2 + 1))
