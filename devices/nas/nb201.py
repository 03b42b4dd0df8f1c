"""NAS-Bench-201: the 15,625 small image networks that differ in one cell, as modules to train, trace and measure.

A cell has four nodes; node 0 is its input, node 3 its output, and each of the six edges holds one operation. An
architecture is the six operation ids (`OPERATIONS`) in the order of `EDGES`, or the benchmark's string form. The index
of an architecture in the benchmark's tables follows from neither: that order is shuffled.

Source: Dong & Yang, "NAS-Bench-201: Extending the Scope of Reproducible Neural Architecture Search", ICLR 2020, section
2 and figure 1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Annotated

import numpy as np
from annotated_types import Ge, Le
from torch import Tensor, nn
from torch.nn import functional as F

from devices.bounds import checked
from devices.errors import DeviceError, unknown
from devices.nas.blocks import Norm, choices, conv_norm, image_shape, normaliser

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
OUTPUT = 3  # the last node
# With operations on the vertices: 0 is the input, 1 to 6 are operations in the order of EDGES, 7 is the output. An
# arrow leads from each to those that take its node, also from a `none`.
ARROWS = ((0, 1), (0, 2), (0, 4), (1, 3), (1, 5), (2, 6), (3, 6), (4, 7), (5, 7), (6, 7))
STAGES = 3
EXAMPLE = "|nor_conv_3x3~0|+|none~0|nor_conv_1x1~1|+|skip_connect~0|none~1|skip_connect~2|"


@checked("model")
class NB201Network(nn.Module):
    """A 3x3 convolution, three stages of cells with residual reductions between, norm, global pool, linear head.

    Args:
        ops: the cell: six operation ids in the order of `EDGES`, or the string form.
        input_shape: channels, height, width; at least 4x4.
        num_classes: size of the output.
        channels: of the first stage; the next two have 2 and 4 times as many.
        cells: per stage.
        norm: "batch" as in the benchmark, or "group", which federated clients can train; the parameters are as many.

    Raises:
        DeviceError: for an architecture, input or option that does not fit.
    Source: Dong & Yang, ICLR 2020. Differs: odd sizes are rounded up by the reductions, and an edge with `none` costs
        nothing (the benchmark multiplies by zero). The details that the paper leaves open (no norm in the shortcut of a
        reduction, padding left out of the average) are from memory.
    """

    takes_tokens = False

    def __init__(
        self,
        ops: Sequence[int] | str,
        input_shape: Sequence[int] = (3, 32, 32),
        num_classes: Annotated[int, Ge(1)] = 10,
        channels: Annotated[int, Ge(1)] = 16,
        cells: Annotated[int, Ge(1), Le(100)] = 5,
        norm: Norm = "group",
    ):
        super().__init__()
        colours, _, _ = image_shape("nb201", input_shape, smallest=4)
        self.ops = from_string(ops) if isinstance(ops, str) else operation_ids(ops)
        self.encoding = "nb201:" + "".join(map(str, self.ops))  # how latency tables name it
        blocks: list[nn.Module] = []
        for stage in range(STAGES):
            width = channels * 2**stage
            if stage:
                blocks.append(Reduction(width // 2, width, norm))
            blocks += [Cell(self.ops, width, norm) for _ in range(cells)]
        self.stem = conv_norm(colours, channels, norm, kernel=3)
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Sequential(normaliser(norm, width), nn.ReLU())
        self.head = nn.Linear(width, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Returns what the head sees: [batch, 4 * channels] from x [batch, channels, height, width]."""
        return F.adaptive_avg_pool2d(self.last(self.blocks(self.stem(x))), 1).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, classes] of x [batch, channels, height, width]."""
        logits: Tensor = self.head(self.features(x))
        return logits


class Cell(nn.Module):
    """Four nodes, each the sum of the operations that lead to it.

    A node that nothing leads to is zero. A branch that leads nowhere is computed all the same and added times 0, so
    that every parameter has a gradient, though one of zeros.

    Args:
        ops: six operation ids in the order of `EDGES`.
        channels: of input and output.
        norm: "batch" or "group".
    """

    def __init__(self, ops: Sequence[int], channels: int, norm: Norm):
        super().__init__()
        live = {edge: op for edge, op in zip(EDGES, ops, strict=True) if OPERATIONS[op] != "none"}
        self.edges = nn.ModuleDict({f"{a}_{b}": operation(op, channels, norm) for (a, b), op in live.items()})
        self.read = {start for start, _ in live} | {OUTPUT}
        self.loose = sorted({end for _, end in live} - self.read)

    def forward(self, x: Tensor) -> Tensor:
        """Returns [batch, channels, height, width], the shape of x."""
        nodes = [x]
        for end in range(1, OUTPUT + 1):
            names = [f"{start}_{end}" for start in range(end)]
            terms = [self.edges[name](nodes[start]) for start, name in enumerate(names) if name in self.edges]
            if terms:
                nodes.append(reduce(add, terms))
            else:
                nodes.append(x * 0.0 if end in self.read else x)  # an unread node only holds its place in the list
        return reduce(add, (nodes[node] * 0.0 for node in self.loose), nodes[OUTPUT])


class Reduction(nn.Module):
    """Half the size and other channels: two 3x3 convolutions beside average pool and 1x1 convolution."""

    def __init__(self, before: int, after: int, norm: Norm):
        super().__init__()
        self.body = nn.Sequential(
            nn.ReLU(), conv_norm(before, after, norm, kernel=3, stride=2), nn.ReLU(), conv_norm(after, after, norm, 3)
        )
        pool = nn.AvgPool2d(2, ceil_mode=True)  # rounds up as the strided convolution does
        self.shortcut = nn.Sequential(pool, nn.Conv2d(before, after, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Returns [batch, after, ceil(height / 2), ceil(width / 2)] from x [batch, before, height, width]."""
        reduced: Tensor = self.body(x) + self.shortcut(x)
        return reduced


