"""A configuration from somebody else calls nothing: not by `_target_`, nor by what Hydra would do by itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY

from fedsim.errors import ConfigError
from fedsim.settings import origins, permissions, plugins, trust
from fedsim.settings.build import check_trusted
from fedsim.settings.check import try_out
from fedsim.settings.compose import compose
from fedsim.settings.foreign import check_foreign
from fedsim.settings.groups import GROUPS, NEEDED, config_dir, options
from fedsim.settings.kinds import group_kinds
from fedsim.settings.origins import is_study_folder
from fedsim.settings.trust import check_tree

# Readers, writers, loaders and runners of the standard library and of what is installed beside fedsim.
CALLABLES = """
    os.system os.popen os.remove os.rename os.makedirs os.execv os.spawnl os.kill os.chmod os.symlink posix.system
    subprocess.run subprocess.Popen subprocess.check_output subprocess.getoutput shutil.rmtree shutil.copyfile
    shutil.move builtins.eval builtins.exec builtins.open builtins.compile builtins.__import__ builtins.print
    io.open io.FileIO pathlib.Path pathlib.Path.write_text pathlib.Path.touch pathlib.Path.unlink pickle.load
    pickle.loads marshal.loads runpy.run_path runpy.run_module importlib.import_module importlib.reload
    importlib.util.find_spec code.interact ctypes.CDLL ctypes.cdll.LoadLibrary pty.spawn pdb.run timeit.timeit
    cProfile.run profile.run trace.Trace doctest.testfile webbrowser.open urllib.request.urlopen
    urllib.request.urlretrieve http.server.test socket.create_connection smtplib.SMTP ftplib.FTP logging.FileHandler
    logging.config.dictConfig logging.config.fileConfig shelve.open dbm.open sqlite3.connect tarfile.open
    zipfile.ZipFile tempfile.mkstemp multiprocessing.Process threading.Thread concurrent.futures.ProcessPoolExecutor
    asyncio.create_subprocess_shell atexit.register functools.partial operator.attrgetter operator.methodcaller
    types.FunctionType antigravity.fly this.s idlelib.run.main xml.etree.ElementTree.parse csv.writer json.load
    configparser.ConfigParser gzip.open venv.create ensurepip.bootstrap numpy.load numpy.save numpy.savetxt
    numpy.savez numpy.fromfile numpy.memmap numpy.genfromtxt numpy.f2py.compile pandas.read_pickle pandas.read_csv
    pandas.eval pandas.DataFrame.to_csv pandas.read_html pandas.ExcelFile torch.load torch.save torch.jit.load
    torch.hub.load torch.hub.load_state_dict_from_url torch.classes.load_library torch.ops.load_library
    torch.package.PackageImporter torch.utils.cpp_extension.load torch.export.load torch.multiprocessing.spawn
    torch.nn.modules.module.torch.load torch.nn.functional.torch.load
    torch.nn.modules.module.torch.serialization.load torch.nn.modules.rnn.warnings.warn
    torch.nn.Module.load_state_dict torch.nn.Embedding.from_pretrained torch.nn.functional.relu
    torch.nn.init.normal_ torchvision.io.read_file torchvision.datasets.ImageFolder
    torchvision.models.resnet.torch.load torchvision.models.get_weight torchaudio.load scipy.io.loadmat
    scipy.io.savemat sklearn.datasets.fetch_openml sklearn.datasets.load_files joblib.load joblib.dump
    yaml.unsafe_load yaml.load ray.init ray.remote ray.cloudpickle.loads cloudpickle.loads fsspec.open
    safetensors.torch.load_file safetensors.torch.save_file pyarrow.parquet.read_table pyarrow.parquet.write_table
    pyarrow.memory_map soundfile.write matplotlib.pyplot.savefig matplotlib.image.imsave jinja2.Template
    tensorboard.program.TensorBoard hydra.utils.instantiate hydra.utils.call hydra.utils.get_method
    hydra.utils.get_object hydra.utils.get_class hydra._internal.utils._locate omegaconf.OmegaConf.load
    omegaconf.OmegaConf.save omegaconf.OmegaConf.register_new_resolver flwr.server.start_server
    flwr.simulation.run_simulation flwr.client.start_client fedsim.cli.main.main fedsim.settings.groups.Path
    fedsim.settings.compose.json.loads fedsim.study.runner.subprocess.Popen fedsim.report.folder.RunFolder
    fedsim.engines.ray.session.RaySession fedsim.engines.flower.runtime.FlowerRuntime
    fedsim.cli.devices.own_model.named_model
    clients.trainers.sgd.torch.load strategies.mafl.np.load devices.profile.Path
