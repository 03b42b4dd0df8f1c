"""Code of a user's that fails, answers oddly or would end the process: one sentence that names it, in every place."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest
from conftest import TINY
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp.strategy import FedAvg

from fedsim.errors import ConfigError, DataError, ExitError, NotFiniteError, RunError, Terminated, no_exit
from fedsim.grid.server_half import ServerHalf
from fedsim.models.roles import TensorRoles
from fedsim.runs.server import ANSWERS, ServerSide
from fedsim.settings import permissions

MODULE = """
import asyncio
import math
import sys
from flwr.serverapp.strategy import FedAvg
from torch import nn
from clients.trainers.sgd import SGDTrainer

def at(place):
    if place == {place!r}:
        raise {error}

at("import")

class Server(FedAvg):
    def __init__(self, **sampling):
        super().__init__(**sampling)
        at("strategy")
    def configure_train(self, *given):
        at("configure_train")
        return super().configure_train(*given)
    def aggregate_train(self, *given):
        at("aggregate_train")
        return super().aggregate_train(*given)
    def configure_evaluate(self, *given):
        yield from super().configure_evaluate(*given)
        at("configure_evaluate")
    def aggregate_evaluate(self, *given):
        at("aggregate_evaluate")
        return super().aggregate_evaluate(*given)

class Trainer(SGDTrainer):
    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        at("trainer")
    def setup(self, *given):
        at("setup")
        super().setup(*given)
    def fit(self, *given):
        at("fit")
        return super().fit(*given)
    def evaluate(self, *given):
        at("evaluate")
        return super().evaluate(*given)

class Net(nn.Module):
    def __init__(self, input_shape, num_classes, **_):
        super().__init__()
        at("model")
        self.last = nn.Linear(math.prod(input_shape), num_classes)
    def forward(self, x):
        at("forward")
        if self.training:
            at("forward in training")
        return self.last(x.flatten(1))
