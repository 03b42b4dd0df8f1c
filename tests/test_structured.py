"""Latency of any network from a handful of measured ones, and the closed-form tables of two search spaces."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from devices.errors import DeviceError
from devices.latency.structured import StructuredPredictor, choose_references, predict_ms, prior_of
from devices.nas.tables import fbnet_features, nb201_connected, nb201_features, network_features, network_macs
from devices.trace import FEATURES, KINDS, trace


def networks(count: int, features: int = 6, seed: int = 0) -> np.ndarray:
    """Random features over several orders of magnitude, with the constant."""
    rng = np.random.default_rng(seed)
    return np.column_stack([rng.uniform(0.1, 1, (count, features)) * 10.0 ** np.arange(features), np.ones(count)])


PLANTED = np.array([2.0, 0.0, 0.03, 0.001, 0.0, 2e-5, 1.5])


def test_planted_coefficients_are_found():
    phi = networks(200)
    predictor = StructuredPredictor.fit(phi[:40], phi[:40] @ PLANTED)
    assert predictor.predict(phi[40:]) == pytest.approx(phi[40:] @ PLANTED, rel=0.01)
    assert predictor.coefficients * phi.mean(axis=0) == pytest.approx(PLANTED * phi.mean(axis=0), rel=0.05, abs=0.05)
    assert (predictor.coefficients >= 0).all()
    assert predictor.sigma < 0.01
    assert predictor.measurements == 40


def test_one_gross_outlier_changes_little():
    phi = networks(120)
    ms = phi @ PLANTED
    measured = ms[:20].copy()
    measured[3] *= 20
    robust = StructuredPredictor.fit(phi[:20], measured, robust=True).predict(phi[20:])
    plain = StructuredPredictor.fit(phi[:20], measured, robust=False).predict(phi[20:])
    assert np.abs(robust / ms[20:] - 1).mean() < 0.05
    assert np.abs(plain / ms[20:] - 1).mean() > np.abs(robust / ms[20:] - 1).mean()


def test_prior_of_a_relative_helps_with_four_measurements():
    """The device is its source at a third of the speed; the prior knows the shape, the fit the scale."""
    phi = networks(100)
    source = StructuredPredictor.fit(phi, phi @ PLANTED)
    prior = prior_of([source], [float((phi @ PLANTED).mean())])
    ms = 3 * (phi @ PLANTED)
    error = [
        np.abs(StructuredPredictor.fit(phi[:4], ms[:4], p, zoo=phi).predict(phi[4:]) / ms[4:] - 1).mean()
        for p in (None, prior)
    ]
    assert error[1] < 0.01 < error[0]


def test_columns_that_never_vary_go_into_the_constant():
    phi = np.column_stack([np.full(9, 7.0), np.arange(1.0, 10), np.ones(9)])
    predictor = StructuredPredictor.fit(phi, 2 * phi[:, 1] + 5)
    assert predictor.coefficients == pytest.approx([0, 2, 5], rel=0.05)


def test_unusable_measurements_are_refused():
    phi = networks(5)
    for wrong in (np.nan, -1.0, 0.0, np.inf):
        with pytest.raises(DeviceError, match="positive numbers of milliseconds, but network 2 took"):
            StructuredPredictor.fit(phi, np.array([1, 1, wrong, 1, 1]))
    with pytest.raises(DeviceError, match="5 networks needs one latency"):
        StructuredPredictor.fit(phi, np.ones(4))
    with pytest.raises(DeviceError, match="finite numbers"):
        StructuredPredictor.fit(phi * np.nan, np.ones(5))
    with pytest.raises(DeviceError, match="constant 1"):
        StructuredPredictor.fit(phi[:, :-1], np.ones(5))
    with pytest.raises(DeviceError, match="same number of features"):
        predict_ms(np.ones((2, 3)), phi)


def test_predictor_survives_json():
    predictor = StructuredPredictor.fit(networks(9), networks(9) @ PLANTED)
    again = StructuredPredictor.from_dict(json.loads(json.dumps(predictor.to_dict())))
    assert again.coefficients.tolist() == predictor.coefficients.tolist()
    assert (again.sigma, again.measurements) == (predictor.sigma, 9)
    with pytest.raises(DeviceError, match="sigma"):
        StructuredPredictor.from_dict({"coefficients": [1.0]})
    with pytest.raises(DeviceError, match="from 0"):
        StructuredPredictor.from_dict({**predictor.to_dict(), "coefficients": [-1.0]})


def test_a_thousand_devices_are_priced_at_once():
    coefficients = np.random.default_rng(0).random((1000, FEATURES))
    network = trace(nn.Linear(3, 2), torch.zeros(1, 3)).features(8)[None]
    start = time.perf_counter()
    ms = predict_ms(coefficients, network)
    assert time.perf_counter() - start < 0.05
    assert ms[:, 0] == pytest.approx(coefficients @ network[0])


def test_chosen_references_span_what_random_ones_miss():
    """Only two of 200 networks have the last kind of layer; without them its cost cannot be known."""
    phi = networks(200)
    phi[:, 5] = 0
    phi[[17, 140], 5] = 1e5, 2e5
    picks = choose_references(phi, np.arange(200), 8)
    assert 140 in picks
    assert len(set(picks)) == 8
    assert np.linalg.matrix_rank(phi[picks] / phi.max(axis=0)) == 7
    assert set(choose_references(phi, np.arange(50, 60), 10)) == set(range(50, 60))
    with pytest.raises(DeviceError, match="cannot choose 3 references from 2"):
        choose_references(phi, np.arange(2), 3)


def test_first_pick_lies_furthest_out():
    """Standardised 0, 1, 5 (mean 2): 5 has the largest x'x; then 0 is the furthest from it."""
    phi = np.array([[0.0, 1], [1, 1], [5, 1]])
    assert choose_references(phi, np.arange(3), 2).tolist() == [2, 0]


