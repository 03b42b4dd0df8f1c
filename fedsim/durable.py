"""Files that are there whole or not at all.

May import: the standard library only.
"""

from __future__ import annotations

import os
from pathlib import Path


def write_atomic(path: Path, text: str) -> None:
    """Replaces a file in one step, so that nobody ever reads half of it."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    os.replace(part, path)
