"""Encodes networks of a search space as HELP reads them: a row of operation ids in, a float32 tensor out.

Source: Lee et al., "HELP: Hardware-Adaptive Efficient Latency Prediction for NAS via Meta-Learning", NeurIPS 2021; the
layouts are those of the authors' code, so that their released weights can be used.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from devices.errors import DeviceError, unknown
from devices.nas.nb201 import ARROWS

GRAPH_NODES = 9  # input, six operations, output, and the global node that sees them all
GRAPH_COLUMNS = 8
# Column of each operation id (none, skip_connect, nor_conv_1x1, nor_conv_3x3, avg_pool_3x3) in HELP's order
# input, avg_pool_3x3, nor_conv_1x1, nor_conv_3x3, none, skip_connect, output, global.
NB201_COLUMN = torch.tensor([4, 5, 2, 3, 1])

OFA_BLOCKS, OFA_STAGES, OFA_STAGE_DEPTH = 20, 5, 4
OFA_KERNELS, OFA_EXPANSIONS, OFA_DEPTHS = (3, 5, 7), (3, 4, 6), (2, 3, 4)
OFA_RESOLUTIONS = tuple(range(128, 225, 4))


@dataclass(frozen=True)
class Encoding:
    """The form of one network: `numbers` integers before encoding, described by `layout`, a tensor of `shape` after."""

    numbers: int
    shape: tuple[int, ...]
    layout: str


ENCODINGS = {
    "nb201": Encoding(6, (GRAPH_NODES, GRAPH_COLUMNS), "operation ids 0..4 of the edges 0>1, 0>2, 1>2, 0>3, 1>3, 2>3"),
    "fbnet": Encoding(22, (132,), "operation ids 0..8 of 22 layers"),
    "ofa": Encoding(46, (145,), "20 kernel sizes, 20 expansion ratios, 5 stage depths, 1 resolution"),
}


def encode(space: str, networks: np.ndarray) -> Tensor:
    """Encodes networks as HELP's predictor reads them.

    Args:
        space: "nb201", "fbnet" or "ofa".
        networks: one row of integers per network: [n, 6] for nb201 and [n, 22] for fbnet, as `Space.ops` has them;
            [n, 46] for ofa: kernel size and expansion ratio of each block, stage depths and resolution, side by side.

    Returns:
        [n, 9 nodes, 8 columns] for nb201, [n, 132] for fbnet, [n, 145] for ofa; float32.

    Raises:
        DeviceError: for an unknown space, or a network that is not in the space.
    """
    if space not in ENCODINGS:
        raise DeviceError(unknown("space", space, ENCODINGS))
    form, networks = ENCODINGS[space], np.asarray(networks)
    if networks.ndim != 2 or networks.shape[1] != form.numbers or not np.issubdtype(networks.dtype, np.integer):
        came = f"{networks.dtype} of shape {networks.shape}"
        raise DeviceError(f"networks of space {space} are integers [n, {form.numbers}] ({form.layout}), got {came}")
    rows = torch.from_numpy(networks.astype(np.int64))
    return {"nb201": _encode_nb201, "fbnet": _encode_fbnet, "ofa": _encode_ofa}[space](rows)


def graph_adjacency() -> Tensor:
    """Returns the cell of NAS-Bench-201 as HELP adds up its nodes: row i sums node i and what feeds it, [9, 9].

    The same for every network: a `none` operation keeps its arrows. The last row is the global node and sums all.
    """
    arrows = torch.eye(GRAPH_NODES)
    arrows[:, -1] = 1
    for start, end in ARROWS:
        arrows[start, end] = 1
    return arrows.T.contiguous()


def _encode_nb201(ops: Tensor) -> Tensor:
    _check("nb201", ops, ops.ge(0) & ops.lt(len(NB201_COLUMN)), "operation")
    ends = torch.tensor([0, GRAPH_COLUMNS - 2, GRAPH_COLUMNS - 1]).expand(len(ops), 3)  # input, output, global
    columns = torch.cat([ends[:, :1], NB201_COLUMN[ops], ends[:, 1:]], dim=1)
    return F.one_hot(columns, GRAPH_COLUMNS).float()


def _encode_fbnet(ops: Tensor) -> Tensor:
    """Encodes six slots a layer: kernel 3, kernel 5, and four expansion variants; a skip (id 8) has none of them."""
    _check("fbnet", ops, ops.ge(0) & ops.le(8), "operation")
    kernel, expansion = F.one_hot(ops // 4, 3)[..., :2], F.one_hot(ops % 4, 4)
    used = ops.lt(8).unsqueeze(-1)
    return (torch.cat([kernel, expansion], dim=-1) * used).flatten(1).float()


def _encode_ofa(rows: Tensor) -> Tensor:
    kernels, expansions, depths, resolution = rows.split((OFA_BLOCKS, OFA_BLOCKS, OFA_STAGES, 1), dim=1)
    _check("ofa", depths, _among(depths, OFA_DEPTHS), "depth of stage")
    used = (torch.arange(OFA_STAGE_DEPTH) < depths.unsqueeze(-1)).flatten(
        1
    )  # blocks beyond a stage's depth do not exist
    _check("ofa", kernels, _among(kernels, OFA_KERNELS) | ~used, "kernel size")
    _check("ofa", expansions, _among(expansions, OFA_EXPANSIONS) | ~used, "expansion ratio")
    _check("ofa", resolution, _among(resolution, OFA_RESOLUTIONS), "resolution")
    parts = [_slots(kernels, OFA_KERNELS) * used.unsqueeze(-1), _slots(expansions, OFA_EXPANSIONS) * used.unsqueeze(-1)]
    return torch.cat([part.flatten(1) for part in (*parts, _slots(resolution, OFA_RESOLUTIONS))], dim=1).float()


def _slots(values: Tensor, options: tuple[int, ...]) -> Tensor:
    return values.unsqueeze(-1) == torch.tensor(options)


def _among(values: Tensor, options: tuple[int, ...]) -> Tensor:
    return _slots(values, options).any(-1)


def _check(space: str, values: Tensor, fine: Tensor, what: str) -> None:
    if not bool(fine.all()):
        row, position = (~fine).nonzero()[0].tolist()
        form = ENCODINGS[space].layout
        raise DeviceError(
            f"network {row} is outside the space {space}: {what} {position} is {values[row, position]} (needs {form})"
        )
