"""Secure aggregation: its price by hand and by Flower's primitives, who must be left, and whom it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import every_way
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt, generate_shared_key
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen, share_keys_plaintext_concat
from flwr.supercore.primitives.asymmetric import generate_key_pairs, private_key_to_bytes, public_key_to_bytes
from test_methods import federate

from devices.cost import Work
from devices.profile import load_profile
from devices.units import size
from fedsim.cli.explain import explained
from fedsim.errors import ConfigError
from fedsim.grid.edge import TOO_FEW
from fedsim.messages import secagg
from fedsim.messages.secagg import SecureAggregation, encrypted_bytes, share_bytes
from fedsim.report.page import write_page
from fedsim.report.rounds import weights_sha256
from fedsim.report.text import closing_lines
from fedsim.settings.build import instantiate

MASKED = "uplink=secagg"


def test_sizes_are_those_of_flowers_primitives():
    private, public = generate_key_pairs()
    key, seed = private_key_to_bytes(private), bytes(32)
    assert (len(public_key_to_bytes(public)), len(key), len(seed)) == (
        secagg.PUBLIC_KEY_BYTES,
        secagg.PRIVATE_KEY_BYTES,
        secagg.SEED_BYTES,
    )
    shares = {secret: create_shares(secret, 2, 3) for secret in (key, seed)}
    assert all({len(s) for s in made} == {share_bytes(len(secret))} for secret, made in shares.items())
    assert combine_shares(shares[key][:2]) == key  # two of three are enough
    plain = share_keys_plaintext_concat(1, 2, shares[seed][0], shares[key][0])
    assert len(plain) == secagg.HEADER_BYTES + share_bytes(len(seed)) + share_bytes(len(key))
    token = encrypt(generate_shared_key(private, public), plain)
    assert len(token) == encrypted_bytes(len(plain))


def test_masks_of_a_pair_cancel_and_have_a_number_for_each_weight():
    """Both draw from the key that they share, and one of them adds what the other takes away."""
    (one, of_one), (two, of_two) = generate_key_pairs(), generate_key_pairs()
    keys = generate_shared_key(one, of_two), generate_shared_key(two, of_one)
    masks = [pseudo_rand_gen(key, 2**24, [(53,)])[0] for key in keys]
    assert masks[0].shape == (53,)
    assert len(set(masks[0].tolist())) > 40
    assert not np.any(masks[0] - masks[1])


def test_the_overhead_by_hand():
    """Of 10 clients each has 9 neighbours, or 4; 1000 numbers of 16 bits, and 4 more for a sum of 10.

    Shares: 4 + 16 * 3 = 52 of a seed, 4 + 16 * 20 = 324 of a key; with 20 in front 396, as a token
    4 * ceil((57 + 400) / 3) = 612.
    """
    part = SecureAggregation(bits=16, neighbours=None).overhead(1000, 10)
    assert part.up_bytes == 2 * 215 + 9 * 612 + 2500 + 9 * (8 + 52)
    assert part.down_bytes == 9 * 2 * 215 + 9 * 612 + 9 * 8
    assert (part.round_trips, part.operations) == (3, 21)
    few = SecureAggregation(bits=8, neighbours=4).overhead(1000, 10)
    assert few.up_bytes == 2 * 215 + 4 * 612 + 1500 + 4 * 60
    assert few.operations == 11


def test_the_sum_stays_and_the_price_is_added():
    """Of 5 clients with 53 weights each 54 numbers of 19 bits travel: 129 bytes in the place of 212."""
    plain, masked = federate("rounds=1"), federate(MASKED, "rounds=1")
    assert weights_sha256(plain.federation.arrays) == weights_sha256(masked.federation.arrays)
    for one, other in zip(masked.clients, plain.clients, strict=True):
        assert one.work.up_bytes == 2 * 215 + 4 * 612 + 129 + 4 * 60
        assert one.work.down_bytes - other.work.down_bytes == 4 * (430 + 612 + 8)
        assert one.work.flops - other.work.flops == 2 * 54 * 11
        assert one.work.round_trips == 3
        assert one.cost.up_s > other.cost.up_s


def test_round_trips_of_the_link_are_waited_for():
    latency = instantiate({"latency": {"_target_": "devices.cost.FlopsLatency"}}, "latency")
    device = load_profile("raspberry_pi_4")
    waited = latency.cost(Work(round_trips=3), device).up_s - latency.cost(Work(), device).up_s
    assert waited == pytest.approx(3 * device.rtt_s)
    assert waited > 0
    assert Work.from_dict(json.loads(json.dumps(Work(round_trips=3).to_dict()))) == Work(round_trips=3)
    assert "round_trips" not in Work().to_dict()  # files of other runs are as they were


@pytest.mark.parametrize("threshold, lost", [(0.4, False), (0.7, True)])
def test_a_round_with_too_few_left_brings_nothing(threshold: float, lost: bool):
    """Of 4 that begin, 2 are needed, and the others count as dropped out: half of them are left."""
    given = ("cohort=2", "over_selection=2", "fleet=phones", "rounds=1", f"uplink.threshold={threshold}")
    made = federate(MASKED, *given)
    assert (weights_sha256(made.federation.arrays) == weights_sha256(made.first)) == lost
    reasons = [client.reason for client in made.clients]
    assert reasons.count(TOO_FEW) == (2 if lost else 0)
    assert all(client.work.up_bytes for client in made.clients)  # it was paid for


@pytest.mark.parametrize("method", ["krum", "qfedavg", "fedmix", "dp_fedavg", "scaffold"])
def test_strategies_that_look_at_single_updates_are_refused(method: str):
    with pytest.raises(ConfigError, match=r"uplink=secagg hides what single clients send, and \w+ looks at it"):
        federate(f"method={method}", MASKED)


def test_masked_runs_of_clients_that_clip_are_the_same_in_every_way(settings, tmp_path: Path):
    runs = every_way(settings("method=dp_client_adaptive", MASKED, "uplink.neighbours=1", "rounds=3"), tmp_path)
    assert all(rounds == runs["one"] for rounds in runs.values())


def test_a_run_says_what_masks_take_beside_the_numbers(run, tmp_path: Path):
    """What a client sends is its masked numbers, and keys and shares: both are said, and together all of its upload."""
    plain = run("rounds=1", out=tmp_path / "plain")
    summary = run(MASKED, "rounds=1", out=tmp_path / "masked")
    found, clients = summary["masking"], summary["outcomes"]["completed"]
    assert summary["up_bytes"] == clients * (found["masked_bytes"] + found["up_bytes"])
    assert summary["down_bytes"] - plain["down_bytes"] == clients * found["down_bytes"]
    lines = closing_lines(summary, tmp_path / "masked")
    beside = f"{size(found['up_bytes'])} of keys and shares up and {size(found['down_bytes'])} down"
    assert lines[1].endswith(f"beside them {beside}")
    assert lines[0].startswith("fedavg on blobs, fleet uniform, uplink secagg: ")
    assert "keys and shares" in write_page(tmp_path / "masked").read_text()


def test_what_a_client_sends_is_explained_in_the_bytes_that_are_counted():
    pair = encrypted_bytes(secagg.HEADER_BYTES + share_bytes(secagg.SEED_BYTES) + share_bytes(secagg.PRIVATE_KEY_BYTES))
    share = secagg.ID_BYTES + share_bytes(secagg.SEED_BYTES)
    sends = explained("uplink", "secagg")["sends"]
    for count in (secagg.PUBLIC_KEY_BYTES, pair, share, secagg.ID_BYTES):
        assert f"{count} bytes" in sends
