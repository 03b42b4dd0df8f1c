"""A finished run on other devices is, to the byte, the run that was made there, as far as its work is known."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas
import pytest
import yaml
from conftest import DAILY, honest
from test_methods import NEEDS, methods_of_each_kind
from test_methods import TINY as BLOBS

from clients.app import serve
from clients.judging import Judge
from clients.worker import Worker
from devices.profile import BY_LATENCY, BY_MEMORY, BY_NAME, SHIPPED
from devices.reading import read_yaml
from fedsim.engines.local import LocalEngine
from fedsim.errors import ConfigError
from fedsim.grid.edge import EdgeGrid
from fedsim.grid.server_half import ServerContext, server_half
from fedsim.report.rounds import read_rounds
from fedsim.runs import federation as federations
from fedsim.runs import writer
from fedsim.runs.federation import Federation
from fedsim.runs.recorded import settings_of_run
from fedsim.runs.reprice import reprice
from fedsim.settings.build import build_world, instantiate
from fedsim.settings.compose import compose, on_devices
from fedsim.settings.groups import options, preset

PHONES = [*BLOBS, "fleet=phones", "cohort=4", "rounds=4"]
NIGHTS = ["fleet.availability._target_=devices.availability.Bernoulli", "+fleet.availability.p=0.85"]


def made(out: Path, *overrides: str) -> Path:
    """A run folder."""
    writer.run(compose([*overrides]), LocalEngine(serve), out)
    return out


def repriced(run: Path, out: Path, *overrides: str) -> tuple[dict, str]:
    """What the summary says of the run on other devices; or why it cannot be had."""
    settings = on_devices(settings_of_run(run), overrides)
    try:
        return reprice(run, settings, out), ""
    except ConfigError as error:
        return {}, str(error)


def recorded(folder: Path, last: int) -> tuple:
    """All that a run says of its rounds up to the last, but for host times."""
    rounds = [{**json.loads(r.to_json()), "host_s": 0} for r in read_rounds(folder) if r.round <= last]
    tables = [pandas.read_parquet(path) for path in sorted((folder / "clients").iterdir())]
    rows = [table[table["round"] <= last].to_csv(index=False, header=False) for table in tables]
    return rounds, "".join(rows)


# Methods of a kind of which another one is here are left to slow: below every one declares what it reads.
@pytest.mark.parametrize("method", [None, *methods_of_each_kind()])
def test_every_method_costs_there_what_it_would_have_cost(tmp_path: Path, method: str | None):
    """Or it says why it would have gone another way."""
    chosen = [] if method is None else [f"method={method}", *NEEDS.get(f"method={method}", [])]
    base = [*PHONES, "evaluate_clients=3", *chosen, *honest(chosen)]
    run = made(tmp_path / "phones", *base)
    buffered = method is not None and preset(method).get("loop") == "buffer"  # without rounds that could wait
    there = ["fleet=mixed", "latency=flops", *([] if buffered else ["round_every_s=50"])]
    fresh = made(tmp_path / "mixed", *base, *there)
    summary, refusal = repriced(run, tmp_path / "repriced", *there)
    if refusal:
        assert ("cannot be re-priced" if buffered else "cannot be re-priced on these devices") in refusal
        assert "fleet=mixed" in refusal.partition("run it there: fedsim run ")[2]
        assert recorded(run, 4)[0][-1]["metrics"] != recorded(fresh, 4)[0][-1]["metrics"]
        return
    assert summary["repriced"]["ended"] == ""
    assert recorded(tmp_path / "repriced", 4) == recorded(fresh, 4)
    own = {key: value for key, value in summary.items() if key not in ("repriced", "host_s")}
    assert own == {k: v for k, v in json.loads((fresh / "summary.json").read_text()).items() if k != "host_s"}


CHANGES = {
    "a deadline": ([], ["deadline_s=0.4"]),
    "no deadline": (["deadline_s=0.4"], ["deadline_s=null"]),
    "over-selection": (["over_selection=1.5"], ["fleet=sbc"]),
    "sleep": ([], NIGHTS),
    "no sleep": (NIGHTS, ["fleet.availability._target_=devices.availability.Always"]),
    "other nights": ([*DAILY, "round_every_s=3600"], ["fleet.availability.hours=20"]),
    "crashes": ([], ["fleet.devices={FRAIL: 1}"]),
    "a slower link": ([], ["fleet.link=lte_us"]),
    "a limit of time": (["max_simulated_s=1e4"], ["max_simulated_s=3"]),
    "its own fleet again": (["deadline_s=0.5"], []),
}


# All with one method, and with one that keeps a model at each client those that change who takes part; others are slow.
OF_DITTO = ("a deadline", "over-selection", "other nights")
GOES = [
    pytest.param(method, change, marks=[] if method == "fedavg" or change in OF_DITTO else [pytest.mark.slow])
    for method in ("fedavg", "ditto")
    for change in CHANGES
]
GOES += [pytest.param(m, change, marks=pytest.mark.slow) for m in ("fedmix", "fedbn") for change in CHANGES]


@pytest.mark.parametrize("method, change", GOES)
def test_it_goes_as_far_as_the_work_is_known(tmp_path: Path, method: str, change: str):
    """What there is, is what a run there says; and where it ends early, that one goes on otherwise."""
    frail = tmp_path / "frail.yaml"
    profile = read_yaml(SHIPPED / "pixel3.yaml")
    frail.write_text(yaml.safe_dump({**profile, "name": "frail", "reliability": {"failures_per_min": 60}}))
    before, there = ([text.replace("FRAIL", str(frail)) for text in texts] for texts in CHANGES[change])
    base = [
        *PHONES,
        f"method={method}",
        *NEEDS.get(f"method={method}", []),
        "rounds=8",
        "evaluate_every=2",
        *honest([]),
    ]
    run = made(tmp_path / "before", *base, *before)
    fresh = made(tmp_path / "there", *base, *([] if change == "no sleep" else [*before, *there]))
    summary, refusal = repriced(run, tmp_path / "repriced", *there)
    if refusal:
        assert "cannot be re-priced" in refusal
        return
    last = summary["rounds"]
    assert recorded(tmp_path / "repriced", last) == recorded(fresh, last)
    ended = summary["repriced"]["ended"]
    assert bool(ended) == (last < read_rounds(fresh)[-1].round)


ALWAYS = "devices.availability.Always"


def test_another_fleet_keeps_who_is_online_unless_that_is_given(here: Path):
    """A fleet of the user's own with nights of its own has these."""
    run = compose([*PHONES, *NIGHTS])
    (here / "configs" / "fleet").mkdir(parents=True)
    text = "defaults: [sbc, _self_]\navailability: {_target_: devices.availability.Diurnal, hours: 16}\n"
    (here / "configs" / "fleet" / "nightly.yaml").write_text(text)
    moved = on_devices(run, ["fleet=sbc"])["fleet"]
    assert moved["availability"] == run["fleet"]["availability"]
    assert moved["devices"] == compose(["fleet=sbc"])["fleet"]["devices"]
    given = on_devices(run, ["fleet=sbc", f"fleet.availability._target_={ALWAYS}"])["fleet"]["availability"]
    assert given == {"_target_": ALWAYS, "_partial_": True}
    assert on_devices(run, ["fleet=nightly"])["fleet"]["availability"]["hours"] == 16


