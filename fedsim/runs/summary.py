"""The figures of a finished run: what `summary.json` holds of its rounds."""

from __future__ import annotations

import platform
from collections import Counter
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from flwr.serverapp.strategy import Strategy

from devices.fleet import Fleet
from devices.units import short_size
from fedsim import __version__
from fedsim.grid.edge import EMPTY_ROUND_S
from fedsim.grid.server_half import server_half
from fedsim.messages.cohort import OUTCOMES
from fedsim.messages.secagg import SecureAggregation
from fedsim.report.rounds import RoundReport, Totals, weights_sha256
from fedsim.settings.build import stock_rule
from fedsim.settings.names import fleet_name, method_name, workload_name
from fedsim.workloads import metrics as figures
from fedsim.workloads.metrics import Metric

if TYPE_CHECKING:
    from fedsim.runs.federation import Federation


def summarise(federation: Federation, reports: list[RoundReport], totals: Totals, host_s: float) -> dict[str, Any]:
    """Returns the figures of a finished run; equal runs differ only in `host_s` (and `versions` between machines)."""
    settings, primary = federation.settings, federation.primary
    max_client = max(totals.client_joules.values(), default=0.0)
    return {
        "method": method_name(settings),
        "workload": workload_name(settings),
        "fleet": fleet_name(settings),
        "seed": settings.seed,
        "rounds": reports[-1].round,
        **primary.as_entry(),
        "final": figures.final(reports, primary),
        "best": figures.best(reports, primary),
        **({"privacy": privacy} if (privacy := figures.privacy(reports)) else {}),
        "simulated_s": reports[-1].now_s,
        "energy_j": {"total": totals.joules, "max_client": max_client, "waiting": totals.wait_joules},
        "down_bytes": totals.down_bytes,
        "up_bytes": totals.up_bytes,
        "peak_memory_bytes": totals.peak_memory_bytes,
        "storage_bytes": totals.storage_bytes,
        "outcomes": {outcome: totals.outcomes[outcome] for outcome in OUTCOMES},
        "not_finite_rounds": len(figures.not_finite(reports)),
        "to_target": figures.to_target(reports, federation.target, primary),
        "host_s": host_s,
        "weights_sha256": weights_sha256(federation.arrays),
        "versions": versions(),
    }


def unjudged(federation: Federation) -> list[str]:
    """Warns of a score of the server's model that says nothing of what clients learn in private."""
    settings, private = federation.settings, federation.roles.private
    if not private or settings.evaluate_clients:
        return []
    return [
        f"the {federation.primary.title} is that of the server's model, in which what is private "
        f"(private=[{','.join(settings.private)}]) has never been trained; evaluate_clients=10 judges clients "
        "with their own"
    ]


def attacked(federation: Federation) -> list[str]:
    """Warns of an attack that changes nothing, and of a defence that is told of fewer liars than there are."""
    malicious, asked = federation.malicious, federation.settings.num_asked
    if not malicious:
        return []
    population = federation.world.workload.num_clients
    in_round = round(len(malicious) * min(1.0, asked / population))
    warned = [federation.attack.futile(federation.world.workload, malicious, in_round, min(asked, population))]
    told = stock_rule("liars")(federation.strategy)
    if told is not None and told < in_round:
        warned.append(
            f"{len(malicious)} of {population} clients are malicious, {in_round} in a round, and the strategy "
            f"withstands strategy.num_malicious_nodes={told}"
        )
    return list(filter(None, warned))


