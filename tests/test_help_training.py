"""HELP: meta-training on a made-up space, and the files that its weights are kept in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from help_space import SETTINGS
from scipy.stats import spearmanr

from devices.errors import DeviceError
from devices.latency.help.encodings import encode
from devices.latency.help.predictor import (
    HelpPredictor,
    gate_divergence,
    gate_posterior,
    label_range,
    labels,
    source_labels,
)
from devices.latency.help.training import HelpSettings, HelpTraining, first_weights, meta_train
from devices.latency.help.weights import HelpWeights, flatten_weights, load_weights, save_weights
from devices.latency.spaces import Space

# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_weights_survive_their_file(tmp_path: Path, suffix: str):
    weights, path = replace(first_weights("nb201", SETTINGS), devices=("pixel3",)), tmp_path / f"weights.{suffix}"
    if suffix == "npz":
        np.savez(path, **{key: tensor.numpy() for key, tensor in flatten_weights(weights).items()})
    else:
        save_weights(weights, path, {"episode": 3})
    read = flatten_weights(load_weights(path, "nb201"))
    assert all(torch.equal(read[key], tensor) for key, tensor in flatten_weights(weights).items())
    assert load_weights(path, "nb201").devices == (("pixel3",) if suffix == "safetensors" else ())
    with pytest.raises(DeviceError, match=r"has no array 'model.meta_learner.fc1.weight'"):
        load_weights(path, "fbnet")


def _array(change: str, arrays: dict) -> dict:
    key = "task_lr.meta_learner.fc3.bias"
    if change == "missing":
        return {k: v for k, v in arrays.items() if k != key}
    if change == "unknown":
        return arrays | {"task_lr.meta_learner.fc9.bias": np.zeros(3, np.float32)}
    values = {"shape": np.zeros(7, np.float32), "nan": np.full(200, np.nan, np.float32), "text": np.array(["a"] * 200)}
    return arrays | {key: values[change] if change != "pickle" else np.array([{}] * 200)}


@pytest.mark.parametrize(
    "change, message",
    [
        ("missing", "has no array 'task_lr.meta_learner.fc3.bias'"),
        ("unknown", "'task_lr.meta_learner.fc9.bias' is no array of HELP weights"),
        ("shape", r"must be \(200,\) for space nb201, got \(7,\)"),
        ("nan", "must hold finite floats"),
        ("text", "cannot be read as HELP weights"),
        ("pickle", "cannot be read as HELP weights"),
    ],
)
def test_wrong_weight_files_are_refused(tmp_path: Path, change: str, message: str):
    arrays = {key: tensor.numpy() for key, tensor in flatten_weights(first_weights("nb201", SETTINGS)).items()}
    np.savez(tmp_path / "weights.npz", **_array(change, arrays))
    with pytest.raises(DeviceError, match=message):
        load_weights(tmp_path / "weights.npz", "nb201")


@pytest.mark.parametrize("name", ["none.npz", "broken.npz", "broken.safetensors"])
def test_files_that_are_no_weights_are_refused(tmp_path: Path, name: str):
    if name != "none.npz":
        (tmp_path / name).write_bytes(b"not weights")
    with pytest.raises(DeviceError, match="cannot be read as HELP weights"):
        load_weights(tmp_path / name, "nb201")


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tiny: Space) -> HelpWeights:
    return meta_train(tiny, replace(SETTINGS, episodes=50, validate_every=50))


def test_resumed_training_equals_a_straight_one_byte_for_byte(tiny: Space, tmp_path: Path):
    straight, stopped = tmp_path / "straight.safetensors", tmp_path / "stopped.safetensors"
    looks: list[int] = []
    weights = meta_train(tiny, SETTINGS, straight, lambda look: looks.append(look.episode))
    meta_train(tiny, replace(SETTINGS, episodes=4), stopped)
    meta_train(tiny, SETTINGS, stopped)
    assert looks == [4, 8]
    assert straight.read_bytes() == stopped.read_bytes()
    assert load_weights(straight, "nb201").devices == weights.devices == ("a", "b", "c")
    read = flatten_weights(load_weights(straight, "nb201"))
    assert all(torch.equal(read[key], tensor) for key, tensor in flatten_weights(weights).items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["stopped.safetensors", "straight.safetensors"]


def test_checkpoint_of_another_training_is_refused(tiny: Space, tmp_path: Path):
    path = tmp_path / "training.safetensors"
    meta_train(tiny, replace(SETTINGS, episodes=4), path)
    with pytest.raises(DeviceError, match="name another file"):
        meta_train(tiny, replace(SETTINGS, seed=4), path)
    with pytest.raises(DeviceError, match="another table"):
        meta_train(replace(tiny, latency_ms=tiny.latency_ms * 2), SETTINGS, path)
    with pytest.raises(DeviceError, match="other devices"):
        meta_train(replace(tiny, split=replace(tiny.split, valid=())), SETTINGS, path)
    save_weights(first_weights("nb201", SETTINGS), path)
    with pytest.raises(DeviceError, match="no HELP training"):
        meta_train(tiny, SETTINGS, path)


def test_trainings_that_cannot_be_are_refused(tiny: Space):
    with pytest.raises(DeviceError, match="episodes of 3 devices need as many sources; nb201 has 2"):
        HelpTraining(tiny, replace(SETTINGS, devices=3))
    with pytest.raises(DeviceError, match="support and query are 81 networks a device, a pool has only"):
        HelpTraining(tiny, replace(SETTINGS, query=71))
    with pytest.raises(DeviceError, match="two source devices or more, got 1"):
        HelpTraining(replace(tiny, split=replace(tiny.split, source=("a",))), replace(SETTINGS, devices=1))
    with pytest.raises(ValueError, match="support must be at least 2"):
        HelpSettings(support=1)


def test_support_of_an_episode_is_the_references_and_drawn_networks(tiny: Space):
    """Its query has no references; the labels' scale comes from the other source device."""
    training = HelpTraining(tiny, SETTINGS)
    x, y, x_query, y_query, _ = training._batch()
    assert (x.shape[:2], y.shape, x_query.shape[:2], y_query.shape) == ((2, 20), (2, 20), (2, 40), (2, 40))
    assert all(torch.equal(networks[:10], encode("nb201", tiny.ops[:10])) for networks in x)
    assert not any(set(source.pool) & set(tiny.references) for source in training.sources)
    np.testing.assert_allclose(training.sources[0].known, source_labels(tiny, ["b"]))


