"""Two small bundles of images, in a folder of data of their own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def small_bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes a bundle of colour images and one of grey ones, ten classes each; every image is one of its kind."""
    draw = np.random.default_rng(0)
    for name, shape in (("toy", (8, 8, 3)), ("grey", (20, 20))):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        (folder / "meta.json").write_text(json.dumps({"classes": list("abcdefghij"), "kind": "image"}))
        for part, count in (("train", 50), ("test", 15)):
            y = np.repeat(np.arange(10), count)
            np.savez(folder / f"{part}.npz", x=draw.integers(0, 256, (len(y), *shape), np.uint8), y=y)
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path / "data"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "data"
