"""The wheel, installed without downloads, works from a folder that has packages of the same names as ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY

ROOT = Path(__file__).parent.parent
PACKED = ("clients", "configs", "devices", "fedsim", "strategies", "pyproject.toml", "README.md", "LICENSE")
pytestmark = pytest.mark.slow  # half a minute, for what a release can break
STUDY = f"title: Mine\narms: {{one: {json.dumps([*TINY, 'rounds=1'])}}}\nlast: 1\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel that sees the packages of this one, but not this checkout."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    source.mkdir()
    for name in PACKED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(place), str(source)], check=True)
    shutil.rmtree(source)
    subprocess.run([sys.executable, "-m", "venv", str(place / "env")], check=True)
    python = place / "env" / "bin" / "python"
    (site,) = (place / "env" / "lib").glob("python*/site-packages")
    locked = [folder for folder in sys.path if Path(folder).name == "site-packages"]
    (site / "locked.pth").write_text("\n".join(locked) + "\n")  # their own .pth files are not followed
    install = [*pip, "--python", str(python), "install", "--no-deps", "--no-index"]
    subprocess.run([*install, *map(str, place.glob("fedsim*.whl"))], check=True)
    for name in ("clients", "configs", "devices", "strategies"):
        (place / "work" / name).mkdir(parents=True)
        (place / "work" / name / "__init__.py").write_text("MINE = True\n")
    return place


def called(place: Path, *command: str) -> str:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    path = f"{place / 'env' / 'bin'}{os.pathsep}{env['PATH']}"
    done = subprocess.run(command, cwd=place / "work", env={**env, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_python_takes_ours_from_a_folder_with_the_same_names(place: Path):
    code = f"import fedsim; r = fedsim.run(*{TINY!r}, progress=False, out='p'); print(fedsim.__file__, len(r.rounds))"
    file, rounds = called(place, str(place / "env" / "bin" / "python"), "-c", code).split()
    assert Path(file).is_relative_to(place / "env")
    assert rounds == "3"


def test_the_command_and_a_study_run_there(place: Path):
    (place / "work" / "mine.yaml").write_text(STUDY)
    called(place, str(place / "env" / "bin" / "fedsim"), "run", *TINY, "out=r")
    called(place, str(place / "env" / "bin" / "fedsim"), "study", "mine.yaml", "--out", "s")
    assert json.loads((place / "work" / "s" / "study.json").read_text())["arms"][0]["arm"] == "one"


def test_packages_of_the_same_names_that_came_first_are_named(place: Path):
    code = "import clients\ntry:\n    import fedsim\nexcept ImportError as error:\n    print(error)"
    said = called(place, str(place / "env" / "bin" / "python"), "-c", code)
    assert said.startswith(f"the package 'clients' of {(place / 'work').resolve()} was imported before fedsim")
