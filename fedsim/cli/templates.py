"""The texts that `fedsim new` begins a plug-in with: $name is its module, $Name the beginning of its classes' names."""

from __future__ import annotations

from itertools import chain
from string import Template
from typing import NamedTuple

HEAD = '''\
"""$Name: say in one sentence what is new.

Source: authors, "title", venue and year, equation. Differs from the paper: nothing yet. Records: none.
"""

'''
STRATEGY = '''
class $Name(EdgeStrategy):
    """Goes a part of the way to the mean of the clients' weights.

    All attributes are in the checkpoint: numbers, texts, tensors, and lists, sets and dicts of them; not functions.

    Args:
        step: share of the way; 1 is federated averaging.
        sampling: arguments of FedAvg.
    """

    def __init__(self, step: Annotated[float, Interval(gt=0, le=1)] = 1.0, **sampling: Any):
        super().__init__(**sampling)
        self.step = step
        self.sent: Tensors = {}

    def broadcast(self, number: int, client: Enrolled, weights: Tensors) -> Broadcast:
        """Returns what a client is sent in a round; `extras={"name": tensors}` would go beside the global weights."""
        self.sent = weights
        return Broadcast(number, weights)

    def combine(self, number: int, updates: list[ClientUpdate]) -> Tensors:
        """Returns the new global weights of what came back; `self.context` knows the run, such as `num_clients`."""
        mean = super().combine(number, updates)
        moved = {name: torch.lerp(self.sent[name], t, self.step) for name, t in mean.items() if t.is_floating_point()}
        return mean | moved
'''
TRAINER = '''
class ${Name}Objective(Objective):
    """The workload's loss plus pull / 2 times the squared norm of the weights."""

    def __init__(self, pull: float):
        self.pull = pull

    def __call__(self, run: SGDRun, batch: Tensors) -> Tensor:
        model = run.client.model
        loss = run.client.workload.loss(model, batch)
        if self.pull == 0:
            return loss
        return loss + self.pull / 2 * torch.stack([p.square().sum() for p in model.parameters()]).sum()

    def copies(self, run: SGDRun) -> float:
        """Counts what a step holds beside weights, gradients and momentum, in sizes of the weights."""
        return 1.0 if self.pull else 0.0  # autograd's gradients of the squares


class ${Name}Run(SGDRun):
    """One client's round: what belongs to the client stands here, and is gone after the round.

    What it keeps is `self.client.state`, a draw `self.client.stream("purpose")`, what it was sent `self.broadcast`.
    """

    def update(self, train_loss: float) -> ClientUpdate:
        """Returns what is answered; `extras` holds tensors beside the weights, by name."""
        return super().update(train_loss)


class ${Name}Trainer(SGDTrainer):
    """SGD on that loss. One object serves all clients, so nothing of a client's may be kept on it.

    Args:
        pull: weight of the norm; 0 is plain SGD.
        sgd: arguments of SGDTrainer.
    """

    run = ${Name}Run

    def __init__(self, pull: Annotated[float, Ge(0)] = 0.001, **sgd: Any):
        super().__init__(**sgd)
        self.objective = ${Name}Objective(pull)
'''
MODEL = '''
class ${Name}Net(nn.Module):
    """Flat inputs - hidden - classes; parts by the names `body` and `head` can be kept private.

    Args:
        input_shape: of one example.
        num_classes: size of the output.
        hidden: units of the layer between.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int, hidden: Annotated[int, Ge(1)] = 32):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), hidden), nn.ReLU())
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits [batch, num_classes]."""
        return self.head(self.body(x))
'''
WORKLOAD = '''
class ${Name}Data(ArrayWorkload):
    """Points around the corners of a square; put your own data in their place.

    Args:
        size: examples in all.
        arrays: arguments of ArrayWorkload.
    """

    def __init__(self, size: Annotated[int, Ge(100)] = 1000, **arrays: Any):
        self.size = size
        super().__init__(name="$name", **arrays)

    def read(self) -> DataSet:
        """Reads inputs [examples, ...] and labels [examples]; owners (None: nobody's) are for partition=natural."""
        rng = np.random.default_rng(0)
        y = rng.integers(4, size=self.size)
        corners = np.stack([y // 2, y % 2], axis=1)
        x = (corners + 0.3 * rng.normal(size=corners.shape)).astype(np.float32)
        test = self.size // 5
        parts = Arrays(x[test:], y[test:], None), Arrays(x[:test], y[:test], None)
        return DataSet(*parts, classes=["a", "b", "c", "d"], kind="tabular", source="$name")
'''
PARTICIPANTS = '''
class ${Name}Rule(Participants):
    """Takes the clients that it has taken least often.

    All attributes are in the checkpoint: numbers, texts, tensors, and lists, sets and maps of them; not functions.

    Args:
        candidates: that are drawn for each client that is taken; 1 leaves it to chance.
    """

    def __init__(self, candidates: Annotated[float, Interval(ge=1, le=1000)] = 1000.0):
        self.candidates = candidates
        self.taken: Counter[int] = Counter()

    def choose(self, number: int, count: int, free: Sequence[int], weights: ArrayRecord, draw: Draw) -> list[int]:
        """Returns up to `count` of the free clients; `self.roster.of(client)` says what a server has seen of one."""
        drawn = [free[place] for place in draw.permutation(len(free))[: math.ceil(self.candidates * count)]]
        chosen = sorted(drawn, key=lambda client: self.taken[client])[:count]
        self.taken.update(chosen)
        return chosen
'''
ATTACK = '''
class ${Name}Attack(Attack):
    """Malicious clients send their change times a factor.

    `poisoned` is for what they train on, `conspired` for what all of a round send together. One object serves all
    clients, so nothing may be kept on it.

    Args:
        share: of the fleet's clients that are malicious.
        factor: 1 is honest.
    """

    def __init__(self, share: Share = 0.2, factor: Annotated[float, Interval(ge=-1000, le=1000)] = -1.0):
        super().__init__(share)
        self.factor = factor

    def changed(self, changes: Tensors, draw: Generator) -> Tensors:
        """Returns by how much the weights that are sent differ from those that came."""
        return {name: self.factor * change for name, change in changes.items()}
'''
STRATEGY_YAML = """\
# Authors, venue and year: what the server does. `step` and every other argument of the class is a setting.
_target_: $name.$Name
step: 1.0   # share of the way to the mean; 1 is federated averaging
"""
TRAINER_YAML = """\
# Authors, venue and year: what a client does. Settings of plain SGD (lr, batch_size, local_epochs ...) come from `sgd`.
defaults:
  - sgd
  - _self_
_target_: $name.${Name}Trainer
pull: 0.001   # weight of the norm; 0 is plain SGD
"""
MODEL_YAML = """\
# A network: input_shape and num_classes are the workload's to say.
_target_: $name.${Name}Net
_partial_: true
hidden: 32
"""
WORKLOAD_YAML = """\
# Data, with the model and the split that they are usually learnt with.
defaults:
  - override /model@_global_.model: mlp
  - override /partition@_global_.partition: iid
_target_: $name.${Name}Data
size: 1000
default_clients: 20   # when num_clients is null
"""
PARTICIPANTS_YAML = """\
# Whom a round takes. `candidates` and every other argument of the class is a setting.
_target_: $name.${Name}Rule
candidates: 1000   # that are drawn for each client that is taken
"""
ATTACK_YAML = """\
# What malicious clients do.
_target_: $name.${Name}Attack
share: 0.2    # of the fleet's clients
factor: -1.0  # 1 is honest
"""
METHOD_YAML = """\
# @package _global_
# Authors, venue and year: the two halves that belong together.
defaults:
  - override /strategy: $strategy
  - override /trainer: $trainer
"""
TEST_HEAD = '''\
"""What must hold of $name: python -m pytest test_$name.py"""

from pathlib import Path

import pytest

import fedsim


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    monkeypatch.chdir(Path(__file__).parent)  # where configs/ and $name.py are


def run(out, *overrides, **settings):
    return fedsim.run("rounds=2", *overrides, out=out, progress=False, **settings)
'''
METHOD_TEST = '''

def test_in_its_limit_case_it_is_federated_averaging(tmp_path):
    """To the last bit: a good first test of any method that has such a limit."""
    ours = run(tmp_path / "ours", $limits, method="$name")
    plain = run(tmp_path / "plain", strategy="$plain")
    assert ours.summary["weights_sha256"] == plain.summary["weights_sha256"]


def test_the_same_seed_gives_the_same_weights_and_another_one_others(tmp_path):
    first, again, other = (run(tmp_path / str(n), method="$name", seed=seed) for n, seed in enumerate((1, 1, 2)))
    assert first.summary["weights_sha256"] == again.summary["weights_sha256"] != other.summary["weights_sha256"]
'''
MODEL_TEST = """

def test_the_network_learns(tmp_path):
    rounds = run(tmp_path / "run", model="$name").rounds
    assert rounds["loss"].iloc[-1] < rounds["loss"].iloc[0]
"""
WORKLOAD_TEST = """

def test_the_data_can_be_learnt(tmp_path):
    rounds = run(tmp_path / "run", workload="$name").rounds
    assert rounds["accuracy"].iloc[-1] > 0.5
"""
PARTICIPANTS_TEST = """

def test_everybody_takes_part_before_anybody_does_twice(tmp_path):
    clients = run(tmp_path / "run", participants="$name", num_clients=20, cohort=10).clients
    assert sorted(clients["client"]) == list(range(20))
"""
ATTACK_TEST = """

def test_at_a_factor_of_0_nothing_is_learnt(tmp_path):
    loss = run(tmp_path / "run", "attack.share=1", "attack.factor=0", attack="$name").rounds["loss"]
    assert loss.iloc[-1] == pytest.approx(loss.iloc[0], rel=1e-5)
"""


