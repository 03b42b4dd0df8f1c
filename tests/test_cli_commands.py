"""`fedsim doctor` and `fedsim bench`, and the help of every command."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from conftest import Ended, assert_refused

from fedsim.cli import main as cli
from fedsim.cli.bench_rounds import Bench

pytestmark = pytest.mark.usefixtures("place")


def test_doctor_finds_this_installation_well_and_writes_nothing(fedsim: Callable[..., Ended]):
    ended = fedsim("doctor")
    assert (ended.code, ended.err) == (0, "")
    assert "FAILED" not in ended.out
    assert "3 rounds in" in ended.out
    assert list(Path().iterdir()) == []


def test_doctor_says_when_something_is_wrong(fedsim: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fedsim.cli.doctor.PACKAGES", ("fedsim-edge", "no-such-package"))

    def broken(*_: Any) -> None:
        raise RuntimeError("it broke")

    monkeypatch.setattr("fedsim.runs.writer.run", broken)
    ended = fedsim("doctor")
    assert ended.code == 1
    assert "not installed" in ended.out
    assert "it broke" in ended.out


def test_bench_prints_what_a_script_needs(fedsim: Callable[..., Ended]):
    sweep = ["--population", "20,30", "--cohort", "5"]
    ended = fedsim("bench", "--model", "mlp", "--rounds", "2", "--engines", "local", *sweep, "--json")
    assert (ended.code, ended.err) == (0, "")
    result = json.loads(ended.out)
    assert result["plain_updates_per_s"] > 0
    assert result["plain_channels_last_updates_per_s"] > 0
    local = result["engines"]["local"]
    assert set(local) >= {"updates_per_s", "ratio", "start_s", "peak_rss_bytes", "cpu_ms_per_update"}
    assert all(value > 0 for key, value in local.items() if not key.startswith("cpu"))  # it may tick too seldom
    assert [(row["clients"], row["cohort"]) for row in result["sweep"]] == [(20, 5), (30, 5)]
    assert all(row["round_s"] > 0 for row in result["sweep"])
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--population", "1,x"], ["--population", "'x'"]),
        (["--population", ","], ["--population", "''"]),
        (["--population", "0"], ["--population", "at least 1", "'0'"]),
        (["--population", "100,5"], ["--population takes numbers of at least 10", "got 5"]),
        (["--rounds", "1"], ["'--rounds'", "2<=x"]),
        (["--rounds", "x"], ["'--rounds'", "'x'"]),
        (["--model", "nope"], ["unknown model 'nope'", "lenet5"]),
        (["--model", "char_lstm"], ["model char_lstm needs sequences"]),
        (["--engines", "lokal"], ["unknown engine 'lokal'", "'local'"]),
        (["--engines", ","], ["unknown engine ','"]),
        (["--cohort", "20", "--population", "10"], ["--population takes numbers of at least 20", "got 10"]),
        (["--device", "gpu"], ["unknown --device 'gpu'", "cpu, cuda"]),
        (["--skew", "-1"], ["'--skew'", "0<=x"]),
        (["--method", "nope"], ["unknown method 'nope'"]),
        (["--nope"], ["--nope"]),
        (["extra"], ["extra"]),
    ],
)
def test_bench_refuses_in_one_sentence(arguments: list[str], words: list[str], fedsim: Callable[..., Ended]):
    assert_refused(fedsim("bench", *([] if "--engines" in arguments else ["--engines", "local"]), *arguments), *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_bench_on_a_card_needs_one(fedsim: Callable[..., Ended]):
    assert_refused(fedsim("bench", "--device", "cuda"), "--device=cuda needs a GPU, and torch finds none here")
    assert_refused(fedsim("bench", "--tf32"), "--tf32 is for a GPU")


def test_all_sides_of_a_bench_multiply_alike():
    bench = Bench("lenet5", tf32=True, others=("method=fedprox",))
    plain = replace(bench, others=()).settings("local", None, 10, 5)
    assert (plain["engine"]["tf32"], plain["choices"]["method"]) == (True, None)
    assert bench.settings("slots", None, 10, 5)["engine"]["tf32"]


# --- help ------------------------------------------------------------------------------------------------------------


IMPORTS = ("images", "csv", "audio", "hf", "torchvision")
DEVICES = ["list", "show", "predict", "fit", "new", "calibrate", "links", "population", "build"]
DEVICES += ["enroll", "evaluate", "compare", "train-help", "search", "evaluate-search"]
DEVICES += ["make-tasks", "train-metad2a", "propose", "train-complexity"]
DEVICES += ["make-zoo", "train-tans", "judge-tans", "retrieve"]


@pytest.mark.parametrize(
    "command",
    [
        ["run"],
        ["bench"],
        ["replay"],
        ["resume"],
        ["reprice"],
        ["compare"],
        ["report"],
        ["study"],
        ["list"],
        ["explain"],
        ["new"],
        ["doctor"],
        ["data", "list"],
        ["data", "averages"],
        ["data", "describe"],
        *[["data", "import", name] for name in IMPORTS],
        *[["devices", name] for name in DEVICES],
    ],
    ids=lambda c: " ".join(c),
)
def test_every_help_has_an_example(command: list[str], fedsim: Callable[..., Ended]):
    ended = fedsim(*command, "--help")
    assert (ended.code, ended.err) == (0, "")
    lines = [line.strip(" │") for line in ended.out.splitlines()]
    examples = [line for line in lines if f"fedsim {' '.join(command)}" in line and not line.startswith("Usage")]
    assert examples


def test_every_command_is_covered_by_the_help_test():
    group = typer.main.get_command(cli.app)
    commands = {"run", "flwr", "compare", "paired", "study", "bench", "replay", "resume", "reprice", "report", "doctor"}
    commands |= {"data", "devices", "list", "explain", "new"}
    assert set(group.commands) == commands  # type: ignore[attr-defined]
    assert set(group.commands["data"].commands) == {"list", "describe", "averages", "import"}  # type: ignore[attr-defined]
    assert set(group.commands["data"].commands["import"].commands) == set(IMPORTS)  # type: ignore[attr-defined]
    assert set(group.commands["devices"].commands) == set(DEVICES)  # type: ignore[attr-defined]


def all_commands(group: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command and of the groups above them."""
    yield above
    for name, command in getattr(group, "commands", {}).items():
        yield from all_commands(command, (*above, name))


