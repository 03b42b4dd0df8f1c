"""The base class of modes that look at every operator that torch runs."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class UncompiledMode(TorchDispatchMode):
    """A dispatch mode that leaves torch's compiler alone."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True imports the compiler, 0.7 s of every process, only to say that it shall not compile this
