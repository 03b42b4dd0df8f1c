"""Runs the same configurations on two checkouts and compares what came of them: `python tests/same_bytes.py OLD NEW`.

OLD and NEW are folders of checkouts; `--python-old` and `--python-new` name their interpreters where they differ.
Compared are the hash of the weights and every line of rounds.jsonl but for the host's seconds. No test: a tool for
changes that must move no result.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SMALL = ["workload=blobs", "workload.examples_per_client=12", "workload.test_examples=40", "engine.device=cpu"]
SMALL += ["num_clients=8", "cohort=4", "rounds=3", "fleet=mixed", "trainer.batch_size=4", "checkpoint_s=0"]
IMAGES = ["workload=digits", "model=convnet", "num_clients=6", "cohort=3", "rounds=2", "checkpoint_s=0"]
STREAM = ["stream=split_classes", "stream.tasks=2", "workload.num_classes=4", "rounds=4"]
STREAM += ["workload.examples_per_client=48"]
TASKS = ("agem", "coreset", "ewc", "finetune", "gss", "joint", "lwf", "ocs", "reservoir", "stable_sgd")
NARROW = ("heterofl", "fjord", "ppp", "sub_fedavg", "pqk", "dcil")


def cases(methods: list[str]) -> dict[str, list[str]]:
    """Overrides by name: every method, four uplinks, streams, compression, Ray, resume."""
    found = {}
    for method in methods:
        if method in TASKS:
            found[method] = [*SMALL, *STREAM, f"method={method}"]
        elif method in NARROW:
            found[method] = [*IMAGES, f"method={method}"]
        else:
            liars = ["strategy.num_malicious_nodes=0"] if method in ("krum", "multikrum", "bulyan") else []
            norm = ["model.norm=batch"] if method == "fedbn" else []
            found[method] = [*SMALL, f"method={method}", *liars, *norm]
    for uplink in ("int8", "topk", "randomk", "sparse_mask"):
        found[f"uplink {uplink}"] = [*IMAGES, f"uplink={uplink}"]
    for stream in ("rotated", "permuted"):
        found[f"stream {stream}"] = [*IMAGES, "rounds=4", f"stream={stream}", "stream.tasks=2", "model=mlp"]
    for compression in ("prune", "quantise"):
        found[f"compression {compression}"] = [*IMAGES, f"compression={compression}"]
    found["private head"] = [*SMALL, "private=[head]", "evaluate_clients=4"]
    found["deadline"] = [*SMALL, "deadline_s=0.5", "over_selection=1.5", "fleet=phones"]
    found["availability"] = [
        *SMALL,
        "fleet.availability._target_=devices.availability.Bernoulli",
        "+fleet.availability.p=0.6",
    ]
    found["one rate"] = [*SMALL, "fleet=help_phones", "latency=flops"]
    found["batch norm"] = [*SMALL, "model=mlp", "model.norm=batch", "method=fedadam"]
    found["ray"] = [*SMALL, "engine=ray", "engine.workers=2"]
    found["together"] = [*SMALL, "engine.batch_clients=4"]
    found["resumed"] = [*SMALL, "rounds=6"]
    return found


def result(folder: Path) -> tuple[str, list[str]]:
    """The hash of the weights, and the rounds without what the host took."""
    summary = json.loads((folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return summary["weights_sha256"], [json.dumps({**line, "host_s": 0}, sort_keys=True) for line in lines]


def run(python: str, checkout: Path, overrides: list[str], out: Path, resumed: bool) -> str:
    """One run of a checkout; what it said where it failed."""
    env = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [python, "-c", "from fedsim.__main__ import main; main()"]
    done = subprocess.run(
        [*command, "run", *overrides, f"out={out}"], cwd=out.parent, env=env, capture_output=True, text=True
    )
    if done.returncode == 0 and resumed:  # as if killed after the summary's files: go on from the checkpoint
        (out / "summary.json").unlink()
        done = subprocess.run([*command, "resume", str(out)], cwd=out.parent, env=env, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def main() -> int:
    """Prints a line for each case; 1 where one differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--python-old", default=sys.executable)
    parser.add_argument("--python-new", default=sys.executable)
    parser.add_argument("--only", default="", help="cases whose names begin so")
    parser.add_argument("overrides", nargs="*", help="a case of your own, in the place of the list")
    given = parser.parse_args()
    methods = sorted(path.stem for path in (given.new / "configs" / "method").glob("*.yaml"))
    chosen = {"own": given.overrides} if given.overrides else cases(methods)
    wrong = 0
    with tempfile.TemporaryDirectory() as place:
        for number, (name, overrides) in enumerate(c for c in chosen.items() if c[0].startswith(given.only)):
            old, new = Path(place, f"{number}-old"), Path(place, f"{number}-new")
            said = [
                run(given.python_old, given.old.resolve(), overrides, old, name == "resumed"),
                run(given.python_new, given.new.resolve(), overrides, new, name == "resumed"),
            ]
            if any(said):
                verdict = (
                    f"both: {said[0]}" if said[0] == said[1] else f"old: {said[0] or 'ran'}; new: {said[1] or 'ran'}"
                )
                wrong += said[0] != said[1]
            else:
                verdict = "equal" if result(old) == result(new) else "DIFFERENT"
                wrong += verdict != "equal"
            print(f"{name}: {verdict}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
