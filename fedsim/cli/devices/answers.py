"""`fedsim devices list`, `show` and `predict`: the devices, what a network takes on them, how far that is known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsim.cli.completing import complete_device
from fedsim.cli.options import MAX_COUNT, check_picture
from fedsim.report import strict_json

if TYPE_CHECKING:
    from devices.latency.predictions import Pass, Prediction
    from devices.latency.prices import Prices
    from devices.profile import DeviceProfile

Model = Annotated[
    str,
    typer.Option(
        help="A model config of fedsim, a network of the zoo, torchvision.models.NAME, or FILE.py:NAME, a class or a "
        "function without arguments; the file is run."
    ),
]
InputShape = Annotated[
    str | None, typer.Option(help="Shape of one example; 3,32,32 when left out, 3,224,224 for torchvision.")
]
Classes = Annotated[
    int | None, typer.Option(help="Size of the output; 10 when left out, 1000 for torchvision.", min=1, max=MAX_COUNT)
]
Tokens = Annotated[int | None, typer.Option(help="The model takes sequences of so many token ids.", min=1, max=10**5)]
Kind = Annotated[
    str | None, typer.Option(help="Only devices of a kind: phone, sbc, laptop, desktop, gpu, mcu, and so on.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
MAX_NAMED = 6  # devices in a line under a table
WIDE = 112  # columns of a terminal that have room for the chips
UNKNOWN = "?"


def list_devices(kind: Kind = None, as_json: AsJson = False) -> None:
    """List the shipped devices.

    Prices say where those of a forward pass come from, from how many networks, and the error to expect on others;
    MODEL @1t is a variant: the same device with one thread, named MODEL@1t.

    Example: fedsim devices list --kind phone
    """
    from fedsim.report.terminal import console, table

    profiles = devices_of_kind(None, kind)
    if as_json:
        print(strict_json.dumps({"devices": [_facts(profile) for profile in profiles]}))
        return
    shown = console()
    names = ["device", "GMAC/s on\nthreads", "memory", "watts", "prices"]
    wide = shown.width >= WIDE
    rows = table(*names, *(["soc"] if wide else []), left=("device", "soc"))
    for group in _by_kind(rows, profiles):
        for p in group:
            known = _inference(p)
            cells = [
                " ".join([p.name, *(f"@{v}" for v in _variants(p.name))]),
                f"{short(p.peak_macs_per_s / 1e9)} on {p.threads}" if p.peak_macs_per_s else UNKNOWN,
                _memory(p),
                f"{p.compute_watts:.2g}" if p.compute_watts < 100 else f"{p.compute_watts:.0f}",
                _basis(known) if known else "none",
            ]
            rows.add_row(*cells, *([p.soc] if wide else []))
    shown.print(rows)
    shown.note(
        "memory: for training, the runtime not in it. GMAC/s: 1e9 multiply-adds per second at the peak. "
        "± is the error to expect on a network that was not measured; what a device takes: fedsim devices show NAME"
    )


def show(
    name: Annotated[
        str, typer.Argument(help="A shipped device, or the path of a profile.", autocompletion=complete_device)
    ],
    picture: Annotated[Path, typer.Option(help="Where the plot goes.")] = Path("device.png"),
    batch: Annotated[int, typer.Option(help="Examples per pass.", min=1, max=MAX_COUNT)] = 1,
) -> None:
    """Show a device: its figures with their sources, its prices, and a plot of predicted latency for a zoo of networks.

    Example: fedsim devices show raspberry_pi_4 --picture pi4.png
    """
    from devices.enrol.picture import latency_picture
    from devices.profile import load_profile
    from fedsim.report.terminal import console, table

    check_picture(picture)
    profile, shown = load_profile(name), console()
    known = ", ".join(x for x in (profile.soc, profile.core, profile.isa if profile.isa != "none" else "") if x)
    shown.note(f"{profile.name}: {profile.kind}{f', {known}' if known else ''}", style="bold")
    rows = table("figure", "value", "source", left=("figure", "source"))
    for section, figures in figures_of(profile, name).items():
        rows.add_section()
        for key, (value, source) in figures.items():
            rows.add_row(f"{section}.{key}", value, source)
    shown.print(rows)
    columns = ("pass", "runtime", "precision", "prices", "batches")
    prices, sources = table(*columns, left=("pass", "runtime", "precision")), []
    for what, known_prices, source in _priced(profile, name):
        sources.append(f"{what}: {source}")
        ran = f"{known_prices.runtime or UNKNOWN} x{known_prices.threads}"
        low, high = known_prices.batches
        batches = "" if not known_prices.networks else f"{low}" if low == high else f"{low} to {high}"
        prices.add_row(what, ran, known_prices.precision, _basis(known_prices), batches)
    shown.print(prices)
    for line in sources:
        shown.note(line)
    latency_picture(profile, picture, batch)
    shown.say(f"picture: {picture}")


def predict(
    model: Model,
    device: Annotated[list[str] | None, typer.Option(help="Device name or profile path; all when left out.")] = None,
    kind: Kind = None,
    input_shape: InputShape = None,
    num_classes: Classes = None,
    tokens: Tokens = None,
    batch: Annotated[int, typer.Option(help="Examples per pass.", min=1, max=MAX_COUNT)] = 1,
    as_json: AsJson = False,
) -> None:
    """Predict milliseconds of a forward pass and of a training step on devices, and say how far that is known.

    Example: fedsim devices predict --model lenet5 --input-shape 1,28,28 --device pixel3 --batch 20

    Of your own: fedsim devices predict --model net.py:Net --kind phone (this runs net.py)
    """
    from devices.latency.predictions import predict as judge
    from fedsim.cli.devices.own_model import named_model, trace_cost
    from fedsim.report.terminal import console, table

    profiles = devices_of_kind(device, kind)
    network = trace_cost(named_model(model, parse_shape(input_shape), num_classes, tokens))
    found = [judge(network, batch, profile) for profile in profiles]
    if as_json:
        facts = {"model": model, "batch": batch, "flops": network.forward_flops}
        print(strict_json.dumps({**facts, "devices": [_as_json(p, network.forward_flops) for p in found]}))
        return
    shown = console()
    title = f"{model}: {short(network.forward_flops / 2e6)} million multiply-adds an example, batch {batch}"
    rows = table("device", "forward ms", "step ms", "calls", "runtime", left=("device", "runtime"), title=title)
    by_name = {p.device.name: p for p in found}
    for group in _by_kind(rows, profiles):
        for profile in group:
            p = by_name[profile.name]
            calls = (p.step or p.forward).calls_share
            rows.add_row(profile.name, _ms(p.forward), _ms(p.step), f"{100 * calls:.0f} %", _runtime(p.forward))
    shown.print(rows)
    for line in notes(found):
        shown.note(line)


# --- what the commands say -------------------------------------------------------------------------------------------


def devices_of_kind(names: Sequence[str] | None, kind: str | None) -> list[DeviceProfile]:
    """Returns the devices of these names, or all shipped ones, as far as they are of a kind; by kind, then by name.

    Raises:
        ConfigError, DeviceError: for a kind or a device that is not there, or if none is left.
    """
    from devices.errors import unknown
    from devices.profile import KINDS, kind_named, load_profile, profile_names
    from fedsim.errors import ConfigError

    if kind is not None and kind_named(kind) not in KINDS:
        raise ConfigError(unknown("kind", kind, KINDS))
    profiles = [load_profile(name) for name in dict.fromkeys(names or profile_names())]
    left = [p for p in profiles if kind is None or p.kind == kind_named(kind)]
    if not left:
        raise ConfigError(f"none of these devices is of kind {kind}; leave --kind or --device out")
    return sorted(left, key=lambda p: (KINDS.index(p.kind), p.name))


def parse_shape(text: str | None) -> tuple[int, ...] | None:
    """Returns the shape that --input-shape says; None where it is left out."""
    from fedsim.cli.options import parse_whole

    return tuple(parse_whole("--input-shape", n) for n in text.split(",")) if text else None


def notes(found: Sequence[Prediction]) -> list[str]:
    """Returns a line for each reason to doubt the figures, with the devices that it holds for."""
    from devices.latency.predictions import MOSTLY_CALLS

    lines, of = [], len({p.device.name for p in found})
    if any(x.error is None for p in found for x in (p.forward, p.step) if x):
        lines.append(f"±{UNKNOWN}: the error is unknown, as no measurement was held against such a prediction")
    if runtimes := sorted({p.step.runtime for p in found if p.step and p.step.runtime}):
        lines.append(f"steps: plain SGD in {' or '.join(runtimes)}; forward passes in the runtime that the table names")
    reasons: dict[str, dict[str, None]] = {}  # devices in order
    small: dict[str, list[int]] = {}
    beyond: dict[tuple[str, str], list[int]] = {}  # batches of a device that no reference surrounds
    for p in found:
        for what, made in (("forward", p.forward), ("step", p.step)):
            for remark in made.remarks if made else ():
                if remark.startswith(start := f"batch {p.batch} is "):
                    beyond.setdefault(
                        (p.device.name, f"{what}: batch {{}} is {remark.removeprefix(start)}"), []
                    ).append(p.batch)
                else:
                    reasons.setdefault(f"{what}: {remark}", {})[p.device.name] = None
        if (p.step or p.forward).calls_share > MOSTLY_CALLS:
            small.setdefault(p.device.name, []).append(p.batch)
    for (name, reason), batches in beyond.items():
        reasons.setdefault(reason.format(_listed(batches)), {})[name] = None
    for at in dict.fromkeys(map(tuple, small.values())):
        what = f"more than half of the time at batch {_listed(at)} is calls, not arithmetic: small nets are overhead"
        lines.append(f"warning: {what}: {_named([n for n, own in small.items() if tuple(own) == at], of)}")
    ordered = sorted(reasons.items(), key=lambda item: -len(item[1]))
    return [*lines, *(f"extrapolated {reason}: {_named(list(names), of)}" for reason, names in ordered)]


def _listed(batches: Sequence[int]) -> str:
    return ", ".join(map(str, batches))


def _named(names: Sequence[str], of: int) -> str:
    if len(names) == of and of > 1:
        return "all of these devices"
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def short(value: float) -> str:
    """Returns a number in three digits, without an exponent from 1000 up."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def percent(error: float | None) -> str:
    """Returns a relative error as "± 10%"."""
    return f"±{UNKNOWN:>3} " if error is None else f"±{100 * error:3.0f}%"


