"""A run is taken up with the data that it was begun with, or not at all."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import array_workload

from clients.app import serve
from clients.worker import worker_for
from devices import profile
from fedsim.engines.local import LocalEngine
from fedsim.errors import ClientError, ConfigError, DataError
from fedsim.models.mlp import MLP
from fedsim.runs import checkpoint, writer
from fedsim.settings.build import build_workload, build_world
from fedsim.settings.compose import compose
from fedsim.settings.groups import options
from fedsim.study import spec as study
from fedsim.study.spec import is_finished, plan, read_study
from fedsim.workloads import fingerprint
from fedsim.workloads.arrays import Arrays
from fedsim.workloads.bundle import Bundle
from fedsim.workloads.fingerprint import content_of, difference
from fedsim.workloads.partition import Dirichlet, Iid, Natural


def bundle(folder: Path, **changes: Any) -> Path:
    """40 + 12 rows of three numbers of four users; then the changes, e.g. train_y=..."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, size in (("train", 40), ("test", 12)):
        rng = np.random.default_rng(size)
        arrays = {"x": rng.normal(size=(size, 3)).astype(np.float32), "y": np.arange(size) % 2}
        arrays |= {"client": np.arange(size) % 4}
        arrays = {key: changes.get(f"{part}_{key}", lambda a: a)(array) for key, array in arrays.items()}
        np.savez(folder / f"{part}.npz", **{key: a for key, a in arrays.items() if a is not None})
    (folder / "meta.json").write_text(json.dumps({"classes": ["a", "b", "c"], "kind": "tabular"}))
    return folder


def one_more(array: np.ndarray) -> np.ndarray:
    changed = array.copy()
    changed.flat[-1] += 1
    return changed


CHANGES: dict[str, dict[str, Any]] = {
    "a label": {"train_y": one_more},
    "a test label": {"test_y": one_more},
    "a number": {"train_x": one_more},
    "a test number": {"test_x": one_more},
    "a user": {"train_client": one_more},
    "a test user": {"test_client": one_more},
    "no users": {"train_client": lambda a: None},
    "no test users": {"test_client": lambda a: None},
    "the order": {"train_x": lambda x: x[::-1], "train_y": lambda y: y[::-1]},
    "fewer": {f"train_{key}": lambda a: a[:-1] for key in ("x", "y", "client")},
    "other classes": {"train_y": lambda y: 1 - y, "test_y": lambda y: 1 - y},
    "another type": {"train_x": lambda x: x.astype(np.int16), "test_x": lambda x: x.astype(np.int16)},
}
ALIKE: dict[str, dict[str, Any]] = {
    "wide labels": {"train_y": lambda y: y.astype(np.int8)},
    "wide users": {"train_client": lambda c: c.astype(np.uint64)},
    "wide numbers": {"train_x": lambda x: x.astype(np.float64)},
}


def of(path: Path, *overrides: str) -> fingerprint.Fingerprint:
    given = ["workload=bundle", f"workload.path={path}", "fleet=uniform", *overrides]
    return build_workload(compose(["num_clients=2", "cohort=2", *given])).fingerprint()


# Which data are other data


@pytest.mark.parametrize("name", CHANGES)
def test_other_data_have_another_fingerprint(name: str, tmp_path: Path):
    before, now = of(bundle(tmp_path / "a")), of(bundle(tmp_path / "b", **CHANGES[name]))
    assert difference(before, now)
    assert before.keys() == now.keys()


@pytest.mark.parametrize("name", ALIKE)
def test_the_same_data_in_other_types_have_the_same_fingerprint(name: str, tmp_path: Path):
    assert of(bundle(tmp_path / "a")) == of(bundle(tmp_path / "b", **ALIKE[name]))


def test_who_owns_what_and_the_seed_make_no_other_data(tmp_path: Path):
    path = bundle(tmp_path / "a")
    expected = of(path)
    for overrides in (["partition=natural"], ["seed=5"], ["num_clients=3"], ["workload.input_range=standard"]):
        assert of(path, *overrides) == expected


@pytest.mark.parametrize("kind", [kind for kind in options("stream") if kind != "domains"])
@pytest.mark.parametrize("workload", ["blobs", "digits"])
def test_every_stream_of_every_workload_has_a_fingerprint(workload: str, kind: str):
    images = ["workload.input_shape=[1,4,4]"] if workload == "blobs" else []
    settings = compose([f"workload={workload}", f"stream={kind}", "rounds=10", "num_clients=5", "cohort=5", *images])
    found = build_workload(settings).fingerprint()
    assert found == build_workload(settings).fingerprint()
    assert json.loads(json.dumps(found)) == found
    other = build_workload({**settings, "seed": 9}).fingerprint()
    assert (other == found) == (workload == "digits")


