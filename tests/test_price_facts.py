"""One line of a finished run says how far its prices are known."""

import json
from dataclasses import replace

import pytest

from clients.app import serve
from devices.cost import ModelCost, Passes, Work
from devices.latency.models import device_prices
from devices.profile import load_profile
from fedsim.engines.local import LocalEngine
from fedsim.report.page import write_page
from fedsim.report.text import closing_lines
from fedsim.runs import checkpoint, federation, writer
from fedsim.runs.price_facts import facts_of

NOTHING = (0.0, 0.0, 0.0, 0.0)
# One layer of matrix products: a thousand multiply-adds, or a thousand million, in one call.
SMALL = ModelCost("small", 2e3, 4e3, 0, 0, layers=(*(NOTHING,) * 8, (1e3, 0.0, 0.0, 1.0), NOTHING))
LARGE = replace(SMALL, name="large", layers=(*(NOTHING,) * 8, (1e9, 0.0, 0.0, 1.0), NOTHING))


def seen(network: ModelCost, batch: int, *names: str, backwards: int = 3) -> dict[tuple[str, str], int]:
    """A training of three steps on each of the devices."""
    text = json.dumps(Work((Passes(network, batch, 3, backwards),)).to_dict())
    return dict.fromkeys(((name, text) for name in names), 1)


def facts(done: dict[tuple[str, str], int]) -> dict:
    return facts_of(done, [load_profile(name) for name in ("pixel3", "galaxy_a50", "raspberry_pi_4", "pixel2")])


def test_line_names_where_prices_are_from():
    prices = facts(seen(LARGE, 16, "pixel3", "galaxy_a50", "pixel2", "raspberry_pi_4"))["prices"]
    error = device_prices(load_profile("raspberry_pi_4")).step.error
    assert prices["line"] == (
        "training steps are estimated from other devices by peak speed for 3 of 4 devices (error unknown), "
        f"measured for raspberry_pi_4 (error about {100 * error:.0f} %). "
        f"{100 * prices['calls_share']:.0f} % of the computing time is the fixed cost of starting operations"
    )
    assert prices["devices"]["raspberry_pi_4"] == {"basis": "rows", "error": error, "remarks": []}


def test_other_batch_than_the_references_is_extrapolated():
    prices = facts(seen(LARGE, 20, "raspberry_pi_4"))["prices"]
    assert "measured for raspberry_pi_4 (error about 6 %, extrapolated)" in prices["line"]
    assert prices["devices"]["raspberry_pi_4"]["remarks"] == ["batch 20 is outside of the references' 16 to 16"]


def test_share_of_calls_is_of_all_that_was_computed():
    """Three whole steps cost three steps, of which the calls are their part, whatever a forward pass costs."""
    step = device_prices(load_profile("raspberry_pi_4")).step
    calls, work = step.parts_ms(SMALL.layers, 16)
    small = facts(seen(SMALL, 16, "raspberry_pi_4"))["prices"]
    assert small["calls_share"] == pytest.approx(calls / (calls + work))
    assert small["line"].endswith("starting operations: on a network this small, times are mostly overhead")
    large = facts(seen(LARGE, 16, "raspberry_pi_4"))["prices"]
    both = seen(SMALL, 16, "raspberry_pi_4") | seen(LARGE, 16, "raspberry_pi_4")
    assert large["calls_share"] < facts(both)["prices"]["calls_share"] < small["calls_share"]


def test_run_that_only_judged_says_so_and_untraced_work_says_nothing():
    assert facts(seen(LARGE, 16, "raspberry_pi_4", backwards=0))["prices"]["line"].startswith(
        "forward passes are measured"
    )
    assert facts(seen(replace(LARGE, layers=None), 16, "raspberry_pi_4")) == {}
    assert facts({}) == {}


def test_summary_lines_and_page_say_it_once(run, tmp_path):
    summary = run("latency=structured", "fleet=mixed")
    line = summary["prices"]["line"]
    assert closing_lines(summary, tmp_path).count(f"times: {line}") == 1
    assert json.loads((tmp_path / "summary.json").read_text())["prices"] == summary["prices"]
    assert write_page(tmp_path).read_text().count('<p class="warning">times: ') == 1
    assert "prices" not in run("latency=flops", out=tmp_path.with_name("flops"))


def test_resumed_run_says_the_same(run, settings, tmp_path, monkeypatch):
    """A run that dies in its fourth round goes on from the third; rounds one and two are on disk only."""
    given = ("latency=structured", "fleet=mixed", "rounds=5", "checkpoint_s=0")
    whole = run(*given, out=tmp_path / "whole")
    train = federation.Federation.train

    def dies(self, number):
        if number == 4:
            raise KeyboardInterrupt
        return train(self, number)

    monkeypatch.setattr(federation.Federation, "train", dies)
    with pytest.raises(KeyboardInterrupt):
        run(*given, out=tmp_path / "part")
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "part").round == 3
    again = writer.run(settings(*given), LocalEngine(serve), tmp_path / "part", resume=True)
    assert again["prices"] == whole["prices"]
