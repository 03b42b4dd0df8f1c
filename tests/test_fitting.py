"""Cost columns, bounds, and the fit of prices to measured milliseconds."""

from dataclasses import replace

import numpy as np
import pytest

from devices.errors import DeviceError
from devices.latency.calibrate import Backend, basis_of, calibrate, prices_of
from devices.latency.columns import COLUMNS, IS_CALL, NUM_COLUMNS, TABLE_KINDS, Physics, as_matrix, counts, from_0_1
from devices.latency.fitting import Problems, predict, solve
from devices.latency.learn_priors import start_of
from devices.latency.prior import Facts, Prior, Sample, choose_networks, learn, left_out, problems_of
from devices.profile import load_profile

PHYSICS = Physics(macs_per_s=10e9, bytes_per_s=10e9, isa="arm", threads=1, clock_ghz=2.0)
PRIOR = replace(start_of("mobile")[0], sigma=0.05)


def networks(number: int, seed: int = 0) -> np.ndarray:
    """Counts of random networks, between 1 and 100 million multiply-adds of every kind, [number, 17]."""
    rng = np.random.default_rng(seed)
    found = np.exp(rng.uniform(np.log(1e6), np.log(1e8), (number, NUM_COLUMNS)))
    found[:, IS_CALL] = rng.integers(1, 100, (number, 3))
    return found


def sample(prices: np.ndarray, number: int = 40, noise: float = 0.0, seed: int = 0) -> Sample:
    rows = networks(number, seed)
    ms = predict(rows, prices) * np.exp(noise * np.random.default_rng(seed + 1).standard_normal(number))
    return Sample("d", tuple(f"n{i}" for i in range(number)), rows, ms, PHYSICS, Facts())


def typical() -> np.ndarray:
    return calibrate(None, PRIOR, PHYSICS, Facts(), "forward").prices


# --- columns -------------------------------------------------------------------------------------------------------


def test_counts_are_sums_of_the_layer_table():
    """Batch 3: multiply-adds and activations times 3, weights and calls once; operations of pools are free."""
    table = np.zeros((len(TABLE_KINDS), 4))
    table[TABLE_KINDS.index("conv3x3")] = [100, 10, 7, 1]
    table[TABLE_KINDS.index("conv")] = [200, 20, 5, 2]
    table[TABLE_KINDS.index("pool")] = [99, 4, 0, 1]
    table[TABLE_KINDS.index("foldable")] = [50, 6, 8, 3]
    named = dict(zip(COLUMNS, counts(table, 3), strict=True))
    assert (named["ps_per_mac.conv3x3"], named["ps_per_mac.conv"]) == (300, 600)
    assert named["ps_per_activation.dense"] == 90
    assert (named["ps_per_activation.pool"], named["ps_per_activation.elementwise"]) == (12, 18)
    assert (named["ps_per_weight.layers"], named["us_per_call.layers"], named["us_per_call.rest"]) == (20, 3, 4)
    folded = dict(zip(COLUMNS, counts(table, 3, fused=True), strict=True))
    assert (folded["ps_per_activation.elementwise"], folded["us_per_call.rest"]) == (0, 1)
    with pytest.raises(DeviceError, match="batch must be 1 or more, got 0"):
        counts(table, 0)
    with pytest.raises(DeviceError, match="batch must be at most 2147483647, got a number of thousands of digits"):
        counts(table, 10**5000)


@pytest.mark.parametrize("fused", [False, True])
def test_prices_of_cells_and_of_columns_agree(fused: bool):
    table = np.random.default_rng(0).uniform(1, 100, (len(TABLE_KINDS), 4))
    prices = np.random.default_rng(1).uniform(1, 2, NUM_COLUMNS)
    scaled = table * [4, 4, 1, 1]
    assert (scaled * as_matrix(prices, fused)).sum() == pytest.approx(counts(table, 4, fused) @ prices)


def test_units_are_those_of_the_datasheet():
    """10 GMAC/s: 1e-7 ms a multiply-add; a core streams 2 bytes a cycle, 4 GB/s at 2 GHz: 1e-6 ms for 4 bytes."""
    units = PHYSICS.units("forward")
    assert units[0] == pytest.approx(1e-7)
    assert units[COLUMNS.index("ps_per_activation.pool")] == pytest.approx(1e-6)
    assert units[IS_CALL] == pytest.approx([1e-3] * 3)
    step = PHYSICS.units("train_step")
    assert step[0] == pytest.approx(3e-7)
    assert step[COLUMNS.index("ps_per_weight.layers")] == pytest.approx(6e-6)


