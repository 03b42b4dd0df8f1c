"""`fedsim devices`: what devices there are, what a network costs on them, and how well that is known."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsim.cli.devices.answers import list_devices, predict, show
from fedsim.cli.devices.calibrate import calibrate
from fedsim.cli.devices.complexity import train_complexity
from fedsim.cli.devices.evaluate_search import evaluate_search
from fedsim.cli.devices.fit import fit
from fedsim.cli.devices.fleet import links, population
from fedsim.cli.devices.metad2a import make_tasks, propose, train_metad2a
from fedsim.cli.devices.new import new
from fedsim.cli.devices.retrieve import retrieve
from fedsim.cli.devices.search import search
from fedsim.cli.devices.tables import build
from fedsim.cli.devices.tans import judge_tans, make_zoo, train_tans
from fedsim.cli.options import MAX_COUNT, check_figures, check_name, check_picture, check_place, parse_whole
from fedsim.report import strict_json

if TYPE_CHECKING:
    from devices.enrol.measure import Enrolment
    from fedsim.report.terminal import PlainConsole

app = typer.Typer(no_args_is_help=True, help="Devices, and the latency of networks on them.")
app.command("list")(list_devices)
for command in (show, predict, fit, search, new, calibrate, links, population, build, propose, retrieve):
    app.command()(command)
app.command("evaluate-search")(evaluate_search)
app.command("make-tasks")(make_tasks)
app.command("train-metad2a")(train_metad2a)
app.command("train-complexity")(train_complexity)
app.command("make-zoo")(make_zoo)
app.command("train-tans")(train_tans)
app.command("judge-tans")(judge_tans)
TABLE = "Latency table of the space (npz with devices, latency_ms, arch_ops; of ofa ks, e, d, r)."
DataFile = Annotated[Path, typer.Option(help=TABLE)]
DeviceSet = Annotated[
    str | None,
    typer.Option("--devices", help="A harder set of devices of fbnet: F1, F2, F3, F4 or FA; HELP's own when left out."),
]
Prior = Annotated[bool, typer.Option("--prior", help="Let structured learn from the source devices too, as HELP does.")]
UNPRICED = "-"


@app.command()
def enroll(
    name: Annotated[str, typer.Option(help="Name of the new device, e.g. my-laptop.")],
    out: Annotated[Path | None, typer.Option(help="Profile to write; NAME.yaml when left out.")] = None,
    repeats: Annotated[int, typer.Option(help="Samples per measurement.", min=3, max=1000)] = 30,
    threads: Annotated[int, typer.Option(help="Torch threads.", min=1, max=1024)] = 1,
    down_mbps: Annotated[float, typer.Option(help="Bandwidth to the host.")] = 85.73,
    up_mbps: Annotated[float, typer.Option(help="Bandwidth from the host.")] = 45.74,
    rtt_ms: Annotated[float, typer.Option(help="Round-trip time.")] = 21.0,
    watts: Annotated[float, typer.Option(help="Draw while training; assumed unless you measured it.")] = 30.0,
    limit: Annotated[float, typer.Option(help="Held-out error beyond which the command fails.")] = 0.25,
) -> None:
    """Measure this host and write its profile; fails when predictions of unseen networks are more than 25 % off.

    Example: fedsim devices enroll --name my-laptop
    """
    import yaml

    from devices.enrol.measure import enroll as measure
    from devices.enrol.measure import profile_tree
    from devices.writing import write_atomic
    from fedsim.errors import ConfigError
    from fedsim.report.terminal import console, work_bar

    check_name("--name", name)
    path = out or Path(f"{name}.yaml")
    check_place("--out", path, (".yaml", ".yml"))
    if path.exists():
        raise ConfigError(f"{path} is there already; name another profile with --out or remove it")
    network = {"down_mbps": down_mbps, "up_mbps": up_mbps, "rtt_ms": rtt_ms}
    check_figures("network", network)
    check_figures("power", {"compute_w": watts}, {"compute_w": "--watts"})
    if not 0 < limit < math.inf:
        raise ConfigError(f"--limit must be a number above 0, got {limit}")
    shown = console()
    with work_bar(shown) as progress:
        task = progress.add_task("measuring", total=None)

        def watch(what: str, done: int, of: int) -> None:
            progress.update(task, description=what, completed=done, total=of)

        result = measure(repeats, threads, watch)
    power = {"compute_w": watts, "rx_w": watts / 3, "tx_w": watts / 3, "idle_w": watts / 4}
    tree = profile_tree(name, result, time.strftime("%Y-%m-%d"), network, power)
    write_atomic(path, yaml.safe_dump(tree, sort_keys=False, width=120))
    _show_accuracy(result, shown)
    use = f"use it: 'fleet.devices={{{path.resolve()}: 1}}'"
    shown.say(f"profile: {path} ({use})")
    if (error := result.error()) > limit:
        text = f"held-out error {error:.1%} is above {limit:.0%}; measure again on an idle host"
        print(f"fedsim: {text}", file=sys.stderr)
        raise typer.Exit(1)


def _show_accuracy(result: Enrolment, shown: PlainConsole) -> None:
    """Shows how well the measured host is predicted: on unseen networks, on pruned ones, and on unseen families."""
    from fedsim.report.terminal import table

    columns = ("network", "batch", "precision", "predicted ms", "measured ms", "error")
    rows = table(*columns, left=("network", "precision"))
    for network_name, batch, precision, predicted, measured in result.held_out:
        off = f"{abs(predicted - measured) / measured:.1%}"
        rows.add_row(network_name, str(batch), precision, f"{predicted:.3f}", f"{measured:.3f}", off)
    saved = table("pruned network", "batch", "predicted saving", "measured saving", left=("pruned network",))
    for network_name, batch, predicted, measured in result.savings:
        saved.add_row(network_name, str(batch), f"{predicted:.1%}", f"{measured:.1%}")
    shown.print(rows)
    shown.print(saved)
    signs, close = result.savings_met()
    of = len(result.savings)
    shown.note(f"savings: sign right in {signs} of {of}, within a fifth of the measured in {close}")
    error = result.error()
    int8 = ", no int8 backend"
    if "int8" in result.prices:
        int8 = f", int8 {result.error('int8'):.1%} (Spearman {result.rank('int8'):.3f})"
    step = f", training step {result.error('step'):.1%} (Spearman {result.rank('step'):.3f})"
    known = f"leave-one-out on the references {result.sigma:.1%}"
    ranks = f"(Spearman {result.rank():.3f})"
    shown.say(f"held-out error: fp32 {error:.1%} {ranks}{step}{int8}; {known}")
    for family in dict.fromkeys(family for family, *_ in result.unseen):
        gone = {what: off for own, what, off in result.unseen if own == family}
        text = f"fp32 {gone['fp32']:.1%}, training step {gone['step']:.1%}; fitted without any of its networks"
        shown.say(f"unseen family {family}: {text}")


@app.command()
def evaluate(
    space: Annotated[str | None, typer.Option(help="nb201, fbnet or ofa.")] = None,
    data: Annotated[Path | None, typer.Option(help=TABLE)] = None,
    tables: Annotated[Path | None, typer.Option(help="Instead of a space: a folder of public measurements.")] = None,
    predictor: Annotated[str, typer.Option(help="structured, help, flops, macs, or profile.")] = "structured",
    measurements: Annotated[
        int, typer.Option(help="Networks measured on each unseen device.", min=2, max=MAX_COUNT)
    ] = 10,
    references: Annotated[str, typer.Option(help="chosen (D-optimal) or random.")] = "chosen",
    seeds: Annotated[int, typer.Option(help="Repetitions; figures are means.", min=1, max=MAX_COUNT)] = 3,
    weights: Annotated[Path | None, typer.Option(help="Weights of HELP (npz or safetensors).")] = None,
    devices: DeviceSet = None,
    prior: Prior = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Judge a predictor on devices it never saw: in a search space under HELP's protocol, or on public tables.

    Example: fedsim devices evaluate --space nb201 --data help_nb201.npz --predictor structured --measurements 20

    HELP takes weights that never saw them either: --space fbnet --devices F1 --predictor help --weights f1.safetensors

    The prices that runs use, inside a space: --space nb201 --data help_nb201.npz --predictor profile

    The same model on well-known networks, steps and joules: fedsim devices evaluate --tables DIR
    """
    from fedsim.cli.devices.tables import evaluate_profiles, evaluate_tables
    from fedsim.errors import ConfigError

    if tables is not None:
        if space is not None or data is not None:
            raise ConfigError("--tables stands alone: --space and --data judge HELP's search spaces instead")
        evaluate_tables(tables, as_json)
        return
    if space is None or data is None:
        raise ConfigError("give --space and --data (a search space), or --tables (a folder of public measurements)")
    if predictor == "profile":
        from devices.latency.spaces import load_space

        evaluate_profiles(load_space(space, data), as_json)
        return
    from devices.latency.evaluate import evaluate as judge
    from devices.latency.few_shot import Trial
    from devices.latency.spaces import load_space
    from fedsim.report.terminal import console, table

    loaded = load_space(space, data, devices)
    with console().status("judging"):
        source = loaded.split.source if prior else ()
        result = judge(loaded, Trial(predictor, measurements, references, seeds, source, weights))
    if as_json:
        print(strict_json.dumps(result))
        return
    where = f"{space} {devices}" if devices else space
    title = f"{predictor} on {where}, {measurements} measurements, {references}{', prior' if prior else ''}"
    rows = table("device", "Spearman", "published HELP", "Kendall", "MAPE %", left=("device",), title=title)
    published = dict(loaded.split.published)
    if published:
        published["mean"] = sum(published.values()) / len(published)
    for name, scores in [*result["devices"].items(), ("mean", result["mean"])]:
        bar = f"{published[name]:.3f}" if name in published else UNPRICED
        rows.add_row(name, f"{scores['spearman']:.3f}", bar, f"{scores['kendall']:.3f}", f"{100 * scores['mape']:.1f}")
    console().print(rows)