""".split()  # noqa: SIM905 - a hundred lines otherwise


def placements(name: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Where a `_target_` may hide: a group's key and its tree, by what is special about it."""
    evil = {"_target_": name, "x": "mark"}
    fleet = {"_target_": "devices.fleet.Fleet", "name": "f", "devices": {"pixel3": 1}}
    sgd = {"_target_": "clients.trainers.sgd.SGDTrainer"}
    return {
        "plain": ("uplink", evil),
        "partial": ("model", {**evil, "_partial_": True}),
        "arguments": ("strategy", {"_target_": name, "_args_": ["mark"]}),
        "a parameter": ("trainer", {**sgd, "lr": evil}),
        "a factory": ("fleet", {**fleet, "availability": {**evil, "_partial_": True}}),
        "a map": ("fleet", {**fleet, "devices": {"pixel3": evil}}),
        "a list": ("model", {"_target_": "fedsim.models.mlp.MLP", "hidden": [evil, [[evil]]]}),
        "not asked for": (
            "trainer",
            {**sgd, "_recursive_": False, "_convert_": "all", "nobody": {"deep": [{"d": evil}]}},
        ),
        "positional": ("latency", {"_target_": "devices.cost.FlopsLatency", "_args_": [evil]}),
    }


@pytest.mark.parametrize("place", placements(""))
def test_no_callable_of_elsewhere_may_be_named_anywhere(place: str):
    assert len(CALLABLES) >= 60
    before = set(sys.modules)
    for name in CALLABLES:
        group, tree = placements(name)[place]
        with pytest.raises(ConfigError) as caught:
            check_tree(group, tree, group_kinds(group))
        said = str(caught.value)
        assert said.startswith(f"{group}.") or said.startswith(f"{group}=")
        assert f"={name!r} cannot be used: " in said
        assert "--allow-target" in said or "there is no module" in said
    run = {"antigravity", "this", "idlelib.run", "venv", "ensurepip", "http.server", "numpy.f2py"}
    assert not (set(sys.modules) - before) & run  # nor was it imported to be looked at


def test_whatever_comes_with_fedsim_may_be_named():
    for group in NEEDED:
        for name in options(group):
            tree = yaml.safe_load((config_dir() / group / f"{name}.yaml").read_text())
            if "_target_" in tree:
                check_tree(group, {"_target_": tree["_target_"]}, group_kinds(group))
    check_trusted(compose(["method=fedmix", "workload=kws", "engine=ray"]))


@pytest.mark.parametrize(
    ("group", "name"),
    [
        ("model", "torch.nn.Linear"),
        ("model", "torchvision.models.resnet18"),
        ("strategy", "flwr.serverapp.strategy.FedAvg"),
        ("trainer", "clients.trainers.sgd.SGDTrainer"),
    ],
)
def test_an_object_must_be_of_the_kind_of_its_place(group: str, name: str):
    for other in NEEDED:
        if other == group:
            check_tree(group, {"_target_": name}, group_kinds(group))
        else:
            with pytest.raises(
                ConfigError, match=rf"^{other}\._target_='{name}' .* this place takes \w+, which it is not"
            ):
                check_tree(other, {"_target_": name}, group_kinds(other))


@pytest.mark.parametrize(
    "tree",
    [
        {"_target_": "torchvision.models.get_model", "name": "alexnet", "weights": "DEFAULT"},
        {"_target_": "torchvision.models.get_model", "name": "fasterrcnn_resnet50_fpn"},
        {"_target_": "torchvision.models.alexnet", "_args_": ["DEFAULT"]},
    ],
)
def test_no_way_round_fetches_weights_of_torchvision(tree: dict):
    with pytest.raises(ConfigError, match="could download weights; take a factory of one network"):
        check_tree("model", tree, group_kinds("model"))


def test_a_function_with_the_name_of_its_module_is_found():
    check_tree("model", {"_target_": "torchvision.models.alexnet"}, group_kinds("model"))


def test_weights_of_torchvision_are_not_fetched():
    for factory, more in (("resnet18", {"weights": "DEFAULT"}), ("detection.fasterrcnn_resnet50_fpn", {})):
        with pytest.raises(ConfigError, match=r"weights\w* must be null: torchvision would download weights"):
            check_tree("model", {"_target_": f"torchvision.models.{factory}", **more}, group_kinds("model"))


