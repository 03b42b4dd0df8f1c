"""A configuration from somebody else names only what its place takes: nothing else is called by a `_target_`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY

from fedsim.errors import ConfigError
from fedsim.settings.build import check_trusted
from fedsim.settings.compose import compose
from fedsim.settings.groups import GROUPS, NEEDED, config_dir, options
from fedsim.settings.kinds import group_kinds
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
    fedsim.settings.compose.json.loads fedsim.study.processes.subprocess.Popen fedsim.report.folder.RunFolder
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


def test_nothing_else_looks_names_up():
    """One place decides: no other module finds objects by a dotted path, unpickles, or runs text."""
    words = ("get_object(", "get_class(", "pickle.load", "torch.load(", "allow_pickle=True", "exec(")
    sources = [p for package in ("fedsim", "clients", "strategies", "devices") for p in Path(package).rglob("*.py")]
    found = {
        str(path): word for path in sources for word in words if word in path.read_text().replace("exec_module(", "")
    }
    assert set(found) <= {"fedsim/settings/trust.py", "fedsim/settings/parameters.py"}, found
    assert GROUPS