@app.command()
def compare(
    space: Annotated[str, typer.Option(help="nb201, fbnet or ofa.")],
    data: DataFile,
    predictors: Annotated[str, typer.Option(help="Separated by commas.")] = "structured",
    measurements: Annotated[str, typer.Option(help="Separated by commas.")] = "5,10,20",
    references: Annotated[str, typer.Option(help="chosen, random, or both separated by a comma.")] = "chosen",
    seeds: Annotated[int, typer.Option(help="Repetitions; figures are means.", min=1, max=MAX_COUNT)] = 3,
    weights: Annotated[Path | None, typer.Option(help="Weights of HELP (npz or safetensors).")] = None,
    devices: DeviceSet = None,
    prior: Prior = False,
    picture: Annotated[Path, typer.Option(help="Where the plot goes.")] = Path("compare.png"),
) -> None:
    """Compare predictors on unseen devices, as a table of Spearman and a plot.

    Example: fedsim devices compare --space nb201 --data help_nb201.npz --predictors structured,macs
    """
    from devices.latency.evaluate import compare as judge
    from devices.latency.evaluate import comparison_picture
    from devices.latency.few_shot import trials_of
    from devices.latency.spaces import load_space
    from fedsim.report.terminal import console, table

    check_picture(picture)
    budgets = [parse_whole("--measurements", text) for text in measurements.split(",")]
    loaded = load_space(space, data, devices)
    with console().status("comparing"):
        names, ways, source = predictors.split(","), references.split(","), loaded.split.source if prior else ()
        found = judge(loaded, trials_of(names, budgets, ways, seeds=seeds, source=source, weights=weights))
    columns = {f"{r['predictor']}\n{r['measurements']} {r['references']}": None for r in found}
    title = f"Spearman on {space}{f' {devices}' if devices else ''}"
    rows = table("device", *columns, "HELP,\npublished", left=("device",), title=title)
    by_device: dict[str, list[dict[str, Any]]] = {}
    for row in found:
        by_device.setdefault(row["device"], []).append(row)
    for name, scores in by_device.items():
        published = scores[0]["published"]
        rows.add_row(name, *(f"{r['spearman']:.3f}" for r in scores), f"{published:.3f}" if published else UNPRICED)
    comparison_picture(found, picture)
    shown = console()
    shown.print(rows)
    shown.say(f"picture: {picture}")