def test_the_expected_error_is_small_only_for_features_that_explain():
    phi = networks(30)
    other = networks(30, seed=1)
    explained, other = (StructuredPredictor.fit(features, phi @ PLANTED) for features in (phi, other))
    assert explained.sigma < 0.02 < other.sigma


def test_cells_are_connected_by_any_path_without_none():
    """Edges 0>1, 0>2, 1>2, 0>3, 1>3, 2>3; 0 is none."""
    ops = np.array([[0, 0, 0, 1, 0, 0], [1, 0, 1, 0, 0, 4], [1, 0, 1, 0, 0, 0], [0, 0, 3, 0, 3, 3], [0, 2, 0, 0, 1, 1]])
    assert nb201_connected(ops).tolist() == [True, True, False, False, True]


def test_table_of_one_cell_is_its_layers_by_hand():
    """One 3x3 convolution: 5 * 9 * (16*16*1024 + 32*32*256 + 64*64*64) MACs beyond those of the empty network.

    Empty: the stem 442368; reductions 1179648 + 2359296 + 131072 each; the classifier 640: 7783040.
    """
    empty, one = np.zeros((1, 6), int), np.array([[3, 0, 0, 0, 0, 0]])
    assert network_macs("nb201", empty) == 7783040
    assert network_macs("nb201", one) == 7783040 + 45 * 3 * 262144
    rows = (nb201_features(one) - nb201_features(empty))[0, :-1].reshape(len(KINDS), 4)
    assert rows[0].tolist() == [45 * 3 * 262144, 10 * (16384 + 8192 + 4096), 45 * (256 + 1024 + 4096), 15]
    assert not rows[1:].any()
    assert nb201_features(np.array([[3, 1, 0, 4, 3, 2]]), "counts").tolist() == [[1, 1, 2, 1, 1]]


def test_fbnet_skip_is_an_add_or_a_pointwise_layer():
    """All skips: 17 keep the shape with 512 to 16384 elements, five change it and are pointwise, as is the head."""
    rows = fbnet_features(np.full((1, 22), 8))[0, :-1].reshape(len(KINDS), 4)
    assert (rows[KINDS.index("elementwise"), 3], rows[KINDS.index("pointwise"), 3]) == (16, 6 + 1)
    assert fbnet_features(np.full((1, 22), 8), "counts").tolist() == [[0] * 8 + [1]]


def test_wrong_networks_are_refused():
    with pytest.raises(DeviceError, match="0 to 4, got 0 to 5"):
        nb201_features(np.array([[0, 0, 0, 0, 0, 5]]))
    with pytest.raises(DeviceError, match=r"operation ids \[n, 22\]"):
        fbnet_features(np.zeros((1, 6), int))
    with pytest.raises(DeviceError, match="feature set 'count'; did you mean 'counts'"):
        nb201_features(np.zeros((1, 6), int), "count")
    with pytest.raises(DeviceError, match="unknown space 'darts'"):
        network_features("darts", np.zeros((1, 6), int))


@pytest.mark.data
def test_macs_are_those_of_the_table():
    if "FEDSIM_NAS" not in os.environ:
        pytest.skip("FEDSIM_NAS names no folder with latency tables")
    with np.load(Path(os.environ["FEDSIM_NAS"]) / "help_nb201.npz") as file:
        assert (network_macs("nb201", file["arch_ops"]) == file["macs"]).all()
