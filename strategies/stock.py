"""What Flower's own strategies leave unchecked: the bounds that their papers set, and how many replies they need.

Settings are checked against BOUNDS when a run is composed.

Sources: Reddi et al., "Adaptive Federated Optimization", ICLR 2021 (FedAdagrad, FedAdam, FedYogi); Hsu et al.,
arXiv 1909.06335 (FedAvgM); Blanchard et al., NIPS 2017 (Krum); Li et al., ICLR 2020 (q-FedAvg) and MLSys 2020
(FedProx); Yin et al., ICML 2018 (trimmed mean).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from annotated_types import Interval
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvgM,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    QFedAvg,
    Strategy,
)

from fedsim.errors import ConfigError
from fedsim.grid.server_half import averaging

RATE = Annotated[float, Interval(gt=0, le=1e6)]
DECAY = Annotated[float, Interval(ge=0, lt=1)]  # of a moving average: 1 would never forget
WEIGHT = Annotated[float, Interval(ge=0, le=1e6)]

ADAPTIVE = {"eta": RATE, "eta_l": RATE, "tau": RATE}  # tau: 0 divides by nothing where a coordinate stood still
BOUNDS: Mapping[type, Mapping[str, Any]] = {
    FedAdagrad: ADAPTIVE,
    FedAdam: {**ADAPTIVE, "beta_1": DECAY, "beta_2": DECAY},
    FedYogi: {**ADAPTIVE, "beta_1": DECAY, "beta_2": DECAY},
    FedAvgM: {"server_learning_rate": RATE, "server_momentum": DECAY},
    FedProx: {"proximal_mu": WEIGHT},
    FedTrimmedAvg: {"beta": Annotated[float, Interval(ge=0, lt=0.5)]},  # a half from each end leaves nothing
    Krum: {"num_malicious_nodes": Annotated[int, Interval(ge=0, le=10**6)]},
    QFedAvg: {"client_learning_rate": RATE, "q": WEIGHT},
}


def fewest_replies(strategy: Strategy) -> int:
    """Returns how many replies a round needs for a strategy's guarantee to hold: n > 2 f + 2 for Krum with f liars."""
    server = averaging(strategy)
    return 2 * int(server.num_malicious_nodes) + 3 if isinstance(server, Krum) else 1


def check_cohort(strategy: Strategy, cohort: int) -> None:
    """Refuses a strategy whose guarantee could not hold in any round.

    Args:
        strategy: as a run has it.
        cohort: replies of a round at most.

    Raises:
        ConfigError: with a cohort and a setting that fit.
    """
    server = averaging(strategy)
    if isinstance(server, Krum) and (needed := fewest_replies(server)) > cohort:
        raise ConfigError(
            f"strategy.num_malicious_nodes={server.num_malicious_nodes} needs rounds of at least {needed} clients "
            f"(n > 2 f + 2), and there are {cohort} at most; take cohort={needed} or more, or "
            f"num_malicious_nodes={max(0, (cohort - 3) // 2)}"
        )
