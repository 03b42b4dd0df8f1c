"""`fedsim devices make-zoo`, `train-tans` and `judge-tans`: trained networks, and which of them suits a data set."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsim.cli.completing import complete_device
from fedsim.cli.devices.scores import by_name, mean
from fedsim.cli.devices.search import Margin, check_margin
from fedsim.cli.options import MAX_COUNT, check_folder_place, check_picture, check_place

if TYPE_CHECKING:
    from rich.progress import Progress

    from devices.nas.search import Limit
    from devices.nas.tans.tuning_picture import Line
    from devices.profile import DeviceProfile
    from fedsim.meta.retrieved import Curve, Judge, Score
    from fedsim.meta.tans import Lesson, Tans, TansSettings
    from fedsim.meta.zoo import Zoo

ZooFolder = Annotated[Path, typer.Option("--zoo", help="Folder of trained nets, by `fedsim devices make-zoo`.")]
TansWeights = Annotated[Path, typer.Option(help="Weights, by `fedsim devices train-tans`.")]
Device = Annotated[str, typer.Option(help="A shipped device or the path of a profile.", autocompletion=complete_device)]
LimitMs = Annotated[
    float | None,
    typer.Option(help="Milliseconds that a forward pass may take; so that half of the nets fit when left out."),
]
Tune = Annotated[int, typer.Option(help="Steps of fine-tuning, 32 images each.", min=1, max=MAX_COUNT)]
MEASURED = "raspberry_pi_4"  # a device whose training steps were measured


def make_zoo(
    out: Annotated[Path, typer.Option(help="Folder to write; goes on with what is there.")],
    bundles: Annotated[str, typer.Option(help="Bundles of images, separated by commas.")] = "cifar10,cifar100,mnist",
    train: Annotated[int, typer.Option(help="Tasks to learn from.", min=1, max=1000)] = 36,
    valid: Annotated[int, typer.Option(help="Tasks that choose the best weights.", min=1, max=1000)] = 6,
    held_out: Annotated[int, typer.Option(help="Tasks to judge on, of other classes.", min=1, max=1000)] = 6,
    nets: Annotated[int, typer.Option(help="Nets trained on each task.", min=3, max=100)] = 4,
    steps: Annotated[int, typer.Option(help="Training steps of a net, 32 images each.", min=1, max=MAX_COUNT)] = 100,
    seed: Annotated[int, typer.Option(help="Of tasks, nets and their training.", min=0, max=MAX_COUNT)] = 0,
) -> None:
    """Make small data sets of bundles of images, and train small networks on them, for a moment each.

    Small ResNets, convolutional networks and cells of NAS-Bench-201, of several widths and depths; goes on where it was
    stopped. The usual 192 nets take 7 minutes of one core.

    Example: fedsim devices make-zoo --out zoo
    """
    import time

    import torch

    from fedsim.meta.tasks import TaskSettings
    from fedsim.meta.zoo import NETS, Zoo, ZooTraining
    from fedsim.report.terminal import console, work_bar

    check_folder_place("--out", out, [NETS])
    torch.set_num_threads(1)
    settings = TaskSettings(tuple(bundles.split(",")), train, valid, held_out, seed)
    zoo = Zoo.begin(out, settings, ZooTraining(nets, steps))
    shown, began = console(), time.process_time()
    with work_bar(shown) as progress:
        bar = progress.add_task("training nets", total=zoo.total)
        zoo.make(lambda task: progress.update(bar, advance=1, description=task))
    took = time.process_time() - began
    shown.say(f"{zoo.total} nets of {len(zoo.recipes)} tasks are in {out}, {took:.0f} CPU s")


def train_tans(
    zoo: ZooFolder,
    out: Annotated[Path, typer.Option(help="Weights to write (safetensors): those of the first seed.")],
    seeds: Annotated[int, typer.Option(help="Trainings to judge, each from the start.", min=1, max=100)] = 3,
    seed: Annotated[int, typer.Option(help="The first of the seeds.", min=0, max=MAX_COUNT)] = 0,
    steps: Annotated[int, typer.Option(help="Of meta-training.", min=1, max=MAX_COUNT)] = 200,
    device: Device = MEASURED,
    limit_ms: LimitMs = None,
    margin: Margin = None,
    tune: Tune = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Learn which trained net suits a data set, and judge what is retrieved within a limit, on classes never seen.

    Some nets are fine-tuned on each task to learn from, and all within the limit on each that is held out, once: the
    zoo's folder keeps what they reach. Goes on from OUT.SEED where it is there; such files may be removed afterwards.

    Example: fedsim devices train-tans --zoo zoo --out tans.safetensors
    """
    from dataclasses import asdict

    import torch

    from devices.profile import load_profile
    from fedsim.meta.tans import TansSettings
    from fedsim.meta.zoo import Zoo
    from fedsim.report import strict_json
    from fedsim.report.terminal import console

    check_place("--out", out)
    check_limit(limit_ms, margin)
    torch.set_num_threads(1)
    profile, opened, shown = load_profile(device), Zoo.open(zoo), console()
    trainings = [TansSettings(steps, seed=seed + number) for number in range(seeds)]
    scores, limit, training_s = _train_and_judge(opened, trainings, out, profile, (limit_ms, margin), tune)
    if as_json:
        kept = {"device": device, "limit_ms": limit.most, "margin": limit.margin}
        print(strict_json.dumps({**kept, "scores": [asdict(score) for score in scores]}))
        return
    _show_scores(scores, seeds, tune)
    shown.note(f"limit: {_in_words(limit)} on {device}, which {scores[0].feasible} nets of other tasks meet")
    shown.note(f"meta-training: {training_s / seeds:.0f} CPU s for each seed")
    shown.say(f"weights: {out}")


