"""Classification is out of the core: a workload with real numbers for labels, judged by an error, runs from end to end.

Every method either trains on it for two rounds or is refused in one sentence.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Ended
from sine import SINE
from test_methods import TINY, federate, methods_of_each_kind

from clients.app import serve
from devices.errors import FileError
from fedsim.engines.local import LocalEngine
from fedsim.errors import ConfigError
from fedsim.report.files import read_summary
from fedsim.report.page import write_page
from fedsim.report.plots.split import draw_split
from fedsim.report.plots.study import draw_study, drawn_labels
from fedsim.report.rounds import read_rounds
from fedsim.report.split import primary_of, read_split
from fedsim.report.text import closing_lines, closing_table, sweep_table
from fedsim.runs import writer
from fedsim.runs.api import load
from fedsim.settings.build import build_world
from fedsim.settings.compose import compose
from fedsim.study.compare import compare
from fedsim.study.page import text_of
from fedsim.study.results import collect, write_result
from fedsim.study.spec import plan, read_study
from fedsim.workloads.describe import summary_lines
from fedsim.workloads.metrics import ACCURACY, CLIENTS, Metric

MSE = Metric("mse", "m²", higher_is_better=False)
BASE = [override for override in TINY if not override.startswith("workload")] + list(SINE)
LONG = (*BASE, "rounds=6", "trainer.lr=0.2", "trainer.local_epochs=3", "cohort=6", "num_clients=6")
NEED_CLASSES = {
    *("agem", "coreset", "gss", "ocs", "reservoir"),  # the memory is balanced by class
    *("fedmix", "global_mixup", "local_mixup", "naivemix"),  # labels are mixed
    *("dcil", "fjord", "lwf", "pqk"),  # logits are distilled
    *("attribution", "cpq", "dropbits", "gradual", "magnitude_attention"),  # they may be
    *("heterofl", "sub_fedavg"),  # labels are masked; an accuracy says when to prune
    "fedproto",  # classes have prototypes
}


def run_sine(out: Path, *overrides: str) -> dict[str, Any]:
    return writer.run(compose([*LONG, *overrides]), LocalEngine(serve), out)


@pytest.mark.parametrize("method", methods_of_each_kind())
def test_every_method_trains_without_classes_or_says_that_it_needs_them(method: str):
    if method in NEED_CLASSES:
        with pytest.raises(ConfigError, match=f"^{method} needs a classification workload, and sine is none: "):
            federate(f"method={method}", base=BASE)
        return
    if method == "fltrust":
        with pytest.raises(ConfigError, match="workload sine has no examples for the server beside those that judge"):
            federate(f"method={method}", base=BASE)
        return
    outcome = federate(f"method={method}", base=BASE)
    assert [report.round for report in outcome.reports] == [0, 1, 2]
    assert all(math.isfinite(report.metrics["mse"]) for report in outcome.reports)


def test_what_else_needs_classes_says_so():
    for need in ("stream=rotated", "engine.batch_clients=2"):
        with pytest.raises(ConfigError, match=r"sine.*none"):
            federate(need, "rounds=10", base=BASE)


@pytest.mark.parametrize("method", ["fedavg", "fedprox", "ditto"])
def test_a_run_speaks_of_the_metric_of_its_workload(method: str, tmp_path: Path):
    summary = run_sine(tmp_path, f"method={method}", "evaluate_clients=6")
    reports = read_rounds(tmp_path)
    values = {report.round: report.metrics["mse"] for report in reports}
    lowest = min(values.values())
    assert Metric.named_in(summary) == primary_of(tmp_path) == MSE
    last = reports[-1].metrics
    assert summary["final"] == {key: last[key] for key in ("mse", "loss", "client_mse_worst_tenth")}
    assert summary["best"] == {"mse": lowest, "round": min(r for r, value in values.items() if value == lowest)}
    assert summary["best"]["mse"] < values[0] / 2
    assert {**read_summary(tmp_path), "host_s": 0} == {**summary, "host_s": 0}
    table = closing_table(reports, MSE)
    assert [column.header for column in table.columns][1:3] == ["mse m²", "clients' own"]
    assert list(table.columns[1].cells)[-1] == f"{values[6]:.4g}"
    lines = "\n".join(closing_lines(summary, tmp_path, reports))
    assert f"test mse {values[6]:.4g} m² after 6 rounds" in lines
    assert f"clients' own models: mse {last[CLIENTS + 'mse']:.4g} m²" in lines
    assert [column.header for column in sweep_table([([], summary)]).columns][2] == "mse"
    html = write_page(tmp_path).read_text()
    assert "What mse took" in html
    assert f"{values[6]:.4g} m²" in html
    assert "accuracy" not in html.partition("<pre>")[0]
    run = load(tmp_path)
    assert (run.primary, run.plot() is not None) == (MSE, True)
    assert "mse" in run._repr_html_()


def test_a_run_ends_where_a_low_metric_has_reached_its_target(tmp_path: Path):
    whole = run_sine(tmp_path / "whole")
    values = [report.metrics["mse"] for report in read_rounds(tmp_path / "whole")]
    assert whole["to_target"] is None
    target = values[3] + 1e-6
    first = next(number for number, value in enumerate(values) if value <= target)
    summary = run_sine(tmp_path / "short", f"target={target}")
    assert (summary["rounds"], summary["to_target"]["round"], summary["to_target"]["mse"]) == (first, first, target)
    assert f"to {target:.4g} m²" in write_page(tmp_path / "short").read_text()
    missed = run_sine(tmp_path / "missed", "target=0", "rounds=1")
    assert "mse 0 m² not reached" in closing_lines(missed, tmp_path / "missed")
    assert "0 m² was not reached" in write_page(tmp_path / "missed").read_text()
    with pytest.raises(ConfigError, match=r"target_accuracy=0.9 .* judged by mse \(lower is better\); set target="):
        run_sine(tmp_path / "no", "target_accuracy=0.9")
    with pytest.raises(ConfigError, match=r"target=0\.1 and target_accuracy=0\.9 both say when to stop"):
        run_sine(tmp_path / "no", "target_accuracy=0.9", "target=0.1")


def test_clients_without_held_out_examples_are_left_out_of_the_mean(tmp_path: Path):
    """Of six clients the three with even numbers have three held-out examples each."""
    run_sine(tmp_path, "rounds=1", "evaluate_clients=6")
    rows = load(tmp_path).clients
    judged = rows[rows["phase"] == "evaluate"].set_index("client")
    assert sorted(judged.index[judged["num_examples"] == 3]) == [0, 2, 4]
    mean = judged["mse"].dropna().mean()
    assert load(tmp_path).rounds[CLIENTS + "mse"].iloc[-1] == pytest.approx(mean)


def test_runs_are_compared_by_the_metric_that_they_share(tmp_path: Path, fedsim, run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "160")
    for method in ("fedavg", "fedprox"):
        for seed in (1, 2):
            run_sine(tmp_path / f"{method}{seed}", f"method={method}", f"seed={seed}", "rounds=3")
    folders = sorted(tmp_path.iterdir())
    one, other = compare(folders, last=1).rows
    last = {folder.name: read_rounds(folder)[-1].metrics["mse"] for folder in folders}
    assert one.metric == MSE
    differences = [last[f"fedprox{seed}"] - last[f"fedavg{seed}"] for seed in (1, 2)]
    assert other.difference == pytest.approx(sum(differences) / 2)
    ended: Ended = fedsim("paired", str(tmp_path), "--last", "1", "--out", str(tmp_path / "compared"))
    assert ended.code == 0
    assert "mse m²" in ended.out
    run(out=tmp_path / "blobs")
    with pytest.raises(ConfigError, match=r"blobs is judged by accuracy, % and .*fedavg1 by mse, m².*leave one out"):
        compare([tmp_path / "blobs", *folders], last=1)


def test_a_study_ranks_the_lowest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    arms = {"fedavg": ["method=fedavg"], "slow": ["trainer.lr=0.001"], "ditto": ["method=ditto"]}
    tree = {"title": "Sines", "base": list(LONG), "seeds": [1, 2], "last": 1, "arms": arms}
    (tmp_path / "sines.yaml").write_text(yaml.safe_dump(tree))
    study = read_study(str(tmp_path / "sines.yaml"), ["rounds=3"])
    runs = plan(study, tmp_path / "out")
    for planned in runs:
        writer.run(planned.settings, LocalEngine(serve), planned.folder)
    result = collect(study, runs)
    means = {row.label: row.mean for row in result.rows}
    assert result.metric == MSE
    assert means["fedavg"] < means["slow"]
    page = text_of(result, {})
    assert "| mse, m² |" in page
    assert f"| {means['slow']:.4g} ± " in page
    monkeypatch.setattr("fedsim.report.plots.study.MAX_LINES", 2)
    assert "slow" not in drawn_labels(result)
    draw_study(result, tmp_path / "study.png")
    write_result(result, {}, tmp_path)
    assert json.loads((tmp_path / "study.json").read_text())["metric"] == "mse"


def test_a_split_without_classes_shows_sizes(tmp_path: Path):
    workload = build_world(json.dumps(compose(list(LONG)))).workload
    assert "input             1" in summary_lines(workload)
    run_sine(tmp_path, "rounds=1")
    split = read_split(tmp_path)
    assert split is not None
    assert (split.class_names, split.rows[1].train, split.rows[0].test) == ((), 12, 3)
    assert draw_split(split).axes[0].get_ylabel() == "examples"


def test_a_metric_that_no_run_wrote_is_refused(tmp_path: Path):
    run_sine(tmp_path, "rounds=1")
    tree = json.loads((tmp_path / "summary.json").read_text())
    for wrong, said in (({"name": "mse"}, "lacks 'unit'"), ({**tree["primary"], "name": 3}, "name must be text")):
        (tmp_path / "summary.json").write_text(json.dumps({**tree, "primary": wrong}))
        with pytest.raises(FileError, match=said):
            read_summary(tmp_path)


def test_percentages_and_other_units_are_written_alike():
    assert (ACCURACY.number(0.1234), ACCURACY.change(-0.01), ACCURACY.with_unit(0.5)) == ("12.34", "-1.00", "50.00 %")
    assert (MSE.number(0.12345), MSE.change(0.01), MSE.with_unit(2.0)) == ("0.1235", "+0.01", "2 m²")
    assert (MSE.reaches(0.1, 0.2), ACCURACY.reaches(0.1, 0.2)) == (True, False)
    assert MSE.named("client_mse").label == "client mse, m²"


def test_tensors_of_any_name_say_how_many_examples_there_are():
    workload = build_world(json.dumps(compose(list(LONG)))).workload
    assert len(workload.test) == 40
    assert workload.batch_size_of(workload.sample(7)) == 7
    assert torch.equal(workload.inputs(workload.sample(2))[0], workload.sample(2)["x"])