def _ms(made: Pass | None) -> str:
    return "cannot train" if made is None else f"{short(made.ms)} {percent(made.error)}"


def _runtime(made: Pass) -> str:
    # Only cards have TF32, so that the word says it for them, and the table stays within 80 columns.
    runtime = made.runtime.removesuffix("_cuda") if made.precision == "tf32" else made.runtime
    parts = [runtime or UNKNOWN, f"x{made.threads}" if made.threads > 1 else ""]
    return " ".join(x for x in (*parts, made.precision if made.precision != "fp32" else "") if x)


def _as_json(p: Prediction, flops: float) -> dict[str, Any]:
    """Returns a device of `predict --json`; the first keys are those of fedsim 0.1."""
    return {
        "device": p.device.name,
        "kind": p.device.kind,
        "forward_ms": p.forward.ms,
        "step_ms": p.step.ms if p.step else None,
        "one_rate_ms": 1e3 * p.batch * flops / p.device.flops_per_s,
        "calls_share": (p.step or p.forward).calls_share,
        **{key: value for key, value in p.to_dict().items() if key in ("forward", "step")},
    }


def _by_kind(rows: Any, profiles: Iterable[DeviceProfile]) -> Iterator[list[DeviceProfile]]:
    """Yields devices by kind, each kind under a line of the table that names it, where there are many."""
    from rich.text import Text

    groups = [(kind, list(group)) for kind, group in groupby(profiles, key=lambda p: p.kind)]
    apart = len(groups) > 1 and sum(len(group) for _, group in groups) > MAX_NAMED
    for kind, group in groups:
        if apart:
            rows.add_section()
            rows.add_row(Text(kind, style="bold"))
        yield group


