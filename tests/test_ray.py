"""The engine of Ray workers: the same bytes as in this process, whatever happens to workers, nodes and clients.

One private Ray serves the whole file, and one pair of workers most of the tests. A cluster runs in a subprocess.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from conftest import DAILY, TINY
from ray_workers import TESTS, both_at_work, descendants, lines, unlucky, workers

from clients.app import serve
from fedsim.engines.ray.engine import RayEngine
from fedsim.engines.ray.queue import Job, longest_first
from fedsim.engines.ray.session import RaySession
from fedsim.engines.ray.wire import Shared, in_common, send_tensors_as_arrays, whole, without
from fedsim.errors import ClientError, ConfigError, RunError
from fedsim.messages.cohort import ClientTask, CohortAnswer, CohortTask
from fedsim.messages.updates import Broadcast
from fedsim.runs import writer
from fedsim.runs.federation import Federation
from fedsim.settings.build import build_world
from fedsim.settings.compose import compose

pytestmark = pytest.mark.ray


# --- the same bytes --------------------------------------------------------------------------------------------------


# A mean of updates, and one with the counters of batch norm; the rest of the pairs is left to slow.
@pytest.mark.parametrize(
    "strategy",
    [
        "dp_adaptive strategy.noise_multiplier=0.3",
        "fedavg model.norm=batch",
        *(
            pytest.param(text, marks=pytest.mark.slow)
            for text in ("fedavg", "fedmedian", "krum", "krum model.norm=batch")
        ),
    ],
)
def test_two_workers_give_the_bytes_of_one_process(pair, result, local, strategy: str):
    overrides = (
        *f"strategy={strategy}".split(),
        "fleet=phones",
        *DAILY,
        "evaluate_clients=2",
        "num_clients=20",
        "cohort=9",
    )
    assert result(pair, *overrides) == local(*overrides)


def test_averages_and_their_pool_travel_as_in_one_process(pair, result, local):
    """Extra records, what clients keep of them, and who missed the deadline and is sent them again."""
    overrides = ("method=fedmix", "fleet=phones", *DAILY, "num_clients=20", "cohort=9", "rounds=4", "deadline_s=0.26")
    weights, rounds = local(*overrides)
    assert {outcome for r in rounds for outcome in r["outcomes"]} == {"completed", "late", "offline"}
    assert result(pair, *overrides) == (weights, rounds)


def test_one_worker_gives_the_bytes_of_one_process(session, result, local):
    with RayEngine(serve, workers=1) as grid:
        assert grid.size() == 1
        assert result(grid, "rounds=3") == local("rounds=3")


def test_weights_are_put_once_and_unpacked_once_a_round_and_the_world_is_built_once(pair, result, spies, monkeypatch):
    """Four training rounds, no others: four puts; each worker unpacks at most four times, and some worker all four."""
    import ray

    puts, plain = [], ray.put
    monkeypatch.setattr(ray, "put", lambda value: puts.append(value) or plain(value))
    notes = [spies / str(p.pid) for p in both_at_work(lambda: result(pair, "rounds=1"), spies)]
    before = [json.loads(note.read_text()) for note in notes]
    puts.clear()
    result(pair, "rounds=4", "num_clients=30", "cohort=30", "seed=78")
    after = [json.loads(note.read_text()) for note in notes]
    assert len(puts) == 4
    # The world of the run before may have been begun and not been counted yet; one a round would be four.
    assert max(a["worlds"] - b["worlds"] for a, b in zip(after, before, strict=True)) <= 2, (before, after)
    assert max(a["unpacked"] - b["unpacked"] for a, b in zip(after, before, strict=True)) == 4


# --- faults ----------------------------------------------------------------------------------------------------------


def test_worker_that_is_killed_while_it_trains_changes_nothing(pair, result, local, tmp_path):
    assert result(pair, *unlucky("die", [2], tmp_path)) == local()


def test_workers_that_are_killed_one_after_the_other_change_nothing(pair, result, local, spies):
    doomed = both_at_work(lambda: result(pair, "rounds=1"), spies)
    answers = []

    def observe(client: int) -> None:
        answers.append(client)
        if len(answers) in (2, 8):
            doomed.pop().kill()

    assert result(pair, observe=observe) == local()
    assert doomed == []


def test_client_that_always_kills_its_worker_is_named_and_nobody_is_blamed_in_its_place(pair, result, tmp_path):
    """One chance: the message is split at once, the client fails, those that waited behind it are served."""
    pair.retries = 1
    settings = compose([*TINY, "cohort=6", *unlucky("die", [3], tmp_path, times=9), "on_client_error=drop", "rounds=1"])
    _, (_, reports), *_ = Federation(build_world(json.dumps(settings)), pair).rounds()
    reason = "its worker process died once while training it (killed, or out of memory)"
    assert [(r.outcome, r.reason) for r in reports if r.client == 3] == [("failed", reason)]
    assert {r.outcome for r in reports if r.client != 3} == {"completed"}


def test_client_that_hangs_fails_after_its_time(pair, result, tmp_path):
    pair.client_timeout_s = 1
    _, rounds = result(pair, *unlucky("hang", [4], tmp_path, times=9), "on_client_error=drop", "rounds=1")
    assert rounds[1]["outcomes"] == {"completed": [0, 1, 2, 3, 5], "failed": [4]}
    with pytest.raises(
        ClientError, match=r"^client 0 .* round 1 \(seed 1\): ran longer than engine.client_timeout_s=1"
    ):
        result(pair, *unlucky("hang", [0], tmp_path), "num_clients=1", "cohort=1")


def test_client_that_raises_stops_the_run_and_the_workers_live_on(pair, result, local, tmp_path):
    with pytest.raises(ClientError, match=r"^client 3 .*: ZeroDivisionError: as told") as caught:
        result(pair, *unlucky("raise", [3], tmp_path))
    assert "in fit" in caught.value.traceback
    assert result(pair) == local()


def test_client_that_diverges_is_a_counted_outcome(pair, result, tmp_path):
    _, rounds = result(pair, *unlucky("diverge", [1], tmp_path), "on_client_error=drop", "rounds=1")
    assert rounds[1]["outcomes"] == {"completed": [0, 2, 3, 4, 5], "failed": [1]}


def test_wrong_setting_that_a_worker_finds_is_the_users_own_error(pair, result, tmp_path):
    with pytest.raises(ConfigError, match=r"^trainer\.lr must be smaller$"):
        result(pair, *unlucky("misconfigured", [1], tmp_path))


def broken(task: CohortTask) -> Iterator[CohortAnswer]:
    raise LookupError("no such thing")


def test_worker_that_fails_as_a_whole_is_named(session, result):
    with RayEngine(broken, workers=1) as grid, pytest.raises(RunError, match="LookupError: no such thing"):
        result(grid)


# --- what is started -------------------------------------------------------------------------------------------------


def test_ray_that_was_there_before_is_used_and_left_alone(session):
    import ray

    with RayEngine(serve) as grid:
        assert grid.size() == 3
    assert ray.is_initialized()


def test_workers_get_as_much_of_a_busy_machine_as_this_process(pair, result):
    result(pair, "rounds=1")
    assert workers()
    assert {p.nice() for p in workers()} == {psutil.Process().nice()}


def test_nothing_listens_beyond_this_machine(pair, result):
    result(pair, "rounds=1")
    every = descendants()
    assert {"raylet", "gcs_server"} <= {p.name() for p in every}
    own = [psutil.Process(), *every]
    heard = [c.laddr.ip for p in own for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert len(heard) > 4
    assert {ip.removeprefix("::ffff:") for ip in heard} <= {"127.0.0.1", "::1"}


STRANGER = """
import sys
from ray._raylet import GcsClient
print(len(GcsClient(address=sys.argv[1]).get_all_node_info(timeout=10)))
"""


def test_a_stranger_without_the_token_is_refused(session: RaySession):
    """Any program on this machine can reach the port; it could submit work that runs as this user."""
    import ray

    address, folder = ray.get_runtime_context().gcs_address, session._folder
    assert folder is not None
    plain = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    token = {"RAY_AUTH_MODE": "token"}
    for more, answered in (
        ({}, False),
        ({**token, "RAY_AUTH_TOKEN": "0" * 64}, False),
        ({**token, "RAY_AUTH_TOKEN_PATH": str(folder.path / "token")}, True),
    ):
        asked = subprocess.run(
            [sys.executable, "-c", STRANGER, address], env={**plain, **more}, capture_output=True, text=True, timeout=60
        )
        assert (asked.stdout == "1\n", "uthenticat" in asked.stderr) == (answered, not answered), asked.stderr
    assert not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"} & set(os.environ)  # of this process


def test_the_folder_of_a_session_is_the_users_alone(session: RaySession):
    """Ray opens folders of its own to everybody, again with each worker; nobody gets to them."""
    assert session._folder is not None
    assert stat.S_IMODE(session._folder.path.stat().st_mode) == 0o700
    files = [path for path in session._folder.path.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 10
    assert {path: oct(path.stat().st_mode) for path in files if path.stat().st_mode & 0o077} == {}


# --- a cluster -------------------------------------------------------------------------------------------------------


def run_in_a_changing_cluster(out: str) -> None:
    """A node joins before the run and is lost in its second round; prints how many workers there were room for."""
    from ray.cluster_utils import Cluster

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir="/tmp") as head, tempfile.TemporaryDirectory(dir="/tmp") as second:
        os.environ["RAY_TMPDIR"] = head
        (Path(head) / "ray").mkdir()  # Ray writes the cluster's address there, and does not make the folder
        options = {"num_cpus": 1, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args={**options, "temp_dir": head})
        grid = RayEngine(serve, address=cluster.address)
        sizes, answers = [grid.size()], []
        node = cluster.add_node(**options, temp_dir=second)
        sizes.append(grid.size())

        def observe(client: int) -> None:
            answers.append(client)
            if len(answers) == 40:
                os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)

        writer.run(compose([*TINY, *CHANGING]), grid, Path(out), observe=observe)
        print(json.dumps(sizes))
        grid.close()
        cluster.shutdown()


CHANGING = ("num_clients=60", "cohort=30", "rounds=4", "strategy=krum")


@pytest.mark.slow
def test_node_that_joins_is_used_and_one_that_is_lost_changes_nothing(tmp_path, local):
    code = "import sys, test_ray; test_ray.run_in_a_changing_cluster(sys.argv[1])"
    env = {**os.environ, "PYTHONPATH": str(TESTS), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # on loopback
    command = [sys.executable, "-c", code, str(tmp_path / "cluster")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [1, 2]
    summary = json.loads((tmp_path / "cluster" / "summary.json").read_text())
    assert (summary["weights_sha256"], lines(tmp_path / "cluster")) == local(*CHANGING)


# --- the parts -------------------------------------------------------------------------------------------------------


def of(broadcast: Broadcast, client: int = 1, flops: float = 1.0) -> CohortTask:
    return CohortTask(1, "train", (ClientTask(client, broadcast, expected_flops=flops),), "{}")


def test_tensors_cross_processes_as_copies_that_may_be_changed(session):
    import ray

    send_tensors_as_arrays()
    sent = {"w": torch.arange(2.0**16), "n": torch.tensor(3), "half": torch.ones(2, 2, dtype=torch.float16).T}
    broadcast = Broadcast(1, sent)
    task = CohortTask(1, "train", (ClientTask(0, broadcast), ClientTask(1, broadcast)), "{}")
    first, second = ray.get(ray.put(task)).clients
    assert first.broadcast is second.broadcast
    for name, tensor in first.broadcast.weights.items():
        assert (tensor.dtype, tensor.tolist()) == (sent[name].dtype, sent[name].tolist())
        tensor += 1
    assert sent["w"][0] == 0


def test_tensors_in_common_are_the_same_object_for_all_tasks():
    weights, own, other = ({"w": torch.tensor([value])} for value in (1.0, 2.0, 3.0))
    tasks = [of(Broadcast(1, weights, {"x": own})), of(Broadcast(1, weights)), of(Broadcast(1, {}, {"x": other}))]
    assert [id(tensors) for tensors in in_common(tasks).tensors] == [id(weights)]
    letters = [pickle.loads(pickle.dumps(without(task, {id(weights): 0}))) for task in tasks]
    arrived = [whole(letter, Shared((weights,))).clients[0].broadcast for letter in letters]
    assert arrived[0].weights is arrived[1].weights is weights
    assert arrived[0].extras["x"]["w"].tolist() == [2.0]
    assert arrived[2].weights == {}


def test_longest_jobs_of_a_window_start_first():
    jobs = [Job(of(Broadcast(1, {}), flops=flops)) for flops in (1, 3, 2, 5, 4)]
    assert [job.task.expected_flops for job in longest_first(jobs, 3)] == [3, 2, 1, 5, 4]
