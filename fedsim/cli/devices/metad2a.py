"""`fedsim devices make-tasks`, `train-metad2a` and `propose`: cells for a data set, without searching on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsim.cli.devices.scores import by_name, mean
from fedsim.cli.options import MAX_COUNT, check_folder_place, check_place

if TYPE_CHECKING:
    from fedsim.meta.judged import Score
    from fedsim.meta.metad2a import MetaSettings
    from fedsim.meta.trained_cells import TrainedCells

Tasks = Annotated[Path, typer.Option(help="Folder of trained cells, by `fedsim devices make-tasks`.")]


def make_tasks(
    out: Annotated[Path, typer.Option(help="Folder to write; goes on with what is there.")],
    bundles: Annotated[str, typer.Option(help="Bundles of images, separated by commas.")] = "cifar10,cifar100,mnist",
    train: Annotated[int, typer.Option(help="Tasks to learn from.", min=1, max=1000)] = 12,
    valid: Annotated[int, typer.Option(help="Tasks that choose the best weights.", min=1, max=1000)] = 2,
    held_out: Annotated[int, typer.Option(help="Tasks to judge on, of other classes.", min=1, max=1000)] = 6,
    cells: Annotated[int, typer.Option(help="Cells trained on each task.", min=2, max=15625)] = 30,
    steps: Annotated[int, typer.Option(help="Training steps of a cell, 32 images each.", min=1, max=MAX_COUNT)] = 50,
    seed: Annotated[int, typer.Option(help="Of tasks, cells and their training.", min=0, max=MAX_COUNT)] = 0,
) -> None:
    """Make small data sets of bundles of images, and train cells of NAS-Bench-201 on them, for a moment each.

    Classes of a bundle x corruptions x sizes; goes on where it was stopped. The usual 600 cells take a quarter of an
    hour of one core.

    Example: fedsim devices make-tasks --out tasks
    """
    import time

    import torch

    from fedsim.meta.tasks import TaskSettings
    from fedsim.meta.trained_cells import CellTraining, TrainedCells
    from fedsim.report.terminal import console, work_bar

    check_folder_place("--out", out, ["cells"])
    torch.set_num_threads(1)
    settings = TaskSettings(tuple(bundles.split(",")), train, valid, held_out, seed)
    trained = TrainedCells(out, settings, CellTraining(steps=steps), cells)
    shown, began = console(), time.process_time()
    with work_bar(shown) as progress:
        bar = progress.add_task("training cells", total=trained.total)

        def watch(task: str) -> None:
            progress.update(bar, advance=1, description=task)

        trained.train(watch)
    took = time.process_time() - began
    shown.say(f"{trained.total} cells on {len(trained.recipes)} tasks are in {out}, {took:.0f} CPU s")


def train_metad2a(
    tasks: Tasks,
    out: Annotated[Path, typer.Option(help="Weights to write (safetensors): those of the first seed.")],
    nas: Annotated[
        Path | None, typer.Option(help="Folder of nb201_accuracy.npz and help_nb201.npz: judge on CIFAR too.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Trainings to judge, each from the start.", min=1, max=100)] = 3,
    seed: Annotated[int, typer.Option(help="The first of the seeds.", min=0, max=MAX_COUNT)] = 0,
    count: Annotated[int, typer.Option(help="Proposed cells to train on each held-out task.", min=1, max=30)] = 5,
    predictor_steps: Annotated[int, typer.Option(help="Of meta-training.", min=1, max=MAX_COUNT)] = 400,
    generator_steps: Annotated[int, typer.Option(help="Of meta-training.", min=1, max=MAX_COUNT)] = 400,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Learn which cells a data set needs, and how accurate they get, and judge both on classes never seen.

    Goes on from OUT.SEED.predictor and OUT.SEED.generator where they are there; they may be removed afterwards.

    Example: fedsim devices train-metad2a --tasks tasks --out metad2a.safetensors --nas DIR
    """
    from dataclasses import asdict

    import torch

    from fedsim.meta.metad2a import MetaSettings
    from fedsim.meta.trained_cells import TrainedCells
    from fedsim.report import strict_json
    from fedsim.report.terminal import console

    check_place("--out", out)
    torch.set_num_threads(1)
    trained, shown = TrainedCells.open(tasks), console()
    trainings = [MetaSettings(predictor_steps, generator_steps, seed=seed + number) for number in range(seeds)]
    scores, training_s = _train_and_judge(trained, trainings, out, nas, count)
    if as_json:
        print(strict_json.dumps([asdict(score) for score in scores]))
        return
    _show(scores, seeds, count)
    shown.note(f"meta-training: {training_s / seeds:.0f} CPU s for each seed, in this call")
    shown.say(f"weights: {out}")


def _train_and_judge(
    trained: TrainedCells, trainings: Sequence[MetaSettings], out: Path, nas: Path | None, count: int
) -> tuple[list[Score], float]:
    """Trains with each of the settings, writes the first weights, and returns all scores and the CPU seconds."""
    import time
    from dataclasses import asdict

    from fedsim.meta.fitting import Look
    from fedsim.meta.judged import judge_tables, judge_tasks
    from fedsim.meta.metad2a import meta_train
    from fedsim.report.terminal import console, work_bar

    scores: list[Score] = []
    training_s = 0.0
    with work_bar(console()) as progress:
        bar = progress.add_task("training cells", total=trained.total)
        trained.train(lambda task: progress.update(bar, advance=1, description=task))
        for settings in trainings:
            total = settings.predictor_steps + settings.generator_steps
            progress.update(bar, completed=0, total=total, description=f"seed {settings.seed}")

            def watch(kind: str, look: Look, first: int = settings.predictor_steps) -> None:
                before = first if kind == "generator" else 0
                progress.update(bar, completed=before + look.step, description=f"{kind} {look.score:.3f}")

            began = time.process_time()
            made = meta_train(trained, settings, out.with_name(f"{out.name}.{settings.seed}"), watch)
            training_s += time.process_time() - began
            if settings is trainings[0]:
                made.save(out, {"settings": asdict(settings)})
            progress.update(bar, description="training what was proposed")
            scores += judge_tasks(made, trained, settings.seed, count)
            if nas is not None:
                known = [name for name in trained.tasks.bundles if name in ("cifar10", "cifar100")]
                scores += judge_tables(made, nas, known, settings.seed, count)
    return scores, training_s


