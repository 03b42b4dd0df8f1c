"""Texts from outside are only texts: a name is shown or stored as it is, whatever it holds, or refused in a sentence.

`NASTY` is thrown at every place that takes a text; each of them once ended in matplotlib's, rich's or the file system's
own error.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import TINY

from devices.errors import UserError
from devices.figures import legend_label, new_figure, save_figure
from devices.profile import load_profile
from devices.texts import FILE_BYTES, file_name, visible
from fedsim.report.terminal import CELL_LETTERS, console, table
from fedsim.settings.check import check
from fedsim.settings.compose import compose
from fedsim.settings.groups import config_dir
from fedsim.study import spec as study
from fedsim.study.spec import Arm, plan, read_study

NASTY = {
    "a formula": "$\\frac{$",
    "a closing tag": "[/red]",
    "an opening tag": "[bold]x",
    "a link of rich": "[link=file:///etc]x[/link]",
    "an emoji by name": ":warning:",
    "an emoji": "😀 👩‍🚀",
    "400 letters": "a" * 400,
    "20,000 letters": "b" * 20_000,
    "many words": "word " * 400,
    "a lone surrogate": "x\ud800",
    "a byte of another encoding": "x\udcff",
    "marks of direction": "\u202ecba\u200f",
    "two lines": "first\nsecond",
    "a null byte": "x\0y",
    "an escape sequence": "\x1b[31mred",
    "a path upwards": "../x",
    "an absolute path": "/nope/x",
    "a reserved name": "CON",
    "a script": "<script>alert(1)</script>",
    "a template": "{{ 7 * 7 }}",
    "an underscore first": "_x",
    "a dash first": "-x",
    "a blank": " ",
    "nothing": "",
    "a comma and quotes": "a,\"b\"='c'",
}
CLASSES = list(NASTY.values())[:20]  # so many are stacked bars with a legend
ended_well = pytest.mark.filterwarnings("error::UserWarning")


def bundle(folder: Path, classes: list[str]) -> Path:
    """Two examples of every class for the client of that class, who is called like it."""
    folder.mkdir()
    y = np.repeat(np.arange(len(classes)), 4)
    x = np.random.default_rng(0).normal(size=(len(y), 1, 4, 4)).astype(np.float32)
    # No lone surrogates and null bytes among names of clients: numpy's texts cannot hold them.
    names = np.array([f"{k}{name[:500]}".encode("utf-8", "replace").decode() for k, name in enumerate(classes)])
    np.savez(folder / "train.npz", x=x, y=y, client=names[y])
    np.savez(folder / "test.npz", x=x, y=y, client=names[y])
    (folder / "meta.json").write_text(json.dumps({"classes": classes, "kind": "image"}))
    return folder


def device(folder: Path, number: int, name: str) -> Path:
    tree = yaml.safe_load((Path(config_dir()).parent / "devices" / "profiles" / "reference.yaml").read_text())
    path = folder / f"device{number}.yaml"
    path.write_text(as_json({**tree, "name": name}))
    return path


def as_json(tree: object) -> str:
    """JSON that is YAML too: letters as they are, but for those that a file cannot hold."""
    text = json.dumps(tree, ensure_ascii=False)
    try:
        return text.encode().decode()
    except UnicodeEncodeError:
        return json.dumps(tree)


def refusal(call: Callable[[], object]) -> str | None:
    """The sentence with which a user's text is refused, if it is."""
    try:
        call()
    except UserError as error:
        return str(error)
    return None


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield
    assert {path.name for path in tmp_path.iterdir()} <= {"here", "devices", "data"}, "something was written outside"


@pytest.fixture
def devices(tmp_path: Path) -> list[Path]:
    """A device file for every name that a device may have; the others are refused, in a sentence that names the key."""
    (tmp_path / "devices").mkdir()
    found = []
    for number, name in enumerate(NASTY.values()):
        path = device(tmp_path / "devices", number, name)
        if refusal(lambda path=path: load_profile(path)) is None:
            found.append(path)
    assert len(found) > 15
    return found


@ended_well
def test_a_run_and_its_page_take_any_name_of_a_class_a_client_and_a_device(tmp_path, devices, fedsim):
    data = bundle(tmp_path / "data", CLASSES)
    fleet = "{" + ",".join(f"{path}: 1" for path in devices) + "}"
    own = [text for text in TINY if not text.startswith(("workload", "fleet", "num_clients"))]
    ended = fedsim(
        *("run", *own, "workload=bundle", f"workload.path={data}", "partition=natural", "out=run"),
        *(f"fleet.devices={fleet}", "evaluate_clients=3", "workload.name='$\\\\frac{$'"),
    )
    assert (ended.code, ended.err) == (0, "")
    page = Path("run/report.html").read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "a" * 150 not in page, "long names are shortened"
    assert fedsim("report", "run").code == 0


@ended_well
@pytest.mark.parametrize("command", ["describe", "averages"])
def test_data_commands_take_any_name_of_a_class(command, tmp_path, fedsim):
    data = bundle(tmp_path / "data", CLASSES)
    ended = fedsim("data", command, "workload=bundle", f"workload.path={data}", "partition=natural")
    assert (ended.code, ended.err) == (0, "")


