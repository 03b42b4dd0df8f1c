"""The cluster files for `ray up`: valid for Ray, complete, and with start commands that make a cluster.

`ray up` itself needs machines with ssh; here the commands of the file run on this machine as two Ray nodes.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from clients.app import serve
from fedsim.engines.local import LocalEngine
from fedsim.runs import writer
from fedsim.settings.compose import compose
from fedsim.settings.groups import GROUPS, config_dir

PROJECT = Path(__file__).parent.parent
FILES = sorted((PROJECT / "configs" / "ray").glob("*.yaml"))
BIN = Path(sys.executable).parent
TRAINING = ("ray::RayWorker", "ray::RayWorker.serve", "ray::RayWorker.__init__")
each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def test_there_is_a_file_for_own_machines_and_one_for_a_cloud():
    assert {file.stem: yaml.safe_load(file.read_text())["provider"]["type"] for file in FILES} == {
        "cluster": "local",
        "aws": "aws",
    }


@each_file
def test_ray_accepts_the_file(file: Path, monkeypatch: pytest.MonkeyPatch):
    from ray.autoscaler._private.util import prepare_config, validate_config

    monkeypatch.chdir(PROJECT)
    config = prepare_config(yaml.safe_load(file.read_text()))  # fills in Ray's defaults, as `ray up` does
    validate_config(config)
    assert config["max_workers"] == len(config["provider"].get("worker_ips", "4444"))


@each_file
def test_everything_that_is_installed_and_read_travels_to_the_machines(file: Path):
    config = yaml.safe_load(file.read_text())
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    files = {"pyproject.toml", "requirements.lock", project["project"]["readme"], *project["project"]["license-files"]}
    assert config["file_mounts"] == {f"~/fedsim/{name}": name for name in packages | files | {"data", "ray-token"}}
    install = next(command for command in config["setup_commands"] if "pip install" in command)
    assert install.endswith("-c ~/fedsim/requirements.lock -e ~/fedsim")


@each_file
def test_nodes_take_the_token_dashboards_stay_on_loopback_and_what_is_to_be_filled_in_is_marked(file: Path):
    config, text = yaml.safe_load(file.read_text()), file.read_text()
    head = config["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in head
    token = "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/fedsim/ray-token "
    for command in (head, config["worker_start_ray_commands"][-1]):
        assert f"{token}FEDSIM_DATA=$HOME/fedsim/data " in command
    assert token.replace("$HOME", "~").strip() in text.partition("\ncluster_name:")[0]
    for key in ("head_ip:", "worker_ips:", "region:", "max_workers:", "~/fedsim/data:"):
        assert all("FILL IN" in line for line in text.splitlines() if line.strip().startswith(key))


def test_the_folder_is_no_group_of_settings():
    assert "ray" not in GROUPS
    assert "ray" not in compose([])["choices"]
    assert (config_dir() / "ray" / "cluster.yaml").is_file()  # it is installed with the package


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The start commands of cluster.yaml on this machine, as two nodes with a CPU each; the head's address."""
    config = yaml.safe_load((PROJECT / "configs" / "ray" / "cluster.yaml").read_text())
    with socket.socket() as probe, tempfile.TemporaryDirectory(prefix="fedsim-", dir="/tmp") as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        env = {
            **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
            "RAY_HEAD_IP": "127.0.0.1",  # as `ray up` exports it
            "HOME": folder,
            "FEDSIM_TEST_CLUSTER": f"127.0.0.1:{port}",
        }
        token = Path(folder, "fedsim", "ray-token")  # where `ray up` would have copied it
        token.parent.mkdir()
        token.write_text("5" * 64 + "\n")
        monkeypatch.setenv("RAY_AUTH_MODE", "token")  # as README.md tells who runs there
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        try:
            for node, commands in (("head", "head_start_ray_commands"), ("worker", "worker_start_ray_commands")):
                here = f"--node-ip-address=127.0.0.1 --num-cpus=1 --temp-dir={folder}/{node}"
                command = config[commands][-1]  # the one before ends every Ray process on the machine
                command = command.replace("~/fedsim-env/bin/ray start", f"{BIN / 'ray'} start {here}")
                command = command.replace("6379", str(port)).replace(
                    "--dashboard-host", "--dashboard-port=0 --dashboard-host"
                )
                command = command.replace("--autoscaling-config=~/ray_bootstrap_config.yaml", "")  # `ray up` writes it
                done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, timeout=120)
                assert done.returncode == 0, done.stdout + done.stderr
            yield f"127.0.0.1:{port}"
        finally:
            for process in cluster_processes(f"127.0.0.1:{port}"):
                process.kill()


def cluster_processes(address: str) -> list[psutil.Process]:
    """What the commands started: marked by an environment variable, or a child of what is (Ray's own overwrite it)."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("FEDSIM_TEST_CLUSTER") == address:
                found += [process, *process.children(recursive=True)]
        except psutil.Error:
            continue
    return found


WHO = """
import json, os, sys, time, ray
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)

@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
def who():
    time.sleep(1)
    return ray.get_runtime_context().get_node_id(), os.environ["FEDSIM_DATA"], os.environ["OMP_NUM_THREADS"]

print(json.dumps(ray.get([who.remote() for _ in range(4)])))
"""


WITHOUT = """
import os, sys
del os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN_PATH"]
from fedsim.engines.ray.session import RaySession
from fedsim.errors import RunError
try:
    RaySession(sys.argv[1], 1)
except RunError as error:
    print(error)
"""


@pytest.mark.slow  # a minute; test_ray.py has a cluster of two nodes by default
@pytest.mark.ray
@pytest.mark.skipif(sys.platform != "linux", reason="Ray makes clusters on Linux only")
def test_the_start_commands_make_a_cluster_that_trains_on_both_nodes(cluster: str, tmp_path: Path):
    done = subprocess.run([sys.executable, "-c", WHO, cluster], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    nodes, data, threads = zip(*json.loads(done.stdout), strict=True)
    assert (len(set(nodes)), {Path(folder).name for folder in data}, set(threads)) == (2, {"data"}, {"1"})

    refused = subprocess.run([sys.executable, "-c", WITHOUT, cluster], capture_output=True, text=True, timeout=120)
    assert refused.stdout == (
        f"the Ray cluster at engine.address={cluster} asks for its token: set RAY_AUTH_MODE=token and "
        "RAY_AUTH_TOKEN_PATH (a file with it), or RAY_AUTH_TOKEN, as on its machines\n"
    ), refused.stderr

    # Long enough for the worker of the second node to come up: the first one does not wait for it.
    overrides = ["workload=blobs", "num_clients=8", "cohort=6", "rounds=150", "evaluate_every=150", "engine.device=cpu"]
    command = [str(BIN / "fedsim"), "run", *overrides, "engine=ray", f"engine.address={cluster}", "out=cluster"]
    run = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    raylets: set[int] = set()
    while run.poll() is None:
        raylets |= {p.info["ppid"] for p in psutil.process_iter(["name", "ppid"]) if p.info["name"] in TRAINING}
        time.sleep(0.05)
    assert run.returncode == 0, run.communicate()[1]
    run.communicate()
    assert len(raylets & {p.pid for p in cluster_processes(cluster)}) == 2
    local = writer.run(compose(overrides), LocalEngine(serve), tmp_path / "local")
    summary = json.loads((tmp_path / "cluster" / "summary.json").read_text())
    assert summary["weights_sha256"] == local["weights_sha256"]
