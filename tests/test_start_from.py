"""A run that begins with the weights of another one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from clients.app import serve
from clients.worker import Worker
from fedsim.engines.local import LocalEngine
from fedsim.errors import ConfigError, DataError
from fedsim.models.starting import weights_file
from fedsim.runs import api, writer
from fedsim.settings.build import build_world


@pytest.fixture
def before(run, tmp_path: Path) -> Path:
    """A finished run."""
    run("model=mlp", "model.hidden=[5]", out=tmp_path / "before")
    return tmp_path / "before"


def test_the_first_weights_are_the_last_of_the_other_run(before, run, tmp_path):
    run("model=mlp", "model.hidden=[5]", f"start_from={before}", "seed=9", out=tmp_path / "after")
    settings = api.load(tmp_path / "after").settings
    started = build_world(json.dumps(settings)).workload.build_model().state_dict()
    last = load_file(weights_file(str(before)))
    assert all(torch.equal(started[name], tensor) for name, tensor in last.items())


def test_a_run_that_goes_on_without_a_change_is_as_good(before, run, tmp_path):
    """Judged before any training, on the same test examples, it stands where the other one ended."""
    ended = json.loads((before / "summary.json").read_text())["final"]["accuracy"]
    run("model=mlp", "model.hidden=[5]", f"start_from={before}", out=tmp_path / "after")
    rounds = [json.loads(line) for line in (tmp_path / "after" / "rounds.jsonl").read_text().splitlines()]
    assert rounds[0]["metrics"]["accuracy"] == ended


def test_a_head_of_another_size_is_made_anew(before, settings):
    other = settings("model=mlp", "model.hidden=[5]", f"start_from={before}", "workload.num_classes=7")
    plain = settings("model=mlp", "model.hidden=[5]", "workload.num_classes=7")
    started, fresh = (build_world(json.dumps(s)).workload.build_model().state_dict() for s in (other, plain))
    last = load_file(weights_file(str(before)))
    for name, tensor in started.items():
        same = last[name].shape == tensor.shape
        assert torch.equal(tensor, last[name] if same else fresh[name])
    assert any(last[name].shape != tensor.shape for name, tensor in started.items())


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["model.hidden=[6]"], "take the model it is of"),
        (["model.hidden=[5,5]"], "which model MLP has; take the model it is of"),
        (["model.norm=batch", "model.hidden=[5]"], "has no tensor"),
    ],
)
def test_weights_of_another_network_are_refused(before, settings, overrides, words):
    config = json.dumps(settings("model=mlp", *overrides, f"start_from={before}"))
    with pytest.raises(ConfigError, match=r"start_from=.* " + words):
        build_world(config)


@pytest.mark.parametrize("content", [b"", b"no tensors", b"\x08\0\0\0\0\0\0\0{}      "])
def test_what_is_no_file_of_weights_is_refused(settings, tmp_path, content):
    (tmp_path / "w.safetensors").write_bytes(content)
    config = json.dumps(settings(f"start_from={tmp_path}/w.safetensors"))
    with pytest.raises(ConfigError, match=r"start_from=.*(cannot be read as safetensors|has no tensor)"):
        build_world(config)


@pytest.mark.parametrize("given, words", [("nowhere", "there is no nowhere"), (".", "holds no checkpoint")])
def test_a_place_without_weights_is_refused(settings, place, given, words):
    with pytest.raises(ConfigError, match=words):
        settings(f"start_from={given}")


def test_private_tensors_begin_there_too(before, settings):
    config = json.dumps(settings("model=mlp", "model.hidden=[5]", "method=fedrep", f"start_from={before}"))
    initial, last = Worker(build_world(config)).initial, load_file(weights_file(str(before)))
    assert initial
    assert all(torch.equal(tensor, last[name]) for name, tensor in initial.items())


def test_other_weights_than_it_was_begun_with_are_refused(before, settings, tmp_path):
    file = tmp_path / "begin.safetensors"
    weights = load_file(weights_file(str(before)))
    save_file(weights, file)
    config = settings("model=mlp", "model.hidden=[5]", f"start_from={file}")
    writer.run(config, LocalEngine(serve), tmp_path / "after")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, file)
    with pytest.raises(DataError, match=r"start_from was \w+ and is now \w+"):
        api.resume(tmp_path / "after", rounds=4)