def operation(op: int, channels: int, norm: Norm) -> nn.Module:
    """Makes what an edge does, for ids other than `none`; [batch, channels, height, width] in and out."""
    name = OPERATIONS[op]
    if name == "skip_connect":
        return nn.Identity()
    if name == "avg_pool_3x3":
        return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    return nn.Sequential(nn.ReLU(), conv_norm(channels, channels, norm, kernel=3 if name == "nor_conv_3x3" else 1))


def operation_ids(ops: Sequence[int]) -> tuple[int, ...]:
    """Checks six operation ids in 0..4 and returns them as plain integers.

    Raises:
        DeviceError: for anything else.
    """
    return choices("nb201", "ops", ops, len(EDGES), range(len(OPERATIONS)))


def to_string(ops: Sequence[int]) -> str:
    """Writes the benchmark's string: nodes joined by "+", in each "|operation~start|..." for every edge to it.

    Raises:
        DeviceError: unless these are six operation ids.
    """
    nodes: dict[int, str] = {}
    for op, (start, end) in zip(operation_ids(ops), EDGES, strict=True):
        nodes[end] = nodes.get(end, "|") + f"{OPERATIONS[op]}~{start}|"
    return "+".join(nodes.values())


def from_string(text: str) -> tuple[int, ...]:
    """Reads six operation ids in the order of `EDGES`; undoes `to_string`.

    Raises:
        DeviceError: for a string of another form or with an unknown operation.
    """
    names = re.findall(r"\|([^|~+]*)~\d(?=\|)", text)
    for name in names:
        if name not in OPERATIONS:
            raise DeviceError(unknown("operation", name, OPERATIONS))
    ops = tuple(OPERATIONS.index(name) for name in names)
    if len(ops) != len(EDGES) or to_string(ops) != text:
        raise DeviceError(f"a network of NAS-Bench-201 is a string such as {EXAMPLE!r}, got {text!r}")
    return ops


def counts(
    ops: Sequence[int] | np.ndarray,
    input_shape: Sequence[int] = (3, 32, 32),
    num_classes: int = 10,
    channels: int = 16,
    cells: int = 5,
) -> tuple[np.ndarray, np.ndarray]:
    """Counts parameters and multiply-adds without building anything, for whole tables of architectures.

    Args:
        ops: operation ids in the order of `EDGES`, [..., 6]; what leads nowhere counts too.
        input_shape: as of `NB201Network`.
        num_classes: as of `NB201Network`.
        channels: as of `NB201Network`.
        cells: as of `NB201Network`.

    Returns:
        Parameters with those of the norms, and multiply-adds of convolutions and head for one example, [...] int64.
    """
    colours, height, width = image_shape("nb201", input_shape, smallest=4)
    ops = np.asarray(ops)
    pointwise = (ops == OPERATIONS.index("nor_conv_1x1")).sum(-1)
    square = (ops == OPERATIONS.index("nor_conv_3x3")).sum(-1)
    params = np.full(pointwise.shape, 9 * colours * channels + 2 * channels, dtype=np.int64)
    macs = np.full(pointwise.shape, 9 * colours * channels * height * width, dtype=np.int64)
    for stage in range(STAGES):
        c = channels * 2**stage
        if stage:
            height, width = -(-height // 2), -(-width // 2)
            weights = (9 * c + 9 * 2 * c + c) * c // 2  # from c/2: 3x3, then c to c: 3x3, and the shortcut
            params, macs = params + weights + 4 * c, macs + weights * height * width
        weights = cells * (pointwise + 9 * square) * c * c
        params, macs = params + weights + cells * (pointwise + square) * 2 * c, macs + weights * height * width
    return params + 2 * c + (c + 1) * num_classes, macs + c * num_classes
