"""The settings at the top of a run's tree, typed and with their bounds; `configs/run.yaml` says what each is."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval, Le

from devices.bounds import problem
from fedsim.errors import ConfigError
from fedsim.settings.groups import NEEDED, Settings

Rounds = Annotated[int, Ge(1), Le(10**7)]
Clients = Annotated[int, Ge(1), Le(10**9)]
Seconds = Annotated[float, Gt(0), Le(1e10)]  # 300 years
TEXTS = ("name", "out")  # which may look like numbers
AtOnce = Annotated[int, Ge(1), Le(4096)]


@dataclass(frozen=True)
class RunSettings:
    """Holds what a run reads of its settings.

    Attributes:
        groups: by group, the settings of what its `_target_` names.
    """

    rounds: Rounds
    seed: Annotated[int, Interval(ge=0, le=2**63 - 1)]
    cohort: Clients
    num_clients: Clients | None
    over_selection: Annotated[float, Ge(1), Le(1000)]
    deadline_s: Seconds | None
    round_every_s: Seconds | None
    target: Annotated[float, Interval(ge=-1e12, le=1e12)] | None
    target_accuracy: Annotated[float, Interval(gt=0, le=1)] | None
    patience_rounds: Rounds | None
    max_simulated_s: Seconds | None
    evaluate_every: Rounds
    evaluate_clients: Annotated[int, Ge(0), Le(10**9)]
    start_from: str | None
    private: Sequence[str]
    checkpoint_s: Annotated[float, Ge(0), Le(1e10)] | None
    on_client_error: Literal["stop", "drop"]
    out: str | None
    name: str | None
    logger: Literal["wandb", "mlflow"] | None
    choices: Mapping[str, Any]
    groups: Mapping[str, Settings]

    @classmethod
    def of(cls, tree: Settings) -> RunSettings:
        """Returns the settings of a checked tree."""
        own = {field.name: tree[field.name] for field in fields(cls) if field.name in tree}
        own |= {key: str(own[key]) for key in TEXTS if own[key] is not None}
        return cls(**own, groups={group: tree[group] for group in NEEDED})

    @property
    def engine(self) -> EngineSettings:
        """Returns what workers read of the engine's settings."""
        names = [field.name for field in fields(EngineSettings)]
        return EngineSettings(**{key: value for key, value in self.groups["engine"].items() if key in names})

    @property
    def cluster_address(self) -> str | None:
        """Returns the address of the Ray cluster that the run joins; None where it joins none."""
        address = self.groups["engine"].get("address")
        return None if address is None else str(address)

    @property
    def num_asked(self) -> int:
        """Returns how many clients a round asks, that `cohort` replies may come: ceil(over_selection x cohort)."""
        return math.ceil(self.over_selection * self.cohort - 1e-9)


@dataclass(frozen=True)
class EngineSettings:
    """Holds what every engine has among its settings, for the workers; the last two came later."""

    threads: AtOnce
    device: Literal["auto", "cpu", "cuda"]
    batch_clients: AtOnce
    slots: Annotated[int, Interval(ge=0, le=1024)] | None = 0
    tf32: bool = False


def cohort_key(tree: Settings) -> str:
    """Returns the setting that says how many clients work at once: that of the loop where `cohort` follows it."""
    loop = tree["loop"]
    return "loop.concurrency" if "concurrency" in loop and loop["concurrency"] == tree["cohort"] else "cohort"


def check_bounds(tree: Settings) -> None:
    """Checks the top of a tree, and of its engine, against the annotations above.

    Raises:
        ConfigError: names the key, what came and what is allowed.
    """
    for prefix, node, kind in (("", tree, RunSettings), ("engine.", tree["engine"], EngineSettings)):
        for key, hint in typing.get_type_hints(kind, include_extras=True).items():
            if key in ("groups", *TEXTS):
                continue
            if key not in node:
                if key in vars(kind):
                    continue
                raise ConfigError(f"the setting {prefix}{key} is missing; a whole configuration has it")
            if sentence := problem(cohort_key(tree) if key == "cohort" else f"{prefix}{key}", node[key], hint):
                raise ConfigError(sentence)
    together, slots = tree["engine"]["batch_clients"], tree["engine"].get("slots")
    if together > 1 and slots:
        raise ConfigError(
            f"engine.batch_clients={together} and engine.slots={slots} are two ways to train clients at once; "
            "take one: engine.slots=0 or engine.batch_clients=1"
        )
