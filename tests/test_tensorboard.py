"""What TensorBoard's own readers find in a run folder: curves by rounds and by what was spent, and hyperparameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.hparams import metadata

from clients.app import serve
from fedsim.engines.local import LocalEngine
from fedsim.errors import ConfigError
from fedsim.report.rounds import RoundReport, read_rounds, running_costs
from fedsim.runs import writer
from fedsim.runs.prolong import prolong
from fedsim.settings.compose import of_rounds

LABEL = "fedavg-blobs-uniform-seed1"
AXES = {"simulated_ms": ("simulated_s", 1000), "energy_mj": ("joules", 1000), "traffic_bytes": ("traffic_bytes", 1)}


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in EventAccumulator(str(folder)).Reload().Scalars(tag)]


def started(folder: Path) -> dict[str, Any]:
    """The hyperparameters that the plugin reads."""
    content = EventAccumulator(str(folder)).Reload().PluginTagToContent("hparams")[metadata.SESSION_START_INFO_TAG]
    found = metadata.parse_session_start_info_plugin_data(content).hparams
    return {key: MessageToDict(value) for key, value in found.items()}


def check_curves(out: Path, label: str = LABEL) -> None:
    """Every axis has one point for each round that was judged, and the sums are those of the rounds."""
    rounds, board = read_rounds(out), out / "tensorboard" / label
    costs = running_costs(rounds)
    for tag, field in (("energy_j", "joules"), ("simulated_s", "simulated_s")):
        assert [value for _, value in points(board, f"total/{tag}")] == pytest.approx(costs[field])
    judged = [place for place, report in enumerate(rounds) if "accuracy" in report.metrics]
    for axis, (cost, scale) in AXES.items():
        found = points(board / "spent", f"by_{axis}/accuracy")
        assert [step for step, _ in found] == [round(scale * costs[cost][place]) for place in judged]
        assert [value for _, value in found] == pytest.approx([rounds[place].metrics["accuracy"] for place in judged])


def test_metrics_are_drawn_against_what_was_spent(run, tmp_path: Path):
    run("evaluate_every=2", "rounds=5")
    check_curves(tmp_path)


def test_a_run_that_has_ended_has_its_settings_beside_its_figures(run, tmp_path: Path):
    summary = run("target_accuracy=0.2", "rounds=40", "trainer.momentum=0.5", "fleet.devices={pixel3: 2, mi_9: 1}")
    (label,) = (path.name for path in (tmp_path / "tensorboard").iterdir())
    assert label == "fedavg-blobs-pixel3-mi_9-seed1"
    final = tmp_path / "tensorboard" / label / "final"
    found = started(final)
    assert (found["method"], found["workload"], found["fleet"]) == ("fedavg", "blobs", "pixel3, mi_9")
    assert (found["trainer.momentum"], found["seed"], found["target_accuracy"]) == (0.5, 1, 0.2)
    assert found["fleet.devices"] == '{"pixel3": 2, "mi_9": 1}'
    assert not {key for key in found if "_target_" in key or key.startswith(("engine", "out", "choices"))}
    for name, value in (
        ("final/accuracy", summary["final"]["accuracy"]),
        ("best/accuracy", summary["best"]["accuracy"]),
        ("total/energy_j", summary["energy_j"]["total"]),
        ("to_target/energy_j", summary["to_target"]["energy_j"]),
    ):
        assert points(final, name) == [(summary["rounds"], pytest.approx(value))]


def test_the_hparams_tab_finds_one_session_for_each_run(run, tmp_path: Path):
    for seed in (1, 2):
        run(f"seed={seed}", "rounds=1", out=tmp_path / str(seed))
    found = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload().PluginRunToTagToContent("hparams")
    names = [f"{seed}/tensorboard/fedavg-blobs-uniform-seed{seed}/final" for seed in (1, 2)]
    assert sorted(found) == names
    assert all(set(tags) == {metadata.SESSION_START_INFO_TAG, metadata.SESSION_END_INFO_TAG} for tags in found.values())


def cut(settings: Any, out: Path, until: int, *overrides: str) -> None:
    def watch(report: RoundReport) -> None:
        if report.round == until:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writer.run(settings(*overrides), LocalEngine(serve), out, watch)


def test_a_run_that_goes_on_has_every_point_once_and_one_session(settings, tmp_path: Path):
    given = ("rounds=4", "checkpoint_s=0", "name=mine")
    cut(settings, tmp_path, 2, *given)
    board = tmp_path / "tensorboard" / "mine"
    assert not (board / "final").exists()
    writer.run(settings(*given), LocalEngine(serve), tmp_path, resume=True)
    check_curves(tmp_path, "mine")
    prolong(tmp_path, of_rounds(settings(*given), 6))
    writer.run(of_rounds(settings(*given), 6), LocalEngine(serve), tmp_path, resume=True)
    check_curves(tmp_path, "mine")
    assert started(board / "final")["rounds"] == 6
    assert len(list((board / "final").iterdir())) == 1


def test_a_run_whose_events_are_in_the_folder_itself_goes_on_there(settings, tmp_path: Path):
    """As fedsim 0.1 wrote them."""
    given = ("rounds=4", "checkpoint_s=0")
    cut(settings, tmp_path, 2, *given)
    (events,) = (path for path in (tmp_path / "tensorboard" / LABEL).iterdir() if path.is_file())
    events.rename(tmp_path / "tensorboard" / events.name)
    for path in (tmp_path / "tensorboard" / LABEL / "spent").iterdir():
        path.unlink()
    (tmp_path / "tensorboard" / LABEL / "spent").rmdir()
    (tmp_path / "tensorboard" / LABEL).rmdir()
    writer.run(settings(*given), LocalEngine(serve), tmp_path, resume=True)
    check_curves(tmp_path, "")


@pytest.mark.parametrize("below", [LABEL, f"{LABEL}/spent", f"{LABEL}/final"])
def test_events_go_through_no_link_to_elsewhere(settings, tmp_path: Path, below: str):
    given, run = ("rounds=4", "checkpoint_s=0"), tmp_path / "run"
    cut(settings, run, 2, *given)
    place, elsewhere = run / "tensorboard" / below, tmp_path / "elsewhere"
    if place.exists():
        place.rename(elsewhere)
    else:
        elsewhere.mkdir()
    place.symlink_to(elsewhere)
    before = sorted(elsewhere.rglob("*"))
    with pytest.raises(ConfigError, match="is a link to something outside"):
        writer.run(settings(*given), LocalEngine(serve), run, resume=True)
    assert sorted(elsewhere.rglob("*")) == before
