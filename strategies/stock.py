"""What Flower's own strategies leave unchecked: the bounds that their papers set, and how many replies they need.

Settings are checked against BOUNDS when a run is composed.

Sources: Reddi et al., "Adaptive Federated Optimization", ICLR 2021 (FedAdagrad, FedAdam, FedYogi); Hsu et al.,
arXiv 1909.06335 (FedAvgM); Blanchard et al., NIPS 2017 (Krum); Li et al., ICLR 2020 (q-FedAvg) and MLSys 2020
(FedProx); Yin et al., ICML 2018 (trimmed mean).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from annotated_types import Interval
from flwr.serverapp.strategy import Bulyan as FlowersBulyan
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdagrad,
    FedAdam,
    FedAvgM,
    FedProx,
    FedTrimmedAvg,
    FedXgbBagging,
    FedXgbCyclic,
    FedYogi,
    Krum,
    QFedAvg,
    Strategy,
)
from flwr.serverapp.strategy import MultiKrum as FlowersMultiKrum

from fedsim.errors import ConfigError
from fedsim.grid.server_half import PRIVATE, ServerHalf, averaging, is_plain_mean
from strategies.robust import Bulyan, MultiKrum

RATE = Annotated[float, Interval(gt=0, le=1e6)]
DECAY = Annotated[float, Interval(ge=0, lt=1)]  # of a moving average: 1 would never forget
WEIGHT = Annotated[float, Interval(ge=0, le=1e6)]

LIARS = Annotated[int, Interval(ge=0, le=10**6)]
NORM = Annotated[float, Interval(gt=0, le=1e9)]
NOISE = {"noise_multiplier": WEIGHT, "num_sampled_clients": Annotated[int, Interval(ge=1, le=10**6)]}
AT_THE_CLIENTS = (DifferentialPrivacyClientSideFixedClipping, DifferentialPrivacyClientSideAdaptiveClipping)
KRUMS = (FlowersMultiKrum, MultiKrum)  # Flower's Krum is a multi-Krum of one
BULYANS = (FlowersBulyan, Bulyan)
OF_TREES = (FedXgbBagging, FedXgbCyclic)
ADAPTIVE = {"eta": RATE, "eta_l": RATE, "tau": RATE}  # tau: 0 divides by nothing where a coordinate stood still
BOUNDS: Mapping[type, Mapping[str, Any]] = {
    DifferentialPrivacyServerSideFixedClipping: {**NOISE, "clipping_norm": NORM},
    DifferentialPrivacyServerSideAdaptiveClipping: {
        **NOISE,
        "initial_clipping_norm": NORM,
        "target_clipped_quantile": Annotated[float, Interval(ge=0, le=1)],
        "clip_norm_lr": RATE,
        "clipped_count_stddev": WEIGHT | None,
    },
    FedAdagrad: ADAPTIVE,
    FedAdam: {**ADAPTIVE, "beta_1": DECAY, "beta_2": DECAY},
    FedYogi: {**ADAPTIVE, "beta_1": DECAY, "beta_2": DECAY},
    FedAvgM: {"server_learning_rate": RATE, "server_momentum": DECAY},
    FedProx: {"proximal_mu": WEIGHT},
    FedTrimmedAvg: {"beta": Annotated[float, Interval(ge=0, lt=0.5)]},  # a half from each end leaves nothing
    FlowersBulyan: {"num_malicious_nodes": LIARS},
    FlowersMultiKrum: {"num_malicious_nodes": LIARS, "num_nodes_to_select": Annotated[int, Interval(ge=1, le=10**6)]},
    Krum: {"num_malicious_nodes": LIARS},
    QFedAvg: {"client_learning_rate": RATE, "q": WEIGHT},
}


def fewest_replies(strategy: Strategy) -> int:
    """Returns how many replies a round needs for a strategy's guarantee to hold.

    With f liars, n > 2 f + 2 for Krum and Multi-Krum, n >= 4 f + 3 for Bulyan; a trimmed mean needs as many as leave
    one to cut at each end.
    """
    server = _innermost(strategy)
    if isinstance(server, BULYANS):
        return 4 * int(server.num_malicious_nodes) + 3
    if isinstance(server, KRUMS):
        return 2 * int(server.num_malicious_nodes) + 3
    if isinstance(server, FedTrimmedAvg) and server.beta > 0:
        return math.ceil(1 / server.beta - 1e-9)
    return 1


def liars(strategy: Strategy) -> int | None:
    """Returns how many liars in a round a strategy is told to withstand; None where it is told of no number."""
    server = _innermost(strategy)
    return int(server.num_malicious_nodes) if isinstance(server, KRUMS + BULYANS) else None


def check_class(kind: type) -> None:
    """Refuses strategies that wait for what no client does.

    Raises:
        ConfigError: says what that is.
    """
    name = kind.__name__
    if issubclass(kind, AT_THE_CLIENTS):
        raise ConfigError(
            f"{name} leaves the clipping to a mod of Flower's client app, and clients of fedsim take none; "
            "strategy=dp_client_fedavg and strategy=dp_client_adaptive have their own clip"
        )
    if issubclass(kind, OF_TREES):
        raise ConfigError(
            f"{name} collects trees of XGBoost, and clients of fedsim train networks; take strategy=fedavg"
        )


def check(strategy: Strategy, cohort: int) -> None:
    """Refuses a strategy whose guarantee could not hold in any round, or that is not told what it needs.

    Args:
        strategy: as a run has it.
        cohort: replies of a round at most.

    Raises:
        ConfigError: with what fits in its place.
    """
    server = _innermost(strategy)
    if isinstance(strategy, PRIVATE) and isinstance(server, ServerHalf) and not is_plain_mean(server):
        raise ConfigError(
            f"{type(strategy).__name__} tells {type(server).__name__} inside it nothing of its run; put one of "
            "Flower's strategies there, or take strategy=dp_fedavg"
        )
    if isinstance(server, KRUMS + BULYANS) and (needed := fewest_replies(server)) > cohort:
        is_krum = isinstance(server, KRUMS)
        most = (cohort - 3) // (2 if is_krum else 4)
        raise ConfigError(
            f"strategy.num_malicious_nodes={server.num_malicious_nodes} needs rounds of at least {needed} clients "
            f"({'n > 2 f + 2' if is_krum else 'n >= 4 f + 3'}), and there are {cohort} at most; take cohort={needed} "
            f"or more, or num_malicious_nodes={max(0, most)}"
        )
    if isinstance(server, KRUMS) and (server.num_nodes_to_select or 0) > (
        honest := cohort - server.num_malicious_nodes
    ):
        raise ConfigError(
            f"strategy.num_nodes_to_select={server.num_nodes_to_select} must be at most {honest}, the clients of a "
            f"round less num_malicious_nodes={server.num_malicious_nodes}: others would be liars"
        )


def _innermost(strategy: Strategy) -> Strategy:
    """Returns the strategy to which all wrappers, ours and Flower's, leave the averaging."""
    server = averaging(strategy)
    return _innermost(server.strategy) if isinstance(server, PRIVATE) else server
