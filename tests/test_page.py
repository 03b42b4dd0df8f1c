"""The page of a run: whole by itself, right in its figures, and there for runs that have not finished."""

import itertools
import json
import shlex
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pandas
import pytest
from conftest import DAILY

from devices.errors import FileError
from fedsim.cli import main as cli
from fedsim.errors import ConfigError
from fedsim.report.files import Rows, read_config
from fedsim.report.page import write_page
from fedsim.report.page_tables import (
    classes_table,
    devices_table,
    fairness_table,
    microphones_table,
    never_took_part,
    stragglers,
)
from fedsim.report.plots.on_page import (
    confusion_map,
    heat_map,
    loss_curve,
    outcomes,
    reliability,
    score_curve,
    split_labels,
    time_by_device,
)
from fedsim.report.rounds import RoundReport, read_rounds
from fedsim.settings.compose import compose
from fedsim.workloads.describe import ClientRow, Split
from fedsim.workloads.metrics import ACCURACY, Metric

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
    expected = [
        "What accuracy took", "Class by class", "How clients fare", "Who was asked to train, and who was waited for",
        "Who never took part", "Where the time of a device goes", "How the data are split", "Commands", "Files",
    ]  # fmt: skip
    assert page.texts["h2"] == [
        title for title in expected if title != "Who never took part" or summary["clients"]["never"]
    ]
    assert f"{100 * summary['final']['accuracy']:.2f} %" in page.texts["dd"]
    assert f"{summary['outcomes']['completed']} of {sum(summary['outcomes'].values())}" in page.texts["dd"]
    assert all(address == "data:," or (tmp_path / address).is_file() for address in page.addresses)
    assert {"rounds.jsonl", "config.yaml"} < set(page.addresses)


def test_tables_add_up_to_the_rows(run, tmp_path: Path):
    run(*COSTS)
    every = pandas.concat(pandas.read_parquet(path) for path in (tmp_path / "clients").iterdir())
    assert set(every["phase"]) == {"train", "evaluate"}
    for phase, rows in every.groupby("phase"):
        table = devices_table(columns(every), str(phase))
        assert table is not None
        asked = table.header.index("asked")
        assert sum(int(row[asked]) for row in table.rows) == len(rows)
        assert {row[0] for row in table.rows} == set(rows["device"])
        done = table.header.index("completed")
        assert sum(int(row[done]) for row in table.rows) == (rows["outcome"] == "completed").sum()


def test_a_device_that_only_judged_has_no_time_of_training():
    """It is asked to train once, in vain, and judges in a second twice."""
    rows = [client(1, 1, 9.0, "late"), *(client(1, n, 1.0) | {"phase": "evaluate"} for n in (1, 2))]
    train, judge = (devices_table(columns(pandas.DataFrame(rows)), phase) for phase in ("train", "evaluate"))
    assert train is not None
    assert judge is not None
    assert train.rows[0][:6] == ["phone1", "1", "1", "1", "", ""]
    assert judge.rows[0][:5] == ["phone1", "1", "2", "2", "1"]


def test_energy_is_split_where_the_rows_split_it():
    """Runs of fedsim 0.1 have one column of joules, and their page stays as it was."""
    old = pandas.DataFrame([client(1, 1, 2.0)])
    new = old.assign(down_joules=0.1, compute_joules=0.2, up_joules=0.3, tail_joules=0.4)
    before, table = (devices_table(columns(rows), "train") for rows in (old, new))
    assert before is not None
    assert table is not None
    assert "tail J" not in before.header
    start = table.header.index("mean J")
    assert table.header[start : start + 5] == ["mean J", "down J", "compute J", "up J", "tail J"]
    assert table.rows[0][start : start + 5] == ["1", "0.1", "0.2", "0.3", "0.4"]


def columns(rows: pandas.DataFrame) -> Rows:
    return {name: rows[name].to_numpy() for name in rows}


def client(number: int, round: int, total_s: float, outcome: str = "completed", start_s: float = 0.0) -> dict:
    parts = {
        "start_s": start_s,
        "down_s": total_s / 4,
        "compute_s": total_s / 2,
        "up_s": total_s / 4,
        "wait_s": 0.0,
        "total_s": total_s,
    }
    who = {"round": round, "phase": "train", "client": number, "device": f"phone{number % 2}", "outcome": outcome}
    return {**who, **parts, "joules": 1.0, "peak_memory_bytes": 10, "storage_bytes": 0}


