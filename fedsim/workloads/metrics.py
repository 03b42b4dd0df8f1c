"""Metrics that models are judged by, figures drawn from the reports of a run, and means over clients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from fedsim.workloads.by_class import ECE, MACRO_F1

if TYPE_CHECKING:
    from fedsim.grid.exchange import ClientReport
    from fedsim.report.rounds import RoundReport

LOSS = "loss"
MICROPHONES = "microphones"  # in a summary: accuracy and loss on what each kind of them hears
NETWORKS = "networks"  # in a summary: how many clients train which network, by device
CLIENTS = "client_"  # before the name of a metric: its mean over clients that judged, of the model that each uses
EPSILON, DELTA = "epsilon", "delta"  # of differential privacy: what all rounds up to this one have spent
ATTACK_SUCCESS = "attack_success"  # share of the test's victims that are told as the attacker wants
ASYNCHRONY, STALENESS, MEAN_STALENESS = "asynchrony", "staleness", "mean_staleness"  # how often weights had changed
MALICIOUS = "malicious"  # 1 in the rows of clients that are, 0 in those of others
METRICS = "metrics."  # figures of a run that begin so are the last value of a metric of its rounds
NOT_FINITE = "not_finite"  # in place of all, 1: the output of the judged model is NaN or infinite
BY_EXAMPLES, BY_CLIENTS = "examples", "clients"
# How what clients report becomes one number of the round: weighted by their examples, as what is itself a mean over
# examples, or every client alike, as what is a fact about the client, its device or its network. A name also stands for
# names that go on behind it with an underscore, such as accuracy_at_0.5 and latency_ms_on_pixel3. Other names are
# weighted by examples, as Flower does.
AVERAGED: Mapping[str, str] = {
    **dict.fromkeys(("accuracy", "loss", "train_loss", "personal_loss", "head_loss"), BY_EXAMPLES),
    **dict.fromkeys(("own_loss", "partner_loss", "taylor", MACRO_F1, ECE), BY_EXAMPLES),
    **dict.fromkeys(("similarity", "diversity", "affinity"), BY_EXAMPLES),
    **dict.fromkeys(("attribution_cosine", "attribution_iou", "pointing"), BY_EXAMPLES),
    **dict.fromkeys(("latency_ms", "flops", "keep_ratio", "sparsity"), BY_CLIENTS),
    **dict.fromkeys(("dense_bytes", "nonzero_bytes", "wire_bytes", "mean_bits"), BY_CLIENTS),
    **dict.fromkeys(("memory_examples", "pool_pairs", "data_version", "oracle"), BY_CLIENTS),
    **dict.fromkeys(("mixing", "cluster", STALENESS, "paused_s", "clipped_rate", MALICIOUS), BY_CLIENTS),
    ATTACK_SUCCESS: BY_EXAMPLES,
}


@dataclass(frozen=True)
class Metric:
    """A figure by which models are compared.

    Attributes:
        name: as in the metrics of a round.
        unit: "%" for a share of 1, which is shown in percent; any other stands behind the figure.
        higher_is_better: otherwise the lowest value is the best.
    """

    name: str
    unit: str = ""
    higher_is_better: bool = True

    @classmethod
    def named_in(cls, tree: Mapping[str, Any]) -> Metric:
        """Returns the metric that a summary or another file of a run names; accuracy where it names none."""
        entry = tree.get(PRIMARY)
        return cls(entry["name"], entry["unit"], entry["higher_is_better"]) if entry else ACCURACY

    def as_entry(self) -> dict[str, Any]:
        """Returns the entry that `named_in` reads; accuracy goes without saying."""
        return {} if self == ACCURACY else {PRIMARY: asdict(self)}

    @property
    def scale(self) -> float:
        """Returns what a value is multiplied by where it is shown with its unit."""
        return 100.0 if self.unit == "%" else 1.0

    @property
    def label(self) -> str:
        """Returns the name with the unit, for axes and the columns of a page."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    @property
    def heading(self) -> str:
        """Returns the same for the columns of a terminal."""
        return f"{self.title} {self.unit}".rstrip()

    @property
    def title(self) -> str:
        """Returns the name in words."""
        return self.name.replace("_", " ")

    def named(self, name: str) -> Metric:
        """Returns a metric of this unit and direction by another name, such as that of the clients' own models."""
        return replace(self, name=name) if name else self

    def number(self, value: float, digits: int = 2) -> str:
        """Returns a value in its unit, without naming it: so many decimals of a percentage, else four digits."""
        return f"{self.scale * value:.{digits}f}" if self.unit == "%" else f"{value:.4g}"

    def change(self, difference: float) -> str:
        """Returns a difference of two values with its sign."""
        return f"{self.scale * difference:+.2f}" if self.unit == "%" else f"{difference:+.3g}"

    def with_unit(self, value: float) -> str:
        """Returns a value and its unit."""
        return f"{self.number(value)} {self.unit}".rstrip()

    def gain(self, value: float) -> float:
        """Returns a number that is larger the better the value is."""
        return value if self.higher_is_better else -value

    def reaches(self, value: float, target: float) -> bool:
        """Returns whether a value is as good as the target, or better."""
        return self.gain(value) >= self.gain(target)