def test_what_a_second_reading_would_resolve_is_refused():
    """Hydra resolves once more what a plain file holds: a text would become a tree that nobody has checked."""
    text = "${oc.create:'{_target_: os.system}'}"
    with pytest.raises(ConfigError, match=r"^trainer\.lr=.* is an interpolation"):
        check_tree("trainer", {"_target_": "clients.trainers.sgd.SGDTrainer", "lr": text}, group_kinds("trainer"))


# What a group must not hold, by what is odd about it.
ODD: dict[str, dict[str, Any]] = {
    "a list": {"_target_": [1]},
    "a map": {"_target_": {"a": 1}},
    "a number": {"_target_": 5},
    "nothing": {"_target_": None},
    "a number for partial": {"_partial_": 5},
    "text for partial": {"_partial_": "true"},
    "a list for partial": {"_partial_": [True]},
    "text for recursive": {"_recursive_": "x"},
    "not recursive": {"_recursive_": False},
    "a number for convert": {"_convert_": 5},
    "an unknown conversion": {"_convert_": "yes"},
    "a list for convert": {"_convert_": ["all"]},
    "arguments": {"_args_": [1]},
    "no list of arguments": {"_args_": 5},
    "no target": {"deep": [{"a": {"_partial_": True}}]},
    "a target below": {"deep": [{"a": {"_target_": [1]}}]},
    "arguments below": {"deep": [{"_target_": "torch.nn.Linear", "_args_": [1, 1]}]},
}


@pytest.mark.parametrize("odd", ODD)
def test_what_is_odd_beside_a_target_is_refused_in_every_group(odd: str):
    settings = compose(TINY)
    for group in NEEDED:
        wrong = {**settings, group: {**settings[group], **ODD[odd]}}
        with pytest.raises(ConfigError, match=rf"^{group}\.") as caught:
            check_trusted(wrong)
        assert "\n" not in str(caught.value)
        name = next(
            key for key in ("_target_", "_partial_", "_recursive_", "_convert_", "_args_") if key in str(ODD[odd])
        )
        assert name in str(caught.value) or odd == "arguments below"


@pytest.mark.parametrize("group", NEEDED)
def test_only_groups_that_are_called_later_are_partial(group: str):
    settings = compose(TINY)
    later = group in ("model", "stream")
    wrong = {**settings, group: {**settings[group], "_partial_": not later}}
    with pytest.raises(ConfigError, match=rf"^{group}\._partial_ must be {str(later).lower()}: "):
        check_trusted(wrong)
    check_trusted({**settings, group: {**settings[group], "_partial_": later, "_convert_": "all", "_recursive_": True}})


def test_an_object_is_not_called_later_where_it_is_needed_itself():
    settings = compose(["strategy=mafl", *TINY])
    check_trusted(settings)  # its server is called later
    for group, key, kind in (
        ("strategy", "server", "a callable object"),
        ("fleet", "availability", "a callable object"),
    ):
        tree = {**settings[group], key: {**settings[group][key], "_partial_": False}}
        with pytest.raises(ConfigError, match=rf"^{group}\.{key}\._target_=.* this place takes {kind}"):
            check_trusted({**settings, group: tree})


# --- the working folder, and folders that came from elsewhere --------------------------------------------------------

