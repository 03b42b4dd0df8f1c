"""`fedsim devices search`: the best network within a device's latency limit, and what it took to find it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsim.cli.completing import complete_device
from fedsim.cli.devices.answers import AsJson, Classes, InputShape, Tokens, parse_shape
from fedsim.cli.options import MAX_COUNT, check_picture
from fedsim.report import strict_json

if TYPE_CHECKING:
    from devices.cost import ModelCost
    from devices.nas.search import Limit, Selection
    from devices.profile import DeviceProfile
    from fedsim.cli.devices.own_model import NamedModel
    from fedsim.cli.devices.pools import Pool
    from fedsim.report.terminal import PlainConsole

TABLE_SPACES = ("nb201", "fbnet", "ofa")
PHASES = ("forward", "train_step")
REPEATS = 10  # samples of a network that is timed on this host
NONE = "-"
Margin = Annotated[
    float | None,
    typer.Option(
        help="Relative error that predictions are given: predicted * (1 + margin) must be within the limit. The "
        "predictor's own error on the device when left out."
    ),
]
Weights = Annotated[Path | None, typer.Option(help="Weights of HELP (npz or safetensors), for --predictor help.")]


Space = Annotated[
    str,
    typer.Option(
        help="nb201, fbnet or ofa with --data; or model configs separated by commas, each in all its widths and "
        "depths, e.g. resnet8,small_cnn."
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="A device of the table; of model configs, a shipped device or the path of a profile.",
        autocompletion=complete_device,
    ),
]
LimitMs = Annotated[float, typer.Option(help="Milliseconds that a pass may take.")]
Predictor = Annotated[
    str | None,
    typer.Option(
        help="structured (default), help, flops, layerwise or profile; of model configs profile (default) or flops."
    ),
]
Data = Annotated[Path | None, typer.Option(help="Latency table of the space (npz).")]
Score = Annotated[
    Path | None,
    typer.Option(help="CSV with network and score, or accuracies of nb201 (npz); multiply-adds when left out."),
]
DataSet = Annotated[str | None, typer.Option(help="Of accuracies in npz: cifar10, cifar100 or imagenet16.")]
Measurements = Annotated[
    int, typer.Option(help="Networks measured for the predictor, with a table.", min=2, max=MAX_COUNT)
]
Phase = Annotated[str, typer.Option(help="Of model configs: forward or train_step.")]
Batch = Annotated[int, typer.Option(help="Of model configs: examples a pass.", min=1, max=MAX_COUNT)]
OnThisHost = Annotated[
    bool, typer.Option("--on-this-host", help="The device is this host, enrolled: time what is selected here.")
]
Picture = Annotated[Path | None, typer.Option(help="Where a plot of the search goes.")]
Seed = Annotated[int, typer.Option(help="Of the networks that are measured.", min=0, max=MAX_COUNT)]


def search(
    space: Space,
    device: Device,
    limit_ms: LimitMs,
    predictor: Predictor = None,
    data: Data = None,
    score: Score = None,
    dataset: DataSet = None,
    measurements: Measurements = 10,
    margin: Margin = None,
    weights: Weights = None,
    phase: Phase = "forward",
    batch: Batch = 1,
    input_shape: InputShape = None,
    num_classes: Classes = None,
    tokens: Tokens = None,
    on_this_host: OnThisHost = False,
    picture: Picture = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Search a space for the network with the best score within a latency limit on a device.

    A few networks are measured (looked up in the table), the others predicted. The best whose prediction, with a
    margin, is within the limit is measured, too, and the next is taken where it breaks the limit.

    Example: fedsim devices search --space nb201 --data help_nb201.npz --device pixel2 --limit-ms 14
    --score nb201_accuracy.npz --dataset cifar100

    Of fedsim's own: fedsim devices search --space resnet8,small_cnn --device raspberry_pi_4 --limit-ms 20

    On this host: fedsim devices search --space vgg --device my-laptop.yaml --limit-ms 2 --on-this-host
    """
    from devices.nas.search import Limit, select
    from fedsim.errors import ConfigError
    from fedsim.report.terminal import console

    if not 0 < limit_ms < math.inf:
        raise ConfigError(f"--limit-ms must be a number above 0, got {limit_ms}")
    check_margin(margin)
    if picture is not None:
        check_picture(picture)
    predictor = predictor or ("structured" if space in TABLE_SPACES else "profile")
    shown, began = console(), time.perf_counter()
    if space in TABLE_SPACES:
        given = {"--phase": phase != "forward", "--batch": batch != 1, "--on-this-host": on_this_host}
        _refuse(given, "is for model configs; the table has one kind of pass")
        if data is None:
            raise ConfigError(f"--space {space} needs --data, a table of latencies on devices (npz)")
        with shown.status("searching"):
            pool = _table_pool(space, data, device, (predictor, measurements, weights), seed, (score, dataset))
    else:
        given = {"--data": data is not None, "--dataset": dataset is not None, "--weights": weights is not None}
        _refuse(given, f"is for {', '.join(TABLE_SPACES)}")
        shape = {"input_shape": parse_shape(input_shape), "num_classes": num_classes, "tokens": tokens}
        pool = _family_pool(space, device, predictor, (phase, batch), shape, score, on_this_host, shown)
    used = margin if margin is not None else pool.error if pool.error is not None else 0.0
    limit = Limit("ms", pool.predicted_ms, limit_ms, used)
    found = select(pool.scores, [limit], pool.measure, pool.name_of)
    host_s = time.perf_counter() - began
    if picture is not None:
        _draw(picture, f"{space} on {device}, latency by {predictor}", pool, limit, found)
    facts = _facts(pool, limit, found)
    if as_json:
        asked = {"space": space, "device": device, "limit_ms": limit_ms, "predictor": predictor, "seed": seed}
        print(strict_json.dumps({**asked, **facts, "host_s": host_s}))
        return
    _tell(shown, f"{space} on {device}, at most {limit_ms:g} ms", pool, limit, facts, host_s)
    if picture is not None:
        shown.say(f"picture: {picture}")


