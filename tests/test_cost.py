"""What work costs on a device: seconds, joules and memory, also of a part of it."""

from dataclasses import replace

import pytest

from devices.cost import FlopsLatency, Jitter, ModelCost, Passes, Work
from devices.profile import load_profile

WORK = Work((Passes(ModelCost("net", 1e6, 2e6, 0, 0), 10, 100, 100),), 2**32, down_bytes=10_000_000, up_bytes=5_000_000)


def test_cost_of_a_round_on_the_reference_device():
    """3e9 FLOPs at 1e10/s and 10 W; 1e7 bytes at 1e7/s and 5e6 bytes at 5e6/s, 0.02 s before each, at 2 W."""
    cost = FlopsLatency().cost(WORK, load_profile("reference"))
    assert (cost.down_s, cost.compute_s, cost.up_s) == pytest.approx((1.02, 0.3, 1.02))
    assert (cost.down_joules, cost.compute_joules, cost.up_joules) == pytest.approx((2.04, 3.0, 2.04))
    assert (cost.total_s, cost.joules, cost.fits) == (pytest.approx(2.34), pytest.approx(7.08), True)


def test_jitter_stretches_seconds_and_joules_of_its_phase():
    cost = FlopsLatency().cost(WORK, load_profile("reference"), Jitter(compute=2, down=3, up=4))
    assert (cost.down_s, cost.compute_s, cost.up_s) == pytest.approx((3.06, 0.6, 4.08))
    assert cost.joules == pytest.approx(6.12 + 6.0 + 8.16)


def test_cost_until_the_middle_of_the_computation_is_the_download_and_half_of_it():
    """Half of 0.3 s come after 1.02 s of download: 1.17 s, and 1.5 of 3 J."""
    cost = FlopsLatency().cost(WORK, load_profile("reference")).until(1.17)
    assert (cost.down_s, cost.compute_s, cost.up_s) == pytest.approx((1.02, 0.15, 0.0))
    assert (cost.down_joules, cost.compute_joules, cost.up_joules) == pytest.approx((2.04, 1.5, 0.0))


def test_cost_until_before_the_start_is_nothing_and_after_the_end_is_all():
    cost = FlopsLatency().cost(WORK, load_profile("reference"))
    assert cost.until(-1.0).joules == 0
    assert cost.until(100.0) == cost


# LTE in round numbers: three round trips of 0.02 s, 1e-7 J per byte down and 6e-7 up, 1 W for 0.2 s after a transfer.
PHONE = replace(
    load_profile("reference"),
    setup_round_trips=3,
    rx_joules_per_byte=1e-7,
    tx_joules_per_byte=6e-7,
    tail_watts=1.0,
    tail_s=0.2,
)


def test_setup_takes_its_round_trips_before_each_transfer():
    """0.06 s and 1e7 bytes at 1e7/s; 0.06 s and 5e6 bytes at 5e6/s."""
    cost = FlopsLatency().cost(WORK, PHONE)
    assert (cost.down_s, cost.up_s) == pytest.approx((1.06, 1.06))


def test_transfer_takes_joules_for_its_seconds_and_for_its_bytes():
    """1.06 s at 2 W each way; 1e7 bytes at 1e-7 J are 1 J, 5e6 at 6e-7 J are 3 J."""
    cost = FlopsLatency().cost(WORK, PHONE)
    assert (cost.down_joules, cost.up_joules) == pytest.approx((2.12 + 1.0, 2.12 + 3.0))


def test_radio_stays_awake_beside_the_computation_and_after_the_upload():
    """0.2 of the 0.3 s of training, and 0.2 s after the upload, at 1 W; the round gets no longer."""
    cost, without = (FlopsLatency().cost(WORK, device) for device in (PHONE, replace(PHONE, tail_s=0.0)))
    assert (cost.compute_tail_s, cost.up_tail_s, cost.tail_s) == pytest.approx((0.2, 0.2, 0.4))
    assert (cost.tail_joules, cost.joules - without.joules) == pytest.approx((0.4, 0.4))
    assert cost.total_s == without.total_s


def test_upload_ends_a_tail_that_is_longer_than_the_computation():
    """min(11.6, 0.3) + 11.6 = 11.9 s at 1.06 W: 12.614 J, four times all else on that device (3.12 + 3 + 5.12 J)."""
    cost = FlopsLatency().cost(WORK, replace(PHONE, tail_s=11.6, tail_watts=1.06))
    assert (cost.tail_s, cost.tail_joules) == pytest.approx((11.9, 12.614))
    assert cost.joules == pytest.approx(12.614 + 3.12 + 3.0 + 5.12)


def test_computation_takes_the_joules_that_the_latency_model_says():
    class PerPass(FlopsLatency):
        def compute_joules(self, work, device, compute_s):
            return 0.5 * work.passes[0].forwards + compute_s

    assert FlopsLatency().compute_joules(WORK, PHONE, 0.3) == pytest.approx(3.0)
    assert PerPass().cost(WORK, PHONE, Jitter(compute=2)).compute_joules == pytest.approx(50.6)


@pytest.mark.parametrize(
    ("elapsed_s", "tail_s", "down_share", "up_share"),
    [
        (0.53, 0.0, 0.5, 0.0),  # in the middle of the download
        (1.16, 0.1, 1.0, 0.0),  # 0.1 s into the computation
        (1.33, 0.2, 1.0, 0.0),  # 0.27 s into it: the tail is over
        (1.89, 0.2, 1.0, 0.5),  # in the middle of the upload, which has no tail then
        (2.42, 0.4, 1.0, 1.0),  # at the end
    ],
)
def test_client_that_stops_pays_the_tail_until_then(
    elapsed_s: float, tail_s: float, down_share: float, up_share: float
):
    """Download, computation and upload end at 1.06, 1.36 and 2.42 s."""
    cost = FlopsLatency().cost(WORK, PHONE)
    spent = cost.until(elapsed_s)
    assert (spent.tail_s, spent.tail_joules) == pytest.approx((tail_s, tail_s))
    assert (spent.down_share, spent.up_share) == pytest.approx((down_share, up_share))
    assert spent.down_joules == pytest.approx(3.12 * down_share)
    assert spent.up_joules == pytest.approx(5.12 * up_share)
    assert spent.until(elapsed_s) == spent


def test_work_of_one_byte_too_many_does_not_fit():
    too_much = Work(peak_memory_bytes=2**32 + 1)
    assert not FlopsLatency().cost(too_much, load_profile("reference")).fits


def test_work_survives_json():
    assert Work.from_dict(WORK.to_dict()) == WORK