def test_domains_have_the_fingerprints_of_all_their_data_sets(tmp_path: Path):
    for name, value in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        for part in ("train", "test"):
            np.savez(tmp_path / name / f"{part}.npz", x=np.full((12, 4, 4), value, np.uint8), y=np.arange(12) % 2)
        (tmp_path / name / "meta.json").write_text(json.dumps({"classes": ["a", "b"], "kind": "image"}))
    base = [
        "workload=digits",
        "stream=domains",
        "stream.tasks=2",
        "rounds=2",
        "num_clients=3",
        "cohort=3",
        "partition=iid",
    ]
    a, b = (build_workload(compose([*base, f"stream.bundles=[{tmp_path / name}]"])).fingerprint() for name in "ab")
    assert difference(a, b).startswith("bundle 1 train x was uint8 [12, 4, 4] ")


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32, "<U5"])
def test_no_change_in_a_large_array_is_overlooked(dtype: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fingerprint, "HASHED_BYTES", 1000)
    array = np.random.default_rng(0).integers(0, 100, (5000, 7)).astype(dtype)
    seen = {content_of(array)}
    for place in (0, 1, 4095, 17_000, 34_998, 34_999):
        changed = array.copy()
        changed.flat[place] = 101
        seen.add(content_of(changed))
    swapped = array.copy()
    swapped[[3, 4000]] = swapped[[4000, 3]]
    seen |= {content_of(swapped), content_of(array[:-1]), content_of(array.reshape(7, 5000))}
    assert len(seen) == 10


# Taking a run up


class EndError(Exception):
    """The run is cut short here."""


def begun(path: Path, out: Path, *overrides: str) -> Path:
    """A run of three rounds on a bundle, cut short after the first."""

    def end(report: Any) -> None:
        if report.round == 1:
            raise EndError

    settings = settings_on(path, *overrides)
    with pytest.raises(EndError):
        run(settings, out, watch=end)
    return out


def settings_on(path: Path, *overrides: str) -> dict[str, Any]:
    base = ["workload=bundle", f"workload.path={path}", "fleet=uniform", "latency=flops", "engine.device=cpu"]
    return compose([*base, "num_clients=3", "cohort=2", "rounds=3", "checkpoint_s=0", *overrides])


def run(settings: dict[str, Any], out: Path, **more: Any) -> dict[str, Any]:
    build_world.cache_clear()  # it would hold the data as they were
    worker_for.cache_clear()
    return writer.run(settings, LocalEngine(serve), out, **more)