"""
PLACES = ("import", "strategy", "trainer", "model", "forward", "forward in training", "setup", "fit", "evaluate")
PLACES += tuple(hook for hook in ANSWERS if hook != "complete")
# The usual one at every place; the others are caught by the same line.
RARE = ("SystemExit()", "GeneratorExit()", "asyncio.CancelledError()")
ENDS = ("SystemExit(0)", *(pytest.param(end, marks=pytest.mark.slow) for end in RARE))
TARGETS = ("strategy._target_=mine.Server", "trainer._target_=mine.Trainer", "model._target_=mine.Net")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An empty working folder, whose module `mine` is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    permissions.reset()
    yield tmp_path
    permissions.reset()
    sys.modules.pop("mine", None)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("place", PLACES)
def test_code_that_would_end_the_process_is_named_wherever_it_stands(here: Path, fedsim, place: str, end: str):
    (here / "mine.py").write_text(MODULE.format(place=place, error=end))
    code, _, err = fedsim("run", *TINY, *TARGETS, "evaluate_clients=2", "out=A")
    assert err.count("\n") == 1, err
    assert (
        f"{here / 'mine.py'}, line 11, would end this process ({end.removeprefix('asyncio.').partition('(')[0]}" in err
    )
    assert code == (2 if not (here / "A").exists() else 1)
    if code == 1:
        assert "would end this process" in json.loads((here / "A" / "failure.json").read_text())["reason"]
        assert place not in ANSWERS or err.startswith(f"fedsim: {place} of Server failed in round 1: ")


@pytest.mark.ray
def test_code_that_would_end_a_worker_is_named_too(here: Path, fedsim):
    (here / "mine.py").write_text(MODULE.format(place="fit", error="SystemExit(0)"))
    code, _, err = fedsim("run", *TINY, *TARGETS, "engine=ray", "engine.workers=1", "out=A")
    assert (code, err.count("\n")) == (1, 1), err
    assert f"{here / 'mine.py'}, line 11, would end this process (SystemExit: 0)" in err


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("place", ["import", "model", "forward"])
def test_a_model_file_that_would_end_the_process_is_named(here: Path, fedsim, place: str, end: str):
    (here / "mine.py").write_text(MODULE.format(place=place, error=end))
    code, _, err = fedsim("devices", "predict", "--model", "mine.py:Net", "--device", "pixel3")
    assert (code, err.count("\n")) == (2, 1), err
    assert "mine.py, line 11, would end this process" in err


def test_what_ends_the_command_itself_is_passed_on(fedsim):
    for error in (KeyboardInterrupt(), Terminated(15), ValueError("x"), StopIteration()):
        with pytest.raises((type(error), RuntimeError)) as caught, no_exit():
            raise error
        assert error in (caught.value, caught.value.__cause__)
    with (
        pytest.raises(ExitError, match=r"user_code\.py, line \d+, would end this process \(CancelledError\)$"),
        no_exit(),
    ):
        raise asyncio.CancelledError
    assert fedsim("run", "--version").code == 0


# --- the hooks of a strategy -----------------------------------------------------------------------------------------


class Odd(ServerHalf, FedAvg):
    """Does in every hook what it is told."""

    def __init__(self, error: BaseException | None = None, answer: object = None):
        super().__init__()
        self.error, self.answer = error, answer

    def hook(self, *_):
        if self.error is not None:
            raise self.error
        return self.answer

    configure_train = configure_evaluate = aggregate_train = aggregate_evaluate = complete = hook


def side(**told) -> ServerSide:
    return ServerSide(Odd(**told), TensorRoles({}))


@pytest.mark.parametrize("hook", ANSWERS)
@pytest.mark.parametrize("error", [KeyError("x"), StopIteration(), OSError(5, "no"), MemoryError(), SystemExit(0)])
def test_what_a_hook_raises_names_strategy_hook_and_round(hook: str, error: BaseException):
    with pytest.raises(RunError, match=rf"^{hook} of Odd failed in round 7: ") as caught:
        side(error=error).ask(hook, 7)
    assert error in (caught.value.__cause__, caught.value.__cause__.__cause__)  # for FEDSIM_TRACEBACK=1


@pytest.mark.parametrize("hook", ANSWERS)
@pytest.mark.parametrize("error", [ConfigError("x"), DataError("x"), RunError("x"), NotFiniteError("x")])
def test_sentences_of_our_own_go_on_as_they_are(hook: str, error: Exception):
    with pytest.raises(type(error)) as caught:
        side(error=error).ask(hook, 7)
    assert caught.value is error


@pytest.mark.parametrize("hook", ANSWERS)
@pytest.mark.parametrize("answer", [5, "x", (5, 6), [3], (None,), ConfigRecord, b"x"])
def test_what_a_hook_must_not_return_names_strategy_hook_and_round(hook: str, answer: object):
    with pytest.raises(RunError, match=rf"^{hook} of Odd (must return|failed in round 7)"):
        side(answer=answer).ask(hook, 7, ConfigRecord())


def test_nothing_is_an_answer_only_where_it_may_be_one():
    assert side().ask("aggregate_evaluate", 1) is None
    assert side(answer=(None, None)).ask("aggregate_train", 1) == (None, None)
    assert side(answer=ArrayRecord()).ask("complete", 1) == ArrayRecord()
    for hook in ("configure_train", "configure_evaluate", "aggregate_train", "complete"):
        with pytest.raises(RunError, match=f"^{hook} of Odd must return .*, got null in round 1"):
            side().ask(hook, 1)


@pytest.mark.parametrize("odd", ["KeyError('x')", "StopIteration()", "ValueError()"])
@pytest.mark.parametrize("hook", [hook for hook in ANSWERS if hook != "complete"])
def test_a_strategy_that_fails_ends_the_run_in_one_sentence(here: Path, fedsim, hook: str, odd: str):
    (here / "mine.py").write_text(MODULE.format(place=hook, error=odd))
    code, _, err = fedsim("run", *TINY, *TARGETS, "evaluate_clients=2", "out=A")
    assert (code, err.count("\n")) == (1, 1), err
    assert err.startswith(f"fedsim: {hook} of Server failed in round 1: ")
    assert json.loads((here / "A" / "failure.json").read_text())["error"] == "RunError"


# --- hooks that nothing calls ----------------------------------------------------------------------------------------

UNUSED = """
from clients.trainers.fedprox import FedProxTrainer
from clients.trainers.sgd import Objective, SGDTrainer
from flwr.serverapp.strategy import FedAvg