@pytest.mark.parametrize(
    "words", [*all_commands(typer.main.get_command(cli.app))], ids=lambda words: " ".join(words) or "-"
)
def test_the_short_form_of_help_is_help(words: tuple[str, ...], fedsim: Callable[..., Ended]):
    long, short = fedsim(*words, "--help"), fedsim(*words, "-h")
    assert (short.code, short.out, short.err) == (0, long.out, "")
    assert "--help" in short.out


def test_the_version_is_said(fedsim: Callable[..., Ended]):
    assert fedsim("--version") == Ended(0, f"fedsim {version('fedsim-edge')}\n", "")


def test_a_wrong_command_gets_the_nearest_once(fedsim: Callable[..., Ended]):
    assert fedsim("compar").err == "fedsim: No such command 'compar'. Did you mean 'compare'? (see fedsim --help)\n"


def test_help_of_run_has_every_setting_with_its_comment_and_what_hydra_takes(fedsim: Callable[..., Ended]):
    shown = fedsim("run", "--help").out
    assert "cohort=10             clients asked per round" in shown
    assert all(f"\n {flag} " in shown for flag in ("-m", "--cfg job", "--config-dir DIR", "--allow-target NAME"))
    assert "\n private=[] " in shown


def test_help_of_run_explains_the_options_on_the_line(fedsim: Callable[..., Ended]):
    ended = fedsim("run", "method=ditto", "partition=dirichlet", "--help")
    assert (ended.code, ended.err) == (0, "")
    assert "trainer.pull=1.0            lambda: how much the personal model is drawn" in ended.out
    assert "partition.alpha=0.3       small: few classes dominate a client" in ended.out
    assert "Hydra" not in ended.out
    assert_refused(fedsim("run", "method=dito", "-h"), "unknown method 'dito'; did you mean 'ditto'?")


def test_help_of_run_lists_every_group_and_option(fedsim: Callable[..., Ended]):
    from fedsim.settings.groups import GROUPS, options

    shown = fedsim("run", "--help").out
    assert all(f"{group}=" in shown and name in shown for group in GROUPS for name in options(group))
