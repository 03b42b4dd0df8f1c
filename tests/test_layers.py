"""What holds for all modules beside the contracts on imports in pyproject.toml."""

import ast
import io
import json
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("devices", "fedsim", "clients", "strategies", "configs")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
# A method's own words; Flower's classes that only average are listed once, in PLAIN_MEANS of grid/server_half.py.
METHOD_NAMES = {
    path.stem for group in ("method", "strategy", "trainer") for path in (ROOT / "configs" / group).iterdir()
}
EVERYDAY = {"sgd", "fedavg", "edge_mean"}  # the optimiser, the base class whose arguments all strategies take, the mean
MOVED = "fedsim.settings.moved"  # the table of names of 0.1
CORE = [path for name, path in MODULES.items() if name.startswith("fedsim.") and name != MOVED]


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT / "fedsim")))
def test_core_code_names_no_method(path: Path):
    """Identifiers and keys, not comments or prose: a core that knows a method has it in a name or a short text."""
    said = {n.lower() for n in _names(path)}
    allowed = _plain_means() if path == ROOT / "fedsim" / "grid" / "server_half.py" else set()
    assert not said & (METHOD_NAMES - EVERYDAY - allowed)


def _names(path: Path) -> set[str]:
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    found = {t.string for t in tokens if t.type == tokenize.NAME}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            found |= set(node.value.replace(".", " ").replace("=", " ").split())
    return found


def _plain_means() -> set[str]:
    from fedsim.grid.server_half import PLAIN_MEANS

    return {strategy.__name__.lower() for strategy in PLAIN_MEANS}


def test_the_known_list_of_plain_means_holds_only_flowers_own_classes():
    from fedsim.grid.server_half import PLAIN_MEANS

    assert all(strategy.__module__.startswith("flwr.serverapp.strategy") for strategy in PLAIN_MEANS)


@pytest.mark.parametrize("package", [name for name, path in MODULES.items() if path.name == "__init__.py"])
def test_package_files_hold_no_code(package: str):
    """But the top one, which lists the public names."""
    tree = ast.parse(MODULES[package].read_text(encoding="utf-8"))
    code = [node for node in tree.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    assert not code or package == "fedsim.__init__"


def test_every_folder_with_configs_is_known_to_the_help():
    from fedsim.settings.groups import GROUPS

    folders = {path.name for path in (ROOT / "configs").iterdir() if path.is_dir() and any(path.glob("*.yaml"))}
    assert folders - {"ray", "study"} <= set(GROUPS)  # files for `ray up` and `fedsim study`, no settings


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["bench", "--help"],
        ["flwr", "--help"],
        ["study", "--help"],
        ["run", "rounds=abc"],
    ],
)
def test_help_and_wrong_numbers_need_no_heavy_library(arguments: list[str]):
    code = f"""
import json, sys
import fedsim.cli.main
sys.argv = ["fedsim", *{arguments!r}]
try:
    fedsim.cli.main.main()
finally:
    heavy = {{"torch", "ray", "flwr", "pyarrow", "pandas", "matplotlib", "sklearn", "tensorboard"}}
    print("HEAVY", json.dumps(sorted(heavy & set(sys.modules))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == (0 if "--help" in arguments else 2), done.stderr
    assert json.loads(done.stdout.rpartition("HEAVY")[2]) == []


def test_a_function_fits_on_a_screen_and_takes_few_arguments():
    """At most 60 lines beside its docstring, and 8 parameters; constructors and commands may take more."""
    long, wide = set(), set()
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            name = f"{module}.{node.name}".removeprefix("fedsim.")
            said = node.body[0] if ast.get_docstring(node) else None
            lines = _lines(node) - (_lines(said) if said else 0)
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(arg.arg not in ("self", "cls") for arg in given)
            if lines > 60:
                long.add(name)
            if count > 8 and node.name != "__init__" and not module.startswith("fedsim.cli."):
                wide.add(name)
    assert (long, wide) == (set(), set())


def _lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1