MODULE = """
from pathlib import Path
from clients.trainers.sgd import SGDTrainer
Path({mark!r}).touch()
class Mine(SGDTrainer):
    "A trainer."
def make() -> SGDTrainer:
    return Mine()
def unsaid():
    return Mine()
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder; what was imported from it is forgotten."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    permissions.reset()
    yield folder
    permissions.reset()
    plugins.plugins.cache_clear()
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("mine_a", "nets", "sent", "given", "plugged"):
            del sys.modules[name]


def write_module(path: Path) -> Path:
    """A module with a trainer; the file that is there once it was imported."""
    mark = path.with_suffix(".ran")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(MODULE.format(mark=str(mark)))
    return mark


def trainer(name: str) -> Any:
    check_tree("trainer", {"_target_": name}, group_kinds("trainer"))
    return trust.locate("trainer._target_", name)


def test_modules_of_the_working_folder_may_be_named(here: Path):
    write_module(here / "mine_a.py")
    write_module(here / "nets" / "mine_b.py")
    assert trainer("mine_a.Mine").__module__ == "mine_a"
    assert trainer("nets.mine_b.make").__module__ == "nets.mine_b"
    with pytest.raises(ConfigError, match=r"a function says what it makes in its annotation"):
        trainer("mine_a.unsaid")


@pytest.mark.parametrize("marker", ["config.yaml", "rounds.jsonl", "study.json"])
def test_modules_in_a_run_or_study_folder_may_not(here: Path, marker: str):
    mark = write_module(here / "sent" / "deep" / "evil.py")
    (here / "sent" / "config.yaml").write_text("choices: {}\n" if marker == "config.yaml" else "x: 1\n")
    (here / "sent" / marker).touch()
    with pytest.raises(ConfigError, match=r"--allow-target sent\.deep\.evil\.Mine$"):
        trainer("sent.deep.evil.Mine")
    assert not mark.exists()
    permissions.reset(["sent.deep.evil.Mine"])
    trainer("sent.deep.evil.Mine")
    assert mark.exists()


def test_modules_below_a_folder_that_was_given_may_not_be_named(here: Path):
    mark = write_module(here / "given" / "evil.py")
    permissions.keep_out(here / "given")
    with pytest.raises(ConfigError, match=r"a folder that came with the configuration"):
        trainer("given.evil.Mine")
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["plain", "absolute", "a link above", "a link below", "a way round"])
def test_modules_beside_a_deeper_folder_that_was_given_may_not_be_named(here: Path, kind: str):
    """What somebody sent may be a pack of a run folder and a module beside it; the user's own lie elsewhere."""
    mark = write_module(here / "sent" / "evil.py")
    own = write_module(here / "mine_a.py"), write_module(here / "nets" / "mine_b.py")
    (here / "sent" / "deep" / "run").mkdir(parents=True)
    (here.parent / "other").mkdir()
    (here.parent / "to_here").symlink_to(here)
    (here / "sent" / "away").symlink_to(here.parent / "other")
    given = {
        "plain": Path("sent/deep/run"),
        "absolute": here / "sent" / "deep" / "run",
        "a link above": here.parent / "to_here" / "sent" / "away",
        "a link below": Path("sent/away"),
        "a way round": Path("nets/../sent/deep/run"),
    }
    permissions.keep_out(given[kind])
    with pytest.raises(
        ConfigError, match=r"a folder that came with the configuration.* --allow-target sent\.evil\.Mine$"
    ):
        trainer("sent.evil.Mine")
    assert not mark.exists()
    trainer("mine_a.Mine")
    if kind != "a way round":
        trainer("nets.mine_b.Mine")
        assert all(path.exists() for path in own)


def test_a_process_that_is_started_keeps_out_what_this_one_does(here: Path, monkeypatch: pytest.MonkeyPatch):
    mark = write_module(here / "sent" / "evil.py")
    permissions.keep_out_beside(here / "sent" / "a" / "study.yaml")
    told = permissions.environment()
    permissions.reset()
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"a folder that came with the configuration"):
        trainer("sent.evil.Mine")
    assert not mark.exists()


def test_packages_that_are_installed_in_the_working_folder_are_not_the_users(here: Path, monkeypatch):
    packages = here / ".venv" / "lib" / "python3" / "site-packages"
    mark = write_module(packages / "installed.py")
    monkeypatch.syspath_prepend(packages)
    with pytest.raises(ConfigError, match=r"--allow-target installed\.Mine$"):
        trainer("installed.Mine")
    assert not mark.exists()


def test_modules_on_the_path_outside_the_working_folder_may_not_be_named(here: Path, monkeypatch):
    mark = write_module(here.parent / "elsewhere" / "other.py")
    monkeypatch.syspath_prepend(here.parent / "elsewhere")
    with pytest.raises(ConfigError, match=r"which is not below the working folder"):
        trainer("other.Mine")
    assert not mark.exists()


def test_an_installed_plug_in_may_be_named_and_brings_options(here: Path, monkeypatch):
    site = here.parent / "site"
    write_module(site / "plugged" / "trainers.py")
    (site / "plugged" / "__init__.py").touch()
    (site / "plugged" / "configs" / "trainer").mkdir(parents=True)
    (site / "plugged" / "configs" / "trainer" / "plugged.yaml").write_text(
        "_target_: plugged.trainers.Mine\nlr: 0.05\nbatch_size: 10\nlocal_epochs: 1\n"
    )
    facts = site / "plugged-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(site)
    plugins.plugins.cache_clear()
    with pytest.raises(ConfigError, match=r"--allow-target plugged\.trainers\.Mine$"):
        trainer("plugged.trainers.Mine")
    (facts / "entry_points.txt").write_text("[fedsim.plugins]\nplugged = plugged\n")
    plugins.plugins.cache_clear()
    trainer("plugged.trainers.Mine")
    assert "plugged" in options("trainer")
    try_out(compose(["trainer=plugged"]))