def _inference(profile: DeviceProfile) -> Prices | None:
    from devices.errors import DeviceError
    from devices.latency.models import device_prices

    try:
        return device_prices(profile).inference
    except DeviceError:
        return None


def _basis(prices: Prices) -> str:
    count = f" ({prices.networks})" if prices.networks else ""
    return f"{prices.basis}{count} {percent(prices.error).rstrip()}"


def _memory(profile: DeviceProfile) -> str:
    from devices.units import short_size

    return short_size(profile.memory_bytes)


def _variants(name: str) -> tuple[str, ...]:
    from devices.profile import SHIPPED
    from devices.profile_file import read_yaml

    path = SHIPPED / f"{name}.yaml"
    text = path.read_text() if path.is_file() else ""
    return tuple(read_yaml(path).get("variants", ())) if "\nvariants:" in text else ()


def _facts(p: DeviceProfile) -> dict[str, Any]:
    known = _inference(p)
    prices = (
        {key: getattr(known, key) for key in ("runtime", "threads", "precision", "basis", "networks", "error")}
        if known
        else None
    )
    return {
        "device": p.name,
        "kind": p.kind,
        "soc": p.soc,
        "threads": p.threads,
        "peak_gmacs_per_s": p.peak_macs_per_s / 1e9 if p.peak_macs_per_s else None,
        "memory_bytes": p.memory_bytes,
        "compute_watts": p.compute_watts,
        "inference": prices,
        "variants": list(_variants(p.name)),
    }


