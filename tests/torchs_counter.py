"""Torch's own FLOP counter, which the project's counts are held against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from devices.meter import RECURRENT_FLOPS
from devices.operators import PRODUCTS, macs_of


def counter() -> FlopCounterMode:
    """Torch's counter with the project's formulas for what torch leaves out or takes for real numbers.

    Use it as a context manager and read `get_total_flops()`; a multiply-add is two.
    """
    recurrent = {operator: _with_tensors(formula) for operator, formula in RECURRENT_FLOPS.items()}
    return FlopCounterMode(display=False, custom_mapping={**_product_flops(), **recurrent})


def _product_flops() -> dict[Any, Callable[..., int]]:
    ours = [name.split("::") for name in PRODUCTS if name not in ("aten::convolution", "aten::convolution_backward")]
    known = [getattr(getattr(torch.ops, space), name, None) for space, name in ours]
    return {packet: _formula(getattr(packet, packet.overloads()[0])) for packet in known if packet is not None}


def _formula(func: Any) -> Callable[..., int]:
    def flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return round(2 * (macs_of(func, args, kwargs, out_val) or 0))

    return _with_tensors(flops)


def _with_tensors(formula: Callable[..., int]) -> Callable[..., int]:
    """Marked so that torch hands over tensors instead of shapes: some formulas ask for more."""
    formula._get_raw = True
    return formula
