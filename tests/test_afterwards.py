"""What is done to a finished run, for every option: re-priced it is the run made there, prolonged the longer one.

Or it is refused in a sentence, because a part of it says that it goes by the devices or the number of rounds.
"""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
from conftest import honest
from cut_short import comparable
from test_methods import NEEDS
from test_methods import TINY as BLOBS
from test_prolong import longer
from test_reprice import made, recorded, repriced

from fedsim.errors import ConfigError
from fedsim.settings.groups import options

THERE = ["fleet=mixed", "latency=flops", "round_every_s=50", "deadline_s=1e6"]
# Of workloads, those whose data come with the libraries; real ones differ in what they read, not in what they cost.
OTHERS = [
    *(f"stream={name}" for name in options("stream") if name not in ("none", "domains")),  # the latter takes bundles
    *(f"compression={name}" for name in options("compression") if name != "none"),
    *(f"uplink={name}" for name in options("uplink") if name != "none"),
    "workload=digits",
]


def check(place: Path, *chosen: str) -> None:
    """Re-prices a run of four rounds, then prolongs it."""
    needs, rounds = [need for text in chosen for need in NEEDS.get(text, [])], 6
    blobs = BLOBS if "workload=digits" not in chosen else [text for text in BLOBS if not text.startswith("workload")]
    base = [*blobs, "fleet=phones", "cohort=4", "evaluate_clients=3", "evaluate_every=2", *needs, *chosen]
    base += honest(chosen)
    if any(text.startswith("stream=") for text in chosen):
        base += ["workload.input_shape=[1,8,8]", "workload.num_classes=4", "workload.examples_per_client=30"]
        base, rounds = [*base, "stream.tasks=2"], 8
    run, there = made(place / "run", *base, "rounds=4"), made(place / "there", *base, "rounds=4", *THERE)
    summary, refusal = repriced(run, place / "repriced", *THERE)
    if refusal:
        assert "cannot be re-priced on these devices: " in refusal
    else:
        assert summary["repriced"]["ended"] == ""
        assert recorded(place / "repriced", 4) == recorded(there, 4)
        own = {key: value for key, value in summary.items() if key not in ("repriced", "host_s")}
        assert own == {k: v for k, v in json.loads((there / "summary.json").read_text()).items() if k != "host_s"}
    straight = made(place / "straight", *base, f"rounds={rounds}")
    try:
        longer(run, rounds)
    except ConfigError as error:
        refusal = str(error)
        assert "so that a longer run would have begun in another way" in refusal
        return
    assert comparable(run) == comparable(straight)


@pytest.mark.parametrize("option", OTHERS)
def test_every_option_is_the_run_that_was_made_there_or_longer(tmp_path: Path, option: str):
    check(tmp_path, option)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", options("method"))
def test_every_method_with_every_option_is_the_run_that_was_made_there_or_longer(tmp_path: Path, method: str):
    """Where the two go together."""
    for option in OTHERS:
        place = tmp_path / option
        try:
            made(place / "tried", *BLOBS, f"method={method}", option, "rounds=1")
        except ConfigError:
            continue
        check(place, f"method={method}", option)
        shutil.rmtree(place)


@pytest.mark.slow
@pytest.mark.parametrize(("compression", "uplink"), list(itertools.product(options("compression"), options("uplink"))))
def test_every_compression_with_every_uplink(tmp_path: Path, compression: str, uplink: str):
    check(tmp_path, f"compression={compression}", f"uplink={uplink}")