class Part(NamedTuple):
    """A part of a plug-in: its code, the names that this takes from modules, its option, and its test."""

    code: str
    names: dict[str, str]
    option: str
    test: str = ""  # those of a method stand for both halves


NAMES_OF_TORCH = "torch, names"  # beside the module itself
IMPORTS = (  # as a formatter sorts them; a module without names is imported itself
    ("math", "collections", "collections.abc", "typing"),
    ("numpy as np", "torch", "annotated_types", "flwr.app", NAMES_OF_TORCH),
    (
        *("clients.trainers.sgd", "fedsim.attacks.base", "fedsim.grid.edge", "fedsim.grid.participants"),
        *("fedsim.messages.updates", "fedsim.workloads.arrays", "fedsim.workloads.base", "strategies.edge"),
    ),
)
PARTS = {
    "strategy": Part(
        STRATEGY,
        {
            "typing": "Annotated Any",
            "torch": "",
            "annotated_types": "Interval",
            "fedsim.grid.edge": "Enrolled",
            "fedsim.messages.updates": "Broadcast ClientUpdate",
            "fedsim.workloads.base": "Tensors",
            "strategies.edge": "EdgeStrategy",
        },
        STRATEGY_YAML,
    ),
    "trainer": Part(
        TRAINER,
        {
            "typing": "Annotated Any",
            "torch": "",
            "annotated_types": "Ge",
            NAMES_OF_TORCH: "Tensor",
            "clients.trainers.sgd": "Objective SGDRun SGDTrainer",
            "fedsim.messages.updates": "ClientUpdate",
            "fedsim.workloads.base": "Tensors",
        },
        TRAINER_YAML,
    ),
    "model": Part(
        MODEL,
        {
            "math": "",
            "collections.abc": "Sequence",
            "typing": "Annotated",
            "annotated_types": "Ge",
            NAMES_OF_TORCH: "Tensor nn",
        },
        MODEL_YAML,
        MODEL_TEST,
    ),
    "workload": Part(
        WORKLOAD,
        {
            "typing": "Annotated Any",
            "numpy as np": "",
            "annotated_types": "Ge",
            "fedsim.workloads.arrays": "Arrays ArrayWorkload DataSet",
        },
        WORKLOAD_YAML,
        WORKLOAD_TEST,
    ),
    "participants": Part(
        PARTICIPANTS,
        {
            "math": "",
            "collections": "Counter",
            "collections.abc": "Sequence",
            "typing": "Annotated",
            "annotated_types": "Interval",
            "flwr.app": "ArrayRecord",
            "fedsim.grid.participants": "Draw Participants",
        },
        PARTICIPANTS_YAML,
        PARTICIPANTS_TEST,
    ),
    "attack": Part(
        ATTACK,
        {
            "typing": "Annotated",
            "annotated_types": "Interval",
            NAMES_OF_TORCH: "Generator",
            "fedsim.attacks.base": "Attack Share",
            "fedsim.workloads.base": "Tensors",
        },
        ATTACK_YAML,
        ATTACK_TEST,
    ),
}
METHOD_PARTS = ("strategy", "trainer")
LIMITS = {"strategy": '"strategy.step=1"', "trainer": '"trainer.pull=0"'}