def test_split_without_validation_devices_is_validated_on_its_sources(tiny: Space):
    found = HelpTraining(replace(tiny, split=replace(tiny.split, valid=())), SETTINGS)
    assert found.weights.devices == ("a", "b")
    assert -1 <= found.validate() <= 1


def test_patience_ends_training_after_looks_without_a_better_one(tiny: Space):
    training = HelpTraining(tiny, replace(SETTINGS, patience=2, learning_rate=0.0))
    training.step()
    for _ in range(3):
        assert not training.done
        training.losses = [1.0]
        training.look()
    assert training.done


def test_quirk_counts_the_last_device_s_divergence_once_per_device(tiny: Space):
    """With kl_weight 1 and equal draws, the two losses differ by 2 KL_last - (KL_0 + KL_1) / 2."""
    runs = [HelpTraining(tiny, replace(SETTINGS, kl_weight=1.0, kl_reference_quirk=quirk)) for quirk in (True, False)]
    h = HelpTraining(tiny, SETTINGS)._batch()[-1]
    divergence = gate_divergence(*gate_posterior(first_weights("nb201", SETTINGS).modulator, h))
    difference = runs[0].step() - runs[1].step()
    assert difference == pytest.approx(float(2 * divergence[1] - divergence.mean()), rel=1e-4)


def test_meta_training_lowers_the_error_on_the_validation_device(tiny: Space, trained: HelpWeights):
    """Labels of 800 networks that no device trained with, on a device that no episode saw."""
    support, judged, ms = tiny.pool("c")[:20:2], tiny.judged("c"), tiny.latency("c")

    def error(weights: HelpWeights) -> tuple[float, float]:
        fitted = HelpPredictor.fit(weights, ms[tiny.references], tiny.ops[support], ms[support], seed=0)
        found = fitted.labels(tiny.ops[judged])
        wanted = labels(ms[judged], *label_range(ms[support], ms[tiny.references])).numpy()
        return float(np.mean((found - wanted) ** 2)), float(spearmanr(found, wanted).statistic)

    before, after = error(first_weights("nb201", SETTINGS)), error(trained)
    assert after[0] < before[0] / 2
    assert after[1] > max(before[1], 0.8)


def test_calibrated_predictions_have_the_support_s_mean(tiny: Space, trained: HelpWeights):
    """A least-squares line passes through the mean of its points, if it rises: a few episodes see to that."""
    support, ms = tiny.ops[20:30], tiny.latency("c")[20:30]
    fitted = HelpPredictor.fit(trained, tiny.latency("c")[:10], support, ms, seed=0)
    assert fitted.predict(support).mean() == pytest.approx(ms.mean())
    half = np.arange(10) < 5
    fitted = HelpPredictor.fit(trained, tiny.latency("c")[:10], support, ms, seed=0, typical=half)
    assert fitted.predict(support[half]).mean() == pytest.approx(ms[half].mean())