class Old(SGDTrainer):
    def loss(self, client, batch, task):
        return 0 * client.workload.loss(client.model, batch)

class Misplaced(FedProxTrainer):
    def gradients(self, batch):
        raise RuntimeError

class Completing(FedAvg):
    def complete(self, number, arrays, grid):
        return arrays
"""
CALLED = """
from clients.trainers.sgd import Objective, SGDTrainer

class Mine(SGDTrainer):
    def __init__(self, **sgd):
        super().__init__(**sgd)
        self.objective = Asking(self)

    def loss(self, client, batch):
        return client.workload.loss(client.model, batch)

class Asking(Objective):
    def __init__(self, trainer):
        self.trainer = trainer

    def __call__(self, run, batch):
        return self.trainer.loss(run.client, batch)

class Looping(SGDTrainer):
    def fit(self, client, broadcast):
        self.reserve(client)
        return super().fit(client, broadcast)

    def reserve(self, client):
        pass
"""


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("trainer._target_=mine.Old", "trainer Old has loss, which nothing calls: the loss of a step is an Objective"),
        ("trainer._target_=mine.Misplaced", "trainer Misplaced has gradients, which nothing calls"),
        ("strategy._target_=mine.Completing", "strategy Completing has complete, which nothing asks for; derive it"),
    ],
)
def test_a_hook_that_nothing_calls_is_refused(here: Path, fedsim, target: str, sentence: str):
    (here / "mine.py").write_text(UNUSED)
    proximal = ["trainer=fedprox"] if "Misplaced" in target else []
    code, _, err = fedsim("run", *TINY, *proximal, target, "out=A")
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith(f"fedsim: {sentence}")


@pytest.mark.parametrize("trainer", ["Mine", "Looping"])
def test_functions_that_code_beside_a_trainer_may_call_are_its_own(here: Path, fedsim, trainer: str):
    (here / "mine.py").write_text(CALLED)
    assert fedsim("run", *TINY, f"trainer._target_=mine.{trainer}", "out=A").code == 0


@pytest.mark.parametrize("place", PLACES)
def test_code_that_raises_is_named_wherever_it_stands(here: Path, fedsim, place: str):
    """In a client, in a hook, and where nothing else looks: no traceback, and the line that it came from."""
    (here / "mine.py").write_text(MODULE.format(place=place, error="LookupError('nothing there')"))
    code, _, err = fedsim("run", *TINY, *TARGETS, "evaluate_clients=2", "out=A")
    assert err.count("\n") == 1, err
    assert "nothing there" in err
    assert code == (2 if not (here / "A").exists() else 1)


OTHERS = """
from torch import nn
from devices.availability import Always
from devices.fleet import Fleet
from devices.cost import FlopsLatency

class Mine(nn.Module):
    def __init__(self, input_shape, num_classes, **_):
        super().__init__()
        self.last = nn.Linear(16, num_classes)
    def forward(self, x):
        return {answer}

class Asleep(Always):
    def _end_s(self, client_id, now_s):
        return now_s / 0

class Prices(FlopsLatency):
    def compute_s(self, work, device):
        return work["flops"]
    def seconds(self, works, units):
        return works["flops"]
"""
NOT_HOOKS = {
    "a tuple": ("(self.last(x.flatten(1)),) * 2", ["model._target_=mine.Mine"]),
    "nothing": ("None", ["model._target_=mine.Mine"]),
    "one number": ("self.last(x.flatten(1)).sum()", ["model._target_=mine.Mine"]),
    "an index that is not there": ("[][0]", ["model._target_=mine.Mine"]),
    "availability": ("x", ["fleet.availability._target_=mine.Asleep"]),
    "latency": ("x", ["latency._target_=mine.Prices"]),
}


@pytest.mark.parametrize("case", NOT_HOOKS)
def test_odd_answers_of_other_own_code_end_in_a_sentence(here: Path, fedsim, case: str):
    answer, overrides = NOT_HOOKS[case]
    (here / "mine.py").write_text(OTHERS.format(answer=answer))
    code, _, err = fedsim("run", *TINY, *overrides, "out=A")
    assert err.count("\n") == 1, err
    assert code in (1, 2)
    assert err.startswith("fedsim: ")
    assert "mine.py" in err or "Mine must return logits" in err