def files_of(name: str, parts: list[str]) -> dict[str, str]:
    """Returns the files of a plug-in by their paths.

    Args:
        name: of its module and its options.
        parts: which of PARTS.
    """
    halves = [part for part in METHOD_PARTS if part in parts]
    words = {
        "name": name,
        "Name": "".join(word[:1].upper() + word[1:] for word in name.split("_")),
        "strategy": name if "strategy" in parts else "fedavg",
        "trainer": name if "trainer" in parts else "sgd",
        "limits": ", ".join(LIMITS[half] for half in halves),
        "plain": "edge_mean" if "strategy" in parts else "fedavg",
    }
    test = TEST_HEAD + METHOD_TEST * bool(halves)
    test += "".join(PARTS[part].test for part in parts)
    found = {f"{name}.py": _module(parts)}
    found |= {f"configs/{part}/{name}.yaml": PARTS[part].option for part in parts}
    found |= {f"configs/method/{name}.yaml": METHOD_YAML} if halves else {}
    found[f"test_{name}.py"] = test
    return {path: Template(text).substitute(words) for path, text in found.items()}


def _module(parts: list[str]) -> str:
    """Returns the code of the parts below one head."""

    def line(module: str) -> str:
        every = (PARTS[part].names.get(module, "").split() for part in parts)
        names = sorted(set(chain(*every)), key=lambda name: (name[0].islower(), name.lower()))
        return f"from {module.partition(',')[0]} import {', '.join(names)}" if names else f"import {module}"

    taken = {module for part in parts for module in PARTS[part].names}
    groups = [[line(module) for module in group if module in taken] for group in IMPORTS]
    imports = "\n\n".join("\n".join(lines) for lines in groups if lines)
    return HEAD + imports + "\n\n" + "\n".join(PARTS[part].code for part in parts)