def test_the_straggler_is_the_last_whose_reply_was_taken():
    rows = [client(1, 1, 2.0), client(2, 1, 3.0), client(3, 1, 9.0, "late")]
    rows += [client(1, 2, 4.0), client(2, 2, 1.0), client(2, 3, 5.0)]
    table = stragglers(columns(pandas.DataFrame(rows)))
    assert table is not None
    assert [row[:4] for row in table.rows] == [
        ["client 2", "phone0", "2 of 3", "3"],
        ["client 1", "phone1", "1 of 3", "2"],
    ]
    assert table.rows[0][4:] == ["0.75", "1.5", "0.75", "3"]


def test_who_came_last_into_a_buffer_is_no_matter_of_how_long_it_took():
    """Client 1 was at work for longer, and came before client 2, which began later."""
    rows = [client(1, 1, 5.0), client(2, 1, 1.0, start_s=4.5)]
    table = stragglers(columns(pandas.DataFrame(rows)), "Last of a buffer")
    assert table is not None
    assert [row[0] for row in table.rows] == ["client 2"]


def test_nothing_to_draw_is_no_picture():
    rounds = [RoundReport(0, 0.0, 0.0)]
    nobody = columns(pandas.DataFrame([client(1, 1, 1.0, "offline")]))
    assert score_curve(rounds) is None
    assert loss_curve(rounds) is None
    assert outcomes(rounds) is None
    assert time_by_device(nobody, "Training") is None
    assert stragglers(nobody) is None


def test_many_rounds_share_bars():
    rounds = [RoundReport(i, 0.0, 0.0, (1, 2), {"completed": (1,), "late": (2,)}) for i in range(1, 131)]
    drawn = outcomes(rounds)
    assert drawn is not None
    assert "clients, mean of 3 rounds" in drawn
    bars = ElementTree.fromstring(drawn).findall(".//{*}rect")
    assert len(bars) == 2 * 44
    assert len({bar.get("height") for bar in bars}) == 1


def test_equal_runs_have_equal_pages(run, tmp_path: Path):
    run(*COSTS)
    first, again = (write_page(tmp_path).read_bytes() for _ in range(2))
    assert first == again


def test_what_a_class_is_called_is_no_markup():
    """Everything in a picture is well-formed XML, whatever its texts are."""
    evil = "<script>&\x00]]>"
    split = Split("name", 1, (evil, "b"), (ClientRow(0, 3, 1, 2, (2, 1)),), (3,))
    rows = columns(pandas.DataFrame([client(1, 1, 1.0) | {"device": evil}]))
    for drawn in (
        split_labels(split),
        time_by_device(rows, evil),
        heat_map(evil, [[1, 2], [3, 4]], evil, evil),
        confusion_map([[1, 2], [3, 4]], [evil, "b"]),
        reliability([(0.5, 0.4)]),
    ):
        assert drawn is not None
        assert "<script" not in drawn
        ElementTree.fromstring(drawn)


def test_who_never_took_part_takes_its_share_of_the_data_along():
    """Client 2 was offline twice and has 30 of 60 examples, all of class b; client 3 was never asked and has 10."""
    rows = columns(pandas.DataFrame([client(1, 1, 1.0), client(2, 1, 0.0, "offline"), client(2, 2, 0.0, "offline")]))
    counts = ((10, 0), (10, 0), (0, 30), (10, 0))
    split = Split(
        "x", 4, ("a", "b"), tuple(ClientRow(i, sum(c), 0, 1, c) for i, c in enumerate(counts)), (10, 10, 30, 10)
    )
    table, note = never_took_part(rows, {0, 1}, 4, split) or pytest.fail("two never took part")
    assert [*map(list, table.rows)] == [
        ["never asked", "1", "0", "", "10", "16.7 %"],
        ["phone0", "1", "2", "2 offline", "30", "50.0 %"],
    ]
    assert note.startswith("Completed no round: clients 2, 3. 66.7 % of the training examples are theirs")
    assert "'b' 100 %, 'a' 33 %" in note
    assert never_took_part(rows, {0, 1, 2, 3}, 4, split) is None


def test_the_worst_tenth_is_the_mean_of_the_lowest():
    """Of eleven clients the worst tenth are two: (0.0 + 0.1) / 2."""
    scores = {number: ("a" if number else "b", number / 10) for number in range(11)}
    table = fairness_table(scores, ACCURACY)
    assert table.rows[0] == ["all", "11", "0.00 %", "5.00 %", "50.00 %", "50.00 %", "100.00 %"]
    assert table.rows[2] == ["b", "1", *["0.00 %"] * 5]
    worst = fairness_table(scores, Metric("mse", "", higher_is_better=False)).rows[0]
    assert worst[2] == "1"