def test_bounds_are_nature():
    """No multiply-add above the peak (four times it for Winograd), no weight above the memory, calls within 0.3 ms."""
    low, high = PHYSICS.bounds("forward")
    assert low[0] == pytest.approx(0.25e-7)
    assert low[1:6] == pytest.approx([1e-7] * 5)
    assert low[COLUMNS.index("ps_per_weight.layers")] == pytest.approx(4e-7)
    assert high[IS_CALL] == pytest.approx([0.3] * 3)
    assert replace(PHYSICS, winograd=False).bounds("forward")[0][0] == pytest.approx(1e-7)
    step_low, _ = PHYSICS.bounds("train_step")
    assert step_low[0] == pytest.approx(3e-7)
    assert step_low[IS_CALL] == pytest.approx([0.01] * 3)
    assert replace(PHYSICS, isa="x86").bounds("train_step")[0][IS_CALL] == pytest.approx([0.002] * 3)
    assert np.all(low < high)


def test_old_tables_keep_their_sums():
    rows = np.random.default_rng(0).uniform(1, 9, (7, 4))
    assert np.sum(from_0_1(rows.tolist())) == pytest.approx(rows.sum())


# --- fit -----------------------------------------------------------------------------------------------------------


def test_exact_rows_give_the_prices_back():
    rng = np.random.default_rng(3)
    true = np.clip(typical() * np.exp(rng.normal(0, 0.5, NUM_COLUMNS)), *PHYSICS.bounds("forward"))
    own = sample(true, 60)
    problems = problems_of([own], replace(PRIOR, sigma=0.002))
    fitted = solve(problems).prices[0]
    assert np.abs(predict(own.counts, fitted) / own.milliseconds - 1).max() < 0.005
    shares = (own.counts * true).mean(axis=0) / predict(own.counts, true).mean()
    assert np.abs(fitted / true - 1)[shares > 0.03].max() < 0.05


def test_prices_stay_inside_their_bounds():
    """Rows that are ten times faster than the peak allows end at the bound, not below."""
    low, _ = PHYSICS.bounds("forward")
    own = sample(low / 10, 30)
    fitted = calibrate(own, PRIOR, PHYSICS, Facts(), "forward").prices
    assert np.all(fitted >= low * (1 - 1e-9))


def test_one_gross_outlier_hardly_moves_the_fit():
    own = sample(typical(), 30, noise=0.02)
    ms = own.milliseconds.copy()
    ms[7] *= 10
    clean, dirty = (
        solve(problems_of([replace(own, milliseconds=times)], PRIOR)).prices[0] for times in (own.milliseconds, ms)
    )
    others = np.arange(30) != 7
    assert np.abs(predict(own.counts, dirty) / predict(own.counts, clean) - 1)[others].max() < 0.05


def test_without_rows_there_is_the_prior_and_with_one_a_scale():
    """A device twice as slow in everything: one measured network brings most of that to the others."""
    covariance = np.eye(NUM_COLUMNS) * 0.05**2 + 0.5**2
    shared = replace(PRIOR, covariance=covariance)
    own = sample(2 * typical(), 20)
    assert calibrate(None, shared, PHYSICS, Facts(), "forward").networks == 0
    one = replace(own, networks=own.networks[:1], counts=own.counts[:1], milliseconds=own.milliseconds[:1])
    prices, _ = prices_of(one, shared, Backend("ncnn", fused=True))
    fitted = calibrate(one, shared, PHYSICS, Facts(), "forward").prices
    ratio = predict(own.counts, fitted) / own.milliseconds
    assert np.abs(ratio - 1).max() < 0.1
    assert prices.basis == "one row"
    assert [basis_of(n) for n in (0, 1, 3, 10)] == ["datasheet", "one row", "few rows", "rows"]


def test_launches_hide_behind_work_by_p():
    prices = np.zeros(NUM_COLUMNS)
    prices[0], prices[-3] = 1.0, 1.0
    rows = np.zeros((1, NUM_COLUMNS))
    rows[0, 0], rows[0, -3] = 3.0, 4.0
    assert predict(rows, prices, 2.0) == pytest.approx([5.0])
    assert predict(rows, prices) == pytest.approx([7.0])


def test_slopes_of_the_fit_are_those_of_finite_differences():
    """The fit ends where the loss has no slope: moving any free price a little only makes it larger."""
    own = sample(typical(), 25, noise=0.1)
    problems = problems_of([own], replace(PRIOR, overlap=2.0))
    fitted = solve(problems)
    x = np.log(fitted.prices[0])

    def loss(logs: np.ndarray) -> float:
        r = (np.log(predict(own.counts, np.exp(logs), 2.0)) - problems.log_ms[0]) / problems.sigma[0]
        d = logs - problems.mean[0]
        return float((4 * np.log1p((r / 2) ** 2)).sum() + d @ problems.precision @ d)

    free = (fitted.prices[0] > problems.low[0] * 1.001) & (fitted.prices[0] < problems.high[0] * 0.999)
    slopes = [(loss(x + 1e-5 * e) - loss(x - 1e-5 * e)) / 2e-5 for e in np.eye(NUM_COLUMNS)[free]]
    assert np.abs(slopes).max() < 0.02


