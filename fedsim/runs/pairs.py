"""What of a run does not go together, found before anything is trained."""

from __future__ import annotations

from flwr.serverapp.strategy import Strategy

from devices.compression.updates import UpdateCompressor
from fedsim.errors import ConfigError
from fedsim.grid.loops import Loop
from fedsim.grid.participants import Participants
from fedsim.messages.secagg import SecureAggregation
from fedsim.models.roles import TensorRoles
from fedsim.runs.quiet import quiet_flower
from fedsim.runs.server import ServerSide
from fedsim.settings import check
from fedsim.settings.build import build_strategy
from fedsim.settings.groups import Settings
from fedsim.settings.run_settings import RunSettings


def check_pairs(
    settings: RunSettings, server: ServerSide, loop: Loop, rule: Participants, uplink: UpdateCompressor
) -> None:
    """Checks a strategy against what stands beside it.

    Args:
        settings: of the run.
        server: with its strategy.
        loop: of its rounds.
        rule: that chooses its clients.
        uplink: by which they answer.

    Raises:
        ConfigError: for a loop that the strategy cannot be in, a rule that holds up rounds where there are none or
            shows what noise is to hide, and masks before a strategy that looks at single clients.
    """
    loop.check(settings, server.half, server.name)
    if isinstance(uplink, SecureAggregation):
        server.check_masked(uplink.active)
    refusal = no_questions(settings, loop) if rule.exchanges else ""
    if refusal := refusal or (no_data(settings, server, uplink) if rule.reads_data else ""):
        raise ConfigError(refusal)


def no_questions(settings: RunSettings, loop: Loop) -> str:
    """Says why a rule may not ask clients; empty where it may."""
    if not loop.is_buffered:
        return ""
    return (
        f"participants={settings.choices['participants']} asks clients before a round, and with loop=buffer nobody "
        "waits for answers; take participants=oort, tifl, fastest, least_often or uniform"
    )


def no_data(settings: RunSettings, server: ServerSide, uplink: UpdateCompressor) -> str:
    """Says why a rule may not look at what clients tell of their data; empty where it may."""
    hiding = server.name if server.hides else "uplink=secagg" if isinstance(uplink, SecureAggregation) else ""
    if not hiding:
        return ""
    return (
        f"{hiding} hides what single clients send, and participants={settings.choices['participants']} shows their "
        "data by whom it takes; take participants=uniform, least_often, fastest or tifl"
    )


def make_strategy(settings: RunSettings, num_clients: int, loop: Loop, rule: Participants) -> Strategy:
    """Builds the strategy, which is offered its clients where a loop or a rule chooses them.

    Args:
        settings: of the run.
        num_clients: there are.
        loop: of its rounds.
        rule: that chooses clients.
    """
    return build_strategy(settings, num_clients, loop.is_buffered or rule.chooses)


def try_out(tree: Settings, num_clients: int | None = None) -> None:
    """Builds what costs nothing, the strategy too, so that a wrong one of several runs is found before the first.

    What depends on the model's tensors is not looked at.

    Args:
        tree: settings of a run.
        num_clients: there are; None where only the data know it: then as many as settings need.

    Raises:
        ConfigError: the sentence of the part that refuses its settings, or the others'.
    """
    quiet_flower()  # strategies that are only tried out have no say
    made, settings = check.try_out(tree), RunSettings.of(tree)
    loop, rule = made["loop"], made["participants"]
    clients = num_clients or settings.num_clients or max(settings.num_asked, settings.evaluate_clients)
    server = ServerSide(make_strategy(settings, clients, loop, rule), TensorRoles({}))
    check_pairs(settings, server, loop, rule, made["uplink"])