# --- its folder ------------------------------------------------------------------------------------------------------

KILLED = """
import os
from fedsim.runs import writer

def killed(*given, **named):
    os.kill(os.getpid(), 9)

def add(self, report, clients, usual=writer.RunWriter.add):
    usual(self, report, clients)
    if report.round == LAST:
        killed()

writer.RunWriter.add = add
writer.RunFolder.finish = killed  # its last checkpoint is there by then
import fedsim
fedsim.reprice("run", "fleet=sbc", out="again")
"""


@pytest.mark.parametrize("last", [2, 5])
def test_one_that_was_killed_is_not_trained_by_resume(tmp_path: Path, monkeypatch, fedsim, last: int):
    """Its rounds were never trained here: a resumed one would be another run."""
    monkeypatch.chdir(tmp_path)
    made(Path("run"), *PHONES)
    command = [sys.executable, "-c", KILLED.replace("LAST", str(last))]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == -9, ended.stderr
    assert len(read_rounds(Path("again"))) == min(last, 4) + 1
    before = {path: path.read_bytes() for path in Path("again").rglob("*") if path.is_file()}
    for command in (["resume", "again"], ["resume", "again", "rounds=9"]):
        code, _, err = fedsim(*command)
        assert (code, err.count("\n")) == (2, 1)
        assert "write it anew: fedsim reprice run " in err
    assert {path: path.read_bytes() for path in Path("again").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("given", "folder", "name"), [([], "mine-repriced", "mine-repriced"), (["name=b"], "b", "b")])