def test_classes_are_listed_from_the_worst():
    classes = [
        {"name": "a", "examples": 2, "accuracy": 1.0, "f1": 0.8},
        {"name": "b", "examples": 0, "accuracy": None, "f1": 0.0},
    ]
    assert classes_table(classes).rows == [["b", "0", "", "0.00 %"], ["a", "2", "100.00 %", "80.00 %"]]
    many = classes_table([{**classes[0], "f1": number / 30} for number in range(30)])
    assert (len(many.rows), many.caption) == (20, "The 20 worst of 30 classes")


def test_unseen_microphones_are_marked_and_stand_last():
    heard = {
        "round": 3,
        "seen": {"pixel3": {"share": 0.75, "accuracy": 0.5, "loss": 1.25}},
        "unseen": {"unseen_1": {"accuracy": 0.25, "loss": None}},
    }
    plain = microphones_table(heard, [{"keep": 0.5}])
    assert plain.header == ["microphone", "clients", "accuracy", "loss"]
    assert plain.rows == [["pixel3", "75.00 %", "50.00 %", "1.25"], ["unseen_1", "none: unseen", "25.00 %", ""]]
    deployed = [{"microphones": {"pixel3": {"accuracy": 0.4, "loss": 2.0}}}]
    table = microphones_table(heard, deployed)
    assert table.header[4:] == ["compressed: accuracy", "loss"]
    assert [row[4:] for row in table.rows] == [["40.00 %", "2"], ["", ""]]


def test_a_page_has_the_microphones_of_its_summary(run, tmp_path: Path):
    summary = run(*COSTS)
    assert "<h2>Microphones</h2>" not in write_page(tmp_path).read_text()
    summary["microphones"] = {"round": 3, "seen": {"<b>": {"share": 1.0, "accuracy": 0.5, "loss": 1.0}}, "unseen": {}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    page = Page(write_page(tmp_path).read_text())
    assert "Microphones" in page.texts["h2"]
    assert {"<b>", "100.00 %"} <= set(page.texts["td"])
    summary["microphones"]["seen"] = ["pixel3"]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(FileError, match=r"microphones: .*seen"):
        write_page(tmp_path)


def test_the_first_sentence_answers(run, tmp_path: Path):
    summary = run(*COSTS)
    page = Page(write_page(tmp_path).read_text())
    answer = page.texts["p"][0]
    assert answer.startswith(f"{100 * summary['final']['accuracy']:.2f} % accuracy")
    assert "after 3 rounds" in answer
    lost = summary["outcomes"]["late"] + summary["outcomes"]["offline"]
    assert (" of those asked " in answer) == bool(lost)


def test_the_page_has_the_command_that_repeats_the_run(run, tmp_path: Path):
    run(*COSTS, "method=fedprox", "trainer.lr=0.3", "fleet.devices={raspberry_pi_4: 1}")
    lines = Page(write_page(tmp_path).read_text()).texts["pre"]
    again = compose(shlex.split(lines[0])[2:])
    settings = read_config(tmp_path)
    assert {**again, "out": None} == {**settings, "out": None}
    assert (f"fedsim resume {tmp_path} rounds=6" in lines) == (tmp_path / "checkpoint").exists()


def test_a_run_that_failed_has_a_page_that_says_so(run, tmp_path: Path):
    run(*COSTS)
    (tmp_path / "summary.json").unlink()
    (tmp_path / "split.json").unlink()  # fedsim 0.1 did not keep it
    (tmp_path / "failure.json").write_text(json.dumps({"error": "ClientError", "reason": "<b>client</b> 3 failed"}))
    text = write_page(tmp_path).read_text()
    assert "ClientError: &lt;b&gt;client&lt;/b&gt; 3 failed" in text
    assert "How the data are split" not in text
    took = len({c for r in read_rounds(tmp_path) for c in r.outcomes.get("completed", ())})
    assert Page(text).texts["p"][0].startswith("Not finished: ")
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
    tasks = text.partition("<h2>Tasks</h2>")[2].partition("</section>")[0]
    assert tasks.count('<svg viewBox="0 0 420') == 2
    assert Page(f"<div>{tasks}</div>").texts["li"] == ["task 0", "task 1", "mean of tasks so far"]
    assert "data:image/png" not in text


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
