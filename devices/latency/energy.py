"""Joules of graphics cards: fitted to the rows that have them, and carried to other cards by watts and peak."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from devices.errors import DeviceError
from devices.latency.models import macs_and_bytes
from devices.latency.tables import RUNTIMES, Setting, Tables


@dataclass(frozen=True)
class CardEnergy:
    """The energy of a card: joules = base_w x seconds + joules_per_mac x multiply-adds + joules_per_byte x bytes."""

    base_w: float
    joules_per_mac: float
    joules_per_byte: float

    def of(self, card: Mapping[str, float], measured: Mapping[str, float]) -> CardEnergy:
        """Scales to another card: watts above idle by its range from idle to limit, arithmetic by the peak too."""
        ranges = (card["limit_w"] - card["idle_w"]) / (measured["limit_w"] - measured["idle_w"])
        base_w = card["idle_w"] + (self.base_w - measured["idle_w"]) * ranges
        return CardEnergy(
            max(card["idle_w"], base_w),
            self.joules_per_mac * ranges * measured["gmacs"] / card["gmacs"],
            self.joules_per_byte * ranges * measured["mem_gbs"] / card["mem_gbs"],
        )


def energy_columns(tables: Tables, setting: Setting, seconds: np.ndarray) -> np.ndarray:
    """Returns seconds, multiply-adds and bytes of each row, [rows, 3]; a training step does three passes' work."""
    times = 3.0 if setting.phase == "train_step" else 1.0
    rows = []
    for name, batch, s in zip(setting.sample.networks, setting.batches, seconds, strict=True):
        network, _, size = name.partition("@")
        table = tables.table(network, size, RUNTIMES[setting.runtime].fused)
        assert table is not None
        macs, moved = macs_and_bytes(tuple(map(tuple, table)), int(batch))
        rows.append([s, times * macs, times * moved])
    return np.array(rows)


def fit_energy(columns: np.ndarray, joules: np.ndarray) -> np.ndarray:
    """Fits watts, joules per multiply-add and joules per byte, non-negative, by least relative error, [3]."""
    scaled = columns / joules[:, None]
    units = scaled.max(axis=0)
    return np.asarray(nnls(scaled / units, np.ones(len(joules)))[0] / units)


def card_energy(tables: Tables, settings: Sequence[Setting]) -> CardEnergy:
    """Fits the energy of cards to all rows with joules: fp32, forward passes and steps."""
    columns, joules = [], []
    for s in settings:
        known = np.isfinite(s.energy_mj)
        if s.sample.physics.isa == "gpu" and s.precision == "fp32" and known.any():
            columns.append(energy_columns(tables, s, s.sample.milliseconds / 1e3)[known])
            joules.append(s.energy_mj[known] / 1e3)
    if not joules:
        raise DeviceError(f"{tables.folder}: no row of a card has energy_mj, which profiles of cards need")
    return CardEnergy(*fit_energy(np.concatenate(columns), np.concatenate(joules)).tolist())