def check_margin(margin: float | None) -> None:
    """Refuses a margin that is no number, or would allow anything."""
    from fedsim.errors import ConfigError

    if margin is not None and not -1 < margin < math.inf:
        raise ConfigError(f"--margin must be a number above -1, such as 0.1, got {margin}")


def _refuse(options: Mapping[str, bool], why: str) -> None:
    """Refuses the first of some options that is given."""
    from fedsim.errors import ConfigError

    for name, is_given in options.items():
        if is_given:
            raise ConfigError(f"{name} {why}")


def _table_pool(
    space: str,
    data: Path,
    device: str,
    predictor: tuple[str, int, Path | None],
    seed: int,
    score: tuple[Path | None, str | None],
) -> Pool:
    from devices.latency.few_shot import Trial
    from devices.latency.spaces import load_space
    from fedsim.cli.devices.pools import table_pool

    name, measurements, weights = predictor
    trial = Trial(name, measurements, weights=weights)
    return table_pool(load_space(space, data), device, trial, seed, *score)


def _family_pool(
    space: str,
    device: str,
    predictor: str,
    passes: tuple[str, int],
    shape: dict[str, Any],
    score: Path | None,
    on_this_host: bool,
    shown: PlainConsole,
) -> Pool:
    from devices.errors import DeviceError, unknown
    from devices.latency.predictions import predict
    from fedsim.cli.devices.own_model import named_model
    from fedsim.cli.devices.pools import family_pool
    from fedsim.errors import ConfigError
    from fedsim.report.terminal import work_bar

    phase, batch = passes
    if phase not in PHASES:
        raise ConfigError(unknown("phase", phase, PHASES))
    if predictor not in ("profile", "flops"):
        raise ConfigError(unknown("predictor of model configs", predictor, ("profile", "flops")))

    def build(name: str, sizes: Mapping[str, Any]) -> NamedModel:
        return named_model(name, **shape, sizes=sizes)

    def price(cost: ModelCost, profile: DeviceProfile) -> tuple[float, float | None]:
        if predictor == "flops":
            flops = cost.forward_flops + (cost.backward_flops if phase == "train_step" else 0)
            return 1e3 * batch * flops / profile.flops_per_s, None
        found = predict(cost, batch, profile)
        made = found.forward if phase == "forward" else found.step
        if made is None:
            raise DeviceError(f"device {profile.name!r} cannot train; take --phase forward")
        return made.ms, made.error

    def here(model: NamedModel) -> float:
        from devices.enrol.measure import network_ms

        return network_ms(model.module, model.examples(batch), phase == "train_step", REPEATS)

    with work_bar(shown) as progress:

        def each(networks: Iterable[Any]) -> Iterator[Any]:
            listed = list(networks)
            yield from progress.track(listed, total=len(listed), description="tracing")

        names = list(dict.fromkeys(space.split(",")))
        return family_pool(names, device, build, price, score, here if on_this_host else None, each)