def check_limit(limit_ms: float | None, margin: float | None) -> None:
    """Refuses a limit that is no number above 0, and a margin that would allow anything."""
    from fedsim.errors import ConfigError

    if limit_ms is not None and not 0 < limit_ms < math.inf:
        raise ConfigError(f"--limit-ms must be a number above 0, got {limit_ms}")
    check_margin(margin)


def _in_words(limit: Limit) -> str:
    return f"{limit.most:.3g} ms with a margin of {limit.margin:.0%}"


def _judge(
    zoo: Zoo, profile: DeviceProfile, limit: tuple[float | None, float | None], tune: int, each: Callable[[], None]
) -> Judge:
    """Prices the nets of a zoo on a device."""
    from fedsim.meta.net_prices import price_nets
    from fedsim.meta.retrieved import Judge
    from fedsim.meta.tans import Catalogue
    from fedsim.meta.tuning import Tuned, Tuning
    from fedsim.meta.zoo import SHAPE

    tuning, classes = Tuning(tune), max(net.num_classes for net in zoo.nets)
    prices = price_nets(zoo.nets, profile, SHAPE, classes, tuning.batch, each)
    return Judge(zoo.nets, Catalogue.of(zoo.nets), prices, prices.limit(*limit), Tuned(zoo, tuning))


def _train_and_judge(
    zoo: Zoo,
    trainings: Sequence[TansSettings],
    out: Path,
    profile: DeviceProfile,
    limit: tuple[float | None, float | None],
    tune: int,
) -> tuple[list[Score], Limit, float]:
    """Trains with each of the settings, writes the first weights, and returns scores, the limit and CPU seconds."""
    import time

    from fedsim.meta.fitting import Look
    from fedsim.meta.tans import OTHERS, OWN, lessons, meta_train, with_transfers
    from fedsim.report.terminal import console, work_bar

    scores: list[Score] = []
    training_s = 0.0
    with work_bar(console()) as progress:
        bar = progress.add_task("pricing nets", total=len(zoo.nets))
        judge = _judge(zoo, profile, limit, tune, lambda: progress.advance(bar))
        progress.update(bar, description="reading tasks")
        learned, valid, held_out = (lessons(zoo, part) for part in ("train", "valid", "held_out"))
        progress.update(bar, completed=0, total=len(learned) * (OWN + OTHERS), description="fine-tuning")
        learned = with_transfers(learned, judge.nets, judge.tuned, lambda: progress.advance(bar))
        for settings in trainings:
            progress.update(bar, completed=0, total=settings.steps, description=f"seed {settings.seed}")

            def watch(look: Look) -> None:
                progress.update(bar, completed=look.step, description=f"validation recall {look.score:.2f}")

            began, kept = time.process_time(), out.with_name(f"{out.name}.{settings.seed}")
            made = meta_train(judge.catalogue, learned, valid, settings, kept, watch)
            training_s += time.process_time() - began
            if settings is trainings[0]:
                made.save(out, settings)
            scores += _score(made, judge, held_out, settings.seed, progress)
    return scores, judge.limit, training_s


