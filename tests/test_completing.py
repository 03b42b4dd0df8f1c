"""What a shell is told when somebody asks it to complete a command."""

from collections.abc import Callable

import pytest
from conftest import Ended

from fedsim.settings.groups import options

pytestmark = pytest.mark.usefixtures("place")


@pytest.fixture
def completed(fedsim: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Completes a line as bash asks, which breaks words at equals signs and takes these for words."""

    def call(line: str) -> list[str]:
        words = line.replace("=", " = ").split(" ")
        words = [word for number, word in enumerate(words) if word or number == len(words) - 1]
        if line.endswith("="):
            words.pop()  # the cursor is on the sign
        monkeypatch.setenv("_FEDSIM_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", " ".join(words))
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        ended = fedsim()
        assert (ended.code, ended.err) == (0, "")
        return ended.out.split()

    return call


@pytest.mark.parametrize(
    "line, names",
    [
        ("fedsim comp", ["compare"]),
        ("fedsim run method=di", ["ditto"]),
        ("fedsim run method=", options("method")),
        ("fedsim run rounds=5 fleet=de", ["desktops"]),
        ("fedsim run mo", [f"model={name}" for name in options("model")]),
        ("fedsim run evaluate_", ["evaluate_every=", "evaluate_clients="]),
        ("fedsim run method=ditto trainer.pu", ["trainer.pull=1.0"]),
        ("fedsim run partition=dirichlet partition.a", ["partition.alpha=0.3"]),
        ("fedsim run method=nope trainer.lr", ["trainer.lr=", "trainer.lr_decay="]),
        ("fedsim study mafl_d", ["mafl_digits"]),
        ("fedsim data describe partition=d", ["dirichlet"]),
        ("fedsim devices show pixel3", ["pixel3"]),
        ("fedsim list mod", ["models"]),
        ("fedsim explain model res", ["resnet8"]),
        ("fedsim run nothing_begins_so", []),
    ],
)
def test_bash_is_told(completed: Callable[[str], list[str]], line: str, names: list[str]):
    assert completed(line) == names


def test_zsh_is_told_whole_words_with_what_they_are(fedsim: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("_FEDSIM_COMPLETE", "complete_zsh")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", "fedsim run method=di")
    assert '"method=ditto":"Beside the global model each client' in fedsim().out
