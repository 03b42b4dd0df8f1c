"""`fedsim devices calibrate`: prices of a device from measurements of one's own, be it a single one."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from devices.texts import quoted
from fedsim.cli.options import MAX_COUNT, check_place, parse_whole

if TYPE_CHECKING:
    from devices.cost import ModelCost
    from devices.latency.calibrate import Calibration
    from devices.latency.columns import Physics
    from devices.latency.prices import Prices
    from devices.latency.prior import Facts, Sample
    from devices.profile import DeviceProfile

NEEDED = ("network", "input", "batch", "phase", "ms")
KNOWN = (*NEEDED, "threads")  # others are the user's own
MAX_MS = 1e9  # eleven days
PHASES = ("forward", "train_step")
PRECISIONS = ("fp32", "fp16", "tf32")
CONTRADICTION = 2.0  # between times of one pass: more than a device that is warm or busy makes of it
ALLOWED_BELOW = 0.8  # of the least milliseconds: a peak is known to a clock that boosts, and a row to its clock
ALIKE = 0.8  # from which on a column's name is one that is known, with a slip
LEAVE_OUT = 3  # networks from which on leaving one out says something


@dataclass(frozen=True)
class Row:
    """A line of the file: a pass that was measured."""

    network: str
    input: str
    batch: int
    phase: str
    ms: float
    threads: int
    cost: ModelCost

    @property
    def layers(self) -> tuple[tuple[float, ...], ...]:
        """Returns the layer table of the network."""
        assert self.cost.layers is not None
        return self.cost.layers


def calibrate(
    device: Annotated[str, typer.Argument(help="A shipped device, or the path of a profile, with a peak.")],
    rows: Annotated[Path, typer.Option(help="CSV with network, input, batch, phase, ms and, if not all, threads.")],
    out: Annotated[Path | None, typer.Option(help="Profile to write; DEVICE_calibrated.yaml when left out.")] = None,
    runtime: Annotated[str | None, typer.Option(help="Of forward rows, e.g. ncnn; the device's when left out.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, fp16, or tf32 of a card; the device's when left out.")
    ] = None,
    num_classes: Annotated[
        int, typer.Option(help="Outputs of networks that are model configs.", min=1, max=MAX_COUNT)
    ] = 10,
) -> None:
    """Fit a device's prices to rows of yours, pulled to what its datasheet says; one row is enough to begin with.

    A network is a model config of fedsim, a network of the zoo, torchvision.models.NAME, or FILE.py:CLASS.

    Example: fedsim devices calibrate raspberry_pi_4 --rows mine.csv --out my-pi.yaml
    """
    import yaml

    from devices.errors import DeviceError
    from devices.profile import load_profile, parse_profile
    from devices.texts import file_name
    from devices.writing import write_atomic
    from fedsim.settings.permissions import keep_out_beside

    keep_out_beside(rows)
    profile = load_profile(device)
    path = out or Path(f"{file_name(profile.name.replace('@', '_'))}_calibrated.yaml")
    check_place("--out", path, (".yaml", ".yml"))
    if path.exists():
        raise DeviceError(f"{path} is there already; name another profile with --out or remove it")
    physics = _physics(profile, device)
    measured = read_rows(rows, num_classes, profile.threads)
    fitted = _fit(profile, *physics, measured, runtime, precision)
    tree = _tree(device, path.stem, profile, measured[0].threads, fitted, rows)
    after = parse_profile(tree, str(path))
    about = f"# {profile.name}, calibrated with {rows.name} by `fedsim devices calibrate`.\n"
    write_atomic(path, about + yaml.safe_dump(tree, sort_keys=False, width=120, default_flow_style=None))
    _report(profile, after, measured, fitted, path)


def _report(
    before: DeviceProfile, after: DeviceProfile, rows: Sequence[Row], fitted: Sequence[_Section], path: Path
) -> None:
    from fedsim.report.terminal import console, table

    columns = ("network", "input", "batch", "phase", "measured ms", "before", "after")
    compared = table(*columns, left=("network",))
    for row in rows:
        figures = []
        for profile in (before, after):
            prices = next(section for section in fitted if section.phase == row.phase).of(profile)
            figures.append("-" if prices is None else _with_error(prices.ms(row.layers, row.batch), row.ms))
        compared.add_row(row.network, row.input, str(row.batch), row.phase, f"{row.ms:.4g}", *figures)
    shown = console()
    shown.print(compared)
    for section in fitted:
        found, prices = section.calibration, section.prices
        text = f"{section.phase} ({prices.runtime}, {prices.precision}): {found.networks} network(s), {prices.basis}"
        if found.networks >= LEAVE_OUT and found.left_out_error is not None:
            text += f"; leave-one-out error {found.left_out_error:.1%}"
        shown.note(text)
    for name, low, high in _contradictions(rows):
        text = f"rows contradict each other: {name} takes {low:g} ms and {high:g} ms; keep the one that is right"
        shown.say(text)
    use = f"use it: 'fleet.devices={{{path.resolve()}: 1}}'"
    shown.say(f"profile: {path} ({use})")


def _contradictions(rows: Sequence[Row]) -> list[tuple[str, float, float]]:
    """Returns passes that rows time more than `CONTRADICTION` apart, with their least and largest milliseconds."""
    timed: dict[str, list[float]] = {}
    for row in rows:
        timed.setdefault(f"{row.phase} of {row.network} ({row.input}, batch {row.batch})", []).append(row.ms)
    return [(name, min(ms), max(ms)) for name, ms in timed.items() if max(ms) > CONTRADICTION * min(ms)]


def _with_error(predicted: float, measured: float) -> str:
    return f"{predicted:.4g} ({predicted / measured - 1:+.0%})"


# --- the file ------------------------------------------------------------------------------------------------------


def read_rows(path: Path, num_classes: int, threads: int) -> list[Row]:
    """Returns the rows of a file, with their networks traced.

    Args:
        path: of the CSV.
        num_classes: of networks that are model configs.
        threads: of the device: of rows that do not name theirs.

    Raises:
        DeviceError: naming the line, for what is missing or wrong.
    """
    from devices.errors import DeviceError, FileError, unknown
    from devices.reading import read_text

    try:
        text = read_text(path).removeprefix("\ufeff")
        reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
        lines = [(reader.line_num, line) for line in reader]
        columns = reader.fieldnames or ()
    except (FileError, csv.Error) as error:
        raise DeviceError(f"{path}: cannot be read as CSV: {error}") from None
    if missing := [column for column in NEEDED if column not in columns]:
        raise DeviceError(f"{path}: lacks the column {missing[0]!r}; a file of rows has {', '.join(NEEDED)}")
    for column in columns:
        if column and columns.count(column) > 1:
            raise DeviceError(f"{path}: has the column {quoted(column)} twice")
        if column not in KNOWN and get_close_matches(column.strip().lower(), KNOWN, n=1, cutoff=ALIKE):
            raise DeviceError(f"{path}: {unknown('column', column, KNOWN)}")
    if not lines:
        raise DeviceError(f"{path}: has no rows; one measured network is the least")
    found: list[Row] = []
    known: dict[tuple[str, str], ModelCost] = {}
    for number, line in lines:
        where, values = f"{path}, line {number}", {key: (line[key] or "").strip() for key in NEEDED}
        if None in line:  # csv's name for what is beyond the columns
            cells = len(columns) + len(line[None])
            raise DeviceError(f"{where}: has {cells} cells and not {len(columns)}; a decimal is written 5.6, not 5,6")
        if values["phase"] not in PHASES:
            raise DeviceError(f"{where}: {unknown('phase', values['phase'], PHASES)}")
        key = (values["network"], values["input"])
        if key not in known:
            try:
                known[key] = _cost(*key, num_classes)
            except ValueError as error:
                raise DeviceError(f"{where}: {error}") from None
        own = _whole(where, "threads", (line.get("threads") or "").strip() or str(threads))
        if own > threads:
            raise DeviceError(f"{where}: threads must be at most the device's {threads}, got {own}")
        if found and own != found[0].threads:
            raise DeviceError(
                f"{where}: all rows of a file must have the same threads, got {found[0].threads} and {own}"
            )
        batch, ms = _whole(where, "batch", values["batch"]), _positive(where, "ms", values["ms"])
        found.append(Row(*key, batch, values["phase"], ms, own, known[key]))
    return found


def _whole(where: str, column: str, text: str) -> int:
    from devices.errors import DeviceError

    digits = text.lstrip("0") if text.isdecimal() else ""
    if not digits or len(digits) > len(str(MAX_COUNT)) or int(digits) > MAX_COUNT:
        raise DeviceError(
            f"{where}: {column} must be a whole number of at least 1 and at most {MAX_COUNT}, got {quoted(text)}"
        )
    return int(digits)


def _positive(where: str, column: str, text: str) -> float:
    from devices.errors import DeviceError

    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= MAX_MS:
        raise DeviceError(f"{where}: {column} must be a number above 0 and at most {MAX_MS:g}, got {quoted(text)}")
    return value


def _cost(name: str, size: str, num_classes: int) -> ModelCost:
    """Builds a network for an input "3x224x224" and traces it.

    Raises:
        ValueError: where there is no such network, or it does not take that input.
    """
    from devices.enrol.zoo import IMAGE, SEQUENCE, ZOO
    from devices.errors import DeviceError
    from fedsim.cli.devices.own_model import named_model, trace_cost
    from fedsim.errors import ConfigError

    try:
        shape = tuple(parse_whole("input", n) for n in size.split("x"))
    except ConfigError:
        raise DeviceError(f"input must be the shape of one example, e.g. 3x224x224, got {quoted(size)}") from None
    if name in ZOO:
        own = SEQUENCE if ZOO[name].tokens else IMAGE
        if shape != own:
            raise DeviceError(f"zoo network {name!r} takes input {'x'.join(map(str, own))}, got {size}")
        return trace_cost(named_model(name))
    return trace_cost(named_model(name, shape, num_classes, by_user=False))


# --- the fit -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Section:
    """Prices that were fitted, for some sections of a profile."""

    phase: str
    names: tuple[str, ...]  # keys of `latency`
    prices: Prices
    calibration: Calibration

    def of(self, profile: DeviceProfile) -> Prices | None:
        """Returns the prices that a profile has for these passes."""
        from devices.latency.models import device_prices

        prices = device_prices(profile)
        return {"inference": prices.inference, "forward": prices.forward, "step": prices.step}[self.names[0]]


def _physics(profile: DeviceProfile, device: str) -> tuple[Physics, Facts]:
    from devices.errors import DeviceError
    from devices.latency.limits import physics_of

    if profile.kind == "mcu":
        raise DeviceError(f"device {device!r} is a microcontroller; calibrate takes devices that run a framework")
    known = physics_of(profile)
    if known is None:
        raise DeviceError(
            f"device {device!r} has no peak (compute.peak_gmacs_per_s), which prices are bounded by; add it to its "
            "profile: threads times GHz times multiply-adds per cycle"
        )
    return known


def _fit(
    profile: DeviceProfile,
    physics: Physics,
    facts: Facts,
    rows: Sequence[Row],
    runtime: str | None,
    precision: str | None,
) -> list[_Section]:
    """Fits prices for each phase that was measured."""
    import numpy as np

    from devices.latency.calibrate import Backend, prices_of
    from devices.latency.columns import counts
    from devices.latency.limits import OF_CARDS
    from devices.latency.models import MAX_FRAMEWORK_THREADS
    from devices.latency.prior import Sample, shipped_prior
    from devices.latency.tables import RUNTIMES

    card, own = physics.isa == "gpu", None if profile.latency is None else profile.latency.inference
    training, asked, inferred = _choices(profile, card, runtime, precision)
    share = rows[0].threads / profile.threads
    physics = replace(physics, macs_per_s=physics.macs_per_s * share, threads=rows[0].threads)
    facts = replace(facts, threads=rows[0].threads)
    found = []
    for phase in PHASES:
        own_rows = [row for row in rows if row.phase == phase]
        if not own_rows:
            continue
        step = phase == "train_step"
        name = training if step else asked
        kind, half = RUNTIMES[name], not step and inferred == "fp16"
        tensor_cores = inferred == "tf32"  # torch takes them for steps too
        gain = OF_CARDS["tf32"] if tensor_cores else 2 if half and not card else 1
        computed = "tf32" if tensor_cores else "fp16" if half else "fp32"
        here = replace(
            physics, winograd=kind.winograd, macs_per_s=physics.macs_per_s * gain, element_bytes=2 if half else 4
        )
        most = facts.threads if card or kind.family == "mobile" else MAX_FRAMEWORK_THREADS
        known = replace(facts, half_precision=half, threads=min(facts.threads, most))
        prior = shipped_prior(("gpu" if card else "cpu") + "_train_step" if step else kind.family)
        sample = Sample(
            profile.name,
            tuple(f"{row.network}@{row.input}" for row in own_rows),
            np.stack([counts(row.layers, row.batch, kind.fused) for row in own_rows]),
            np.array([row.ms for row in own_rows]),
            here,
            known,
            "train_step" if step else "forward",
        )
        _check_possible(own_rows, sample)
        backend = Backend(name, kind.fused, computed)
        prices, reached = prices_of(sample, prior, backend, [row.batch for row in own_rows])
        deployed = name != training or own is None or own.runtime in (name, "help")
        passes = (("inference",) if deployed else ()) + (("forward",) if name == training else ())
        prices = replace(prices, threads=facts.threads)
        found.append(_Section(phase, ("step",) if step else passes, prices, reached))
    return found


def _choices(profile: DeviceProfile, card: bool, runtime: str | None, precision: str | None) -> tuple[str, str, str]:
    """Returns the runtime of steps, and runtime and precision of forward passes: as given, else usual on the device."""
    from devices.errors import DeviceError, unknown
    from devices.latency.tables import RUNTIMES

    own = None if profile.latency is None else profile.latency.inference
    training = "pytorch_cuda" if card else "pytorch"
    # The runtime of HELP's tables is not known, so nobody can measure with it.
    fitting = [name for name, kind in RUNTIMES.items() if card == (kind.family == "gpu_forward") and name != "help"]
    usual = own.runtime if own is not None and own.runtime in fitting else training if card else "ncnn"
    asked = runtime or usual
    if asked not in fitting:
        raise DeviceError(unknown(f"runtime for {profile.name}", asked, fitting))
    inferred = precision or (own.precision if own is not None and own.runtime == asked else "fp32")
    if inferred not in PRECISIONS:
        raise DeviceError(unknown("precision", inferred, PRECISIONS))
    if inferred == "tf32" and not card:
        raise DeviceError(f"precision=tf32 is for cards, and {profile.name} is none; take fp32 or fp16")
    return training, asked, inferred


def _check_possible(rows: Sequence[Row], sample: Sample) -> None:
    """Refuses rows that the peak or the bandwidth does not allow: a wrong unit, batch or network, mostly."""
    from devices.errors import DeviceError

    least = sample.physics.least_ms(sample.counts, sample.phase)
    for row, least_ms in zip(rows, least.tolist(), strict=True):
        if row.ms < ALLOWED_BELOW * least_ms:
            raise DeviceError(
                f"{row.phase} of {row.network} ({row.input}, batch {row.batch}): ms must be at least {least_ms:.3g} "
                f"on {sample.device}, whose peak and bandwidth allow no less, got {row.ms:g}; check its unit and "
                "batch, or the peak of the profile"
            )


def _tree(
    device: str, name: str, profile: DeviceProfile, threads: int, fitted: Sequence[_Section], rows: Path
) -> dict[str, Any]:
    """Returns the device's profile with the sections that were fitted."""
    from devices.profile import PRICED, SHIPPED, as_variant
    from devices.profile_file import read_yaml

    path = Path(device)
    if path.suffix.lower() not in (".yaml", ".yml"):
        base, _, variant = device.partition("@")
        tree = as_variant(read_yaml(SHIPPED / f"{base}.yaml"), variant, device)
    else:
        tree = read_yaml(path)
    tree = {key: value for key, value in tree.items() if key != "variants"} | {"name": name}
    latency = dict(tree.get("latency", {}))
    if "scaled" in latency:  # its prices stand in another device's file
        facts = profile.latency
        latency = {key: prices.to_dict() for key in PRICED if (prices := getattr(facts, key)) is not None}
    source = f"fedsim devices calibrate, {time.strftime('%Y-%m-%d')}, {rows.name}"
    for section in fitted:
        for key in section.names:
            latency[key] = {**section.prices.to_dict(), "provenance": "measured", "source": source}
    tree["latency"] = latency
    if threads != profile.threads:
        assert profile.peak_macs_per_s is not None
        peak = float(f"{profile.peak_macs_per_s / 1e9 * threads / profile.threads:.4g}")
        of = {"provenance": "derived", "source": f"{profile.name}'s, for the {threads} thread(s) of {rows.name}"}
        tree["compute"] = {
            **tree["compute"],
            "threads": {"value": threads, **of},
            "peak_gmacs_per_s": {"value": peak, **of},
        }
    return tree
