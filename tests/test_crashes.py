"""Kills, flipped bits and older runs: a run folder goes on to the same bytes, or says in one sentence why not."""

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY, Ended
from cut_short import EndError, comparable, ends_after

from clients.app import serve
from devices.errors import UserError
from fedsim.engines.local import LocalEngine
from fedsim.messages.records import record_of
from fedsim.report.checksums import Beginning, Checksums
from fedsim.runs import writer
from fedsim.runs.checkpoint import ASIDE, Checkpoints, Saved, load
from fedsim.runs.recorded import settings_of_run
from fedsim.settings.compose import compose

FEDSIM = str(Path(sys.executable).parent / "fedsim")
SMALL = (*TINY, "model.hidden=[8]", "rounds=3", "checkpoint_s=0")
STREAM = ("stream=split_classes", "stream.tasks=2", "workload.num_classes=4", "workload.examples_per_client=24")
OCS = ("method=ocs", *STREAM, "rounds=4")
METHODS = {"fedavg": (), "ditto": ("method=ditto",), "ocs": OCS}


# --- before every operation on a file --------------------------------------------------------------------------------


def verdicts(place: Path, points: str, resumed: bool, overrides: tuple[str, ...]) -> dict[int, str]:
    """What became of a run that was killed before its n-th file operation, by n."""
    script = str(Path(__file__).with_name("crash_points.py"))
    given = [str(place), points, "resumed" if resumed else "begun", *overrides]
    done = subprocess.run([sys.executable, script, *given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert len(found) >= int(found[0][1]) // (1 if points == "all" else int(points.split()[1]))
    return {int(number): verdict for number, _, verdict in found}


def test_a_run_that_was_killed_at_some_points_goes_on(tmp_path: Path):
    """The method whose clients keep state; the last points are those around the end of the run."""
    found = verdicts(tmp_path, "every 31", True, (*SMALL, *METHODS["ditto"]))
    assert set(found.values()) <= {"same", "new"}, found


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("resumed", [False, True], ids=["begun", "resumed"])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_killed_at_any_point_goes_on(method: str, resumed: bool, tmp_path: Path):
    found = verdicts(tmp_path, "all", resumed, (*SMALL, *METHODS[method]))
    assert set(found.values()) <= {"same", "new"}, found


def test_while_a_checkpoint_is_replaced_there_is_a_whole_one(tmp_path: Path, monkeypatch):
    """Every operation of the second writing of one round fails in turn, as if the process were killed there."""
    import os

    class KilledError(BaseException):
        pass

    def write(weight: float, run: Path) -> None:
        saved = Saved(3, record_of({"w": weight * torch_ones()}), {}, {})
        Checkpoints(run, 0).write(saved, lambda: Checksums(Beginning(), {}))

    for number in range(1, 40):
        run, left = tmp_path / str(number), [number]
        run.mkdir()
        (run / "rounds.jsonl").touch()
        write(1.0, run)
        with monkeypatch.context() as patch:
            for name in ("rename", "fsync", "mkdir", "unlink", "rmdir"):

                def counted(*args, _real=getattr(os, name), _left=left, **kwargs):
                    _left[0] -= 1
                    if _left[0] == 0:
                        raise KilledError
                    return _real(*args, **kwargs)

                patch.setattr(os, name, counted)
            try:
                write(2.0, run)
            except KilledError:
                pass
            else:
                break
        assert (found := load(run)) is not None
        assert found.round == 3
    assert number > 8
    assert not list(run.glob(f"checkpoint/*{ASIDE}")) or load(run) is not None


def torch_ones():
    import torch

    return torch.ones(2)


# --- flipped bits ----------------------------------------------------------------------------------------------------

FLIPPED = {
    "ditto": ("method=ditto", "rounds=5"),
    "ocs": OCS,
    "fedmix": ("method=fedmix", "rounds=5"),
}


def flips(method: str, count: int, place: Path) -> list[str]:
    """Resumes a run with one bit flipped, so many times; what came out wrong without a word."""
    chosen = compose([*SMALL, *FLIPPED[method]])
    writer.run(chosen, LocalEngine(serve), place / "whole")
    with pytest.raises(EndError):
        writer.run(chosen, LocalEngine(serve), place / "cut", ends_after(chosen["rounds"] - 1))
    whole, wrong, rng = comparable(place / "whole"), [], random.Random(method)
    files = sorted(path.relative_to(place / "cut") for path in (place / "cut").rglob("*") if path.is_file())
    for _ in range(count):
        file, again = rng.choice(files), place / "again"
        shutil.rmtree(again, ignore_errors=True)
        shutil.copytree(place / "cut", again)
        data = bytearray((again / file).read_bytes())
        place_of_bit = rng.randrange(8 * len(data))
        data[place_of_bit // 8] ^= 1 << place_of_bit % 8
        (again / file).write_bytes(data)
        try:
            writer.run(settings_of_run(again), LocalEngine(serve), again, resume=True)
        except UserError as error:
            if type(error).__module__ not in ("fedsim.errors", "devices.errors"):
                wrong.append(f"{file}, bit {place_of_bit}: {error!r}")
        else:
            if comparable(again) != whole:
                wrong.append(f"{file}, bit {place_of_bit}: another result")
    return wrong


@pytest.mark.filterwarnings("ignore:.*is damaged", "ignore:fedsim 0.1 wrote no checksums")
def test_some_flipped_bits_are_never_silently_wrong(tmp_path: Path):
    assert not flips("ditto", 6, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore:.*is damaged", "ignore:fedsim 0.1 wrote no checksums")
@pytest.mark.parametrize("method", FLIPPED)
def test_flipped_bits_are_never_silently_wrong(method: str, tmp_path: Path):
    assert not flips(method, 200, tmp_path)


def test_a_damaged_checkpoint_falls_back_to_the_one_before_with_a_word(tmp_path: Path):
    chosen = compose([*SMALL, "rounds=5"])
    writer.run(chosen, LocalEngine(serve), tmp_path / "whole")
    with pytest.raises(EndError):
        writer.run(chosen, LocalEngine(serve), tmp_path / "cut", ends_after(4))
    weights = tmp_path / "cut" / "checkpoint" / "round-000003" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.warns(UserWarning, match=r"weights\.safetensors is damaged: .*; this run goes on from round 2, of the"):
        writer.run(settings_of_run(tmp_path / "cut"), LocalEngine(serve), tmp_path / "cut", resume=True)
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")


def test_settings_that_were_changed_are_refused(tmp_path: Path, fedsim):
    writer.run(compose(list(SMALL)), LocalEngine(serve), tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("seed: 1", "seed: 2"))
    ended: Ended = fedsim("resume", str(tmp_path / "run"))
    assert ended.code == 2
    assert f"{config} is damaged or was changed: it is not what the run wrote" in ended.err


# --- kill -9 at random -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_kill_9_at_random_moments_then_resume(engine: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ["workload=blobs", "rounds=40", "cohort=5", "num_clients=20", "fleet=uniform", "checkpoint_s=0"]
    subprocess.run([FEDSIM, "run", *common, "out=whole"], check=True, stdout=subprocess.DEVNULL)
    rng = random.Random(engine)
    for number in range(10):
        folder = f"cut-{number}"
        run = subprocess.Popen([FEDSIM, "run", *common, f"engine={engine}", f"out={folder}"], stdout=subprocess.DEVNULL)
        while run.poll() is None and not (tmp_path / folder / "config.yaml").exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 4))
        run.kill()
        run.wait()
        done = subprocess.run([FEDSIM, "resume", folder], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert comparable(tmp_path / folder) == comparable(tmp_path / "whole")
        assert (tmp_path / folder / "report.html").exists()


# --- runs of fedsim 0.1 ----------------------------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A run of fedsim 0.1 that was killed in its second of four rounds."""
    shutil.copytree(Path(__file__).with_name("run_of_0_1"), tmp_path / "old")
    return tmp_path / "old"


@pytest.mark.filterwarnings("default:fedsim 0.1 wrote no checksums")
def test_a_run_of_0_1_goes_on_and_says_which_rounds_have_other_prices(old: Path, fedsim):
    ended: Ended = fedsim("resume", str(old))
    assert ended.code == 0, ended.err
    assert ended.err.startswith("fedsim: warning: fedsim 0.1 wrote no checksums")
    summary = json.loads((old / "summary.json").read_text())
    assert summary["price_models"] == [{"from_round": 0, "model": None}, {"from_round": 2, "model": 2}]
    said = "seconds and joules were not priced alike: rounds 0 to 1 by fedsim 0.1, rounds 2 to 4 by price model 2"
    assert said in summary["warnings"][-1]
    assert said in (old / "report.html").read_text()


@pytest.mark.parametrize(
    "command", [("report",), ("paired",), ("replay", "--round", "1", "--client", "0")], ids=lambda command: command[0]
)
def test_a_run_of_0_1_is_read(old: Path, command: tuple[str, ...], fedsim):
    ended: Ended = fedsim(command[0], str(old), *command[1:])
    assert ended.code == 0 or "was not asked in round 1" in ended.err
