"""Makes the shipped device profiles and priors from public tables, so that facts and not guesses are in the YAML.

`devices/catalogue.yaml` lists the devices, with the figures that no table has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from devices.errors import DeviceError
from devices.latency.calibrate import Backend, Calibration, calibrate, prices_by_kind, prices_of
from devices.latency.columns import FOLDABLE, IS_MAC, MAC_ROWS, TABLE_KINDS, Physics, counts
from devices.latency.energy import card_energy
from devices.latency.learn_priors import PRIOR_NETWORKS, Watch, learn_priors, start_of
from devices.latency.models import macs_and_bytes, reference_table
from devices.latency.prices import Prices
from devices.latency.prior import Facts, Sample, recalled
from devices.latency.tables import LITTLE, RUNTIMES, Setting, Tables, cluster
from devices.profile_text import as_yaml
from devices.writing import write_atomic

HERE = Path(__file__).parent
MIN_NETWORKS = 5  # of a setting with all big cores that is preferred to one with fewer threads
USUAL_THREADS = 4  # of runtimes on phones and boards, whatever their cores
PROVENANCE = {"r": "recalled", "a": "assumed", "d": "dataset"}
HOST_WATTS = 20.0  # of the host beside a busy card
HELP_SOURCE = "HELP's released tables (MIT), ms of one forward pass; D-optimal choice among connected networks"
HELP_EMBEDDING = "HELP's released tables (MIT): its ten reference networks of NAS-Bench-201"


class Builder:
    """Builds profile trees from tables.

    Args:
        folder: with the public tables.
        watch: called with a line of text for each step.
    """

    def __init__(self, folder: str | Path, watch: Watch = lambda text: None):
        self.tables, self.watch = Tables(folder), watch
        self.settings = self.tables.settings()
        self.catalogue = yaml.safe_load((HERE / "catalogue.yaml").read_text())
        self.help_rows = yaml.safe_load((HERE / "help_rows.yaml").read_text())
        self.priors = learn_priors(self.settings, watch)
        self.energy = card_energy(self.tables, self.settings)

    def trees(self) -> dict[str, dict[str, Any]]:
        """Returns the profile of every device in the catalogue, by name."""
        made = {}
        for name, entry in self.catalogue["devices"].items():
            self.watch(f"building {name}")
            made[name] = self.tree(name, entry)
        return made

    def tree(self, name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Returns one profile as YAML will hold it."""
        facts = {**self.catalogue["defaults"].get(entry["kind"], {}), **entry}
        key, kind = str(facts.get("key", name)), str(facts["kind"])
        if kind == "mcu":
            return self._microcontroller(name, facts)
        chosen = self._inference(key)
        compute: dict[str, Any] = {}
        latency: dict[str, Any] = {}
        variants: dict[str, Any] = {}
        isa, core = str(facts.get("isa", "none")), ""
        if not facts.get("estimator"):
            threads = self._threads(key)
            physical = self._physical(key, threads)
            if physical is None:
                raise DeviceError(f"device {key!r} needs a peak in the tables or in devices/peaks.yaml, and has none")
            physics, known = physical
            isa = known.isa if known.isa in ("arm", "x86", "gpu") else "none"
            core = "" if isa == "gpu" else self._core(key)
            compute = self._compute(key, physics, known, threads)
            latency = self._latency(name, key, kind, facts, chosen, physics, known)
            single = None if threads == 1 else self._single_thread(key)
            if single is not None:
                variants["1t"] = self._variant(single, facts)
        if facts.get("help"):
            rows = self.help_rows[name]
            latency["references"] = {**rows["references"], **_sourced("dataset", HELP_SOURCE)}
            latency["embedding"] = {"ms": rows["embedding"], **_sourced("dataset", HELP_EMBEDDING)}
        rate = self._rate(name)
        tree: dict[str, Any] = {"name": name, "kind": kind}
        tree |= {"soc": self._soc(key)} if self._soc(key) else {}
        tree |= {"isa": isa} if isa != "none" else {}
        tree |= {"core": core} if core else {}
        jitter = _figure(facts["jitter"], "assumed", "design choice: .05 to .2")
        tree["compute"] = {"rate_gmacs_per_s": rate, "jitter_sigma": jitter, **compute}
        tree["memory"] = self._memory(key, facts)
        tree["network"] = {"link": facts["link"]}
        tree["power"] = self._power(key, kind, facts)
        tree["reliability"] = _reliability()
        if latency:
            tree["latency"] = latency
        if variants:
            tree["variants"] = variants
        return tree

    # --- which rows ---------------------------------------------------------------------------------------------------

    def _num_big_cores(self, key: str) -> int:
        cores = self.tables.cores(key)
        return len(cluster(cores, "big")) if cores else 1

    def _candidates(self, key: str, least: int) -> list[Setting]:
        found = [s for s in self.settings if s.device == key and s.phase == "forward" and s.cores != "little"]
        found = [s for s in found if s.family in ("mobile", "gpu_forward") and s.precision != "tf32"]
        return [s for s in found if s.num_networks >= least and s.sample.physics.isa in ("arm", "x86", "gpu", "none")]

    def _inference(self, key: str) -> Setting | None:
        """Returns the newest float run on all big cores; where it has too few networks, the setting with most."""
        many = min(self._num_big_cores(key), USUAL_THREADS)
        full = [s for s in self._candidates(key, MIN_NETWORKS) if s.threads >= many or s.family == "gpu_forward"]
        if full:
            return max(full, key=_newest)
        any_ = self._candidates(key, 1)
        return max(any_, key=lambda s: (s.num_networks, s.threads, s.date)) if any_ else None

    def _single_thread(self, key: str) -> Setting | None:
        found = [s for s in self._candidates(key, MIN_NETWORKS) if s.threads == 1 and s.family == "mobile"]
        return max(found, key=_newest, default=None)

    def _threads(self, key: str) -> int:
        """Returns the number of big cores, or the most threads of any training row."""
        trained = [s.threads for s in self.settings if s.device == key and s.phase == "train_step" and s.threads > 1]
        if trained:
            return max(trained)
        big = self.tables.cores(key) and cluster(self.tables.cores(key), "big")
        alike = [core for core in big or [] if core.ghz == big[0].ghz or core.name not in LITTLE]
        return max(1, len(alike))

    def _physical(self, key: str, threads: int) -> tuple[Physics, Facts] | None:
        if key in recalled()["cards"]:
            return self.tables.physics(key, "pytorch_cuda", 1, "all", "fp32", 2024)  # with what torch does by default
        return self.tables.physics(key, "ncnn", threads, "big", "fp32", 2024)

    # --- sections -----------------------------------------------------------------------------------------------------

    def _latency(
        self,
        name: str,
        key: str,
        kind: str,
        facts: Mapping[str, Any],
        chosen: Setting | None,
        physics: Physics,
        known: Facts,
    ) -> dict[str, Any]:
        made: dict[str, Any] = {}
        if chosen is not None:
            own = self._section(chosen)
            more = known.threads if chosen.family == "mobile" else chosen.threads
            enough = chosen.threads >= min(more, USUAL_THREADS)
            made["inference"] = own if enough else self._on_more_threads(chosen, own, more)
            made |= self._int8_over_float(chosen)
        elif facts.get("help"):
            made["inference"] = self._help_section(name, kind, physics, known)
        for key_of, phase in (("forward", "forward"), ("step", "train_step")):
            rows = self._training(key, phase, kind)
            if rows is not None:
                made[key_of] = self._section(rows)
        return made

    def _int8_over_float(self, chosen: Setting) -> dict[str, Any]:
        """Returns the ratio of int8 networks to the same ones in floating point, where both were measured."""
        ratio = self.tables.int8_over_float(chosen)
        if ratio is None:
            return {}
        source = f"{chosen.source}: {ratio.networks} networks in int8 and {chosen.precision}, {ratio.threads} threads"
        return {"int8_over_float": _figure(_round(ratio.value), "derived", source)}

    def _training(self, key: str, phase: str, kind: str) -> Setting | None:
        """Returns the setting of the training runtime: PyTorch in fp32 with most threads; None without rows."""
        found = [s for s in self.settings if s.device == key and s.phase == phase and s.runtime.startswith("pytorch")]
        found = [s for s in found if s.precision == "fp32" and s.num_networks >= MIN_NETWORKS]
        return max(found, key=lambda s: (s.threads, len(s.sample))) if found else None

    def _section(self, setting: Setting) -> dict[str, Any]:
        backend = Backend(setting.runtime, RUNTIMES[setting.runtime].fused, self._precision_of(setting))
        made, found = prices_of(setting.sample, self.priors[setting.family], backend, setting.batches)
        when = f", {setting.date}" if setting.date else ""
        source = f"{setting.source}{when}: {made.rows} rows; {_errors(found)}"
        return {**made.to_dict(), **_sourced("derived", source)}

    def _precision_of(self, setting: Setting) -> str:
        """Returns a setting's precision: rows that the tables call fp32 are TF32 where torch rounds by default."""
        by_default = recalled()["cards"].get(setting.device, {}).get("tf32_by_default", False)
        return "tf32" if by_default and setting.precision == "fp32" else setting.precision

    def _on_more_threads(self, setting: Setting, own: Mapping[str, Any], threads: int) -> dict[str, Any]:
        """Carries prices from fewer threads to all big cores, by what the prior says that threads change."""
        prior = self.priors[setting.family]
        few, phase = setting.sample, setting.phase
        known = self.tables.physics(setting.device, setting.runtime, threads, "big", setting.precision, few.facts.year)
        assert known is not None
        physics, facts = known
        change = prior.mean(facts, physics.units(phase)) - prior.mean(few.facts, few.physics.units(phase))
        prices = calibrate(few, prior, few.physics, few.facts, phase).prices * np.exp(change)
        low, high = physics.bounds(phase)
        error = None if prior.errors is None else prior.errors.get(1)
        made = Prices.of_columns(np.clip(prices, low, high), RUNTIMES[setting.runtime].fused)
        read = Prices.from_dict(own)
        made = replace(read, cells=made.cells, threads=threads, basis="threads", error=error)
        source = f"{own['source']}; on {few.facts.threads} thread(s), carried to {threads} by the prior"
        return {**made.to_dict(), **_sourced("derived", source)}

    def _help_section(self, name: str, kind: str, physics: Physics, known: Facts) -> dict[str, Any]:
        """Fits prices by kind to HELP's rows, whose runtime and threads are not stated."""
        rows = [
            (at.partition("@")[0], word, int(at.partition("@")[2]), float(ms))
            for at, networks in self.help_rows[name]["references"].items()
            for word, ms in networks.items()
        ]
        tables = np.stack([reference_table(space, word) for space, word, *_ in rows])
        ms = np.array([row[3] for row in rows])
        spaces = [row[0] for row in rows]
        batches = [row[2] for row in rows]
        if kind == "gpu":
            sample = Sample(
                name, tuple(f"{s}:{w}" for s, w, *_ in rows),
                np.stack([counts(t, b) for t, b in zip(tables, batches, strict=True)]), ms, physics, known,
            )  # fmt: skip
            made, found = prices_of(sample, self.priors["gpu_forward"], Backend("help", fused=False), batches)
            source = f"HELP's tables: {len(rows)} rows; median error on them {found.own_error:.1%}"
            return {**made.to_dict(), **_sourced("derived", source)}
        family, fused = ("cpu_forward", False) if kind == "server_cpu" else ("mobile", True)
        if fused:
            tables = tables.copy()
            tables[:, FOLDABLE] = 0.0
        cells, factors, error = prices_by_kind(tables, ms, spaces, self.priors[family], physics, known)
        macs = tables[:, MAC_ROWS, 0].sum(axis=1)
        made = Prices.of_cells(
            cells, runtime="help", threads=known.threads, basis="rows", rows=len(rows), networks=len(rows),
            batches=(1, 1), largest_macs=float(macs.max()), kinds=_kinds_of(tables),
        )  # fmt: skip
        spaces_text = ", ".join(f"{space} {factor:.2f}" for space, factor in factors.items())
        scales = f"with a factor for each space ({spaces_text})"
        source = f"HELP's tables: {len(rows)} rows; median error on them {error:.1%} {scales}"
        return {**made.to_dict(), **_sourced("derived", source)}

    def _variant(self, single: Setting, facts: Mapping[str, Any]) -> dict[str, Any]:
        physics = self.tables.physics(single.device, single.runtime, 1, single.cores, "fp32", 2024)
        assert physics is not None
        watts, idle = float(facts["compute_w"][0]), float(facts["idle_w"][0])
        one = round(idle + 0.45 * (watts - idle), 2)
        return {
            "compute": self._compute(single.device, *physics, 1),
            "power": {"compute_w": _figure(one, "assumed", "idle plus .45 of what all cores take above it")},
            "latency": {"inference": self._section(single)},
        }

    def _compute(self, key: str, physics: Physics, known: Facts, threads: int) -> dict[str, Any]:
        table = key in self.tables.devices.index
        row = self.tables.devices.loc[key] if table else None
        source = "recalled (devices/peaks.yaml)"
        provenance = "recalled"
        own = recalled()["cores"].get(key) or recalled()["cards"].get(key)
        if row is not None and isinstance(row.get("peak_derivation"), str) and not recalled()["cores"].get(key):
            source = f"{_words(row['peak_derivation'])}; {_words(row.get('peak_source'))}"
            provenance = "derived"
        card = recalled()["cards"].get(key, {})
        peak = physics.macs_per_s / (card.get("tf32_over_fp32", 1.0) if card.get("tf32_by_default") else 1.0)
        made: dict[str, float] = {"threads": threads} if physics.isa != "gpu" else {}
        made |= {"clock_ghz": physics.clock_ghz} if physics.isa != "gpu" else {}
        note = _words(row.get("mem_note")) if row is not None else ""
        given = bool(note) and row is not None and row.get("mem_gbs_theory") == row.get("mem_gbs_theory")
        listed = own or key in recalled()["bandwidths"]
        moved = note if given else "recalled (devices/peaks.yaml)" if listed else "usual of its kind"
        how = "recalled" if moved != "usual of its kind" else "assumed"
        return {
            **{k: _figure(v, provenance, source) for k, v in made.items()},
            "peak_gmacs_per_s": _figure(_round(peak / 1e9), provenance, source),
            "memory_gb_per_s": _figure(_round(physics.bytes_per_s / 1e9), how, moved),
        }

    def _memory(self, key: str, facts: Mapping[str, Any]) -> dict[str, Any]:
        ram = facts["ram_mb"]
        usable, runtime = facts["usable"], facts["runtime_mb"]
        return {
            "ram_mb": _figure(ram, "recalled", "as sold; other sizes exist for some"),
            "usable_fraction": _figure(usable[0], PROVENANCE[usable[1]], usable[2]),
            "runtime_mb": _figure(runtime[0], PROVENANCE[runtime[1]], runtime[2]),
        }

    def _power(self, key: str, kind: str, facts: Mapping[str, Any]) -> dict[str, Any]:
        if kind != "gpu":
            return {k: _figure(v[0], PROVENANCE[v[1]], v[2]) for k in ("compute_w", "idle_w") for v in [facts[k]]}
        cards = recalled()["cards"]
        card, measured = cards[key], cards["h100_sxm"]
        own = self.energy if key == "h100_sxm" else self.energy.of(card, measured)
        how, source = ("derived", "fitted to joules of the H100's own counter")
        if key != "h100_sxm":
            source = "the H100's, scaled by idle, limit, peak and bandwidth of this card"
        idle = card["idle_w"] + HOST_WATTS / 2
        return {
            "compute_w": _figure(
                card["limit_w"], "recalled", "limit of the card; joules are counted by base_w and work"
            ),
            "idle_w": _figure(idle, "assumed", "recalled idle of the card, and 10 W of the host"),
            "base_w": _figure(_round(own.base_w), how, source),
            "pj_per_mac": _figure(_round(own.joules_per_mac * 1e12), how, source),
            "pj_per_byte": _figure(_round(own.joules_per_byte * 1e12), how, source),
        }

    def _rate(self, name: str) -> dict[str, Any]:
        if name in self.help_rows:
            source = "HELP files, median NAS-Bench-201 net (51 M MACs), batch 1"
            return _figure(self.help_rows[name]["rate_gmacs_per_s"], "dataset", source)
        return _figure(None, "derived", "this profile's prices, median of ten NAS-Bench-201 networks, batch 1")

    def _core(self, key: str) -> str:
        cores = cluster(self.tables.cores(key), "big")
        return cores[0].name if cores else ""

    def _soc(self, key: str) -> str:
        if key in self.tables.devices.index:
            soc = self.tables.devices.loc[key].get("soc")
            if isinstance(soc, str):
                return soc
        for part in ("cores", "cards", "microcontrollers"):
            if key in recalled()[part]:
                return str(recalled()[part][key].get("soc", ""))
        return ""

    def _microcontroller(self, name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Builds a board from MLPerf Tiny's newest int8 results; watts are joules over seconds."""
        chip = recalled()["microcontrollers"][name]
        frame = self.tables._csv("mlperf_tiny.csv", "device", "network", "input", "ms", "energy_mj", "backend", "date")
        frame = frame[frame.device == facts["system"]]
        frame = frame[frame.date == frame.date.max()]
        timed = frame[frame.backend == "mlperf_tiny_performance"]
        drawn = frame[frame.energy_mj.notna()]
        watts = float(np.median(drawn.energy_mj / drawn.ms))
        clock = chip["clock_mhz"] / 1e3
        physics = Physics(1e9 * clock * chip["int8_macs_per_cycle"], 4e9 * clock, "mcu", 1, clock, 1, False)
        known = Facts(1, False, True, "other", 2024)
        tables = [self.tables.table(n, s, True) for n, s in zip(timed.network, timed.input.astype(str), strict=True)]
        sample = Sample(
            name, tuple(timed.network), np.stack([counts(t, 1, True) for t in tables if t is not None]),
            timed.ms.to_numpy(float), physics, known,
        )  # fmt: skip
        prior = start_of("mcu")[0]
        made, found = prices_of(sample, prior, Backend("mlperf_tiny", fused=True, precision="int8"))
        origin = f"MLPerf Tiny, {facts['system']}, {frame.date.iloc[0]}"
        source = f"{origin}: {found.networks} networks; {_errors(found)}"
        rate = float(np.median(sample.counts[:, IS_MAC].sum(1) / sample.milliseconds / 1e6))
        usable, runtime = facts["usable"], facts["runtime_mb"]
        recalled_source = "recalled (devices/peaks.yaml)"
        return {
            "name": name,
            "kind": "mcu",
            "soc": chip["soc"],
            "isa": "mcu",
            "core": chip["core"],
            "compute": {
                "rate_gmacs_per_s": _figure(_round(rate), "derived", "median of the four networks of MLPerf Tiny"),
                "jitter_sigma": _figure(facts["jitter"], "assumed", "bare metal"),
                "clock_ghz": _figure(clock, "dataset", "MLPerf Tiny, system description"),
                "peak_gmacs_per_s": _figure(_round(physics.macs_per_s / 1e9), "recalled", "int8, " + recalled_source),
                "memory_gb_per_s": _figure(_round(physics.bytes_per_s / 1e9), "recalled", "SRAM, a word a cycle"),
            },
            "memory": {
                "ram_mb": _figure(chip["sram_kb"] / 1024, "dataset", "SRAM, MLPerf Tiny, system description"),
                "usable_fraction": _figure(usable[0], PROVENANCE[usable[1]], usable[2]),
                "runtime_mb": _figure(runtime[0], PROVENANCE[runtime[1]], runtime[2]),
            },
            "network": {"link": facts["link"]},
            "power": {
                "compute_w": _figure(_round(watts), "dataset", f"energy over latency, {origin}"),
                "idle_w": _figure(_round(watts / 10), "assumed", "a tenth of the load"),
            },
            "reliability": _reliability(),
            "latency": {"inference": {**made.to_dict(), **_sourced("derived", source)}},
        }


def reference_tree() -> dict[str, Any]:
    """Builds the control device of the `uniform` fleet: round numbers, no jitter, no real device."""
    why = "round number of the control device"
    figures: Mapping[str, Mapping[str, float]] = {
        "compute": {
            "rate_gmacs_per_s": 5.0, "jitter_sigma": 0, "threads": 4, "clock_ghz": 2.0,
            "peak_gmacs_per_s": 40, "memory_gb_per_s": 20,
        },
        "memory": {"ram_mb": 4096, "usable_fraction": 1.0, "runtime_mb": 0},
        "network": {"down_mbps": 80, "up_mbps": 40, "rtt_ms": 20, "jitter_sigma": 0, "setup_round_trips": 1},
        "power": {"compute_w": 10, "rx_w": 2, "tx_w": 2, "idle_w": 1},
    }  # fmt: skip
    tree: dict[str, Any] = {"name": "reference", "kind": "host", "isa": "arm"}
    tree |= {part: {k: _figure(v, "assumed", why) for k, v in keys.items()} for part, keys in figures.items()}
    tree["reliability"] = _reliability()
    return tree


def write_all(builder: Builder, out: Path) -> list[Path]:
    """Writes every profile and the priors into folder `out` and returns the files."""
    from devices.profile import parse_profile

    (out / "profiles").mkdir(parents=True, exist_ok=True)
    written = []
    priors = {name: prior.to_dict() for name, prior in builder.priors.items()}
    text = "# Priors of prices by family of runtimes, learned by `fedsim devices build`; see latency/prior.py.\n"
    text += yaml.safe_dump(priors, sort_keys=False, width=160, default_flow_style=None)
    write_atomic(out / "priors.yaml", text)
    written.append(out / "priors.yaml")
    entries = builder.catalogue["devices"]
    for name, tree in {**builder.trees(), "reference": reference_tree()}.items():
        about = (
            entries[name]["about"] if name in entries else "The control device of the `uniform` fleet; no real device"
        )
        if tree["compute"]["rate_gmacs_per_s"]["value"] is None:
            tree["compute"]["rate_gmacs_per_s"]["value"] = 0.01  # until the profile can price: below every peak
            profile = parse_profile(tree, name)
            tree["compute"]["rate_gmacs_per_s"]["value"] = _round(_usual_rate(profile))
        path = out / "profiles" / f"{name}.yaml"
        write_atomic(path, as_yaml(tree, about))
        written.append(path)
    return written


def _usual_rate(profile: Any) -> float:
    """Returns the median rate in 1e9 multiply-adds per s on ten networks of NAS-Bench-201."""
    from devices.latency.models import device_prices

    prices = device_prices(profile).inference
    rates = []
    for word in _nb201_words():
        table = tuple(map(tuple, reference_table("nb201", word)))
        macs, _ = macs_and_bytes(table, 1)
        rates.append(macs / prices.ms(table, 1) / 1e6)
    return float(np.median(rates))


@lru_cache(maxsize=1)
def _nb201_words() -> tuple[str, ...]:
    rows = yaml.safe_load((HERE / "help_rows.yaml").read_text())
    return tuple(rows["pixel3"]["references"]["nb201@1"])


def _figure(value: Any, provenance: str, source: str) -> dict[str, Any]:
    return {"value": value, "provenance": provenance, "source": source}


def _reliability() -> dict[str, Any]:
    return {"failures_per_min": _figure(0, "assumed", "no figure at hand; crashes are off")}


def _sourced(provenance: str, source: str) -> dict[str, str]:
    return {"provenance": provenance, "source": source}


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def _newest(setting: Setting) -> tuple[bool, str, bool, int]:
    """Returns a sort key: many networks before few, new runs before old, fp16 before fp32 of the same day."""
    sample = setting.sample
    return setting.num_networks >= PRIOR_NETWORKS, setting.date, setting.precision == "fp16", len(sample)


def _errors(found: Calibration) -> str:
    own = "unknown" if found.own_error is None else f"{found.own_error:.1%}"
    return f"median error on them {own}, left out {_percent(found.left_out_error)}"


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"


def _words(value: Any) -> str:
    return " ".join(value.split()) if isinstance(value, str) else ""


def _kinds_of(tables: np.ndarray) -> tuple[str, ...]:
    return tuple(kind for i, kind in enumerate(TABLE_KINDS) if tables[:, i].any())