def _score(made: Tans, judge: Judge, held_out: Sequence[Lesson], seed: int, progress: Progress) -> list[Score]:
    bar = progress.task_ids[0]
    total = sum(len(judge.within(lesson, own=True)) for lesson in held_out)
    progress.update(bar, completed=0, total=total, description=f"fine-tuning, seed {seed}")
    return [judge.score(made, lesson, seed, lambda: progress.advance(bar)) for lesson in held_out]


def _show_scores(scores: Sequence[Score], seeds: int, tune: int) -> None:
    """Prints a row for each task, means over seeds, and below it recall and regret, with those of chance."""
    from fedsim.report.terminal import console, table
    from fedsim.study.paired import mean_with_interval

    grouped = by_name(scores)
    title = f"TANS on tasks of unseen classes, mean over {seeds} seeds"
    heads = ("data set", "R@1", "R@10", "best", "chosen", "near", "largest", "random")
    rows = table(*heads, left=("data set",), title=title)
    for name, own in grouped.items():
        recalls = [f"{mean(own, what):.2f}" for what in (lambda s: s.recall_1, lambda s: s.recall_10)]
        figures = (
            lambda s: s.best,
            lambda s: s.retrieved,
            lambda s: s.nearest,
            lambda s: s.largest,
            lambda s: s.random,
        )
        rows.add_row(name.removeprefix("held_out-"), *recalls, *(f"{mean(own, what):.1f}" for what in figures))
    shown = console()
    shown.print(rows)
    shown.note(
        f"accuracy in % after {tune} steps, of nets within the limit that were trained on other tasks: chosen is the "
        "retrieved one, near the most similar, largest the one with most multiply-adds"
    )
    for count, found, by_chance in (
        (1, lambda s: s.recall_1, lambda s: s.chance_1),
        (10, lambda s: s.recall_10, lambda s: s.chance_10),
    ):
        each = ", ".join(f"{mean([s for s in scores if s.seed == seed], found):.2f}" for seed in _seeds(scores))
        shown.note(
            f"recall@{count} on {len(grouped)} held-out tasks, by seed: {each}; by chance {mean(scores, by_chance):.2f}"
        )
    regret, random = mean(scores, lambda s: s.regret), mean(scores, lambda s: s.random_regret)
    each = ", ".join(
        f"{mean([s for s in scores if s.seed == seed], lambda s: s.regret):.1f}" for seed in _seeds(scores)
    )
    share = f", {regret / random:.2f} of it" if random else ""
    shown.note(
        f"regret of the retrieved net: {regret:.1f} points (by seed {each}); of a random one {random:.1f}{share}"
    )
    gains = [mean(own, lambda s: s.retrieved - s.random) for own in grouped.values()]
    middle, half = mean_with_interval(gains)
    interval = "" if math.isnan(half) else f", 95 % interval {middle - half:+.1f} to {middle + half:+.1f}"
    shown.note(f"retrieved against random: {middle:+.1f} points{interval}")
    own_regret = mean(scores, lambda s: s.own_best - s.own_retrieved)
    own_random = mean(scores, lambda s: s.own_best - s.own_random)
    shown.note(f"where the nets of a task may be taken for it: regret {own_regret:.1f} points, random {own_random:.1f}")


def _seeds(scores: Sequence[Score]) -> list[int]:
    return sorted({score.seed for score in scores})


