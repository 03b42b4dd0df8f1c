"""A study whose runs take no time: for the tests of `fedsim study`.

Runs are replaced by a command that writes a run folder at once; its accuracy is 0.5 + ratio + seed / 100 in the last of
two evaluations, and 0 in the first.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedsim.settings.compose import compose
from fedsim.study import processes

BASE = ["workload=blobs", "fleet=uniform", "latency=flops", "num_clients=6", "cohort=3", "rounds=2"]
FILE: dict[str, Any] = {
    "title": "Two methods",
    "base": BASE,
    "seeds": [1, 2],
    "last": 1,
    "arms": {
        "Plain": ["method=fedavg"],
        "Local {mix_ratio}": {"overrides": ["method=local_mixup"], "grid": {"trainer.mix_ratio": [0.1, 0.2]}},
    },
}
# Stands in for `python -m fedsim`: settings as the real command would compose them, which the process of the test does,
# as imports take a second; reports made up.
FAKE = """
import json, sys, yaml
from pathlib import Path
command, *arguments = sys.argv[1:-1]
if command == "resume":
    Path(arguments[0], "checkpoint").rename(Path(arguments[0], "summary.json"))
    sys.exit()
settings = json.loads(sys.argv[-1])
out, ratio, seed = Path(settings["out"]), settings["trainer"].get("mix_ratio", 0.0), settings["seed"]
if settings["name"] == "fails" and seed == 2:
    sys.exit("fedsim: it broke")
out.mkdir(parents=True)
(out / "config.yaml").write_text(yaml.safe_dump({**settings, "out": None}))
first = {"round": 0, "now_s": 0, "round_s": 0, "cohort": [], "outcomes": {}, "metrics": {"accuracy": 0}}
last = first | {"round": 1, "now_s": 10, "down_bytes": 60, "up_bytes": 40, "joules": 2.0}
last["metrics"] = {"accuracy": 0.5 + ratio + seed / 100, "accuracy_at_0.3": 0.3, "accuracy_at_0.7": 0.7}
last["metrics"]["ms_at_0.3"] = 3.0
summary = {
    **dict.fromkeys(("method", "workload", "fleet"), "made up"),
    **{"seed": seed, "rounds": 1, "final": {"accuracy": last["metrics"]["accuracy"]}, "outcomes": {"completed": 1}},
    **{"best": {"accuracy": last["metrics"]["accuracy"], "round": 1}, "to_target": None},
    **{"energy_j": {"total": 2.0, "max_client": 1.0, "waiting": 0.0}, "simulated_s": 10.0, "host_s": 1.0},
    **{"down_bytes": 60, "up_bytes": 40, "peak_memory_bytes": 10 * seed, "storage_bytes": 0},
}
(out / "rounds.jsonl").write_text("".join(json.dumps(r) + chr(10) for r in (first, last)))
(out / "summary.json").write_text(json.dumps(summary))
with open("started", "a") as file:
    print(arguments[-1], file=file)
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes a study file, with changes, in a working folder of its own; `fake.py` runs its runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(processes, "CAN_FORK", False)
    monkeypatch.setattr(processes, "COMMAND", (sys.executable, str(tmp_path / "fake.py")))
    monkeypatch.setattr(processes, "POLL_S", 0.02)
    plain = processes._started

    def start(command: Sequence[str], *given: Any) -> Any:
        asked = command[len(processes.COMMAND) :]
        return plain([*command, json.dumps(compose(asked[1:]) if asked[0] == "run" else None)], *given)

    monkeypatch.setattr(processes, "_started", start)

    def write(**changes: Any) -> str:
        tree = {key: value for key, value in {**FILE, **changes}.items() if value is not None}
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
        return "mine.yaml"

    return write


def started() -> list[str]:
    return sorted(Path("started").read_text().split()) if Path("started").exists() else []
