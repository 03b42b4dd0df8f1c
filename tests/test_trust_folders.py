"""Where a module may lie that a configuration names: the working folder and plug-ins, not what came from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sent_folder import write_module

from fedsim.errors import ConfigError
from fedsim.settings import origins, permissions, plugins, trust
from fedsim.settings.check import try_out
from fedsim.settings.compose import compose
from fedsim.settings.groups import options
from fedsim.settings.kinds import group_kinds
from fedsim.settings.origins import is_study_folder
from fedsim.settings.trust import check_tree


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
