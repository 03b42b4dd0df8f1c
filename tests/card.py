"""A card that is not there: tensors that say they lie on another device, and are computed on the CPU.

Torch's slot for devices of others is filled with a tensor class that refuses what a GPU would refuse: two devices in
one operation, an index or a generator on the wrong side. It also refuses every draw from the device's own generator,
whose numbers would be others than the CPU's. What it cannot show: kernels that round or order otherwise, and speed.

To be imported before the first backward pass of a process, in which torch counts the devices: see `on_card.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("card")
CARD = torch.device("card", 0)
CPU = torch.device("cpu")
COPIES = ("_to_copy", "copy_")
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")  # an index may lie on the CPU
# A number on the CPU may take part in what broadcasts, and in no others.
NO_NUMBERS = ("cat", "stack", "index_select", "gather", "scatter", "mm", "bmm", "addmm", "searchsorted", "_foreach")


class CardError(RuntimeError):
    """What torch would refuse on a GPU."""


class CardTensor(Tensor):
    """A tensor of the card; `raw` has its numbers."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> CardTensor:
        made: CardTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, raw.size(), raw.stride(), raw.storage_offset(), dtype=raw.dtype, layout=raw.layout, device=CARD
        )
        made.raw = raw
        return made

    @property  # type: ignore[misc]
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, new: CardTensor) -> None:
        Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        self.raw = new.raw

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def tolist(self) -> Any:
        return self.raw.tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copy: Tensor = CardTensor(self.raw.detach().clone())
            memo[id(self)] = nn.Parameter(copy, self.requires_grad) if isinstance(self, nn.Parameter) else copy
        found: Tensor = memo[id(self)]
        return found

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"CardTensor({self.raw!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Checks where everything lies, computes with the numbers, and puts the results on the card."""
        kwargs, name = kwargs or {}, func._schema.name.removeprefix("aten::")
        check(func, name, args, kwargs)
        out = func(*tree_map(_raw, args), **tree_map(_raw, kwargs))
        to = kwargs.get("device")
        if to is not None and torch.device(to).type != CARD.type:
            return out
        if name == "copy_" and not isinstance(args[0], CardTensor):
            return args[0]
        return return_and_correct_aliasing(func, args, kwargs, tree_map(_wrapped, out))


def _is_card(x: Any) -> bool:
    return isinstance(x, torch.device) and x.type == CARD.type


def _raw(x: Any) -> Any:
    return x.raw if isinstance(x, CardTensor) else CPU if _is_card(x) else x


def _wrapped(x: Any) -> Any:
    return CardTensor(x) if isinstance(x, Tensor) and not isinstance(x, CardTensor) else x


def check(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> None:
    """Refuses an operation in which something of the card takes part.

    Raises:
        CardError: says what lies where.
    """
    given = tree_leaves((args, kwargs))
    if torch.Tag.nondeterministic_seeded in func.tags:
        of = next((x.device for x in given if isinstance(x, torch.Generator)), None)
        raise CardError(
            f"{name} draws on the card, from " + ("its own generator" if of is None else f"one of the {of}")
        )
    if name in COPIES:
        return
    if name in INDEXED:
        if not isinstance(args[0], CardTensor):
            raise CardError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        given = [args[0], *args[2:3]]
    elsewhere = [x for x in given if isinstance(x, Tensor) and not isinstance(x, CardTensor)]
    if any(x.dim() or name.startswith(NO_NUMBERS) for x in elsewhere):
        raise CardError(f"{name}: expected all tensors to be on the same device, found the card and the CPU")
    if elsewhere and name.endswith("_") and not isinstance(args[0], CardTensor):
        raise CardError(f"{name}: a tensor of the CPU would be changed by one of the card")


class Card(TorchDispatchMode):
    """Makes tensors on the card where a call asks for it, and copies others there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _is_card(kwargs.get("device")) or any(isinstance(x, CardTensor) for x in tree_leaves(args)):
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name not in COPIES:
            check(func, name, (), {})
        return CardTensor(func(*args, **{**kwargs, "device": CPU}))
