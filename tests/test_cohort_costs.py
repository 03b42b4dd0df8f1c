"""What a whole cohort costs at once, against each client by itself."""

from dataclasses import replace

import numpy as np
import pytest

from devices.cost import Cost, FlopsLatency, Jitter, LatencyModel, ModelCost, Passes, Work
from devices.enrol.picture import zoo_cost
from devices.errors import DeviceError
from devices.fleet import Fleet
from devices.latency.models import StructuredLatency
from devices.profile import DeviceProfile
from fedsim.grid.pricing import Prices
from fedsim.messages.cohort import ClientAnswer

DEVICES = {"pixel3": 3, "raspberry_pi_4": 2, "gtx_1080ti": 2, "a100": 1, "reference": 1, "nucleo_l4r5zi": 1}
CAN_TRAIN = {name: share for name, share in DEVICES.items() if name != "nucleo_l4r5zi"}


class Slower(StructuredLatency):
    """Says of one client only: cohorts must not take the parent's way."""

    def compute_s(self, work: Work, device: DeviceProfile) -> float:
        return 3 * super().compute_s(work, device)

    def compute_joules(self, work: Work, device: DeviceProfile, compute_s: float) -> float:
        return compute_s * device.compute_watts * device.speed


class Queued(StructuredLatency):
    """Says what a whole round of one client costs."""

    def cost(self, work: Work, device: DeviceProfile, jitter: Jitter = Jitter()) -> Cost:
        cost = super().cost(work, device, jitter)
        return replace(cost, up_s=cost.up_s + 7, fits=cost.fits and device.name != "pixel3")


class Half:
    """Says it of one client from the side, in front of a model that knows a shorter way for cohorts."""

    def compute_s(self, work: Work, device: DeviceProfile) -> float:
        return super().compute_s(work, device) / 2  # type: ignore[misc]


class Halved(Half, FlopsLatency):
    pass


class Upgraded(Fleet):
    """Says by itself what a client has."""

    def __getitem__(self, client_id: int) -> DeviceProfile:
        return replace(super().__getitem__(client_id), memory_bytes=10**6 * client_id, rtt_s=client_id)


def cohort(devices: dict[str, float], clients: int = 60, trains: bool = True) -> tuple[list[Work], Fleet]:
    draw, networks = np.random.default_rng(3), [zoo_cost("resnet-16"), replace(zoo_cost("mlp-256"), backward_share=0.3)]
    works = []
    for _ in range(clients):
        passes = tuple(
            Passes(
                networks[draw.integers(2)],
                int(draw.integers(1, 33)),
                int(draw.integers(1, 50)),
                int(draw.integers(50)) * trains,
            )
            for _ in range(draw.integers(0, 4))
        )
        works.append(Work(passes, *(int(n) for n in draw.integers(1, 2**31, 4))))
    return works, Fleet("some", devices, clients, seed=5)


MODELS = [FlopsLatency(), StructuredLatency(), Slower(), Queued(), Halved()]


@pytest.mark.parametrize("latency", MODELS, ids=lambda x: type(x).__name__)
def test_a_cohort_costs_what_its_clients_cost_to_the_last_bit(latency: LatencyModel):
    for devices, trains in ((CAN_TRAIN, True), (DEVICES, False)):
        works, fleet = cohort(devices, trains=trains)
        clients = range(len(works))
        jitters = [fleet.jitter(client, 4) for client in clients]
        costs = latency.costs(works, fleet.units(clients), jitters)
        single = [latency.cost(works[i], fleet[i], jitters[i]) for i in clients]
        assert costs.all() == [costs[i] for i in clients] == single
        assert 0 < sum(cost.fits for cost in single) < len(single)
        for name in ("total_s", "joules", "tail_joules"):
            assert getattr(costs, name).tolist() == [getattr(cost, name) for cost in single]


def test_a_cohort_is_cut_short_as_its_clients_are():
    """Each client stops at another moment: before it begins, in each phase, at the very end, never."""
    works, fleet = cohort(CAN_TRAIN)
    costs = StructuredLatency().costs(works, fleet.units(range(60)), [Jitter()] * 60)
    share = np.linspace(-0.1, 1.2, 60)
    for elapsed_s in (
        share * costs.total_s,
        costs.down_s,
        costs.down_s + costs.compute_s,
        costs.total_s,
        np.full(60, np.inf),
    ):
        expected = [cost.until(s) for cost, s in zip(costs.all(), elapsed_s.tolist(), strict=True)]
        assert costs.until(elapsed_s).all() == expected


def test_nobody_costs_nothing():
    fleet = Fleet("some", CAN_TRAIN, 3, seed=5)
    for latency in MODELS:
        assert latency.costs([], fleet.units([]), []).all() == []


def test_a_cohort_is_refused_as_a_client_is():
    works, fleet = [Work((Passes(ModelCost("net", 1.0, 2.0, 0, 0), 4, 1),))], Fleet("some", CAN_TRAIN, 3, seed=5)
    with pytest.raises(DeviceError, match="network 'net' was not traced"):
        StructuredLatency().costs(works, fleet.units([0]), [Jitter()])


def test_units_are_the_fleet_s_devices():
    _, fleet = cohort(DEVICES)
    units = fleet.units([7, 0, 59])
    assert [units[i] for i in range(3)] == [fleet[7], fleet[0], fleet[59]]
    assert units.column(lambda device: device.rtt_s).tolist() == [fleet[i].rtt_s for i in (7, 0, 59)]


@pytest.mark.parametrize("latency", MODELS, ids=lambda x: type(x).__name__)
def test_a_fleet_that_says_what_a_client_has_is_asked(latency: LatencyModel):
    works, plain = cohort(CAN_TRAIN)
    fleet = Upgraded("some", CAN_TRAIN, len(plain), seed=5)
    clients = range(len(works))
    units = fleet.units(clients)
    assert [units[i] for i in clients] == [fleet[i] for i in clients]
    jitters = [fleet.jitter(client, 4) for client in clients]
    single = [latency.cost(works[i], fleet[i], jitters[i]) for i in clients]
    assert latency.costs(works, units, jitters).all() == single


@pytest.mark.parametrize("latency", MODELS, ids=lambda x: type(x).__name__)
def test_workers_and_server_agree_on_whose_reply_comes(latency: LatencyModel):
    works, fleet = cohort(CAN_TRAIN)
    prices = Prices(fleet, latency, round=4, start_s=0.0)
    answers = [ClientAnswer(client, work=work) for client, work in enumerate(works)]
    comes = [priced.arrives(None) for priced in prices.settle(answers)]
    assert prices.arrivals(answers, None) == comes
    assert 0 < sum(comes) < len(comes)
