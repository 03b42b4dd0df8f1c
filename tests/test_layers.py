"""Who may import whom (style.md section 2), read from the imports of every module, inside functions as well."""

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
BASES = ("clients.app", "clients.state", "clients.trainers.base", "strategies.edge", "strategies.tasks")
# No trainers but what several of them are made of: functions, and the memory that rehearsal methods share.
BASES += tuple(f"clients.trainers.{part}" for part in ("gradients", "memory", "recalled", "samples", "selection"))
# A method's own words; the classes of Flower's that only average are listed once, in PLAIN_MEANS of engines/blocks.py.
METHOD_NAMES = {
    path.stem for group in ("method", "strategy", "trainer") for path in (ROOT / "configs" / group).iterdir()
}
EVERYDAY = {"sgd", "fedavg", "edge_mean"}  # the optimiser, the base class whose arguments all strategies take, the mean
CORE = [path for name, path in MODULES.items() if name.startswith("fedsim.")]


def imports(path: Path) -> set[str]:
    """Every module, or module.name, that the file imports anywhere, also for type checkers only."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def roots(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def modules_of(names: set[str]) -> set[str]:
    """The modules of ours among imported names: `a.b.Name` is `a.b`."""
    return {n if n in MODULES else n.rpartition(".")[0] for n in names} & set(MODULES)


def of(package: str) -> list[tuple[str, Path]]:
    return [(name, path) for name, path in MODULES.items() if name.split(".")[0] == package]


@pytest.mark.parametrize("name, path", of("devices"))
def test_devices_know_no_federation(name: str, path: Path):
    assert not roots(path) & {"fedsim", "clients", "strategies", "configs", "flwr", "hydra", "omegaconf"}


@pytest.mark.parametrize("name, path", of("fedsim"))
def test_core_imports_no_method_but_the_command_its_client_app(name: str, path: Path):
    above = {n for n in imports(path) if n.partition(".")[0] in ("clients", "strategies")}
    assert above <= ({"clients.app", "clients.app.app"} if name == "fedsim.cli.main" else set())


@pytest.mark.parametrize("name, path", MODULES.items())
def test_nothing_imports_the_command(name: str, path: Path):
    assert name == "fedsim.__main__" or "fedsim.cli.main" not in modules_of(imports(path))


@pytest.mark.parametrize("name, path", [*of("clients"), *of("strategies")])
def test_clients_and_strategies_meet_only_in_messages(name: str, path: Path):
    assert not roots(path) & ({"clients", "strategies"} - {name.partition(".")[0]})


@pytest.mark.parametrize("name, path", [*of("clients"), *of("strategies")])
def test_plugins_import_bases_or_at_most_one_parent(name: str, path: Path):
    siblings = {n for n in modules_of(imports(path)) if n.partition(".")[0] in ("clients", "strategies")}
    parents = siblings - set(BASES)
    assert len(parents) <= (name not in BASES), f"{name} imports {sorted(parents)}"


def test_a_plugin_uses_its_parent_as_a_parent():
    """A plug-in that imports another one subclasses something of it, else it should share through the base."""
    for name, path in [*of("clients"), *of("strategies")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        bases = {ast.unparse(base) for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for base in node.bases}
        for node in ast.walk(tree):
            ours = isinstance(node, ast.ImportFrom) and node.module in MODULES
            if ours and node.module.partition(".")[0] in ("clients", "strategies") and node.module not in BASES:
                assert bases & {alias.name for alias in node.names}, (
                    f"{name} uses {node.module} but is no variant of it"
                )


def test_modules_form_no_cycle():
    """Imports for type checkers only may point back; all others, also those inside functions, may not."""
    graph = {name: modules_of(_running_imports(path)) - {name} for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"cycle: {' -> '.join((*trail, name))}"
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def _running_imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT / "fedsim")))
def test_core_code_names_no_method(path: Path):
    """Identifiers and keys, not comments or prose: a core that knows a method has it in a name or a short text."""
    said = {n.lower() for n in _names(path)}
    allowed = _plain_means() if path.name == "blocks.py" else set()
    assert not said & (METHOD_NAMES - EVERYDAY - allowed)


def _names(path: Path) -> set[str]:
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    found = {t.string for t in tokens if t.type == tokenize.NAME}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            found |= set(node.value.replace(".", " ").replace("=", " ").split())
    return found


def _plain_means() -> set[str]:
    from fedsim.engines.blocks import PLAIN_MEANS

    return {strategy.__name__.lower() for strategy in PLAIN_MEANS}


def test_the_known_list_of_plain_means_holds_only_flowers_own_classes():
    from fedsim.engines.blocks import PLAIN_MEANS

    assert all(strategy.__module__.startswith("flwr.serverapp.strategy") for strategy in PLAIN_MEANS)


@pytest.mark.parametrize(
    "path", [p for p in MODULES.values() if p.name == "__init__.py"], ids=lambda path: path.parent.name
)
def test_package_files_hold_no_code(path: Path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = path.parent == ROOT / "fedsim"  # the version is its one line of code
    code = [node for node in tree.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    assert [ast.unparse(node).partition(" =")[0] for node in code] in ([[], ["__version__"]] if top else [[]])


def test_every_folder_with_configs_is_known_to_the_help():
    from fedsim.settings.compose import GROUPS

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