def judge_tans(
    weights: TansWeights,
    zoo: ZooFolder,
    device: Device = MEASURED,
    limit_ms: LimitMs = None,
    margin: Margin = None,
    steps: Annotated[int, typer.Option(help="The last that is looked at, 32 images each.", min=1, max=10**4)] = 160,
    picture: Annotated[Path, typer.Option(help="Where the plot goes.")] = Path("tans.png"),
    seed: Annotated[int, typer.Option(help="Of the queries.", min=0, max=MAX_COUNT)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compare a retrieved net, fine-tuned, with training from scratch, on the held-out tasks: by steps and by joules.

    From scratch are trained a network of the retrieved architecture, and the largest of the zoo within the limit.

    Example: fedsim devices judge-tans --weights tans.safetensors --zoo zoo --device raspberry_pi_4
    """
    from dataclasses import asdict

    import torch

    from devices.profile import load_profile
    from fedsim.meta.retrieved import WAYS
    from fedsim.meta.tans import Tans, lessons
    from fedsim.meta.tuning import Tuning
    from fedsim.meta.zoo import Zoo
    from fedsim.report import strict_json
    from fedsim.report.terminal import console, work_bar

    check_picture(picture)
    check_limit(limit_ms, margin)
    torch.set_num_threads(1)
    made, profile, opened, shown = Tans.load(weights), load_profile(device), Zoo.open(zoo), console()
    looks = [step for step in (2**n * 5 for n in range(12)) if step < steps] + [steps]
    curves: list[Curve] = []
    with work_bar(shown) as progress:
        bar = progress.add_task("pricing nets", total=len(opened.nets))
        judge = _judge(opened, profile, (limit_ms, margin), Tuning.steps, lambda: progress.advance(bar))
        held_out = lessons(opened, "held_out")
        progress.update(bar, completed=0, total=len(held_out), description="training")
        for lesson in held_out:
            curves += judge.curves(made, lesson, seed, looks)
            progress.advance(bar)
    if as_json:
        kept = {"device": device, "limit_ms": judge.limit.most, "margin": judge.limit.margin}
        print(strict_json.dumps({**kept, "curves": [asdict(curve) for curve in curves]}))
    else:
        _show_curves({way: [c for c in curves if c.way == way] for way in WAYS}, device, judge.limit)
    _draw(picture, f"{len(held_out)} tasks of unseen classes, at most {_in_words(judge.limit)} on {device}", curves)
    if not as_json:
        shown.say(f"picture: {picture}")


def _show_curves(ways: dict[str, list[Curve]], device: str, limit: Limit) -> None:
    """Prints accuracies at equal steps, and at the joules that the retrieved net took for them."""
    import numpy as np

    from fedsim.report.terminal import console, table

    retrieved = next(iter(ways.values()))
    steps = retrieved[0].steps
    columns = sorted({steps[len(steps) // 3], steps[-1]})
    heads = [f"{n}\nsteps" for n in columns] + [f"joules of\n{n} steps" for n in columns]
    rows = table("", "joules\na step", *heads, left=("",))
    for way, own in ways.items():
        joules = float(np.mean([curve.step_joules for curve in own]))
        by_step = [float(np.mean([c.accuracies[c.steps.index(n)] for c in own])) for n in columns]
        pairs = list(zip(own, retrieved, strict=True))
        by_joules = [float(np.mean([c.at_joules(n * like.step_joules) for c, like in pairs])) for n in columns]
        rows.add_row(way, _figure(joules, 2), *(_figure(value) for value in (*by_step, *by_joules)))
    shown = console()
    shown.note(f"accuracy in % on {len(retrieved)} tasks of unseen classes, at most {_in_words(limit)} on {device}")
    shown.print(rows)
    shown.note(
        "joules of steps: where as many are spent as the retrieved net takes for these; - where that is before the "
        "first look, or the device cannot train"
    )


def _figure(value: float, digits: int = 1) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _draw(path: Path, title: str, curves: Sequence[Curve]) -> None:
    from devices.nas.tans.tuning_picture import tuning_picture
    from fedsim.meta.retrieved import WAYS

    by_way = {way: [curve for curve in curves if curve.way == way] for way in WAYS}
    panels: dict[str, dict[str, list[Line]]] = {
        "training steps": {way: [(c.steps, c.accuracies) for c in own] for way, own in by_way.items()}
    }
    if all(math.isfinite(curve.step_joules) for curve in curves):
        panels["joules"] = {way: [(c.joules, c.accuracies) for c in own] for way, own in by_way.items()}
    tuning_picture(path, title, panels)