@pytest.mark.parametrize(
    "line", ["x = :::", "x =", "x", "[", "x = ..a", "x = __main__", "x = a b", "x = not_there.sub:f"]
)
def test_an_entry_point_that_names_no_package_is_told_and_left_out(here: Path, monkeypatch, line: str):
    for name, text in {"odd-1.dist-info": line, "good-1.dist-info": "good = yaml"}.items():
        (here.parent / "site" / name).mkdir(parents=True)
        (here.parent / "site" / name / "entry_points.txt").write_text(f"[fedsim.plugins]\n{text}\n")
        (here.parent / "site" / name / "METADATA").write_text(f"Name: {name[:-12]}\nVersion: 1\n")
    monkeypatch.syspath_prepend(here.parent / "site")
    plugins.plugins.cache_clear()
    with pytest.warns(UserWarning, match="is not used: its entry point|cannot be read"):
        assert plugins.plugins() == {"yaml"}
    assert plugins.plugin_folders() == []


def test_links_that_lead_to_each_other_are_looked_at_like_any_path(here: Path):
    loop = here / "loop"
    loop.symlink_to(loop)
    permissions.keep_out(loop)
    permissions.keep_out_beside(loop)
    trust.check_file("loop", loop, by_user=True)
    assert not origins.is_the_users(loop / "x.py")
    assert not origins.is_run_folder(loop)


@pytest.mark.parametrize("kind", ["model", "strategy", "trainer", "latency"])
def test_a_function_is_told_the_annotation_of_its_place(here: Path, kind: str):
    write_module(here / "mine_a.py")
    made = group_kinds(kind)[0].__name__
    with pytest.raises(ConfigError, match=rf"what it makes in its annotation, -> {made}\)"):
        check_tree(kind, {"_target_": "mine_a.unsaid"}, group_kinds(kind))


# --- the commands ----------------------------------------------------------------------------------------------------

DOORS = {
    "resume": ["resume", "{run}"],
    "replay": ["replay", "{run}", "--round", "1", "--client", "0"],
    "repeat": ["run", "--config-path", "{run}", "--config-name", "config", "out=again"],
    "sweep": ["run", "-m", "--config-path={run}", "--config-name=config", "seed=1,2", "out=again"],
    "study": ["study", "{run}/study.yaml", "--out", "studied"],
}


@pytest.fixture
def sent(here: Path) -> Callable[..., Path]:
    """A run folder and a study that somebody sent, with a module and a `_target_` in one of its groups."""

    def make(group: str, target: str, **settings: Any) -> Path:
        folder = here / "sent"
        write_module(folder / "evil.py")
        tree = compose(TINY)
        tree[group] = {**tree[group], "_target_": target, **settings}
        (folder / "config.yaml").write_text(yaml.safe_dump({**tree, "out": None}))
        (folder / "rounds.jsonl").touch()
        more = [f"+{group}.{key}={value}" for key, value in settings.items()]
        arms = {"A": [*TINY, f"{group}._target_={target}", *more]}
        (folder / "study.yaml").write_text(yaml.safe_dump({"title": "T", "arms": arms}))
        return folder

    return make


