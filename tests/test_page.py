"""The page of a run: whole by itself, right in its figures, and there for runs that have not finished."""

import base64
import itertools
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pandas
import pytest
from conftest import DAILY

from fedsim.cli import main as cli
from fedsim.errors import ConfigError
from fedsim.report.files import Rows
from fedsim.report.page import _devices, _stragglers, write_page
from fedsim.report.plots.run import as_svg, curves, outcomes, time_by_device
from fedsim.report.rounds import RoundReport, read_rounds

COSTS = ("fleet=phones", "deadline_s=2", "evaluate_clients=2", "rounds=3")


class Page(HTMLParser):
    """What a browser would show, and every address that it would load."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.setdefault(self.open[-1], []).append(data.strip())


def test_page_shows_the_figures_of_the_summary_and_loads_nothing(run, tmp_path: Path):
    summary = run(*COSTS)
    page = Page(write_page(tmp_path).read_text())
    assert page.open == []
    assert page.texts["h1"] == ["fedavg on blobs, fleet phones"]
    assert page.texts["h2"] == [
        "What accuracy took", "Where the time of a device goes", "Stragglers",
        "What became of the clients that were asked", "How the data are split", "Settings",
    ]  # fmt: skip
    assert f"{100 * summary['final']['accuracy']:.2f} %" in page.texts["dd"]
    assert f"{summary['outcomes']['completed']} of {sum(summary['outcomes'].values())}" in page.texts["dd"]
    assert len(page.addresses) == 4
    assert all(address.startswith("data:image/") for address in page.addresses)


def test_tables_add_up_to_the_rows(run, tmp_path: Path):
    run(*COSTS)
    rows = pandas.concat(pandas.read_parquet(path) for path in (tmp_path / "clients").iterdir())
    table = _devices(columns(rows))
    asked = table.header.index("asked")
    assert sum(int(row[asked]) for row in table.rows) == len(rows)
    assert {row[0] for row in table.rows} == set(rows["device"])
    done = table.header.index("completed")
    assert sum(int(row[done]) for row in table.rows) == (rows["outcome"] == "completed").sum()


def test_energy_is_split_where_the_rows_split_it():
    """Runs of fedsim 0.1 have one column of joules, and their page stays as it was."""
    old = pandas.DataFrame([client(1, 1, 2.0)])
    new = old.assign(down_joules=0.1, compute_joules=0.2, up_joules=0.3, tail_joules=0.4)
    assert "tail J" not in _devices(columns(old)).header
    table = _devices(columns(new))
    start = table.header.index("mean J")
    assert table.header[start : start + 5] == ["mean J", "down J", "compute J", "up J", "tail J"]
    assert table.rows[0][start : start + 5] == ["1", "0.1", "0.2", "0.3", "0.4"]


def columns(rows: pandas.DataFrame) -> Rows:
    return {name: rows[name].to_numpy() for name in rows}


def client(number: int, round: int, total_s: float, outcome: str = "completed") -> dict:
    parts = {"down_s": total_s / 4, "compute_s": total_s / 2, "up_s": total_s / 4, "wait_s": 0.0, "total_s": total_s}
    who = {"round": round, "phase": "train", "client": number, "device": f"phone{number % 2}", "outcome": outcome}
    return {**who, **parts, "joules": 1.0, "peak_memory_bytes": 10, "storage_bytes": 0}


def test_the_straggler_is_the_last_whose_reply_was_taken():
    rows = [client(1, 1, 2.0), client(2, 1, 3.0), client(3, 1, 9.0, "late")]
    rows += [client(1, 2, 4.0), client(2, 2, 1.0), client(2, 3, 5.0)]
    table = _stragglers(columns(pandas.DataFrame(rows)))
    assert table is not None
    assert [row[:4] for row in table.rows] == [
        ["client 2", "phone0", "2 of 3", "3"],
        ["client 1", "phone1", "1 of 3", "2"],
    ]
    assert table.rows[0][4:] == ["0.75", "1.5", "0.75", "3"]


def test_nothing_to_draw_is_no_picture():
    rounds = [RoundReport(0, 0.0, 0.0)]
    nobody = columns(pandas.DataFrame([client(1, 1, 1.0, "offline")]))
    assert curves(rounds) is None
    assert outcomes(rounds) is None
    assert time_by_device(nobody) is None
    assert _stragglers(nobody) is None


def test_many_rounds_share_bars():
    rounds = [RoundReport(i, 0.0, 0.0, (1, 2), {"completed": (1,), "late": (2,)}) for i in range(1, 131)]
    figure = outcomes(rounds)
    assert figure is not None
    (axes,) = figure.axes
    assert axes.get_ylabel() == "clients, mean of 3 rounds"
    assert len(axes.patches) == 2 * 44
    assert {bar.get_height() for bar in axes.patches} == {1.0}


def test_equal_runs_draw_equal_pictures(run, tmp_path: Path):
    run(*COSTS)
    first, again = (as_svg(curves(read_rounds(tmp_path))) for _ in range(2))  # type: ignore[arg-type]
    assert first == again
    assert b"<svg" in base64.b64decode(first.partition(",")[2])


def test_a_run_that_failed_has_a_page_that_says_so(run, tmp_path: Path):
    run(*COSTS)
    (tmp_path / "summary.json").unlink()
    (tmp_path / "split.json").unlink()  # fedsim 0.1 did not keep it
    (tmp_path / "failure.json").write_text(json.dumps({"error": "ClientError", "reason": "<b>client</b> 3 failed"}))
    text = write_page(tmp_path).read_text()
    assert "ClientError: &lt;b&gt;client&lt;/b&gt; 3 failed" in text
    assert "How the data are split" not in text
    took = len({c for r in read_rounds(tmp_path) for c in r.outcomes.get("completed", ())})
    assert (str(took), "clients that completed a round, so far") in itertools.pairwise(Page(text).texts["dd"])


def test_the_page_says_who_never_took_part_and_that_the_run_was_short(run, tmp_path: Path):
    summary = run(*COSTS, *DAILY)
    for finished in (True, False):
        page = Page(write_page(tmp_path).read_text())
        assert f"{summary['clients']['never']} of 6" in page.texts["dd"]
        assert (summary["warnings"][0] in page.texts["p"]) == finished
        (tmp_path / "summary.json").unlink(missing_ok=True)


def test_a_stream_shows_its_tasks(run, tmp_path: Path):
    data = ("workload.num_classes=4", "workload.examples_per_client=24")
    run(*data, "stream=split_classes", "stream.tasks=2", "rounds=4", "method=finetune")
    text = write_page(tmp_path).read_text()
    assert "<h2>Tasks</h2>" in text
    assert len(re.findall("data:image/png", text)) == len(list((tmp_path / "pictures").iterdir())) > 0


def test_the_command_writes_it_anew_and_names_what_is_no_run(run, tmp_path: Path, monkeypatch, capsys):
    run("rounds=1")
    assert not (tmp_path / "report.html").exists()
    monkeypatch.setattr(sys, "argv", ["fedsim", "report", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"page: {tmp_path / 'report.html'}\n"
    assert "How the data are split" in (tmp_path / "report.html").read_text()
    (tmp_path / "rounds.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"holds no run: rounds.jsonl is not in it"):
        write_page(tmp_path)