ACCURACY, PRIMARY = Metric("accuracy", "%"), "primary"
# Figures of a run beside its score that are worth comparing, with their unit. Terminal, pages, studies and TensorBoard
# go by these wherever a run has one: whoever brings another figure adds it here.
OF_ROUNDS: Mapping[str, Metric] = {  # by their name among the metrics of a round
    ATTACK_SUCCESS: Metric(ATTACK_SUCCESS, "%", higher_is_better=False),
    EPSILON: Metric(EPSILON, higher_is_better=False),
    "clipped_rate": Metric("clipped_rate", "%"),
    "clipping_norm": Metric("clipping_norm"),
    STALENESS: Metric(STALENESS, higher_is_better=False),
}
COMPARED: Mapping[str, Metric] = {  # by their dotted path in the summary
    f"final.{ATTACK_SUCCESS}": OF_ROUNDS[ATTACK_SUCCESS],
    f"privacy.{EPSILON}": OF_ROUNDS[EPSILON],
    f"{ASYNCHRONY}.{MEAN_STALENESS}": Metric(MEAN_STALENESS, higher_is_better=False),
}


# Figures of 1 that are shown in percent as the score is, under names that go on behind these with an underscore, too.
SHARES = (ACCURACY.name, MACRO_F1, ECE, "forgetting", "learning_accuracy")


def shown_as(path: str) -> Metric | None:
    """Returns in which words and unit a figure of a run is shown, by its dotted path; None where none are declared."""
    name = path.removeprefix(METRICS)
    if declared := COMPARED.get(path) or OF_ROUNDS.get(name):
        return declared
    last = name.rpartition(".")[2].removeprefix(CLIENTS)
    is_share = any(last == one or last.startswith(f"{one}_") for one in SHARES)
    return Metric(name.replace(".", "_"), "%") if is_share else None


@cache
def averaged_by(name: str) -> str:
    """Returns whether a metric of clients is averaged by examples or by clients; see AVERAGED."""
    known = [key for key in AVERAGED if name == key or name.startswith(f"{key}_")]
    return AVERAGED[max(known, key=len)] if known else BY_EXAMPLES


def means(clients: Iterable[ClientReport]) -> dict[str, float]:
    """Returns the mean of each metric over the clients that report it, if their examples give it any weight."""
    sums: dict[str, float] = {}
    weights: dict[str, float] = {}
    for client in clients:
        for name, value in client.metrics.items():
            if isinstance(value, int | float):
                weight = client.num_examples if averaged_by(name) == BY_EXAMPLES else 1
                sums[name] = sums.get(name, 0.0) + value * weight
                weights[name] = weights.get(name, 0) + weight
    return {name: total / weights[name] for name, total in sums.items() if weights[name] > 0}


def worst_name(primary: Metric) -> str:
    """Returns the name of `worst_tenth` in the metrics of a round."""
    return f"{CLIENTS}{primary.name}_worst_tenth"