def test_one_of_a_run_with_a_name_has_another(tmp_path: Path, monkeypatch, fedsim, given: list[str], folder, name):
    monkeypatch.chdir(tmp_path)
    made(Path("run"), *PHONES, "name=mine")
    assert fedsim("reprice", "run", "fleet=sbc", *given).code == 0
    (again,) = Path("runs").iterdir()
    assert again.name.endswith(f"-{folder}")
    assert settings_of_run(again)["name"] == name


def test_a_digit_that_has_changed_is_seen(tmp_path: Path, monkeypatch, fedsim):
    """In the rounds by all that read many runs, in the rows and weights by what builds on them."""
    monkeypatch.chdir(tmp_path)
    made(Path("run"), *PHONES)
    rows, weights = next(Path("run/clients").iterdir()), next(Path("run/checkpoint").rglob("weights.safetensors"))
    reprice, compare = ["reprice", "run", "fleet=sbc", "out=again"], ["compare", "run"]
    for file, commands in {"run/rounds.jsonl": [reprice, compare], rows: [reprice], weights: [reprice]}.items():
        whole = Path(file).read_bytes()
        data = bytearray(whole)
        place = (
            max(i for i, byte in enumerate(data[:-200]) if chr(byte).isdigit()) if data[:1] == b"{" else len(data) // 2
        )
        data[place] ^= 1
        Path(file).write_bytes(data)
        for command in commands:
            code, _, err = fedsim(*command)
            assert (code, err.count("\n")) == (2, 1), file
            assert "damaged" in err
            assert not Path("again").exists()
        Path(file).write_bytes(whole)
    assert fedsim(*reprice).code == fedsim(*compare).code == 0


# --- what methods say of themselves ----------------------------------------------------------------------------------

READS = {
    **{f"method={method}": [f"method={method}"] for method in options("method")},
    "a share of the memory": ["method=coreset", "trainer.memory_size=null", "+trainer.budget_share=0.1"],
    "a latency budget": ["method=ppp", "strategy.ratio=null", "strategy.latency_budget_ms=0.01"],
    "a step's milliseconds": ["method=fjord", "strategy.assign=latency", "strategy.step_ms=0.1"],
    "tiers of recipes": ["compression=tiered", "evaluate_clients=2"],
}
BY = {"memory_bytes": BY_MEMORY, "name": BY_NAME, "kind": BY_NAME, "tiers": BY_NAME, "tier": BY_NAME, "soc": BY_NAME}


class Watched:
    """A device that notes which of its figures are read."""

    def __init__(self, profile, read: set[str]):
        self._watched = (profile, read)

    def __getattr__(self, name: str):
        profile, read = self._watched
        read.add(BY.get(name, BY_LATENCY))
        return getattr(profile, name)


@pytest.mark.parametrize("case", READS)
def test_what_a_method_reads_of_devices_and_rounds_it_declares(case: str, monkeypatch: pytest.MonkeyPatch):
    """Without it a finished run would be re-priced or prolonged to what it never would have been."""
    read, reached, rounds = set[str](), [], []
    context, reachable, client = Worker.context, EdgeGrid.reachable, EdgeGrid.client

    def watched(self, *given):
        made = context(self, *given)
        return replace(made, profile=Watched(made.profile, read))

    def predicted(self, network, own, name="", bits=32):
        return {}  # of the judge's, which a re-priced run predicts anew

    class Context(ServerContext):
        def __getattribute__(self, name: str):
            if name == "rounds":
                rounds.append(name)
            return object.__getattribute__(self, name)

    monkeypatch.setattr(Worker, "context", watched)
    monkeypatch.setattr(Judge, "_predicted", predicted)
    monkeypatch.setattr(EdgeGrid, "client", lambda g, c: replace(client(g, c), profile=Watched(g.fleet[c], read)))
    monkeypatch.setattr(EdgeGrid, "reachable", lambda g, clients: reached.append(1) or reachable(g, clients))
    monkeypatch.setattr(federations, "ServerContext", Context)
    chosen = READS[case]
    settings = compose([*PHONES, "evaluate_clients=2", *NEEDS.get(chosen[0], []), *chosen, *honest(chosen)])
    federation = Federation(build_world(json.dumps(settings)), LocalEngine(serve))
    list(federation.rounds())
    half, trainer = server_half(federation.strategy), instantiate(settings, "trainer")
    compression = instantiate(settings, "compression")
    declared = {*half.device_reads, *trainer.device_reads, *compression.device_reads}
    assert read <= declared or BY_LATENCY in declared  # which no other device leaves as it was
    assert not reached or half.asks_reachable
    assert not rounds or half.reads_rounds or federation.world.workload.reads_rounds
