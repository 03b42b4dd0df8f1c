"""Data sets in the files of their makers: where they are looked up, and what is said where they are missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from fedsim.errors import DataError
from fedsim.workloads.bundle import bundle_names, data_roots

Made = TypeVar("Made")


class Official(NamedTuple):
    """A data set in the files of its makers.

    Attributes:
        name: what sentences call it.
        folder: with its files, below a root.
        bundle: the one that may stand for it.
        choice: overrides that take that bundle.
    """

    name: str
    folder: str
    bundle: str
    choice: str

    def root(self, given: str | None) -> Path:
        """Returns the given root, else the data root that has the files, else the first one."""
        roots = [Path(given).expanduser()] if given else data_roots()
        return next((r for r in roots if (r / self.folder).is_dir()), roots[0])

    def found(self, given: str | None) -> tuple[bool, str]:
        """Returns whether the files are here, and where or how to get them."""
        root = self.root(given)
        here = (root / self.folder).is_dir()
        return here, str(root / self.folder) if here else self.how_to_get(root)

    def how_to_get(self, root: Path) -> str:
        """Says what to do without the files."""
        instead = f"take the bundle that is here, {self.choice}, or " if self.bundle in bundle_names() else ""
        return f"{instead}set workload.download=true or put the official files into {root / self.folder}"

    def read(self, make: Callable[[], Made], root: Path, download: bool) -> Made:
        """Returns what `make` makes of the files.

        Raises:
            DataError: if they are absent or broken, or could not be downloaded.
        """
        try:
            return make()
        except (RuntimeError, OSError, ValueError) as error:
            if download:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise DataError(f"{self.name} could not be downloaded into {root}: {reason}") from None
            what = f"the official files of {self.name} are not here or broken"
            raise DataError(f"{what}: {self.how_to_get(root)}") from None
