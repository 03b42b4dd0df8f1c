"""The door for Python: what `import fedsim` offers, what it costs, and that it leaves nothing behind."""

from __future__ import annotations

import gc
import json
import logging
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY

import fedsim
from fedsim.errors import ConfigError


def test_the_exported_names_are_these_and_are_all_there():
    classes = ["Comparison", "EdgeGrid", "Federation", "Run", "Workload"]
    assert fedsim.__all__ == [*classes, "compare", "compose", "load", "reprice", "resume", "run"]
    assert all(getattr(fedsim, name).__name__ == name for name in fedsim.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Fedration'"):
        fedsim.Fedration  # noqa: B018


def test_importing_it_loads_no_heavy_library():
    code = "import sys, fedsim; print(sorted({'torch', 'ray', 'flwr', 'hydra', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_keywords_are_the_overrides_of_the_command(monkeypatch):
    by_keyword = fedsim.compose(method="fedprox", rounds=3, trainer={"lr": 0.2}, private=["head"], name="a b'c")
    by_text = fedsim.compose("method=fedprox", "rounds=3", "trainer.lr=0.2", "private=[head]", "name='a b\\'c'")
    assert by_keyword == by_text
    assert by_keyword["name"] == "a b'c"
    with pytest.raises(ConfigError, match="unknown setting 'cohrt'; did you mean 'cohort'"):
        fedsim.compose(cohrt=3)


def test_a_run_can_be_looked_into_and_loaded_again(tmp_path: Path, monkeypatch):
    from hydra.core.global_hydra import GlobalHydra

    import fedsim.cli.main  # the name `run` is the function all the same

    monkeypatch.chdir(tmp_path)
    one = fedsim.run(*TINY, progress=False)
    two = fedsim.run(*TINY, progress=False, out="two", method="ditto")
    assert one.folder.parent == Path("runs")
    assert not GlobalHydra.instance().is_initialized()
    assert (one.folder / "report.html").exists()
    assert list(one.rounds["round"]) == [0, 1, 2]
    last = json.loads((one.folder / "rounds.jsonl").read_text().splitlines()[-1])
    assert one.rounds["accuracy"].iloc[-1] == last["metrics"]["accuracy"]
    assert one.clients["joules"].sum() == pytest.approx(one.rounds["joules"].sum())
    assert {"work_passes", "train_loss"} <= set(one.clients.columns)
    assert fedsim.load("two").summary == two.summary
    assert two.settings["choices"]["method"] == "ditto"
    assert one.plot() is not None
    page = one._repr_html_()
    assert str(one.folder) in page
    assert page.count("<tr") == 1 + 3
    assert page.count('role="img"') == 2
    with pytest.raises(ConfigError, match="holds no run"):
        fedsim.load(tmp_path)


def test_it_gives_the_bytes_of_the_command(tmp_path: Path, monkeypatch, fedsim):
    monkeypatch.chdir(tmp_path)
    assert fedsim("run", *TINY, "out=command").code == 0
    code = f"import fedsim; fedsim.run(*{TINY!r}, progress=False, out='python')"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    hashes = {json.loads(Path(name, "summary.json").read_text())["weights_sha256"] for name in ("command", "python")}
    assert len(hashes) == 1


def test_a_process_stays_as_it_was(tmp_path: Path, monkeypatch):
    """Run twice within a config of the caller's own: a notebook goes on with its own torch, Hydra and logs."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    def facts() -> tuple[object, ...]:
        root = logging.getLogger()
        state = (torch.get_rng_state().tolist(), torch.get_num_threads(), random.getstate(), np.random.get_state()[2])
        return (*state, GlobalHydra.instance().hydra, sys.argv, list(root.handlers), root.level, gc.get_freeze_count())

    monkeypatch.chdir(tmp_path)
    gc.unfreeze()
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        before = facts()
        hashes = {fedsim.run(*TINY, progress=False, rounds=1).summary["weights_sha256"] for _ in range(2)}
        assert facts() == before
    assert len(hashes) == 1


def test_a_run_that_is_not_finished_can_be_looked_into(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = fedsim.run(*TINY, progress=False)
    for name in ("summary.json", *(str(path.relative_to(run.folder)) for path in run.folder.glob("clients/*"))):
        (run.folder / name).unlink()
    begun = fedsim.load(run.folder)
    assert (begun.summary, len(begun.clients), len(begun.rounds)) == ({}, 0, 3)
    assert "is not finished" in begun._repr_html_()
    (run.folder / "rounds.jsonl").write_text("")
    empty = fedsim.load(run.folder)
    assert len(empty.rounds) == 0
    assert empty.plot() is None
    assert "is not finished" in empty._repr_html_()