@pytest.mark.parametrize("door", [*DOORS, "config dir", "rows"])
def test_no_command_calls_what_lies_beside_the_folder_that_it_was_given(here, sent, fedsim, door: str):
    sent("trainer", "sent.evil.Mine")
    for name, place in {"config.yaml": "run", "rounds.jsonl": "run", "study.yaml": "s"}.items():
        (here / "sent" / place).mkdir(exist_ok=True)
        (here / "sent" / name).rename(here / "sent" / place / name)
    (here / "sent" / "s" / "mine.csv").write_text("network,input,batch,phase,ms\nsent/evil.py:Mine,4,1,forward,3.0\n")
    option = here / "sent" / "dir" / "trainer" / "theirs.yaml"
    option.parent.mkdir(parents=True)
    option.write_text("_target_: sent.evil.Mine\nlr: 0.1\nbatch_size: 4\nlocal_epochs: 1\n")
    more = {
        "config dir": ["run", *TINY, "--config-dir", "sent/dir", "trainer=theirs", "out=again"],
        "rows": ["devices", "calibrate", "raspberry_pi_4", "--rows", "sent/s/mine.csv"],
    }
    folder = "sent/s" if door == "study" else here / "sent" / "run"
    code, _, err = fedsim(*(part.format(run=folder) for part in (DOORS | more)[door]))
    assert (code, err.count("\n")) == (2, 1)
    assert "--allow-target sent" in err
    assert not (here / "sent" / "evil.ran").exists()
    assert not (here / "again").exists()


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("group", "target", "settings"),
    [
        ("trainer", "sent.evil.Mine", {}),
        ("uplink", "numpy.savetxt", {"fname": "written", "X": [1]}),
        ("workload", "pathlib.Path", {}),
        ("engine", "sent.evil.Mine", {}),
    ],
)
def test_no_command_calls_what_a_folder_names(here, sent, fedsim, door: str, group: str, target: str, settings: dict):
    folder = sent(group, target, **settings)
    before = {path for path in here.rglob("*") if path.name != "__pycache__"}
    if (group, door) == ("engine", "replay"):
        pytest.skip("every client in this process: its engine is not taken")
    code, _, err = fedsim(*(part.format(run=folder) for part in DOORS[door]))
    assert code == 2
    assert f"{group}._target_={target!r}" in err
    assert err.rstrip().partition("; in ")[0].endswith(f"--allow-target {target}")
    assert err.count("\n") == 1
    assert {path for path in here.rglob("*") if path.name != "__pycache__"} == before


@pytest.mark.parametrize("door", [*DOORS, "command line"])
@pytest.mark.parametrize(
    ("group", "odd"),
    [("trainer", {"_target_": [1]}), ("strategy", {"_partial_": True}), ("stream", {"_args_": [1]})],
)
def test_no_command_shows_a_traceback_for_an_odd_target(here, sent, fedsim, door: str, group: str, odd: dict):
    usual = compose(TINY)[group]
    folder = sent(group, usual["_target_"])
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    tree[group] |= odd
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    [(key, value)] = odd.items()
    override = f"++{group}.{key}={str(value).lower()}"
    (folder / "study.yaml").write_text(yaml.safe_dump({"title": "T", "arms": {"A": [*TINY, override]}}))
    before = {path for path in here.rglob("*") if path.name != "__pycache__"}
    command = (DOORS | {"command line": ["run", *TINY, override, "out=again"]})[door]
    code, _, err = fedsim(*(part.format(run=folder) for part in command))
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"fedsim: {group}.{key} ")
    assert {path for path in here.rglob("*") if path.name != "__pycache__"} == before


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ("{workload: null}", "choices: workload must be text"),
        ("[1]", "choices must be a map"),
        ("{workload: a, fleet: a, strategy: a, trainer: a}", "choices lacks 'engine'"),
        (
            "{workload: a, fleet: a, strategy: a, trainer: a, engine: a, model: [1]}",
            "choices: model must be text or null",
        ),
        (
            "{workload: a, fleet: a, strategy: a, trainer: a, engine: a, method: ../x}",
            "unknown method in choices '../x'",
        ),
    ],
)
@pytest.mark.parametrize("door", ["command line", "repeat", "resume"])
def test_the_names_of_options_have_their_form_wherever_they_come_from(here, sent, fedsim, door, choices, words):
    folder = sent("trainer", "clients.trainers.sgd.SGDTrainer")
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**tree, "choices": yaml.safe_load(choices)}))
    command = [part.format(run=folder) for part in DOORS.get(door, ["run", *TINY, "out=again"])]
    code, _, err = fedsim(*command, *([] if door in DOORS else [f"++choices={choices}"]))
    assert (code, err.count("\n")) == (2, 1)
    assert words in err or "choices must be " in err or (choices, door) == ("[1]", "command line")
    assert not (here / "again").exists()


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ("torchvision.models.resnet18", "unexpected keyword argument 'input_shape'"),
        ("torch.nn.Linear", "missing a required argument: 'in_features'"),
        ("torch.nn.Module", "unexpected keyword argument 'input_shape'"),
        ("torch.nn.Sequential", "unexpected keyword argument 'input_shape'"),
        ("torch.nn.Identity", "makes a network without weights to train"),
    ],
)
def test_a_network_that_does_not_take_the_shapes_is_refused_before_anything_is_written(here, fedsim, network, words):
    model = f"+model={{_target_: {network}, _partial_: true}}"
    code, _, err = fedsim("run", *TINY, "~model", model, "out=again")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"fedsim: model._target_={network!r} makes ")
    assert words in err
    assert "without weights" in err or "name a function that takes both and returns the network" in err
    assert not (here / "again").exists()