def worst_tenth(clients: Iterable[ClientReport], primary: Metric) -> dict[str, float]:
    """Returns the mean of the primary metric over the tenth of the clients where it is worst; empty where none judged.

    A tenth is rounded up, so that it is one client at least; each counts alike, however many examples it judged on.
    """
    values = [c.metrics[primary.name] for c in clients if c.num_examples and primary.name in c.metrics]
    worst = sorted(values, key=primary.gain)[: -(-len(values) // 10)]
    return {worst_name(primary): sum(worst) / len(worst)} if worst else {}


def judged(reports: Sequence[RoundReport], primary: Metric = ACCURACY) -> list[RoundReport]:
    """Returns the rounds after which the global model was evaluated on held-out examples, finite or not."""
    return [r for r in reports if primary.name in r.metrics or NOT_FINITE in r.metrics]


def not_finite(reports: Sequence[RoundReport]) -> list[int]:
    """Returns the rounds after which the output of the global model is NaN or infinite."""
    return [r.round for r in reports if NOT_FINITE in r.metrics]


def read(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Returns metrics as JSON holds them: null is NaN; where that is a judgement, the mark stands in its place."""
    found = {name: math.nan if value is None else value for name, value in metrics.items()}
    if any(not math.isfinite(found.get(name, 0.0)) for name in (ACCURACY.name, LOSS)):
        found = {name: value for name, value in found.items() if name not in (ACCURACY.name, LOSS)} | {NOT_FINITE: 1.0}
    return found


def final(reports: Sequence[RoundReport], primary: Metric = ACCURACY) -> dict[str, float | None]:
    """Returns primary metric and loss of the last evaluation, None where that was not finite, and what else it has."""
    last = judged(reports, primary)[-1].metrics if judged(reports, primary) else {}
    every = {key: last.get(key) for key in (primary.name, LOSS)}
    return every | {key: last[key] for key in (MACRO_F1, ECE, ATTACK_SUCCESS, worst_name(primary)) if key in last}


def privacy(reports: Sequence[RoundReport]) -> dict[str, float]:
    """Returns the epsilon and delta that a run has spent of each client; nothing where no strategy counts them."""
    spent = next((r.metrics for r in reversed(reports) if EPSILON in r.metrics), {})
    return {key: spent[key] for key in (EPSILON, DELTA) if key in spent}


def best(reports: Sequence[RoundReport], primary: Metric = ACCURACY) -> dict[str, Any]:
    """Returns the best value of the primary metric and the first round that reached it."""
    name = primary.name
    values = {r.round: r.metrics[name] for r in reports if name in r.metrics}
    number = max(values, key=lambda number: (primary.gain(values[number]), -number), default=None)
    return {name: None if number is None else values[number], "round": number}


def took_part(reports: Sequence[RoundReport]) -> set[int]:
    """Returns the clients that completed the training of at least one round."""
    return {client for report in reports for client in report.outcomes.get("completed", ())}


def stops_at(settings: Mapping[str, Any]) -> float | None:
    """Returns the value of the metric at which a run with these settings stops; None where it stops at none."""
    found = (settings.get(key) for key in ("target", "target_accuracy"))
    return next((float(value) for value in found if isinstance(value, int | float)), None)


def to_target(
    reports: Sequence[RoundReport], target: float | None, primary: Metric = ACCURACY
) -> dict[str, Any] | None:
    """Returns round, seconds, joules and bytes until the primary metric first reaches the target; None if never."""
    if target is None:
        return None
    spent: dict[str, Any] = {"energy_j": 0.0, "down_bytes": 0, "up_bytes": 0}
    for report in reports:
        spent["energy_j"] += report.joules
        spent["down_bytes"] += report.down_bytes
        spent["up_bytes"] += report.up_bytes
        if primary.name in report.metrics and primary.reaches(report.metrics[primary.name], target):
            return {primary.name: target, "round": report.round, "simulated_s": report.now_s, **spent}
    return None