def _show(scores: list[Score], seeds: int, count: int) -> None:
    """Prints a row for each data set, means over seeds, and below it what pairs by task say."""
    from fedsim.report.terminal import console, table
    from fedsim.study.paired import mean_with_interval

    grouped = by_name(scores)
    title = f"MetaD2A on data sets of unseen classes, mean over {seeds} seeds"
    heads = ("data set", "Spearman", "of MACs", "best", "first", f"{count} chosen", f"{count} drawn", f"{count} random")
    rows = table(*heads, left=("data set",), title=title)
    for name, own in grouped.items():
        cells = [f"{mean(own, what):.2f}" for what in (lambda s: s.spearman, lambda s: s.spearman_macs)]
        accuracies = (
            lambda s: s.best,
            lambda s: s.first,
            lambda s: s.chosen,
            lambda s: s.generated,
            lambda s: s.random,
        )
        rows.add_row(name.removeprefix("held_out-"), *cells, *(_figure(mean(own, what)) for what in accuracies))
    shown = console()
    shown.print(rows)
    tasks = [own for own in grouped.values() if not own[0].is_known]
    by_seed = [[s for own in tasks for s in own if s.seed == seed] for seed in sorted({s.seed for s in scores})]
    each = ", ".join(f"{mean(own, lambda s: s.spearman):.3f}" for own in by_seed)
    shown.note(f"Spearman on {len(tasks)} held-out tasks, by seed: {each}")
    for what, gain in (
        (f"{count} drawn against {count} random", lambda s: s.generated - s.random),
        (f"{count} chosen against {count} random", lambda s: s.chosen - s.random),
        ("first against a random one", lambda s: s.first - s.random_all),
    ):
        middle, half = mean_with_interval([mean(own, gain) for own in tasks])
        if math.isnan(middle):
            continue
        interval = f", 95 % interval {middle - half:+.2f} to {middle + half:+.2f}" if len(tasks) > 1 else ""
        shown.note(f"{what}: {middle:+.2f} points{interval}")
    judged = [score for own in tasks for score in own]
    regret, random = mean(judged, lambda s: s.best - s.first), mean(judged, lambda s: s.best - s.random_all)
    shown.note(
        f"regret of the first against the best cell: {_figure(regret)} points, of a random one {_figure(random)}"
    )
    valid, distinct, took = (mean(scores, w) for w in (lambda s: s.valid, lambda s: s.distinct, lambda s: s.cpu_s))
    shown.note(f"drawn graphs: {valid:.1%} valid, {distinct:.1%} of these distinct; {took:.2f} CPU s for a data set")


def _figure(value: float) -> str:
    """Writes a number, or that there is none: a generator may have drawn no cell."""
    return "-" if math.isnan(value) else f"{value:.1f}"


def propose(
    weights: Annotated[Path, typer.Option(help="Weights, by `fedsim devices train-metad2a`.")],
    data: Annotated[str, typer.Option(help="Bundle of images: a folder, or a name in $FEDSIM_DATA or ./data.")],
    out: Annotated[Path, typer.Option(help="CSV to write: network,score.")] = Path("proposed.csv"),
    drawn: Annotated[int, typer.Option(help="Graphs to draw.", min=1, max=MAX_COUNT)] = 500,
    top: Annotated[int, typer.Option(help="Cells to print.", min=1, max=MAX_COUNT)] = 10,
    seed: Annotated[int, typer.Option(help="Of images and graphs.", min=0, max=MAX_COUNT)] = 0,
) -> None:
    """Propose cells of NAS-Bench-201 for a data set, with predicted accuracies, and train none.

    Writes all distinct cells that were drawn, best first; the score is the accuracy in percent that a small network
    gets in a short training, so only its order carries over to large ones.

    Example: fedsim devices propose --weights metad2a.safetensors --data cifar10
    """
    import numpy as np
    import torch

    from devices.nas.nb201 import to_string
    from devices.writing import write_atomic
    from fedsim.errors import ConfigError
    from fedsim.meta.judged import bundle_features
    from fedsim.meta.metad2a import MetaD2A
    from fedsim.report.terminal import console, table
    from fedsim.seeding import generator

    check_place("--out", out, (".csv",))
    torch.set_num_threads(1)
    made = MetaD2A.load(weights)
    found, predicted = made.propose(bundle_features(data, seed), generator(seed, "metad2a proposed"), drawn)
    if not len(found.cells):
        raise ConfigError(f"none of {drawn} drawn graphs is a cell; set --drawn higher, or train {weights} for longer")
    ranked = [(to_string(found.cells[i]), predicted[i]) for i in np.argsort(-predicted, kind="stable")]
    write_atomic(out, "network,score\n" + "".join(f"{network},{score:.4f}\n" for network, score in ranked))
    rows = table("network", "predicted %", left=("network",), title=f"cells for {data}")
    for network, score in ranked[:top]:
        rows.add_row(network, f"{score:.1f}")
    shown = console()
    shown.print(rows)
    shown.say(f"{len(ranked)} cells of {found.drawn} drawn graphs are in {out}")