def test_groups_take_a_factor_of_their_own():
    """Rows of a space that are all three times as slow move its factor, not the prices."""
    own = sample(typical(), 40)
    groups = tuple("space" if i % 2 else "" for i in range(40))
    ms = own.milliseconds * np.where([g == "space" for g in groups], 3.0, 1.0)
    fitted = solve(problems_of([replace(own, milliseconds=ms, groups=groups)], PRIOR))
    assert fitted.factors[0, 0] == pytest.approx(3.0, rel=0.05)


def test_masked_rows_count_for_nothing():
    own = sample(typical(), 20)
    wrong = replace(own, milliseconds=own.milliseconds * np.where(np.arange(20) < 10, 1.0, 50.0))
    mask = np.where(np.arange(20) < 10, 1.0, 0.0)
    half = replace(own, networks=own.networks[:10], counts=own.counts[:10], milliseconds=own.milliseconds[:10])
    one, other = solve(problems_of([wrong], PRIOR, [mask])), solve(problems_of([half], PRIOR))
    np.testing.assert_allclose(one.prices, other.prices, rtol=1e-6)


def test_many_problems_at_once_are_each_alone():
    samples = [sample(typical() * f, 12, noise=0.1, seed=i) for i, f in enumerate((0.8, 1.0, 1.6))]
    together = solve(problems_of(samples, PRIOR)).prices
    for own, prices in zip(samples, together, strict=True):
        np.testing.assert_allclose(solve(problems_of([own], PRIOR)).prices[0], prices, rtol=1e-4)


# --- prior ---------------------------------------------------------------------------------------------------------


def test_a_prior_learns_the_level_and_what_moves_together():
    """Devices that are all 3 times as slow as the start says, and differ in one common factor."""
    rng = np.random.default_rng(0)
    samples = []
    for number in range(24):
        own = sample(3 * np.exp(rng.normal(0, 0.8)) * typical(), 40, noise=0.02, seed=number)
        samples.append(replace(own, device=f"d{number}"))
    learned = learn(samples, PRIOR)
    level = np.exp(learned.mean(Facts(), PHYSICS.units("forward"))) / typical()
    assert np.median(level[:6]) == pytest.approx(3.0, rel=0.3)
    spread = np.sqrt(np.diag(learned.covariance))
    correlation = (learned.covariance / np.outer(spread, spread))[:6, :6][np.triu_indices(6, 1)]
    assert correlation.mean() > 0.3
    assert learned.devices == 24


def test_priors_come_back_from_yaml():
    read = Prior.from_dict(replace(PRIOR, errors={0: 0.3, 3: 0.16}).to_dict())
    np.testing.assert_allclose(read.covariance, PRIOR.covariance, atol=1e-5)
    np.testing.assert_allclose(read.effects, PRIOR.effects, atol=1e-4)
    assert read.errors == {0: 0.3, 3: 0.16}


def test_left_out_networks_leave_with_all_their_rows():
    """Two rows of one network that contradict all others are predicted from the others: both are far off."""
    own = sample(typical(), 20)
    ms = own.milliseconds.copy()
    ms[:2] *= 3
    doubled = replace(own, networks=("same", "same", *own.networks[2:]), milliseconds=ms)
    errors = left_out([doubled], PRIOR)[0]
    assert errors[:2] == pytest.approx([2 / 3] * 2, abs=0.03)


def test_networks_to_measure_are_chosen_without_a_time():
    own = sample(typical(), 15)
    other = replace(own, milliseconds=own.milliseconds[::-1].copy())
    assert choose_networks(own, PRIOR, 4) == choose_networks(other, PRIOR, 4)
    assert len(set(choose_networks(own, PRIOR, 4))) == 4


def test_problems_hold_what_samples_say():
    own = sample(typical(), 3)
    problems = problems_of([own], PRIOR)
    assert isinstance(problems, Problems)
    np.testing.assert_array_equal(problems.counts[0], own.counts)
    assert problems.mask.tolist() == [[1.0, 1.0, 1.0]]


def test_rows_of_one_batch_do_not_say_what_weights_take():
    """Steps of networks whose weights grow with their work: the memory bounds what the rows cannot tell."""
    shipped = {name: load_profile(name) for name in ("raspberry_pi_4", "raspberry_pi_5")}
    for profile in shipped.values():
        step, bytes_per_s = profile.latency.step, profile.memory_bytes_per_s
        assert step.batches[0] == step.batches[1]
        weights = step.matrix[TABLE_KINDS.index("fc")][2]
        assert weights <= 1.001 * 8 * 6 * 4e3 / bytes_per_s  # ms: eight times six passes over four bytes