def nobody_completed(reports: list[RoundReport], federation: Federation) -> list[str]:
    """Says what happened in a run in which no client's reply was ever taken, and what to change."""
    asked = [report for report in reports if report.round]
    if not asked or any(report.outcomes.get("completed") for report in asked):
        return []
    count = {outcome: sum(len(report.outcomes.get(outcome, ())) for report in asked) for outcome in OUTCOMES}
    limit, fleet = federation.settings.deadline_s, federation.world.fleet
    small = next((c for report in asked for c in report.outcomes.get("out_of_memory", ())), 0)
    name, has = fleet.device_name(small), short_size(fleet[small].memory_bytes)
    needs = short_size(max(report.peak_memory_bytes for report in asked))
    what = {
        "late": f"{count['late']} {_why_late(federation)}",
        "out_of_memory": f"{count['out_of_memory']} lacked the memory, up to {needs} where {name} has {has}; take "
        f"other devices or a smaller trainer.batch_size; what fits: fedsim devices fit --device {name} --model MODEL",
        "offline": f"{count['offline']} were offline; "
        "fleet.availability._target_=devices.availability.Always keeps all online",
        "failed": f"{count['failed']} failed; see on_client_error",
    }
    told = [what[outcome] for outcome in OUTCOMES if count[outcome]]
    if any(not report.cohort for report in asked):
        rule = f"participants={federation.settings.choices['participants']} took nobody, or "
        what_rule = rule if federation.participants.chooses else ""
        told.append(f"in some rounds {what_rule}nobody was awake; round_every_s=600 starts six an hour")
    idle = "" if limit else f"; the server tries again {EMPTY_ROUND_S:g} s after a round without a reply"
    return [f"no client ever completed, so the model is the untrained one: {'; '.join(told)}{idle}"]


def _why_late(federation: Federation) -> str:
    """Says for what replies may have come too late in a run, and what to set."""
    limit, loop, uplink = federation.settings.deadline_s, federation.settings.groups["loop"], federation.uplink
    reasons = []
    if limit is not None:
        reasons.append(f"came after deadline_s={limit}; raise it, or leave it out with deadline_s=null")
    if loop.get("max_staleness") is not None:
        reasons.append(f"were staler than loop.max_staleness={loop['max_staleness']}; raise it, or set it to null")
    if isinstance(uplink, SecureAggregation):
        reasons.append("were too few to take the masks off; lower uplink.threshold, or take a larger cohort")
    return ", or ".join(reasons) or "were late"


def participation(reports: list[RoundReport], fleet: Fleet, primary: Metric, needed: int = 1) -> dict[str, Any]:
    """Counts the clients that took part in the training; warns of some that could not, and of too few at a time."""
    count, seconds, rhythm_s = len(figures.took_part(reports)), reports[-1].now_s, fleet.availability.rhythm_s
    warned = []
    if lost := figures.not_finite(reports):
        many = f"{len(lost)} rounds, the first {lost[0]}" if len(lost) > 1 else f"round {lost[0]}"
        warned.append(f"the global model's output was NaN or infinite after {many}: it has no {primary.title} there")
    if rhythm_s is not None and seconds < rhythm_s:
        short = f"clients of this fleet are online at hours of their own, and the run took {seconds:.4g} simulated s"
        warned.append(f"{short}: who slept then never took part; round_every_s=600 starts six rounds an hour")
    replies = [len(report.outcomes.get("completed", ())) for report in reports if report.cohort]
    if few := sum(0 < count < needed for count in replies):
        warned.append(
            f"in {few} of {len(replies)} rounds fewer than {needed} clients completed, and the strategy's guarantee "
            "needs so many"
        )
    return {
        "clients": {"population": len(fleet), "took_part": count, "never": len(fleet) - count},
        "warnings": warned,
    }


def networks(strategy: Strategy, fleet: Fleet) -> dict[str, dict[str, int]]:
    """Counts the clients that train each network, by device; empty where all train the same one."""
    found: dict[str, Counter[str]] = {}
    for client, network in sorted(server_half(strategy).networks.items()):
        found.setdefault(fleet.device_name(client), Counter())[network] += 1
    return {device: dict(counts.most_common()) for device, counts in sorted(found.items())}


def versions() -> dict[str, str]:
    """Returns the versions that the figures may depend on."""
    return {"python": platform.python_version(), "fedsim": __version__, **_libraries()}


@cache
def _libraries() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "flwr", "numpy")}