def test_the_command_line_can_allow_a_name(here, sent, fedsim):
    folder = sent("trainer", "sent.evil.Mine")
    code, _, err = fedsim("resume", str(folder), "--allow-target", "sent.evil.Mine")
    assert (code, err) == (0, "")
    assert (folder / "evil.ran").exists()
    assert fedsim("resume", str(folder), "--allow-target").code == 2


@pytest.mark.parametrize(
    "command",
    [
        ["resume", "loop"],
        ["replay", "loop", "--round", "1", "--client", "0"],
        ["report", "loop"],
        ["study", "loop"],
        ["study", "loop.yaml"],
        ["run", "--config-dir", "loop"],
        ["run", "out=loop"],
        ["devices", "calibrate", "raspberry_pi_4", "--rows", "loop"],
        ["devices", "predict", "--model", "loop.py:Net", "--device", "pixel3"],
        ["devices", "predict", "--model", "lenet5", "--device", "loop.yaml"],
    ],
)
def test_a_link_loop_is_one_sentence_in_every_command(here, fedsim, command: list[str]):
    for name in ("loop", "loop.py", "loop.yaml"):
        (here / name).symlink_to(name)
    code, _, err = fedsim(*command)
    assert (code, err.count("\n")) == (2, 1), err
    assert "loop" in err


def test_reading_commands_make_nothing(here, run, sent, fedsim, monkeypatch):
    """`report` and `paired` read a run whose settings name what must not be called."""
    import hydra.utils

    run("rounds=1", out=here / "sent")
    monkeypatch.setattr(hydra.utils, "instantiate", lambda *a, **k: pytest.fail("something was made"))
    settings = yaml.safe_load((here / "sent" / "config.yaml").read_text())
    settings["trainer"]["_target_"] = settings["workload"]["_target_"] = "sent.evil.Mine"
    write_module(here / "sent" / "evil.py")
    (here / "sent" / "config.yaml").write_text(yaml.safe_dump(settings))
    code, _, err = fedsim("report", str(here / "sent"))
    assert (code, err) == (0, "")
    assert "How the data are split" in (here / "sent" / "report.html").read_text()
    assert fedsim("paired", str(here / "sent")).code == 0
    arms = {"A": [*TINY, "trainer._target_=sent.evil.Mine"]}
    Path("s.yaml").write_text(yaml.safe_dump({"title": "T", "arms": arms}))
    code, _, err = fedsim("study", "s.yaml", "--report", "--out", "studied")
    assert (code, "no run of study s is finished" in err) == (2, True)
    assert not (here / "sent" / "evil.ran").exists()


# --- what Hydra would do by itself -----------------------------------------------------------------------------------

OF_HYDRA = {
    "a launcher": {"config": "hydra: {launcher: {_target_: os.system}}"},
    "a search path": {"config": "hydra: {searchpath: ['pkg://antigravity']}"},
    "a package": {"config": "defaults: [x: y, _self_]", "x/y": "# @package hydra.callbacks\na: {_target_: os.system}"},
    "an environment": {"config": "defaults: [x@hydra.job.env_set: y, _self_]", "x/y": "LD_PRELOAD: ./evil.so"},
    "logging": {
        "config": "defaults: [x@hydra.job_logging.handlers.h: y, _self_]",
        "x/y": "(): os.system\ncommand: touch ran",
    },
    "the root": {"config": "defaults: [x: y, _self_]", "x/y": "# @package _global_\nhydra: {job: {chdir: true}}"},
    "an override": {
        "config": "defaults: [override hydra/launcher: mine, _self_]",
        "hydra/launcher/mine": "_target_: os.system",
    },
}


@pytest.mark.parametrize("sweep", [(), ("-m",)], ids=["run", "sweep"])
@pytest.mark.parametrize("case", OF_HYDRA)
def test_a_config_tree_sets_nothing_of_hydras(here: Path, case: str, sweep: tuple[str, ...]):
    plain = yaml.safe_dump({**compose(TINY), "out": None})
    for name, text in OF_HYDRA[case].items():
        path = here / "tree" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n{plain}" if name == "config" else text)
    with pytest.raises(ConfigError, match=r" sets hydra[\w.]*: Hydra would act on that by itself"):
        check_foreign(["--config-path", str(here / "tree"), "--config-name", "config", *sweep], ["seed=1"])