# --- figures of one device -------------------------------------------------------------------------------------------


def figures_of(profile: DeviceProfile, name: str) -> dict[str, dict[str, tuple[str, str]]]:
    """Returns the numbers of a profile by section and key, as (value, where it is from), in the units of its file."""
    from devices.profile_file import FIGURES

    tree, found = _tree(name), dict[str, dict[str, tuple[str, str]]]()
    link = tree.get("network", {}).get("link")
    for section, figures in FIGURES.items():
        given = tree.get(section, {})
        for key, figure in figures.items():
            entry = given.get(key)
            if isinstance(entry, Mapping):
                value, source = float(entry["value"]), f"{entry['provenance']}: {entry['source']}"
            elif entry is not None:
                value, source = float(entry), "a plain number: assumed"
            elif section == "memory" or (in_si := getattr(profile, figure.field, None)) is None:
                continue
            else:
                value = in_si / figure.scale
                source = f"link {link}" if link and section in ("network", "power") else "where nothing is said"
                if not value:
                    continue
            found.setdefault(section, {})[key] = (short(value) if value >= 100 else f"{value:.4g}", source)
    return found


def _priced(profile: DeviceProfile, name: str) -> Iterator[tuple[str, Prices, str]]:
    """Returns the prices of a device by kind of pass, and where they are from."""
    from devices.latency.models import device_prices
    from devices.latency.predictions import IN_WORDS

    prices, given = device_prices(profile), _tree(name).get("latency", {})
    own = {key: given.get(key) for key in ("inference", "forward", "step", "int8")}
    made = {"inference": prices.inference, "forward": prices.forward, "step": prices.step}
    if profile.kind == "mcu":
        made = {"inference": prices.inference}
    made["int8"] = profile.latency.int8 if profile.latency else None
    for what, known in made.items():
        if known is not None:
            entry = own[what] if isinstance(own[what], Mapping) else {}
            yield what, known, str(entry.get("source", IN_WORDS[known.basis]))


def _tree(name: str) -> Mapping[str, Any]:
    from devices.profile import SHIPPED, as_variant, profile_names
    from devices.profile_file import read_yaml

    base, _, variant = name.partition("@")
    if base in profile_names():
        tree: Mapping[str, Any] = as_variant(read_yaml(SHIPPED / f"{base}.yaml"), variant, name)
        return tree
    tree = read_yaml(Path(name))
    return tree
