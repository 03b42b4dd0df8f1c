"""What both halves of Sub-FedAvg know (strategies/sub_fedavg.py, clients/trainers/personal/sub_fedavg.py).

Records: arrays, both ways: the network, zero where pruned, up; mask, up: by weight, bits [ceil(entries / 8)] uint8.
"""

from __future__ import annotations

from devices.compression.bits import pack_bits, unpack_bits
from fedsim.workloads.base import Tensors

MASK = "mask"  # record


def packed(masks: Tensors) -> Tensors:
    """Returns the record of masks, by weight [entries] bool."""
    return {name: pack_bits(mask) for name, mask in masks.items()}


def unpacked(record: Tensors, weights: Tensors) -> Tensors:
    """Returns the masks of a record, in the shapes of the weights."""
    return {name: unpack_bits(bits, weights[name].shape) for name, bits in record.items()}