def test_a_config_tree_of_the_users_own_is_taken(here: Path):
    (here / "own" / "trainer").mkdir(parents=True)
    (here / "own" / "trainer" / "mine.yaml").write_text("defaults: [sgd, _self_]\nlr: 0.07\n")
    assert check_foreign(["--config-dir=own"], ["trainer=mine"]) == ["--config-dir=own"]
    assert check_foreign([], ["hydra/launcher=basic"]) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "hydra.launcher._target_=os.system"], "would have Hydra call os.system"),
        (["run", "+hydra.callbacks.a={_target_: os.system}"], "would have Hydra call"),
        (["run", "--experimental-rerun", "job.pickle"], "would unpickle a file"),
        (["run", "--config-path", "pkg://antigravity"], "antigravity is no plug-in"),
        (["data", "describe", "hydra.searchpath=[pkg://antigravity]"], "is a setting of Hydra itself"),
        (["flwr", "+model@hydra.callbacks.a=mlp"], "is a setting of Hydra itself"),
    ],
)
def test_the_command_line_hands_hydra_nothing_to_call(here, fedsim, arguments: list[str], words: str):
    code, _, err = fedsim(*arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert words in err
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("override", ["hydra.launcher._target_=os.system", "+hydra.job.env_set.LD_PRELOAD=x.so"])
def test_a_study_hands_hydra_nothing(here, fedsim, override: str):
    Path("s.yaml").write_text(yaml.safe_dump({"title": "T", "arms": {"A": [*TINY, override]}}))
    code, _, err = fedsim("study", "s.yaml")
    assert (code, err.count("\n")) == (2, 1)
    assert "is a setting of Hydra itself" in err


# --- other doors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", ["resume", "repeat", "study"])
def test_a_cluster_that_only_a_file_names_is_not_joined(here, fedsim, sent, door: str):
    """Whatever its workers answer is unpickled, and the user's token would be shown to it."""
    folder = sent("engine", "fedsim.engines.ray.grid.RayGrid", address="203.0.113.1:6379")
    code, _, err = fedsim(*(part.format(run=folder) for part in DOORS[door]))
    assert (code, err.count("\n")) == (2, 1)
    assert "engine.address='203.0.113.1:6379' comes from " in err


def test_rows_name_only_files_of_the_working_folder(here, fedsim):
    (here / "sent").mkdir()
    (here / "sent" / "net.py").write_text(f"open({str(here / 'ran')!r}, 'w')\n")
    (here / "sent" / "mine.csv").write_text("network,input,batch,phase,ms\nsent/net.py:Net,4,1,forward,3.0\n")
    code, _, err = fedsim("devices", "calibrate", "raspberry_pi_4", "--rows", "sent/mine.csv")
    assert (code, err.count("\n")) == (2, 1)
    assert "--allow-target sent/net.py:Net" in err
    assert not (here / "ran").exists()


def test_a_model_file_in_a_run_folder_is_not_run(here, fedsim, sent):
    sent("trainer", "clients.trainers.sgd.SGDTrainer")
    code, _, err = fedsim("devices", "predict", "--model", "sent/evil.py:Net", "--device", "pixel3")
    assert (code, err.count("\n")) == (2, 1)
    assert "--allow-target sent/evil.py:Net" in err
    assert not (here / "sent" / "evil.ran").exists()


def test_nothing_else_looks_names_up():
    """One place decides: no other module finds objects by a dotted path, unpickles, or runs text."""
    words = ("get_object(", "get_class(", "pickle.load", "torch.load(", "allow_pickle=True", "exec(")
    sources = [p for package in ("fedsim", "clients", "strategies", "devices") for p in Path(package).rglob("*.py")]
    found = {
        str(path): word for path in sources for word in words if word in path.read_text().replace("exec_module(", "")
    }
    assert set(found) <= {"fedsim/settings/trust.py", "fedsim/settings/parameters.py"}, found
    assert GROUPS


def test_a_folder_that_changes_while_it_is_looked_into_is_looked_into_again(tmp_path: Path, monkeypatch):
    """One that never keeps still is taken for a study's: nothing in it is called."""
    looks = []

    def glob(folder: Path, pattern: str):
        looks.append(pattern)
        if len(looks) < 3:
            raise FileNotFoundError(2, "No such file or directory", str(folder))
        return iter(())

    monkeypatch.setattr(Path, "glob", glob)
    assert not is_study_folder(tmp_path)
    assert len(looks) == 3
    monkeypatch.setattr(Path, "glob", lambda *_: (_ for _ in ()).throw(FileNotFoundError(2, "gone")))
    assert is_study_folder(tmp_path)