def held(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_no_run_goes_on_with_other_data_and_every_one_with_its_own(tmp_path: Path):
    path = bundle(tmp_path / "data")
    out = begun(path, tmp_path / "run")
    before = held(out)
    for changes in CHANGES.values():
        bundle(path, **changes)
        with pytest.raises(DataError, match="was begun with other data than those of workload bundle here"):
            run(settings_on(path), out, resume=True)
        assert held(out) == before
    bundle(path)
    summary = run(settings_on(path), out, resume=True)
    assert summary["data"] == of(path)
    whole = run(settings_on(path), tmp_path / "whole")
    assert {**whole, "host_s": 0} == {**summary, "host_s": 0}


@pytest.mark.parametrize("kept", [None, {}, {"of a later version": "x"}])
def test_a_run_that_kept_no_fingerprint_goes_on(kept: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As those of version 0.1."""
    path = bundle(tmp_path / "data")
    out = begun(path, tmp_path / "run")
    saved = checkpoint.load(out)
    assert saved is not None
    assert saved.state["data"] == of(path)
    monkeypatch.setattr(checkpoint, "load", lambda _: replace(saved, state={**saved.state, "data": kept}))
    bundle(path, **CHANGES["a label"])
    assert run(settings_on(path), out, resume=True)["rounds"] == 3


def test_the_commands_refuse_other_data_in_one_sentence(tmp_path: Path, fedsim):
    path = bundle(tmp_path / "data")
    out = begun(path, tmp_path / "run")
    finished = tmp_path / "finished"
    run(settings_on(path), finished)
    bundle(path, **CHANGES["a label"])
    build_world.cache_clear()
    for folder, command in (
        (out, ["resume"]),
        (out, ["replay", "--round", "2", "--client", "0"]),
        (finished, ["replay", "--round", "1", "--client", "0"]),
    ):
        ended = fedsim(command[0], str(folder), *command[1:])
        assert ended.code == 2
        assert f"{folder} was begun with other data" in ended.err
        assert ended.err.count("\n") == 1
    assert fedsim("report", str(finished)).code == 0  # of the split that the run has kept
    assert "How the data are split" in (finished / "report.html").read_text()


def test_a_client_that_stopped_a_run_is_not_replayed_with_other_data(tmp_path: Path, fedsim):
    path = bundle(tmp_path / "data")
    settings, out = settings_on(path, "trainer.lr=1e30", "checkpoint_s=null"), tmp_path / "run"
    with pytest.raises(ClientError):
        run(settings, out)
    sent = json.loads((out / "failed-client.json").read_text().splitlines()[0])
    arguments = ["replay", str(out), "--round", str(sent["round"]), "--client", str(sent["client"])]
    assert "was begun with other data" not in fedsim(*arguments).err
    bundle(path, **CHANGES["a number"])
    build_world.cache_clear()
    assert "was begun with other data" in fedsim(*arguments).err


def test_a_run_that_is_taken_up_elsewhere_gets_advice_that_it_can_follow(tmp_path: Path, fedsim, monkeypatch):
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path / "roots"))
    bundle(tmp_path / "roots" / "own")
    monkeypatch.chdir(tmp_path)
    bundle(tmp_path / "there" / "own2")
    bare, relative = begun(Path("own"), tmp_path / "bare"), begun(Path("there/own2"), tmp_path / "relative")
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    monkeypatch.delenv("FEDSIM_DATA")
    build_world.cache_clear()
    ended = fedsim("resume", str(relative))
    assert ended.code == 2
    assert f"looked for {tmp_path / 'else' / 'there' / 'own2'};" in ended.err
    assert "a run that goes on keeps its workload.path: start fedsim in the folder from which 'there/own2'" in ended.err
    ended = fedsim("resume", str(bare))
    assert "from which 'own' is found, or set FEDSIM_DATA" in ended.err
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path / "roots"))
    assert fedsim("resume", str(bare)).code == 0
    monkeypatch.chdir(tmp_path)
    assert fedsim("resume", str(relative)).code == 0


# Studies


def planned(tmp_path: Path, path: Path) -> list[study.PlannedRun]:
    tree = {
        "title": "t",
        "seeds": [1, 2],
        "base": ["workload=bundle", f"workload.path={path}", "fleet=uniform", "num_clients=3", "cohort=2", "rounds=2"],
        "arms": {"Plain": ["method=fedavg"], "Prox": ["method=fedprox"]},
    }
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(tree))
    study._FINGERPRINTS.clear()  # as another process would
    return plan(read_study(str(tmp_path / "s.yaml")), tmp_path / "out")


def test_a_study_says_which_run_was_made_with_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = bundle(tmp_path / "data")
    first, *_, last = planned(tmp_path, path)
    for one in (first, last):
        run(one.settings, one.folder)
    assert [is_finished(one) for one in planned(tmp_path, path)] == [True, False, False, True]
    bundle(path, **CHANGES["a test label"])
    runs = planned(tmp_path, path)
    with pytest.raises(ConfigError, match=f"{last.folder} was run with other data than those here: test y was int64"):
        is_finished(runs[-1])
    summary = json.loads((last.folder / "summary.json").read_text())
    del summary["data"]  # as version 0.1 left it
    (last.folder / "summary.json").write_text(json.dumps(summary))
    assert is_finished(runs[-1])


def test_a_study_without_its_data_can_still_be_read(tmp_path: Path):
    path = bundle(tmp_path / "data")
    first = planned(tmp_path, path)[0]
    run(first.settings, first.folder)
    path.rename(tmp_path / "away")
    assert is_finished(planned(tmp_path, path)[0])


def test_a_study_opens_data_of_files_once_for_all_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, opened = bundle(tmp_path / "data"), []
    for one in planned(tmp_path, path):
        run(one.settings, one.folder)
    read = Bundle.read
    monkeypatch.setattr(Bundle, "read", lambda self: (opened.append(1), read(self))[1])
    assert all(is_finished(one) for one in planned(tmp_path, path))
    assert len(opened) == 1


def test_partitions_do_not_change_arrays():
    part = Arrays(np.zeros((30, 1), np.float32), np.arange(30) % 3, np.arange(30) % 5)
    made = [
        array_workload("w", part, part, list("abc"), "tabular", MLP, p, 4, 0)
        for p in (Iid(), Dirichlet(1.0), Natural())
    ]
    assert made[0].fingerprint() == made[1].fingerprint() == made[2].fingerprint()


# Files of the fleet


@pytest.mark.parametrize("changed", ["device", "trace", "a comment"])
def test_a_run_is_not_taken_up_with_another_device_or_trace(changed: str, tmp_path: Path, monkeypatch, fedsim):
    """Their figures decide on seconds and joules, and who is online, as the data do on accuracy."""
    monkeypatch.chdir(tmp_path)
    device, trace = tmp_path / "mine.yaml", tmp_path / "trace.json"
    device.write_text((Path(profile.__file__).parent / "profiles" / "pixel3.yaml").read_text())
    trace.write_text(json.dumps({"1": {"active": [0], "inactive": [900], "finish_time": 1000}}))
    fleet = ["fleet.devices={./mine.yaml: 1}", "fleet.availability._target_=devices.availability.Trace"]
    out = begun(bundle(tmp_path / "data"), Path("run"), *fleet, "+fleet.availability.path=trace.json")
    build_world.cache_clear()
    if changed == "a comment":
        device.write_text(f"{device.read_text()}\n# mine\n")
        assert fedsim("resume", str(out)).code == 0
        return
    if changed == "device":
        tree = yaml.safe_load(device.read_text())
        tree["power"]["compute_w"]["value"] *= 1.1
        device.write_text(yaml.safe_dump(tree))
    else:
        trace.write_text(trace.read_text().replace("900", "800"))
    name = "./mine.yaml" if changed == "device" else "trace.json"
    for command in (("resume", str(out)), ("replay", str(out), "--round", "1", "--client", "0")):
        ended = fedsim(*command)
        assert ended.code == 2
        assert f"(file {name} was " in ended.err
