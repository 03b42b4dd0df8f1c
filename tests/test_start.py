"""What a start imports: seconds that every command, test and arm of a study pays."""

import subprocess
import sys
from pathlib import Path

import pytest

IMPORTED = """
import sys
from fedsim.cli.main import main
try:
    main()
finally:
    open("modules", "w").write(" ".join(sys.modules))
"""
HEAVY = {  # each takes as long as a tenth of torch, or more
    *("pandas", "scipy", "sklearn", "torchvision", "torchaudio", "torch_pruning", "triton", "ray", "soundfile"),
    *("torch._dynamo", "torch._inductor", "torch.utils.flop_counter", "torch.distributed.fsdp", "matplotlib"),
    *("pyarrow.dataset", "pyarrow.compute", "tensorflow", "IPython"),
}


def modules_of(place: Path, *arguments: str) -> set[str]:
    """Names of the modules that a command of its own process has imported by its end."""
    done = subprocess.run([sys.executable, "-c", IMPORTED, *arguments], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set((place / "modules").read_text().split())


@pytest.mark.parametrize("model", ["mlp", "small_cnn"])
def test_a_run_imports_nothing_heavy_that_it_does_not_need(tmp_path: Path, model: str):
    modules = modules_of(tmp_path, "run", "rounds=1", f"model={model}", "out=run")
    assert {"torch", "pyarrow.parquet"} <= modules
    assert not HEAVY & modules
    assert "<svg" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("command", ["list", "list methods", "list devices", "explain method fedmix", "run -h"])
def test_finding_things_imports_no_torch(tmp_path: Path, command: str):
    assert not {"torch", "flwr", "hydra", "scipy", *HEAVY} & modules_of(tmp_path, *command.split())


def test_help_imports_neither_torch_nor_flower(tmp_path: Path):
    assert not {"torch", "numpy", "flwr", "hydra", "omegaconf", *HEAVY} & modules_of(tmp_path, "--help")
