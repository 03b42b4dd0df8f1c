"""`make install` in a folder with a `pip` that only notes what it is told."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PIP = '#!/bin/sh\n[ "$1" = show ] && exit {code}\necho "$@" >> calls\n'


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("there", [True, False], ids=["torch there", "no torch"])
def test_a_torch_that_is_there_is_not_pinned(there: bool, tmp_path: Path):
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    place = tmp_path / ".venv" / "bin"
    place.mkdir(parents=True)
    for name, text in (("pip", PIP.format(code=0 if there else 1)), ("python", "#!/bin/sh\n")):
        (place / name).write_text(text)
        os.chmod(place / name, 0o755)
    subprocess.run(["make", "install"], cwd=tmp_path, check=True, capture_output=True)
    locked = (ROOT / "requirements.lock").read_text().splitlines()
    kept = (tmp_path / ".venv/constraints.txt").read_text().splitlines()
    left_out = {line.partition("==")[0] for line in locked} - {line.partition("==")[0] for line in kept}
    assert {"torch", "torchvision", "torchaudio"} <= left_out if there else kept == locked
    assert "torch-pruning" in {line.partition("==")[0] for line in kept}
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 2
    assert all("-c .venv/constraints.txt -e ." in call for call in calls)
