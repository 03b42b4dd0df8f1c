"""`fedsim resume` as a user meets it: what goes on, with which settings, and what cannot."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SHORT
from cut_short import RICH, SURPLUS, comparable

from clients.app import serve
from fedsim.errors import ConfigError
from fedsim.report.files import read_config
from fedsim.report.rounds import read_rounds
from fedsim.runs import writer
from fedsim.runs.recorded import settings_of_run
from fedsim.settings.compose import on_engine

FEDSIM = str(Path(sys.executable).parent / "fedsim")


def test_a_killed_command_goes_on_elsewhere(tmp_path: Path, monkeypatch, fedsim):
    """SIGKILL at some moment, then the rest on Ray; the other run was never stopped."""
    monkeypatch.chdir(tmp_path)
    common = ["rounds=15", "cohort=5", "checkpoint_s=0"]
    assert fedsim("run", *common, "out=whole").code == 0
    run = subprocess.Popen([FEDSIM, "run", *common, "out=cut"], stdout=subprocess.DEVNULL)
    rounds, end = tmp_path / "cut" / "rounds.jsonl", time.monotonic() + 60
    while not (rounds.exists() and rounds.read_bytes().count(b"\n") > 4) and time.monotonic() < end:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "cut" / "summary.json").exists()
    resumed = subprocess.run([FEDSIM, "resume", "cut"], capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert "run folder: cut" in resumed.stdout
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")
    assert fedsim("resume", "cut")[:2] == (0, "cut has finished: nothing is left to do\n")


@pytest.mark.ray
@pytest.mark.parametrize("given", [RICH, pytest.param(SURPLUS, marks=pytest.mark.slow)], ids=["rich", "surplus"])
def test_the_rest_may_run_on_another_engine(go, tmp_path: Path, given: tuple[str, ...]):
    from fedsim.engines.ray.engine import RayEngine

    go("whole", *given)
    go("cut", *given, until=2)
    chosen = on_engine(settings_of_run(tmp_path / "cut"), ["engine=ray", "engine.workers=2"])
    with RayEngine(serve, workers=2) as engine:
        writer.run(chosen, engine, tmp_path / "cut", resume=True)
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")


def test_what_cannot_be_resumed_is_one_sentence(go, tmp_path: Path, fedsim):
    def say(*arguments: str) -> str:
        ended = fedsim("resume", *arguments)
        assert ended.code == 2
        return str(ended.err)

    assert "holds no run: there is no config.yaml in it" in say(str(tmp_path / "nowhere"))
    go("cut", *RICH, until=3)
    cut = str(tmp_path / "cut")
    assert "cohort=2 cannot be given: only rounds and engine of a run may change, e.g. engine=ray" in say(
        cut, "cohort=2"
    )
    assert f"{cut} is not finished; end it first: fedsim resume {cut}" in say(cut, "rounds=9")
    assert "engine.threads cannot change: the last bits of results depend on it" in say(cut, "engine.threads=2")
    for point in (tmp_path / "cut" / "checkpoint").iterdir():
        (point / "weights.safetensors").write_bytes(b"no weights")
    assert f"{point / 'weights.safetensors'} is damaged: it is not what the run wrote" in (said := say(cut))
    assert said.endswith(f"no checkpoint is whole: remove {point.parent}, and the run starts anew\n")
    for point in (tmp_path / "cut" / "checkpoint").iterdir():
        (point / "checksums.json").unlink()
        (point / "state.json").write_text('{"format": 7}')
    assert f"{point} cannot be read: ValueError: it has format 7, this version reads 2" in say(cut)
    assert len(read_rounds(tmp_path / "cut")) == 4  # nothing was lost


def test_a_run_that_is_going_on_is_left_alone(go, tmp_path: Path, settings):
    go("cut", *RICH, until=3)
    before = (tmp_path / "cut" / "rounds.jsonl").read_bytes()
    from fedsim.report.folder import RunFolder

    folder = RunFolder(tmp_path / "cut", settings(*RICH), resume=True, last=2)
    with pytest.raises(ConfigError, match=r"the run in .*cut is going on just now; wait for it, or end it"):
        go("cut", resume=True)
    folder.close()
    assert before.startswith((tmp_path / "cut" / "rounds.jsonl").read_bytes())


def test_where_a_resumed_run_is_trained_is_in_its_config(fedsim, place):
    assert fedsim("run", *SHORT, "engine.slots=2", "out=a").code == 0
    assert fedsim("resume", "a", "rounds=2", "engine=auto").code == 0
    assert read_config(place / "cwd" / "a")["engine"]["slots"] == 0


def test_only_settings_of_the_engine_that_cannot_change_results_may_change(settings):
    given = settings("engine.batch_clients=2")
    moved = on_engine(given, ["engine=ray", "engine.workers=3"])
    assert moved["engine"]["workers"] == 3
    assert moved["engine"]["batch_clients"] == 2
    assert moved["choices"]["engine"] == "ray"
    assert on_engine(moved, ["engine.workers=1"])["engine"] == {**moved["engine"], "workers": 1}
    assert on_engine(given, []) == given


def test_settings_of_an_earlier_version_get_what_came_later(settings, tmp_path: Path):
    import yaml

    old = {key: value for key, value in settings().items() if key not in ("checkpoint_s", "stream", "private")}
    old["choices"] = {key: value for key, value in old["choices"].items() if key != "stream"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    assert settings_of_run(tmp_path) == settings()