@ended_well
def test_devices_commands_take_any_name_of_a_device(devices, fedsim):
    chosen = [argument for path in devices for argument in ("--device", str(path))]
    for command in (["predict"], ["fit", "--batch", "1"]):
        ended = fedsim("devices", *command, "--model", "mlp", "--input-shape", "16", *chosen)
        assert (ended.code, ended.err) == (0, "")
        assert "[/red]" in ended.out
        assert "\x1b" not in ended.out
        assert len(ended.out) < 200_000


@ended_well
def test_a_device_of_any_name_can_be_shown(tmp_path, fedsim):
    (tmp_path / "devices").mkdir()
    path = device(tmp_path / "devices", 0, f"$\\frac{{$ [/red] [bold] :warning: 😀 {'a' * 500}")
    ended = fedsim("devices", "show", str(path))
    assert (ended.code, ended.err) == (0, "")
    assert "[/red] [bold] :warning:" in ended.out


@ended_well
def test_a_study_takes_any_label_or_refuses_it_in_a_sentence(tmp_path, run, fedsim, monkeypatch):
    run("fleet=uniform", out=tmp_path / "here" / "run")
    taken = {}
    for label in (text for text in NASTY.values() if text.strip()):
        Path("one.yaml").write_text(as_json({"title": label, "arms": {label: list(TINY)}}))
        if refusal(lambda: read_study("one.yaml")) is None:
            taken[label] = list(TINY)
    assert len(taken) > 15
    tree = {"title": "$\\frac{$ " * 50, "arms": taken, "last": 1}
    arms = dict(_of_different_folders(taken))
    Path("all.yaml").write_text(as_json({**tree, "arms": arms}))
    tiny = compose(TINY)  # once: the arms differ in their labels only
    monkeypatch.setattr(study, "compose", lambda _: tiny)
    for planned in plan(read_study("all.yaml"), Path("out")):
        planned.folder.parent.mkdir(parents=True)
        shutil.copytree("run", planned.folder)
    ended = fedsim("study", "all.yaml", "--out", "out", "--report")
    assert (ended.code, ended.err) == (0, "")
    assert Path("out/study.png").stat().st_size > 10_000


def _of_different_folders(arms):
    slugs = set()
    for label, overrides in arms.items():
        if (slug := Arm(label, ()).slug) not in slugs:
            slugs.add(slug)
            yield label, overrides


@pytest.mark.parametrize("key", ["name", "out"])
def test_a_name_of_a_folder_is_taken_or_refused_in_a_sentence(key, settings):
    tiny = settings()
    for what, text in NASTY.items():
        sentence = refusal(lambda text=text: check({**tiny, key: text}))
        assert sentence is None or sentence.startswith(f"{key} "), what
        assert len(sentence or "") < 500, what
        if sentence is None:
            Path(text if key == "out" else f"20260101-{text}").absolute().exists()  # raises for what is no path


@pytest.mark.parametrize("key", ["workload", "engine.device", "fleet.link", "private"])
def test_an_unknown_name_is_one_short_sentence(key, fedsim):
    for text in (NASTY["20,000 letters"], NASTY["an escape sequence"]):
        ended = fedsim("run", *TINY, f"{key}=[[{text}]]" if key == "private" else f"{key}='{text}'")
        assert ended.code == 2
        assert ended.err.startswith("fedsim: ")
        assert "\x1b" not in ended.err
        assert len(ended.err) < 5000


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_a_file_name_is_one_name_that_every_system_takes(text):
    name = file_name(text)
    assert name
    assert not set(name) & set('/\\:*?"<>|\0\n')
    assert name.strip(". ") == name
    assert name not in (".", "..", "CON")
    assert len(name.encode()) <= FILE_BYTES
    Path(name).touch()


def test_long_names_stay_different_and_fit_ones_stay_as_they_are():
    assert file_name("a" * 400) != file_name("a" * 401)
    assert file_name("seed-3_x.y") == "seed-3_x.y"


def test_what_cannot_be_seen_is_written_as_an_escape_and_length_is_bounded():
    assert visible("a\x1b[1m\0\ud800b") == "a\\x1b[1m\\x00\\ud800b"
    assert visible("one\ntwo\tthree") == "one two three"
    assert visible("é😀\u200d👩") == "é😀\u200d👩"
    assert visible("abcdef", 4) == "abc…"


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_a_picture_shows_every_text_as_it_is(ending, tmp_path):
    figure = new_figure(12, 9)
    axes = figure.subplots()
    for text in NASTY.values():
        axes.plot([1, 10], [1, 2], label=legend_label(text))
    axes.set(title=NASTY["a formula"], xlabel=NASTY["20,000 letters"], ylabel=NASTY["a lone surrogate"], xscale="log")
    axes.set_yticks([1, 2], labels=[NASTY["a formula"], NASTY["a null byte"]])
    figure.suptitle(NASTY["many words"])
    axes.legend()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_figure(figure, tmp_path / "here" / f"picture.{ending}")
    assert axes.get_xticklabels()[1].get_parse_math(), "powers of ten stay formulas"


def test_a_table_and_a_line_show_every_text_as_it_is(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    shown = table(*NASTY.values(), title=NASTY["a closing tag"])
    shown.add_row(*NASTY.values())
    console().print(shown)
    console().print(NASTY["a closing tag"], NASTY["an emoji by name"], NASTY["a lone surrogate"])
    out = capsys.readouterr().out
    assert "[/red] :warning: x\\ud800" in out
    assert "\x1b" not in out
    assert len(out) < 2000 * CELL_LETTERS
