"""What loggers are told of a run: its settings as hyperparameters, the numbers of a round, and those of its end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fedsim.messages.cohort import OUTCOMES
from fedsim.report import strict_json
from fedsim.report.rounds import RoundReport
from fedsim.settings.groups import FREE_MAPS, NEEDED, Settings
from fedsim.settings.names import fleet_name, method_name, used, workload_name
from fedsim.settings.run_settings import RunSettings
from fedsim.workloads.metrics import COMPARED

NO_PARAMETERS = ("out", "name", "checkpoint_s", "engine", "logger")  # which no result depends on


@dataclass
class Spent:
    """What a run has cost so far."""

    simulated_s: float = 0.0
    energy_j: float = 0.0
    down_bytes: int = 0
    up_bytes: int = 0

    def add(self, report: RoundReport) -> None:
        """Adds a round."""
        self.simulated_s = report.now_s
        self.energy_j += report.joules
        self.down_bytes += report.down_bytes
        self.up_bytes += report.up_bytes

    @property
    def axes(self) -> dict[str, int]:
        """Returns whole numbers by name, for readers that have an axis of steps and no other."""
        return {
            "simulated_ms": round(1000 * self.simulated_s),
            "energy_mj": round(1000 * self.energy_j),
            "traffic_bytes": self.down_bytes + self.up_bytes,
        }


def of_round(report: RoundReport, spent: Spent) -> dict[str, float]:
    """Returns the numbers of a round, and what the run has cost up to its end."""
    outcomes = {f"outcome/{o}": len(report.outcomes.get(o, ())) for o in OUTCOMES} if report.cohort else {}
    return {
        **{f"metric/{key}": value for key, value in report.metrics.items()},
        "round/simulated_s": report.round_s,
        "round/energy_j": report.joules,
        "round/tail_energy_j": report.tail_joules,
        "round/down_bytes": report.down_bytes,
        "round/up_bytes": report.up_bytes,
        "round/peak_memory_bytes": report.peak_memory_bytes,
        "round/storage_bytes": report.storage_bytes,
        **outcomes,
        **{f"total/{key}": value for key, value in vars(spent).items()},
    }


def of_end(summary: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers by which finished runs are compared; what was not judged or reached is left out."""
    found = {
        **{f"final/{key}": value for key, value in summary["final"].items()},
        **{f"best/{key}": value for key, value in summary["best"].items()},
        **{f"to_target/{key}": value for key, value in (summary["to_target"] or {}).items()},
        **{f"privacy/{key}": value for key, value in summary.get("privacy", {}).items()},
        **{path.replace(".", "/"): _at(summary, path) for path in COMPARED},
        "total/simulated_s": summary["simulated_s"],
        "total/energy_j": summary["energy_j"]["total"],
        "total/traffic_bytes": summary["down_bytes"] + summary["up_bytes"],
    }
    return {key: float(value) for key, value in found.items() if value is not None}


def _at(summary: Mapping[str, Any], path: str) -> float | None:
    head, _, name = path.partition(".")
    value: float | None = summary.get(head, {}).get(name)
    return value


def hyperparameters(settings: Settings) -> dict[str, bool | float | str]:
    """Returns the settings that results depend on, by dotted path, and what each group made by the group's name."""
    typed = RunSettings.of(settings)
    made = {group: used(typed, group) for group in NEEDED if group not in NO_PARAMETERS}
    own = {key: value for key, value in settings.items() if key not in (*NO_PARAMETERS, "choices")}
    method = {"method": method_name(typed), "workload": workload_name(typed), "fleet": fleet_name(typed)}
    return dict(_flat(own)) | made | method


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | float | str]]:
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if key.startswith("_"):  # what a group made goes by its name
            continue
        if isinstance(value, Mapping) and path not in FREE_MAPS:
            yield from _flat(value, f"{path}.")
        elif isinstance(value, bool | int | float | str):
            yield path, value
        elif value:
            yield path, strict_json.dumps(value)