# --- what is said -----------------------------------------------------------------------------------------------------


def _facts(pool: Pool, limit: Limit, found: Selection) -> dict[str, Any]:
    """Returns what came of a search, as plain JSON types."""
    import numpy as np

    def network(place: int) -> dict[str, Any]:
        true_ms = None if pool.true_ms is None else float(pool.true_ms[place])
        own = {"network": pool.name_of(place), "score": float(pool.scores[place])}
        return {**own, "predicted_ms": float(pool.predicted_ms[place]), "true_ms": true_ms}

    checks = [{**network(c.network), "measured_ms": c.measured["ms"], "holds": c.holds} for c in found.checks]
    chosen = {**network(found.chosen), "use": pool.use(found.chosen)}
    best = None
    if pool.true_ms is not None:
        within = np.flatnonzero(pool.true_ms <= limit.most)
        if len(within):
            best = network(int(within[np.argmax(pool.scores[within])]))
    return {
        "score": pool.about_score,
        "margin": limit.margin,
        "error": pool.error,
        "candidates": len(pool.scores),
        "eligible": int(found.eligible.sum()),
        "chosen": chosen,
        "measured_ms": found.checks[-1].measured["ms"] if found.checks else None,
        "checks": checks,
        "best_with_true_latencies": best,
        "measurements": {"predictor": pool.measured, "verification": len(found.checks)},
        "notes": list(pool.notes),
    }


def _tell(shown: PlainConsole, title: str, pool: Pool, limit: Limit, facts: Mapping[str, Any], host_s: float) -> None:
    """Prints what was selected, why, how it held, and what it took."""
    chosen, margin = facts["chosen"], f"{100 * limit.margin:.1f} %"
    known = f"error to expect {100 * pool.error:.1f} %" if pool.error is not None else "nobody knows how far it is off"
    verified = (
        f"{facts['measured_ms']:.4g} ms" if facts["checks"] else "not verified: no table and no host to measure on"
    )
    within = f"{facts['eligible']} of {facts['candidates']} networks are predicted within the limit, margin {margin}"
    broke = [f"{check['measured_ms']:.4g} ms" for check in facts["checks"] if not check["holds"]]
    if broke:
        within += f"; {len(broke)} with better scores broke it when measured ({', '.join(broke[:5])})"
    rows = [
        ("selected", chosen["network"]),
        ("score", f"{chosen['score']:.4g} ({pool.about_score})"),
        ("predicted", f"{chosen['predicted_ms']:.4g} ms, {known}"),
        ("measured", verified),
        ("why", within),
    ]
    if (best := facts["best_with_true_latencies"]) is not None:
        lost = best["score"] - chosen["score"]
        rows.append(
            (
                "best possible",
                f"{best['score']:.4g} at {best['true_ms']:.4g} ms, with all latencies known; {lost:.3g} above",
            )
        )
    counts = facts["measurements"]
    took = f"{counts['predictor']} networks measured to predict, {counts['verification']} to verify"
    rows.append(("cost", f"{took}; {host_s:.1f} s on this host"))
    if chosen["use"]:
        rows.append(("use it", f"fedsim run {chosen['use']}"))
    shown.note(title, style="bold")
    shown.pairs(rows)
    for note in pool.notes:
        shown.note(note)


def _draw(path: Path, title: str, pool: Pool, limit: Limit, found: Selection) -> None:
    import numpy as np

    from devices.nas.search_picture import search_picture

    true_ms = pool.true_ms
    if true_ms is None and found.checks:
        true_ms = np.full(len(pool.scores), np.nan)
        for check in found.checks:
            true_ms[check.network] = check.measured["ms"]
    limits = (limit.most, limit.margin)
    search_picture(path, title, pool.about_score, pool.scores, pool.predicted_ms, true_ms, limits, found.chosen)