@app.command("train-help")
def train_help(
    space: Annotated[str, typer.Option(help="nb201, fbnet or ofa.")],
    data: DataFile,
    out: Annotated[Path, typer.Option(help="Weights to write (safetensors).")],
    episodes: Annotated[
        int | None, typer.Option(help="2000 for nb201, 4000 for fbnet when left out.", min=1, max=MAX_COUNT)
    ] = None,
    devices: DeviceSet = None,
    seed: Annotated[int, typer.Option(help="Of weights, episodes and validation.", min=0, max=MAX_COUNT)] = 3,
) -> None:
    """Meta-train HELP on the source devices of a table; goes on from OUT.checkpoint if it is there.

    Example: fedsim devices train-help --space nb201 --data help_nb201.npz --out help.safetensors

    For a harder set: fedsim devices train-help --space fbnet --devices F1 --data help_fbnet.npz --out f1.safetensors
    """
    import torch

    from devices.latency.help.training import HelpSettings, Look, meta_train
    from devices.latency.help.weights import save_weights
    from devices.latency.spaces import load_space
    from fedsim.report.terminal import console, work_bar

    check_place("--out", out)
    torch.set_num_threads(1)
    loaded = load_space(space, data, devices)
    settings = HelpSettings(
        episodes=episodes or (4000 if space == "fbnet" else 2000),
        devices=min(HelpSettings.devices, len(loaded.split.source)),
        seed=seed,
    )
    best = float("-inf")
    shown = console()
    with work_bar(shown) as progress:
        task = progress.add_task("meta-training", total=settings.episodes)

        def watch(look: Look) -> None:
            nonlocal best
            best = max(best, look.spearman)
            progress.update(task, completed=look.episode, description=f"validation Spearman {look.spearman:.3f}")

        trained = meta_train(loaded, settings, out.with_name(f"{out.name}.checkpoint"), watch)
    save_weights(trained, out)
    shown.say(f"weights: {out}; best validation Spearman {best:.3f}")
